"""Several Ray nodes on this machine, with a token, and jobs that are submitted to them."""

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
from collections.abc import Callable, Sequence
from pathlib import Path

from m3agiqa.runs import Output
from tests.corpora import encode, picture
from tests.processes import descendants

ROOT = Path(__file__).parent.parent.parent
RAY = Path(sys.executable).parent / "ray"
LIMIT_S = 250.0
TRIES = 5


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def until(holds: Callable[[], bool], what: str) -> None:
    ends = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < ends, what
        time.sleep(0.5)


def started(node: subprocess.Popen, log: Path) -> bool:
    """Whether a node comes up: Ray ends one that has not after 30 s, which happens where a machine is busy."""
    until(lambda: node.poll() is not None or "Ray runtime started" in log.read_text(), "a node did not come up")
    return node.poll() is None


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
        )  # fmt: skip

    def worker(self, *more: str) -> subprocess.Popen:
        """A node that has joined."""
        return self._start(f"--address=127.0.0.1:{self.port}", "--num-cpus=3", *more)

    def _start(self, *arguments: str) -> subprocess.Popen:
        command = [RAY, "start", "--block", "--node-ip-address=127.0.0.1", "--object-store-memory=80000000"]
        command += ["--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats", *arguments]
        # The only port with a number that all nodes of a machine would share.
        command.append(f"--dashboard-agent-listen-port={free_port()}")
        for _ in range(TRIES):
            path = self._logs / f"node-{len(self._all)}.log"
            # As of machines of their own: one that joins unpacks a job's working folder, over that of others it shares.
            own = f"--temp-dir={self._temporary / str(len(self._all))}"
            with path.open("w") as log:
                node = subprocess.Popen(
                    [*command, own], env=self.environment, stdout=log, stderr=log, start_new_session=True
                )
            self._all.append(node)
            if started(node, path):
                return node
        raise AssertionError(path.read_text())

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


class Job:
    """A run over so many pictures, submitted to a cluster as users do."""

    def __init__(self, nodes: Nodes, folder: Path, rows: int, settings: Sequence[str]) -> None:
        pictures, work, self._output = folder / "pictures", folder / "work", folder / "out"
        (work / "jobs").mkdir(parents=True)
        pictures.mkdir()
        shutil.copy(ROOT / "jobs" / "score.py", work / "jobs")
        self._names = [f"{i}.png" for i in range(rows)]
        for i, name in enumerate(self._names):
            (pictures / name).write_bytes(encode(picture(seed=i)))
        until(lambda: nodes.asked(nodes.environment["RAY_AUTH_TOKEN"]) == 200, "the job server did not come up")
        command = [RAY, "job", "submit", "--address", f"http://127.0.0.1:{nodes.dashboard}", "--working-dir", work]
        command += ["--", sys.executable, "jobs/score.py", "--input", pictures, "--output", self._output, "--set"]
        self.process = subprocess.Popen(
            list(map(str, [*command, "engine.kind=simulated", *settings])),
            env=nodes.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def goes_on(self) -> bool:
        return self.process.poll() is None

    def wait_for_files(self, count: int = 1) -> None:
        """Until so many files of scores are there."""

        def there() -> bool:
            return len(list((self._output / "scores").glob("*.parquet"))) >= count or not self.goes_on()

        until(there, "nothing was scored")
        assert self.goes_on(), self.process.communicate()[0]

    def check(self) -> None:
        """It ends well, with each row once."""
        said, _ = self.process.communicate(timeout=LIMIT_S)
        assert self.process.returncode == 0, said
        rows = Output(str(self._output)).rows(["id", "status"]).to_pylist()
        assert sorted(row["id"] for row in rows) == sorted(self._names)
        assert {row["status"] for row in rows} == {"ok"}
