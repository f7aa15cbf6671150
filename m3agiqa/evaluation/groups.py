"""Figures within groups: of one generator's images among themselves, or of one prompt's.

Pooled correlations reward a scorer for knowing which generator is the better one. Within a group that is worth nothing.
`srcc` is the mean over groups, each weighted by its rows; `pairwise` is over all pairs of one group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from m3agiqa.evaluation.bootstrap import Drawn, deviations, interval
from m3agiqa.evaluation.draws import Draws, Ints, in_threads
from m3agiqa.evaluation.metrics import Floats, surplus, tied_pairs

LEAST_IN_GROUP = 3
"""Rows below which a group is left out: two give a correlation of 1 or -1 whatever the scorer."""
MOST_IN_GROUP = 1_000
"""Rows above which a group's draws come from subsets (see `bootstrap`)."""
# Larger groups are counted by scipy, one at a time; smaller ones pair by pair, all at once.
_SMALL = 256
_LEAST_GROUPS = 10

Ends = tuple[float, float] | None


@dataclass(frozen=True)
class Grouping:
    """Which group each row is in: codes [n], places in `names`, or -1 for a row without one."""

    codes: Ints
    names: list[str]

    @classmethod
    def of(cls, values: pa.Array | Sequence[str | None]) -> "Grouping":
        """By equal text [n]."""
        encoded = pa.array(values, pa.string()).dictionary_encode()
        codes = np.array(pc.fill_null(encoded.indices, -1), np.int64)
        return cls(codes, encoded.dictionary.to_pylist())

    def take(self, rows: Ints) -> "Grouping":
        """Of some rows; codes stay what they are."""
        return Grouping(self.codes[rows], self.names)


@dataclass(frozen=True)
class Within:
    """What one scorer reaches within groups.

    Attributes:
        codes, names: of the groups that count. size: rows of each, [groups].
        rank: SRCC of each, NaN where it does not exist, [groups].
        right: pairs in the order of the human scores, ties as one half, [groups]. pairs: with differing ones, [groups].
    """

    codes: Ints
    names: list[str]
    size: Ints
    rank: Floats
    right: Floats
    pairs: Ints

    @property
    def srcc(self) -> float | None:
        """The mean of the groups that have one, weighted by rows."""
        known = np.isfinite(self.rank)
        return float(np.average(self.rank[known], weights=self.size[known])) if known.any() else None

    @property
    def pairwise(self) -> float | None:
        """Over all pairs of one group."""
        return float(self.right.sum() / self.pairs.sum()) if self.pairs.sum() else None

    def intervals(self, draws: Draws) -> dict[str, Ends]:
        """Of `srcc` and `pairwise`, with whole groups drawn again: their rows are not independent of each other.

        None with fewer than ten groups.

        Args:
            draws: of as many rows as there are groups.
        """
        count = len(self.size)
        if count < _LEAST_GROUPS:
            return {"srcc": None, "pairwise": None}
        known = np.isfinite(self.rank)
        weighted = {
            "srcc": (np.where(known, self.rank, 0.0) * self.size, self.size * known),
            "pairwise": (self.right, self.pairs),
        }
        sums = np.stack([one.astype(np.float64) for pair in weighted.values() for one in pair], axis=1)
        parts: dict[str, list[Floats]] = {name: [] for name in weighted}
        for subset in draws.by_row:
            own = sums[subset.rows]
            drawn, whole = subset.weights.astype(np.float64) @ own, own.sum(0)
            for place, name in enumerate(weighted):
                up, below = drawn[:, 2 * place], drawn[:, 2 * place + 1]
                center = whole[2 * place] / max(whole[2 * place + 1], 1)
                parts[name].append(np.where(below > 0, up / np.maximum(below, 1e-300), np.nan) - center)
        return {name: interval(getattr(self, name), np.concatenate(parts[name]), count) for name in weighted}


@dataclass(frozen=True)
class RowIntervals:
    """The intervals of one scorer with the rows of each group drawn again: for few groups, which stay what they are.

    Attributes:
        ends: of its `srcc` and `pairwise` within groups.
        by_group: code of a group -> how far the ends of its own figures are from these: metric -> (low, high).
    """

    ends: dict[str, Ends]
    by_group: dict[int, dict[str, Ends]]


def row_intervals(
    scorers: Sequence[Drawn], labels: Floats, groups: Grouping, found: Sequence[Within], samples: int, seed: int
) -> list[RowIntervals]:
    """Of each scorer's `found`. Each group has draws of its own, which all scorers share."""
    order = np.argsort(groups.codes, kind="stable")
    starts = np.searchsorted(groups.codes[order], np.arange(len(groups.names) + 1))
    sums = [_Sums(one, samples) for one in found]
    by_group: list[dict[int, dict[str, Ends]]] = [{} for _ in scorers]
    for place, code in enumerate(found[0].codes.tolist()):
        rows = order[starts[code] : starts[code + 1]]
        own = [Drawn(one.scores[rows], same_scale=one.same_scale) for one in scorers]
        spreads = deviations(own, labels[rows], Draws(len(rows), samples, seed, MOST_IN_GROUP, stream=code))
        for spread, added, kept in zip(spreads, sums, by_group, strict=True):
            added.add(place, spread)
            kept[code] = {name: interval(0.0, spread.get(name), len(rows)) for name in ("srcc", "rmse")}
    return [RowIntervals(one.intervals(), each) for one, each in zip(sums, by_group, strict=True)]


class _Sums:
    """Draws of a scorer's figures within groups, summed group by group."""

    def __init__(self, found: Within, samples: int) -> None:
        self._found = found
        self._own = {"srcc": found.rank, "pairwise": found.right / np.maximum(found.pairs, 1)}
        self._weights = {"srcc": found.size, "pairwise": found.pairs}
        self._up, self._below = ({metric: np.zeros(samples) for metric in self._own} for _ in range(2))

    def add(self, place: int, spread: Mapping[str, Floats]) -> None:
        for metric, weights in self._weights.items():
            drawn = self._own[metric][place] + spread[metric]
            if metric == "pairwise":  # a draw without differing human scores differs by nothing
                drawn = np.nan_to_num(drawn, nan=float(self._own[metric][place]))
            known = np.isfinite(drawn)
            self._up[metric] += np.where(known, weights[place] * drawn, 0.0)
            self._below[metric] += np.where(known, weights[place], 0)

    def intervals(self) -> dict[str, Ends]:
        ends: dict[str, Ends] = {}
        for metric, below in self._below.items():
            estimate = getattr(self._found, metric)
            drawn = np.where(below > 0, self._up[metric] / np.maximum(below, 1), np.nan)
            known = estimate is not None
            ends[metric] = interval(estimate, drawn - estimate, int(self._found.size.sum())) if known else None
        return ends


def within(scorers: Sequence[Floats], labels: Floats, groups: Grouping) -> list[Within]:
    """Compares the scores [n] of each scorer with labels [n] within each group; rows without a group are left out."""
    counts = np.bincount(groups.codes[groups.codes >= 0], minlength=len(groups.names))
    kept = (
        (groups.codes >= 0) & (counts[groups.codes] >= LEAST_IN_GROUP) if len(counts) else np.zeros(len(labels), bool)
    )
    order = np.flatnonzero(kept)[np.argsort(groups.codes[kept], kind="stable")]
    old, own = np.unique(groups.codes[order], return_inverse=True)
    size = np.bincount(own, minlength=len(old)).astype(np.int64)
    names, y = [groups.names[i] for i in old.tolist()], labels[order]
    label_ranks = _ranks(y, own)

    def one(scores: Floats) -> Within:
        x = scores[order]
        rank = _correlations(_ranks(x, own), label_ranks, own, len(old))
        return Within(old, names, size, rank, *_pairs(x, y, own, size))

    return in_threads(one, scorers)


def _ranks(values: Floats, groups: Ints) -> Floats:
    """Mean ranks [n] within groups [n], which ascend."""
    by_value = np.argsort(values)
    order = by_value[np.argsort(groups[by_value], kind="stable")]
    v, g = values[order], groups[order]
    new = np.append(True, (np.diff(v) != 0) | (np.diff(g) != 0)) if len(v) else np.empty(0, bool)
    starts = np.flatnonzero(new)
    ends = np.append(starts[1:], len(v))
    first = np.searchsorted(g, g[starts])
    found = np.empty(len(v))
    found[order] = np.repeat((starts + ends + 1) / 2 - first, ends - starts)
    return found


def _correlations(x: Floats, y: Floats, groups: Ints, count: int) -> Floats:
    """Pearson's correlation in each group: [count], NaN where either is constant."""
    size = np.maximum(np.bincount(groups, minlength=count), 1)
    x = x - (np.bincount(groups, x, count) / size)[groups]
    y = y - (np.bincount(groups, y, count) / size)[groups]
    up, xx, yy = (np.bincount(groups, product, count) for product in (x * y, x * x, y * y))
    below = np.sqrt(xx * yy)
    return np.where(below > 0, np.clip(up / np.where(below > 0, below, 1.0), -1.0, 1.0), np.nan)


def _pairs(x: Floats, y: Floats, groups: Ints, size: Ints) -> tuple[Floats, Ints]:
    """Of each group: pairs that x orders as y does (ties one half), and pairs that differ in y; rows by group."""
    right, pairs = np.zeros(len(size)), np.zeros(len(size), np.int64)
    starts = np.cumsum(size) - size
    for group in np.flatnonzero(size > _SMALL).tolist():
        own = slice(starts[group], starts[group] + size[group])
        n = int(size[group])
        pairs[group] = n * (n - 1) // 2 - tied_pairs(y[own])
        right[group] = (surplus(x[own], y[own]) + pairs[group]) / 2
    small = size[groups] <= _SMALL
    x, y, groups = x[small], y[small], groups[small]
    for apart in range(1, int(size[size <= _SMALL].max(initial=0))):
        same = np.flatnonzero(groups[apart:] == groups[:-apart])
        up, wanted = np.sign(x[same + apart] - x[same]), np.sign(y[same + apart] - y[same])
        pairs += np.bincount(groups[same], wanted != 0, len(size)).astype(np.int64)
        right += np.bincount(groups[same], (wanted != 0) * (1 + up * wanted) / 2, len(size))
    return right, pairs
