"""A node that is drained before it is taken away, as the files of cluster/ have it, and how its end is heard of."""

import contextlib
import importlib.util
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType

import pytest

from tests.cluster.nodes import LIMIT_S, ROOT, Job, Nodes, free_port, until
from tests.processes import descendants

SCRIPT = ROOT / "cluster" / "drain.py"


def module() -> ModuleType:
    """The script, which is a file on its own and no part of a package."""
    spec = importlib.util.spec_from_file_location("drain", SCRIPT)
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made  # where dataclasses look for it
    spec.loader.exec_module(made)
    return made


drain = module()


def node_of(worker: subprocess.Popen) -> drain.Node:
    """What the script knows of a worker."""
    (found,) = (node for node in drain.nodes() if node.pid in descendants(worker.pid))
    return found


@pytest.mark.slow
def test_a_node_is_drained_in_a_run_and_then_stopped(tmp_path, nodes: Nodes):
    """An engine on each of two nodes: the one that drains gets nothing new, and the other goes on."""
    nodes.head()
    nodes.worker()
    leaving = nodes.worker(f"--metrics-export-port={free_port()}")
    node = node_of(leaving)
    settings = [
        "engine.simulated_latency_s=3", "ray.batch_size=2", "ray.batches_in_flight=1", "ray.rows_per_file=8",
        "ray.actors=2", "ray.num_cpus=1.6", "ray.decode_cpus=0.3",
    ]  # fmt: skip
    # Enough that the run still has work when the drain is over: Ray Data ends idle engines once all is given out.
    job = Job(nodes, tmp_path, 180, settings)
    job.wait_for_files()
    until(lambda: drain.batches(node) is not None, "the node does not tell of its engine")

    command = [sys.executable, SCRIPT, "--seconds=100", f"--node-id={node.id}"]
    done = subprocess.run(command, env=nodes.environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    assert job.goes_on(), done.stderr
    assert "its engines have nothing left" in done.stderr
    nodes.kill(leaving)
    nodes.worker()
    job.check()


@pytest.mark.slow
def test_a_node_with_nothing_on_it_is_ended_by_ray_and_a_drain_needs_the_token(nodes: Nodes):
    nodes.head()
    node = node_of(nodes.worker())
    command = [sys.executable, SCRIPT, "--seconds=100", f"--node-id={node.id}"]

    def run(**more: str) -> subprocess.CompletedProcess:
        environment = nodes.environment | more
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S)

    refused = run(RAY_AUTH_TOKEN="0" * 64)
    assert refused.returncode == 1
    assert "could not be drained" in refused.stderr
    assert node.alive()

    drained = run()
    assert drained.returncode == 0, drained.stderr
    assert "had nothing left, and Ray has ended it" in drained.stderr
    assert not node.alive()


@contextlib.contextmanager
def served(answers: dict[str, str]) -> Iterator[str]:
    """An HTTP server on loopback that answers with these texts, by method and path, and 404 otherwise."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wants_token = self.path.startswith("/latest/meta-data")
            known = not wants_token or self.headers["X-aws-ec2-metadata-token"] == answers["PUT /latest/api/token"]
            text = answers.get(f"{self.command} {self.path}")
            self.send_response(401 if not known else 404 if text is None else 200)
            self.end_headers()
            self.wfile.write((text or "").encode())

        do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_end_of_a_spot_instance_is_heard_of():
    """As AWS has it: no such file, until there is something to say; a token for each question."""
    answers = {"PUT /latest/api/token": "a token"}
    with served(answers) as metadata:
        assert drain.announced(metadata) is None
        # Of no node on this machine: those of other tests are none of its business.
        command = [sys.executable, SCRIPT, "--watch", f"--metadata={metadata}", "--node-id=none"]
        watcher = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            with pytest.raises(subprocess.TimeoutExpired):
                watcher.wait(timeout=2)
            at = (datetime.now(UTC) + timedelta(seconds=120)).strftime("%Y-%m-%dT%H:%M:%SZ")
            answers["GET /latest/meta-data/spot/instance-action"] = f'{{"action": "terminate", "time": "{at}"}}'
            assert 100 < drain.announced(metadata) <= 120
            assert watcher.wait(timeout=60) == 1
        finally:
            watcher.kill()
            watcher.communicate()
    assert drain.announced("http://127.0.0.1:9") is None


def test_an_engines_batches_are_read_from_what_prometheus_is_told(tmp_path):
    answers = {"PUT /latest/api/token": "", "GET /metrics": "ray_node_mem_used 3.0\n"}
    with served(answers) as url:
        node = drain.Node(0, "id", "gcs", f"{url}/metrics")
        assert drain.batches(node) is None
        answers["GET /metrics"] += 'ray_m3agiqa_batches{run="a",engine="1"} 2.0\nray_m3agiqa_batches{engine="2"} 1.0\n'
        assert drain.batches(node) == 3
        assert not node.alive()
    assert drain.batches(node) is None


def test_a_head_that_is_gone_is_not_waited_for(monkeypatch):
    """A cluster that is taken down as a whole: nobody answers."""
    monkeypatch.setattr(drain, "_ASK_S", 2.0)
    started = time.monotonic()
    assert not drain.drain(drain.Node(0, "0" * 56, f"127.0.0.1:{free_port()}", ""), 3600)
    assert time.monotonic() - started < 60


def test_waiting_ends_when_time_is_up(monkeypatch):
    class Busy(drain.Node):
        def alive(self) -> bool:
            return True

    monkeypatch.setattr(drain, "_POLL_S", 0.05)
    monkeypatch.setattr(drain, "_TOLD_AFTER_S", 0.0)
    monkeypatch.setattr(drain, "batches", lambda node: 1.0)
    started = time.monotonic()
    drain.wait(Busy(0, "id", "gcs", ""), started + 0.5)
    assert time.monotonic() - started >= 0.5
    monkeypatch.setattr(drain, "batches", lambda node: 0.0)
    drain.wait(Busy(0, "id", "gcs", ""), time.monotonic() + 3600)
