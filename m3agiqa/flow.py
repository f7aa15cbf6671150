"""Which step of a run has stopped giving anything: Ray Data shows that something stands still, not what."""

import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from ray.data._internal.execution.execution_callback import ExecutionCallback

from m3agiqa.progress import duration

# Longer than a batch takes in any engine that is still at work, and short beside the hours of a run.
STALLED_S = 300.0


class Stalls:
    """Notes when each step gave its last output, and names those with work that have not for long.

    Args:
        say: gets one line for a step that stands still, every `STALLED_S` anew.
    """

    def __init__(self, say: Callable[[str], None], stalled_s: float | None = None) -> None:
        self._say, self._stalled_s = say, STALLED_S if stalled_s is None else stalled_s
        self._last: dict[str, tuple[int, float, float]] = {}

    def look(self, now: float, steps: Iterable[tuple[str, int, int]]) -> None:
        """Takes for each step its name, its outputs so far and its tasks at work; `now` in seconds of any clock."""
        for name, outputs, tasks in steps:
            before, since, told = self._last.get(name, (-1, now, now))
            if outputs != before or not tasks:
                self._last[name] = (outputs, now, now)
            elif now - told >= self._stalled_s:
                self._say(f"no output of {name} for {duration(now - since)}, with {tasks} tasks at work")
                self._last[name] = (outputs, since, now)


class Flow(ExecutionCallback):
    """Lets `Stalls` look at a running pipeline; Ray Data makes one for each."""

    def __init__(self) -> None:
        self._stalls = Stalls(lambda line: print(f"note: {line}", file=sys.stderr))

    def on_execution_step(self, executor: Any) -> None:
        """Called by Ray Data several times a second."""
        metrics = ((op.name, op.metrics) for op in executor._topology)
        steps = ((name, one.num_task_outputs_generated, one.num_tasks_running) for name, one in metrics)
        self._stalls.look(time.monotonic(), steps)
