"""From what the command names to the rows that are evaluated: human scores, scores, parts, and what was noticed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from m3agiqa.aspects import RATING_LEVELS, SCALE_MAX, SCALE_MIN, Aspect
from m3agiqa.config import RunConfig
from m3agiqa.conversation import parse_rating
from m3agiqa.errors import UserError
from m3agiqa.evaluation import datasets, words
from m3agiqa.evaluation.baselines import Facts
from m3agiqa.evaluation.draws import Ints
from m3agiqa.evaluation.figures import Scorer
from m3agiqa.evaluation.metrics import Floats
from m3agiqa.evaluation.tables import Table, first_five, match, read
from m3agiqa.models import predictor_folder

OWN = ("mos", "rating_score")
"""Suffixes of the columns of a run that are scores, the best first; the rating words come last."""
# Labels that all lie in less of their scale than this were probably given on another one.
_NARROW = 0.21


@dataclass(frozen=True)
class Request:
    """What `m3agiqa evaluate` was asked; the names of its options."""

    scores: str
    out: str
    truth: str | None = None
    dataset: str | None = None
    labels: Mapping[Aspect, str] = field(default_factory=dict)
    scale: tuple[float, float] | None = None
    predictions: Mapping[Aspect, str] = field(default_factory=dict)
    words: Mapping[Aspect, str] = field(default_factory=dict)
    others: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    split: str | None = None
    part: str | None = None
    train: str | None = None
    predictor: str | None = None
    key: str | None = None
    id_column: str = "id"
    force: bool = False
    plots: bool = True
    samples: int = 1000
    seed: int = 0

    @property
    def tested(self) -> str:
        """The part of the split that is evaluated."""
        return self.part or "test"


@dataclass(frozen=True)
class Gathered:
    """The human scores with everything joined to them.

    Attributes:
        truth: all rows with human scores [n]. at: the row of `scores` of each, -1 where there is none, [n].
        part: `test` for a row that may be evaluated, `train` for one of the training part, else None, [n].
        has_train: whether a training part was named. notes: what a reader should know.
    """

    truth: Table
    scores: Table
    labels: Mapping[Aspect, str]
    scale: tuple[float, float]
    at: Ints
    part: list[str | None]
    has_train: bool
    notes: list[str]

    @property
    def evaluated(self) -> Ints:
        """Places of the rows that have scores and are in the evaluated part."""
        mine = np.array([one == "test" for one in self.part], dtype=bool)
        return np.flatnonzero(mine & (self.at >= 0))

    @property
    def training(self) -> Ints:
        """Places of the rows of the training part."""
        return np.flatnonzero(np.array([one == "train" for one in self.part], dtype=bool))

    def learnt(self, labels: Floats) -> Ints:
        """Places of the rows of the training part that have a label [n]: what baselines are fitted on, if any."""
        return self.training[np.isfinite(labels[self.training])]

    def known(self, column: str) -> pa.Array:
        """Text [n] of the human scores' table; where that does not say, of the scores'; null where neither does."""
        values = self.truth.text(column)
        if self.scores is self.truth:
            return values
        at = pa.array(self.at, mask=self.at < 0)
        return pc.coalesce(values, self.scores.text(column).take(at))

    def label(self, aspect: Aspect) -> Floats:
        """Human scores [n], brought to 0 to 5; NaN where nobody rated.

        Raises:
            UserError: for labels outside the stated scale.
        """
        column, (low, high) = self.labels[aspect], self.scale
        flag = f"--label {aspect}={column}"
        values = self.truth.numbers(column, flag)
        outside = values[(values < low) | (values > high)]
        if len(outside):
            rule = f"{len(outside)} labels, such as {outside[0]:g}, are outside the scale {low:g} to {high:g}"
            raise UserError(flag, rule, "state the scale of the labels with --scale LOW HIGH")
        known = values[np.isfinite(values)]
        if len(known) >= 10 and np.ptp(known) < _NARROW * (high - low):
            span = f"{known.min():g} to {known.max():g}"
            self.notes.append(f"{column} spans {span} of a scale of {low:g} to {high:g}: is --scale right?")
        return SCALE_MIN + (SCALE_MAX - SCALE_MIN) * (values - low) / (high - low)


def gather(request: Request) -> Gathered:
    """Reads and joins.

    Raises:
        UserError: for anything that cannot be read or joined.
    """
    notes: list[str] = []
    scores = read(request.scores, "--scores", request.id_column)
    truth, labels, scale = _truth(request, scores, notes)
    at, way = (np.arange(len(truth)), "row") if truth is scores else match(truth, scores, request.key)
    part, has_train = _parts(request, truth, notes)
    if truth is not scores:
        _note_unmatched(truth, scores, at, part, way, notes)
    found = Gathered(truth, scores, labels, scale, at, part, has_train, notes)
    if not len(found.evaluated):
        raise UserError(scores.said, "none of its rows is in the evaluated part", "give the scores of that part")
    return found


def _truth(
    request: Request, scores: Table, notes: list[str]
) -> tuple[Table, Mapping[Aspect, str], tuple[float, float]]:
    """The table of human scores, its columns and its scale."""
    scale = request.scale or (SCALE_MIN, SCALE_MAX)
    if request.dataset is not None:
        if request.truth is None:
            raise UserError(f"--dataset {request.dataset}", "needs its folder", "add --truth FOLDER")
        data = datasets.load(request.dataset, request.truth)
        notes += data.notes
        wanted = request.labels or {a: c for a, c in data.labels.items() if _has_scores(request, scores, a)}
        if not wanted:
            known = ", ".join(data.labels)
            raise UserError(scores.said, f"has no scores of {known}", "say which: --prediction or --words")
        return data.table, wanted, request.scale or data.scale
    if not request.labels:
        raise UserError("--label", "is missing", "name the human scores: --label quality=COLUMN, or --dataset NAME")
    truth = scores if request.truth is None else read(request.truth, "--truth", request.id_column)
    for aspect, column in request.labels.items():
        truth.need(column, f"--label {aspect}={column}")
    if not -np.inf < scale[0] < scale[1] < np.inf:
        said = f"--scale {scale[0]:g} {scale[1]:g}"
        raise UserError(said, "does not go up between two numbers", "give the lowest label, then the highest")
    return truth, request.labels, scale


def _has_scores(request: Request, scores: Table, aspect: Aspect) -> bool:
    own = any(f"{aspect}_{suffix}" in scores.rows.column_names for suffix in (*OWN, "rating"))
    return own or aspect in request.predictions or aspect in request.words


def _parts(request: Request, truth: Table, notes: list[str]) -> tuple[list[str | None], bool]:
    """The part of each row of the human scores, and whether a training part was named."""
    if request.split is not None and request.train is not None:
        raise UserError("--train", "is given beside --split", "give one of them")
    if request.part is not None and request.split is None:
        raise UserError(f"--part {request.part}", "is a part of no split", "add --split FILE")
    if request.split is not None:
        table = read(request.split, "--split")  # `split` calls its ids `id`, whatever the table called them
        table.need("part", f"--split {request.split}")
        places, _ = match(truth, table, request.key)
        given = table.strings("part")
        names = [given[i] if i >= 0 else None for i in places.tolist()]
        if request.tested not in names:
            known = ", ".join(sorted({str(name) for name in given}))
            raise UserError(f"--part {request.tested}", f"{request.split} has no such part", f"take one of {known}")
        # Parts that are neither are left alone, but in k folds, where all others are trained on.
        learnt = {"train"} if "train" in names and request.tested != "train" else set(names) - {request.tested, None}
        kinds = {request.tested: "test"} | dict.fromkeys((name for name in learnt if name), "train")
        return [kinds.get(name) if name else None for name in names], True
    if request.train is not None:
        table = read(request.train, "--train", request.id_column)
        places, _ = match(truth, table, request.key)
        notes.append(f"{int((places >= 0).sum())} rows are the training part ({request.train}) and not evaluated")
        return ["train" if place >= 0 else "test" for place in places.tolist()], True
    return ["test"] * len(truth), False


def _note_unmatched(truth: Table, scores: Table, at: Ints, part: list[str | None], way: str, notes: list[str]) -> None:
    """Says how many rows of either side have no partner, and names the first five."""
    mine = np.array([one == "test" for one in part], dtype=bool)
    without = np.flatnonzero(mine & (at < 0))
    used = np.zeros(len(scores), dtype=bool)
    used[at[at >= 0]] = True
    for table, places, what in (
        (truth, without, "human scores have no score"),
        (scores, np.flatnonzero(~used), "scored rows have no human score"),
    ):
        if len(places):
            keys = table.take(places[:6]).keys("image" if way == "image" else "id").to_pylist()
            notes.append(f"{len(places)} of {len(table)} {what} ({first_five(keys)})")


def own_scorers(gathered: Gathered, request: Request, aspect: Aspect, rows: Ints) -> list[Scorer]:
    """The scores of the evaluated rows [n] that the scores file holds for an aspect, the best first.

    Raises:
        UserError: if there are none, or none in a column that was named, or they are not on the scale of 0 to 5.
    """
    table = gathered.scores.take(gathered.at[rows])
    found = []
    given = request.predictions.get(aspect)
    for column in [given] if given else [f"{aspect}_{suffix}" for suffix in OWN]:
        if given is None and (column not in table.rows.column_names or table.rows[column].null_count == len(table)):
            continue
        flag = f"--prediction {aspect}={column}"
        values = table.numbers(column, flag)
        known = values[np.isfinite(values)]
        if given is not None and not len(known):
            raise UserError(flag, "holds no score of the evaluated rows", "name a column that does")
        if len(known) and not SCALE_MIN - 1e-6 <= known.min() <= known.max() <= SCALE_MAX + 1e-6:
            rule = f"holds {known.min():g} to {known.max():g}, which is not on the scale of 0 to 5"
            raise UserError(flag, rule, f"give scores on another scale as --other NAME=FILE:{column}")
        found.append(Scorer(column, "model", values))
    if (words_scorer := _words_scorer(table, request, aspect)) is not None:
        found.append(words_scorer)
    if not found:
        columns = ", ".join(f"{aspect}_{suffix}" for suffix in (*OWN, "rating"))
        raise UserError(gathered.scores.said, f"has no scores of {aspect} ({columns})", "name a column: --prediction")
    return found


def _words_scorer(table: Table, request: Request, aspect: Aspect) -> Scorer | None:
    """The rating words as a scorer: each stands for its place on the scale."""
    column = request.words.get(aspect, f"{aspect}_rating")
    if aspect in request.words:
        table.need(column, f"--words {aspect}={column}")
    elif column not in table.rows.column_names:
        return None
    codes = words.numbers([None if one is None else parse_rating(one) for one in table.strings(column)])
    if not (codes >= 0).any():
        return None
    levels = np.where(codes >= 0, np.array(RATING_LEVELS)[np.maximum(codes, 0)], np.nan)
    unread = int((codes < 0).sum())
    note = f"{unread} answers hold no rating word, and are left out" if unread else None
    return Scorer(column, "model", levels, codes, note=note)


def other_scorers(gathered: Gathered, request: Request, aspect: Aspect, rows: Ints) -> list[Scorer]:
    """Scores [n] of other scorers, joined to the evaluated rows by id.

    Raises:
        UserError: if none of a table's rows is one of the evaluated, or the column is not there.
    """
    found = []
    truth = gathered.truth.take(rows)
    for name, (uri, column) in request.others.items():
        flag = f"--other {name}={uri}:{column}"
        table = read(uri, flag, request.id_column)
        values = table.numbers(column.replace("{aspect}", str(aspect)), flag)
        places, _ = match(truth, table, request.key)
        scores = np.where(places >= 0, values[np.maximum(places, 0)], np.nan)
        missing = np.flatnonzero(~np.isfinite(scores))
        note = None
        if len(missing):
            ids = truth.take(missing[:6]).rows["id"].to_pylist()
            note = f"{len(missing)} of {len(rows)} rows have no score of it ({first_five(ids)})"
        found.append(Scorer(name, "other", scores, same_scale=False, note=note))
    return found


def predictor_of(request: Request, scores: Table) -> Path | None:
    """The folder of the predictor that made the scores, as far as that is known.

    Raises:
        UserError: if one was named that is no folder.
    """
    if request.predictor is not None:
        folder = Path(request.predictor).expanduser()
        if not folder.is_dir():
            raise UserError(f"--predictor {request.predictor}", "is no folder", "give the predictor's own folder")
        return folder
    if scores.manifest is None:
        return None
    try:
        found = predictor_folder(RunConfig.model_validate(scores.manifest.config))
    except ValidationError:  # a run of another version
        return None
    return found if found is not None and found.is_dir() else None


def stated_level(folder: Path | None, aspect: Aspect) -> float | None:
    """How often a predictor's intervals of an aspect are meant to hold; None where it does not say."""
    try:
        sheet = json.loads((folder / "predictor.json").read_text(encoding="utf-8")) if folder is not None else {}
        return float(sheet["calibration"][str(aspect)]["level"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def facts_of(gathered: Gathered, labels: Floats) -> Facts:
    """What is known of all rows [n] beside their images."""
    ids = [str(one) for one in gathered.truth.keys("id").to_pylist()]
    return Facts.of(ids, gathered.known("generator"), gathered.known("prompt"), labels)


def digests(table: Table, rows: Ints) -> list[str | None]:
    """SHA-256 of the image files of some rows; None where the table does not say."""
    if "image_sha256" not in table.rows.column_names:
        return [None] * len(rows)
    return [None if one is None else str(one) for one in table.rows["image_sha256"].take(pa.array(rows)).to_pylist()]
