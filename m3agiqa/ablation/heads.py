"""Heads that differ from ours in their sequence model alone: same first layer, pooling and regression.

All of them are causal, as the xLSTM is, and have as many blocks of the same width.

Shapes: B conversations, T tokens, W the width between the blocks.
"""

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from m3agiqa.predictor.head import Head, HeadConfig


def builder(kind: str) -> Callable[[HeadConfig], Head]:
    """What makes a head of a kind: xlstm, lstm, gru, transformer or mlp."""
    if kind == "xlstm":
        return Head
    stacks: dict[str, Callable[[HeadConfig], nn.Module]] = {
        "lstm": lambda config: _Recurrent(nn.LSTM, config),
        "gru": lambda config: _Recurrent(nn.GRU, config),
        "transformer": _Transformer,
        "mlp": lambda _: nn.Identity(),
    }
    stack = stacks[kind]
    return lambda config: Head(config, stack(config))


class _Recurrent(nn.Module):
    """[B, T, W] -> [B, T, W]: torch's LSTM or GRU, one layer a block."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU], config: HeadConfig) -> None:
        super().__init__()
        dropout = config.dropout if config.blocks > 1 else 0.0
        self.layers = kind(config.width, config.width, config.blocks, batch_first=True, dropout=dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, _ = self.layers(x)
        return cast(torch.Tensor, out)


class _Transformer(nn.Module):
    """[B, T, W] -> [B, T, W]: pre-norm encoder layers with a causal mask and sinusoidal positions.

    Source of the positions: Vaswani et al., arXiv 1706.03762, section 3.5.
    """

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            config.width,
            config.heads,
            4 * config.width,
            config.dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerEncoder(
            layer, config.blocks, nn.LayerNorm(config.width), enable_nested_tensor=False
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=x.dtype)
        return cast(torch.Tensor, self.layers(x + _positions(x), mask=mask, is_causal=True))


def _positions(x: torch.Tensor) -> torch.Tensor:
    """[T, W] for x [B, T, W]."""
    _, tokens, width = x.shape
    rate = torch.exp(torch.arange(0, width, 2, device=x.device, dtype=x.dtype) * (-math.log(10_000.0) / width))
    angle = torch.arange(tokens, device=x.device, dtype=x.dtype)[:, None] * rate
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(1)[:, :width]
