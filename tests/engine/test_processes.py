"""vLLM's processes do not outlive the one that they work for, and lose no time when they have done their work."""

import atexit
import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from m3agiqa.config import load_config
from m3agiqa.engine.vllm_plugins import _end_with_parent
from m3agiqa.errors import UserError
from tests.processes import descendants

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


def work(fails: bool, taken_apart: Path) -> None:
    _end_with_parent()
    atexit.register(taken_apart.touch)
    if fails:
        raise ValueError("a reason")


@pytest.mark.parametrize("fails", [False, True])
def test_an_engines_process_is_not_taken_apart_unless_it_failed(tmp_path, capfd, fails):
    taken_apart = tmp_path / "taken apart"
    process = multiprocessing.get_context("spawn").Process(
        target=work, args=(fails, taken_apart), name="EngineCore_DP0"
    )
    process.start()
    process.join(240)
    assert process.exitcode == int(fails)
    assert taken_apart.exists() == fails
    assert ("ValueError: a reason" in capfd.readouterr().err) == fails


def test_a_build_for_gpus_says_that_there_is_none(monkeypatch):
    import vllm.platforms
    from vllm.platforms.interface import UnspecifiedPlatform

    from m3agiqa.engine.vllm_start import start

    monkeypatch.setattr(vllm.platforms, "_current_platform", UnspecifiedPlatform())
    with pytest.raises(UserError, match=r"is for GPUs, and it finds none; ray\.num_gpus=1 takes a node"):
        start(load_config(None, []), Path("model"), 100, {}, capture=False)
