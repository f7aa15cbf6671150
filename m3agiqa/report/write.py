"""Makes the report of a folder, and puts it where it belongs."""

import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import duckdb
import pyarrow as pa
from pydantic import ValidationError

from m3agiqa.aspects import Aspect
from m3agiqa.config import AccessConfig
from m3agiqa.corpus import files
from m3agiqa.corpus.rows import shorten
from m3agiqa.errors import UserError
from m3agiqa.query import connect
from m3agiqa.report import drift, gather, strips
from m3agiqa.report.page import Figures, render
from m3agiqa.report.pictures import Places, thumbnails
from m3agiqa.runs import MANIFEST, Manifest, Output

NAME = "report.html"
CURATION = "curation.json"
"""What a curation wrote of itself: its recipe, its hash, where the rows come from (`origin`: `input`, `corpus`), and
`funnel`: a list of {rule, dropped, left} that begins with all rows."""


def write_report(uri: str, *, against: str | None = None, out: str | None = None) -> str:
    """Writes the report of a folder of scores, curated or not, and returns where it is.

    Args:
        uri: the folder, local or on an object store.
        against: another folder of scores, to show the drift from.
        out: the file to write; None: `report.html` in the folder.

    Raises:
        UserError: one of the folders holds no scores, or the file cannot be written.
    """
    output = Output(uri)
    other = None if against is None else Output(against)
    target, name = (output, NAME) if out is None else _target(out)
    page = render(_figures(output, other))
    try:
        target.write_whole(name, page.encode())
    except OSError as error:
        raise UserError(f"{target.uri}/{name}", f"cannot be written ({error})", "give another --out") from None
    return files.join(target.uri, name)


def report_after(uri: str) -> str:
    """Writes the report that ends a run. Returns a line for the user; the run has succeeded, whatever comes of it."""
    try:
        return f"report: {write_report(uri)}"
    except (UserError, OSError, ValueError, duckdb.Error, pa.ArrowException) as error:
        return f"note: no report was made ({shorten(error)}); try `m3agiqa report {uri}`"


def _target(out: str) -> tuple[Output, str]:
    out = files.absolute(out)
    folder, name = files.split(out)
    if files.kind_of(out) == "folder" or not PurePosixPath(name).suffix:
        raise UserError(f"--out {out}", "is no file name", "give a name that ends in .html")
    if files.is_local(out) and files.kind_of(folder) != "folder":
        raise UserError(f"--out {out}", "its folder does not exist", "make it first, or give another file")
    return Output(folder), name


def _figures(output: Output, other: Output | None) -> Figures:
    """Everything that the page shows."""
    connection, columns = _connect(output)
    sources = gather.sources_of(connection, columns)
    gather.make_slim(connection, columns, sources)
    scores = gather.scores_of(connection, list(sources))
    chosen = strips.choose(connection, sources)
    ids = list(dict.fromkeys(name for strip in chosen for name in strip.ids))
    rows = strips.details(connection, columns, sources, ids)
    manifest, curation = output.read_manifest(), _curation(output)
    pictures = thumbnails({name: rows[name]["image"] for name in ids}, _places(output, manifest, curation))
    return Figures(
        uri=output.uri,
        counts=output.count_by_status(),
        aspects=gather.aspect_figures(connection, columns, sources, scores),
        pairs=gather.pair_figures(scores),
        generators=gather.generator_figures(connection, list(sources)),
        problems=gather.problems(connection, columns),
        strips=chosen,
        rows=rows,
        pictures=pictures,
        manifest=manifest,
        curation=curation,
        against=None if other is None else other.uri,
        drift=[] if other is None else _drift(connection, sources, other),
        other_manifest=None if other is None else other.read_manifest(),
    )


def _connect(output: Output) -> tuple[duckdb.DuckDBPyConnection, list[str]]:
    connection = connect(output)
    columns = connection.view("scores").columns
    for needed in ("id", "status"):
        if needed not in columns:
            raise UserError(output.uri, f"its rows have no column {needed!r}", "give a folder that `score` wrote")
    return connection, columns


def _drift(connection: duckdb.DuckDBPyConnection, sources: dict[Aspect, str], other: Output) -> list[drift.AspectDrift]:
    theirs, columns = _connect(other)
    found = gather.sources_of(theirs, columns)
    # The predictor's scores of one run against the words of the other would be a difference of method.
    same = {aspect: suffix for aspect, suffix in sources.items() if found.get(aspect) == suffix}
    gather.make_slim(theirs, columns, same)
    return drift.compare(connection, theirs, list(same))


def _places(output: Output, manifest: Manifest | None, curation: Mapping[str, Any] | None) -> Places:
    """Where a run, or the one that a curation began with, says that its images are.

    Raises:
        UserError: what it says is of another form, or of another version.
    """
    try:
        said = (curation or {}).get("origin") or {}
        if manifest is not None:
            said = {"input": manifest.input, **manifest.config}
        corpus, access = said.get("corpus") or {}, AccessConfig.model_validate(said.get("access") or {})
        return Places(said.get("input"), corpus.get("image_column"), corpus.get("images"), access)
    except (AttributeError, TypeError, ValueError) as error:
        name, part = (CURATION, "origin") if manifest is None else (MANIFEST, "config")
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            part, error = f"{part}: access.{'.'.join(map(str, first['loc']))}", ValueError(first["msg"])
        raise UserError(f"{output.uri}/{name}", f"its {part} cannot be read ({shorten(error)})", "mend it") from None


def _curation(output: Output) -> dict[str, Any] | None:
    data = output.read(CURATION)
    if data is None:
        return None
    try:
        found = json.loads(data)
    except ValueError as error:
        raise UserError(f"{output.uri}/{CURATION}", f"is not JSON ({error})", "curate again") from None
    return found if isinstance(found, dict) else None
