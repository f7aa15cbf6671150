"""Writes the full checkpoint of a model with an adapter merged into it."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3agiqa.adapters.files import Adapter, canonical, checkpoint_files, checkpoint_shapes, has_own_head, read_adapter
from m3agiqa.adapters.load import check_base, trained_on
from m3agiqa.adapters.peft import attach
from m3agiqa.config import ModelConfig
from m3agiqa.errors import UserError
from m3agiqa.models import model_config_json, model_digest, model_folder
from m3agiqa.seen import FILE as TRAINED_ON

if TYPE_CHECKING:
    import torch

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_NOT_COPIED = ("README.md", "card.json", "config.json", "generation_config.json")
_CHECKED = 4
_LEAST_KEPT = 0.8
_DTYPES = ("float32", "bfloat16", "float16")
_AUTO_CLASSES = ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModel")


def merge_adapter(
    model: str, adapter: str, out: str | Path, *, trust_remote_code: bool = False, dtype: str | None = None
) -> Path:
    """Merges a PEFT adapter of any kind that can be merged, whole modules (`modules_to_save`) included.

    The model is held in memory once. All files of the base checkpoint but its weights come along as they
    are; `m3agiqa_merge.json` names the digests of what was merged. Merging rounds to the checkpoint's
    precision; give `dtype="float32"` where that matters.

    Args:
        model: `tiny`, a folder or a hub id. adapter: a folder or a hub id. out: a new or an empty folder.
        dtype: float32, bfloat16 or float16; None keeps the checkpoint's.

    Returns:
        The folder, complete and checked; nothing is left there if anything goes wrong.

    Raises:
        UserError: for a model, adapter or folder that cannot be used, and a precision that would lose the adapter.
        RuntimeError: if the written weights are not those of base + scaling · B · A.
    """
    target = Path(out).expanduser().resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--out {out}", "is there already and not empty", "give a new folder")
    if dtype not in (None, *_DTYPES):
        raise UserError(f"--dtype {dtype}", "is not known", f"give one of {', '.join(_DTYPES)}")
    folder = model_folder(ModelConfig.model_validate({"path": model}))
    source = read_adapter(adapter, "--adapter")
    check_base(source, folder, f"--adapter {adapter}")
    _check_kinds(folder, source)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that moving it there is one step.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        work = Path(temporary) / "merged"
        _merge(folder, source, work, trust_remote_code=trust_remote_code, dtype=dtype)
        _copy_companions(folder, work, dtype)
        met, _ = trained_on(folder, [source])
        if met is not None:
            met.write(work / TRAINED_ON)
        checked = check_merged(folder, source, work)
        record = {"model": model_digest(folder), "adapter": source.digest, "dtype": dtype, **checked}
        (work / "m3agiqa_merge.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for file in work.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
        work.replace(target)
    return target


def _merge(folder: Path, adapter: Adapter, out: Path, *, trust_remote_code: bool, dtype: str | None) -> None:
    import torch

    base = _load_base(folder, trust_remote_code, getattr(torch, dtype) if dtype else "auto")
    peft_model = attach(base, adapter)
    try:
        with torch.no_grad():
            # `safe_merge` refuses weights that became infinite or NaN, at the price of one layer's memory.
            merged = peft_model.merge_and_unload(safe_merge=True)
    except (NotImplementedError, ValueError) as error:
        raise UserError(
            f"--adapter {adapter.folder}", f"PEFT cannot merge it ({error})", "use another adapter"
        ) from error
    merged.save_pretrained(out, max_shard_size="5GB")


def _check_kinds(folder: Path, adapter: Adapter) -> None:
    """Refuses, before anything is loaded, adapters without merged weights and models that cannot take them."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    kind = adapter.settings["peft_type"]
    # A str enumeration in PEFT, so that the name finds its entry.
    if not hasattr(PEFT_TYPE_TO_TUNER_MAPPING.get(kind.upper()), "merge_and_unload"):
        raise UserError(f"--adapter {adapter.folder}", f"is of the kind {kind}, which cannot be merged", "use a LoRA")
    shapes = checkpoint_shapes(folder)
    touched = {name.split(".")[-1] for name in adapter.lora_modules} | {_parent(n) for n in adapter.full_tensors}
    if shapes and not has_own_head(shapes) and touched & {"embed_tokens", "lm_head"}:
        raise UserError(
            f"--adapter {adapter.folder}",
            "changes the embeddings or the LM head, which are one tensor in this model: merged into it, "
            "either change would act on both",
            "use an adapter that leaves them alone",
        )
    if "quantization_config" in model_config_json(folder):
        raise UserError(
            f"--model {folder}", "has quantised weights, which would round the adapter", "give the unquantised model"
        )


def _parent(tensor: str) -> str:
    return tensor.rpartition(".")[0].rpartition(".")[2]


def _load_base(folder: Path, trust_remote_code: bool, dtype: Any) -> Any:
    import transformers

    remote = model_config_json(folder).get("auto_map") or {}
    name = next((name for name in _AUTO_CLASSES if name in remote), _AUTO_CLASSES[0])
    try:
        return getattr(transformers, name).from_pretrained(
            folder, dtype=dtype, low_cpu_mem_usage=True, trust_remote_code=trust_remote_code
        )
    except (ValueError, OSError, ImportError, KeyError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        needs_code = bool(remote) and not trust_remote_code
        cure = "allow its own code with --trust-remote-code" if needs_code else "see whether transformers can load it"
        raise UserError(f"--model {folder}", f"cannot be loaded ({reason})", cure) from error


def _copy_companions(folder: Path, out: Path, dtype: str | None) -> None:
    """Tokenizer, processor, chat template, code and both configs as the base checkpoint has them."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder)
        hidden = any(part.startswith((".", "__pycache__")) for part in name.parts)
        weights = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        if hidden or weights or str(name) in _NOT_COPIED:
            continue
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, out / name)
    if (folder / "generation_config.json").is_file():
        shutil.copyfile(folder / "generation_config.json", out / "generation_config.json")
    # A merged model has the base model's architecture, so its config too; what transformers would write
    # instead is for its own version.
    config = model_config_json(folder)
    if dtype:
        config.setdefault("torch_dtype" if "torch_dtype" in config else "dtype", dtype)
        _set_dtype(config, dtype)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    for key, value in list(config.items()):
        if isinstance(value, dict) and key.endswith("_config") and key != "quantization_config":
            _set_dtype(value, dtype)
        elif key in ("dtype", "torch_dtype"):
            config[key] = dtype


class _Checkpoint:
    """Reads single tensors of a checkpoint by their canonical names."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self._at: dict[str, tuple[Path, str]] = {}
        for path in checkpoint_files(folder):
            with safe_open(path, framework="pt") as file:
                self._at |= {canonical(key): (path, key) for key in file.keys()}  # noqa: SIM118

    def get(self, name: str) -> "torch.Tensor | None":
        from safetensors import safe_open

        if canonical(name) not in self._at:
            return None
        path, key = self._at[canonical(name)]
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(key)


def check_merged(base: Path, adapter: Adapter, merged: Path) -> dict[str, Any]:
    """Compares some tensors of a merged checkpoint with what they must be.

    Of LoRA modules that is base + scaling · B · A, of whole modules the adapter's own tensors.

    Returns:
        How many were compared (`checked_tensors`) and the share of the update that is left of it after
        rounding, in the module where it is least (`kept`, 1 is all; None if no module was compared).

    Raises:
        UserError: if rounding to 16 bits has taken away too much of the adapter.
        RuntimeError: if a tensor is missing or wrong, or none of a plain LoRA could be compared.
    """
    from safetensors import safe_open

    before, after = _Checkpoint(base), _Checkpoint(merged)
    checked, shares = 0, []
    with safe_open(adapter.folder / "adapter_model.safetensors", framework="pt") as tensors:
        for name, old, change in _changes(adapter, tensors, before):
            found = after.get(name)
            if (
                found is None
                or found.shape != change.shape
                or not _is_rounded(found, change if old is None else old + change)
            ):
                raise RuntimeError(f"{name} of the merged model is not what base and adapter give")
            checked += 1
            if old is not None and change.any():
                shares.append(_check_share(name, old, change, found))
    if not checked and _is_plain(adapter) and before.get(f"{next(iter(adapter.lora_modules))}.weight") is not None:
        raise RuntimeError("no tensor of the merged model could be compared")
    return {"checked_tensors": checked, "kept": min(shares, default=None)}


def _changes(
    adapter: Adapter, tensors: Any, before: _Checkpoint
) -> Iterator[tuple[str, "torch.Tensor | None", "torch.Tensor"]]:
    """Name, base weight (None where it is replaced) and update of some of the tensors that an adapter changes."""
    for name, own in _some(sorted(adapter.full_tensors.items())):
        # Of an embedding that has a LoRA too, the file holds the layer below it.
        if name.rpartition(".")[0] not in adapter.lora_modules:
            yield name, None, tensors.get_tensor(own).float()
    if not _is_plain(adapter):
        return
    linear = [(module, ab) for module, ab in adapter.lora_modules.items() if len(adapter.shapes[ab[0]]) == 2]
    for module, (a, b) in _some(sorted(linear)):
        weight = before.get(f"{module}.weight")
        if weight is not None and "lora_embedding" not in a:
            update = tensors.get_tensor(b).float() @ tensors.get_tensor(a).float()
            update = update.T if adapter.settings.get("fan_in_fan_out") else update
            yield f"{module}.weight", weight.float(), adapter.scaling(module) * update


def _some(items: list[Any]) -> list[Any]:
    """The first, the last, and some between."""
    return [items[i * (len(items) - 1) // (_CHECKED - 1)] for i in range(_CHECKED)] if len(items) > _CHECKED else items


def _is_plain(adapter: Adapter) -> bool:
    """Whether its effect is base + scaling · B · A."""
    settings = adapter.settings
    changed = isinstance(settings.get("init_lora_weights", True), str)
    other = any(settings.get(key) for key in ("use_dora", "target_parameters", "layer_replication", "kasa_config"))
    return settings["peft_type"].upper() == "LORA" and not (changed or other) and bool(adapter.lora_modules)


def _is_rounded(found: "torch.Tensor", expected: "torch.Tensor") -> bool:
    """Whether two tensors are equal up to a few roundings in the precision of the first."""
    import torch

    # Base, update and sum are each rounded, and the largest entry bounds the terms that cancel.
    slack = 4 * torch.finfo(found.dtype).eps * expected.abs().clamp_min(float(expected.abs().max()) / 8)
    return bool(((found.float() - expected).abs() <= slack + 1e-7).all())


def _check_share(name: str, old: "torch.Tensor", change: "torch.Tensor", found: "torch.Tensor") -> float:
    """The share of an update that is left in the merged weight: its coefficient by least squares.

    Updates smaller than half a step of the number format vanish when they are added to a weight.
    """
    share = float((found.float() - old).flatten().dot(change.flatten()) / change.square().sum())
    if share < _LEAST_KEPT and found.element_size() == 2:
        raise UserError(
            f"dtype {str(found.dtype).removeprefix('torch.')}",
            f"rounds away {1 - share:.0%} of the adapter's update of {name}",
            "merge with --dtype float32",
        )
    if not _LEAST_KEPT <= share <= 2 - _LEAST_KEPT:
        raise RuntimeError(f"{name} of the merged model has {share:.2f} of the adapter's update, not all of it")
    return share
