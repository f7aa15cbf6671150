"""Actors that share a GPU, have one each or hold several: on a real Ray that counts two, without one being there."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from m3agiqa.config import RunConfig, load_config
from m3agiqa.connection import local_cluster
from m3agiqa.errors import UserError
from m3agiqa.pipeline import run_scoring
from m3agiqa.resources import check_resources
from m3agiqa.runs import Output
from tests.conftest import RAY_CPUS
from tests.corpora import write_corpus

GPUS = 2
# The pool may grow to more actors than the GPUs have room for, whatever each takes.
MOST = 6


@pytest.fixture(scope="module")
def two_gpus() -> Iterator[None]:
    """Ray believes what it is told; the next module starts a cluster of its own."""
    import ray

    ray.shutdown()
    ray.init(address="local", num_gpus=GPUS, log_to_driver=False, logging_level="ERROR", **local_cluster(RAY_CPUS))
    yield
    ray.shutdown()


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("two_gpus")]


def config(*overrides: str) -> RunConfig:
    few = ["engine.simulated_latency_s=2", "ray.batch_size=4", "ray.batches_in_flight=1", "ray.num_cpus=0.2"]
    return load_config(None, ["engine.kind=simulated", *few, *overrides])


@contextmanager
def watched() -> Iterator[list[int]]:
    """How many engines were alive, again and again while the block runs."""
    from ray._private.state import actors

    counts, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            alive = [a for a in actors().values() if a["State"] == "ALIVE" and "MeteredActor" in a["ActorClassName"]]
            counts.append(len(alive))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield counts
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize(
    ("gpus", "together", "at_once"), [("0.5", 1, 4), ("1", 1, 2), ("2", 2, 1)], ids=["a half", "one", "two"]
)
def test_as_many_engines_run_as_the_gpus_have_room_for(tmp_path, gpus, together, at_once):
    rows = 60 * (at_once - 1) + 20  # on a busy machine the first engine is up long before the last
    corpus, out = write_corpus(tmp_path / "in", rows), tmp_path / "out"
    with watched() as counts:
        actors = f"ray.actors=[{at_once}, {MOST}]"
        asked = config(f"ray.num_gpus={gpus}", f"engine.tensor_parallel_size={together}", actors)
        manifest = run_scoring(asked, corpus, str(out))
    assert max(counts) == at_once
    assert manifest.counts == {"ok": rows}
    ids = [row["id"] for row in Output(str(out)).rows(["id"]).to_pylist()]
    assert sorted(ids) == sorted(f"row {i}" for i in range(rows))


def test_more_than_the_gpus_of_a_node_are_refused():
    check_resources(config("ray.num_gpus=2"))
    with pytest.raises(UserError, match="more than 2 GPUs"):
        check_resources(config("ray.num_gpus=3"))
