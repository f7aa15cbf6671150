"""The command line as a user meets it: real processes, what they print and how they end."""

import contextlib
import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from m3agiqa.cli import main
from tests.corpora import picture, write_bad_inputs, write_corpus

SIMULATED = ["--set", "engine.kind=simulated"]
ROOT = Path(__file__).parent.parent
JOBS = sorted((ROOT / "jobs").glob("*.py"))


def run(*args: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"COLUMNS": "160"}
    return subprocess.run(
        [sys.executable, "-m", "m3agiqa.cli", *args], capture_output=True, text=True, timeout=300, env=env
    )


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line that a command ends with, exit code 2 checked."""
    code = main(args)
    out, err = capsys.readouterr()
    assert code == 2
    assert not out
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1, err
    return err


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_a_job_is_its_command(job, tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    command = [sys.executable, str(job), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    name = {"distill": "distil"}.get(job.stem, job.stem.replace("_", "-"))
    assert done.stdout.startswith(f"usage: m3agiqa {name} [-h]")


def test_a_wrong_path(capsys, tmp_path):
    assert "/no/such" in refused(capsys, "score", "--input", "/no/such", "--output", str(tmp_path / "o"), *SIMULATED)
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")
def test_what_an_engine_on_a_node_refuses_is_one_line_too(tmp_path):
    source = write_corpus(tmp_path / "in", 2)
    wrong = ["--set", "model.path=tiny", "engine.vllm_args={no_such_argument: 1}"]
    done = run("score", "--input", source, "--output", str(tmp_path / "o"), *wrong)
    assert done.returncode == 2
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.splitlines()[-1].startswith("m3agiqa: engine.vllm_args.no_such_argument: vLLM knows no such")


def test_a_manifest_without_the_needed_column(capsys, tmp_path):
    (tmp_path / "m.csv").write_text("picture,text\na.png,b\n")
    line = refused(capsys, "score", "--input", str(tmp_path / "m.csv"), "--output", str(tmp_path / "o"), *SIMULATED)
    assert "picture" in line
    assert "corpus.image_column" in line


def test_an_unreadable_manifest(capsys, tmp_path):
    (tmp_path / "m.parquet").write_bytes(b"PAR1 this is no parquet file PAR1")
    refused(capsys, "score", "--input", str(tmp_path / "m.parquet"), "--output", str(tmp_path / "o"), *SIMULATED)


def test_a_column_of_the_input_that_scoring_writes(capsys, tmp_path):
    (tmp_path / "m.csv").write_text("image_path,quality_mos\na.png,3\n")
    line = refused(capsys, "score", "--input", str(tmp_path / "m.csv"), "--output", str(tmp_path / "o"), *SIMULATED)
    assert "quality_mos" in line


def test_an_unknown_key_model_and_output(capsys, tmp_path):
    picture().save(tmp_path / "a.png")
    io = ("score", "--input", str(tmp_path), "--output", str(tmp_path / "o"))
    assert "engine.kind" in refused(capsys, *io, "--set", "engine.kid=vllm")
    assert "./nowhere" in refused(capsys, *io, "--set", "engine.kind=transformers", "model.path=./nowhere")
    assert "no scores" in refused(capsys, "show", str(tmp_path))


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("Binder Error: no such thing\n\nLINE 1: SELECT a\n               ^", "Binder Error: no such thing"),
        ('ray::f() (pid=7)\n  File "x.py", line 3, in f\nOSError: the disk is full', "OSError: the disk is full"),
        ("", "no more is known"),
    ],
)
def test_an_error_of_another_kind_is_the_line_that_says_what_happened(capsys, monkeypatch, message, said):
    def fail(*_args, **_more):
        raise RuntimeError(message)

    monkeypatch.setattr("m3agiqa.cli.dump_config", fail)
    assert main(["config"]) == 1
    assert capsys.readouterr().err == f"m3agiqa: RuntimeError: {said} (-v shows where)\n"


def test_config_shows_what_is_in_force(capsys):
    assert main(["config", "--show", "--set", "engine.kind=transformers"]) == 0
    assert "kind: transformers" in capsys.readouterr().out
    assert main(["config", "--docs"]) == 0
    assert "max_description_tokens" in capsys.readouterr().out


def test_a_mistyped_command_explains_itself():
    done = run("scor")
    assert done.returncode == 2
    assert "score" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_score_and_show_from_a_shell(tmp_path):
    cases = write_bad_inputs(tmp_path / "in")
    done = run("score", "--input", str(tmp_path / "in" / "manifest.csv"), "--output", str(tmp_path / "out"), *SIMULATED)
    assert done.returncode == 0, done.stderr
    rejected = sum(status == "rejected" for status in cases.values())
    assert f"{len(cases)} rows: {len(cases) - rejected} ok, {rejected} rejected, 0 failed" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    noise = [line for line in done.stderr.splitlines() if "images" not in line and not line.startswith("note: ")]
    assert not noise, "something else than progress was printed"
    shown = run("show", str(tmp_path / "out"))
    assert shown.returncode == 0
    assert "rejected: " in shown.stdout
    assert f"{len(cases)} rows" in shown.stdout


@pytest.mark.slow
def test_ray_job_submit_runs_the_same_job(tmp_path, demo_corpus):
    """A real cluster with its job server behind a token, and jobs/score.py from a working directory."""
    ray.shutdown()
    env = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    ray_command = str(Path(sys.executable).parent / "ray")
    port, agent = _free_ports(2)
    head = ["start", "--head", "--block", "--port=0", "--num-cpus=6", f"--dashboard-port={port}"]
    # Its default port may belong to another cluster on this machine; jobs would wait for an agent then.
    head.append(f"--dashboard-agent-listen-port={agent}")
    # Ended with its own processes only: `ray stop` would end every cluster on the machine.
    cluster = subprocess.Popen([ray_command, *head], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    try:
        _wait_for_port(port)
        submit = [
            ray_command, "job", "submit", f"--address=http://127.0.0.1:{port}",
            "--working-dir", str(_working_dir(tmp_path)), "--", sys.executable, "jobs/score.py",
            "--input", f"{demo_corpus}/manifest.csv", "--output", f"{tmp_path}/out",
            "--set", "engine.kind=simulated", "ray.num_cpus=0.5",
        ]  # fmt: skip
        done = subprocess.run(submit, capture_output=True, text=True, timeout=300, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        assert " ok, 0 rejected, 0 failed" in done.stdout
    finally:
        cluster.terminate()
        cluster.wait(60)


def _wait_for_port(port: int) -> None:
    for _ in range(120):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.5)
    raise TimeoutError(f"nothing listens on port {port}")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]


def _working_dir(tmp_path: Path) -> Path:
    """What a user would submit: jobs/ and the package, without the repository's caches."""
    folder = tmp_path / "working_dir"
    for name in ("jobs", "m3agiqa", "configs"):
        source = Path(__file__).parent.parent / name
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder
