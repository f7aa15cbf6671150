"""Drains the Ray node of this machine, which is about to be taken away, and waits until that has come of it what can.

    python drain.py --seconds 75            # before a pod is stopped
    python drain.py --seconds 75 --watch    # beside the node of an AWS spot instance: once its end is announced

From then on the node is given no new task and no new actor, and Ray Data sends no more batches to its engines. This
ends when the engines have answered those that they had, when Ray has ended the node, which it does where nothing is
left on it, or when the time is up. To stop the node is left to the caller. It is a file of its own, without m3agiqa.
"""

import argparse
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

_RAY = Path(sys.executable).with_name("ray")
_POLL_S = 1.0
_WATCH_EVERY_S = 5.0  # the notice comes two minutes before the end
_METADATA = "http://169.254.169.254"  # where AWS tells an instance about itself
_ASK_S = 30.0  # a head that is gone, too, answers nothing, and a cluster that is taken down shall not wait for it
_KEEP_S = 25.0  # of the time that AWS leaves, for stopping the node
# Ray Data sees within two seconds that a node drains; an engine tells its batches every 10 s, and Ray tells that on
# every 10 s: what is read before that may be of a time when it was still given some.
_TOLD_AFTER_S = 23.0


@dataclass(frozen=True)
class Node:
    """A Ray node on this machine, as its daemon was started: all there is to know of it without Ray's help."""

    pid: int
    id: str
    gcs: str
    metrics: str

    def alive(self) -> bool:
        """Whether the daemon runs still."""
        return _flags(self.pid).get("node_id") == self.id


def _flags(pid: int) -> dict[str, str]:
    """The flags of a process that is Ray's daemon, of others none."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return {}
    if Path(words[0]).name != "raylet":
        return {}
    pairs = (word.lstrip("-").split("=", 1) for word in words[1:] if word.startswith("--") and "=" in word)
    return {name.replace("-", "_"): value for name, value in pairs}


def nodes(only: str | None = None) -> list[Node]:
    """The Ray nodes of this machine, or the one with this id."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        flags = _flags(int(folder.name))
        if "node_id" in flags and only in (None, flags["node_id"]):
            metrics = f"http://{flags['node_ip_address']}:{flags.get('metrics_export_port', '8080')}/metrics"
            found.append(Node(int(folder.name), flags["node_id"], flags["gcs_address"], metrics))
    return found


def drain(node: Node, seconds: float) -> bool:
    """Tells the cluster that a node leaves; whether that was heard. Ray wants the cluster's token for it."""
    command = [str(_RAY), "drain-node", f"--address={node.gcs}", f"--node-id={node.id}"]
    command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=the machine is taken away"]
    command.append(f"--deadline-remaining-seconds={seconds:.0f}")
    try:
        subprocess.run(command, check=True, timeout=min(seconds, _ASK_S))
    except (OSError, subprocess.SubprocessError) as error:
        say(f"{node.id} could not be drained: {error}")
        return False
    say(f"{node.id} drains")
    return True


def batches(node: Node) -> float | None:
    """Batches in the engines of a node, as Prometheus is told; None: no engine, or nothing was told."""
    try:
        with urllib.request.urlopen(node.metrics, timeout=5) as answer:
            told = re.findall(r"^ray_m3agiqa_batches\{[^}]*\} (\S+)", answer.read().decode(), re.MULTILINE)
    except (OSError, ValueError):
        return None
    return sum(map(float, told)) if told else None


def wait(node: Node, ends: float) -> None:
    """Until a draining node has nothing to do any more, but no longer than to a time of `time.monotonic`."""
    told_after = time.monotonic() + _TOLD_AFTER_S
    while time.monotonic() < ends:
        if not node.alive():
            return say(f"{node.id} had nothing left, and Ray has ended it")
        # Ray would keep it up for its engines, which have nothing to do and are started elsewhere once it is gone.
        if time.monotonic() >= told_after and batches(node) == 0:
            return say(f"{node.id}: its engines have nothing left")
        time.sleep(_POLL_S)
    return say(f"{node.id} was not done in time; its batches are scored elsewhere")


def announced(metadata: str) -> float | None:
    """Seconds until AWS takes this instance away, or None: nothing is known of that."""
    try:
        asked = urllib.request.Request(f"{metadata}/latest/api/token", method="PUT")
        asked.add_header("X-aws-ec2-metadata-token-ttl-seconds", "60")
        with urllib.request.urlopen(asked, timeout=2) as answer:
            proof = answer.read().decode()
        asked = urllib.request.Request(f"{metadata}/latest/meta-data/spot/instance-action")
        asked.add_header("X-aws-ec2-metadata-token", proof)
        with urllib.request.urlopen(asked, timeout=2) as answer:
            at = datetime.fromisoformat(json.load(answer)["time"])
    except (OSError, ValueError, KeyError):  # 404 as long as there is nothing to say
        return None
    return (at - datetime.now(UTC)).total_seconds()


def say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def main() -> int:
    """Exit code 0: drained, or as far as time allowed; 1: there is no node here, or it could not be drained."""
    parser = argparse.ArgumentParser(description="Drain the Ray node of this machine.")
    parser.add_argument("--seconds", type=float, default=75.0, help="the most time that it may take")
    parser.add_argument("--node-id", help="where there are several on this machine; default: all of them")
    parser.add_argument("--watch", action="store_true", help="wait for AWS to announce the instance's end")
    parser.add_argument("--metadata", default=_METADATA, help="where AWS is asked")
    given = parser.parse_args()
    seconds = given.seconds
    if given.watch:
        while (left := announced(given.metadata)) is None:
            time.sleep(_WATCH_EVERY_S)
        seconds = max(min(seconds, left - _KEEP_S), _POLL_S)
    ends = time.monotonic() + seconds
    drained = [node for node in nodes(given.node_id) if drain(node, seconds)]
    for node in drained:
        wait(node, ends)
    return 0 if drained else 1


if __name__ == "__main__":
    sys.exit(main())
