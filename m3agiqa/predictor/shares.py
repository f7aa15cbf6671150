"""Which process reads which conversations, and what identifies the data of a training."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from m3agiqa.predictor.captured import Chunk, Conversations, Ints, chunks
from m3agiqa.predictor.splits import Parts
from m3agiqa.predictor.trainer import Labels
from m3agiqa.seen import CALIBRATION, TRAIN, VALIDATION, Seen, seen, union

# Chunks for each process at least, where there are enough conversations: shares of nearly the same size.
_CHUNKS_EACH = 8


@dataclass(frozen=True)
class Part:
    """The labels of one part, and where each process finds its share of the states."""

    labels: Labels
    shares: list[list[Chunk]]

    def steps(self, size: int) -> int:
        """Steps until the process with the largest share is through, at `size` conversations each."""
        return max(-(-_conversations(share) // size) for share in self.shares)

    def tokens(self, process: int) -> int:
        """Tokens of one process's share."""
        return sum(chunk.tokens for chunk in self.shares[process])


def labels_of(conversations: Conversations, keys: Ints) -> Labels:
    """The labels of some conversations."""
    return Labels(torch.from_numpy(conversations.label[keys]), torch.from_numpy(conversations.output[keys]))


def part(conversations: Conversations, names: Sequence[str], keys: Ints, workers: int) -> Part:
    """Some conversations, in shares of nearly the same size: the largest chunk goes to the process that has least."""
    # One process reads whole row groups; several cut small sets up, so that none goes without.
    most = len(keys) if workers == 1 else -(-len(keys) // (workers * _CHUNKS_EACH))
    shares: list[list[Chunk]] = [[] for _ in range(workers)]
    for chunk in sorted(chunks(conversations, names, keys, max(most, 1)), key=lambda one: -len(one.keys)):
        min(shares, key=_conversations).append(chunk)
    return Part(labels_of(conversations, keys), shares)


def _conversations(share: Sequence[Chunk]) -> int:
    return sum(len(chunk.keys) for chunk in share)


def data_digest(conversations: Conversations, parts: Parts) -> str:
    """Of which conversation is in which part with which label."""
    digest = hashlib.sha256("\0".join(conversations.ids).encode())
    columns = (conversations.image, conversations.output, conversations.label, conversations.tokens)
    for values in (*columns, parts.train, parts.validation, parts.calibration):
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()[:16]


def trained_on(conversations: Conversations, parts: Parts) -> Seen | None:
    """The images and prompts of every part."""
    found = []
    for part_, keys in ((TRAIN, parts.train), (VALIDATION, parts.validation), (CALIBRATION, parts.calibration)):
        images = np.unique(conversations.image[keys]).tolist()
        digests, prompts = ([values[i] for i in images] for values in (conversations.digests, conversations.prompts))
        found.append(seen([conversations.ids[i] for i in images], digests, prompts, part_))
    return union(found)
