"""What the parts of a split share: prompts, generators, and near-duplicate images."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from m3agiqa.corpus import open_corpus
from m3agiqa.evaluation.draws import Ints
from m3agiqa.images import ImageRejected, decode
from m3agiqa.phash import hash_image, near_pairs

NEAR = 6
"""Perceptual hashes of 64 bits that differ in at most so many are near duplicates, unless another distance is given."""
_LIMITS: dict[str, Any] = {"max_pixels": 100_000_000, "min_side": 1, "max_side": 512, "max_aspect_ratio": 1000.0}


def shared(parts: Sequence[str | None], values: Sequence[str | None]) -> dict[str, dict[str, Any]]:
    """Of each pair of parts, values (prompts, generators) that are in both.

    Args:
        parts: [n], None where a row is in none. values: [n].

    Returns:
        `A, B` -> `shared`: how many; `of`: how many different ones B has; `rows_share`: of B's rows that have a value.
    """
    own: dict[str, list[str]] = {}
    for part, value in zip(parts, values, strict=True):
        if part is not None:
            own.setdefault(part, []).extend([] if value is None else [value])
    found = {}
    for a, b in itertools.permutations(sorted(own), 2):
        there = set(own[a])
        both = there & set(own[b])
        met = sum(value in there for value in own[b])
        share = met / len(own[b]) if own[b] else None
        found[f"{a}, {b}"] = {"shared": len(both), "of": len(set(own[b])), "rows_share": share}
    return found


def hashes(uri: str, id_column: str = "id") -> tuple[dict[str, int], int]:
    """Perceptual hashes of the images of a corpus that can be read, by id, and how many cannot.

    Args:
        id_column: of the corpus, as it was read for the split.

    Raises:
        UserError: for a corpus that cannot be opened.
    """
    found: dict[str, int] = {}
    failed = 0
    corpus = open_corpus(uri, id_column=id_column)
    for shard in corpus.shards:
        for table in shard.read():
            for row in table.select(["id", "_uri", "_bytes"]).to_pylist():
                try:
                    data = row["_bytes"] if row["_bytes"] is not None else corpus.access.fetch(str(row["_uri"]))
                    found[row["id"]] = hash_image(Image.fromarray(decode(data, **_LIMITS).pixels))
                except (OSError, ImageRejected):  # a picture that is no picture is no duplicate
                    failed += 1
    return found, failed


def near_duplicates(
    ids: Sequence[str], parts: Sequence[str | None], found: Mapping[str, int], distance: int
) -> dict[str, dict[str, Any]]:
    """Of each pair of parts, images that are nearly the same in both.

    Returns:
        `A, B` (A before B) -> `pairs`: how many; `first`: up to five pairs of ids.
    """
    rows = [i for i, one in enumerate(ids) if parts[i] is not None and one in found]
    pairs: Ints = near_pairs(np.array([found[ids[i]] for i in rows], np.uint64), distance)
    names = sorted({str(parts[i]) for i in rows})
    made: dict[str, dict[str, Any]] = {
        f"{a}, {b}": {"pairs": 0, "first": []} for a, b in itertools.combinations(names, 2)
    }
    for i, j in pairs.tolist():
        (a, first), (b, second) = sorted((str(parts[rows[k]]), ids[rows[k]]) for k in (i, j))
        if a != b:
            one = made[f"{a}, {b}"]
            one["pairs"] += 1
            if len(one["first"]) < 5:
                one["first"].append([first, second])
    return made
