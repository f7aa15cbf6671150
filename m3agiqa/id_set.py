"""A set of ids that stays small: 16 bytes an id, however long, in two arrays that processes of a node share."""

from collections.abc import Iterable

import numpy as np
import pandas as pd
import pyarrow as pa

# SipHash under two keys makes 128 bits: with 64, one of a billion rows would be taken for another at odds of 1 in 20.
_KEYS = ("m3agiqa ids high", "m3agiqa ids low ")


class IdSet:
    """Ids as sorted 128-bit hashes.

    Attributes:
        high: the first halves, uint64 [n], sorted.
        low: the second halves, uint64 [n], in the same order.
    """

    def __init__(self, high: np.ndarray, low: np.ndarray) -> None:
        self.high, self.low = high, low

    @classmethod
    def of(cls, batches: Iterable[pa.Array | pa.ChunkedArray]) -> "IdSet":
        """The set of all ids (strings) of some arrays; one that occurs twice is in it twice (see `twice`)."""
        halves: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        for ids in batches:
            for kept, half in zip(halves, _hashes(ids), strict=True):
                kept.append(half)
        high, low = (np.concatenate([np.empty(0, np.uint64), *parts]) for parts in halves)
        halves[0].clear()
        halves[1].clear()
        order = np.lexsort((low, high))
        return cls(high[order], low[order])

    def __len__(self) -> int:
        return len(self.high)

    def contains(self, ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Which of these ids are in the set: bool [n]."""
        return self._holds(*_hashes(ids)) if len(self) else np.zeros(len(ids), bool)

    def without(self, other: "IdSet") -> "IdSet":
        """The ids of this set that are not in the other."""
        kept = ~other._holds(self.high, self.low)
        return IdSet(self.high[kept], self.low[kept])

    def _holds(self, high: np.ndarray, low: np.ndarray) -> np.ndarray:
        """`contains` of hashes, uint64 [n] each."""
        if not len(self):
            return np.zeros(len(high), bool)
        first, last = np.searchsorted(self.high, high, "left"), np.searchsorted(self.high, high, "right")
        found = (last > first) & (self.low[np.minimum(first, len(self) - 1)] == low)
        # Equal first halves are an id that occurs twice, or one pair in many billions.
        for i in np.flatnonzero((last - first > 1) & ~found):
            found[i] = bool((self.low[first[i] : last[i]] == low[i]).any())
        return found

    def twice(self) -> "IdSet":
        """The ids that were given more than once, each once."""
        same = (self.high[1:] == self.high[:-1]) & (self.low[1:] == self.low[:-1])
        firsts = same & ~np.concatenate([[False], same[:-1]]) if len(same) else same
        return IdSet(self.high[1:][firsts], self.low[1:][firsts])


def _hashes(ids: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    values = np.asarray(ids.to_pylist(), dtype=object)
    high, low = (pd.util.hash_array(values, hash_key=key, categorize=False) for key in _KEYS)
    return high, low
