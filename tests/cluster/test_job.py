"""`ray job submit` to several nodes on this machine: a token, a late node, a killed node, and every row once."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from m3agiqa.runs import Output
from tests.corpora import encode, picture
from tests.processes import descendants

ROOT = Path(__file__).parent.parent.parent
RAY = Path(sys.executable).parent / "ray"
LIMIT_S = 250.0
ROWS = 100


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def until(holds: Callable[[], bool], what: str) -> None:
    ends = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < ends, what
        time.sleep(0.5)


class Nodes:
    """Ray nodes as processes of their own, with a token; none of them is reached from another machine."""

    def __init__(self, logs: Path) -> None:
        self.port, self.dashboard = free_port(), free_port()
        self.environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "PYTHONPATH": str(ROOT),
        }
        self.environment.pop("RAY_ADDRESS", None)
        self._logs, self._all = logs, []
        # Sockets have short names.
        self._temporary = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))

    def head(self) -> subprocess.Popen:
        """A head without work, its dashboard on loopback."""
        return self._start(
            "--head", f"--port={self.port}", "--num-cpus=0", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self.dashboard}", f"--ray-client-server-port={free_port()}",
            f"--temp-dir={self._temporary}",
        )  # fmt: skip

    def worker(self, *more: str) -> subprocess.Popen:
        """A node that joins."""
        return self._start(f"--address=127.0.0.1:{self.port}", "--num-cpus=3", *more)

    def _start(self, *arguments: str) -> subprocess.Popen:
        command = [RAY, "start", "--block", "--node-ip-address=127.0.0.1", "--object-store-memory=80000000"]
        command += ["--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats", *arguments]
        # The only port with a number that all nodes of a machine would share.
        command.append(f"--dashboard-agent-listen-port={free_port()}")
        with (self._logs / f"node-{len(self._all)}.log").open("w") as log:
            started = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        self._all.append(started)
        return started

    def kill(self, node: subprocess.Popen) -> None:
        """Ends all of a node's processes at once, as a machine that is gone."""
        for pid in (node.pid, *descendants(node.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        node.wait()

    def asked(self, token: str | None) -> int:
        """The status code of the job server's answer."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(f"http://127.0.0.1:{self.dashboard}/api/jobs/", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def close(self) -> None:
        for node in self._all:
            if node.poll() is None:
                self.kill(node)
        shutil.rmtree(self._temporary, ignore_errors=True)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    made = Nodes(tmp_path)
    yield made
    made.close()


@pytest.mark.slow
def test_a_job_on_a_cluster_that_changes_while_it_runs(tmp_path, nodes):
    pictures, work = tmp_path / "pictures", tmp_path / "work"
    (work / "jobs").mkdir(parents=True)
    pictures.mkdir()
    shutil.copy(ROOT / "jobs" / "score.py", work / "jobs")
    for i in range(ROWS):
        (pictures / f"{i}.png").write_bytes(encode(picture(seed=i)))
    nodes.head()
    until(lambda: nodes.asked(nodes.environment["RAY_AUTH_TOKEN"]) == 200, "the job server did not come up")
    assert nodes.asked(None) in (401, 403)
    assert nodes.asked("wrong") in (401, 403)

    out = tmp_path / "out"
    settings = [
        "engine.kind=simulated", "engine.simulated_latency_s=1.5", "ray.batch_size=4", "ray.batches_in_flight=1",
        "ray.rows_per_file=8", "ray.actors=[1, 2]", "ray.num_cpus=0.5", "ray.decode_on=decode", "ray.wait_s=190",
    ]  # fmt: skip
    command = [RAY, "job", "submit", "--address", f"http://127.0.0.1:{nodes.dashboard}", "--working-dir", work, "--",
               sys.executable, "jobs/score.py", "--input", pictures, "--output", out, "--set", *settings]  # fmt: skip
    job = subprocess.Popen(
        list(map(str, command)), env=nodes.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    decode = ("--resources", '{"decode": 10}')
    first = nodes.worker(*decode)  # what the job waits for comes after it has begun
    until(lambda: any((out / "scores").glob("*.parquet")) or job.poll() is not None, "nothing was scored")
    nodes.worker(*decode)
    nodes.kill(first)
    said, _ = job.communicate(timeout=LIMIT_S)
    assert job.returncode == 0, said
    ids = Output(str(out)).rows(["id", "status"]).to_pylist()
    assert sorted(row["id"] for row in ids) == sorted(f"{i}.png" for i in range(ROWS))
    assert {row["status"] for row in ids} == {"ok"}
