"""Reads the adapters that a configuration names, and refuses those that were not made for its model."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from m3agiqa.adapters.files import (
    Adapter,
    canonical,
    checkpoint_files,
    checkpoint_shapes,
    has_own_head,
    listed,
    read_adapter,
)
from m3agiqa.aspects import Aspect
from m3agiqa.config import AUTO_ADAPTERS
from m3agiqa.errors import UserError
from m3agiqa.models import adapter_beside, model_config_json
from m3agiqa.seen import Seen, read, union

KEY = "model.adapters"
"""How errors call the setting."""

Adapters = str | Mapping[Aspect, str | None] | Mapping[str, str | None]
"""What the setting may be: one adapter for all aspects, or one by aspect."""
_ENDS_BYTES = 2**20


def load_adapters(adapters: Adapters | None, model: Path) -> dict[Aspect, Adapter]:
    """The LoRA adapter of each aspect; aspects without one are not in the result and run the base model.

    Args:
        adapters: None; the folder or hub id of one adapter for all aspects; aspect -> folder or hub id; or `auto`,
            the adapter that comes with the model, if one does.
        model: the base model's folder (`m3agiqa.models.model_folder`).

    Adapters of equal contents are one object, so that they share vLLM's slot and prefix cache.

    Raises:
        UserError: for an adapter that is missing, unreadable, no LoRA, or made for another model, and for
            an unknown aspect.
    """
    if adapters == AUTO_ADAPTERS:
        beside = adapter_beside(model)
        adapters = None if beside is None else str(beside)
    if not adapters:
        return {}
    wanted = _by_aspect(adapters)
    loaded = {value: _load(value, key, model) for value, key in dict(wanted.values()).items()}
    same = {adapter.digest: adapter for adapter in reversed(loaded.values())}
    return {aspect: same[loaded[value].digest] for aspect, (value, _) in wanted.items()}


def trained_on(model: Path, adapters: Iterable[Adapter]) -> tuple[Seen | None, list[str]]:
    """What some adapters were trained on, and a model that others are merged into, as far as their folders say.

    Returns:
        That, or None where nothing is known; and the names of the adapters that say nothing.

    Raises:
        UserError: for what their folders say and cannot be read.
    """
    found = {adapter.name: read(adapter.folder) for adapter in adapters}
    return union([read(model), *found.values()]), [name for name, one in found.items() if one is None]


def _by_aspect(adapters: Adapters) -> dict[Aspect, tuple[str, str]]:
    """Aspect -> the value given for it and the key it was given under."""
    if isinstance(adapters, str):
        return dict.fromkeys(Aspect, (adapters, KEY))
    unknown = sorted(str(name) for name in adapters if str(name) not in set(Aspect))
    if unknown:
        raise UserError(f"{KEY}.{unknown[0]}", "is no aspect", f"the aspects are {', '.join(Aspect)}")
    return {Aspect(name): (value, f"{KEY}.{name}") for name, value in adapters.items() if value is not None}


def _load(value: str, key: str, model: Path) -> Adapter:
    adapter = read_adapter(value, key)
    shown = f"{key}={value}"
    kind = adapter.settings["peft_type"]
    if kind.upper() != "LORA":
        raise UserError(
            shown,
            f"is of the kind {kind}, and only LORA can be applied while scoring",
            "merge it into the model with `m3agiqa merge-adapter` and give the result as model.path",
        )
    check_base(adapter, model, shown)
    return adapter


def check_base(adapter: Adapter, model: Path, shown: str) -> None:
    """Refuses an adapter that was made for another model than that in `model`.

    Its `base_model_name_or_path` is judged where both sides can be told: two hub ids, or two folders of
    this machine. Names and shapes of its tensors are held against the checkpoint's safetensors headers.

    Raises:
        UserError: naming the other model, or the first tensors that do not fit.
    """
    misfits = _misfits(adapter, model)
    if misfits:
        base = adapter.settings.get("base_model_name_or_path")
        cure = f"give it as model.path: {base}" if base else "give the model that it was trained from as model.path"
        raise UserError(shown, f"does not fit the model in {model}: {listed(misfits)}", cure)
    other = _other_base(adapter.settings.get("base_model_name_or_path"), model)
    if other:
        raise UserError(
            shown,
            f"was made for {other}, not for the model in {model}",
            "give that model as model.path, or, if the two are the same, correct base_model_name_or_path in "
            "its adapter_config.json",
        )


def _other_base(base: Any, model: Path) -> str | None:
    """The model that an adapter says it was made for, if that is certainly another one."""
    if not isinstance(base, str) or not base:
        return None
    folder = Path(base).expanduser()
    if (folder / "config.json").is_file():
        same = folder.resolve() == model.resolve() or _weights_mark(folder) == _weights_mark(model)
        return None if same else base
    names = (_hub_name(base), _hub_name(str(model)))
    # The owner is not compared: copies of a model under other owners are common.
    return base if None not in names and names[0] != names[1] else None


def _hub_name(path: str) -> str | None:
    """The name of a hub model without its owner: of `owner/name`, or of a folder in the hub's cache."""
    for part in Path(path).parts:
        if part.startswith("models--"):
            return part.split("--")[-1].lower()
    return path.split("/")[1].lower() if path.count("/") == 1 and not path.startswith((".", "/", "~")) else None


def _weights_mark(folder: Path) -> str:
    """Tells checkpoints apart by the sizes and both ends of their weight files, whatever lies beside them."""
    digest = hashlib.sha256()
    for path in checkpoint_files(folder):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(_ENDS_BYTES))
            file.seek(max(path.stat().st_size - _ENDS_BYTES, 0))
            digest.update(file.read(_ENDS_BYTES))
    return digest.hexdigest()


def _misfits(adapter: Adapter, model: Path) -> list[str]:
    """What of an adapter does not fit a checkpoint, with the reason; empty where that cannot be judged."""
    shapes = checkpoint_shapes(model)
    if not shapes:
        return []
    modules = {name.rpartition(".")[0] for name in shapes}
    # Quantised weights are packed: their shapes are not those of the matrices.
    packed = "quantization_config" in model_config_json(model)
    tied = not has_own_head(shapes)
    found: list[str] = []
    for module, (a, b) in adapter.lora_modules.items():
        name = canonical(module)
        if name not in modules:
            # Fused experts and tied heads have other names in the file than in the model.
            elsewhere = ".experts" in name or (name.endswith("lm_head") and tied)
            found += [] if elsewhere else [f"{module} (the model has none)"]
        elif f"{name}.weight" in shapes and not packed:
            found += _misfit(module, adapter, a, b, shapes[f"{name}.weight"])
    for tensor, here in adapter.full_tensors.items():
        there = shapes.get(canonical(tensor))
        if there is None and not (packed or (tensor.endswith("lm_head.weight") and tied)):
            found.append(f"{tensor} (the model has none)")
        elif there is not None and not packed and there != adapter.shapes[here]:
            found.append(f"{tensor} ({_by(adapter.shapes[here])}, in the model {_by(there)})")
    return found


def _misfit(module: str, adapter: Adapter, a: str, b: str, base: tuple[int, ...]) -> list[str]:
    made_for = (adapter.shapes[b][0], adapter.shapes[a][1])
    flipped = "lora_embedding" in a or bool(adapter.settings.get("fan_in_fan_out"))
    made_for = made_for[::-1] if flipped else made_for
    return [] if made_for == base[:2] else [f"{module} (for {_by(made_for)}, in the model {_by(base)})"]


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
