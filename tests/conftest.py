"""Fixtures that several test files share: models and corpora are made once a session."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports Ray, vLLM or transformers.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


@pytest.fixture(scope="session")
def demo_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's pictures with their manifest."""
    from m3agiqa.tiny.demo import write

    folder = tmp_path_factory.mktemp("demo")
    write(folder)
    return folder


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A local Ray cluster with more CPUs on paper than the machine has, so that nothing waits for a slot."""
    import ray

    ray.init(num_cpus=6, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
