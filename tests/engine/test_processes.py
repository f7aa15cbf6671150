"""vLLM's processes do not outlive the one that they work for."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]

SCRIPT = """
import multiprocessing, time
from m3agiqa.config import load_config
from m3agiqa.engine.base import create_engine

if __name__ == "__main__":
    engine = create_engine(load_config(None, ["capture.kind=states"]))
    print("up", flush=True)
    time.sleep(600)
"""


def descendants(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    children = [int(child) for child in listed.read_text().split()] if listed.exists() else []
    return children + [found for child in children for found in descendants(child)]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads /proc")
def test_a_killed_parent_leaves_no_engine_behind(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"up\n"
    engine = descendants(parent.pid)
    assert engine
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}").exists() for pid in engine):
        time.sleep(0.2)
    assert [pid for pid in engine if Path(f"/proc/{pid}").exists()] == []
