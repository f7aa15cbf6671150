"""All figures of one aspect: every scorer on the same rows, within groups, against each other, with intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from m3agiqa.aspects import SCALE_MAX, SCALE_MIN
from m3agiqa.evaluation import bootstrap, calibration, metrics, words
from m3agiqa.evaluation.bootstrap import Drawn
from m3agiqa.evaluation.draws import Draws, Ints, in_threads
from m3agiqa.evaluation.groups import Ends, Grouping, RowIntervals, Within, row_intervals, within
from m3agiqa.evaluation.metrics import Floats
from m3agiqa.ratings import equal_bins

BINS = equal_bins(SCALE_MIN, SCALE_MAX)
"""Bins of the rating words on the one scale that all labels are brought to."""
COMPARED = ("srcc", "plcc", "krcc", "rmse", "pairwise")


@dataclass(frozen=True, eq=False)
class Scorer:
    """One source of scores.

    Attributes:
        kind: `model` (ours), `other`, or `baseline` (looks at no image).
        scores: [n], NaN where there is none. words: [n] places of rating words, -1 where there is none; None: has none.
        same_scale: whether the scores are on the scale of the labels.
        note: what a reader of its figures should know.
    """

    name: str
    kind: Literal["model", "other", "baseline"]
    scores: Floats
    words: Ints | None = None
    same_scale: bool = True
    note: str | None = None


@dataclass(frozen=True)
class Rows:
    """The rows that are evaluated: human scores [n] from 0 to 5, and what is known of the images."""

    labels: Floats
    generators: Grouping
    prompts: Grouping


@dataclass(frozen=True)
class Sampling:
    """Bootstrap draws, and the seed that decides them."""

    samples: int
    seed: int


@dataclass(frozen=True)
class _Together:
    """Scorers that have the same rows: drawn together, so that what they share is made once.

    Attributes:
        rows: human scores and groups of these rows alone [k]. scores: [k] of each scorer. draws: of k rows.
    """

    scorers: tuple[Scorer, ...]
    scores: tuple[Floats, ...]
    rows: Rows
    sampling: Sampling
    draws: Draws

    @cached_property
    def _drawn(self) -> list[Drawn]:
        pairs = zip(self.scorers, self.scores, strict=True)
        return [Drawn(x, metrics.fitted(x, self.rows.labels), one.same_scale) for one, x in pairs]

    @cached_property
    def values(self) -> list[dict[str, float | None]]:
        """The pooled figures of each scorer."""
        labels = self.rows.labels
        return in_threads(lambda x: metrics.pooled(x.scores, labels, x.after, same_scale=x.same_scale), self._drawn)

    @cached_property
    def deviations(self) -> list[dict[str, Floats]]:
        """Their draws; none with too few rows."""
        if len(self.rows.labels) < bootstrap.LEAST_ROWS:
            return [{} for _ in self.scorers]
        return bootstrap.deviations(self._drawn, self.rows.labels, self.draws)

    @cached_property
    def by_generator(self) -> list[Within]:
        """Their figures within generators."""
        return within(self.scores, self.rows.labels, self.rows.generators)

    @cached_property
    def by_prompt(self) -> list[Within]:
        """Their figures within prompts."""
        return within(self.scores, self.rows.labels, self.rows.prompts)

    @cached_property
    def generator_intervals(self) -> list[RowIntervals]:
        """The intervals of `by_generator`, and of each generator."""
        rows, (samples, seed) = self.rows, (self.sampling.samples, self.sampling.seed)
        return row_intervals(self._drawn, rows.labels, rows.generators, self.by_generator, samples, seed)


class Assessor:
    """Makes the figures of scorers of the same n rows; those that have the same rows are drawn together."""

    def __init__(self, rows: Rows, sampling: Sampling, scorers: Sequence[Scorer]) -> None:
        self._rows, self._sampling = rows, sampling
        self._draws: dict[int, Draws] = {}
        self._together: dict[Scorer, _Together] = {}
        by_rows: dict[bytes, list[Scorer]] = {}
        for one in scorers:
            by_rows.setdefault(np.isfinite(one.scores).tobytes(), []).append(one)
        for those in by_rows.values():
            together = self._those(those, np.flatnonzero(np.isfinite(those[0].scores)))
            self._together |= dict.fromkeys(those, together)

    def scorer(self, one: Scorer) -> dict[str, Any]:
        """Everything about one scorer; a figure that does not exist is None with its `reason`."""
        those = self._together[one]
        found: dict[str, Any] = {"name": one.name, "kind": one.kind, "rows": len(those.rows.labels), "note": one.note}
        if not len(those.rows.labels):
            return found | {"reason": "it has no score for any row"}
        place = those.scorers.index(one)
        x, y = those.scores[place], those.rows.labels
        metrics.check(x, y, one.name)
        spreads = those.deviations[place]
        ends = {
            name: bootstrap.interval(value, spreads.get(name), len(y)) for name, value in those.values[place].items()
        }
        found["pooled"] = _figures(those.values[place], ends, x, y, one.same_scale)
        generators, prompts = those.by_generator[place], those.by_prompt[place]
        found["within_generator"] = found["within_prompt"] = None
        if generators.names:
            found["within_generator"] = _inside(generators, those.generator_intervals[place].ends)
        if prompts.names:
            found["within_prompt"] = _inside(prompts, prompts.intervals(self._draw(len(prompts.names))))
        found["reliability"] = calibration.reliability(x, y) if one.same_scale else None
        found["words"] = None if one.words is None else self._words(one.words)
        return found

    def compare(self, ours: Scorer, theirs: Scorer) -> dict[str, Any]:
        """Ours less theirs on the rows that both have, in paired draws."""
        kept = np.flatnonzero(np.isfinite(ours.scores) & np.isfinite(theirs.scores))
        found: dict[str, Any] = {"ours": ours.name, "theirs": theirs.name, "rows": len(kept), "differences": {}}
        if not len(kept):
            return found
        those = self._together[ours]
        if those is not self._together[theirs]:
            those = self._those([ours, theirs], kept)
        a_place, b_place = those.scorers.index(ours), those.scorers.index(theirs)
        paired = dict(bootstrap.differences(those.deviations[a_place], those.deviations[b_place]))
        for name in COMPARED:
            a, b = those.values[a_place][name], those.values[b_place][name]
            if a is None or b is None:
                continue
            ends = bootstrap.interval(a - b, paired.get(name), len(kept))
            holds = ends is not None and not ends[0] <= 0 <= ends[1]
            found["differences"][name] = {**_ends(a - b, ends), "holds_up": holds}
        return found

    def generators(self, one: Scorer) -> list[dict[str, Any]]:
        """SRCC, RMSE and mean error of one scorer for each generator, most images first."""
        those = self._together[one]
        place, codes, names = those.scorers.index(one), those.rows.generators.codes, those.rows.generators.names
        intervals = those.generator_intervals[place].by_group
        found = []
        for code in np.unique(codes[codes >= 0]).tolist():
            rows = np.flatnonzero(codes == code)
            x, y = those.scores[place][rows], those.rows.labels[rows]
            values = {"srcc": metrics.srcc(x, y), "rmse": metrics.rmse(x, y) if one.same_scale else None}
            apart = intervals.get(code, {})
            ends = {name: _added(value, apart.get(name)) for name, value in values.items()}
            figures = _figures(values, ends, x, y, one.same_scale)
            bias = float((x - y).mean()) if one.same_scale else None
            found.append(
                {"generator": names[code], "rows": len(rows), "mean_label": float(y.mean()), "bias": bias, **figures}
            )
        return sorted(found, key=lambda each: (-each["rows"], each["generator"]))

    def coverage(self, low: Floats, high: Floats, level: float | None) -> dict[str, Any] | None:
        """How often the intervals [n] hold the human score; None where there are none."""
        kept = np.flatnonzero(np.isfinite(low) & np.isfinite(high))
        if not len(kept):
            return None
        return calibration.coverage(low[kept], high[kept], self._rows.labels[kept], self._draw(len(kept)), level)

    def _draw(self, n: int) -> Draws:
        """Draws of n rows, kept: many scorers share them."""
        return self._draws.setdefault(n, Draws(n, self._sampling.samples, self._sampling.seed))

    def _those(self, scorers: Sequence[Scorer], kept: Ints) -> _Together:
        known = self._rows
        rows = Rows(known.labels[kept], known.generators.take(kept), known.prompts.take(kept))
        scores = tuple(one.scores[kept] for one in scorers)
        return _Together(tuple(scorers), scores, rows, self._sampling, self._draw(len(kept)))

    def _words(self, given: Ints) -> dict[str, Any] | None:
        kept = np.flatnonzero(given >= 0)
        if not len(kept):
            return None
        wanted = words.of_scores(self._rows.labels[kept], BINS)
        return words.agreement(given[kept], wanted, self._draw(len(kept)))


def _figures(
    values: Mapping[str, float | None], ends: Mapping[str, Ends], x: Floats, y: Floats, same_scale: bool
) -> dict[str, Any]:
    """Figures with their intervals; where there is none, with the reason."""
    found = {}
    for name, value in values.items():
        found[name] = _ends(value, ends[name])
        if ends[name] is None:
            found[name]["reason"] = _reason(name, value, x, y, same_scale)
    return found


def _added(value: float | None, apart: Ends) -> Ends:
    return None if value is None or apart is None else (value + apart[0], value + apart[1])


def _inside(found: Within, ends: Mapping[str, Ends]) -> dict[str, Any]:
    """Figures within groups."""
    return {
        "groups": len(found.names),
        "rows": int(found.size.sum()),
        "srcc": _ends(found.srcc, ends["srcc"]),
        "pairwise": _ends(found.pairwise, ends["pairwise"]),
    }


def _ends(value: float | None, ends: Ends) -> dict[str, Any]:
    low, high = ends or (None, None)
    return {"value": value, "low": low, "high": high}


def _reason(name: str, value: float | None, x: Floats, y: Floats, same_scale: bool) -> str:
    if value is None:
        if name == "rmse" and not same_scale:
            return "its scale is not that of the human scores"
        if name.endswith("_fitted") and len(y) < metrics.LEAST_TO_FIT:
            return f"the logistic needs {metrics.LEAST_TO_FIT} rows"
        return metrics.why_none(x, y) or "no two human scores differ"
    if len(y) < bootstrap.LEAST_ROWS:
        return f"{len(y)} rows are too few for an interval, which needs {bootstrap.LEAST_ROWS}"
    return "too many draws hold only equal values for an interval"
