"""Finds a model's files and knows what identifies them. Light: nothing of the model is loaded."""

import hashlib
import json
from pathlib import Path
from typing import Any

from m3agiqa.config import AUTO_ADAPTERS, TINY_MODEL, ModelConfig, RunConfig
from m3agiqa.errors import UserError

_WHOLE_FILE_BYTES = 64 * 2**20
_SAMPLES, _SAMPLE_BYTES = 64, 2**20
_IDENTIFYING = (".json", ".safetensors", ".bin", ".model", ".jinja", ".txt", ".py", ".gguf")
_NOT_IDENTIFYING = ("card.json",)
_EMBEDDED = Path(__file__).parent / "tiny"


def model_folder(config: ModelConfig) -> Path:
    """The local folder of a model: the embedded one, a given one, or a hub snapshot (downloaded if need be).

    Raises:
        UserError: if there is no such model, or it cannot be reached.
    """
    if config.path == TINY_MODEL:
        return _EMBEDDED / "model"
    folder = Path(config.path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"model.path={config.path}", "holds no config.json", "give a transformers checkpoint")
        return folder.resolve()
    looks_local = config.path.startswith((".", "/", "~")) or config.path.count("/") != 1
    if looks_local:
        raise UserError(f"model.path={config.path}", "is no folder", "give a folder, a hub id (owner/name) or `tiny`")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(config.path, revision=config.revision, ignore_patterns=["*.pth", "original/*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"model.path={config.path}",
            f"is neither cached here nor to be had from the hub ({reason})",
            "check the id, log in with `hf auth login`, or give a local folder",
        ) from None


def adapter_beside(model: Path) -> Path | None:
    """The folder of the adapter that comes with the model in the folder `model`: only the embedded one has one."""
    folder = _EMBEDDED / "adapter"
    return folder if model == _EMBEDDED / "model" and folder.is_dir() else None


def predictor_folder(config: RunConfig) -> Path | None:
    """The folder of a run's predictor, or None where it has none."""
    path = config.predictor.path
    if path == "auto":
        folder = _EMBEDDED / "predictor"
        # It is for what it was trained on, and for nothing that only resembles it.
        embedded = config.model.path == TINY_MODEL and config.model.adapters == AUTO_ADAPTERS
        same = config.scoring.conversation == "v1" and not config.corpus.text_only
        return folder if embedded and same and config.engine.kind != "simulated" and folder.is_dir() else None
    return None if path is None else Path(path).expanduser()


def model_digest(folder: Path) -> str:
    """Identifies a checkpoint by its files: 16 hex digits.

    Files up to 64 MiB are hashed whole. Of larger ones the size and 64 evenly spaced samples of 1 MiB
    are: a merged adapter or another training step changes every layer, so it shows, and 16 GB of
    weights take a second instead of a minute.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in _IDENTIFYING and p.name not in _NOT_IDENTIFYING):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= _WHOLE_FILE_BYTES:
                digest.update(hashlib.file_digest(file, "sha256").digest())
                continue
            for i in range(_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def model_config_json(folder: Path) -> dict[str, Any]:
    """The checkpoint's config.json."""
    file = folder / "config.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(str(file), f"cannot be read ({error})", "give a whole transformers checkpoint") from None


def takes_images(folder: Path) -> bool:
    """Whether a checkpoint has a vision side, going by its config.json; else it is a language model."""
    return "vision_config" in model_config_json(folder)


def hidden_width(folder: Path) -> int | None:
    """Numbers in a hidden state of the checkpoint's language model; None where config.json does not say."""
    data = model_config_json(folder)
    text = data.get("text_config") or data.get("llm_config") or data
    width = text.get("hidden_size") or data.get("hidden_size")
    return None if width is None else int(width)


def context_length(folder: Path, config: ModelConfig) -> int:
    """Most tokens that a conversation may have: `model.max_model_len`, or the checkpoint's own limit.

    Raises:
        UserError: if it cannot be told, or more is asked for than the checkpoint has.
    """
    data = model_config_json(folder)
    text = data.get("text_config") or data.get("llm_config") or data
    own = text.get("max_position_embeddings") or data.get("max_position_embeddings")
    if own is None and config.max_model_len is None:
        raise UserError(f"model.path={config.path}", "does not say its context length", "set model.max_model_len")
    if own is not None and config.max_model_len is not None and config.max_model_len > own:
        raise UserError(
            f"model.max_model_len={config.max_model_len}", f"the model has only {own} positions", "set it lower"
        )
    return int(config.max_model_len or own or 0)
