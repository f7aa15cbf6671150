"""What a training has met, as it is written, read again, joined, and carried along by a run."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m3agiqa.config import load_config
from m3agiqa.errors import UserError
from m3agiqa.models import adapter_beside, model_folder
from m3agiqa.pipeline import trainings_of
from m3agiqa.seen import FILE, KINDS, TRAIN, VALIDATION, read, seen, union
from tests.adapters.adapter_helpers import edited


def both():
    learnt = seen(["a", "b"], ["1" * 64, None], ["shared", "p"])
    return union([learnt, None, seen(["v"], ["2" * 64], ["shared", None], VALIDATION)])


def test_each_part_is_written_and_read_again(tmp_path):
    both().write(tmp_path / FILE)
    found = read(tmp_path)
    assert found.met("id", ["v", "a", "never", None, "a"]) == ["v", "a"]
    assert found.met("id", ["v", "a"], TRAIN) == ["a"]
    assert found.met("image", ["1" * 64, "2" * 64], VALIDATION) == ["2" * 64]
    # A prompt may be in both, where images are split one by one.
    assert [found.met("prompt", ["shared", "p"], part) for part in (TRAIN, VALIDATION)] == [["shared", "p"], ["shared"]]
    assert found.met("id", ["a"], "no such part") == []


def test_a_file_without_parts_is_all_of_the_train_part(tmp_path):
    values = seen(["a"], [], ["p"]).hashes[TRAIN]
    rows = [{"kind": kind, "hash": int(one)} for kind in KINDS for one in values[kind]]
    schema = pa.schema({"kind": pa.string(), "hash": pa.uint64()})
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / FILE)
    assert read(tmp_path).met("id", ["a", "b"], TRAIN) == ["a"]
    assert read(tmp_path).met("prompt", ["p"], VALIDATION) == []


def test_of_nothing_nothing_is_known(tmp_path):
    assert read(tmp_path) is None
    assert read(tmp_path / "none") is None
    assert union([None, None]) is None
    seen([], [], []).write(tmp_path / FILE)
    assert read(tmp_path).met("id", ["a"]) == []
    (tmp_path / FILE).write_bytes(b"half a fi")
    with pytest.raises(UserError, match=r"trained_on.parquet: cannot be read .*copy that folder again"):
        read(tmp_path)


def test_a_run_knows_what_the_adapters_that_judge_were_trained_on(tmp_path):
    for aspect in ("quality", "authenticity", "correspondence"):
        edited(adapter_beside(model_folder(load_config(None, []).model)), tmp_path / aspect, revision=aspect)
        (tmp_path / aspect / FILE).unlink()
    both().write(tmp_path / "quality" / FILE)
    seen(["c"], [], []).write(tmp_path / "correspondence" / FILE)
    named = [f"model.adapters.{aspect}={tmp_path / aspect}" for aspect in ("quality", "authenticity", "correspondence")]
    met, silent = trainings_of(load_config(None, [*named, "scoring.aspects=quality,authenticity"]))
    assert met.met("id", ["a", "v", "c"]) == ["a", "v"]
    assert [name.partition("_")[0] for name in silent] == ["authenticity"]
    assert trainings_of(load_config(None, ["model.adapters=null"])) == (None, [])
    assert trainings_of(load_config(None, ["engine.kind=simulated"])) == (None, [])


def test_the_shipped_adapter_says_what_it_was_trained_on():
    met, silent = trainings_of(load_config(None, ["model.path=tiny"]))
    assert not silent
    assert met.met("prompt", ["three white cones on a green meadow"])
