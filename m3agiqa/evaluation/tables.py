"""Tables of scores and of human scores, wherever they come from, with what is needed to join them."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from m3agiqa.corpus import open_corpus
from m3agiqa.corpus.files import kind_of
from m3agiqa.corpus.numbers import are_numbers, floats
from m3agiqa.errors import UserError
from m3agiqa.evaluation.draws import Ints
from m3agiqa.evaluation.metrics import Floats
from m3agiqa.runs import MANIFEST, Manifest, Output

# The form of `rows.made_up_id`, which tells rows of one file apart and means nothing in another.
_MADE_UP = re.compile(r"(^|:)[0-9]{8}-[0-9a-f]{8}$")
# How `rows.to_rows` calls images that are bytes within a table, `labelled.parquet#12`: no file, and another image once
# the table is sorted.
_EMBEDDED = "#[0-9]+$"


@dataclass(frozen=True)
class Table:
    """Rows of one source.

    Attributes:
        said: how errors call it, such as `--scores demo/run`.
        rows: `id`, `image`, `prompt`, `generator` (strings) and all other columns.
        has_ids: whether the source gives ids; if not, rows are told apart by the names of their image files.
        manifest: of a run of m3agiqa; None for any other source.
    """

    said: str
    rows: pa.Table
    has_ids: bool
    manifest: Manifest | None = None

    def __len__(self) -> int:
        return int(self.rows.num_rows)

    def strings(self, name: str) -> list[str | None]:
        """A column [n] as text; None where it is empty or there is no such column.

        Raises:
            UserError: for a column that has no form as text.
        """
        return list(self.text(name).to_pylist())

    def text(self, name: str) -> pa.Array:
        """The same as an array."""
        if name not in self.rows.column_names:
            return pa.nulls(len(self), pa.string())
        try:
            values = _flat(self.rows[name].cast(pa.string()))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            rule = f"the column {name} holds {self.rows[name].type}, which is no text"
            raise UserError(self.said, rule, "name a column of text") from None
        return pc.if_else(pc.equal(values, ""), pa.scalar(None, pa.string()), values)

    def numbers(self, name: str, flag: str) -> Floats:
        """A column of numbers [n]; NaN where it is null.

        Raises:
            UserError: no such column (with the nearest name), no numbers, or a value that is NaN or infinite.
        """
        self.need(name, flag)
        column = self.rows[name]
        if pa.types.is_null(column.type):
            column = column.cast(pa.float64())
        if not are_numbers(column.type):
            raise UserError(flag, f"the column {name} holds {column.type}, not numbers", "name a column of numbers")
        values = np.array(pc.fill_null(floats(column), np.nan).combine_chunks(), np.float64)
        known = np.array(pc.is_valid(column).combine_chunks())
        if bad := int((known & ~np.isfinite(values)).sum()):
            raise UserError(flag, f"{bad} values of {name} are NaN or infinite", "leave them empty (null)")
        return values

    def need(self, name: str, flag: str) -> None:
        """Refuses a column that is not there, with the nearest name."""
        if name not in self.rows.column_names:
            near = difflib.get_close_matches(name, self.rows.column_names, n=1)
            cure = f"did you mean {near[0]}?" if near else f"its columns are {', '.join(self.rows.column_names)}"
            raise UserError(flag, f"{self.said} has no column {name}", cure)

    def keys(self, by: str) -> pa.Array:
        """What rows are joined by [n]: `id`, or `image`, the image's file name without its folders, null for none."""
        if by == "id":
            return _flat(self.rows["id"].cast(pa.string()))
        images = self.text("image")
        named = pc.if_else(pc.match_substring_regex(images, _EMBEDDED), pa.scalar(None, pa.string()), images)
        return pc.replace_substring_regex(named, r"^.*/", "")

    def take(self, places: Ints) -> "Table":
        """Some rows."""
        return replace(self, rows=self.rows.take(pa.array(places)))


def read(uri: str, flag: str, id_column: str = "id", image_column: str | None = None) -> Table:
    """Reads a run's output folder, or anything that holds a table: parquet, CSV, TSV, JSON, published conversations.

    Of a run, rows that are not ok are left out.

    Raises:
        UserError: for what cannot be read.
    """
    said = f"{flag} {uri}"
    if kind_of(f"{uri.rstrip('/')}/{MANIFEST}") == "file":
        output = Output(uri)
        rows = output.rows()
        kept = [name for name in rows.column_names if not name.endswith(("_states", "_description"))]
        rows = rows.select(kept).filter(pc.equal(rows["status"], "ok"))
        return _checked(Table(said, rows, True, output.read_manifest()))
    try:
        corpus = open_corpus(uri, image_column=image_column, id_column=id_column, text_only=True)
    except UserError as error:
        cure = error.cure.replace("--set corpus.id_column=NAME", "--id-column NAME")
        raise UserError(said, error.rule, cure) from None
    parts = [table.drop_columns(["_uri", "_bytes"]) for shard in corpus.shards for table in shard.read()]
    rows = pa.concat_tables(parts) if parts else corpus.schema.empty_table()
    return _checked(Table(said, rows, rows.num_rows > 0 and not _MADE_UP.search(str(rows["id"][0]))))


def _checked(table: Table) -> Table:
    if not len(table):
        raise UserError(table.said, "holds no rows that are ok", "give scored rows")
    if table.has_ids:
        refuse_duplicates(table.keys("id"), table.said)
    return table


def refuse_duplicates(keys: pa.Array, said: str, what: str = "ids") -> None:
    """Refuses keys [n] that are not unique, naming the first five.

    Raises:
        UserError: if there are any.
    """
    counts = pc.value_counts(keys)
    twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    if len(twice):
        raise UserError(said, f"{len(twice)} {what} are there more than once ({first_five(twice)})", "give each once")


def first_five(keys: pa.Array | Sequence[Any]) -> str:
    """`a, b, c, d, e, ...`."""
    shown = [str(one) for one in keys[:5]]
    return ", ".join(shown) + (", ..." if len(keys) > 5 else "")


def match(left: Table, right: Table, by: str | None = None) -> tuple[Ints, str]:
    """Where each row of `left` [n] is in `right`, -1 where it is not, and what they were joined by.

    Args:
        by: `id` or `image` (file names); None: ids where both have them and any agree, else file names, else ids that
            were made up: they hold a hash of image and prompt, so those that agree are of the same row.

    Raises:
        UserError: where no row matches, or file names are not unique.
    """
    ways = [by] if by else ["id", "image"] if left.has_ids and right.has_ids else ["image", "id"]
    twice: UserError | None = None
    for way in ways:
        ours, theirs = left.keys(way), right.keys(way)
        found = np.array(pc.fill_null(pc.index_in(ours, value_set=theirs, skip_nulls=True), -1), np.int64)
        if not (found >= 0).any():
            continue
        try:
            for table, keys in ((left, ours), (right, theirs)):
                refuse_duplicates(keys.drop_null(), table.said, "ids" if way == "id" else "image names")
        except UserError as error:  # unless they can be joined by something else
            twice = error
            continue
        return found, way
    if twice is not None:
        raise twice
    theirs = right.keys(ways[0])
    raise UserError(
        right.said,
        f"none of its {len(right)} rows is one of the {len(left)} of {left.said} ({first_five(theirs)} "
        f"against {first_five(left.keys(ways[0]))})",
        "give the same ids, or image files of the same names; --key id or image says which",
    )


def _flat(column: pa.ChunkedArray) -> pa.Array:
    flat = column.combine_chunks()
    return flat.combine_chunks() if isinstance(flat, pa.ChunkedArray) else flat
