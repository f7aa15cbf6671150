"""The predictor's head: states of a conversation -> xLSTM -> one number for each output.

As published (M3-AGIQA, arXiv 2502.15167, section 3.3): a linear layer to 512, four xLSTM blocks of which the
second is an sLSTM, the mean over the tokens, and a regression 512-128-1 with a ReLU. The blocks are those of
the `xlstm` package; their cells and small projections are replaced by faster ones with the same weights.
"""

import math
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from torch import nn
from torch.utils import cpp_extension

from m3agiqa.errors import UserError
from m3agiqa.predictor.fold import LongWay, project
from m3agiqa.predictor.lm_head import LMHead
from m3agiqa.predictor.mlstm import HeadwiseLinear, MLSTMCell
from m3agiqa.predictor.slstm import SLSTMCell
from m3agiqa.train_config import HeadShape

_CHECKED_STATES = 64


class LongWayConfig(BaseModel):
    """An LM head that goes with the predictor, because its first layer cannot be folded with it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocabulary: PositiveInt = Field(description="Number of logits")
    bias: bool = Field(default=False, description="Whether the LM head has a bias")
    scale: float = Field(default=1.0, description="What the logits are multiplied with")
    soft_cap: float | None = Field(default=None, description="Their tanh soft cap")


class HeadConfig(HeadShape):
    """A head: its shape, what it takes and what it gives; the defaults are the published one's."""

    input_width: PositiveInt = Field(description="Numbers a token: hidden size, or vocabulary if it takes logits")
    takes: Literal["states", "logits"] = Field(default="states", description="What its tokens are")
    outputs: tuple[str, ...] = Field(default=("quality",), min_length=1, description="Names of the outputs, in order")
    long_way: LongWayConfig | None = Field(default=None, description="The LM head that could not be folded, if any")

    @model_validator(mode="after")
    def _differ(self) -> Self:
        if len(set(self.outputs)) != len(self.outputs):
            raise ValueError(f"outputs {', '.join(self.outputs)} are not all different")
        return self


class Head(nn.Module):
    """[batch, tokens, input width] -> [batch, outputs], in float32.

    Attributes:
        config: its shape.
        input: the first layer; `LongWay` where it could not be folded with the LM head.
        stack: the package's `xLSTMBlockStack` with faster cells; its state dict is the package's (`vanilla`).
        fc: the regression.

    Args:
        stack: what stands in for the xLSTM, [batch, tokens, width] -> the same; a token must not depend on later ones.
    """

    def __init__(self, config: HeadConfig, stack: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        self.input: nn.Linear | LongWay = _input_layer(config)
        self.stack = xlstm_stack(config) if stack is None else stack
        self.dropout = nn.Dropout(config.dropout)
        self.fc = nn.Sequential(
            nn.Linear(config.width, config.hidden), nn.ReLU(), nn.Linear(config.hidden, len(config.outputs))
        )
        for layer in (self.input, *(layer for layer in self.fc if isinstance(layer, nn.Linear))):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Runs over right-padded sequences of any length.

        Args:
            states: [batch, tokens, input width], of any floating type; pads may hold anything, NaN included.
            lengths: [batch], how many tokens of each are real.

        Returns:
            [batch, outputs] in the type of the weights, before any mapping onto a scale.

        Raises:
            ValueError: for shapes that do not fit and lengths outside 1 to `tokens`.
        """
        lengths = self._check(states, lengths)
        longest = int(lengths.max())
        real = torch.arange(longest, device=lengths.device) < lengths[:, None]
        # Zeros times NaN would be NaN: pads are replaced, not multiplied.
        states = states[:, :longest].masked_fill(~real.unsqueeze(-1), 0)
        if isinstance(self.input, nn.Linear):
            states = states.to(self.input.weight.dtype)
        outputs: torch.Tensor = self.fc(self.dropout(self._pool(self.stack(self.input(states)), real, lengths)))
        return outputs

    def fold_onto(self, lm_head: LMHead, states: torch.Tensor | None = None) -> "Head":
        """The same head on hidden states instead of logits.

        Args:
            lm_head: of the model whose states it will see.
            states: [tokens, hidden] to check the folding on; None draws some at random.

        Returns:
            A new head. Its first layer is folded where that is exact to `fold.TOLERANCE`, else it takes the
            LM head with it and goes the long way.

        Raises:
            ValueError: if it takes no logits, or the vocabularies differ.
        """
        if self.config.takes != "logits" or not isinstance(self.input, nn.Linear):
            raise ValueError("only a head that takes logits can be folded")
        vocabulary, hidden = lm_head.weight.shape
        if vocabulary != self.config.input_width:
            raise ValueError(f"the head takes {self.config.input_width} logits, but the LM head gives {vocabulary}")
        states = _states_like(lm_head) if states is None else states
        layer = project(self.input.weight.detach(), self.input.bias.detach(), lm_head, states)
        with_head = None
        if isinstance(layer, LongWay):
            with_head = LongWayConfig(
                vocabulary=vocabulary, bias=lm_head.bias is not None, scale=lm_head.scale, soft_cap=lm_head.soft_cap
            )
        config = self.config.model_copy(update={"input_width": hidden, "takes": "states", "long_way": with_head})
        with torch.device("meta"):
            head = Head(config)
        own = {name: value for name, value in self.state_dict().items() if not name.startswith("input.")}
        new = {f"input.{name}": value for name, value in layer.state_dict().items()}
        head.load_state_dict({k: v.clone() for k, v in (own | new).items()}, assign=True)
        return head.train(self.training)

    def _check(self, states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        width = self.config.input_width
        if states.ndim != 3 or states.shape[-1] != width:
            raise ValueError(f"states are {list(states.shape)}, but this head takes [batch, tokens, {width}]")
        batch, tokens, _ = states.shape
        if lengths.shape != (batch,) or lengths.is_floating_point():
            raise ValueError(f"lengths are {list(lengths.shape)} {lengths.dtype}, not {batch} whole numbers")
        if bad := [n for n in lengths.tolist() if not 1 <= n <= tokens]:
            raise ValueError(f"length {bad[0]} is not within 1 and the {tokens} tokens that there are")
        return lengths.to(states.device)

    def _pool(self, x: torch.Tensor, real: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """x [batch, tokens, width] -> [batch, width], over the real tokens only."""
        pooling = self.config.pooling
        if pooling == "mean":
            return x.masked_fill(~real.unsqueeze(-1), 0).sum(1) / lengths.unsqueeze(-1)
        if pooling == "max":
            return x.masked_fill(~real.unsqueeze(-1), -math.inf).amax(1)
        last = x[torch.arange(len(x), device=x.device), lengths - 1]
        return last if pooling == "last" else (x[:, 0] + last) / 2


def xlstm_stack(config: HeadConfig) -> nn.Module:
    """The package's blocks with our cells and small projections: [batch, tokens, width] -> the same.

    Raises:
        UserError: if the `xlstm` package is not installed.
    """
    xlstm = _package()
    mlstm = xlstm.mLSTMLayerConfig(
        conv1d_kernel_size=config.conv_kernel, qkv_proj_blocksize=config.qkv_block, num_heads=config.heads
    )
    slstm = xlstm.sLSTMLayerConfig(
        backend="vanilla",
        num_heads=config.heads,
        conv1d_kernel_size=config.conv_kernel,
        bias_init="powerlaw_blockdependent",
    )
    feedforward = xlstm.FeedForwardConfig(proj_factor=config.ffn_factor, act_fn="gelu", dropout=config.dropout)
    stack: nn.Module = xlstm.xLSTMBlockStack(
        xlstm.xLSTMBlockStackConfig(
            mlstm_block=xlstm.mLSTMBlockConfig(mlstm=mlstm),
            slstm_block=xlstm.sLSTMBlockConfig(slstm=slstm, feedforward=feedforward),
            # It sizes the causal mask of the package's cell alone; ours does without, so any length will do.
            context_length=1,
            num_blocks=config.blocks,
            embedding_dim=config.width,
            slstm_at=list(config.slstm_at),
            dropout=config.dropout,
        )
    )
    for block in stack.get_submodule("blocks").children():
        _quicken(block.get_submodule("xlstm"), config.heads)
    return stack


def _package() -> Any:
    """The module `xlstm`. Where there is a GPU, importing it asks for a CUDA toolkit that nothing here needs."""
    home, cpp_extension.CUDA_HOME = cpp_extension.CUDA_HOME, cpp_extension.CUDA_HOME or "/usr/local/cuda"
    try:
        import xlstm
    except ImportError as error:
        raise UserError(
            "the predictor", f"needs the package xlstm ({error})", "pip install 'xlstm>=2.0.6,<2.1'"
        ) from None
    finally:
        cpp_extension.CUDA_HOME = home
    return xlstm


def _quicken(layer: Any, heads: int) -> None:
    """Replaces the slow parts of one of the package's layers, in place."""
    if hasattr(layer, "slstm_cell"):
        layer.slstm_cell = SLSTMCell(layer.slstm_cell._recurrent_kernel_, layer.slstm_cell._bias_)
        return
    layer.mlstm_cell = MLSTMCell(layer.mlstm_cell, heads)
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(layer, name, HeadwiseLinear(getattr(layer, name).weight))


def _input_layer(config: HeadConfig) -> nn.Linear | LongWay:
    if config.long_way is None:
        return nn.Linear(config.input_width, config.width)
    size = config.long_way.vocabulary
    bias = torch.empty(size) if config.long_way.bias else None
    lm_head = LMHead(torch.empty(size, config.input_width), bias, config.long_way.scale, config.long_way.soft_cap)
    return LongWay(torch.empty(config.width, size), None, lm_head)


def _states_like(lm_head: LMHead) -> torch.Tensor:
    """States [tokens, hidden] to check a folding on where there are no real ones.

    Half are random; half point to the logits of single tokens, as the states of a sure model do. They are as
    long as a final norm makes them.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary, hidden = lm_head.weight.shape
    tokens = torch.randint(vocabulary, (_CHECKED_STATES // 2,), generator=generator)
    rows = torch.cat((torch.randn(_CHECKED_STATES // 2, hidden, generator=generator), lm_head.weight[tokens].float()))
    return nn.functional.normalize(rows) * math.sqrt(hidden)
