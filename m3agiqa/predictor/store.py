"""A predictor and its folder: `predictor.safetensors` (the weights) and `predictor.json` (all else).

One that was trained here also has `trained_on.parquet` (see `seen`), which its scores do not depend on.

A folder is complete or not there: it is written beside its place and moved there in one step.
"""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from m3agiqa.adapters.files import listed
from m3agiqa.aspects import SCALE_MAX, SCALE_MIN
from m3agiqa.errors import UserError
from m3agiqa.predictor.calibrate import Calibration
from m3agiqa.predictor.head import Head, HeadConfig
from m3agiqa.seen import FILE as TRAINED_ON
from m3agiqa.seen import Seen
from m3agiqa.seen import read as read_seen

FORMAT: Literal[1] = 1
WEIGHTS, SHEET = "predictor.safetensors", "predictor.json"
TOKENS_PER_BATCH = 16_384
"""Padded tokens that `Predictor.predict_all` hands to the head at once."""


class Affine(BaseModel):
    """Maps a head's output onto the scale of the labels: offset + factor * output."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    offset: float = Field(default=0.0, allow_inf_nan=False, description="The mean of the labels, as a rule")
    factor: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="Their standard deviation, as a rule")


class _Sheet(BaseModel):
    """What predictor.json holds."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1]
    head: HeadConfig
    scale: tuple[float, float]
    affine: dict[str, Affine]
    calibration: dict[str, Calibration]
    states_of: dict[str, str]
    provenance: dict[str, Any]

    @model_validator(mode="after")
    def _agrees(self) -> "_Sheet":
        _check_names(self.head.outputs, self.affine, self.calibration, self.scale)
        if missing := [name for name in self.head.outputs if name not in self.affine]:
            raise ValueError(f"affine lacks {', '.join(missing)}")
        return self


def _check_names(
    outputs: Sequence[str], affine: Mapping[str, Any], calibration: Mapping[str, Any], scale: tuple[float, float]
) -> None:
    if unknown := [name for name in (*affine, *calibration) if name not in outputs]:
        raise ValueError(f"{', '.join(unknown)}: no output of a head that gives {', '.join(outputs)}")
    if not scale[0] < scale[1]:
        raise ValueError(f"scale {list(scale)} does not go up")


@dataclass
class Predictor:
    """A head, the scale that its scores are on, and how sure they are.

    Attributes:
        head: in evaluation mode.
        scale: lowest and highest score.
        affine: by output, how the head's numbers become scores; an output without one is taken as it is.
        calibration: by output, its interval; outputs without one have none.
        states_of: what made the states it is for, as names and versions or digests (`base`, `adapters`,
            `conversation`); empty where that is not known.
        provenance: where it comes from, for people.
        trained_on: what its training has met; None where that is not known.
    """

    head: Head
    scale: tuple[float, float] = (SCALE_MIN, SCALE_MAX)
    affine: dict[str, Affine] = field(default_factory=dict)
    calibration: dict[str, Calibration] = field(default_factory=dict)
    states_of: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    trained_on: Seen | None = None

    def __post_init__(self) -> None:
        _check_names(self.outputs, self.affine, self.calibration, self.scale)
        self.affine = {name: self.affine.get(name, Affine()) for name in self.outputs}
        self.head.eval()

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what it predicts, in order."""
        return self.head.config.outputs

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.head.parameters()).device

    def to(self, device: str | torch.device) -> "Predictor":
        """Moves the weights, and returns itself."""
        self.head.to(device)
        return self

    @torch.inference_mode()
    def predict(self, states: torch.Tensor, lengths: torch.Tensor, *, clip: bool = True) -> torch.Tensor:
        """Scores right-padded conversations.

        Args:
            states: [batch, tokens, input width] (`head.config.input_width`), of any floating type.
            lengths: [batch], how many tokens of each are real.
            clip: whether scores beyond the scale become its ends.

        Returns:
            [batch], or [batch, outputs] if there are several, in float32 on the CPU.

        Raises:
            ValueError: for shapes and lengths that do not fit.
        """
        found = self.head(states.to(self.device), lengths).float().cpu()
        offset = torch.tensor([self.affine[name].offset for name in self.outputs])
        factor = torch.tensor([self.affine[name].factor for name in self.outputs])
        mos = offset + factor * found
        mos = mos.clamp(*self.scale) if clip else mos
        return mos[:, 0] if len(self.outputs) == 1 else mos

    def predict_all(
        self, states: Sequence[torch.Tensor], *, clip: bool = True, tokens_per_batch: int = TOKENS_PER_BATCH
    ) -> torch.Tensor:
        """Scores conversations of any lengths, in batches of similar ones.

        Args:
            states: of each, [tokens, input width].
            clip: as in `predict`.
            tokens_per_batch: most tokens, pads included, at once; a longer conversation goes alone.

        Returns:
            As `predict`, in the order given.

        Raises:
            ValueError: for shapes that do not fit, and if a conversation has no tokens.
        """
        width = self.head.config.input_width
        for i, one in enumerate(states):
            if one.ndim != 2 or one.shape[1] != width or not len(one):
                raise ValueError(f"states {i} are {list(one.shape)}, but this head takes [tokens, {width}]")
        scores = torch.empty(len(states), len(self.outputs))
        for batch in _batches([len(one) for one in states], tokens_per_batch):
            padded = torch.nn.utils.rnn.pad_sequence([states[i] for i in batch], batch_first=True)
            lengths = torch.tensor([len(states[i]) for i in batch])
            scores[batch] = self.predict(padded, lengths, clip=clip).view(len(batch), -1)
        return scores[:, 0] if len(self.outputs) == 1 else scores

    def intervals(self, mos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Low and high ends around scores [batch] or [batch, outputs], within the scale.

        NaN for outputs that are not calibrated; None if none is.
        """
        if not self.calibration:
            return None
        known = {name: one.half_width for name, one in self.calibration.items()}
        half = torch.tensor([known.get(name, torch.nan) for name in self.outputs], dtype=mos.dtype, device=mos.device)
        half = half[0] if mos.ndim == 1 else half
        return (mos - half).clamp(*self.scale), (mos + half).clamp(*self.scale)

    def save(self, folder: str | Path) -> Path:
        """Writes the predictor's folder, as a whole or not at all.

        Args:
            folder: new, or empty.

        Raises:
            UserError: if there is something already.
        """
        target = Path(folder).expanduser().resolve()
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(str(folder), "is there already and not empty", "give a new folder for the predictor")
        sheet = _Sheet(
            format=FORMAT,
            head=self.head.config,
            scale=self.scale,
            affine=self.affine,
            calibration=self.calibration,
            states_of=self.states_of,
            provenance=self.provenance,
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that moving it there is one step.
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
            work = Path(temporary) / "predictor"
            work.mkdir()
            weights = {name: value.cpu().contiguous() for name, value in self.head.state_dict().items()}
            # safetensors itself would make a file that nobody else may read.
            (work / WEIGHTS).write_bytes(save(weights))
            if self.trained_on is not None:
                self.trained_on.write(work / TRAINED_ON)
            (work / SHEET).write_text(sheet.model_dump_json(indent=1) + "\n", encoding="utf-8")
            work.replace(target)
        return target


def _batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices in batches of at most `tokens` tokens when padded, shortest first."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        # The one that is added is the longest so far.
        if not batches or (len(batches[-1]) + 1) * lengths[i] > tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


def load(folder: str | Path, device: str | torch.device = "cpu") -> Predictor:
    """Reads a predictor's folder, to the letter; nothing in it is run.

    Raises:
        UserError: for what is missing, of another format, or does not fit together; tensors are named.
    """
    where = Path(folder).expanduser()
    for name in (SHEET, WEIGHTS):
        if not (where / name).is_file():
            raise UserError(f"predictor {folder}", f"holds no {name}", "give the folder of a whole predictor")
    sheet = _read_sheet(where / SHEET)
    try:
        tensors = load_file(where / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(str(where / WEIGHTS), f"cannot be read ({error})", "copy it again") from None
    head = build_head(sheet.head, tensors, str(where / WEIGHTS))
    predictor = Predictor(head, sheet.scale, sheet.affine, sheet.calibration, sheet.states_of, sheet.provenance)
    predictor.trained_on = read_seen(where)
    return predictor.to(device)


def _read_sheet(file: Path) -> _Sheet:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        version = data["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(str(file), f"is no predictor's description ({error!r})", "give a whole predictor") from None
    if version != FORMAT:
        raise UserError(
            str(file), f"is of format {version}, but this version reads {FORMAT}", "save it again, or upgrade m3agiqa"
        )
    try:
        return _Sheet.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{file} {at}".strip(), f"is not valid ({first['msg']})", "save the predictor again") from None


def build_head(
    config: HeadConfig, tensors: Mapping[str, torch.Tensor], source: str, shown: Callable[[str], str] = str
) -> Head:
    """A head with these weights and no others.

    Args:
        tensors: its state dict; weights become float32, an LM head of its own stays as it is.
        source: how errors call the file. shown: how they call a tensor, from its name here.

    Raises:
        UserError: for tensors that are missing, not expected or of another shape, with their names.
    """
    # On the meta device nothing is drawn, so that loading leaves the random state alone.
    with torch.device("meta"):
        head = Head(config)
    expected = head.state_dict()
    shaped = [n for n in expected if n in tensors and tensors[n].shape != expected[n].shape]
    problems = {
        "lacks": [shown(name) for name in expected if name not in tensors],
        "has unexpected": [shown(name) for name in tensors if name not in expected],
        "has misshaped": [
            f"{shown(name)} {list(tensors[name].shape)} instead of {list(expected[name].shape)}" for name in shaped
        ],
    }
    found = "; ".join(f"{what} {listed(names, 8)}" for what, names in problems.items() if names)
    if found:
        raise UserError(source, found, "give a whole predictor of this very shape")
    as_is = ("input.head_weight", "input.head_bias")
    head.load_state_dict({n: t if n in as_is else t.float() for n, t in tensors.items()}, assign=True)
    return head
