"""Which pictures a report shows, and what is known of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import duckdb

from m3agiqa.aspects import Aspect
from m3agiqa.records import INPUT_COLUMNS

PER_STRIP = 24
_DETAILS = ("description", "rating", "rating_probs", "rating_score", "mos", "mos_low", "mos_high", "finish_reason")


@dataclass(frozen=True)
class Strip:
    """A row of pictures.

    Attributes:
        aspect: whose score is shown below a picture; None: those of all aspects.
        says: why these pictures.
        ids: of the rows, in order.
    """

    title: str
    aspect: Aspect | None
    says: str
    ids: tuple[str, ...]


def choose(connection: duckdb.DuckDBPyConnection, sources: dict[Aspect, str]) -> list[Strip]:
    """The strips that there is something to show in: best, worst, in doubt and in disagreement."""
    found = []
    for aspect in sources:
        score, doubt, off = str(aspect), f"{aspect}_doubt", f"{aspect}_off"
        found += [
            Strip(f"Best {aspect}", aspect, "Highest scores", _ids(connection, score, f"{score} DESC")),
            Strip(f"Worst {aspect}", aspect, "Lowest scores", _ids(connection, score, score)),
            Strip(
                f"Borderline {aspect}",
                aspect,
                "The two likeliest rating words are about equally likely",
                _ids(connection, doubt, doubt),
            ),
            Strip(
                f"Disagreement about {aspect}",
                aspect,
                "The predictor's score is furthest from the expected value of the rating words",
                _ids(connection, off, f"{off} DESC"),
            ),
        ]
    if len(sources) > 1:
        says = "The highest and the lowest score of the same picture are furthest apart"
        found.append(Strip("Aspects disagree most", None, says, _ids(connection, "apart", "apart DESC")))
    found.append(Strip("A random sample", None, "Drawn by a hash of the id", _ids(connection, "id", "md5(id)")))
    return [strip for strip in found if strip.ids]


def _ids(connection: duckdb.DuckDBPyConnection, column: str, order: str) -> tuple[str, ...]:
    sql = f"SELECT id FROM slim WHERE {column} IS NOT NULL ORDER BY {order}, id LIMIT {PER_STRIP}"
    return tuple(row[0] for row in connection.execute(sql).fetchall())


def details(
    connection: duckdb.DuckDBPyConnection, columns: Sequence[str], sources: dict[Aspect, str], ids: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """What the dialog shows of each row, by id.

    Keys: `image`, `prompt`, `generator`, `width`, `height`, and `aspects`: a list with `name`, `score` and what
    `_DETAILS` names. Null is what the file has no value of.
    """
    names = [name for name in (*INPUT_COLUMNS, "width", "height") if name in columns]
    names += [f"{a}_{s}" for a in sources for s in _DETAILS if f"{a}_{s}" in columns]
    # One by one, for the reader of the files to see them: it then decodes the texts of these rows alone.
    wanted = ", ".join("?" * len(ids)) or "NULL"
    sql = f"SELECT {', '.join(names)} FROM scores WHERE id IN ({wanted})"
    found = {}
    for values in connection.execute(sql, list(ids)).fetchall():
        row = dict(zip(names, values, strict=True))
        found[str(row["id"])] = {key: row.get(key) for key in ("image", "prompt", "generator", "width", "height")} | {
            "aspects": [
                {"name": str(aspect), "score": row[f"{aspect}_{suffix}"]}
                | {key: row.get(f"{aspect}_{key}") for key in _DETAILS}
                for aspect, suffix in sources.items()
            ]
        }
    # The order in which a table's files are read is nobody's promise.
    return {name: found[name] for name in ids}
