"""What grows in the driver with the rows of a run is bounded."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from ray.data import DataContext
from ray.data._internal.execution.execution_callback import ExecutionCallback

from m3agiqa import driver_memory

BLOCKS = 200


class Seen(ExecutionCallback):
    """The most blocks that waited for the last step at one time, and the most that Ray Data had notes of."""

    waiting, noted = 0, 0

    def on_execution_step(self, executor: Any) -> None:
        """Called by Ray Data several times a second."""
        *_, before_last, _ = executor._topology.values()
        notes = (len(getattr(op, "_output_blocks_stats", ())) for op in executor._topology)
        Seen.waiting, Seen.noted = max(Seen.waiting, before_last.output_queue.num_blocks), max(Seen.noted, *notes)


def run(prepare: Callable[[DataContext], None]) -> tuple[int, int]:
    """Cuts rows into blocks of one, which is fast, before a slow step. What was seen; all rows must come out."""
    import ray

    def slow(batch: dict) -> dict:
        time.sleep(0.02)
        return batch

    Seen.waiting, Seen.noted = 0, 0
    context = DataContext.get_current().copy()
    context.custom_execution_callback_classes = [Seen]
    prepare(context)
    with DataContext.current(context):
        rows = ray.data.range(BLOCKS, override_num_blocks=2).repartition(target_num_rows_per_block=1)
        slowly = rows.map_batches(slow, batch_size=1, compute=ray.data.TaskPoolStrategy(1))
        assert sorted(row["id"] for row in slowly.take_all()) == list(range(BLOCKS))
    return Seen.waiting, Seen.noted


def bounded(context: DataContext) -> None:
    driver_memory.hold_back(context)
    context.custom_execution_callback_classes = [driver_memory.Forget, Seen]


@pytest.mark.slow
def test_what_a_driver_holds_does_not_grow_with_the_rows(local_ray, monkeypatch):
    monkeypatch.setattr(driver_memory, "MOST_BLOCKS", 8)
    waiting, noted = run(lambda context: None)
    assert min(waiting, noted) > 50, "Ray Data itself bounds it, or names it otherwise"
    waiting, noted = run(bounded)
    # What is ready when a step is held back comes in first: a block or two of each task, and a release now and then.
    assert waiting <= 16
    assert noted <= 16
