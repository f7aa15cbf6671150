"""How many rows of each stratum are sampled."""

from collections.abc import Sequence


def allocate(counts: Sequence[int], size: int, *, equal: bool) -> list[int]:
    """Shares of a sample; they sum to `size`, or to all rows where there are fewer.

    Args:
        counts: rows of each stratum.
        equal: as equal as the strata allow, else in proportion to them, by largest remainders.
    """
    size = min(size, sum(counts))
    return _equal(counts, size) if equal else _proportional(counts, size)


def _proportional(counts: Sequence[int], size: int) -> list[int]:
    total = sum(counts)
    # Whole numbers throughout: a float's rounding would decide ties.
    shares = [count * size // total for count in counts]
    by_remainder = sorted(range(len(counts)), key=lambda i: (-(counts[i] * size % total), i))
    for i in by_remainder[: size - sum(shares)]:
        shares[i] += 1
    return shares


def _equal(counts: Sequence[int], size: int) -> list[int]:
    """The smallest strata first: what one cannot give is spread over the larger ones."""
    shares, left = [0] * len(counts), size
    by_count = sorted(range(len(counts)), key=lambda i: (counts[i], i))
    for place, i in enumerate(by_count):
        shares[i] = min(counts[i], left // (len(counts) - place))
        left -= shares[i]
    return shares
