"""`ray job submit` to several nodes on this machine: a token, a late node, a killed node, and every row once."""

import pytest

from tests.cluster.nodes import Job, Nodes, until

DECODE = ("--resources", '{"decode": 10}')


@pytest.mark.slow
def test_a_job_on_a_cluster_that_changes_while_it_runs(tmp_path, nodes: Nodes):
    nodes.head()
    until(lambda: nodes.asked(nodes.environment["RAY_AUTH_TOKEN"]) == 200, "the job server did not come up")
    assert nodes.asked(None) in (401, 403)
    assert nodes.asked("wrong") in (401, 403)
    settings = [
        "engine.simulated_latency_s=1.5", "ray.batch_size=4", "ray.batches_in_flight=1",
        "ray.rows_per_file=8", "ray.actors=[1, 2]", "ray.num_cpus=0.5", "ray.decode_on=decode", "ray.wait_s=190",
    ]  # fmt: skip
    job = Job(nodes, tmp_path, 100, settings)
    first = nodes.worker(*DECODE)  # what the job waits for comes after it has begun
    job.wait_for_files()
    nodes.worker(*DECODE)
    nodes.kill(first)
    job.check()
