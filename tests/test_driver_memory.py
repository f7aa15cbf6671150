"""What grows in the driver with the rows of a run is bounded."""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.data import DataContext
from ray.data._internal.execution.execution_callback import ExecutionCallback

from m3agiqa import driver_memory
from m3agiqa.source import cut

BLOCKS = 200
READ = 20


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
        rows = cut(ray.data.range(BLOCKS, override_num_blocks=READ), 1, 0.25)
        slowly = rows.map_batches(slow, batch_size=1, compute=ray.data.TaskPoolStrategy(1))
        assert sorted(row["id"] for row in slowly.take_all()) == list(range(BLOCKS))
    return Seen.waiting, Seen.noted


def bounded(context: DataContext) -> None:
    driver_memory.hold_back(context)
    context.custom_execution_callback_classes = [driver_memory.Forget, Seen]


class Step:
    """What the policy asks of a step of Ray Data."""

    def __init__(self, tasks: int = 0, after: tuple["Step", ...] = (), bytes_per_block: float | None = None) -> None:
        self.num_active_tasks = lambda: tasks
        self.output_dependencies = after
        self.metrics = SimpleNamespace(average_bytes_per_output=bytes_per_block)


@pytest.mark.parametrize(
    ("waiting", "at_work_after", "bytes_per_block", "may_begin", "bytes_taken"),
    [
        (0, [0], None, True, 1),
        (156, [0], 10.0, True, 1000),
        (256, [0], 10.0, False, 0),
        (300, [64], 10.0, False, 0),
        (300, [100], 10.0, True, 1000),
        (255, [], 10.0, True, 10),
    ],
)
def test_how_much_may_wait_goes_by_the_next_step(waiting, at_work_after, bytes_per_block, may_begin, bytes_taken):
    step = Step(after=tuple(map(Step, at_work_after)), bytes_per_block=bytes_per_block)
    topology: Any = {step: SimpleNamespace(output_queue=SimpleNamespace(num_blocks=waiting))}
    policy = driver_memory.Ahead(DataContext.get_current(), topology, None)  # type: ignore[arg-type]
    assert policy.can_add_input(step) is may_begin
    assert policy.max_task_output_bytes_to_read(step) == bytes_taken


@pytest.mark.slow
def test_what_a_driver_holds_does_not_grow_with_the_rows(local_ray, monkeypatch):
    monkeypatch.setattr(driver_memory, "MOST_BLOCKS", 8)
    waiting, noted = run(lambda context: None)
    assert min(waiting, noted) > 50, "Ray Data itself bounds it, or names it otherwise"
    waiting, noted = run(bounded)
    # What is ready when a step is held back comes in first: a block or two of each task, and a release now and then.
    assert waiting <= 32
    assert noted <= 16
