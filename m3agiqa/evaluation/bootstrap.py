"""Bootstrap intervals: every figure is taken anew from draws of the rows (see `draws`), of all scorers at once.

Figures are weighted sums over rows that are sorted once, so no draw is sorted, and what depends on the human scores
alone is made once for all scorers. What is kept is by how much a draw's figure differs from its subset's. An interval
is the estimate from all rows plus the 2.5 and 97.5 % quantiles of these differences, which for the ordinary bootstrap
is exactly the percentile interval.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from m3agiqa.evaluation.draws import Draws, Ints, Subset, in_threads
from m3agiqa.evaluation.metrics import Floats

LEVEL = 0.95
LEAST_ROWS = 10
"""With fewer rows there are too few different draws for an interval."""
_LOST = 0.05
# Numbers at once in weights [draws, rows]: a MiB, which stays in the cache.
_AT_ONCE = 2**17
# Rows of a block of the pairs [block, k], which stays in the cache too.
_BLOCK = 128


@dataclass(frozen=True)
class Drawn:
    """A scorer of which draws are taken.

    Attributes:
        scores: [n]. after: the same after the logistic, which is fitted once and not anew in every draw; None: no fit.
        same_scale: whether there is an `rmse`.
    """

    scores: Floats
    after: Floats | None = None
    same_scale: bool = False


def deviations(scorers: Sequence[Drawn], labels: Floats, draws: Draws) -> list[dict[str, Floats]]:
    """By how much each draw's figure differs from the estimate, of each scorer on labels [n].

    Returns:
        metric -> [samples] for each scorer; NaN where a draw has no such figure.
    """
    parts = in_threads(lambda subset: _row_figures(scorers, labels, subset, draws.n), draws.by_row)
    paired = in_threads(lambda subset: _pair_figures(scorers, labels, subset, draws.n), draws.by_pair)
    found = []
    for place in range(len(scorers)):
        both: dict[str, list[Floats]] = {}
        for figures in [part[place] for part in (*parts, *paired)]:
            for name, values in figures.items():
                both.setdefault(name, []).append(values[1:] - values[0])
        found.append({name: np.concatenate(values) for name, values in both.items()})
    return found


def mean_deviations(values: Floats, draws: Draws) -> Floats:
    """The same for the mean of values [n]: [samples]."""
    parts = []
    for subset in draws.by_row:
        own = values[subset.rows] - values[subset.rows].mean()
        parts.append(subset.weights.astype(np.float64) @ own / draws.n)
    return np.concatenate(parts)


def interval(estimate: float | None, differences: Floats | None, rows: int) -> tuple[float, float] | None:
    """The 95 % interval of a figure; None with too few rows, or where more than 5 % of the draws have no figure."""
    if estimate is None or differences is None or rows < LEAST_ROWS:
        return None
    known = differences[np.isfinite(differences)]
    if len(known) < (1 - _LOST) * len(differences):
        return None
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(known, (tail, 1 - tail))
    return float(estimate + low), float(estimate + high)


def differences(ours: Mapping[str, Floats], theirs: Mapping[str, Floats]) -> Iterator[tuple[str, Floats]]:
    """Metric by metric, what two scorers' figures on the same draws differ by, beyond their estimates' difference."""
    for name in ours:
        if name in theirs:
            yield name, ours[name] - theirs[name]


def _batches(subset: Subset, n: int, at_once: int) -> Iterator[Floats]:
    """Weights [draws, k] of a subset; before the draws, those of the subset as it is."""
    k = len(subset.rows)
    yield np.full((1, k), n / k)
    for start in range(0, len(subset.weights), at_once):
        yield subset.weights[start : start + at_once].astype(np.float64)


class _Sorted:
    """Values [k], sorted once, with their runs of equal ones."""

    def __init__(self, values: Floats) -> None:
        self._order = np.argsort(values)
        new = np.append(True, np.diff(values[self._order]) != 0)
        self._starts = None if new.all() else np.flatnonzero(new)
        self.runs = np.empty(len(values), np.int64)
        self.runs[self._order] = np.cumsum(new) - 1

    def sums(self, w: Floats) -> Floats:
        """What weights [draws, k] sum to in each run, the lowest first: [draws, runs]."""
        ordered = np.take(w, self._order, axis=1)
        return ordered if self._starts is None else np.add.reduceat(ordered, self._starts, axis=1)


def _ranks(counts: Floats, total: Floats) -> Floats:
    """Twice the mean rank of each run, less the mean of that, from the counts of all runs: [draws, runs]."""
    found = np.cumsum(counts, axis=1)
    found *= 2
    found -= counts
    found -= total[:, None]
    return found


def _rank_spread(counts: Floats, total: Floats) -> Floats:
    """The sum of the squares of `_ranks` over all rows: [draws]; exactly 0 where all rows are equal."""
    cubes = total**3
    found = (cubes - np.einsum("dr,dr->d", counts * counts, counts)) / 3
    return np.where(found > 1e-12 * cubes, found, 0.0)


def _row_figures(scorers: Sequence[Drawn], labels: Floats, subset: Subset, n: int) -> list[dict[str, Floats]]:
    """Figures that are sums over rows or ranks: metric -> [1 + draws] for each scorer, first of the subset itself."""
    y = labels[subset.rows]
    label_order = _Sorted(y)
    own = [_Row(one, y, subset.rows) for one in scorers]
    found: list[dict[str, list[Floats]]] = [{} for _ in scorers]
    for w in _batches(subset, n, max(1, _AT_ONCE // len(y))):
        total = w.sum(1)
        counts = label_order.sums(w)
        weighted = w * np.take(_ranks(counts, total), label_order.runs, axis=1)
        spread = _rank_spread(counts, total)
        for one, parts in zip(own, found, strict=True):
            figures = {"srcc": one.srcc(w, total, weighted, spread)} | one.moments(w, total)
            for name, values in figures.items():
                parts.setdefault(name, []).append(values)
    return [{name: np.concatenate(values) for name, values in parts.items()} for parts in found]


class _Row:
    """One scorer on a subset's rows, with the products that its draws sum over."""

    def __init__(self, one: Drawn, y: Floats, rows: Ints) -> None:
        x = one.scores[rows]
        self._order = _Sorted(x)
        self._columns: dict[str, list[Floats]] = {"plcc": _products(x, y)}
        if one.same_scale:
            self._columns["rmse"] = [(x - y) ** 2]
        if one.after is not None:
            fit = one.after[rows]
            self._columns |= {"plcc_fitted": _products(fit, y), "rmse_fitted": [(fit - y) ** 2]}
        self._stacked = np.stack([column for columns in self._columns.values() for column in columns], axis=1)

    def srcc(self, w: Floats, total: Floats, weighted: Floats, spread: Floats) -> Floats:
        """Rank correlation [draws]; `weighted`: weights times the labels' ranks [draws, k], `spread`: of those."""
        counts = self._order.sums(w)
        up = np.einsum("dr,dr->d", _ranks(counts, total), self._order.sums(weighted))
        return _ratio(up, _rank_spread(counts, total), spread)

    def moments(self, w: Floats, total: Floats) -> dict[str, Floats]:
        """Figures of the scores themselves: metric -> [draws]."""
        sums = iter((w @ self._stacked / total[:, None]).T)
        found = {}
        for name, columns in self._columns.items():
            means = [next(sums) for _ in columns]
            found[name] = np.sqrt(means[0]) if len(means) == 1 else _pearson(*means)
        return found


def _products(x: Floats, y: Floats) -> list[Floats]:
    """What a correlation of x [k] with y [k] sums."""
    x, y = x - x.mean(), y - y.mean()
    return [x, y, x * x, y * y, x * y]


def _pearson(x: Floats, y: Floats, xx: Floats, yy: Floats, xy: Floats) -> Floats:
    return _ratio(xy - x * y, xx - x * x, yy - y * y)


def _ratio(up: Floats, xx: Floats, yy: Floats) -> Floats:
    """NaN where either is constant, up to rounding."""
    below = np.sqrt(np.maximum(xx, 0)) * np.sqrt(np.maximum(yy, 0))
    return np.where(below > 1e-13, up / np.where(below > 1e-13, below, 1.0), np.nan)


def _pair_figures(scorers: Sequence[Drawn], labels: Floats, subset: Subset, n: int) -> list[dict[str, Floats]]:
    """Kendall's tau-b and pairwise accuracy: metric -> [1 + draws] for each scorer, first of the subset itself."""
    orders = [_Sorted(values[subset.rows]) for values in (labels, *(one.scores for one in scorers))]
    found: list[dict[str, list[Floats]]] = [{} for _ in scorers]
    for w in _batches(subset, n, max(_BLOCK, _AT_ONCE // len(subset.rows))):
        pairs = w.sum(1)
        pairs = pairs * (pairs - 1) / 2
        free_y, *free = (pairs - _tied(order.sums(w)) for order in orders)
        surplus = _surplus([order.runs for order in orders[1:]], orders[0].runs, w)
        for parts, up, free_x in zip(found, surplus, free, strict=True):
            accuracy = np.where(free_y > 0, (up + free_y) / (2 * np.maximum(free_y, 1)), np.nan)
            parts.setdefault("krcc", []).append(_ratio(up, free_x, free_y))
            parts.setdefault("pairwise", []).append(accuracy)
    return [{name: np.concatenate(values) for name, values in parts.items()} for parts in found]


def _tied(counts: Floats) -> Floats:
    """Pairs [draws] that are in one run of counts [draws, runs], copies of one row among them."""
    return (np.einsum("dr,dr->d", counts, counts) - counts.sum(1)) / 2


def _surplus(runs: Sequence[Ints], label_runs: Ints, w: Floats) -> list[Floats]:
    """Pairs that runs [k] order as the labels' do, less those the other way, under weights [draws, k]: [draws] each.

    With C the sign of both differences, that is w C w / 2, and C is symmetric: of each block of rows, only what stands
    right of the diagonal is made.
    """
    # Whole numbers are exact in float32, and so are sums of weights below 2^24.
    y, xs, small = label_runs.astype(np.float32), [one.astype(np.float32) for one in runs], w.astype(np.float32)
    found = [np.zeros(len(w)) for _ in xs]
    for start in range(0, len(y), _BLOCK):
        end = min(start + _BLOCK, len(y))
        label_order = y[start:end, None] - y[start:]
        for x, up in zip(xs, found, strict=True):
            signs = x[start:end, None] - x[start:]
            signs *= label_order
            np.clip(signs, -1, 1, out=signs)
            sums = (small[:, start:end] @ signs).astype(np.float64)
            sums[:, : end - start] /= 2
            up += np.einsum("dk,dk->d", sums, w[:, start:])
    return found
