"""From the states of a conversation to what `capture.kind` asks for, the same way for every engine."""

from pathlib import Path

import torch

from m3agiqa.config import CaptureConfig
from m3agiqa.predictor.lm_head import LMHead
from m3agiqa.records import Captured

# Logits of so many tokens exist at once where the largest are kept: 38 MB with a vocabulary of 150,000 entries, while
# those of a conversation of 2,000 tokens would be 1.2 GB.
_TOKENS = 64


class Keeper:
    """Turns states into what is to be kept. Reads the LM head only where logits are asked for.

    Args:
        config: which kind.
        folder: the model's checkpoint.
    """

    def __init__(self, config: CaptureConfig, folder: Path) -> None:
        self._config = config
        self._head = LMHead.load(folder) if config.kind in ("top_k", "logits") else None

    @property
    def wanted(self) -> bool:
        """Whether the engine has to capture states at all."""
        return self._config.kind != "none"

    @torch.inference_mode()
    def keep(self, states: torch.Tensor) -> Captured:
        """What is kept of states [tokens, hidden] (after the final norm)."""
        head = self._head
        if head is None:
            return Captured(states)
        # States may come from a GPU; the head is in the memory that it was read into.
        states = states.to(head.weight)
        if self._config.kind == "logits":
            return Captured(head.logits(states))
        k = min(self._config.top_k, head.weight.shape[0])
        top = [head.logits(some).topk(k, dim=-1) for some in states.split(_TOKENS)]
        return Captured(torch.cat([one.values for one in top]), torch.cat([one.indices for one in top]))
