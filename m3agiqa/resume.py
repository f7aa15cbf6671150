"""What is left to do in an output folder, and putting it in order after a run that was killed.

The rows that are there say what is done: nothing else has to agree with them.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet as pq

from m3agiqa.errors import UserError
from m3agiqa.id_set import IdSet
from m3agiqa.records import Status
from m3agiqa.runs import Output

_NO_IDS = IdSet(np.empty(0, np.uint64), np.empty(0, np.uint64))


@dataclass(frozen=True)
class Todo:
    """Which rows of the corpus are to be scored.

    Attributes:
        done: not these any more.
        only: these alone; None: all that are not done.
    """

    done: IdSet = field(default_factory=lambda: _NO_IDS)
    only: IdSet | None = None

    def select(self, rows: pa.Table) -> pa.Table:
        """Those of some rows of the corpus that are to be scored, in order."""
        ids = rows["id"]
        wanted = ~self.done.contains(ids)
        if self.only is not None:
            wanted &= self.only.contains(ids)
        return rows if wanted.all() else rows.filter(pa.array(wanted))


def recover(output: Output) -> bool:
    """Removes score files that a killed run left half-written. Returns whether there was such a run.

    Left to itself Ray Data does the same, but only while it reads its own list of what is done, which is not used.
    """
    half, marks = output.half_written()
    for path in (*half, *marks):  # the marks last: this, too, may be killed
        output.filesystem.delete_file(path)
    return bool(marks)


def done_ids(output: Output) -> IdSet:
    """The ids of the rows that are written.

    Raises:
        UserError: if a score file cannot be read.
    """
    return IdSet.of(_ids(output))


def ids_with(output: Output, statuses: Collection[Status]) -> IdSet:
    """The ids of the written rows that ended in one of these ways."""
    data = output.written()
    if data is None:
        return _NO_IDS
    chosen = pc.field("status").isin([str(status) for status in statuses])
    return IdSet.of(batch.column("id") for batch in data.to_batches(columns=["id"], filter=chosen))


def drop_twice(output: Output, twice: IdSet) -> int:
    """Keeps the first of the rows of each of these ids, in the order of the files. Returns how many went.

    A worker of a killed run that outlives it by moments may write rows that the next run has read as not done.
    """
    seen: set[str] = set()
    gone = 0
    for path in output.files() if len(twice) else ():
        with output.filesystem.open_input_file(path) as stream:
            ids = pq.read_table(stream, columns=["id"])["id"].to_pylist()
        suspected = twice.contains(pa.array(ids, pa.string()))
        keep = [not again or name not in seen for name, again in zip(ids, suspected, strict=True)]
        seen.update(name for name, again in zip(ids, suspected, strict=True) if again)
        if all(keep):
            continue
        gone += keep.count(False)
        if not any(keep):
            output.filesystem.delete_file(path)
            continue
        with output.filesystem.open_input_file(path) as stream:
            kept = pq.read_table(stream).filter(pa.array(keep))
        output.write_table(path, kept)
    return gone


def _ids(output: Output) -> Iterator[pa.Array]:
    data = output.written()
    try:
        for batch in data.to_batches(columns=["id"]) if data is not None else ():
            yield batch.column("id")
    except (pa.ArrowInvalid, OSError) as error:
        raise cannot_read(output, error) from error


def cannot_read(output: Output, error: Exception) -> UserError:
    """What a user is told where a score file is broken."""
    cure = "remove the file that it names: its rows are scored again"
    return UserError(f"--output {output.uri}", f"a score file cannot be read ({error})", cure)
