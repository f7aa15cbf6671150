"""The scores of a run, or of a curated set, as DuckDB sees them."""

import glob
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

from m3agiqa.aspects import Aspect
from m3agiqa.corpus.files import is_local
from m3agiqa.corpus.rows import differ_in_case, shorten
from m3agiqa.curation.expressions import Expression, first, literal, parse, quoted
from m3agiqa.errors import UserError
from m3agiqa.records import INPUT_COLUMNS, RESERVED_COLUMNS, STATES_COLUMNS
from m3agiqa.runs import Output

CURATION = "curation.json"
PAIRS = "pairs.parquet"
STATES = frozenset(f"{aspect}_{suffix}" for aspect in Aspect for suffix in STATES_COLUMNS)
_NEEDED = ("id", "image", "prompt", "generator", "status", "width", "height", "image_sha256", "fingerprint")


@dataclass(frozen=True)
class Origin:
    """Where rows come from.

    Attributes:
        input: what was scored. corpus: how it was read (`config.corpus`).
        fingerprint: of the scores; None where no row has one.
        access: which files the rows may name beyond those of the input (`config.access`).
    """

    input: str
    corpus: dict[str, Any]
    fingerprint: str | None
    access: dict[str, Any]


def rows_of(output: Output) -> pyarrow.dataset.Dataset:
    """The rows of a folder as they can be given to DuckDB, not read yet.

    Raises:
        UserError: if there are none, a file cannot be read, or two columns are one to SQL.
    """
    try:
        data = output.dataset()
    except (OSError, pa.ArrowException) as error:
        raise unreadable(output.uri, error) from None
    if (twins := differ_in_case(data.schema.names)) is not None:
        rule = f"its columns {twins[0]!r} and {twins[1]!r} differ in case only, and SQL knows no case"
        cure = f'leave the corpus\'s own out, in another folder: m3agiqa score --set corpus.drop=["{_own(twins)}"]'
        raise UserError(output.uri, rule, cure)
    return data


def show_rows(
    con: duckdb.DuckDBPyConnection, name: str, output: Output, data: pyarrow.dataset.Dataset, *folders: Path
) -> None:
    """Makes a view of a folder's rows, after which the connection reads nothing else but what is below `folders`.

    Local files are read by DuckDB itself, on all of its threads; others through Arrow, which knows more file systems.

    Raises:
        UserError: if a file cannot be read.
    """
    local = is_local(output.uri)
    # A name with a star in it is a pattern to DuckDB, and only that name once it is escaped; it asks for both.
    scores = [output.scores, glob.escape(output.scores)] if local else []
    con.execute(f"SET allowed_directories=[{', '.join(literal(str(one)) for one in (*folders, *scores))}]")
    con.execute("SET enable_external_access=false")
    con.execute("SET lock_configuration=true")
    if not local:
        con.register(name, data)
        return
    files = ", ".join(literal(glob.escape(file)) for file in data.files)
    # A folder on the way that is called key=value is no column.
    read = f"read_parquet([{files}], union_by_name=true, hive_partitioning=false)"
    try:
        con.execute(f"CREATE TEMP VIEW {name} AS SELECT * FROM {read}")
    except duckdb.Error as error:
        raise unreadable(output.uri, error) from None


def unreadable(uri: str, error: Exception) -> UserError:
    """What a user is told of score files that cannot be read."""
    reason = shorten(str(error).splitlines()[0])
    return UserError(uri, f"its scores cannot be read ({reason})", "remove the file that is broken, and score again")


def _own(twins: tuple[str, str]) -> str:
    return twins[0] if twins[1] in RESERVED_COLUMNS or twins[1] in INPUT_COLUMNS else twins[1]


class Scores:
    """An opened scores folder: the view `rows` in a DuckDB that can read nothing else."""

    def __init__(self, uri: str, work: Path, *, memory_gib: float, threads: int | None = None) -> None:
        """Opens a folder; reads only its metadata.

        Args:
            uri: a folder of `m3agiqa score`, `capture` or `curate`.
            work: an empty folder on a local disk for what does not fit into memory.

        Raises:
            UserError: if it holds no scores, or what cannot be read.
        """
        self.uri = uri
        self._output = Output(uri)
        data = rows_of(self._output)
        self.schema = pa.schema([field for field in data.schema if field.name not in STATES])
        self.states = frozenset(data.schema.names) & STATES
        if missing := [name for name in _NEEDED if name not in data.schema.names]:
            raise UserError(uri, f"its rows have no column {missing[0]!r}", "give a folder that m3agiqa score wrote")
        self.con = duckdb.connect(str(work / "work.duckdb"))
        self.con.execute(f"SET temp_directory={literal(str(work / 'spilled'))}")
        self.con.execute(f"SET memory_limit='{memory_gib}GiB'")
        self.con.execute(f"SET threads={threads or os.cpu_count() or 1}")
        # A time in a user's expression is not to depend on where the command runs.
        self.con.execute("SET TimeZone='UTC'")
        self.con.execute("SET enable_progress_bar=false")
        try:
            show_rows(self.con, "rows", self._output, data, work)
        except UserError:
            self.con.close()
            raise

    def close(self) -> None:
        """Lets go of the working database."""
        self.con.close()

    def has(self, name: str) -> bool:
        """Whether there is such a column; to SQL, case makes no difference."""
        return name.lower() in (known.lower() for known in self.schema.names)

    def parse(self, text: str, flag: str, more: tuple[str, ...] = ()) -> Expression:
        """A user's expression over the columns of a row and `more`."""
        return parse(self.con, text, flag, (*self.schema.names, *more))

    def origin(self) -> Origin:
        """Where the rows come from.

        Raises:
            UserError: if they are of more than one fingerprint, or nothing says where they come from.
        """
        query = "SELECT fingerprint FROM rows WHERE fingerprint IS NOT NULL GROUP BY ALL ORDER BY ALL"
        found = [row[0] for row in self.con.execute(query).fetchall()]
        if len(found) > 1:
            rule = f"holds scores of {len(found)} fingerprints ({', '.join(found[:3])}), which cannot be compared"
            raise UserError(self.uri, rule, "score into one folder for each")
        data = self._output.read(CURATION)
        try:
            if data is not None:
                kept = json.loads(data)["origin"]
                return Origin(kept["input"], kept["corpus"], kept["fingerprint"], kept["access"])
            manifest = self._output.read_manifest()
            if manifest is not None:
                config, only = manifest.config, found[0] if found else None
                return Origin(manifest.input, config["corpus"], only, config["access"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.uri}/{CURATION}", f"cannot be read ({error!r})", "curate once more") from None
        raise UserError(self.uri, "holds neither run.json nor curation.json", "give a folder that m3agiqa score wrote")

    def pairs(self) -> pa.Table | None:
        """The preference pairs of a curated set, or None where there are none."""
        data = self._output.read(PAIRS)
        return None if data is None else pq.read_table(pa.BufferReader(data))

    def has_values(self, columns: list[str], where: str = "true") -> dict[str, bool]:
        """Which columns hold a value in any row, or any of some rows."""
        if not columns:
            return {}
        counts = first(self.con, f"SELECT {', '.join(f'count({quoted(c)})' for c in columns)} FROM rows WHERE {where}")
        return {column: count > 0 for column, count in zip(columns, counts, strict=True)}

    def batches(self, query: str, rows: int) -> Iterator[pa.RecordBatch]:
        """The rows of a query, so many at a time."""
        yield from self.con.sql(query).to_arrow_reader(rows)
