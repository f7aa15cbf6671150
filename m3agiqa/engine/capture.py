"""From the states of a conversation to what `capture.kind` asks for, the same way for every engine."""

from pathlib import Path

import torch

from m3agiqa.config import CaptureConfig
from m3agiqa.predictor.lm_head import LMHead
from m3agiqa.records import Captured


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
        if self._head is None:
            return Captured(states)
        logits = self._head.logits(states.to(self._head.weight.dtype))
        if self._config.kind == "logits":
            return Captured(logits)
        top = logits.topk(min(self._config.top_k, logits.shape[-1]), dim=-1)
        return Captured(top.values, top.indices)
