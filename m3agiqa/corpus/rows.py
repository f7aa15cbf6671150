"""What a row of a corpus is, whichever kind of file it comes from."""

import hashlib
import re
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from m3agiqa.corpus import files
from m3agiqa.corpus.access import Access
from m3agiqa.errors import UserError

FIXED_FIELDS: tuple[pa.Field, ...] = (
    pa.field("id", pa.string()),
    pa.field("image", pa.string()),
    pa.field("_uri", pa.string()),
    pa.field("_bytes", pa.large_binary()),
    pa.field("prompt", pa.string()),
    pa.field("generator", pa.string()),
)
"""The first columns of every corpus; `id` is never null, and `image` only in a corpus of text."""

IMAGE_COLUMNS: tuple[str, ...] = ("image_path", "image", "path", "file_name", "url")
"""Names under which the image column is looked for, in this order, where none is configured."""

ROWS_PER_TABLE = 2048
BYTES_PER_TABLE = 32 * 2**20
"""A reader hands over a table once it holds this many rows, or this many bytes."""

_ABSOLUTE = r"^(/|[A-Za-z][A-Za-z0-9+.-]*://)"


class Shard(Protocol):
    """A part of a corpus that can be read on its own. Shards are small and go through pickle."""

    @property
    def where(self) -> str:
        """Where its rows stand, for a message."""
        ...

    def read(self) -> Iterator[pa.Table]:
        """Yields tables of a few thousand rows or about 32 MiB at most, each with the schema of the corpus."""
        ...


@dataclass(frozen=True)
class Corpus:
    """Images to be scored, not read yet.

    Attributes:
        shards: independent units of reading; together, every row once.
        schema: of every table that is read: `FIXED_FIELDS`, then the columns that pass through.
        rows: how many there are; None where counting would mean reading everything (tars).
        access: which files its rows may name, and how they are read.
        notes: what a user may want to know about how the input was understood, one line each.
    """

    shards: tuple[Shard, ...]
    schema: pa.Schema
    rows: int | None
    access: Access
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Options:
    """The arguments of `open_corpus` under one name."""

    image_column: str | None
    prompt_column: str
    id_column: str
    generator_column: str
    drop: Sequence[str]
    reserved: Collection[str]
    rows_per_shard: int
    access: Access
    images: str | None = None
    text_only: bool = False
    lenient: bool = False


@dataclass(frozen=True)
class Mapping:
    """Which column of a manifest plays which part; None: the manifest has no such column."""

    image: str | None
    prompt: str | None
    id: str | None
    generator: str | None
    others: tuple[str, ...]

    @property
    def columns(self) -> list[str]:
        """The columns that have to be read."""
        return [name for name in (self.image, self.prompt, self.id, self.generator) if name is not None] + [
            *self.others
        ]


@dataclass(frozen=True)
class Source:
    """One file of a manifest.

    Attributes:
        uri: of the file.
        folder: what relative image paths start from.
        name: how rows with embedded images are shown (`name#12`).
        id_prefix: what keeps made-up ids of several files apart; empty for a single file.
    """

    uri: str
    folder: str
    name: str
    id_prefix: str


def sources(listing: files.Listing, images: str | None = None) -> list[Source]:
    """The files of a listing, as parts of one manifest; relative image paths start from `images`, or from each file."""
    folder = None if images is None else files.absolute(images)
    found = []
    for name in listing.names:
        uri = files.join(listing.base, name)
        found.append(Source(uri, folder or files.split(uri)[0], name, f"{name}:" if len(listing.names) > 1 else ""))
    return found


def corpus_schema(passing: Iterable[pa.Field]) -> pa.Schema:
    """The schema of a corpus with these columns passing through."""
    return pa.schema([*FIXED_FIELDS, *passing])


def choose_columns(value: str, names: Sequence[str], options: Options) -> tuple[Mapping, list[str]]:
    """Decides which column is what.

    Returns:
        the mapping, and notes for the user.

    Raises:
        UserError: no image column, a configured column that is not there, two columns of one name, or columns that
            cannot pass through (`check_passing`).
    """
    names = [name for name in names if name not in options.drop]
    listed = ", ".join(names)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(value, f"two columns are named {twice[0]!r}", "rename one of them")
    image = options.image_column or next((name for name in IMAGE_COLUMNS if name in names), None)
    if image not in names and options.text_only and options.image_column is None:
        image = None
    elif image is None or image not in names:
        missing = f"no column {image!r}" if image else "no image column"
        raise UserError(value, f"{missing} among its columns ({listed})", "name it: --set corpus.image_column=NAME")
    parts: dict[str, str | None] = {}
    for part in ("prompt", "id", "generator"):
        column = getattr(options, f"{part}_column")
        if column not in names and column != part:
            cure = f"set corpus.{part}_column to one of them, or leave it out"
            raise UserError(value, f"no column {column!r} among its columns ({listed})", cure)
        parts[part] = column if column in names and column != image else None
    used = {image, *parts.values()}
    others = tuple(name for name in names if name not in used)
    check_passing(value, others, options)
    notes = [] if parts["prompt"] else [f"no column {options.prompt_column!r}: rows have no prompt ({listed})"]
    return Mapping(image, parts["prompt"], parts["id"], parts["generator"], others), notes


def check_passing(value: str, names: Iterable[str], options: Options) -> None:
    """Refuses columns that pass through under a name that is taken. Case makes no difference: to SQL it makes none.

    Raises:
        UserError: the name is one of the fixed columns, of `reserved`, that of another column, or begins with an
            underscore. Two underscores are allowed: pandas writes `__index_level_0__` into many a parquet file.
    """
    names = list(names)
    taken = {field.name for field in FIXED_FIELDS} | {name.lower() for name in options.reserved}
    for name in names:
        if name.lower() in taken or (name.startswith("_") and not name.startswith("__")):
            why = "names beginning with _ are" if name.startswith("_") else "that name is"
            cure = f'rename it in the input, or leave it out: --set corpus.drop=["{name}"]'
            if name.lower() in ("prompt", "id", "generator"):
                cure += f", or take it: --set corpus.{name.lower()}_column={name}"
            raise UserError(value, f"column {name!r} cannot pass through: {why} reserved", cure)
    if (twins := differ_in_case(names)) is not None:
        cure = f'rename one in the input, or leave it out: --set corpus.drop=["{twins[1]}"]'
        raise UserError(value, f"columns {twins[0]!r} and {twins[1]!r} differ in case only", cure)


def differ_in_case(names: Iterable[str]) -> tuple[str, str] | None:
    """The first two names that are one to SQL, which knows no case, or None."""
    seen: dict[str, str] = {}
    for name in names:
        if (first := seen.setdefault(name.lower(), name)) != name:
            return first, name
    return None


def blank_to_null(texts: pa.Array) -> pa.Array:
    """Strings [n], with null where there is nothing but white space."""
    blank = pc.equal(pc.utf8_trim_whitespace(texts), "")
    return pc.if_else(blank, pa.scalar(None, texts.type), texts)


def as_text(value: str, name: str, column: pa.Array) -> pa.Array:
    """A column as strings [n].

    Raises:
        UserError: its type has no form as a string.
    """
    try:
        return column.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        raise UserError(value, f"column {name!r} of type {column.type} is not text", "give it as strings") from error


def made_up_id(row: int, image: str | bytes, prompt: str | None) -> str:
    """The id of a row of a manifest that gives none: `00000012-5f0c3a1b`.

    The row number makes it unique, also where an image occurs twice. The hash of the image reference (of the bytes,
    where they are embedded) and the prompt makes it safe: when a manifest is reordered or edited between two runs into
    one output, a moved row gets a new id and is scored again, instead of being taken for the row whose number it now
    has and keeping another image's score.
    """
    digest = hashlib.sha256(image.encode() if isinstance(image, str) else image)
    digest.update(b"\0" + (prompt or "").encode())
    return f"{row:08d}-{digest.hexdigest()[:8]}"


def to_rows(table: pa.Table, source: Source, mapping: Mapping, schema: pa.Schema, first_row: int) -> pa.Table:
    """Rows of a manifest in the form of the corpus.

    Args:
        table: columns of the manifest [n rows], as they were read.
        source: the file they come from.
        mapping: what the columns are.
        schema: of the corpus.
        first_row: number of the first row in the file, from 0.
    """

    def column(name: str | None) -> pa.Array:
        if name is None:
            return pa.nulls(table.num_rows, pa.string())
        return as_text(source.uri, name, table[name].combine_chunks())

    nothing = pa.nulls(table.num_rows, pa.string())
    column_of_images = table[mapping.image].combine_chunks() if mapping.image is not None else nothing
    references, blobs = _image_parts(source.uri, str(mapping.image), column_of_images)
    prompts = blank_to_null(column(mapping.prompt))
    uris = pc.if_else(pc.is_valid(blobs), pa.scalar(None, pa.string()), _resolve(references, source.folder))
    rows = range(first_row, first_row + table.num_rows)
    shown = pc.if_else(pc.is_valid(blobs), pa.array([f"{source.name}#{row}" for row in rows], pa.string()), uris)
    if mapping.id is not None:
        ids = column(mapping.id)
    else:
        parts = zip(rows, references.to_pylist(), blobs, prompts.to_pylist(), strict=True)
        ids = pa.array(
            [
                source.id_prefix + made_up_id(row, blob.as_buffer() if blob.is_valid else text or "", prompt)
                for row, text, blob, prompt in parts
            ],
            pa.string(),
        )
    passing = [table[name].cast(schema.field(name).type) for name in mapping.others]
    images = pc.fill_null(shown, "") if mapping.image is not None else nothing
    fixed = [ids, images, uris, blobs, prompts, blank_to_null(column(mapping.generator))]
    return pa.Table.from_arrays([*fixed, *passing], schema=schema)


def _image_parts(value: str, name: str, column: pa.Array) -> tuple[pa.Array, pa.Array]:
    """The image column as references (string, blank: null) and embedded bytes (large_binary), each [n] or null."""
    kind = column.type
    none = pa.nulls(len(column), pa.large_binary())
    if isinstance(kind, pa.StructType) and {"bytes", "path"} & {field.name for field in kind}:
        # Hugging Face's Image feature; `path` is only a label where there are bytes.
        fields = {field.name: pc.struct_field(column, field.name) for field in kind}
        blobs = fields["bytes"].cast(pa.large_binary()) if "bytes" in fields else none
        paths = fields.get("path", pa.nulls(len(column), pa.string()))
        return blank_to_null(as_text(value, f"{name}.path", paths)), blobs
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return pa.nulls(len(column), pa.string()), column.cast(pa.large_binary())
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_string(values) or pa.types.is_large_string(values) or pa.types.is_null(values):
        return blank_to_null(as_text(value, name, column)), none
    rule = f"the image column {name!r} is of type {kind}, not a path, bytes, or a struct of bytes and path"
    raise UserError(value, rule, "name another column: --set corpus.image_column=NAME")


def _resolve(references: pa.Array, folder: str) -> pa.Array:
    """Absolute URIs of image references [n]; relative ones start from the manifest's folder."""
    path, options = files.split_options(folder)
    below = pc.binary_join_element_wise(path.rstrip("/"), references, "/")
    if options:
        below = pc.binary_join_element_wise(below, options, "")
    return pc.if_else(pc.match_substring_regex(references, _ABSOLUTE), references, below)


class UniqueIds:
    """Checks that given ids are there and unique, in 8 bytes per id: it keeps hashes, not ids."""

    def __init__(self, value: str, column: str) -> None:
        self.value, self.column = value, column
        self._hashes = array("q")
        self._missing: str | None = None

    def add(self, ids: pa.Array, file: str, first_row: int) -> None:
        """Takes note of ids (strings [n]) of a file, from its row `first_row` on."""
        missing = pc.fill_null(pc.equal(ids, ""), True)
        if self._missing is None and pc.any(missing).as_py():
            self._missing = f"row {first_row + pc.index(missing, True).as_py()} of {file}, counted from 0"
        hashes = np.fromiter(map(hash, ids.to_pylist()), dtype=np.int64, count=len(ids))
        self._hashes.frombytes(hashes.tobytes())

    def check(self, again: Callable[[], Iterable[pa.Array]]) -> None:
        """Decides; `again` reads the same ids once more, which is done only where two hashes are equal.

        Raises:
            UserError: an id is null or empty, or occurs twice; names the row or the id.
        """
        if self._missing is not None:
            cure = "fill it in, leave the column out, or take another: --set corpus.id_column=NAME"
            raise UserError(self.value, f"the id in column {self.column!r} is empty ({self._missing})", cure)
        hashes = np.frombuffer(self._hashes, dtype=np.int64)
        hashes.sort()
        twice = set(hashes[1:][hashes[1:] == hashes[:-1]][:1000].tolist())
        if not twice:
            return
        seen: set[str] = set()
        for ids in again():
            for name in ids.to_pylist():
                if hash(name) in twice:  # two different ids of one hash are no error
                    if name in seen:
                        cure = "make ids unique, or choose another column: --set corpus.id_column=NAME"
                        raise UserError(self.value, f"id {name!r} occurs more than once in {self.column!r}", cure)
                    seen.add(name)


def shorten(error: Exception | str, limit: int = 200) -> str:
    """A message on one line of at most `limit` characters: a parser's may hold a whole row."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    return text if len(text) <= limit else text[: limit - 3] + "..."
