"""SLURM's script, run as SLURM's shell would, with stand-ins for SLURM and for what it starts."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cluster.nodes import ROOT

LIMIT_S = 120.0
COMMANDS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": 'printf "one\\ntwo\\nthree\\n"',
    "hostname": "echo 10.0.0.1 10.0.0.2",
    "ray": """
        [[ $1 == health-check ]] && exit 0
        echo "node up $*" >> "$LOG"
        trap 'echo node down >> "$LOG"; exit 0' TERM
        while :; do sleep 0.1; done""",
    "m3agiqa": """
        echo "run up $*" >> "$LOG"
        trap 'sleep 1; echo run down >> "$LOG"; exit 1' TERM
        [[ $ENDS ]] && exit $ENDS
        while :; do sleep 0.1; done""",
}


class Allocation:
    """The script on three nodes; `ends` is the exit code of a run that ends by itself."""

    def __init__(self, folder: Path, ends: int | None = None) -> None:
        commands, self._log = folder / "bin", folder / "log"
        commands.mkdir()
        for name, text in COMMANDS.items():
            (commands / name).write_text(f"#!/bin/bash\n{text}\n")
            (commands / name).chmod(0o755)
        environment = os.environ | {
            "PATH": f"{commands}:{os.environ['PATH']}", "LOG": str(self._log),
            "ENDS": "" if ends is None else str(ends),
            "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "one,two,three", "SLURM_JOB_NUM_NODES": "3",
            "RAY_AUTH_TOKEN": "a token",
        }  # fmt: skip
        self.process = subprocess.Popen(
            ["bash", ROOT / "cluster" / "slurm.sbatch", "in", "out"],
            env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def end(self) -> str:
        """Waits for the script, and returns what it said; nothing of it is left behind."""
        try:
            return self.process.communicate(timeout=LIMIT_S)[1]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def log(self) -> list[str]:
        return self._log.read_text().splitlines() if self._log.exists() else []

    def wait_for(self, *starts: str) -> None:
        ends = time.monotonic() + LIMIT_S
        while not all(any(line.startswith(start) for line in self.log()) for start in starts):
            assert time.monotonic() < ends, self.log()
            assert self.process.poll() is None, self.process.stderr.read()
            time.sleep(0.05)


def test_a_job_that_is_told_to_end_ends_the_run_first_and_then_the_nodes(tmp_path):
    job = Allocation(tmp_path)
    job.wait_for("run up", "node up start --head", "node up start --block")
    job.process.send_signal(signal.SIGTERM)
    # A script that waited for its run to end by itself would be killed here, and the run with it.
    said = job.end()
    assert job.process.returncode == 128 + signal.SIGTERM, said
    assert job.log()[-3:] == ["run down", "node down", "node down"]


@pytest.mark.parametrize("code", [0, 3])
def test_a_run_that_ends_takes_the_nodes_with_it_and_its_exit_code_is_the_jobs(tmp_path, code):
    job = Allocation(tmp_path, ends=code)
    said = job.end()
    assert job.process.returncode == code, said
    assert "run down" not in job.log()
    (run,) = (line for line in job.log() if line.startswith("run up"))
    assert "score --input in --output out" in run
    assert "ray.address=10.0.0.1:20007" in run
    assert "ray.actors=[1, 3]" in run
