"""What becomes of rows that an engine fails on or that kill it, of a run with a full disk, of an engine's process."""

import ctypes
import errno
import signal
import types

import pyarrow as pa
import pytest
import ray

import m3agiqa.actor
import m3agiqa.engine.simulated
from m3agiqa.config import RunConfig, load_config
from m3agiqa.corpus import open_corpus
from m3agiqa.decoding import decode_rows
from m3agiqa.engine.base import ItemFailed
from m3agiqa.errors import RunBroken, UserError
from m3agiqa.pipeline import run_scoring
from m3agiqa.progress import Board
from m3agiqa.records import Assessment
from m3agiqa.runs import LEASE, Output
from m3agiqa.scoring import Scorer
from tests.corpora import write_corpus


def config(*overrides: str) -> RunConfig:
    return load_config(None, ["engine.kind=simulated", *overrides])


def batches(manifest: str, settings: RunConfig) -> list[pa.Table]:
    corpus = open_corpus(manifest)
    rows = next(corpus.shards[0].read())
    return list(decode_rows(rows, settings.images, corpus.access, settings.ray.batch_size))


class Flaky:
    """An engine that fails on each item so many times before it answers."""

    def __init__(self, times: int) -> None:
        self.times, self.tried = times, []

    async def assess(self, items):
        self.tried += [item.prompt for item in items]
        return [ItemFailed("not now") if self.tried.count(i.prompt) <= self.times else {} for i in items]

    def stats(self):
        return {}


@pytest.mark.parametrize(("times", "status", "tries"), [(0, "ok", 1), (2, "ok", 3), (3, "failed", 3)])
async def test_a_row_that_the_engine_fails_on_is_tried_again_up_to_a_limit(tmp_path, times, status, tries):
    engine, settings = Flaky(times), config("ray.retries=2")
    (decoded,) = batches(write_corpus(tmp_path / "in", 3), settings)
    scored = await Scorer(settings, "f", lambda _: engine).score(decoded)
    assert scored["status"].to_pylist() == [status] * 3
    assert len(engine.tried) == 3 * tries


class Brief:
    """An engine that gives the same assessment of every aspect."""

    def __init__(self, assessment: Assessment) -> None:
        self.assessment = assessment

    async def assess(self, items):
        return [dict.fromkeys(item.aspects, self.assessment) for item in items]


@pytest.mark.parametrize(
    ("answer", "rating", "cut", "note"),
    [
        ("good", "good", False, None),
        ("Good, as", "good", True, "quality: the rating's answer was cut at its limit (scoring.max_rating_tokens)"),
        ("I think", None, False, "quality: no rating word in the answer 'I think'"),
        (
            "I think",
            None,
            True,
            "quality: no rating word in the answer 'I think', which was cut at its limit (scoring.max_rating_tokens)",
        ),
    ],
)
async def test_a_rating_that_is_cut_is_noted_in_the_row(tmp_path, answer, rating, cut, note):
    settings = config("scoring.aspects=quality")
    (decoded,) = batches(write_corpus(tmp_path / "in", 1), settings)
    engine = Brief(Assessment("Sharp.", rating, answer, None, 10, 3, "stop", rating_cut=cut))
    (row,) = (await Scorer(settings, "f", lambda _: engine).score(decoded)).to_pylist()
    assert (row["status"], row["quality_rating"], row["error"]) == ("ok", rating, note)
    assert row["quality_finish_reason"] == "stop"


class Died(BaseException):
    """In place of the end of a process."""


class Called:
    """The answer of a call to an actor, at once."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __await__(self):
        yield from ()
        return self.value


class Near:
    """A handle of an actor that is in this process."""

    def __init__(self, actor: object) -> None:
        self._actor = actor

    def __getattr__(self, name: str):
        method = getattr(self._actor, name)
        return types.SimpleNamespace(remote=lambda *args: Called(method(*args)))


@pytest.fixture
def without_ray(monkeypatch):
    """The actor in this process; where it would end the process it raises `Died`."""

    def end(code: int) -> None:
        raise Died

    context = types.SimpleNamespace(get_actor_id=lambda: "a")
    near = types.SimpleNamespace(get=lambda answer: answer.value, get_runtime_context=lambda: context)
    monkeypatch.setattr(m3agiqa.actor, "ray", near)
    monkeypatch.setattr(m3agiqa.engine.simulated.os, "_exit", end)


async def score(board: Board, settings: RunConfig, rows: list[pa.Table]) -> tuple[list[pa.Table], int]:
    """Scores batches as Ray does: an actor that dies is started anew with the same batch. Returns the deaths too."""
    found, deaths = [], 0
    actor = m3agiqa.actor.ScorerActor(settings, "f", Near(board), False)
    for batch in rows:
        while True:
            try:
                found += [scored async for scored in actor(batch)]
                break
            except Died:
                deaths += 1
                actor = m3agiqa.actor.ScorerActor(settings, "f", Near(board), False)
    return found, deaths


@pytest.mark.parametrize("poison", [0, 13, 15, 21])
async def test_a_row_that_kills_engines_is_found_and_the_others_are_scored_in_order(tmp_path, without_ray, poison):
    settings = config("ray.batch_size=8", f"engine.simulated_poison=number {poison}.")
    rows = batches(write_corpus(tmp_path / "in", 24), settings)
    board = Board()
    scored, deaths = await score(board, settings, rows)
    table = pa.concat_tables(scored)
    assert board.snapshot()["statuses"] == {"ok": 23, "failed": 1}
    assert table["id"].to_pylist() == [f"row {i}" for i in range(24)]
    assert table["status"].to_pylist() == ["failed" if i == poison else "ok" for i in range(24)]
    assert "alone" in table["error"][poison].as_py()
    assert deaths == 6  # twice all eight, then four, two, and one twice


async def test_engines_that_die_whatever_is_in_them_end_the_run(tmp_path, without_ray):
    settings = config("ray.batch_size=2", "engine.simulated_poison=fox")
    board = Board()
    with pytest.raises(RunBroken, match="no row was scored in between"):
        await score(board, settings, batches(write_corpus(tmp_path / "in", 24), settings))
    assert isinstance(board.refusal(), RunBroken)


def test_engines_that_die_while_they_are_loaded_end_the_run(without_ray, monkeypatch):
    def die(*arguments: object) -> None:
        raise Died

    monkeypatch.setattr(m3agiqa.actor, "Scorer", die)
    settings, board = config("ray.batch_size=2"), Board()
    for _ in range(8):
        with pytest.raises(Died):
            m3agiqa.actor.ScorerActor(settings, "f", Near(board), False)
    with pytest.raises(RunBroken, match="while it was loaded; look at the node's memory"):
        m3agiqa.actor.ScorerActor(settings, "f", Near(board), False)
    assert isinstance(board.refusal(), RunBroken)


async def test_nothing_more_is_scored_where_the_run_is_to_end(tmp_path, without_ray):
    settings, board = config(), Board()
    board.refuse(UserError("a", "b", "c"))
    assert await score(board, settings, batches(write_corpus(tmp_path / "in", 3), settings)) == ([], 0)


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "--output {out}"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "{out}/scores/0.parquet"), "--output {out}"),
        (OSError(errno.ENOSPC, "No space left on device", "/tmp/ray/spilled/0"), "/tmp/ray/spilled/0"),
        (OSError(errno.ENOSPC, "No space left on device", "{out}-2/x"), "{out}-2/x"),
        (ray.exceptions.OutOfDiskError(), "the disk of a node"),
    ],
)
def test_a_full_disk_is_one_line_that_names_it_and_leaves_the_folder_free(tmp_path, monkeypatch, error, named):
    out = str(tmp_path / "out")
    if isinstance(error, OSError) and error.filename:
        error.filename = error.filename.format(out=out)

    def full(self, manifest):
        # As it comes from a task: the text of an error, in that of another.
        raise RuntimeError(f"a task failed:\n{type(error).__name__}: {error}")

    monkeypatch.setattr(Output, "write_manifest", full)
    with pytest.raises(RunBroken, match=r"there is no space left on .*; make room; the same command goes on") as caught:
        run_scoring(config(), write_corpus(tmp_path / "in", 2), out)
    assert caught.value.value.startswith(named.format(out=out))
    assert not (tmp_path / "out" / LEASE).exists()


def what_kills_it() -> int:
    """The signal that the system sends this process when its parent is gone; 0: none."""
    found = ctypes.c_int()
    ctypes.CDLL(None).prctl(2, ctypes.byref(found))  # PR_GET_PDEATHSIG
    return found.value


def test_an_engines_process_ends_with_rays_daemon_on_its_node(local_ray):
    def actor() -> int:
        m3agiqa.actor.end_with_node()
        return what_kills_it()

    assert ray.get(ray.remote(num_cpus=0)(actor).remote()) == signal.SIGKILL


def test_a_process_that_ray_did_not_start_is_not_tied_to_its_parent():
    before = what_kills_it()
    m3agiqa.actor.end_with_node()
    assert what_kills_it() == before
