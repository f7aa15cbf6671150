"""Import of predictors as the authors of M3-AGIQA released them: Lightning checkpoints.

Source: https://github.com/strawhatboy/M3-AGIQA (`models/MiniCPM.py`, `wrapper.py`), whose configurations all
pool by the mean. Its sLSTM was trained with the `cuda` backend of the `xlstm` package, whose layout differs
from that of `vanilla`, which is used here. The recurrent kernel's shape tells the two apart; the bias has the
same shape in both, so it is converted along with the kernel.
"""

import hashlib
import math
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError

from m3agiqa.adapters.files import listed
from m3agiqa.config import ModelConfig
from m3agiqa.errors import UserError
from m3agiqa.models import hidden_width, model_digest, model_folder
from m3agiqa.predictor.head import Head, HeadConfig
from m3agiqa.predictor.lm_head import LMHead
from m3agiqa.predictor.slstm import GATES
from m3agiqa.predictor.store import Predictor, build_head
from m3agiqa.train_config import Pooling

_PREFIXES = {"model.W.": "input.", "model.xlstm_pooler.xlstm_stack.": "stack.", "model.fc.": "fc."}
# The multimodal model itself, which the reference freezes and sometimes saves.
_DROPPED = "model.model."
_FFN_FACTOR = 1.3
_FFN_MULTIPLE = 64


def import_predictor(
    file: str | Path,
    out: str | Path,
    *,
    lm_head: str | None = None,
    outputs: tuple[str, ...] = ("quality",),
    pooling: Pooling = "mean",
) -> Predictor:
    """Reads a released checkpoint and writes a predictor's folder.

    Args:
        file: the checkpoint; nothing in it is run.
        out: a new or an empty folder.
        lm_head: checkpoint folder or hub id of the model whose states it will see, or a safetensors file of its
            LM head. That is folded into the first layer, or stored where folding is not exact. With a model the
            predictor is for that very checkpoint (`states_of`): where an adapter is merged, give the merged one,
            as its digest is another. With a file all models of its width will do. None keeps the first layer, and
            the predictor takes logits.
        outputs: what the checkpoint predicts.
        pooling: a checkpoint does not say; mean in all released ones.

    Returns:
        The predictor, as written.

    Raises:
        UserError: for a file that is no such checkpoint, with the keys that are missing, unexpected or misshaped.
    """
    path = Path(file).expanduser()
    tensors = _read(path)
    shown = f"checkpoint {path}"
    layout = _to_vanilla(tensors, shown)
    head = build_head(_config(tensors, outputs, pooling, shown), tensors, shown, _published)
    provenance = {"imported_from": path.name, "sha256": _sha256(path), "slstm_layout": layout}
    states_of: dict[str, str] = {}
    if lm_head is not None:
        head, folding, states_of = _fold(head, lm_head)
        provenance |= folding
    predictor = Predictor(head, states_of=states_of, provenance=provenance)
    predictor.save(out)
    return predictor


def _read(path: Path) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors under this package's names."""
    if not path.is_file():
        raise UserError(f"checkpoint {path}", "is no file", "give a Lightning checkpoint (.ckpt)")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"checkpoint {path}",
            "holds more than weights, or is no checkpoint, and was not loaded, as loading could run code",
            "save its state_dict alone, on a machine that trusts it",
        ) from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"checkpoint {path}", f"cannot be read ({reason})", "copy it again") from None
    found = data.get("state_dict") if isinstance(data, dict) else None
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise UserError(f"checkpoint {path}", "has no state_dict of tensors", "give a Lightning checkpoint")
    own = {key: value for key, value in found.items() if not key.startswith(_DROPPED)}
    if unknown := [key for key in own if not key.startswith(tuple(_PREFIXES))]:
        raise UserError(f"checkpoint {path}", f"has unexpected {listed(unknown, 8)}", "give a predictor with an xLSTM")
    return {_renamed(key): value for key, value in own.items()}


def _renamed(key: str) -> str:
    old = next(prefix for prefix in _PREFIXES if key.startswith(prefix))
    return _PREFIXES[old] + key.removeprefix(old)


def _to_vanilla(tensors: dict[str, torch.Tensor], source: str) -> str:
    """Converts sLSTM weights [heads, size, 4 * size] of the `cuda` layout in place; returns the layout found."""
    layouts = set()
    for name in [name for name in tensors if name.endswith("slstm_cell._recurrent_kernel_")]:
        kernel, bias_name = tensors[name], name.replace("_recurrent_kernel_", "_bias_")
        bias = tensors.get(bias_name)
        size = min(kernel.shape[1:]) if kernel.ndim == 3 else 0
        if not size or max(kernel.shape[1:]) != GATES * size:
            rule = f"{_published(name)} is {list(kernel.shape)}, which is no sLSTM's"
            raise UserError(source, rule, "give a whole checkpoint")
        if kernel.shape[1] == GATES * size:
            layouts.add("vanilla")
            continue
        layouts.add("cuda")
        heads = kernel.shape[0]
        by_gate = kernel.reshape(heads, size, GATES, size).permute(0, 2, 3, 1)
        tensors[name] = by_gate.reshape(heads, GATES * size, size)
        if bias is not None and bias.numel() == heads * GATES * size:
            tensors[bias_name] = bias.reshape(heads, GATES, size).permute(1, 0, 2).reshape(-1)
    if len(layouts) > 1:
        raise UserError(source, "mixes both layouts of sLSTM weights", "give a checkpoint of one training")
    return layouts.pop() if layouts else "none"


def _config(tensors: dict[str, torch.Tensor], outputs: tuple[str, ...], pooling: Pooling, source: str) -> HeadConfig:
    """The head's shape, read off its tensors; what does not fit it is named when they are loaded."""
    blocks = _blocks(tensors, source)
    for name in ("input.weight", "fc.0.weight", "fc.2.weight"):
        if name not in tensors or tensors[name].ndim != 2:
            rule = f"{_published(name)} is {list(tensors[name].shape)}" if name in tensors else _lacks(name)
            raise UserError(source, rule, "give a whole checkpoint of an xLSTM predictor")
    width, vocabulary = tensors["input.weight"].shape
    if (found := len(tensors["fc.2.weight"])) != len(outputs):
        raise UserError(f"--aspect {','.join(outputs)}", f"does not name the checkpoint's {found} outputs", "name each")
    inner = _size(tensors, r"ffn\.proj_up\.weight", 0)
    sizes = {
        "heads": _size(tensors, r"slstm_cell\._recurrent_kernel_|mlstm_cell\.igate\.bias", 0),
        "conv_kernel": _size(tensors, r"conv1d\.conv\.weight", 2),
        "qkv_block": _size(tensors, r"q_proj\.weight", 1),
        "ffn_factor": _ffn_factor(inner // 2, width) if inner else None,
    }
    settings: dict[str, Any] = {key: value for key, value in sizes.items() if value is not None}
    settings |= {"input_width": vocabulary, "takes": "logits", "width": width, "blocks": len(blocks)}
    settings |= {"slstm_at": [at for at, is_slstm in enumerate(blocks) if is_slstm]}
    settings |= {"hidden": len(tensors["fc.0.weight"]), "outputs": outputs, "pooling": pooling}
    try:
        return HeadConfig.model_validate(settings)
    except ValidationError as error:
        raise UserError(source, f"is no predictor ({error.errors()[0]['msg']})", "give a whole checkpoint") from None


def _blocks(tensors: dict[str, torch.Tensor], source: str) -> list[bool]:
    """Of each block, whether it is an sLSTM."""
    of_block: dict[int, bool] = {}
    for name in tensors:
        if match := re.match(r"stack\.blocks\.(\d{1,4})\.", name):
            at = int(match[1])
            of_block[at] = of_block.get(at, False) or ".slstm_cell." in name
    if missing := [f"stack.blocks.{at}" for at in range(max(of_block, default=0) + 1) if at not in of_block]:
        raise UserError(source, _lacks(*missing), "give a whole checkpoint of an xLSTM predictor")
    return [of_block[at] for at in sorted(of_block)]


def _lacks(*names: str) -> str:
    return f"lacks {listed([_published(name) for name in names], 8)}"


def _size(tensors: dict[str, torch.Tensor], pattern: str, dim: int) -> int | None:
    """A dimension of the first tensor in the blocks whose name ends in the pattern, if there is one."""
    names = (name for name in sorted(tensors) if name.startswith("stack.blocks."))
    name = next((name for name in names if re.search(rf"\.({pattern})$", name)), None)
    return int(tensors[name].shape[dim]) if name is not None and tensors[name].ndim > dim else None


def _ffn_factor(inner: int, width: int) -> float:
    """The published factor where it gives this width, as the package rounds up; else one that does."""
    published = math.ceil(_FFN_FACTOR * width / _FFN_MULTIPLE) * _FFN_MULTIPLE
    return _FFN_FACTOR if inner == published or inner <= 0 else inner / width


def _published(name: str) -> str:
    old, new = next(pair for pair in _PREFIXES.items() if name.startswith(pair[1]))
    return old + name.removeprefix(new)


def _fold(head: Head, source: str) -> tuple[Head, dict[str, str], dict[str, str]]:
    """The head on hidden states, how that was done, and what of the states' origin is known."""
    path = Path(source).expanduser()
    if not path.is_file():
        path = model_folder(ModelConfig.model_validate({"path": source}))
    try:
        lm_head = LMHead.load(path)
    except SafetensorError as error:
        raise UserError(f"--lm-head {source}", f"is not in safetensors ({error})", "give a model or its head") from None
    if len(lm_head.weight) != head.config.input_width:
        raise UserError(
            f"--lm-head {source}",
            f"gives {len(lm_head.weight)} logits, but the checkpoint takes {head.config.input_width}",
            "give the model that the predictor was trained on",
        )
    folded = head.fold_onto(lm_head)
    way = "folded" if folded.config.long_way is None else "stored, as folding is not exact"
    if path.is_file():
        return folded, {"lm_head": _sha256(path), "lm_head_is": way}, {}
    # As `runs.states_of` names them, so that a run compares them with its own.
    states_of = {"base": model_digest(path), "hidden": str(hidden_width(path))}
    return folded, {"lm_head": states_of["base"], "lm_head_is": way}, states_of


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
