"""Manifests that are text: CSV, TSV, JSON lines and JSON arrays, also compressed.

Such a file says nothing of its types, so it is read twice: once to check it and decide the types over all of it, and
once for the rows. It is one shard: rows go by at hundreds of thousands a second, far ahead of their images, and a CSV
with quoted line breaks cannot be cut at an arbitrary byte.
"""

import codecs
import functools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from m3agiqa.corpus import conversations, files
from m3agiqa.corpus.rows import (
    ROWS_PER_TABLE,
    Corpus,
    Mapping,
    Options,
    Source,
    UniqueIds,
    choose_columns,
    corpus_schema,
    shorten,
    sources,
    to_rows,
)
from m3agiqa.errors import UserError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson")
JSON_ARRAY = ".json"
LENIENT = ".json, bad conversations too"
COMPRESSED = (".gz", ".bz2", ".zst")

_BLOCK_BYTES = 8 * 2**20
_LINE_CURE = "correct that line of the file"
# What can go through a number and come back: no leading zeros, no more digits than the type holds.
_INTEGER = r"^(0|-?[1-9][0-9]{0,17})$"
_FLOAT = r"^(-?(0|[1-9][0-9]*)\.[0-9]*([eE][+-]?[0-9]+)?|-?[0-9]([eE][+-][0-9]+)|0|-?[1-9][0-9]{0,14}|-?inf|nan|NaN)$"


def format_of(name: str) -> str | None:
    """`.csv`, `.tsv`, `.jsonl` or `.json`, compressed or not, going by the file's name; None for anything else."""
    lower = name.lower()
    for packing in COMPRESSED:
        lower = lower.removesuffix(packing)
    if lower.endswith(JSON_LINES):
        return ".jsonl"
    return next((kind for kind in (*DELIMITERS, JSON_ARRAY) if lower.endswith(kind)), None)


@dataclass(frozen=True)
class TextShard:
    """One text manifest; `types` are the Arrow types of the columns that are read, by name."""

    source: Source
    format: str
    mapping: Mapping
    types: dict[str, pa.DataType]
    schema: pa.Schema

    @property
    def where(self) -> str:
        """The file."""
        return self.source.uri

    def read(self) -> Iterator[pa.Table]:
        """Yields the rows; the images are not read."""
        row = 0
        for block in _blocks(self.source.uri, self.format, self.types):
            for start in range(0, block.num_rows, ROWS_PER_TABLE):
                table = block.slice(start, ROWS_PER_TABLE)
                yield to_rows(table, self.source, self.mapping, self.schema, row)
                row += table.num_rows


def open_text(listing: files.Listing, options: Options) -> Corpus:
    """A corpus in one or several text manifests; a column that one of them lacks is null in its rows.

    Types of columns that pass through are decided over all rows: integers are int64, floats float64 (integers among
    them only while float64 holds them exactly), everything else, `007` included, strings as they are written. An empty
    field of a CSV is null in a column of numbers, and empty in a column of strings. Nested JSON values become JSON.

    Raises:
        UserError: no rows, bad UTF-8, a ragged or malformed line, ids that are missing or not unique, column trouble.
    """
    parts = [(source, _format(source.name, options)) for source in sources(listing, options.images)]
    value = f"input {parts[0][0].uri}"
    columns = [name for source, kind in parts for name in _csv_header(source.uri, kind, options)]
    if columns and not any(kind in _BY_ITEM for _, kind in parts):
        choose_columns(value, list(dict.fromkeys(columns)), options)  # before a long first pass, where that is possible
    guesses: dict[str, _Guess] = {}
    unique, id_only = UniqueIds(value, options.id_column), {options.id_column: pa.string()}
    rows = sum(_scan(source, kind, guesses, unique) for source, kind in parts)
    if rows == 0:
        raise UserError(value, "it has no rows", "give a manifest with at least one image")
    mapping, notes = choose_columns(value, list(guesses), options)
    if mapping.id is not None:
        unique.check(lambda: (block[mapping.id] for part in parts for block in _blocks(part[0].uri, part[1], id_only)))
    types = {name: pa.string() for name in mapping.columns} | {name: guesses[name].type() for name in mapping.others}
    schema = corpus_schema(pa.field(name, types[name]) for name in mapping.others)
    shards = tuple(TextShard(source, kind, mapping, types, schema) for source, kind in parts)
    return Corpus(shards, schema, rows, options.access, tuple(notes))


def _format(name: str, options: Options) -> str:
    kind = str(format_of(name))
    return LENIENT if kind == JSON_ARRAY and options.lenient else kind


class _Guess:
    """The narrowest type that holds every value of a column seen so far."""

    def __init__(self) -> None:
        self.kinds: set[str] = set()

    def add_csv(self, column: pa.Array) -> None:
        """Takes note of fields of a CSV (strings [n])."""
        if "string" in self.kinds:
            return
        filled = column.filter(pc.fill_null(pc.not_equal(column, ""), False))
        if len(filled) == 0:
            return
        if pc.all(pc.match_substring_regex(filled, _INTEGER)).as_py():
            # 15 digits and fewer are exact as floats too, should a later block have floats
            exact = pc.all(pc.less_equal(pc.utf8_length(filled), 15)).as_py()
            self.kinds.add("int" if exact else "big")
        elif pc.all(pc.match_substring_regex(filled, _FLOAT)).as_py():
            self.kinds.add("float")
        else:
            self.kinds.add("string")

    def add_json(self, item: Any) -> None:
        """Takes note of a JSON value."""
        if item is None:
            return
        if isinstance(item, str):
            self.kinds.add("string")
        elif isinstance(item, bool):
            self.kinds.add("bool")
        elif isinstance(item, int):
            self.kinds.add("int" if abs(item) < 2**53 else "big" if abs(item) < 2**63 else "string")
        else:
            self.kinds.add("float" if isinstance(item, float) else "string")

    def type(self) -> pa.DataType:
        """The type for what was seen."""
        if self.kinds and self.kinds <= {"int", "big"}:
            return pa.int64()
        if self.kinds and self.kinds <= {"int", "float"}:
            return pa.float64()
        return pa.bool_() if self.kinds == {"bool"} else pa.string()


def _scan(source: Source, kind: str, guesses: dict[str, _Guess], unique: UniqueIds) -> int:
    """First pass over one file: columns, types and ids. Returns the number of rows."""
    rows = 0
    block = pa.table({})
    by_item = _BY_ITEM.get(kind)
    blocks: Iterator[Any] = by_item(source.uri) if by_item else _csv_blocks(source.uri, kind, None)
    for block in blocks:
        if by_item:
            for _, item in block:
                for name, member in item.items():
                    if (guess := guesses.get(name)) is None:  # setdefault would make an object for every value
                        guess = guesses[name] = _Guess()
                    guess.add_json(member)
            ids = _json_column([item.get(unique.column) for _, item in block], pa.string())
        else:
            for name in block.column_names:
                guesses.setdefault(name, _Guess()).add_csv(block[name].combine_chunks())
            there = unique.column in block.column_names
            ids = block[unique.column].combine_chunks() if there else pa.nulls(len(block), pa.string())
        unique.add(ids, source.name, rows)
        rows += len(block)
    if rows and not by_item:
        _check_quotes_closed(source.uri, block)
    return rows


def _csv_header(uri: str, kind: str, options: Options) -> list[str]:
    """The columns of a CSV; nothing for JSON, where each object has its own."""
    if kind in _BY_ITEM:
        return []
    with _readable(uri), files.open_stream(uri, "detect") as stream:
        names = list(_csv_reader(stream, kind, {}).schema.names)
    if len(set(names)) < len(names):
        choose_columns(f"input {uri}", names, options)
    return names


def _blocks(uri: str, kind: str, types: dict[str, pa.DataType]) -> Iterator[pa.Table]:
    """Tables with exactly the columns of `types`; a column that the file lacks is null."""
    if kind in _BY_ITEM:
        for items in _BY_ITEM[kind](uri):
            columns = [_json_column([item.get(name) for _, item in items], kind_) for name, kind_ in types.items()]
            yield pa.table(columns, schema=pa.schema(list(types.items())))
    else:
        yield from _csv_blocks(uri, kind, types)


def _csv_reader(stream: pa.NativeFile, kind: str, types: dict[str, pa.DataType]) -> csv.CSVStreamingReader:
    return csv.open_csv(
        stream,
        # One thread: only then does pyarrow say in which row it failed.
        read_options=csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES),
        parse_options=csv.ParseOptions(delimiter=DELIMITERS[kind], newlines_in_values=True),
        convert_options=csv.ConvertOptions(
            column_types=types,
            include_columns=list(types) or None,
            include_missing_columns=True,
            null_values=[""],
            strings_can_be_null=False,
        ),
    )


def _csv_blocks(uri: str, kind: str, types: dict[str, pa.DataType] | None) -> Iterator[pa.Table]:
    """Tables with the columns of `types`; None: with all columns, as strings."""
    if types is None:
        with _readable(uri), files.open_stream(uri, "detect") as stream:
            types = dict.fromkeys(_csv_reader(stream, kind, {}).schema.names, pa.string())
    with _readable(uri), files.open_stream(uri, "detect") as stream:
        for batch in _csv_reader(stream, kind, types):
            yield pa.Table.from_batches([batch])


def _check_quotes_closed(uri: str, last: pa.Table) -> None:
    """An opening quote that is never closed makes one field of all that follows it, and pyarrow takes that for fine."""
    fields = [str(column[-1].as_py()) for column in last.columns]
    if not any("\n" in field for field in fields):
        return
    quotes = 0
    with files.open_stream(uri, "detect") as stream:
        while chunk := stream.read(_BLOCK_BYTES):
            quotes += chunk.count(b'"')
    if quotes % 2:
        rule = f"a quoted field of the last row is never closed (row: {shorten(', '.join(fields))})"
        raise UserError(f"input {uri}", rule, 'close the quote, or double it where it is part of the text ("")')


def _json_blocks(uri: str) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """Lists of (line number, object)."""
    items: list[tuple[int, dict[str, Any]]] = []
    for number, line in _lines(uri):
        if not line.strip():
            continue
        try:
            item = json.loads(line.decode())
            if b"\\ud" in line or b"\\uD" in line:
                json.dumps(item, ensure_ascii=False).encode()  # half a surrogate pair fits no Arrow string
        except (ValueError, RecursionError) as error:
            what = "UTF-8" if isinstance(error, UnicodeError) else "JSON"
            raise UserError(f"input {uri}", f"line {number} is not {what}: {shorten(error)}", _LINE_CURE) from error
        if not isinstance(item, dict):
            raise UserError(f"input {uri}", f"line {number} is not a JSON object", "give one object on each line")
        items.append((number, item))
        if len(items) == ROWS_PER_TABLE:
            yield items
            items = []
    if items:
        yield items


_BY_ITEM: dict[str, Callable[[str], Iterator[list[tuple[int, dict[str, Any]]]]]] = {
    ".jsonl": _json_blocks,
    JSON_ARRAY: conversations.objects,
    LENIENT: functools.partial(conversations.objects, lenient=True),
}
"""The formats in which every row is an object with names of its own."""


def _json_column(items: list[Any], kind: pa.DataType) -> pa.Array:
    if pa.types.is_string(kind):
        items = [item if item is None or isinstance(item, str) else _json_text(item) for item in items]
    return pa.array(items, kind)


def _json_text(item: Any) -> str:
    return json.dumps(item, ensure_ascii=False)


def _lines(uri: str) -> Iterator[tuple[int, bytes]]:
    number, rest = 0, b""
    with _readable(uri), files.open_stream(uri, "detect") as stream:
        while chunk := stream.read(_BLOCK_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                number += 1
                yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
    yield number + 1, rest.removeprefix(codecs.BOM_UTF8) if number == 0 else rest


class _readable:
    """Turns what pyarrow says about a bad file into an error that names the line where it can."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        value = f"input {self.uri}"
        if isinstance(error, UnicodeDecodeError) or "invalid UTF8" in str(error):
            line = _first_bad_line(self.uri)
            raise UserError(value, f"line {line} is not UTF-8", "save the file as UTF-8") from error
        if not isinstance(error, pa.ArrowInvalid | EOFError):
            return
        if "straddling" in str(error):
            rule = f"a row is longer than {_BLOCK_BYTES // 2**20} MiB, or a quoted field is never closed"
            raise UserError(value, rule, "close the quote, or keep such data out of the manifest") from error
        found = re.search(r"Row #(\d+): Expected (\d+) columns, got (\d+): ?(.*)", str(error), re.DOTALL)
        if found:
            row, expected, got, text = found.groups()
            rule = f"row {row} has {got} fields where the header has {expected} (row: {shorten(text)})"
            raise UserError(value, rule, "correct it, and put quotes around text that holds the delimiter") from error
        raise UserError(value, f"it cannot be read: {shorten(error)}", "check that the file is whole") from error


def _first_bad_line(uri: str) -> int:
    lines = 1
    decoder = codecs.getincrementaldecoder("utf-8")()
    with files.open_stream(uri, "detect") as stream:
        while True:
            chunk = stream.read(_BLOCK_BYTES)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                return lines + error.object[: error.start].count(b"\n")
            if not chunk:
                return lines
            lines += chunk.count(b"\n")
