"""Users' SQL: one scalar expression over the columns of a row, or it is refused before it is run."""

import difflib
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import duckdb

from m3agiqa.errors import UserError

_CURE = "write one SQL expression over the columns of a row, such as quality_mos > 3"
# What DuckDB's parser calls the parts of a scalar expression: no subquery, window, `*` or parameter is among them.
_SCALAR = {
    "BETWEEN", "CASE", "CAST", "COLLATE", "COLUMN_REF", "COMPARISON", "CONJUNCTION", "CONSTANT", "FUNCTION", "OPERATOR",
    "TYPE",
}  # fmt: skip


@dataclass(frozen=True)
class Expression:
    """An expression that is safe to be put into a query.

    Attributes:
        sql: in brackets.
        columns: that it names, sorted.
    """

    sql: str
    columns: tuple[str, ...]


def parse(con: duckdb.DuckDBPyConnection, text: str, flag: str, columns: Collection[str]) -> Expression:
    """Reads a user's expression with DuckDB's own parser; runs nothing.

    Args:
        flag: what the expression is called in an error.
        columns: that it may name.

    Raises:
        UserError: if it is no expression, several, or more than a scalar one; names an unknown column (gives the
            nearest) or a function whose value is another one each time.
    """
    said = f"{flag} {text!r}"
    if not text.strip():
        raise UserError(said, "is empty", _CURE)
    parsed = json.loads(first(con, "SELECT json_serialize_sql(?)", f"SELECT ({text}\n)")[0])
    if parsed["error"]:
        raise UserError(said, f"is not SQL ({parsed['error_message']})", _CURE)
    node = parsed["statements"][0]["node"]
    if len(parsed["statements"]) != 1 or node["type"] != "SELECT_NODE" or len(node["select_list"]) != 1:
        raise UserError(said, "is not one expression", _CURE)
    known = {name.lower(): name for name in columns}
    found = set()
    parts = list(_parts(node["select_list"][0]))
    for part in parts:
        if part["class"] not in _SCALAR:
            raise UserError(said, f"holds a {part['class'].lower()}, which is more than one row's values", _CURE)
        if part["class"] == "COLUMN_REF":
            found.add(_column(str(part["column_names"][0]), known, said))
    _refuse_unsteady(con, {part["function_name"] for part in parts if part["class"] == "FUNCTION"}, said)
    return Expression(f"({text}\n)", tuple(sorted(found)))


def check_types(con: duckdb.DuckDBPyConnection, text: str, sql: str, relation: str, wanted: str | None = None) -> None:
    """Lets DuckDB bind an expression to the columns of a relation: reads no row.

    Args:
        text: as the user wrote it. sql: as it is put into queries.
        wanted: the type that it must have, if any.

    Raises:
        UserError: for types that do not fit, unknown functions, and aggregates.
    """
    try:
        found = first(con, f"DESCRIBE SELECT {sql} FROM {relation} WHERE {sql} IS NULL")[1]
    except duckdb.Error as error:
        raise UserError(repr(text), f"cannot be computed ({str(error).splitlines()[0]})", _CURE) from None
    if wanted is not None and found != wanted:
        raise UserError(repr(text), f"is of type {found}, not {wanted}", _CURE)


def first(con: duckdb.DuckDBPyConnection, query: str, *values: object) -> tuple[Any, ...]:
    """The first row of a query that gives one."""
    # All is fetched: a result that is not at its end keeps the connection from its next query.
    row: tuple[Any, ...] = con.execute(query, list(values)).fetchall()[0]
    return row


def quoted(name: str) -> str:
    """A column's name in SQL."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A string in SQL."""
    return "'" + text.replace("'", "''") + "'"


def _parts(node: Any) -> Iterator[dict[str, Any]]:
    """Every node of a parsed expression that has a class."""
    if isinstance(node, dict):
        if "class" in node:
            yield node
        for value in node.values():
            yield from _parts(value)
    elif isinstance(node, list):
        for value in node:
            yield from _parts(value)


def _column(name: str, known: dict[str, str], said: str) -> str:
    if name.lower() in known:
        return known[name.lower()]
    near = difflib.get_close_matches(name, list(known.values()), n=1)
    cure = f"did you mean {near[0]}?" if near else f"the columns are {', '.join(known.values())}"
    raise UserError(said, f"there is no column {name!r}", cure)


def _refuse_unsteady(con: duckdb.DuckDBPyConnection, names: set[str], said: str) -> None:
    """The same recipe on the same scores is to give the same rows: no random(), no now()."""
    found = con.execute(
        "SELECT lower(function_name) FROM duckdb_functions() WHERE lower(function_name) IN (SELECT unnest(?)) "
        "GROUP BY 1 HAVING bool_or(stability = 'VOLATILE') OR bool_and(stability <> 'CONSISTENT')",
        [sorted(name.lower() for name in names)],
    ).fetchall()
    if found:
        raise UserError(said, f"{found[0][0]}() does not give the same value every time", _CURE)
