"""The driver's memory, which a run of any length has to leave as it is.

Two things grow in Ray Data's driver with the rows of a run.

- Blocks that wait for the next step: it bounds their bytes, not their number. What is read of a manifest is cut into
  blocks of a few kB. So small a block is not in the object store but in the driver's own memory (Ray's
  `max_direct_call_object_size`), with what Ray Data notes of it; half a share of a cluster's object store,
  from where on it holds a step back, would be gigabytes of them. `Ahead` bounds their number.
- What it notes of every block that has come out, for a summary at the end that is not shown. `Forget` drops it.
"""

from typing import Any

from ray.data import DataContext
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
)
from ray.data._internal.execution.execution_callback import ExecutionCallback

# Of each step. Of decoding's input that is 16,000 rows at 16 rows a batch: no engine waits for reading.
MOST_BLOCKS = 256
# Or so many for each task of the next step, which on a large cluster runs more than `MOST_BLOCKS` at once.
_BLOCKS_A_TASK = 4
# Where the next step cannot begin for want of a CPU, Ray Data lets a block through to it at each of its looks, ten or
# more a second, however many wait; from then on it is one in so many seconds.
_RELEASE_S = 0.5


class Ahead(BackpressurePolicy):
    """Holds a step back while too many of its blocks wait for the next.

    A few more can wait: what Ray Data releases so that nothing stands still, and what tasks had ready.
    """

    def can_add_input(self, op: Any) -> bool:
        """Whether the step may begin another task."""
        return self._room(op) > 0

    def max_task_output_bytes_to_read(self, op: Any) -> int:
        """How many bytes of what its tasks have made are taken; of a task whose bytes are not, Ray stops the making."""
        if (room := self._room(op)) <= 0:
            return 0
        # Before the first block its size is not known; Ray Data takes one for any number above 0. It counts a block as
        # larger than this mean says, so that fewer are taken at a look; the rest comes at the next.
        return max(1, int(room * (op.metrics.average_bytes_per_output or 0)))

    def _room(self, op: Any) -> int:
        """How many more blocks may wait."""
        at_work = sum(following.num_active_tasks() for following in op.output_dependencies)
        most = max(MOST_BLOCKS, _BLOCKS_A_TASK * at_work)
        return most - int(self._topology[op].output_queue.num_blocks)


class Forget(ExecutionCallback):
    """Drops what is noted of blocks that have come out; Ray Data makes one for each pipeline."""

    def on_execution_step(self, executor: Any) -> None:
        """Called by Ray Data several times a second."""
        for op in executor._topology:
            notes: list[Any] = getattr(op, "_output_blocks_stats", [])
            notes.clear()


def hold_back(context: DataContext) -> None:
    """Adds `Ahead` to what Ray Data holds steps back by."""
    context.output_backpressure_guard_release_interval_s = _RELEASE_S
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, Ahead])
