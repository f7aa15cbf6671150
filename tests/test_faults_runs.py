"""Whole runs to which bad things happen: every id once, and what is finished is not done again."""

import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
from pyarrow import parquet as pq

import m3agiqa.source
from m3agiqa import pipeline
from m3agiqa.cli import main
from m3agiqa.config import RunConfig, load_config
from m3agiqa.corpus import Corpus, open_corpus
from m3agiqa.decoding import decode_rows
from m3agiqa.errors import RunBroken, TooManyFailed
from m3agiqa.pipeline import run_scoring
from m3agiqa.progress import Board
from m3agiqa.prometheus import MeteredActor
from m3agiqa.records import Status
from m3agiqa.resources import actor_pool
from m3agiqa.runs import Output
from m3agiqa.status import run_status
from tests.corpora import encode, picture, write_corpus, write_tar
from tests.deadly import deadly
from tests.processes import descendants, title
from tests.test_passing import KINDS

WAIT_S = 300.0


def config(*overrides: str) -> RunConfig:
    return load_config(None, ["engine.kind=simulated", "ray.num_cpus=0.5", *overrides])


def summary(output: Path | str) -> dict[str, Any]:
    """What `run.json` says of how a run ended."""
    manifest = Output(str(output)).read_manifest()
    names = ("counts", "seconds", "images_per_second", "engine", "finished")
    return {name: getattr(manifest, name) for name in names}


def statuses(output: Path | str) -> dict[str, str]:
    """Status by id; fails where an id is there twice."""
    rows = Output(str(output)).rows(["id", "status"]).to_pylist()
    found = {row["id"]: row["status"] for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_row_that_kills_engines_is_found_and_the_others_are_scored(tmp_path):
    source = write_corpus(tmp_path / "in", 40)
    settings = ["ray.batch_size=8", "ray.batches_in_flight=2", "engine.simulated_poison=number 21."]
    manifest = run_scoring(config(*settings), source, str(tmp_path / "out"))
    assert manifest.counts == {"ok": 39, "failed": 1}
    # Of six engines, one after the other: what those that died had counted is not lost.
    assert manifest.engine["engines"] == 1
    assert manifest.engine["images"] >= 39
    assert summary(tmp_path / "out")["engine"] == manifest.engine
    found = statuses(tmp_path / "out")
    assert [name for name, status in found.items() if status == "failed"] == ["row 21"]
    (error,) = [row["error"] for row in Output(str(tmp_path / "out")).rows().to_pylist() if row["status"] == "failed"]
    assert "alone" in error


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_an_engine_that_dies_while_it_is_loaded_ends_the_run(tmp_path, monkeypatch):
    """As where the kernel takes it for its memory: each process that loads one ends at once."""
    loaded = tmp_path / "loaded"

    class Dying(MeteredActor):
        def __init__(self, *arguments: object) -> None:
            import m3agiqa.actor

            def die(*arguments: object) -> None:
                with loaded.open("a") as file:
                    file.write("x")
                os._exit(1)

            m3agiqa.actor.Scorer = die
            super().__init__(*arguments)

    monkeypatch.setattr(pipeline, "MeteredActor", Dying)
    source = write_corpus(tmp_path / "in", 4)
    with pytest.raises(RunBroken, match=r"it died 7 times, .* while it was loaded; look at the node's memory"):
        run_scoring(config("ray.batch_size=1"), source, str(tmp_path / "out"))
    assert loaded.read_text() == "x" * 7
    found = summary(tmp_path / "out")
    assert found["seconds"] > 0
    assert (found["counts"], found["engine"]["engines"], found["finished"]) == ({}, 0, None)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_row_that_kills_decoders_is_found_and_the_others_are_scored(tmp_path, monkeypatch):
    def opened(*arguments: Any, **options: Any) -> Corpus:
        corpus = open_corpus(*arguments, **options)
        return replace(corpus, access=deadly(corpus.access, "21.png"))

    monkeypatch.setattr(pipeline, "open_corpus", opened)
    source = write_corpus(tmp_path / "in", 40)
    manifest = run_scoring(config("ray.batch_size=4"), source, str(tmp_path / "out"))
    assert manifest.counts == {"ok": 39, "failed": 1}
    rows = Output(str(tmp_path / "out")).rows().to_pylist()
    assert [(row["id"], "alone died" in row["error"]) for row in rows if row["status"] == "failed"] == [
        ("row 21", True)
    ]


class DeadlyShard:
    """A part of a corpus that kills whichever process reads it."""

    where = "the file"

    def read(self) -> Iterator[pa.Table]:
        os._exit(3)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_reader_that_dies_again_and_again_ends_the_run(tmp_path, monkeypatch):
    def opened(*arguments: Any, **options: Any) -> Corpus:
        corpus = open_corpus(*arguments, **options)
        return replace(corpus, shards=(DeadlyShard(),), rows=None)

    monkeypatch.setattr(pipeline, "open_corpus", opened)
    monkeypatch.setattr(m3agiqa.source, "MOST_TRIES", 3)
    with pytest.raises(RunBroken, match=r"the rows of the file: .* died 3 times, .*; the same command goes on"):
        run_scoring(config(), write_corpus(tmp_path / "in", 4), str(tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_engines_that_leave_the_pool_are_not_at_work_any_more(tmp_path):
    settings = config("ray.batch_size=2", "ray.actors=2")
    corpus = open_corpus(write_corpus(tmp_path / "in", 32))
    (rows,) = corpus.shards[0].read()
    decoded = ray.data.from_arrow(list(decode_rows(rows, settings.images, corpus.access, 2)))
    board = ray.remote(num_cpus=0)(Board).remote()
    scored = decoded.map_batches(
        MeteredActor, fn_constructor_args=(settings, "f", board, False), batch_format="pyarrow", batch_size=2,
        compute=actor_pool(settings), num_cpus=0.5,
    )  # fmt: skip
    assert scored.count() == 32
    until = time.monotonic() + WAIT_S
    while (found := ray.get(board.snapshot.remote()))["engines"] and time.monotonic() < until:
        time.sleep(0.1)
    assert (found["engines"], found["totals"]["images"]) == (0, 32.0)
    assert found["most_engines"] >= 1  # the second may come too late for work
    ray.kill(board)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_columns_of_any_type_are_gone_on_with(tmp_path):
    """What Ray and parquet make of a type must not look like another input."""
    write_corpus(tmp_path / "in", 6)
    # Ray has no form in which it hands on views.
    kinds = [
        *(kind for kind in KINDS if kind != pa.string_view()),
        pa.list_(pa.list_(pa.int64())),
        pa.timestamp("us"),
        pa.float32(),
    ]
    schema = pa.schema([("image", pa.string()), *((f"x{i}", kind) for i, kind in enumerate(kinds))])
    out = tmp_path / "out"
    for rows in (3, 6):
        columns = [pa.array([f"{i}.png" for i in range(rows)])]
        columns += [pa.concat_arrays([_some(kind), pa.nulls(rows - 1, kind)]) for kind in kinds]
        pq.write_table(pa.table(columns, schema=schema), tmp_path / "in" / "m.parquet")
        settings = config("ray.rows_per_file=1", "ray.batch_size=2")
        assert run_scoring(settings, str(tmp_path / "in" / "m.parquet"), str(out)).counts == {"ok": rows}
    assert len(statuses(out)) == 6


def _some(kind: pa.DataType) -> pa.Array:
    """One value of a type that is not null, of most."""
    try:
        return pa.array([1], pa.int64()).cast(kind)
    except pa.ArrowException:
        return pa.nulls(1, kind) if pa.types.is_map(kind) else pa.array([_VALUES.get(str(kind))], kind)


_VALUES = {
    "large_list<item: large_string>": ["a"],
    "list<item: float>": [0.5],
    "list<item: list<item: int64>>": [[1], []],
    "fixed_size_list<item: float>[3]": [0.5, 1.0, 2.0],
    "fixed_size_binary[4]": b"abcd",
}


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_too_many_failures_stop_a_run_and_a_retry_replaces_them(tmp_path):
    source, out, log = write_corpus(tmp_path / "in", 400), str(tmp_path / "out"), tmp_path / "log"
    many = config("engine.simulated_failures=0.5", "ray.retries=0", f"engine.simulated_log={log}")
    with pytest.raises(TooManyFailed, match="failed, more than the 10%"):
        run_scoring(many, source, out)
    kept = statuses(out)
    assert 100 <= len(kept) <= 400
    found = summary(out)
    assert found["counts"] == Counter(kept.values())
    assert (found["engine"]["images"], found["engine"]["engines"]) == (len(kept), 1)
    assert found["seconds"] > found["engine"]["engine_seconds"] > 0
    assert found["images_per_second"] > 0
    assert found["finished"] is None
    # All that was scored is written: nothing went into the engine for naught.
    assert len(log.read_text().splitlines()) == len(kept)
    log.unlink()
    few = config(f"engine.simulated_log={log}", "ray.max_failed_fraction=1")
    assert run_scoring(few, source, out, retry=[Status.FAILED]).counts == {"ok": len(kept)}
    assert statuses(out) == dict.fromkeys(kept, "ok")
    assert len(log.read_text().splitlines()) == list(kept.values()).count("failed")
    assert run_scoring(few, source, out).counts == {"ok": 400}
    assert len(log.read_text().splitlines()) == list(kept.values()).count("failed") + 400 - len(kept)
    # With nothing to retry no engine is started.
    assert run_scoring(few, source, out, retry=[Status.FAILED, Status.REJECTED]).counts == {"ok": 400}


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_too_many_failures_end_with_exit_code_3_also_in_a_small_run(tmp_path, capsys):
    source = write_corpus(tmp_path / "in", 12)
    command = ["score", "--input", source, "--output", str(tmp_path / "out"), "--set", "engine.kind=simulated"]
    assert main([*command, "engine.simulated_failures=1", "ray.num_cpus=0.5"]) == 3
    assert "12 of 12 rows: failed" in capsys.readouterr().err.splitlines()[-1]
    found = run_status(str(tmp_path / "out"))
    assert found.counts == {"failed": 12}
    assert str(found.next).endswith("--retry-failed")


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_tar_is_gone_on_with_row_by_row(tmp_path):
    write_tar(tmp_path / "0.tar", [(f"{i:02d}.png", encode(picture(seed=i))) for i in range(30)])
    out, log = tmp_path / "out", tmp_path / "log"
    settings = config("ray.rows_per_file=4", "ray.batch_size=2", f"engine.simulated_log={log}")
    assert run_scoring(settings, str(tmp_path / "0.tar"), str(out)).counts == {"ok": 30}
    assert len(log.read_text().splitlines()) == 30
    before = statuses(out)
    files = sorted((out / "scores").glob("*.parquet"))
    assert len(files) > 1
    files[0].unlink()
    lost = len(before) - len(statuses(out))
    assert lost > 0
    assert run_scoring(settings, str(tmp_path / "0.tar"), str(out)).counts == {"ok": 30}
    assert statuses(out) == before
    assert len(log.read_text().splitlines()) == 30 + lost


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_full_disk_ends_a_run_with_a_line_and_the_same_command_goes_on(tmp_path):
    import tests.full_disk  # noqa: F401 - registers the file system

    source, out = write_corpus(tmp_path / "in", 64), f"fulldisk://{tmp_path}/out"
    (tmp_path / "full").touch()
    settings = config("ray.rows_per_file=8", "ray.batch_size=4")
    with pytest.raises(RunBroken, match=r"no space left on it; make room; the same command goes on"):
        run_scoring(settings, source, out)
    (tmp_path / "full").unlink()
    assert run_scoring(settings, source, out).counts == {"ok": 64}
    assert len(statuses(out)) == 64


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_killed_vllm_engine_is_noticed_and_no_row_is_lost(tmp_path):
    rows = 48
    source, out = write_corpus(tmp_path / "in", rows), tmp_path / "out"
    settings = config(
        "engine.kind=vllm", "predictor.path=null", "ray.rows_per_file=8", "ray.batch_size=4", "ray.batches_in_flight=1"
    )
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        run = pool.submit(run_scoring, settings, source, str(out))
        until = time.monotonic() + WAIT_S
        while not list((out / "scores").glob("*.parquet")) and not run.done() and time.monotonic() < until:
            time.sleep(0.1)
        engines = [pid for pid in descendants(os.getpid()) if "EngineCore" in title(pid)]
        assert len(engines) == 1
        os.kill(engines[0], signal.SIGKILL)
        assert run.result(WAIT_S).counts == {"ok": rows}
    assert set(statuses(out).values()) == {"ok"}


@pytest.mark.slow
def test_random_kills_lose_nothing(tmp_path):
    command = [sys.executable, "-m", "benchmarks.chaos", "--jobs", "1", "--kills", "3", "--rows", "1000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["lost"], found["twice"], found["mixed_fingerprints"], found["not_ok"]) == (0, 0, 0, 0)
    assert sum(found["kills"].values()) >= 1
    assert found["commands"] == 1 + found["kills"].get("driver", 0)
