"""Fixtures that several test files share: models and corpora are made once a session."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Before anything imports Ray, vLLM or transformers.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

RAY_CPUS = 6


@pytest.fixture(scope="session")
def demo_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's pictures with their manifest."""
    from m3agiqa.tiny.demo import write

    folder = tmp_path_factory.mktemp("demo")
    write(folder)
    return folder


@pytest.fixture(scope="module")
def local_ray() -> None:
    """A local Ray cluster with more CPUs on paper than the machine has, so that nothing waits for a slot.

    One for all, unless a test has ended it or begun another: each module sees to it that it is there.
    """
    import ray

    from m3agiqa.connection import local_cluster

    if ray.is_initialized() and ray.cluster_resources().get("CPU") == RAY_CPUS:
        return
    ray.shutdown()
    # "local", or a cluster that someone else runs on this machine would be joined, and refuse num_cpus.
    ray.init(address="local", log_to_driver=False, logging_level="ERROR", **local_cluster(RAY_CPUS))


@pytest.fixture(scope="session")
def bucket() -> Iterator[Callable[[str, bytes], object]]:
    """A bucket on a real S3 server, and the only thing that tells pyarrow of it: the usual variables.

    One for the session: file systems are opened once per process.
    """
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        client = boto3.client("s3", region_name="us-east-1")
        client.create_bucket(Bucket="m3agiqa-corpus")
        yield lambda key, body: client.put_object(Bucket="m3agiqa-corpus", Key=key, Body=body)
    server.stop()
