"""SQL over what a run or a curation has written, read-only: DuckDB with the views `scores` and `removed`."""

import csv
import difflib
import json
import math
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, TextIO

import duckdb
import pyarrow as pa
import pyarrow.dataset

from m3agiqa.corpus.rows import shorten
from m3agiqa.curation.rows import rows_of, show_rows
from m3agiqa.errors import UserError
from m3agiqa.runs import Output

REMOVED = "removed.parquet"
"""What a curation dropped: `id` and the `rule` that dropped it."""

_ROWS_AT_ONCE = 2048
_COLUMN = re.compile(r'Referenced column "([^"]+)"')
_EXPLAIN = re.compile(r"^\s*explain\s+(analyze\s+)?", re.IGNORECASE)
_TABLE = re.compile(r"(?:Table|View) with name (\S+) does not exist")


def connect(output: Output) -> duckdb.DuckDBPyConnection:
    """A connection with the view `scores`, and `removed` where a curation wrote it.

    Nothing else can be reached from it: neither other files nor the network, and no setting can be changed.

    Raises:
        UserError: the folder holds no scores, or what cannot be read.
    """
    data = rows_of(output)
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'; SET enable_progress_bar = false")
    path = f"{output.path}/{REMOVED}"
    if output.filesystem.get_file_info(path).type == pa.fs.FileType.File:
        connection.register("removed", pa.dataset.dataset(path, filesystem=output.filesystem, format="parquet"))
    show_rows(connection, "scores", output, data)
    return connection


def query(output: Output, sql: str) -> duckdb.DuckDBPyConnection:
    """Runs one SELECT over an output folder; the result is to be fetched from what is returned.

    Raises:
        UserError: no scores, not one SELECT, an unknown column (with the nearest) or table, or anything else that
            DuckDB refuses.
    """
    connection = connect(output)
    try:
        # What EXPLAIN ANALYZE explains is executed, whatever it is.
        asked = connection.extract_statements(_EXPLAIN.sub("", sql))
        if [statement.type for statement in asked] != [duckdb.StatementType.SELECT]:
            rule = "is not one SELECT statement; the views are read-only"
            raise UserError(shorten(sql, 80) or "an empty query", rule, 'e.g. "SELECT count(*) FROM scores"')
        return connection.execute(sql)
    except duckdb.Error as error:
        raise explain(error, sql, connection) from None


def explain(error: duckdb.Error, sql: str, connection: duckdb.DuckDBPyConnection) -> UserError:
    """What a user is told of an error of DuckDB's."""
    text, value = str(error), shorten(sql, 80)
    views = {name: connection.view(name).columns for name in views_of(connection)}
    if (found := _COLUMN.search(text)) is not None:
        known = sorted({column for columns in views.values() for column in columns})
        near = difflib.get_close_matches(found[1], known, n=1, cutoff=0.5)
        cure = f"did you mean {near[0]}?" if near else f"its columns are {', '.join(known)}"
        return UserError(value, f"there is no column {found[1]!r}", cure)
    if (found := _TABLE.search(text)) is not None:
        return UserError(value, f"there is no table {found[1].rstrip('!')!r}", f"the views are {', '.join(views)}")
    if isinstance(error, duckdb.PermissionException):
        return UserError(value, "only the views of this folder can be read", f"the views are {', '.join(views)}")
    first = shorten(text.split("\n\n")[0].split("\nLINE")[0])
    return UserError(value, first, "mend the query; https://duckdb.org/docs/sql/introduction explains DuckDB's SQL")


def views_of(connection: duckdb.DuckDBPyConnection) -> list[str]:
    """The names of the views that `connect` made."""
    rows = connection.execute("SELECT view_name FROM duckdb_views() WHERE NOT internal ORDER BY 1 DESC").fetchall()
    return [str(name) for (name,) in rows]


def batches(result: duckdb.DuckDBPyConnection, sql: str) -> Iterator[list[tuple[Any, ...]]]:
    """The rows of a result, some thousands at a time.

    Raises:
        UserError: for an error that shows only while rows are computed (a cast, say).
    """
    while True:
        try:
            rows = result.fetchmany(_ROWS_AT_ONCE)
        except duckdb.Error as error:
            raise UserError(shorten(sql, 80), shorten(str(error)), "mend the query") from None
        if not rows:
            return
        yield rows


def write_csv(result: duckdb.DuckDBPyConnection, sql: str, stream: TextIO) -> None:
    """Writes a result with a line of names; null is an empty field, and lists are JSON."""
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(names_of(result))
    for rows in batches(result, sql):
        writer.writerows([[_field(value) for value in row] for row in rows])


def write_json(result: duckdb.DuckDBPyConnection, sql: str, stream: TextIO) -> None:
    """Writes a result as one JSON array of objects, one on a line. What JSON has no number for is null.

    Raises:
        UserError: two columns have one name, and an object holds only one of it.
    """
    names, comma = names_of(result), "["
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(shorten(sql, 80), f"two columns are named {twice[0]!r}", "name them apart with AS, or use csv")
    for rows in batches(result, sql):
        for row in rows:
            values = {name: plain(value) for name, value in zip(names, row, strict=True)}
            stream.write(f"{comma}\n{json.dumps(values, ensure_ascii=False, default=_other)}")
            comma = ","
    stream.write("[]\n" if comma == "[" else "\n]\n")


def names_of(result: duckdb.DuckDBPyConnection) -> list[str]:
    """The names of a result's columns."""
    return [str(column[0]) for column in result.description or ()]


def plain(value: Any) -> Any:
    """A value as JSON can hold it: bytes as hexadecimal digits, and null for what is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    return value


def _field(value: Any) -> Any:
    if isinstance(value, list | tuple | dict):
        return json.dumps(plain(value), ensure_ascii=False, default=_other)
    return plain(value)


def _other(value: Any) -> Any:
    """What JSON has no type for: decimals are its numbers all the same, and times and the like are texts."""
    if not isinstance(value, Decimal):
        return str(value)
    return int(value) if value == value.to_integral_value() else float(value)
