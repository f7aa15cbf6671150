"""A step of a run does not get far ahead of the next."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from ray.data import DataContext
from ray.data._internal.execution.execution_callback import ExecutionCallback

from m3agiqa import ahead

BLOCKS = 200


class Waiting(ExecutionCallback):
    """Notes the most blocks that waited for the last step at one time."""

    most = 0

    def on_execution_step(self, executor: Any) -> None:
        """Called by Ray Data several times a second."""
        *_, before_last, _ = executor._topology.values()
        Waiting.most = max(Waiting.most, before_last.output_queue.num_blocks)


def most_waiting(prepare: Callable[[DataContext], None]) -> int:
    """Runs cutting into blocks of one row, which is fast, before a step that is slow; all rows must come out."""
    import ray

    def slow(batch: dict) -> dict:
        time.sleep(0.02)
        return batch

    Waiting.most = 0
    context = DataContext.get_current().copy()
    context.custom_execution_callback_classes = [Waiting]
    prepare(context)
    with DataContext.current(context):
        rows = ray.data.range(BLOCKS, override_num_blocks=2).repartition(target_num_rows_per_block=1)
        slowly = rows.map_batches(slow, batch_size=1, compute=ray.data.TaskPoolStrategy(1))
        assert sorted(row["id"] for row in slowly.take_all()) == list(range(BLOCKS))
    return Waiting.most


@pytest.mark.slow
def test_few_blocks_wait_for_a_slow_step(local_ray, monkeypatch):
    monkeypatch.setattr(ahead, "MOST_BLOCKS", 8)
    unheld = most_waiting(lambda context: None)
    held = most_waiting(ahead.hold_back)
    # What is ready when a step is held back comes in first: a block or two of each task, and a release now and then.
    assert held <= 16 < 50 < unheld
