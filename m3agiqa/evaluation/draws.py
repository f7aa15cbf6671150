"""Bootstrap draws (Efron 1979): the rows are drawn again with replacement, as a weight for each: how often it came.

Up to `MOST_ROWS` rows this is the ordinary bootstrap. Above, it is the bag of little bootstraps (Kleiner et al. 2014,
arXiv 1112.5016): subsets of that many rows, drawn without replacement, of which each draw makes n rows again. For
figures of pairs the limit is `MOST_PAIRED`, since they cost its square.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from scipy.special import pdtr

Ints = np.ndarray[Any, np.dtype[np.int64]]
Weights = np.ndarray[Any, np.dtype[np.uint32]]
_In = TypeVar("_In")
_Out = TypeVar("_Out")

MOST_ROWS = 10_000
MOST_PAIRED = 2_000
_SUBSETS = 20
# Cells of the unit interval in which most Poisson counts are looked up.
_CELLS = 2**16


@dataclass(frozen=True)
class Subset:
    """Rows [k], ascending, and the draws from them: weights [draws, k] that sum to n in each draw."""

    rows: Ints
    weights: Weights


@dataclass(frozen=True)
class Draws:
    """All draws for n rows, made when they are first asked for: `by_row` for sums and ranks, `by_pair` for pairs.

    The same n, samples, seed and stream give the same draws: figures of two scorers on the same rows are then paired.

    Attributes:
        most: rows of a subset, for both kinds of figures, instead of the limits above.
        stream: tells draws apart that must not depend on each other though all else is the same.
    """

    n: int
    samples: int
    seed: int
    most: int | None = None
    stream: int = 0

    @cached_property
    def by_row(self) -> tuple[Subset, ...]:
        """For figures that are sums over rows or over ranks."""
        return self._subsets(self.seed, self.most or MOST_ROWS)

    @cached_property
    def by_pair(self) -> tuple[Subset, ...]:
        """For figures of pairs; the same as `by_row` where there are few rows."""
        if self.most is not None or self.n <= MOST_PAIRED:
            return self.by_row
        return self._subsets(self.seed + 1, MOST_PAIRED)

    def _subsets(self, seed: int, most: int) -> tuple[Subset, ...]:
        n, rng = self.n, np.random.default_rng([seed, self.n, most, self.stream])
        if n <= most:
            even = np.full(n, 1.0 / n)
            return (Subset(np.arange(n), rng.multinomial(n, even, size=self.samples).astype(np.uint32)),)
        sizes = [len(part) for part in np.array_split(np.arange(self.samples), min(_SUBSETS, self.samples))]

        # A generator for each subset: which thread makes it, and when, makes no difference.
        def one(size: int, own: np.random.Generator) -> Subset:
            return Subset(np.sort(own.choice(n, most, replace=False, shuffle=False)), _spread(own, n, most, size))

        return tuple(in_threads(lambda each: one(*each), list(zip(sizes, rng.spawn(len(sizes)), strict=True))))


def in_threads(work: Callable[[_In], _Out], items: Sequence[_In]) -> list[_Out]:
    """Does independent work, as many items at once as this process may use cores; results in the order of the items."""
    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), len(items)) or 1) as pool:
        return list(pool.map(work, items))


def _spread(rng: np.random.Generator, n: int, k: int, samples: int) -> Weights:
    """n items on k even rows, n far above k: multinomial counts [samples, k].

    Independent Poisson counts are multinomial once their sum is known. They are drawn a little too low, and the items
    that are left over fall on single rows: the same distribution as `Generator.multinomial`, in less time.
    """
    rate = (n - 5 * np.sqrt(n)) / k
    counts = _poisson(rng, rate, samples, k)
    left = n - counts.sum(1, dtype=np.int64)
    while len(over := np.flatnonzero(left < 0)):
        counts[over] = _poisson(rng, rate, len(over), k)
        left = n - counts.sum(1, dtype=np.int64)
    where = np.repeat(np.arange(samples) * k, left) + rng.integers(0, k, int(left.sum()))
    return counts + np.bincount(where, minlength=samples * k).reshape(samples, k).astype(np.uint32)


def _poisson(rng: np.random.Generator, rate: float, samples: int, k: int) -> Weights:
    """Counts [samples, k] by inversion: looked up, and searched for only where a cell holds more than one count."""
    up_to = pdtr(np.arange(int(rate + 12 * np.sqrt(rate)) + 40), rate)
    edges = np.arange(_CELLS + 1) / _CELLS
    lowest = np.searchsorted(up_to, edges[:-1], side="right").astype(np.uint32)
    several = lowest != np.searchsorted(up_to, edges[1:], side="left")
    place = rng.random((samples, k))
    cells = (place * _CELLS).astype(np.intp)
    counts = lowest[cells]
    unsure = several[cells]
    counts[unsure] = np.searchsorted(up_to, place[unsure], side="right")
    return counts
