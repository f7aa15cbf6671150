"""The predictor in a run: from captured states to mean opinion scores with their intervals."""

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from m3agiqa.aspects import SCALE_MAX, SCALE_MIN, Aspect
from m3agiqa.config import RunConfig
from m3agiqa.errors import UserError
from m3agiqa.models import predictor_folder
from m3agiqa.predictor import Predictor, load
from m3agiqa.records import Assessment, Opinion
from m3agiqa.runs import check_capture, states_of

if TYPE_CHECKING:
    import torch


def with_states(config: RunConfig) -> RunConfig:
    """The configuration with capture turned on where a predictor reads the states."""
    if predictor_folder(config) is None or config.capture.kind == "states":
        return config
    if config.capture.kind != "none":
        raise UserError(
            f"capture.kind={config.capture.kind}",
            "a predictor reads states",
            "leave it out, or set predictor.path=null",
        )
    capture = config.capture.model_copy(update={"kind": "states"})
    return config.model_copy(update={"capture": capture})


class Opinions:
    """A predictor at work beside the engine. It runs in a thread, so that the engine does not wait for it.

    Args:
        config: of the run.

    Raises:
        UserError: for a predictor that is for other states than this run's, or for none of its aspects.
    """

    def __init__(self, config: RunConfig) -> None:
        folder = predictor_folder(config)
        self._predictor = None if folder is None else _load(config, folder)
        self._lock = asyncio.Lock()
        self._seconds = 0.0

    def stats(self) -> dict[str, float]:
        """Seconds that the predictor has been at work; empty without one."""
        return {} if self._predictor is None else {"predictor_seconds": self._seconds}

    async def of(self, judged: Sequence[Mapping[Aspect, Assessment]]) -> list[dict[Aspect, Opinion]]:
        """One mapping for each of the given, of the aspects that the predictor is for."""
        found: list[dict[Aspect, Opinion]] = [{} for _ in judged]
        if self._predictor is None:
            return found
        asked = [
            (i, aspect, assessment.captured.values)
            for i, one in enumerate(judged)
            for aspect, assessment in one.items()
            if str(aspect) in self._predictor.outputs and assessment.captured is not None
        ]
        if not asked:
            return found
        # One at a time: several batches may have come back from the engine at once.
        async with self._lock:
            started = time.perf_counter()
            opinions = await asyncio.to_thread(_predict, self._predictor, asked)
            self._seconds += time.perf_counter() - started
        for (i, aspect, _), opinion in zip(asked, opinions, strict=True):
            found[i][aspect] = opinion
        return found


def check_predictor(config: RunConfig) -> None:
    """Refuses a predictor that is not for this run, or whose states the engine cannot give, before any work is done.

    Raises:
        UserError: as `Opinions` and `check_capture`.
    """
    if (folder := predictor_folder(config)) is not None:
        check_capture(config)
        _load(config, folder)


def _load(config: RunConfig, folder: Path) -> Predictor:
    import torch

    shown = f"predictor.path={config.predictor.path}"
    device = config.predictor.device
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    predictor = load(folder, device)
    if predictor.head.config.takes != "states":
        raise UserError(shown, "takes logits, not states", "import it again with --lm-head MODEL")
    aspects = [aspect for aspect in config.scoring.aspects if str(aspect) in predictor.outputs]
    if not aspects:
        judged = ", ".join(config.scoring.aspects)
        raise UserError(shown, f"is for {', '.join(predictor.outputs)}, but the run judges {judged}", "give another")
    _check_states(config, predictor, shown, aspects)
    return predictor


def _check_states(config: RunConfig, predictor: Predictor, shown: str, aspects: Sequence[Aspect]) -> None:
    """Refuses a predictor that is for other states than the run's, as far as it says what it is for."""
    ours = states_of(config)
    made, cure = "trained on", "give the one that belongs to this configuration, or train one: m3agiqa train-predictor"
    if "imported_from" in predictor.provenance:
        made, cure = "imported for", "import it again, with --lm-head the model that scores (a merged one as it is)"
    wanted = {f"adapter.{aspect}" for aspect in config.scoring.aspects if aspect not in aspects}
    differing = [
        f"{key} is {ours.get(key, 'none')!r} and was {value!r}"
        for key, value in sorted(predictor.states_of.items())
        if key not in wanted and (not key.startswith("adapter.") or key in ours) and ours.get(key) != value
    ]
    if differing:
        rule = f"was {made} states of another model or conversation ({'; '.join(differing)})"
        raise UserError(shown, rule, cure)
    # One that was imported with a file for --lm-head does not say which model it is for.
    width, hidden = str(predictor.head.config.input_width), ours["hidden"]
    if width != hidden != str(None):
        raise UserError(shown, f"takes states of {width} numbers a token, but the model's have {hidden}", cure)


def _predict(predictor: Predictor, asked: Sequence[tuple[int, Aspect, "torch.Tensor"]]) -> list[Opinion]:
    import torch

    scores = predictor.predict_all([states for _, _, states in asked]).view(len(asked), -1)
    flat = scores[:, 0] if scores.shape[1] == 1 else scores
    interval = predictor.intervals(flat)
    low, high = (end.view(len(asked), -1) for end in interval) if interval else (scores * math.nan,) * 2
    column = torch.tensor([predictor.outputs.index(str(aspect)) for _, aspect, _ in asked])
    picked = (values.gather(1, column[:, None])[:, 0].tolist() for values in (scores, low, high))
    return [_opinion(predictor.scale, *values) for values in zip(*picked, strict=True)]


def _opinion(scale: tuple[float, float], mos: float, low: float, high: float) -> Opinion:
    """Scores of any scale as scores from 0 to 5."""

    def ours(value: float) -> float | None:
        share = (value - scale[0]) / (scale[1] - scale[0])
        return None if math.isnan(value) else SCALE_MIN + share * (SCALE_MAX - SCALE_MIN)

    return Opinion(ours(mos), ours(low), ours(high))
