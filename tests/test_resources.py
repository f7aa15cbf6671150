"""Pools that grow and shrink, what no node can give, and how much is on its way at once; on a real Ray."""

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from m3agiqa.config import RunConfig, load_config
from m3agiqa.errors import UserError
from m3agiqa.resources import actor_pool, check_resources, decode_args, set_limits

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]
LIMIT_S = 170.0


def config(*overrides: str) -> RunConfig:
    return load_config(None, ["engine.kind=simulated", "ray.num_cpus=0.5", *overrides])


def until(holds: Callable[[], bool], what: str) -> None:
    ends = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < ends, what
        time.sleep(0.2)


class Worker:
    """Slow until the pool has grown, then fast."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def __call__(self, batch: dict):
        await asyncio.sleep(0.0 if (self._folder / "grown").exists() else 6.0)
        yield batch


def test_a_pool_grows_while_batches_wait_and_shrinks_when_they_do_not(tmp_path):
    import ray
    from ray._private.state import actors
    from ray.data import DataContext

    def trickle(batch: dict) -> dict:
        # Three of these at once: more than slow workers can take, less than would keep fast ones busy.
        ends = time.monotonic() + (3.0 if (tmp_path / "grown").exists() else 1.0)
        while not (tmp_path / "shrunk").exists() and time.monotonic() < ends:
            time.sleep(0.05)
        return batch

    settings = config("ray.actors=[1, 3]", "ray.batches_in_flight=3")
    context = DataContext.get_current().copy()
    set_limits(context, settings)
    with DataContext.current(context):
        data = ray.data.range(600, override_num_blocks=600)
        data = data.map_batches(trickle, num_cpus=1, compute=ray.data.TaskPoolStrategy(size=3))
        data = data.map_batches(Worker, fn_constructor_args=(tmp_path,), compute=actor_pool(settings), num_cpus=0.5)
    rows: list[int] = []

    def consume() -> None:
        with DataContext.current(context):
            rows.extend(row["id"] for row in data.iter_rows())

    thread = threading.Thread(target=consume, daemon=True)

    def alive() -> int:
        return sum(a["State"] == "ALIVE" and "MapBatches(Worker)" in a["ActorClassName"] for a in actors().values())

    thread.start()
    try:
        until(lambda: alive() == 3, "the pool did not grow to its most")
        (tmp_path / "grown").touch()
        until(lambda: 1 <= alive() < 3, "the pool did not shrink")
    finally:
        (tmp_path / "grown").touch()
        (tmp_path / "shrunk").touch()
    thread.join(LIMIT_S)
    assert sorted(rows) == list(range(600))


def test_what_is_on_its_way_stays_bounded_with_a_slow_engine():
    import ray
    from ray.data import DataContext

    blocks = 120
    settings = config("ray.object_store_gib=0.02")

    class Count:
        def __init__(self) -> None:
            self.made = 0

        def add(self) -> None:
            self.made += 1

        def get(self) -> int:
            return self.made

    count = ray.remote(num_cpus=0)(Count).remote()

    def make(batch: dict) -> dict:
        ray.get(count.add.remote())
        return {"id": batch["id"], "data": np.zeros((len(batch["id"]), 2**20), np.uint8)}

    class Slow:
        """Waits, before its first batch, for as long as the step before it gets on."""

        def __init__(self) -> None:
            self.ahead: int | None = None

        async def __call__(self, batch: dict):
            if self.ahead is None:
                made, since = -1, time.monotonic()
                while time.monotonic() - since < 4:
                    if (now := await count.get.remote()) != made:
                        made, since = now, time.monotonic()
                    await asyncio.sleep(0.1)
                self.ahead = made
            yield {"id": batch["id"], "ahead": np.full(len(batch["id"]), self.ahead)}

    context = DataContext.get_current().copy()
    set_limits(context, settings)
    with DataContext.current(context):
        data = ray.data.range(blocks, override_num_blocks=blocks).map_batches(make, **decode_args(settings))
        data = data.map_batches(Slow, compute=actor_pool(settings), num_cpus=0.5)
        rows = list(data.iter_rows())
    assert sorted(row["id"] for row in rows) == list(range(blocks))
    assert 1 <= rows[0]["ahead"] <= blocks // 2


@pytest.mark.parametrize(
    ("setting", "said"),
    [("ray.num_cpus=1000", "more than 6 CPUs"), ("ray.decode_cpus=1000", "more than 6 CPUs"),
     ("ray.num_gpus=1", "more than 0 GPUs"), ("ray.decode_on=nowhere", "nowhere")],
)  # fmt: skip
def test_what_no_node_has_is_refused(setting, said):
    with pytest.raises(UserError, match=said):
        check_resources(config(setting))
    check_resources(config())


def test_it_is_waited_for_as_long_as_is_said():
    started = time.monotonic()
    with pytest.raises(UserError, match="nowhere"):
        check_resources(config("ray.decode_on=nowhere", "ray.wait_s=3"))
    assert time.monotonic() - started >= 3
