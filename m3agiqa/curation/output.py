"""What a curated set is: a folder that is there whole, or not at all.

OUT/curation.json     recipe and its hash, where the rows come from, the funnel
OUT/scores/           the rows that were kept, sorted by id, as parquet; `m3agiqa show` and `export` read them
OUT/removed.parquet   id and rule of every row that was dropped, sorted by id
OUT/pairs.parquet     preference pairs, where they were asked for

The same recipe on the same scores gives the same bytes: no times, no file names that chance decides.
"""

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from m3agiqa import __version__
from m3agiqa.corpus.files import absolute, is_local, locate
from m3agiqa.curation.expressions import first, quoted
from m3agiqa.curation.funnel import Funnel
from m3agiqa.curation.pairs import pairs_query
from m3agiqa.curation.recipe import Recipe
from m3agiqa.curation.rows import CURATION, Origin, Scores
from m3agiqa.curation.select import COMPOSITE, SPLIT, Plan
from m3agiqa.errors import UserError

_ROW_GROUP = 65_536
_ROWS_PER_FILE = 8 * _ROW_GROUP
_PARTIAL = ".partial"
_OURS = {"scores", "removed.parquet", "pairs.parquet", CURATION, "work"}


@contextmanager
def new_folder(uri: str) -> Iterator["Folder"]:
    """A folder that takes its name when the block ends well; else nothing of it is left.

    On an object store, which cannot rename, files are in their places at once: what was written last, `curation.json`,
    says that the folder is whole.

    Raises:
        UserError: if there is something at that name, or it cannot be written.
    """
    said = f"--out {uri}"
    try:
        store, path = locate(uri)
        is_file = store.get_file_info(path).type == pafs.FileType.File
        taken = is_file or bool(store.get_file_info(pafs.FileSelector(path, allow_not_found=True)))
    except (OSError, ValueError) as error:
        raise UserError(said, f"cannot be used ({error})", "give a folder or a known URI") from None
    if taken:
        raise UserError(said, "is not empty", "give an empty or a new folder")
    if not is_local(uri):
        with tempfile.TemporaryDirectory() as work:
            try:
                yield Folder(store, path, Path(work))
            except BaseException:
                store.delete_dir_contents(path, missing_dir_ok=True)
                raise
        return
    # What a link leads to: a link cannot be replaced by a folder.
    path = str(Path(path).resolve())
    partial = Path(path + _PARTIAL)
    if partial.exists() and not (partial.is_dir() and {one.name for one in partial.iterdir()} <= _OURS):
        raise UserError(said, f"{partial} is in the way", "move it, or give another folder")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "work").mkdir(parents=True)
    except OSError as error:
        raise UserError(said, f"cannot be written ({error})", "give a folder you own") from None
    try:
        yield Folder(store, str(partial), partial / "work")
        shutil.rmtree(partial / "work")
        # Over an empty folder that is there already, too.
        partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class Folder:
    """A folder that is being written; `work` is a local one for what is thrown away."""

    def __init__(self, store: pafs.FileSystem, path: str, work: Path) -> None:
        self._store, self._path, self.work = store, path, work

    def write_rows(self, name: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
        """Writes a parquet file (name ends so), or several into a folder. Returns the number of rows."""
        single = name.endswith(".parquet")
        self._store.create_dir(self._path if single else f"{self._path}/{name}", recursive=True)
        rows, writer = 0, None
        try:
            for table in _ahead(_groups(schema, batches)):
                if writer is None or (not single and rows % _ROWS_PER_FILE == 0):
                    if writer is not None:
                        writer.close()
                    part = "" if single else f"/part-{rows // _ROWS_PER_FILE:05d}.parquet"
                    writer = pq.ParquetWriter(
                        f"{self._path}/{name}{part}", schema, filesystem=self._store, compression="zstd"
                    )
                writer.write_table(table, row_group_size=_ROW_GROUP)
                rows += table.num_rows
        finally:
            if writer is not None:
                writer.close()
        return rows

    def write_sheet(self, sheet: dict[str, Any]) -> None:
        """Writes `curation.json`, which comes last."""
        with self._store.open_output_stream(f"{self._path}/{CURATION}") as stream:
            stream.write((json.dumps(sheet, indent=2, ensure_ascii=False) + "\n").encode())


def write(folder: Folder, scores: Scores, plan: Plan, funnel: Funnel, origin: Origin) -> dict[str, Any]:
    """Writes everything. Returns the content of `curation.json`.

    Raises:
        UserError: if an id occurs twice, or there is no pair.
    """
    recipe = plan.recipe
    added = [pa.field(COMPOSITE, pa.float64())] if plan.composite is not None else []
    added += [pa.field(SPLIT, pa.string())] if recipe.split.validation else []
    schema = pa.schema([*scores.schema, *added])
    columns = [f"rows.{quoted(field.name)}" for field in scores.schema] + [f"kept.{field.name}" for field in added]
    kept = funnel.kept(", ".join(["id", *(field.name for field in added)]))
    query = f"SELECT {', '.join(columns)} FROM rows JOIN {kept} AS kept USING (id) ORDER BY rows.id"
    rows = folder.write_rows("scores", schema, scores.batches(query, _ROW_GROUP))
    if rows != funnel.steps[-1].left:
        raise UserError(scores.uri, "an id occurs more than once in its rows", "score into a folder of its own")
    removed = f"SELECT id, {funnel.names()} AS rule FROM work WHERE dropped IS NOT NULL ORDER BY id"
    removed_schema = pa.schema([pa.field("id", pa.string()), pa.field("rule", pa.string())])
    folder.write_rows("removed.parquet", removed_schema, scores.batches(removed, _ROW_GROUP))
    sheet = _sheet(scores, recipe, funnel, origin)
    if recipe.split.validation:
        parts = f"SELECT {SPLIT}, count(*) FROM work WHERE dropped IS NULL GROUP BY 1 ORDER BY 1"
        sheet["split"] = dict(scores.con.execute(parts).fetchall())
    if recipe.pairs.margin is not None:
        sheet["pairs"] = _write_pairs(folder, scores, plan, funnel)
    folder.write_sheet(sheet)
    return sheet


def _write_pairs(folder: Folder, scores: Scores, plan: Plan, funnel: Funnel) -> int:
    recipe, margin = plan.recipe.pairs, plan.recipe.pairs.margin
    assert margin is not None
    names = ("prompt", "chosen_id", "rejected_id", "chosen_image", "rejected_image")
    fields = [pa.field(name, pa.string()) for name in names]
    fields += [pa.field(name, pa.float64()) for name in ("chosen", "rejected")]
    schema = pa.schema([*fields, *([pa.field(SPLIT, pa.string())] if plan.parted else [])])
    query = pairs_query(funnel, margin, recipe.per_prompt, split=plan.parted)
    pairs = folder.write_rows("pairs.parquet", schema, scores.batches(query, _ROW_GROUP))
    if not pairs:
        rule = "no two rows of one prompt that are kept differ so much"
        raise UserError(f"pairs.margin={margin:g}", rule, "lower it, or keep more rows of a prompt")
    return pairs


def _sheet(scores: Scores, recipe: Recipe, funnel: Funnel, origin: Origin) -> dict[str, Any]:
    (ids,) = first(scores.con, "SELECT bit_xor(md5_number(id)) FROM work")
    return {
        "m3agiqa": __version__,
        "scores": absolute(scores.uri),
        "fingerprint": origin.fingerprint,
        "ids": f"{ids:032x}",
        "rows": funnel.steps[-1].left,
        "recipe_hash": recipe.digest(),
        "recipe": recipe.rules(),
        "origin": asdict(origin),
        "funnel": funnel.sheet(),
        "notes": funnel.notes,
    }


def _ahead(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same tables, of which the next is made while the last is worked on: DuckDB reads while we compress."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, tables, None)
        while (table := coming.result()) is not None:
            coming = reader.submit(next, tables, None)
            yield table


def _groups(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Tables of exactly one row group, whatever the sizes of the batches; the last may be smaller, or empty."""
    waiting: list[pa.Table] = [schema.empty_table()]
    count, some = 0, False
    for batch in batches:
        waiting.append(pa.Table.from_batches([batch]).cast(schema))
        count += batch.num_rows
        while count >= _ROW_GROUP:
            whole = pa.concat_tables(waiting)
            yield whole.slice(0, _ROW_GROUP).combine_chunks()
            waiting, count, some = [whole.slice(_ROW_GROUP)], count - _ROW_GROUP, True
    if count or not some:
        yield pa.concat_tables(waiting).combine_chunks()
