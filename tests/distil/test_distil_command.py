"""A distillation as a user runs it: in a process of its own, which is killed, interrupted, or run twice at once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from m3agiqa.cli import main
from m3agiqa.distil.journal import JOURNAL
from tests.distil.distilling import assert_no_key, ended, run, settings, written
from tests.distil.teacher_server import KEY, Say, good


def command(teacher, labelled: Path, out: Path, *overrides: str) -> list[str]:
    """The command line of a distillation."""
    said = ["--input", str(labelled), "--out", str(out), "--label", "quality=mos_quality"]
    return [sys.executable, "-m", "m3agiqa.cli", "distil", *said, "--set", *settings(teacher, *overrides)]


def wait_for(condition) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.02)


def test_killed_in_the_middle_and_gone_on_without_paying_twice(teacher, labelled, tmp_path):
    out = tmp_path / "out"
    teacher.behave = lambda ask: Say(200, good(ask).body, hold=0.0 if ask.prompt in ("p0", "p3") else 30.0)
    process = subprocess.Popen(command(teacher, labelled, out, "limits.concurrency=3"), stderr=subprocess.PIPE)
    try:
        wait_for(lambda: len(teacher.asks) == 5)
        wait_for(lambda: (out / JOURNAL).read_text().count("\n") == 2)
    finally:
        process.kill()
        assert KEY not in process.communicate()[1].decode()
    with (out / JOURNAL).open("ab") as file:
        file.write(b'{"answer":{"id":"i4","asp')
    teacher.behave = good
    done = run(teacher, labelled, out, "limits.concurrency=3")
    assert done["counts"]["quality"] == {"described": 5}
    assert teacher.paid == {(f"p{i}", "quality"): 1 for i in range(5)}
    assert len(written(out)) == 5


def test_interrupted_it_waits_for_what_is_paid_and_writes_all(teacher, labelled, tmp_path):
    out = tmp_path / "out"
    teacher.behave = lambda ask: Say(200, good(ask).body, hold=0.0 if ask.prompt == "p0" else 1.0)
    process = subprocess.Popen(command(teacher, labelled, out), stderr=subprocess.PIPE, env=os.environ)
    wait_for(lambda: len(teacher.asks) == 2)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130
    assert "the same command goes on" in said
    assert sum(row["teacher_quality_description"] is not None for row in written(out).values()) == 2
    assert json.loads((out / "distil.json").read_text())["left"] == 3
    teacher.behave = good
    run(teacher, labelled, out)
    assert set(teacher.paid.values()) == {1}


def test_two_commands_on_one_output(teacher, labelled, tmp_path):
    teacher.behave = lambda ask: Say(200, good(ask).body, hold=20.0)
    process = subprocess.Popen(command(teacher, labelled, tmp_path / "out"), stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: len(teacher.asks) == 1)
        assert "another process writes to it" in ended(teacher, labelled, tmp_path / "out")
    finally:
        process.kill()
        process.wait()


def test_a_journal_with_a_broken_line_is_not_thrown_away(teacher, labelled, tmp_path):
    run(teacher, labelled, tmp_path / "out")
    journal = tmp_path / "out" / JOURNAL
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([*lines[:2], "{broken", *lines[2:], ""]))
    assert "line 3 cannot be read" in ended(teacher, labelled, tmp_path / "out")
    assert len(journal.read_text().splitlines()) == 6


def test_the_command_says_what_was_done(teacher, labelled, tmp_path, capsys):
    args = command(teacher, labelled, tmp_path / "out", "budget.input_price=1", "budget.output_price=2")
    verbose = subprocess.run([*args, "-v", "--label", "correspondence=mos_align"], capture_output=True, text=True)
    assert verbose.returncode == 0, verbose.stderr
    assert "quality: 5 described\ncorrespondence: 4 described\n" in verbose.stdout
    assert "9 answers, 9,000 tokens in, 900 out, cost 0.0108" in verbose.stdout
    assert KEY not in verbose.stdout + verbose.stderr
    assert_no_key(tmp_path)
    assert main([*command(teacher, labelled, tmp_path / "o")[3:], "--max-requests", "1"]) == 2
    stopped = capsys.readouterr().err
    assert stopped.startswith("m3agiqa: --max-requests 1: is reached")
    assert len(stopped.splitlines()) == 1
