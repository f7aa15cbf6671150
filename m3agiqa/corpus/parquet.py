"""Manifests in parquet, with image paths or with the images themselves embedded."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
from pyarrow import parquet as pq

from m3agiqa.corpus import files
from m3agiqa.corpus.rows import (
    BYTES_PER_TABLE,
    ROWS_PER_TABLE,
    Corpus,
    Mapping,
    Options,
    Source,
    UniqueIds,
    as_text,
    choose_columns,
    corpus_schema,
    shorten,
    sources,
    to_rows,
)
from m3agiqa.errors import UserError

_SHARD_BYTES = 256 * 2**20
"""Embedded images weigh more than rows: a shard ends at this many bytes, or at the asked number of rows."""


@dataclass(frozen=True)
class Piece:
    """Row groups of one file; `first_row` is the number of their first row in it."""

    source: Source
    groups: tuple[int, ...]
    first_row: int


@dataclass(frozen=True)
class ParquetShard:
    """Row groups, of one large file or of several small ones."""

    pieces: tuple[Piece, ...]
    mapping: Mapping
    schema: pa.Schema

    @property
    def where(self) -> str:
        """From which row on, in which file, and in how many after it."""
        first, more = self.pieces[0], len(self.pieces) - 1
        return f"{first.source.uri} from row {first.first_row} on{f', and of {more} files after it' if more else ''}"

    def read(self) -> Iterator[pa.Table]:
        """Yields the rows, with embedded images.

        Raises:
            UserError: a file is broken where its footer did not tell.
        """
        for piece in self.pieces:
            yield from _readable(piece.source.uri, self._rows(piece))

    def _rows(self, piece: Piece) -> Iterator[pa.Table]:
        row = piece.first_row
        for batch in _batches(piece, self.mapping.columns):
            for part in _by_bytes(batch):
                yield to_rows(part, piece.source, self.mapping, self.schema, row)
                row += part.num_rows


def _readable(uri: str, batches: Iterator[pa.Table]) -> Iterator[pa.Table]:
    try:
        yield from batches
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        # A store that does not answer says so in an OSError, too: only a number of its own tells it on a disk.
        if isinstance(error, OSError) and (error.errno is not None or not files.is_local(uri)):
            raise
        rule = f"it is not a readable parquet file: {shorten(error)}"
        raise UserError(f"input {uri}", rule, "check that the file is whole") from error


def _batches(piece: Piece, columns: list[str]) -> Iterator[pa.Table]:
    # pre_buffer would hold whole row groups, which embedded images make as large as the file
    with files.open_file(piece.source.uri) as stream, pq.ParquetFile(stream, pre_buffer=False) as file:
        for group in piece.groups:
            info = file.metadata.row_group(group)
            each = max(1, info.total_byte_size // max(1, info.num_rows))
            size = max(1, min(ROWS_PER_TABLE, BYTES_PER_TABLE // each))
            missing = [name for name in columns if name not in file.schema_arrow.names]
            there = [name for name in columns if name not in missing]
            rows = 0
            for batch in file.iter_batches(batch_size=size, row_groups=[group], columns=there, use_threads=False):
                table = pa.Table.from_batches([batch])
                # Text that is no UTF-8 would otherwise fail where it is first used, far from its file.
                table.validate(full=True)
                rows += table.num_rows
                for name in missing:
                    table = table.append_column(name, pa.nulls(table.num_rows))
                yield table
            if there and rows != info.num_rows:
                raise pa.ArrowInvalid(f"row group {group} has {rows} rows, and its footer says {info.num_rows}")


def _by_bytes(table: pa.Table) -> Iterator[pa.Table]:
    """Halves a table until each part is within the limit, or one row: sizes of images vary."""
    if table.nbytes <= BYTES_PER_TABLE or table.num_rows < 2:
        yield table
        return
    half = table.num_rows // 2
    yield from _by_bytes(table.slice(0, half))
    yield from _by_bytes(table.slice(half))


def open_parquet(listing: files.Listing, options: Options) -> Corpus:
    """A corpus in one or several parquet files, whose columns are united: null where a file lacks one.

    Types stay as they are; where files differ, the wider one of two numeric types is taken.

    Raises:
        UserError: an unreadable file, no rows, types that cannot be united, ids that are missing or not unique, or
            column trouble.
    """
    parts = sources(listing, options.images)
    with ThreadPoolExecutor(files.PARALLEL_REQUESTS) as pool:
        footers = list(pool.map(_footer, parts))
    value = f"input {parts[0].uri}" if len(parts) == 1 else f"input {listing.base}"
    united = _unite(value, [schema for _, schema in footers])
    mapping, notes = choose_columns(value, united.names, options)
    rows = sum(info.num_rows for info, _ in footers)
    if rows == 0:
        raise UserError(value, "it has no rows", "give a manifest with at least one image")
    if mapping.id is not None:
        _check_ids(value, mapping.id, parts, [info for info, _ in footers])
    schema = corpus_schema(united.field(name) for name in mapping.others)
    pieces = _pieces(parts, [info for info, _ in footers], options.rows_per_shard)
    return Corpus(
        tuple(ParquetShard(some, mapping, schema) for some in pieces), schema, rows, options.access, tuple(notes)
    )


def _footer(source: Source) -> tuple[pq.FileMetaData, pa.Schema]:
    try:
        with files.open_file(source.uri) as stream, pq.ParquetFile(stream) as file:
            # Asked for here, as names that are not UTF-8 show only then.
            assert len(file.schema_arrow.names) == len(file.schema_arrow)
            groups = sum(file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups))
            if groups != file.metadata.num_rows:
                raise pa.ArrowInvalid(
                    f"its row groups have {groups} rows, and its footer says {file.metadata.num_rows}"
                )
            return file.metadata, file.schema_arrow
    except (pa.ArrowException, UnicodeDecodeError) as error:
        rule = f"it is not a readable parquet file: {shorten(error)}"
        raise UserError(f"input {source.uri}", rule, "check that the file is whole") from error


def _unite(value: str, schemas: list[pa.Schema]) -> pa.Schema:
    # Metadata (pandas, Hugging Face) describes the files as they were, and would make equal schemas differ.
    plain = [pa.schema([pa.field(field.name, field.type) for field in schema]) for schema in schemas]
    try:
        return plain[0] if len(plain) == 1 else pa.unify_schemas(plain, promote_options="permissive")
    except pa.ArrowException as error:
        cure = "write the files with one schema, or leave the column out: --set corpus.drop=[NAME]"
        raise UserError(value, f"its files do not agree: {shorten(error)}", cure) from error


def _check_ids(value: str, column: str, parts: list[Source], infos: list[pq.FileMetaData]) -> None:
    def read() -> Iterator[tuple[str, int, pa.Array]]:
        for source, info in zip(parts, infos, strict=True):
            row = 0
            whole = Piece(source, tuple(range(info.num_row_groups)), 0)
            for batch in _readable(source.uri, _batches(whole, [column])):
                yield source.name, row, as_text(value, column, batch[column].combine_chunks())
                row += batch.num_rows

    unique = UniqueIds(value, column)
    for name, row, ids in read():
        unique.add(ids, name, row)
    unique.check(lambda: (ids for _, _, ids in read()))


def _pieces(parts: list[Source], infos: list[pq.FileMetaData], rows_per_shard: int) -> Iterator[tuple[Piece, ...]]:
    """Packs row groups into shards: none is split, and small ones are put together, across files too."""
    some: list[Piece] = []
    rows = size = 0
    for source, info in zip(parts, infos, strict=True):
        first = 0
        for group in range(info.num_row_groups):
            meta = info.row_group(group)
            if some and (rows + meta.num_rows > rows_per_shard or size + meta.total_byte_size > _SHARD_BYTES):
                yield tuple(some)
                some, rows, size = [], 0, 0
            if some and some[-1].source == source:
                some[-1] = Piece(source, (*some[-1].groups, group), some[-1].first_row)
            else:
                some.append(Piece(source, (group,), first))
            first, rows, size = first + meta.num_rows, rows + meta.num_rows, size + meta.total_byte_size
    if some:
        yield tuple(some)
