"""A step of a run that stands still is named."""

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
