"""The corpus as Ray Data reads it."""

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import ray
from ray.data import DataContext, Datasource, ReadTask
from ray.data._internal.logical.interfaces import LogicalPlan
from ray.data._internal.logical.operators import StreamingRepartition
from ray.data.block import BlockMetadata

from m3agiqa.corpus import Corpus, Shard
from m3agiqa.errors import RunBroken, UserError
from m3agiqa.resume import Todo

# So many tasks cut what is read: they kept up with 1,000 images a second, and each is a process of some 200 MB.
_CUTTERS = 2


# Rows that were in so many processes that died are decoded one by one, each in a process apart.
_TRIES_TOGETHER = 2
# A task is begun no more often. Nodes that are lost count like deaths: fewer would end runs on nodes that come and go.
MOST_TRIES = 8


def times_tried() -> int:
    """How often Ray began the task that this runs in before: each time its process died, or its node was lost."""
    worker: Any = ray._private.worker.global_worker
    return int(worker.core_worker.get_current_task_attempt_number())


def may_kill(rows: pa.Table, board: Any, most_tries: int) -> bool:
    """Whether rows that a task is to decode have been in processes that died, and are to be taken with care.

    Raises:
        RunBroken: with all the care its processes died. It is for the board: it ends the run.
    """
    tries = times_tried()
    if tries >= most_tries:
        ids = rows["id"]
        _give_up(f"the rows from id {ids[0].as_py()!r} to {ids[-1].as_py()!r}", "decodes", tries, board)
    return tries >= _TRIES_TOGETHER


def _give_up(what: str, does: str, tries: int, board: Any) -> None:
    rule = f"the process that {does} them died {tries} times, or was lost with its node"
    error = RunBroken(what, rule, "look at the node's memory, and at these files; the same command goes on")
    ray.get(board.refuse.remote(error))
    raise error


class CorpusSource(Datasource):
    """The rows of a corpus that are to be scored, as a Ray Data source: one read task for each shard.

    What is done is left out here, row by row, so that no image of it is read, and so that a shard that expands into
    many rows (a tar) goes on in its middle.
    """

    def __init__(self, corpus: Corpus, todo: Todo, board: Any) -> None:
        super().__init__()
        # Once in the object store of a node, whatever the number of tasks there that read it.
        self._corpus, self._todo, self._board = corpus, ray.put(todo), board

    def estimate_inmemory_data_size(self) -> int | None:
        """Not known without reading."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """One task a shard, however many are asked for: a shard is what can be read on its own."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        schema = self._corpus.schema
        return [
            ReadTask(
                _reader(shard, schema, self._todo, self._board),
                unknown,
                schema=schema,
                per_task_row_limit=per_task_row_limit,
            )
            for shard in self._corpus.shards
        ]


def _reader(shard: Shard, schema: pa.Schema, todo: ray.ObjectRef, board: Any) -> Callable[[], Iterator[pa.Table]]:
    most_tries = MOST_TRIES

    def read() -> Iterator[pa.Table]:
        try:
            if (tries := times_tried()) >= most_tries:
                _give_up(f"the rows of {shard.where}", "reads", tries, board)
            wanted: Todo = ray.get(todo)
            for rows in shard.read():
                if ray.get(board.refusal.remote()) is not None:
                    return
                if (left := wanted.select(rows)).num_rows:
                    # Not always the shard's own: `as_written`.
                    yield left.cast(schema)
        except UserError as error:
            ray.get(board.refuse.remote(error))
            raise

    return read


def cut(read: ray.data.Dataset, rows: int, num_cpus: float) -> ray.data.Dataset:
    """What is read in blocks of so many rows. Of a manifest of text it is a block or two, for one task to decode.

    It is `read.repartition(target_num_rows_per_block=rows)`, whose tasks would ask for a CPU each. Most of the time
    they wait for decoding (`driver_memory.Ahead`), and from so many CPUs they would keep it.

    Args:
        num_cpus: what a task asks for.
    """
    cutting = StreamingRepartition(
        target_num_rows_per_block=rows,
        input_dependencies=[read._logical_plan.dag],
        ray_remote_args={"num_cpus": num_cpus},
        compute=ray.data.TaskPoolStrategy(_CUTTERS),
    )
    return ray.data.Dataset._from_parent(read, LogicalPlan(cutting, read.context))
