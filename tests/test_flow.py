"""A step of a run that stands still is named, and the driver does not grow with every block."""

import time

import pytest

from m3agiqa import flow
from m3agiqa.flow import Flow, Stalls


def test_only_a_step_with_work_and_without_output_is_named():
    said: list[str] = []
    stalls = Stalls(said.append, stalled_s=60)
    for now in range(0, 200, 10):
        stalls.look(now, [("read", 5, 0), ("decode", now, 2), ("score", 7, 3)])
    assert said == [
        "no output of score for 1m 00s, with 3 tasks at work",
        "no output of score for 2m 00s, with 3 tasks at work",
        "no output of score for 3m 00s, with 3 tasks at work",
    ]
    stalls.look(200, [("score", 8, 3)])
    stalls.look(250, [("score", 8, 3)])
    assert len(said) == 3


@pytest.mark.slow
def test_a_running_pipeline_is_looked_at(local_ray, monkeypatch, capsys):
    import ray
    from ray.data import DataContext

    monkeypatch.setattr(flow, "STALLED_S", 1.0)

    def sleepy(batch: dict) -> dict:
        time.sleep(4)
        return batch

    context = DataContext.get_current().copy()
    context.custom_execution_callback_classes = [Flow]
    with DataContext.current(context):
        assert len(ray.data.range(2, override_num_blocks=1).map_batches(sleepy).take_all()) == 2
    assert "MapBatches(sleepy)" in capsys.readouterr().err


@pytest.mark.slow
def test_what_ray_data_notes_of_blocks_does_not_pile_up(local_ray, monkeypatch):
    import ray
    from ray.data import DataContext

    monkeypatch.setattr(flow, "_MOST_NOTES", 5)
    before: list[int] = []
    after: list[int] = []

    class Watched(Flow):
        def on_execution_step(self, executor):
            steps = [step for step in executor._topology if hasattr(step, "get_map_transformer")]
            before.append(max(len(step._output_blocks_stats) for step in steps))
            super().on_execution_step(executor)
            after.append(max(len(step._output_blocks_stats) for step in steps))

    context = DataContext.get_current().copy()
    context.custom_execution_callback_classes = [Watched]
    with DataContext.current(context):
        rows = ray.data.range(60, override_num_blocks=60).map_batches(lambda batch: batch).take_all()
    assert len(rows) == 60
    assert max(before) > 0
    assert max(after) <= 5
