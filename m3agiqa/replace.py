"""Rows that were scored anew take the place of the old ones.

They are gathered in OUTPUT/retry first, where a run that is killed goes on. Once all are there a mark says so, and
each score file that holds an old one is replaced by one that holds the new one: a file changes as a whole, and
doing it twice changes nothing, so that it can be cut short anywhere. Then OUTPUT/retry goes.
"""

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs as pafs
from pyarrow import parquet as pq

from m3agiqa.corpus.files import join
from m3agiqa.id_set import IdSet
from m3agiqa.resume import done_ids
from m3agiqa.runs import RETRY, Output

_COMPLETE = f"{RETRY}/complete"


def retry_output(output: Output) -> Output:
    """Where rows are gathered that are scored anew."""
    return Output(join(output.uri, RETRY))


def replace_rows(output: Output) -> None:
    """Puts all rows of the retry folder in the place of those of the same ids."""
    output.write_whole(_COMPLETE, b"")
    _replace(output)


def finish_replacing(output: Output) -> None:
    """Goes on with a replacement that was cut short, where there is one."""
    if output.read(_COMPLETE) is not None:
        _replace(output)


def _replace(output: Output) -> None:
    retry = retry_output(output)
    fresh = retry.written()
    if fresh is not None:
        ids = done_ids(retry)
        for path in output.files():
            _replace_in(path, output, fresh, ids)
    if output.filesystem.get_file_info(retry.scores).type != pafs.FileType.NotFound:
        output.filesystem.delete_dir(retry.scores)
    # The mark after the rows: without them it asks for nothing, and they without it would be scored again.
    output.filesystem.delete_dir(retry.path)


def _replace_in(path: str, output: Output, fresh: pa.dataset.Dataset, ids: IdSet) -> None:
    with output.filesystem.open_input_file(path) as stream:
        old = pq.read_table(stream, columns=["id"])["id"]
    goes = pa.array(ids.contains(old))
    if not pc.any(goes).as_py():
        return
    with output.filesystem.open_input_file(path) as stream:
        kept = pq.read_table(stream).filter(pc.invert(goes))
    new = fresh.to_table(columns=kept.column_names, filter=pc.field("id").isin(old.filter(goes).to_pylist()))
    output.write_table(path, pa.concat_tables([kept, new.cast(kept.schema)]))
