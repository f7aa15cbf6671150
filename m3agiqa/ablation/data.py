"""The states of the inputs as the variations show them to a head, in memory-mapped files.

So there may be more states than memory: a training touches those of one batch at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow.parquet as pq
import torch

from m3agiqa.aspects import RATING_WORDS
from m3agiqa.corpus.files import locate
from m3agiqa.errors import UserError
from m3agiqa.predictor.captured import CapturedSet, Conversations, Floats, Ints, chunks, read_chunk, read_conversations
from m3agiqa.predictor.lm_head import LMHead
from m3agiqa.predictor.states import decode, states_width

# Conversations that are read from parquet in one go.
_READ_AT_ONCE = 256


class Slices(Sequence[torch.Tensor]):
    """Conversations within one mapped file: bfloat16 [tokens, H] each, read from disk when they are used.

    Args:
        states: int16 [all tokens, H], the bits of bfloat16. starts, ends: [n], rows of each conversation.
    """

    def __init__(self, states: np.ndarray[Any, Any], starts: Ints, ends: Ints) -> None:
        self._states, self._starts, self._ends = states, starts, ends

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> "Slices": ...
    def __getitem__(self, index: int | slice) -> "torch.Tensor | Slices":
        if isinstance(index, slice):
            return Slices(self._states, self._starts[index], self._ends[index])
        rows = self._states[self._starts[index] : self._ends[index]]
        return torch.from_numpy(rows).view(torch.bfloat16)

    def take(self, places: Ints) -> "Slices":
        """Some of the conversations, in the order given."""
        return Slices(self._states, self._starts[places], self._ends[places])


@dataclass
class Input:
    """The conversations of one aspect in one captured set.

    Attributes:
        ids, prompts, splits, labels: by conversation, as there is one an image.
        bounds: [n, 2], where the description begins and ends; None where the set does not say.
        probs: [n, 5] of the rating words, NaN where there are none; None where the set has no such column.
        width: numbers a token.
    """

    name: str
    source: CapturedSet
    conversations: Conversations
    aspect: str
    bounds: Ints | None
    probs: Floats | None
    width: int
    folder: Path
    lm_head: LMHead | None = None
    top_k: int = 0
    _mapped: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)

    @property
    def ids(self) -> list[str]:
        """Of the conversations."""
        return [self.conversations.ids[i] for i in self.conversations.image]

    @property
    def prompts(self) -> list[str | None]:
        """Of the conversations."""
        return [self.conversations.prompts[i] for i in self.conversations.image]

    @property
    def splits(self) -> list[str | None]:
        """What the column `split` holds."""
        return [self.conversations.splits[i] for i in self.conversations.image]

    @property
    def labels(self) -> torch.Tensor:
        """[n] in float64."""
        return torch.from_numpy(self.conversations.label)

    def check(self, rounds: str, capture: str) -> None:
        """Whether it can be shown so.

        Raises:
            UserError: if it cannot.
        """
        said, again = f"--input {self.name}", "capture it again with this version"
        if rounds != "description+rating" and self.bounds is None:
            raise UserError(said, f"does not say where its descriptions end, which rounds={rounds} needs", again)
        if capture == "rating_probs" and (self.probs is None or bool(np.isnan(self.probs).any())):
            raise UserError(said, "lacks rating probabilities, which capture=rating_probs needs", again)
        if capture == "top_k":
            _check_lm_head(self.lm_head, self.width, self.top_k)

    def shown(self, rounds: str, capture: str) -> Slices:
        """The conversations as a head sees them, [tokens, H] or for the rating probabilities [1, 5] each."""
        if capture == "rating_probs":
            assert self.probs is not None
            bits = torch.from_numpy(self.probs).bfloat16().view(torch.int16).numpy()
            places = np.arange(len(bits))
            return Slices(bits, places, places + 1)
        tokens = self.conversations.tokens
        starts = np.cumsum(tokens) - tokens
        if rounds == "description+rating":
            return Slices(self._map(capture), starts, starts + tokens)
        assert self.bounds is not None
        seen = self.bounds[:, 0 if rounds == "none" else 1]
        return Slices(self._map(capture), starts, starts + seen)

    def _map(self, capture: str) -> np.ndarray[Any, Any]:
        """int16 [all tokens, H]; written when it is first asked for."""
        if capture not in self._mapped:
            shape = (int(self.conversations.tokens.sum()), self.width)
            file = self.folder / f"{self.name}.{capture}"
            self.folder.mkdir(parents=True, exist_ok=True)
            filled: np.ndarray[Any, Any] = np.memmap(file, np.int16, "w+", shape=shape)
            starts = np.cumsum(self.conversations.tokens) - self.conversations.tokens
            for place, states in self._read():
                kept = self._top_k(states) if capture == "top_k" else states
                filled[starts[place] : starts[place] + len(kept)] = kept.view(torch.int16).numpy()
            # torch wants memory that could be written to; what is written there never reaches the file.
            self._mapped[capture] = np.memmap(file, np.int16, "c", shape=shape)
        return self._mapped[capture]

    def _read(self) -> Iterator[tuple[int, torch.Tensor]]:
        every = np.arange(len(self.conversations.label))
        for chunk in chunks(self.conversations, (self.aspect,), every, _READ_AT_ONCE):
            for table in read_chunk(chunk):
                keys, tokens = table["key"].to_pylist(), table["tokens"].to_pylist()
                for key, count, states in zip(keys, tokens, table["states"], strict=True):
                    yield key, decode(states.as_buffer(), count)

    def _top_k(self, states: torch.Tensor) -> torch.Tensor:
        """States [tokens, H] -> [tokens, H]: the LM head's rows of the top k tokens, by their probabilities.

        It is all that k logits and their token ids tell, in a space as wide as the states'.
        """
        assert self.lm_head is not None
        top = self.lm_head.logits(states.to(self.lm_head.weight.dtype)).topk(self.top_k, dim=-1)
        rows = self.lm_head.weight[top.indices].float()
        return torch.einsum("tk,tkh->th", top.values.float().softmax(-1), rows).bfloat16()


def open_input(
    name: str, source: CapturedSet, label: tuple[str, str], scale: tuple[float, float], folder: Path
) -> Input:
    """Reads ids, labels and bounds; states later.

    Args:
        label: an aspect and the column of its human scores. folder: for the mapped files.

    Raises:
        UserError: for a set or labels that cannot be used.
    """
    aspect, column = label
    found = read_conversations([source], {aspect: column}, scale)
    bounds = _column(found, [f"{aspect}_asked_tokens", f"{aspect}_described_tokens"], 1)
    probs = _column(found, [f"{aspect}_rating_probs"], len(RATING_WORDS))
    known = None if bounds is None or bool(np.isnan(bounds).any()) else bounds.astype(np.int64)
    return Input(name, source, found, aspect, known, probs, states_width(found, (aspect,)), folder)


def _column(conversations: Conversations, names: Sequence[str], numbers: int) -> Floats | None:
    """Columns of the conversations side by side, [n, columns * numbers], NaN for null; None if the set lacks one."""
    (source,) = conversations.sets
    if any(name not in source.schema.names for name in names):
        return None
    filled = np.full((len(conversations.label), len(names) * numbers), np.nan)
    for i, uri in enumerate(conversations.files):
        own = np.flatnonzero(conversations.file == i)
        if not len(own):
            continue
        store, path = locate(uri)
        with pq.ParquetFile(path, filesystem=store) as file:
            for group in range(file.num_row_groups):
                places = own[conversations.group[own] == group]
                table = file.read_row_group(group, columns=list(names)).take(conversations.row[places])
                for at, name in enumerate(names):
                    nothing = [np.nan] * numbers
                    values = [one if numbers > 1 else [one] for one in table[name].to_pylist()]
                    rows = [nothing if one is None or one == [None] else one for one in values]
                    if rows:
                        filled[places, at * numbers : (at + 1) * numbers] = rows
    return filled


def _check_lm_head(lm_head: LMHead | None, width: int, top_k: int) -> None:
    if lm_head is None:
        raise UserError("capture=top_k", "needs the LM head of the states' model", "give --lm-head MODEL")
    tokens, wide = lm_head.weight.shape
    if top_k > tokens:
        raise UserError(f"measure.top_k={top_k}", f"is more than the {tokens} tokens there are", "lower it")
    if wide != width:
        raise UserError("--lm-head", f"takes states of {wide} numbers, not {width}", "give that of the captured model")
