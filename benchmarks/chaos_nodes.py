"""Three Ray nodes on this machine, to be killed: machines of their own where root makes them, else processes.

A `Machine` has its own network, processes, temporary files and shared memory (Linux namespaces); what it shares with
the others are a bridge between their networks, and the disk with the input and the output. Killing it takes all of it
at once, and its cable can be pulled.
"""

import contextlib
import ctypes
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import psutil

CPUS = 4
WORKERS = 2
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET of linux/sched.h
_HEAD, _PORT = "10.213.0.1", 6379
_RAY = Path(sys.executable).parent / "ray"
_OBJECT_STORE = 400 * 10**6
# How long a cable stays out, in seconds: a hiccup, or longer than it takes to give a node up (some 10 s, below).
_UNPLUGGED_S = (1.0, 40.0)
_HEALTH = {
    "RAY_health_check_initial_delay_ms": "3000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}
# What a machine does before it is one. It waits for its cable: a line on its input.
_BOOT = """
mount -t tmpfs tmpfs /dev/shm && mkdir -p {temporary} && mount -t tmpfs tmpfs {temporary} && echo up && read -r _ &&
ip link set lo up && ip addr add {address}/16 dev eth0 && ip link set eth0 up &&
exec {ray} start --block --address {head} --node-ip-address {address} --num-cpus {cpus} --object-store-memory {store}
"""


class Nodes(Protocol):
    """A cluster of a head, which is not killed, and `WORKERS` workers."""

    name: str
    address: str
    kinds: tuple[str, ...]
    """What can happen to a node."""

    def harm(self, kind: str, rng: random.Random) -> None:
        """To a worker: as a "node" it goes without a word, and a new one comes. Without its "cable" it is not reached
        for a while, and goes on with what it has.
        """
        ...

    def kill_process(self, title: str, rng: random.Random) -> bool:
        """Kills a process of the cluster by what its command line holds. False where there is none."""
        ...

    def tend(self) -> None:
        """Puts new workers in the place of those that ended by themselves."""
        ...

    def close(self) -> None:
        """Ends all of it."""
        ...


def start_nodes() -> Nodes:
    """Machines, or processes where this may not make machines."""
    try:
        isolate()
    except OSError as error:
        print(f"note: no network namespaces here ({error}): nodes are processes", file=sys.stderr)
        return Processes()
    return Machines()


def isolate() -> None:
    """Moves this process, before it has threads, into a network of its own with a bridge.

    Raises:
        OSError: where that is not allowed, or iproute2 or util-linux is missing.
    """
    if missing := [tool for tool in ("ip", "unshare", "mount") if shutil.which(tool) is None]:
        raise FileNotFoundError(f"no {missing[0]}")
    if ctypes.CDLL(None, use_errno=True).unshare(_NEW_NETWORK):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    _ip("link set lo up")
    _ip("link add lan type bridge")
    _ip(f"addr add {_HEAD}/16 dev lan")
    _ip("link set lan up")


def _ip(command: str) -> None:
    """`ip` of iproute2."""
    done = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {command}: {done.stderr.strip()}")


class Machine:
    """A worker node in namespaces of its own; `number` gives its address."""

    def __init__(self, number: int, temporary: Path, log: Path) -> None:
        self.cable = f"cable{number}"
        address = f"10.213.{number // 250}.{number % 250 + 2}"
        sizes = {"cpus": CPUS, "store": _OBJECT_STORE}
        boot = _BOOT.format(address=address, head=f"{_HEAD}:{_PORT}", temporary=temporary, ray=_RAY, **sizes)
        spaces = ["--net", "--mount", "--pid", "--ipc", "--uts", "--fork", "--mount-proc", "--kill-child=KILL"]
        with log.open("ab") as said:
            self._process = subprocess.Popen(
                ["unshare", *spaces, "sh", "-c", boot], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"up\n":
            raise OSError(f"a machine did not come up; see {log}")
        _ip(f"link add {self.cable} type veth peer name eth0 netns {self._process.pid}")
        _ip(f"link set {self.cable} master lan up")
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def up(self) -> bool:
        return self._process.poll() is None

    @property
    def processes(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self._process.pid).children(recursive=True)
        return []

    def kill(self) -> None:
        """The first process in it goes, and with it, at the system's hands, all others."""
        self._process.kill()
        self._process.wait()

    def plug(self, state: str) -> None:
        """Its cable goes in ("up") or out ("down")."""
        with contextlib.suppress(OSError):  # it may be gone by now
            _ip(f"link set {self.cable} {state}")

    def _read(self) -> None:
        """What Ray says is not kept, and must not fill the pipe."""
        assert self._process.stdout is not None
        for _ in self._process.stdout:
            pass


class Machines:
    """A head without work beside this process, and workers that are machines."""

    name, address = "network namespaces", f"{_HEAD}:{_PORT}"
    kinds: tuple[str, ...] = ("node", "cable")

    def __init__(self) -> None:
        # For all nodes, and the jobs that this process starts.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        # Sockets have short names.
        self._folder = Path(tempfile.mkdtemp(prefix="m3", dir="/tmp"))
        self._temporary, self._number = self._folder / "r", 0
        self.workers: list[Machine] = []
        self._timers: list[threading.Timer] = []
        head = (
            f"start --head --block --node-ip-address {_HEAD} --port {_PORT} --num-cpus 0"
            f" --temp-dir {self._temporary} --object-store-memory {_OBJECT_STORE} --include-dashboard false"
        )
        self._log = self._folder / "log"
        with self._log.open("ab") as said:
            self._head = subprocess.Popen([_RAY, *head.split()], env=os.environ | _HEALTH, stdout=said, stderr=said)
        _until(lambda: "Ray runtime started" in self._log.read_text(), f"the head did not come up; see {self._log}")
        self.tend()

    def harm(self, kind: str, rng: random.Random) -> None:
        if kind == "node":
            self.workers.pop(rng.randrange(len(self.workers))).kill()
            self.tend()
            return
        machine = rng.choice(self.workers)
        machine.plug("down")
        timer = threading.Timer(rng.uniform(*_UNPLUGGED_S), machine.plug, ["up"])
        timer.daemon = True
        timer.start()
        self._timers.append(timer)

    def kill_process(self, title: str, rng: random.Random) -> bool:
        beside = psutil.Process(self._head.pid).children(recursive=True)
        return _kill_one(beside + [one for machine in self.workers for one in machine.processes], title, rng)

    def tend(self) -> None:
        self.workers = [machine for machine in self.workers if machine.up]
        while len(self.workers) < WORKERS:
            self._number += 1
            self.workers.append(Machine(self._number, self._temporary, self._log))

    def close(self) -> None:
        for timer in self._timers:
            timer.cancel()
        for machine in self.workers:
            machine.kill()
        for process in [*psutil.Process(self._head.pid).children(recursive=True), self._head]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._head.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


class Processes:
    """Ray's own cluster for tests: a node is some processes, and all share this machine's network."""

    name = "processes"
    kinds: tuple[str, ...] = ("node",)

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.address: str = self._cluster.address
        self._workers = [self._cluster.add_node(num_cpus=CPUS) for _ in range(WORKERS)]

    def harm(self, kind: str, rng: random.Random) -> None:
        worker = self._workers.pop(rng.randrange(len(self._workers)))
        self._cluster.remove_node(worker, allow_graceful=False)
        self._workers.append(self._cluster.add_node(num_cpus=CPUS))

    def kill_process(self, title: str, rng: random.Random) -> bool:
        return _kill_one(psutil.Process().children(recursive=True), title, rng)

    def tend(self) -> None:
        """They end only where they are killed."""

    def close(self) -> None:
        self._cluster.shutdown()


def _kill_one(processes: list[psutil.Process], title: str, rng: random.Random) -> bool:
    found = [process for process in processes if title in _title(process)]
    if found:
        with contextlib.suppress(psutil.Error):
            rng.choice(found).send_signal(signal.SIGKILL)
            return True
    return False


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _until(holds: Callable[[], bool], otherwise: str) -> None:
    ends = time.monotonic() + 120.0
    while not holds():
        if time.monotonic() > ends:
            raise TimeoutError(otherwise)
        time.sleep(0.2)
