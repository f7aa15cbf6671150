"""In which order a worker takes its conversations: by chance, of similar lengths, an image's together if wanted."""

from collections.abc import Sequence

import torch

from m3agiqa.finetuning.talks import Talk


def batches_of(
    talks: Sequence[Talk],
    lengths: Sequence[int],
    size: int,
    *,
    bucket: int,
    together: bool,
    generator: torch.Generator,
) -> list[list[int]]:
    """Places of the conversations of an epoch, batch by batch; the last may be smaller.

    Args:
        lengths: tokens of each. bucket: batches that share out their conversations by length.
        together: all conversations of an image follow one another.
    """
    units: dict[int, list[int]] = {}
    for place, talk in enumerate(talks):
        units.setdefault(talk.picture if together else place, []).append(place)
    groups = list(units.values())
    shuffled = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
    ordered: list[int] = []
    pool: list[list[int]] = []
    for unit in shuffled:
        pool.append(unit)
        if sum(map(len, pool)) >= size * bucket:
            ordered += _by_length(pool, lengths)
            pool = []
    ordered += _by_length(pool, lengths)
    cut = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    # The small one stays last: each step but that one is a full one.
    full = len(ordered) // size
    return [*(cut[i] for i in torch.randperm(full, generator=generator).tolist()), *cut[full:]]


def _by_length(pool: list[list[int]], lengths: Sequence[int]) -> list[int]:
    pool.sort(key=lambda unit: max(lengths[place] for place in unit))
    return [place for unit in pool for place in unit]


def pieces(places: Sequence[int], size: int, count: int) -> list[list[int]]:
    """A batch in exactly so many pieces of at most `size`; some are empty where there is not enough."""
    return [list(places[i * size : (i + 1) * size]) for i in range(count)]
