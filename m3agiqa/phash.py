"""Perceptual hashes: what makes two pictures look alike, in 64 bits, and which hashes are near each other."""

import itertools
import math
from typing import Any

import imagehash
import numpy as np
from PIL import Image

BITS = 64
FURTHEST = 16
"""The largest distance that is searched for: beyond it, hashes of unlike pictures are near by chance."""

Hashes = np.ndarray[Any, np.dtype[np.uint64]]
Places = np.ndarray[Any, np.dtype[np.int64]]

# More tables than this cost more than the longer keys save.
_MOST_TABLES = 128


def hash_image(image: Image.Image) -> int:
    """The pHash of a picture: the signs of the 64 lowest DCT coefficients of its luminance, as one integer."""
    bits = imagehash.phash(image).hash
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def near_pairs(hashes: Hashes, distance: int) -> Places:
    """Every pair of hashes that differ in at most so many bits.

    Hashes of which many are equal have many pairs: give each hash once where that is enough.

    Args:
        hashes: [n] uint64. distance: in bits, 0 to `FURTHEST`.

    Returns:
        [pairs, 2] places in `hashes`, the smaller first, sorted.

    Raises:
        ValueError: for a distance out of range.

    Source: blocks and tables as in Manku, Jain and Das Sarma, "Detecting near-duplicates for web crawling" (2007).
    """
    if not 0 <= distance <= FURTHEST:
        raise ValueError(f"a distance of {distance} bits is not from 0 to {FURTHEST}")
    n = len(hashes)
    found = [np.empty(0, np.int64)]
    for mask in _masks(distance, n):
        keys = hashes & np.uint64(mask)
        order = np.argsort(keys, kind="stable")
        keys, sorted_hashes = keys[order], hashes[order]
        starts = np.arange(n)
        # All pairs within a run of equal keys: neighbours first, then those two apart, and so on.
        for apart in range(1, n):
            starts = starts[starts < n - apart]
            starts = starts[keys[starts] == keys[starts + apart]]
            if not len(starts):
                break
            near = np.bitwise_count(sorted_hashes[starts] ^ sorted_hashes[starts + apart]) <= distance
            one, other = order[starts[near]], order[starts[near] + apart]
            found.append(np.minimum(one, other) * n + np.maximum(one, other))
    flat = np.unique(np.concatenate(found))
    return np.stack([flat // n, flat % n], axis=1) if n else np.empty((0, 2), np.int64)


def _masks(distance: int, n: int) -> list[int]:
    """Bits to be equal in, so that any two hashes within the distance are equal in those of one mask at least.

    Of `distance + kept` blocks at most `distance` differ, so `kept` are equal. More are kept the more hashes
    there are: a key of log2(n) bits is shared by few by chance.
    """
    kept = 1
    while (
        BITS * kept // (distance + kept) < math.log2(max(n, 2))
        and math.comb(distance + kept + 1, kept + 1) <= _MOST_TABLES
    ):
        kept += 1
    blocks = distance + kept
    edges = [BITS * i // blocks for i in range(blocks + 1)]
    masks = [(1 << high) - (1 << low) for low, high in itertools.pairwise(edges)]
    return [sum(chosen) for chosen in itertools.combinations(masks, kept)]
