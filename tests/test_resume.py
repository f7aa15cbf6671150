"""What is done, putting a folder in order after a kill, and replacing rows; no cluster."""

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from m3agiqa.errors import UserError
from m3agiqa.id_set import IdSet
from m3agiqa.records import Status
from m3agiqa.replace import finish_replacing, replace_rows, retry_output
from m3agiqa.resume import Todo, done_ids, drop_twice, ids_with, recover
from m3agiqa.runs import Output


def strings(*ids: str) -> pa.Array:
    return pa.array(ids, pa.string())


def write(output: Output, name: str, rows: dict[str, str], score: float = 1.0) -> None:
    """A score file of ids and their statuses."""
    output.make()
    table = pa.table({"id": list(rows), "status": list(rows.values()), "score": [score] * len(rows)})
    pq.write_table(table, f"{output.scores}/{name}.parquet")


def read(output: Output) -> dict[str, tuple[str, float]]:
    rows = output.rows().to_pylist()
    found = {row["id"]: (row["status"], row["score"]) for row in rows}
    assert len(found) == len(rows), "an id is there twice"
    return found


def test_a_set_of_ids_knows_what_is_in_it():
    names = [f"row {i}" for i in range(5000)]
    found = IdSet.of([strings(*names[:2000]), pa.chunked_array([strings(*names[2000:4000])])])
    assert len(found) == 4000
    assert found.contains(pa.array(names)).tolist() == [True] * 4000 + [False] * 1000
    assert found.contains(strings()).tolist() == []
    assert len(found.twice()) == 0


def test_an_empty_set_holds_nothing():
    assert IdSet.of([]).contains(strings("a", "é猫")).tolist() == [False, False]
    assert len(IdSet.of([]).twice()) == 0


def test_ids_that_are_given_twice_are_found_and_named_once():
    found = IdSet.of([strings("a", "b", "c"), strings("b", "c", "c")])
    assert found.twice().contains(strings("a", "b", "c")).tolist() == [False, True, True]
    assert len(found.twice()) == 2
    assert found.contains(strings("a", "b", "c", "d")).tolist() == [True, True, True, False]


def test_a_set_without_another():
    some, asked = IdSet.of([strings("a", "b", "b", "c")]), strings("a", "b", "c", "d")
    assert some.without(IdSet.of([strings("b", "d")])).contains(asked).tolist() == [True, False, True, False]
    assert len(some.without(IdSet.of([]))) == 4
    assert len(IdSet.of([]).without(some)) == len(some.without(some)) == 0


def test_equal_first_halves_do_not_make_ids_equal():
    whole = IdSet.of([strings("a", "b")])
    clash = IdSet(whole.high[[0, 0]], whole.low[[1, 0]])
    assert clash.contains(strings("a", "b")).sum() == 1


def test_rows_that_are_done_are_left_out_one_by_one():
    rows = pa.table({"id": ["a", "b", "c"], "x": [1, 2, 3]})
    assert Todo().select(rows).equals(rows)
    assert Todo(done=IdSet.of([strings("b")])).select(rows)["x"].to_pylist() == [1, 3]
    only = Todo(done=IdSet.of([strings("b")]), only=IdSet.of([strings("a", "b")]))
    assert only.select(rows)["x"].to_pylist() == [1]


def test_a_tar_is_gone_on_with_in_its_middle(tmp_path):
    from m3agiqa.corpus import open_corpus
    from tests.corpora import encode, picture, write_tar

    write_tar(tmp_path / "0.tar", [(f"{i}.png", encode(picture(seed=i))) for i in range(5)])
    (table,) = open_corpus(str(tmp_path / "0.tar")).shards[0].read()
    done = Todo(done=IdSet.of([table["id"].slice(0, 3)]))
    assert done.select(table)["id"].to_pylist() == ["0/3", "0/4"]


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    output = Output(str(tmp_path))
    write(output, "a_0-0", {"1": "ok"})
    (tmp_path / "scores" / "b_0-0.parquet").write_bytes(b"PAR1 half")
    assert not recover(output)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "b_0.pending.parquet").write_bytes(b"")
    assert recover(output)
    assert read(output) == {"1": ("ok", 1.0)}
    assert not list((tmp_path / "checkpoint").iterdir())
    assert not recover(output)


def test_a_file_that_cannot_be_read_is_named_before_any_work(tmp_path):
    output = Output(str(tmp_path))
    write(output, "a", {"1": "ok"})
    (tmp_path / "scores" / "b.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"b\.parquet"):
        done_ids(output)


def test_ids_by_status(tmp_path):
    output = Output(str(tmp_path))
    assert len(ids_with(output, [Status.FAILED])) == len(done_ids(output)) == 0
    write(output, "a", {"1": "ok", "2": "failed"})
    write(output, "b", {"3": "failed", "4": "rejected"})
    asked = strings("1", "2", "3", "4")
    assert ids_with(output, [Status.FAILED]).contains(asked).tolist() == [False, True, True, False]
    assert len(ids_with(output, [Status.FAILED, Status.REJECTED])) == 3
    assert len(done_ids(output)) == 4


def test_rows_that_are_there_twice_are_kept_once(tmp_path):
    output = Output(str(tmp_path))
    write(output, "a", {"1": "ok", "2": "ok"}, score=1.0)
    write(output, "b", {"2": "ok", "3": "ok"}, score=2.0)
    write(output, "c", {"1": "ok", "2": "ok"}, score=3.0)
    assert drop_twice(output, done_ids(output).twice()) == 3
    assert read(output) == {"1": ("ok", 1.0), "2": ("ok", 1.0), "3": ("ok", 2.0)}
    assert drop_twice(output, done_ids(output).twice()) == 0


@pytest.fixture
def retried(tmp_path) -> Output:
    """Two files of old rows, and new ones for two of them."""
    output = Output(str(tmp_path))
    write(output, "a", {"1": "ok", "2": "failed", "3": "ok"})
    write(output, "b", {"4": "ok"})
    write(output, "c", {"5": "failed"})
    write(retry_output(output), "x", {"5": "ok", "2": "ok"}, score=9.0)
    return output


REPLACED = {"1": ("ok", 1.0), "2": ("ok", 9.0), "3": ("ok", 1.0), "4": ("ok", 1.0), "5": ("ok", 9.0)}


def test_new_rows_take_the_place_of_old_ones(retried):
    untouched = retried.read("scores/b.parquet")
    assert read(retried)["2"] == ("failed", 1.0)
    replace_rows(retried)
    assert read(retried) == REPLACED
    assert retried.read("scores/b.parquet") == untouched
    assert retried.read("retry/complete") is None


@pytest.mark.parametrize("files", [0, 1, 2, 3])
def test_a_replacement_that_is_cut_short_anywhere_is_finished_later(retried, files, monkeypatch):
    class Killed(BaseException):
        pass

    whole = Output.write_table

    def write_table(self, path, rows):
        nonlocal files
        if files == 0:
            raise Killed
        files -= 1
        whole(self, path, rows)

    monkeypatch.setattr(Output, "write_table", write_table)
    try:
        replace_rows(retried)
    except Killed:
        monkeypatch.undo()
        assert len(read(retried)) == 5
        finish_replacing(retried)
    assert read(retried) == REPLACED
    assert retried.read("retry/complete") is None


def test_rows_that_are_not_all_there_yet_replace_nothing(retried):
    finish_replacing(retried)
    assert read(retried)["2"] == ("failed", 1.0)
