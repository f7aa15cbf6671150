"""A distillation from a real server: vLLM's own, on the CPU, with the embedded model."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from m3agiqa.aspects import RATING_WORDS, Aspect
from m3agiqa.tiny import demo
from tests.distil.distilling import run, written
from tests.distil.teacher_server import KEY

pytestmark = pytest.mark.slow

MODEL = Path(demo.__file__).parent / "model"
# The embedded model has never seen JSON, and would not end a string: the schema says how long it may be.
SCHEMA = {
    "type": "object",
    "properties": {
        "description": {"type": "string", "pattern": "^[A-Za-z ,.]{10,80}$"},
        "rating": {"enum": list(RATING_WORDS)},
    },
    "required": ["description", "rating"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def vllm_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of a running server that wants the key."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "TORCH_COMPILE_DISABLE": "1"}
    args = ["--model", str(MODEL), "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)]
    args += ["--dtype", "float32", "--enforce-eager", "--block-size", "32", "--max-num-seqs", "4"]
    log = tmp_path_factory.mktemp("vllm") / "log.txt"
    with log.open("wb") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *args],
            stdout=file, stderr=file, env=os.environ | quiet | {"VLLM_API_KEY": KEY}, start_new_session=True,
        )  # fmt: skip
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(url, timeout=5)
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
        else:
            return
    raise TimeoutError(log.read_text()[-3000:])


def test_descriptions_come_from_a_real_server(vllm_url, labelled, tmp_path, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    form = {"type": "json_schema", "json_schema": {"name": "description", "schema": SCHEMA}}
    settings = [
        "teacher.model=tiny", f"teacher.extra={{response_format: {form}, seed: 1}}", "teacher.temperature=1",
        "teacher.timeout_s=120", "limits.concurrency=4", "sampling.again=4", "images.max_side=128",
    ]  # fmt: skip
    labels = {Aspect.QUALITY: "mos_quality", Aspect.AUTHENTICITY: "mos_align"}
    done = run(vllm_url, labelled, tmp_path / "out", *settings, labels=labels)
    assert done["left"] == 0
    assert done["tokens"]["input"] > 100 * done["answers"]["paid"]
    rows = written(tmp_path / "out").values()
    descriptions = [row["teacher_quality_description"] for row in rows]
    assert sum(text is not None for text in descriptions) >= 3
    assert {row["teacher_quality_implied"] for row in rows} - {None} <= set(RATING_WORDS)
    assert run(vllm_url, labelled, tmp_path / "out", *settings, labels=labels)["answers"] == done["answers"]


def test_a_real_server_cuts_off_and_refuses(vllm_url, labelled, tmp_path, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    settings = ["teacher.model=tiny", "teacher.timeout_s=120", "images.max_side=128", "sampling.again=0"]
    done = run(vllm_url, labelled, tmp_path / "cut", *settings, "teacher.max_output_tokens=4")
    assert done["answers"] == {"paid": 5, "invalid": 5}
    assert "max_output_tokens" in written(tmp_path / "cut")["i0"]["teacher_quality_note"]
