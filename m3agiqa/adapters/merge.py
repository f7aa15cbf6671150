"""Writes the full checkpoint of a model with an adapter merged into it."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3agiqa.adapters.files import Adapter, canonical, checkpoint_files, read_adapter
from m3agiqa.adapters.load import check_base
from m3agiqa.adapters.peft import attach
from m3agiqa.config import ModelConfig
from m3agiqa.errors import UserError
from m3agiqa.models import model_config_json, model_digest, model_folder

if TYPE_CHECKING:
    import torch

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_NOT_COPIED = ("README.md", "card.json", "config.json", "generation_config.json")
_CHECKED = 4
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
        UserError: for a model, adapter or folder that cannot be used.
        RuntimeError: if the written weights are not those of base + scaling · B · A.
    """
    target = Path(out).expanduser().resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--out {out}", "is there already and not empty", "give a new folder")
    if dtype not in (None, *_DTYPES):
        raise UserError(f"--dtype {dtype}", "is not known", f"give one of {', '.join(_DTYPES)}")
    folder = model_folder(ModelConfig(path=model, trust_remote_code=trust_remote_code))
    source = read_adapter(adapter, "--adapter")
    check_base(source, folder, f"--adapter {adapter}")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that moving it there is one step.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        work = Path(temporary) / "merged"
        _merge(folder, source, work, trust_remote_code=trust_remote_code, dtype=dtype)
        _copy_companions(folder, work, dtype)
        checked = check_merged(folder, source, work)
        record = {"model": model_digest(folder), "adapter": source.digest, "dtype": dtype, "checked_tensors": checked}
        (work / "m3agiqa_merge.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for file in work.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
        work.replace(target)
    return target


def _merge(folder: Path, adapter: Adapter, out: Path, *, trust_remote_code: bool, dtype: str | None) -> None:
    import torch

    base = _load_base(folder, trust_remote_code, getattr(torch, dtype) if dtype else "auto")
    merged = attach(base, adapter)
    if not hasattr(merged.base_model, "merge_and_unload"):
        kind = adapter.settings["peft_type"]
        raise UserError(f"--adapter {adapter.folder}", f"is of the kind {kind}, which cannot be merged", "use a LoRA")
    with torch.no_grad():
        # `safe_merge` refuses weights that became infinite or NaN, at the price of one layer's memory.
        merged = merged.merge_and_unload(safe_merge=True)
    merged.save_pretrained(out, max_shard_size="5GB")


def _load_base(folder: Path, trust_remote_code: bool, dtype: Any) -> Any:
    import transformers

    remote = model_config_json(folder).get("auto_map") or {}
    name = next((name for name in _AUTO_CLASSES if name in remote), _AUTO_CLASSES[0]) if remote else _AUTO_CLASSES[0]
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

        self._at = {}
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


def check_merged(base: Path, adapter: Adapter, merged: Path) -> int:
    """Compares some tensors of a merged checkpoint with what they must be; returns how many.

    Of LoRA modules base + scaling · B · A, of whole modules the adapter's own tensors.

    Raises:
        RuntimeError: if one is missing or differs by more than rounding, or if none could be compared
            though the adapter is a plain LoRA.
    """
    from safetensors import safe_open

    before, after = _Checkpoint(base), _Checkpoint(merged)
    checked = 0
    with safe_open(adapter.folder / "adapter_model.safetensors", framework="pt") as tensors:
        for name, expected in _expected(adapter, tensors, before):
            found = after.get(name)
            if found is None or found.shape != expected.shape or not _is_rounded(found, expected):
                raise RuntimeError(f"{name} of the merged model is not what base and adapter give")
            checked += 1
    if not checked and _is_plain(adapter) and before.get(f"{next(iter(adapter.lora_modules))}.weight") is not None:
        raise RuntimeError("no tensor of the merged model could be compared")
    return checked


def _expected(adapter: Adapter, tensors: Any, before: _Checkpoint) -> Iterator[tuple[str, "torch.Tensor"]]:
    for name, own in _some(sorted(adapter.full_tensors.items())):
        # Of an embedding that has a LoRA too, the file holds the layer below it.
        if name.rpartition(".")[0] not in adapter.lora_modules:
            yield name, tensors.get_tensor(own).float()
    if not _is_plain(adapter):
        return
    linear = [(module, ab) for module, ab in adapter.lora_modules.items() if len(adapter.shapes[ab[0]]) == 2]
    for module, (a, b) in _some(sorted(linear)):
        weight = before.get(f"{module}.weight")
        if weight is not None and "lora_embedding" not in a:
            update = tensors.get_tensor(b).float() @ tensors.get_tensor(a).float()
            update = update.T if adapter.settings.get("fan_in_fan_out") else update
            yield f"{module}.weight", weight.float() + adapter.scaling(module) * update


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
