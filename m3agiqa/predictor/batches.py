"""Conversations in batches: shuffled within a window, of similar lengths, padded.

Shapes: B conversations, T tokens of the longest, H numbers a token.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

Example = tuple[int, torch.Tensor]
"""Which conversation, by its place among the labels, and its states [tokens, H]."""


@dataclass(frozen=True)
class Batch:
    """Right-padded conversations.

    Attributes:
        states: [B, T, H] in float32. lengths: [B]. rows: [B], places among the labels.
    """

    states: torch.Tensor
    lengths: torch.Tensor
    rows: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        return Batch(self.states.to(device), self.lengths.to(device), self.rows.to(device))


def collate(examples: Sequence[Example]) -> Batch:
    """Pads with zeros, and makes float32 of whatever the states are in."""
    rows, states = zip(*examples, strict=True)
    padded = torch.nn.utils.rnn.pad_sequence([one.float() for one in states], batch_first=True)
    return Batch(padded, torch.tensor([len(one) for one in states]), torch.tensor(rows))


def batches(
    examples: Iterable[Example], size: int, *, window: int, bucket: int = 1, generator: torch.Generator | None = None
) -> Iterator[Batch]:
    """Cuts a stream into batches of `size`; only the last of a window that is not full may be smaller.

    Args:
        window: conversations that are held and shuffled together, rounded up to whole batches.
        bucket: batches of a window that share out their conversations by length.
        generator: decides the order; None keeps the windows' order, sorted by length within each.
    """
    stream = iter(examples)
    window = -(-window // size) * size
    while held := list(islice(stream, window)):
        if generator is None:
            held.sort(key=_length)
            order = list(range(0, len(held), size))
        else:
            held = [held[i] for i in torch.randperm(len(held), generator=generator).tolist()]
            pools = [held[i : i + size * bucket] for i in range(0, len(held), size * bucket)]
            held = [one for pool in pools for one in sorted(pool, key=_length)]
            starts = range(0, len(held), size)
            order = [starts[i] for i in torch.randperm(len(starts), generator=generator).tolist()]
        for start in order:
            yield collate(held[start : start + size])


def generator(*seeds: int) -> torch.Generator:
    """A generator that is decided by all of these numbers, none of them below 0."""
    state = np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def _length(example: Example) -> int:
    return len(example[1])
