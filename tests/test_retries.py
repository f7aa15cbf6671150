"""Retries beside runs that stopped early, and inputs whose columns change: whole runs in this process."""

import csv
import shlex
import shutil
from pathlib import Path

import pytest

from m3agiqa import pipeline
from m3agiqa.cli import main
from m3agiqa.errors import UserError
from m3agiqa.lease import Lease
from m3agiqa.runs import LEASE, Output
from m3agiqa.status import run_status
from tests.corpora import encode, picture, write_corpus, write_tar
from tests.in_process import InProcess

SETTINGS = ["--set", "engine.kind=simulated", "report.write=false", "ray.retries=0"]
ANY = "ray.max_failed_fraction=1"


@pytest.fixture
def work(monkeypatch) -> InProcess:
    return InProcess(monkeypatch)


def score(source: object, output: object, *words: str, settings: tuple[str, ...] = ()) -> int:
    return main(["score", "--input", str(source), "--output", str(output), *words, *SETTINGS, *settings])


def scored(output: Path) -> dict[str, int]:
    return Output(str(output)).count_by_status()


def many(folder: Path, kind: str) -> str:
    if kind == "csv":
        return write_corpus(folder / "in", 200)
    return str(write_tar(folder / "0.tar", [(f"{i:03d}.png", encode(picture(seed=i))) for i in range(200)]))


@pytest.mark.parametrize("kind", ["csv", "tar"])
def test_after_a_retry_of_a_run_that_stopped_what_is_left_is_gone_on_with(tmp_path, work, kind):
    source, out = many(tmp_path, kind), tmp_path / "out"
    assert score(source, out, settings=("engine.simulated_failures=0.5",)) == 3
    early = sum(scored(out).values())
    assert 100 <= early < 200
    assert score(source, out, "--retry-failed") == 0
    assert scored(out) == {"ok": early}
    found = run_status(str(out))
    assert (found.state, found.left) == ("stopped", 200 - early if kind == "csv" else None)
    assert main(shlex.split(found.next)[1:]) == 0
    found = run_status(str(out))
    assert (found.state, found.counts, found.left, found.next) == ("done", {"ok": 200}, 0, None)
    # A retry of a whole run leaves it whole, also while it is at it.
    assert score(source, out, "--retry-failed") == 0
    assert (run_status(str(out)).state, run_status(str(out)).left) == ("done", 0)


def test_a_retry_after_one_of_the_other_kind_that_was_interrupted_scores_its_rows(tmp_path, work):
    source, out = write_corpus(tmp_path / "in", 60), tmp_path / "out"
    images = {i: (tmp_path / "in" / f"{i}.png") for i in range(3)}
    whole = {i: image.read_bytes() for i, image in images.items()}
    for image in images.values():
        image.write_bytes(b"no image")
    assert score(source, out, settings=("engine.simulated_failures=0.5", ANY)) == 0
    before = scored(out)
    assert before["rejected"] == 3 < 16 < before["failed"]
    work.stop_after = 16
    assert score(source, out, "--retry-failed", settings=(ANY,)) == 130
    work.stop_after = None
    for i, image in images.items():
        image.write_bytes(whole[i])
    assert score(source, out, "--retry-rejected", settings=(ANY,)) == 0
    assert work.scored == 3
    assert scored(out) == {"ok": before["ok"] + 3 + 16, "failed": before["failed"] - 16}
    assert str(run_status(str(out)).next).endswith("--retry-failed")


def test_a_folder_that_another_run_has_filled_while_it_was_waited_for_is_refused(tmp_path, work, monkeypatch, capsys):
    source, other, out = write_corpus(tmp_path / "in", 20), tmp_path / "other", tmp_path / "out"
    assert score(source, other, settings=("images.max_side=2000",)) == 0

    class Waited(Lease):
        def __enter__(self):
            shutil.copytree(other, out, dirs_exist_ok=True)
            return super().__enter__()

    monkeypatch.setattr(pipeline, "Lease", Waited)
    assert score(source, out, settings=("images.max_side=1000",)) == 2
    assert "images.max_side" in capsys.readouterr().err
    assert (out / "run.json").read_text() == (other / "run.json").read_text()
    assert not (out / LEASE).exists()


def test_a_run_that_is_interrupted_says_what_it_has_come_to(tmp_path, work):
    source, out = write_corpus(tmp_path / "in", 60), tmp_path / "out"
    work.stop_after = 16
    assert score(source, out) == 130
    manifest = Output(str(out)).read_manifest()
    assert (manifest.counts, manifest.finished, manifest.rows) == ({"ok": 16}, None, 60)
    assert manifest.seconds > 0


def test_a_run_whose_folder_was_taken_over_leaves_the_others_summary(tmp_path, work, monkeypatch):
    out = Output(str(tmp_path / "out"))

    def taken_over(*arguments: object) -> None:
        out.write_whole("run.json", b"{}")
        out.write_whole(LEASE, b"")
        raise UserError("a", "b", "c")

    monkeypatch.setattr(pipeline, "_work", taken_over)
    assert score(write_corpus(tmp_path / "in", 2), out.uri) == 2
    assert out.read("run.json") == b"{}"


def labelled(folder: Path, rows: list[list[object]], *columns: str) -> Path:
    """A manifest of rows (id, image, further columns) over the images of `write_corpus`."""
    if not (folder / "in").exists():
        write_corpus(folder / "in", 40)
    with (folder / "in" / "labelled.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "image_path", *columns], *rows])
    return folder / "in" / "labelled.csv"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_mended_row_that_changes_a_columns_type_is_refused_before_anything_is_changed(tmp_path, work, capsys):
    rows = [[f"r{i}", f"{i}.png", i] for i in range(20)]
    rows[4][1] = "gone.png"
    out = tmp_path / "out"
    assert score(labelled(tmp_path, rows, "mos"), out) == 0
    before = snapshot(out)
    rows[4] = ["r4", "4.png", 4.5]
    assert score(labelled(tmp_path, rows, "mos"), out, "--retry-rejected") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "column 'mos' is of type int64 in its rows, and of type double in the input; give it as int64" in said
    assert snapshot(out) == before
    rows[4] = ["r4", "4.png", 4]
    assert score(labelled(tmp_path, rows, "mos"), out, "--retry-rejected") == 0
    assert scored(out) == {"ok": 20}


def test_an_output_that_such_a_row_has_broken_says_how_to_mend_it(tmp_path, work, capsys, monkeypatch):
    rows = [[f"r{i}", f"{i}.png", i] for i in range(20)]
    rows[4][1] = "gone.png"
    out = tmp_path / "out"
    assert score(labelled(tmp_path, rows, "mos"), out) == 0
    rows[4] = ["r4", "4.png", 4.5]
    with monkeypatch.context() as unchecked:
        unchecked.setattr(pipeline, "as_written", lambda output, schema: schema)
        assert score(labelled(tmp_path, rows, "mos"), out, "--retry-rejected") == 1
        assert (out / "retry" / "complete").exists()
    assert score(labelled(tmp_path, rows, "mos"), out) == 2
    assert "column 'mos' is of type int64 in its rows" in capsys.readouterr().err.splitlines()[-1]
    rows[4] = ["r4", "4.png", 4]
    assert score(labelled(tmp_path, rows, "mos"), out) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "is of type double in its rows" in said
    assert f"remove {out}/retry: its rows are scored again" in said
    shutil.rmtree(out / "retry")
    assert score(labelled(tmp_path, rows, "mos"), out, "--retry-rejected") == 0
    assert scored(out) == {"ok": 20}


def test_rows_are_not_added_where_their_columns_differ(tmp_path, work, capsys):
    rows = [[f"r{i}", f"{i}.png", i, "x"] for i in range(40)]
    out = tmp_path / "out"
    assert score(labelled(tmp_path, [row[:3] for row in rows[:20]], "mos"), out) == 0
    before = snapshot(out)
    halves = [[*row[:2], row[2] + 0.5] for row in rows]
    assert score(labelled(tmp_path, halves, "mos"), out) == 2
    assert main(["plan", "--input", str(tmp_path / "in/labelled.csv"), "--output", str(out), *SETTINGS]) == 2
    assert "column 'mos' is of type int64" in capsys.readouterr().out
    assert score(labelled(tmp_path, [row[:2] for row in rows]), out) == 2
    assert "column 'mos' (int64), which the input lacks" in capsys.readouterr().err
    source = labelled(tmp_path, rows, "mos", "extra")
    assert score(source, out) == 2
    assert 'leave it out: --set corpus.drop=["extra"]' in capsys.readouterr().err
    assert snapshot(out) == before
    assert score(source, out, settings=('corpus.drop=["extra"]',)) == 0
    assert scored(out) == {"ok": 40}
    assert main(["query", str(out), "SELECT sum(mos) FROM scores"]) == 0
    assert "780" in capsys.readouterr().out
