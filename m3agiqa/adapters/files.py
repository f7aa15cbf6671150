"""What lies in an adapter's and in a checkpoint's folder: settings, tensor names and shapes. No weights are read."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from m3agiqa.errors import UserError
from m3agiqa.models import model_digest
from m3agiqa.seen import FILE as TRAINED_ON

_PREFIX = "base_model.model."
_LORA = re.compile(r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B)")
_OF_TUNER = re.compile(r"\.(lora_|token_adapter|trainable_tokens)\w*(\.\w+)?$")
# Parts of module paths that differ between versions of transformers, and between file and module.
_WANDERING = {"base_model", "model", "language_model"}

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor name -> shape."""


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter on disk.

    Attributes:
        name: unique among adapters of different contents; fit to be a PEFT and a vLLM adapter name.
        folder: holds adapter_config.json and the weights.
        rank: the highest of its modules' ranks; 0 for kinds of adapters that have none.
        digest: identifies its files (`m3agiqa.models.model_digest`), for the fingerprint.
        settings: adapter_config.json.
        shapes: its tensors, by their names in the file.
    """

    name: str
    folder: Path
    rank: int
    digest: str
    settings: Mapping[str, Any] = field(compare=False, repr=False)
    shapes: Shapes = field(compare=False, repr=False)

    @cached_property
    def lora_modules(self) -> dict[str, tuple[str, str]]:
        """Module -> names of its A and B, for every module that has both."""
        found: dict[str, dict[str, str]] = {}
        for tensor in self.shapes:
            if match := _LORA.fullmatch(tensor.removeprefix(_PREFIX)):
                side = "A" if "_A" in match["part"] else "B"
                found.setdefault(match["module"], {})[side] = tensor
        return {module: (ab["A"], ab["B"]) for module, ab in found.items() if len(ab) == 2}

    @cached_property
    def full_tensors(self) -> dict[str, str]:
        """Tensor of the base model -> the tensor here that takes its place (`modules_to_save`, biases)."""
        names = {tensor: tensor.removeprefix(_PREFIX) for tensor in self.shapes}
        return {name.replace(".base_layer.", "."): t for t, name in names.items() if self._is_full(name)}

    def _is_full(self, name: str) -> bool:
        saved = self.settings.get("modules_to_save") or []
        if any(re.search(rf"(^|\.){re.escape(module)}\.", name) for module in saved):
            return True
        return self.settings["peft_type"].upper() == "LORA" and not _OF_TUNER.search(name)

    def scaling(self, module: str) -> float:
        """What B·A is multiplied by, as PEFT 0.21 has it (`peft/tuners/lora/layer.py`)."""
        alpha = _of_pattern(self.settings.get("alpha_pattern"), module, self.settings.get("lora_alpha", 8))
        rank = _of_pattern(self.settings.get("rank_pattern"), module, self.settings.get("r", 8))
        return float(alpha) / (rank**0.5 if self.settings.get("use_rslora") else rank)


def _of_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    matching = (v for pattern, v in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(matching, default)


def read_adapter(value: str, key: str) -> Adapter:
    """Reads a local folder's, or a hub id's (`owner/name`, `owner/name@revision`), settings and tensor names.

    Args:
        key: how the error is to call it (`adapters.quality`).

    Raises:
        UserError: if it is missing, cannot be reached or read, or is no PEFT adapter.
    """
    shown = f"{key}={value}"
    folder = _adapter_folder(value, shown)
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(shown, f"adapter_config.json cannot be read ({error})", "save the adapter again") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("peft_type"), str):
        raise UserError(shown, "adapter_config.json names no peft_type", "give an adapter saved by PEFT")
    shapes = _adapter_shapes(folder, shown)
    digest = model_digest(folder)
    name = re.sub(r"\W+", "_", f"{folder.name}_{digest[:8]}")
    return Adapter(name, folder, _rank(settings, shapes), digest, settings, shapes)


def _rank(settings: Mapping[str, Any], shapes: Shapes) -> int:
    asked = [settings.get("r", 0), *(settings.get("rank_pattern") or {}).values()]
    ranks = [rank for rank in asked if isinstance(rank, int)]
    return max([*ranks, *(shape[0] for name, shape in shapes.items() if ".lora_A." in name), 0])


def _adapter_folder(value: str, shown: str) -> Path:
    folder = Path(value).expanduser()
    if value and folder.is_dir():
        if not (folder / "adapter_config.json").is_file():
            raise UserError(shown, "holds no adapter_config.json", "give the folder of an adapter saved by PEFT")
        return folder.resolve()
    if not value or value.startswith((".", "/", "~")) or value.count("/") != 1:
        raise UserError(shown, "is no folder", "give an adapter's folder or a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name, _, revision = value.partition("@")
    try:
        found = Path(snapshot_download(name, revision=revision or None, allow_patterns=["adapter_*", TRAINED_ON]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            shown,
            f"is neither a folder, nor cached here, nor to be had from the hub ({reason})",
            "check the path or id, log in with `hf auth login`, or give a local folder",
        ) from None
    if not (found / "adapter_config.json").is_file():
        raise UserError(shown, "holds no adapter_config.json", "give the hub id of a PEFT adapter")
    return found


def _adapter_shapes(folder: Path, shown: str) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError

    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        rule = "holds no adapter_model.safetensors"
        pickled = (folder / "adapter_model.bin").is_file()
        cure = "load it with PEFT and save it again, which writes one" if pickled else "give a whole adapter"
        raise UserError(shown, rule, cure)
    try:
        shapes = tensor_shapes(weights)
    except (OSError, SafetensorError) as error:
        raise UserError(shown, f"adapter_model.safetensors cannot be read ({error})", "copy it again") from None
    if not shapes:
        raise UserError(shown, "adapter_model.safetensors holds no tensors", "save the adapter again")
    return shapes


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file, from its header."""
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint; empty where it has weights of another kind."""
    others = ("adapter_", "consolidated")
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith(others))


def checkpoint_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes of a checkpoint's tensors; empty where it is not in safetensors."""
    return {canonical(n): s for file in checkpoint_files(folder) for n, s in tensor_shapes(file).items()}


def has_own_head(shapes: Shapes) -> bool:
    """Whether a checkpoint has an LM head of its own, rather than one tied to the embeddings."""
    return any(name.endswith("lm_head.weight") for name in shapes)


def canonical(name: str) -> str:
    """A tensor's or module's name without what differs between writers of the same model.

    `model.language_model.layers.0.mlp` (transformers 5), `language_model.model.layers.0.mlp` (a LLaVA on the
    hub) and `base_model.model.model.layers.0.mlp` (PEFT on a language model) all become `layers.0.mlp`.
    """
    return ".".join(part for part in name.split(".") if part not in _WANDERING)


def listed(names: list[str], most: int = 3) -> str:
    """The first few of some names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
