"""What `m3agiqa status` says of a folder in each of its states; no cluster."""

import json
import signal
import subprocess
import sys

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from m3agiqa.cli import main
from m3agiqa.errors import UserError
from m3agiqa.lease import Lease
from m3agiqa.runs import Manifest, Output
from m3agiqa.status import run_status

COMMAND = "m3agiqa score --input in --output out"


@pytest.fixture
def output(tmp_path) -> Output:
    return Output(str(tmp_path / "out"))


def write(output: Output, statuses: list[str], **manifest: object) -> None:
    output.make()
    output.write_manifest(Manifest("f", {}, {}, "in", command=COMMAND, **manifest))
    if statuses:
        pq.write_table(pa.table({"id": [str(i) for i in range(len(statuses))], "status": statuses}),
                       f"{output.scores}/0.parquet")  # fmt: skip


def test_a_run_that_was_cut_short_is_gone_on_with(output):
    write(output, ["ok", "ok", "failed", "rejected"], rows=10)
    found = run_status(output.uri)
    assert (found.state, found.left, found.next) == ("stopped", 6, COMMAND)
    assert found.lines()[1] == "rows  4 done: 2 ok, 1 rejected, 1 failed; left: 6"
    assert found.lines()[2:] == [f"next  {COMMAND}"]


def test_a_run_that_was_killed_has_the_rate_that_it_told_last(output):
    """Its manifest is that of its start; what it has told since is in the lease that it leaves behind."""
    write(output, ["ok", "ok"], rows=10)
    killed = f"""
import os, signal
from m3agiqa.lease import Lease
from m3agiqa.runs import Output

with Lease(Output({output.uri!r})) as lease:
    lease.live = lambda: {{"per_second": 2.5, "eta_s": 6.0}}
    lease._write()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", killed], check=False).returncode == -signal.SIGKILL
    found = run_status(output.uri)
    assert (found.state, found.images_per_second, found.eta_s, found.holder) == ("stopped", 2.5, None, None)
    assert found.lines()[2:] == ["rate  2.5 images/s", f"next  {COMMAND}"]
    # Of one that ended otherwise the manifest says it, over all of the time.
    output.write_manifest(Manifest("f", {}, {}, "in", command=COMMAND, rows=10, images_per_second=2.0))
    assert run_status(output.uri).images_per_second == 2.0


def test_a_run_that_wrote_nothing_yet(output):
    write(output, [], rows=10)
    assert (run_status(output.uri).state, run_status(output.uri).left) == ("stopped", 10)


def test_failed_rows_of_a_run_that_is_done_are_to_be_retried(output):
    write(output, ["ok", "failed"], rows=2, finished="now")
    assert (run_status(output.uri).state, run_status(output.uri).next) == ("done", f"{COMMAND} --retry-failed")


def test_a_retry_that_was_cut_short_is_gone_on_with(output):
    write(output, ["ok", "failed"], rows=2)
    output.write_manifest(Manifest("f", {}, {}, "in", command=f"{COMMAND} --retry-failed", rows=2))
    assert (run_status(output.uri).state, run_status(output.uri).next) == ("stopped", f"{COMMAND} --retry-failed")


@pytest.mark.parametrize("flags", ["--retry-failed", "--retry-failed --retry-rejected", "--retry-rejected"])
def test_after_a_retry_what_is_left_is_scored_by_the_command_without_it(output, flags):
    command = f"m3agiqa score --input in {flags} --output out"
    write(output, ["ok", "failed"], rows=10, finished="now")
    output.write_manifest(Manifest("f", {}, {}, "in", command=command, rows=10, finished="now"))
    assert (run_status(output.uri).state, run_status(output.uri).next) == ("stopped", COMMAND)
    output.write_manifest(Manifest("f", {}, {}, "in", command=command, rows=2, finished="now"))
    assert (run_status(output.uri).state, run_status(output.uri).next) == ("done", f"{COMMAND} --retry-failed")


def test_tars_that_were_never_read_to_their_end_are_not_done(output):
    write(output, ["ok"], finished="now")
    found = run_status(output.uri)
    assert (found.state, found.left, found.next) == ("stopped", None, COMMAND)


def test_nothing_is_left_of_a_run_without_failures(output):
    write(output, ["ok", "rejected"], rows=2, finished="now")
    assert (run_status(output.uri).left, run_status(output.uri).next) == (0, None)
    assert run_status(output.uri).lines()[-1] == "next  nothing"


def test_what_is_left_of_tars_is_not_known_before_the_end(output):
    write(output, ["ok"])
    assert run_status(output.uri).left is None
    assert "left: unknown" in run_status(output.uri).lines()[1]


def test_a_run_at_work_says_how_it_goes(output):
    write(output, ["ok"], rows=4)
    with Lease(output) as lease:
        lease.live = lambda: {"per_second": 0.5, "eta_s": 6.0}
        lease._write()
        found = run_status(output.uri)
    assert (found.state, found.images_per_second, found.eta_s) == ("running", 0.5, 6.0)
    assert "at work" in str(found.next)
    assert found.lines()[2] == "rate  0.5 images/s, 6s to go"


def test_the_command(output, capsys):
    write(output, ["ok"], rows=4)
    assert main(["status", output.uri]) == 0
    assert capsys.readouterr().out.startswith("stopped\nrows  1 done")
    assert main(["status", output.uri, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["left"] == 3


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        run_status(str(tmp_path))
