"""Folded logits: the predictor's first layer and the model's LM head as one small matrix.

The published predictor begins with a linear layer W [512, vocabulary] on the model's logits
(M3-AGIQA, arXiv 2502.15167, section 3.3). The logits are linear in the hidden state h, so

    W @ (s * (L @ h + b_L)) + b_W  =  (s * W @ L) @ h + (s * W @ b_L + b_W)

and one matrix [512, hidden] does the work of both: hundreds of times fewer operations, and logits of
128,256 numbers a token never exist. A tanh soft cap between them is not linear; then the long way is
taken, in slices of the vocabulary, so that even there nothing of the size of the logits exists.
"""

import torch
from torch import nn

from m3agiqa.predictor.lm_head import LMHead

# Slices of the vocabulary in the long way and while folding: a few hundred MB at most.
_SLICE = 8192
TOLERANCE = 1e-5
"""Largest relative difference between both ways, in float32, at which folding counts as exact."""


class NotFoldable(ValueError):
    """The head cannot be folded; `LongWay` gives the right answer."""


class Folded(nn.Module):
    """states [..., hidden] -> [..., width], by one matrix."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(states.to(self.weight.dtype), self.weight, self.bias)


class LongWay(nn.Module):
    """states [..., hidden] -> [..., width], through the logits, a slice of the vocabulary at a time."""

    head_weight: torch.Tensor
    head_bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, head: LMHead) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(weight.new_zeros(weight.shape[0]) if bias is None else bias)
        self.register_buffer("head_weight", head.weight)
        self.register_buffer("head_bias", head.bias)
        self._scale, self._soft_cap = head.scale, head.soft_cap

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        out = self.bias.expand(*states.shape[:-1], -1)
        for start in range(0, self.weight.shape[1], _SLICE):
            part = slice(start, start + _SLICE)
            bias = None if self.head_bias is None else self.head_bias[part]
            head = LMHead(self.head_weight[part], bias, self._scale, self._soft_cap)
            out = out + head.logits(states.to(head.weight.dtype)).to(self.weight.dtype) @ self.weight[:, part].T
        return out


def fold(weight: torch.Tensor, bias: torch.Tensor | None, head: LMHead) -> Folded:
    """Folds a linear layer on logits into one on hidden states.

    Args:
        weight: [width, vocabulary].
        bias: [width], or None.
        head: the LM head of the model whose states it will see.

    Returns:
        A layer on states [..., hidden], in the data type of `weight`; summed in float64 and rounded once.

    Raises:
        NotFoldable: if the head has a soft cap.
        ValueError: if the vocabularies differ.
    """
    if head.soft_cap is not None:
        raise NotFoldable(f"the logits pass a tanh soft cap of {head.soft_cap:g}, which is not linear")
    width, vocabulary = weight.shape
    if head.weight.shape[0] != vocabulary:
        raise ValueError(f"the layer takes {vocabulary} logits, but the LM head gives {head.weight.shape[0]}")
    matrix = torch.zeros(width, head.weight.shape[1], dtype=torch.float64)
    offset = torch.zeros(width, dtype=torch.float64) if bias is None else bias.double()
    for start in range(0, vocabulary, _SLICE):
        part = weight[:, start : start + _SLICE].double()
        matrix += part @ head.weight[start : start + _SLICE].double()
        if head.bias is not None:
            offset = offset + head.scale * (part @ head.bias[start : start + _SLICE].double())
    return Folded((head.scale * matrix).to(weight.dtype), offset.to(weight.dtype))


@torch.inference_mode()
def folding_error(
    folded: Folded, weight: torch.Tensor, bias: torch.Tensor | None, head: LMHead, states: torch.Tensor
) -> float:
    """Largest difference between both ways on states [tokens, hidden], relative to the largest output, in float32."""
    exact = LMHead(head.weight.float(), None if head.bias is None else head.bias.float(), head.scale, head.soft_cap)
    long = LongWay(weight.float(), None if bias is None else bias.float(), exact)(states.float())
    short = nn.functional.linear(states.float(), folded.weight.float(), folded.bias.float())
    return float((short - long).abs().max() / long.abs().max().clamp_min(torch.finfo(torch.float32).tiny))


def project(weight: torch.Tensor, bias: torch.Tensor | None, head: LMHead, states: torch.Tensor) -> Folded | LongWay:
    """The layer to use: folded where that is exact on these very states, else the long way.

    Args:
        weight: [width, vocabulary].
        bias: [width], or None.
        head: the LM head.
        states: [tokens, hidden] of real tokens, to check on.
    """
    try:
        folded = fold(weight, bias, head)
    except NotFoldable:
        return LongWay(weight, bias, head)
    if folding_error(folded, weight, bias, head, states) <= TOLERANCE:
        return folded
    return LongWay(weight, bias, head)
