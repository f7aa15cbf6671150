"""What turns a model's last hidden state (after the final norm) into logits, read without loading the model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from m3agiqa.errors import UserError
from m3agiqa.models import model_config_json

_HEADS = ("lm_head.weight", "model.lm_head.weight", "language_model.lm_head.weight", "llm.lm_head.weight")
_EMBEDDINGS = "embed_tokens.weight"
# Keys of config.json that change the states before the head, or the logits after it, in ways that are not done here:
# MiniCPM, for one, divides the states by hidden_size / dim_model_base, and the engines differ in whether those that
# they give are divided already.
_OTHER_WAYS = (
    "dim_model_base",
    "lm_head_multiplier",
    "logits_mup_width_multiplier",
    "logits_soft_cap",
    "mup_output_alpha",
    "mup_scale_factor",
    "mup_width_multiplier",
    "mup_width_scale",
    "output_logit_soft_cap",
    "output_mult",
    "output_multiplier",
    "output_multiplier_scale",
)


@dataclass(frozen=True)
class LMHead:
    """logits = cap(scale * (weight @ h + bias)), where cap(x) is soft_cap * tanh(x / soft_cap) or x itself.

    Attributes:
        weight: [vocabulary, hidden].
        bias: [vocabulary], or None.
        scale: what all logits are multiplied with (Cohere's `logit_scale`, Granite's 1 / `logits_scaling`, and
            HyperCLOVA X's `logits_scaling`, which is no divisor there).
        soft_cap: Gemma 2's `final_logit_softcapping`, or None. It is not linear, so it cannot be folded.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    @classmethod
    def load(cls, path: Path) -> "LMHead":
        """Reads the head of a checkpoint's folder, or of one safetensors file with `lm_head.weight`.

        Raises:
            UserError: if there is no head to be found, or the logits are more than it gives of the states.
        """
        if path.is_file():
            tensors = dict.fromkeys(_names(path), path)
            settings: dict[str, Any] = {}
        else:
            tensors = _tensors(path)
            settings = _text_settings(model_config_json(path))
            _refuse_other_ways(settings, path)
        name = next((name for name in _HEADS if name in tensors), None)
        # A head that is tied to the embeddings is not stored under a name of its own.
        name = name or next((name for name in sorted(tensors) if name.endswith(_EMBEDDINGS)), None)
        if name is None:
            raise UserError(
                f"LM head of {path}", f"has none of {', '.join(_HEADS)}", "give a causal language model's checkpoint"
            )
        bias = name.removesuffix("weight") + "bias"
        return cls(
            _read(tensors[name], name),
            _read(tensors[bias], bias) if bias in tensors else None,
            scale=_scale(settings),
            soft_cap=settings.get("final_logit_softcapping"),
        )

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocabulary] of states [..., hidden]; large, for checks and debugging only."""
        found = torch.nn.functional.linear(states, self.weight, self.bias) * self.scale
        return found if self.soft_cap is None else self.soft_cap * torch.tanh(found / self.soft_cap)


def _text_settings(config: dict[str, Any]) -> dict[str, Any]:
    inner = config.get("text_config") or config.get("llm_config") or {}
    return config | inner


def _scale(settings: dict[str, Any]) -> float:
    scale, scaling = (float(settings.get(key) or 1.0) for key in ("logit_scale", "logits_scaling"))
    multiplies = str(settings.get("model_type")).startswith("hyperclovax")
    return scale * scaling if multiplies else scale / scaling


def _refuse_other_ways(settings: dict[str, Any], path: Path) -> None:
    """Refuses a model whose logits would come out wrong, and with them all that is folded or kept of them."""
    without_effect = (None, False, 0, 1)
    found = [f"{key}={settings[key]}" for key in _OTHER_WAYS if settings.get(key) not in without_effect]
    if settings.get("dim_model_base") == settings.get("hidden_size"):
        found = [one for one in found if not one.startswith("dim_model_base=")]
    # MPT's may be the name of a formula.
    if isinstance(named := settings.get("logit_scale"), str):
        found.append(f"logit_scale={named}")
    if found:
        raise UserError(
            f"LM head of {path}",
            f"its logits are scaled in a way that is not known here (config.json: {', '.join(found)})",
            "train a predictor on the model's states, which need no LM head: m3agiqa capture, train-predictor",
        )


def _tensors(folder: Path) -> dict[str, Path]:
    """Tensor name -> file of a checkpoint in safetensors, in one file or several."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in found.items()}
    return {name: file for file in sorted(folder.glob("*.safetensors")) for name in _names(file)}


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def _read(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)
