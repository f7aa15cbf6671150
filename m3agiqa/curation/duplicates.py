"""Pictures that are alike: of each lot the best stays, and every one that goes is near one that stays."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from m3agiqa.curation.expressions import first, quoted
from m3agiqa.errors import UserError
from m3agiqa.phash import near_pairs

MOST_COMPARED = 200_000
"""Rows whose states are compared each with each: 2e10 products, minutes on a small machine."""
_ROWS_AT_ONCE = 32
_BLOCK = 2048


@dataclass(frozen=True)
class Vectors:
    """Where the captured states are: a connection with the view `rows`, and the columns of states and tokens."""

    con: duckdb.DuckDBPyConnection
    states: str
    tokens: str


def near_hashes(ordered: pa.Table, distance: int) -> pa.Array:
    """The ids that go.

    Args:
        ordered: id and hash (uint64), the best first.
        distance: in bits, within which pictures are alike.
    """
    hashes = ordered["hash"].to_numpy()
    # Of equal hashes the first stands for all: they are near the same ones.
    unique, first, place_of = np.unique(hashes, return_index=True, return_inverse=True)
    pairs = np.sort(first[near_pairs(unique, distance)], axis=1)
    gone = _losers(pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))])
    leads = first[place_of]
    loses = (leads != np.arange(len(hashes))) | np.isin(leads, list(gone))
    return ordered["id"].filter(pa.array(loses)).combine_chunks()


def alike(vectors: Vectors, similarity: float, kept: str, order: str) -> pa.Array:
    """The ids that go: the cosine of their mean states with those of one that stays is at least `similarity`.

    Args:
        kept: SQL of a subquery of id and composite. order: SQL of the order, the best first.

    Raises:
        UserError: if there are more rows than `MOST_COMPARED`.
    """
    (count,) = first(vectors.con, f"SELECT count(*) FROM {kept}")
    if count > MOST_COMPARED:
        rule = f"{count:,} rows are left, and it compares {MOST_COMPARED:,} at most, each with each"
        raise UserError("duplicates.similarity", rule, "use duplicates.distance, or stricter rules before it")
    ordered = vectors.con.sql(f"SELECT id FROM {kept} ORDER BY {order}").to_arrow_table()["id"].combine_chunks()
    place = {one: i for i, one in enumerate(ordered.to_pylist())}
    means: np.ndarray[Any, np.dtype[np.float32]] | None = None
    known = np.zeros(len(place), bool)
    for one, mean in _means(vectors, kept):
        if means is None:
            means = np.zeros((len(place), len(mean)), np.float32)
        norm = float(np.linalg.norm(mean))
        if norm > 0:
            means[place[one]], known[place[one]] = mean / norm, True
    if means is None:
        return ordered.slice(0, 0)
    gone = _losers(_pairs(means, known, similarity))
    return ordered.take(pa.array(sorted(gone), pa.int64()))


def _means(vectors: Vectors, kept: str) -> Iterator[tuple[str, np.ndarray[Any, np.dtype[np.float32]]]]:
    """id and mean state [hidden] of every kept row that has states."""
    states, tokens = quoted(vectors.states), quoted(vectors.tokens)
    query = f"SELECT id, {states}, {tokens} FROM rows SEMI JOIN {kept} USING (id) WHERE {states} IS NOT NULL"
    for batch in vectors.con.sql(query).to_arrow_reader(_ROWS_AT_ONCE):
        for one, data, length in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            # bfloat16 is the upper half of a float32.
            wide = np.frombuffer(data, np.uint16).astype(np.uint32) << np.uint32(16)
            yield one, wide.view(np.float32).reshape(length, -1).mean(axis=0)


def _pairs(
    means: np.ndarray[Any, np.dtype[np.float32]], known: np.ndarray[Any, np.dtype[np.bool_]], similarity: float
) -> Iterator[tuple[int, int]]:
    """Pairs of rows [n, hidden] of unit length, the better first, in order of the better one."""
    for start in range(0, len(means), _BLOCK):
        near = means[start : start + _BLOCK] @ means[start:].T >= similarity
        near &= known[start : start + _BLOCK, None] & known[None, start:]
        better, worse = np.nonzero(np.triu(near, k=1))
        yield from zip((better + start).tolist(), (worse + start).tolist(), strict=True)


def _losers(pairs: Iterable[Any]) -> set[int]:
    """Of pairs (better, worse) in order of the better one: those that are near a better one that stays."""
    gone: set[int] = set()
    near: dict[int, list[int]] = defaultdict(list)
    for better, worse in pairs:
        near[int(better)].append(int(worse))
    for better, worse_ones in near.items():
        if better not in gone:
            gone.update(worse_ones)
    return gone
