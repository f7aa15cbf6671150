"""Captured sets: what `m3agiqa capture` writes, read for training. Knows nothing of Ray, and loads no torch.

SET/run.json            among others `fingerprint`, `states_of`: what made the states, and `first_answer`: whose
                        descriptions they are of
SET/scores/*.parquet    a row an image: the corpus's columns (labels among them), and of each aspect
                        `{aspect}_states` (bfloat16 [tokens, H], row by row) and `{aspect}_tokens`

One image and one aspect of it that has states and a label is a conversation: what training counts in.
"""

import difflib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from m3agiqa.corpus.files import absolute, join, locate
from m3agiqa.corpus.numbers import are_numbers, floats
from m3agiqa.errors import UserError
from m3agiqa.seen import Seen
from m3agiqa.seen import read as read_seen

Ints = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]
# Rows that are decoded from parquet at a time; their states are the largest thing in memory.
_ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class CapturedSet:
    """One captured folder.

    Attributes:
        uri: of the folder. fingerprint, states_of: from its manifest.
        files: URIs of its parquet files, sorted. schema: of the first of them.
        met: what the adapters that made it were trained on; None where that is not known.
        first_answer: whether its descriptions are the model's `own` or `given`; None where it does not say.
    """

    uri: str
    fingerprint: str
    states_of: dict[str, str]
    files: tuple[str, ...]
    schema: pa.Schema
    met: Seen | None = field(default=None, compare=False, repr=False)
    first_answer: str | None = None


@dataclass(frozen=True)
class Conversations:
    """Images with labels, and their conversations. Arrays are by conversation, lists by image.

    Attributes:
        sets: the captured sets. files: URIs of all their files.
        ids, prompts, splits: of the images; `splits` holds the column `split`, None where there is none.
        digests: SHA-256 of the image files, None where not known.
        origin: which set each image is from.
        image: [n] which image. output: [n] which label. label: [n].
        tokens: [n]. file, group, row: [n] where the states are: file, row group, and row within that.
        notes: what was left out, in words.
    """

    sets: tuple[CapturedSet, ...]
    files: tuple[str, ...]
    ids: list[str]
    prompts: list[str | None]
    splits: list[str | None]
    digests: list[str | None]
    origin: list[int]
    image: Ints
    output: Ints
    label: Floats
    tokens: Ints
    file: Ints
    group: Ints
    row: Ints
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Chunk:
    """Conversations that lie together in one row group, in the order in which they are read.

    Attributes:
        rows: within the row group. outputs: names of their aspects. keys: what each is called.
        tokens: of all of them together.
    """

    uri: str
    group: int
    rows: tuple[int, ...]
    outputs: tuple[str, ...]
    keys: tuple[int, ...]
    tokens: int


def open_captured(uri: str, flag: str = "--input") -> CapturedSet:
    """Looks at a captured folder.

    Raises:
        UserError: if it is none, or is not finished.
    """
    said, uri = f"{flag} {uri}", absolute(uri)
    try:
        store, path = locate(uri)
        if store.get_file_info(path).type != pafs.FileType.Directory:
            raise UserError(said, "is no folder", "give a folder that m3agiqa capture wrote")
        with store.open_input_stream(f"{path}/run.json") as stream:
            manifest = json.loads(stream.read())
        fingerprint, states_of = manifest["fingerprint"], manifest["states_of"]
        unfinished, first_answer = manifest.get("finished", "") is None, manifest.get("first_answer")
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"run.json lacks {error}" if isinstance(error, KeyError) else error
        raise UserError(said, f"is no captured set ({reason})", "give a folder that m3agiqa capture wrote") from None
    if unfinished:
        raise UserError(said, "its capture has not finished", "run the same capture command again first")
    if not isinstance(states_of, dict) or not states_of:
        raise UserError(said, "holds scores without states", "give a folder that m3agiqa capture wrote")
    found = store.get_file_info(pafs.FileSelector(f"{path}/scores", allow_not_found=True))
    names = sorted(info.base_name for info in found if info.base_name.endswith(".parquet"))
    if not names:
        raise UserError(said, "holds no rows in scores/", "capture some images into it")
    files = tuple(join(join(uri, "scores"), name) for name in names)
    made_by = {k: str(v) for k, v in states_of.items()}
    return CapturedSet(uri, str(fingerprint), made_by, files, _schema(files[0]), read_seen(uri), first_answer)


def read_conversations(
    sets: Sequence[CapturedSet], labels: Mapping[str, str], scale: tuple[float, float]
) -> Conversations:
    """Reads ids, prompts and labels of captured sets, and checks them all; no states are read.

    Args:
        labels: aspect -> the column of its label; their order is that of the outputs.
        scale: lowest and highest label.

    Raises:
        UserError: for sets that do not fit together, columns that are missing, and labels that cannot be.
    """
    common_states_of(sets, tuple(labels))
    for one in sets:
        _check_columns(one, labels)
    reader = _Reader(labels)
    for origin, one in enumerate(sets):
        for uri in one.files:
            reader.read(uri, origin)
    found = reader.conversations(tuple(sets))
    _check_ids(found.ids)
    for i, (aspect, column) in enumerate(labels.items()):
        _check_labels(found.label[found.output == i], f"--label {aspect}={column}", scale)
    return found


def common_states_of(sets: Sequence[CapturedSet], aspects: Sequence[str]) -> dict[str, str]:
    """What made the states of all sets; the adapters of aspects that are not trained do not matter.

    Raises:
        UserError: if the sets differ, or one is given twice.
    """
    if len({one.uri for one in sets}) < len(sets):
        raise UserError("--input", "a captured set is given twice", "give each once")
    wanted = [_of_aspects(one.states_of, aspects) for one in sets]
    for one, found in zip(sets[1:], wanted[1:], strict=True):
        if differing := sorted(k for k in found.keys() | wanted[0].keys() if found.get(k) != wanted[0].get(k)):
            raise UserError(
                f"--input {one.uri}",
                f"its states are not of what made those of {sets[0].uri} ({', '.join(differing)} differs)",
                "give sets that one model, with the same adapters and questions, was captured for",
            )
    return wanted[0]


def first_answers(sets: Sequence[CapturedSet]) -> str:
    """Whose descriptions the sets' conversations go on with: `own`, `given`, `unknown`, or those of them that occur."""
    return " and ".join(sorted({one.first_answer or "unknown" for one in sets}))


def _of_aspects(states_of: Mapping[str, str], aspects: Sequence[str]) -> dict[str, str]:
    kept = {f"adapter.{aspect}" for aspect in aspects}
    return {key: value for key, value in states_of.items() if not key.startswith("adapter.") or key in kept}


def chunks(conversations: Conversations, names: Sequence[str], keys: Ints, most: int) -> list[Chunk]:
    """The places of some conversations, row group by row group.

    Args:
        names: of the outputs. keys: which conversations; a chunk calls each by its place among these.
        most: conversations in a chunk; a row group that holds more becomes several.
    """
    found: dict[tuple[int, int], list[int]] = {}
    for place, key in enumerate(keys.tolist()):
        at = (int(conversations.file[key]), int(conversations.group[key]))
        found.setdefault(at, []).append(place)
    made = []
    for (file, group), places in sorted(found.items()):
        # As `read_chunk` gives them: some rows at a time, and of those one output after the other.
        at_row = {place: int(conversations.row[keys[place]]) for place in places}
        of = {place: names[int(conversations.output[keys[place]])] for place in places}
        places = [p for *_, p in sorted((at_row[p] // _ROWS_AT_ONCE, of[p], at_row[p], p) for p in places)]
        for start in range(0, len(places), most):
            some = places[start : start + most]
            rows, outputs = tuple(at_row[place] for place in some), tuple(of[place] for place in some)
            tokens = int(conversations.tokens[keys[some]].sum())
            made.append(Chunk(conversations.files[file], group, rows, outputs, tuple(some), tokens))
    return made


def read_chunk(chunk: Chunk) -> Iterator[pa.Table]:
    """Tables of `key` (int64), `tokens` (int32) and `states` (large_binary), in the order of the chunk.

    Raises:
        ValueError: where states are missing.
    """
    columns = [f"{output}_{part}" for output in sorted(set(chunk.outputs)) for part in ("tokens", "states")]
    store, path = locate(chunk.uri)
    slices = np.array(chunk.rows) // _ROWS_AT_ONCE
    with pq.ParquetFile(path, filesystem=store) as file:
        for i, part in enumerate(file.iter_batches(_ROWS_AT_ONCE, row_groups=[chunk.group], columns=columns)):
            low, high = np.searchsorted(slices, (i, i + 1))
            if low < high:
                yield _table(chunk, range(low, high), part, i * _ROWS_AT_ONCE)
            if high == len(slices):
                return
    raise ValueError(f"{chunk.uri}: row group {chunk.group} ends before row {chunk.rows[-1]}")


class _Reader:
    """Gathers images and conversations file by file."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._labels = labels
        self._files: list[str] = []
        self._ids: list[str] = []
        self._prompts: list[str | None] = []
        self._splits: list[str | None] = []
        self._digests: list[str | None] = []
        self._origin: list[int] = []
        self._parts: list[list[np.ndarray[Any, Any]]] = []
        self._left_out: Counter[str] = Counter()

    def read(self, uri: str, origin: int) -> None:
        """Adds the rows of one file."""
        store, path = locate(uri)
        try:
            with pq.ParquetFile(path, filesystem=store) as file:
                names = set(file.schema_arrow.names)
                wanted = {"id", "prompt", "split", "image_sha256", "status", *self._labels.values()}
                wanted |= {f"{aspect}_tokens" for aspect in self._labels}
                for group in range(file.num_row_groups):
                    rows = file.read_row_group(group, columns=sorted(wanted & names))
                    self._add(rows, len(self._files), group, origin)
        except (OSError, pa.ArrowException) as error:
            raise UserError(uri, f"cannot be read ({error})", "capture it again") from None
        self._files.append(uri)

    def _add(self, rows: pa.Table, file: int, group: int, origin: int) -> None:
        ok = np.array(pc.fill_null(pc.equal(rows["status"], "ok"), False).combine_chunks())
        self._left_out["rows that are not ok"] += int((~ok).sum())
        first = len(self._ids)
        # Every row gets a place, so that a row's image is found by adding; those that are not ok have no conversations.
        self._ids += [str(one) for one in rows["id"].to_pylist()]
        there = rows.column_names
        for name, values in (("prompt", self._prompts), ("split", self._splits), ("image_sha256", self._digests)):
            values += rows[name].to_pylist() if name in there else [None] * rows.num_rows
        self._origin += [origin] * rows.num_rows
        for output, (aspect, column) in enumerate(self._labels.items()):
            label = _numbers(rows[column], f"--label {aspect}={column}")
            tokens = np.array(pc.fill_null(rows[f"{aspect}_tokens"], 0).combine_chunks(), dtype=np.int64)
            known = np.array(pc.is_valid(rows[column]).combine_chunks())
            self._left_out[f"images without {column}"] += int((ok & ~known).sum())
            self._left_out[f"images with {column} but no states of {aspect}"] += int((ok & known & (tokens < 1)).sum())
            taken = np.flatnonzero(ok & known & (tokens > 0))
            same = [np.full(len(taken), one) for one in (output, file, group)]
            self._parts.append([first + taken, same[0], label[taken], tokens[taken], *same[1:], taken])

    def conversations(self, sets: tuple[CapturedSet, ...]) -> Conversations:
        """All that was read, without the images that have no conversation."""
        image, output, label, tokens, file, group, row = (np.concatenate(p) for p in zip(*self._parts, strict=True))
        kept, image = np.unique(image, return_inverse=True)
        ids = [self._ids[i] for i in kept.tolist()]
        others = (self._prompts, self._splits, self._digests)
        prompts, splits, digests = ([values[i] for i in kept.tolist()] for values in others)
        origin = [self._origin[i] for i in kept.tolist()]
        notes = tuple(f"{count} {what} left out" for what, count in self._left_out.items() if count)
        files = tuple(self._files)
        return Conversations(
            sets, files, ids, prompts, splits, digests, origin, image, output, label, tokens, file, group, row, notes
        )


def _table(chunk: Chunk, places: range, part: pa.RecordBatch, start: int) -> pa.Table:
    tables = []
    for output in sorted({chunk.outputs[i] for i in places}):
        own = [i for i in places if chunk.outputs[i] == output]
        rows = pa.array([chunk.rows[i] - start for i in own])
        states = part.column(f"{output}_states").take(rows).cast(pa.large_binary())
        if states.null_count:
            raise ValueError(f"{chunk.uri}: row group {chunk.group} has {output}_tokens without {output}_states")
        tokens = part.column(f"{output}_tokens").take(rows).cast(pa.int32())
        keys = pa.array([chunk.keys[i] for i in own], pa.int64())
        tables.append(pa.table({"key": keys, "tokens": tokens, "states": states}))
    return pa.concat_tables(tables)


def _schema(uri: str) -> pa.Schema:
    store, path = locate(uri)
    try:
        return pq.read_schema(path, filesystem=store)
    except (OSError, pa.ArrowException) as error:
        raise UserError(uri, f"cannot be read ({error})", "capture it again") from None


def _check_columns(one: CapturedSet, labels: Mapping[str, str]) -> None:
    names = one.schema.names
    for aspect, column in labels.items():
        said = f"--label {aspect}={column}"
        if column not in names:
            near = difflib.get_close_matches(column, [n for n in names if not n.endswith("_states")], n=1)
            cure = f"did you mean {near[0]}?" if near else f"its columns are {', '.join(names)}"
            raise UserError(said, f"{one.uri} has no column {column}", cure)
        if f"{aspect}_states" not in names or f"{aspect}_tokens" not in names:
            raise UserError(
                said, f"{one.uri} holds no states of {aspect}", f"capture it with {aspect} among scoring.aspects"
            )


def _check_ids(ids: Sequence[str]) -> None:
    twice = [one for one, count in Counter(ids).items() if count > 1]
    if twice:
        raise UserError(f"id {twice[0]}", f"is there twice ({len(twice)} ids are)", "give each image once")


def _numbers(column: pa.ChunkedArray, said: str) -> Floats:
    kind = column.type
    if not are_numbers(kind):
        raise UserError(said, f"the column holds {kind}, not numbers", "capture it from a corpus with numeric labels")
    numbers = pc.fill_null(floats(column), 0.0)
    return np.array(numbers.combine_chunks(), dtype=np.float64)


def _check_labels(labels: Floats, said: str, scale: tuple[float, float]) -> None:
    low, high = scale
    if bad := int((~np.isfinite(labels)).sum()):
        raise UserError(said, f"{bad} labels are NaN or infinite", "leave them empty (null) where nobody rated")
    outside = labels[(labels < low) | (labels > high)]
    if len(outside):
        raise UserError(
            said,
            f"{len(outside)} labels, such as {outside[0]:g}, are outside the scale {low:g} to {high:g}",
            "state the scale of the labels with --scale LOW HIGH",
        )
    if len(labels) < LEAST_LABELS:
        raise UserError(said, f"{len(labels)} images have it and states", f"give at least {LEAST_LABELS}")
    if labels.min() == labels.max():
        raise UserError(said, f"all {len(labels)} labels are {labels[0]:g}", "give labels that differ")


LEAST_LABELS = 10
"""Fewer than these of an aspect are no training."""
