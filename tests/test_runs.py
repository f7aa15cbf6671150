import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import m3agiqa.tiny
from m3agiqa.config import RunConfig, load_config
from m3agiqa.errors import UserError
from m3agiqa.opinions import with_states
from m3agiqa.pipeline import run_scoring
from m3agiqa.runs import (
    Manifest,
    Output,
    differences,
    engine_line,
    fingerprint,
    fingerprint_parts,
    predictor_line,
    status_line,
)
from m3agiqa.tiny.architecture import write_random_model
from tests.corpora import encode, picture


def manifest_for(*overrides: str) -> Manifest:
    config = load_config(None, ["engine.kind=simulated", *overrides])
    parts = fingerprint_parts(config)
    return Manifest(fingerprint(parts), parts, config.model_dump(mode="json"), "in")


def begin(output: Output, manifest: Manifest) -> None:
    """What a run does first."""
    output.check(manifest)
    output.make()
    output.write_manifest(manifest)


@pytest.mark.parametrize(
    "override",
    [
        "scoring.aspects=quality",
        "scoring.conversation=published",
        "scoring.max_description_tokens=9",
        "images.max_side=64",
    ],
)
def test_whatever_decides_a_score_changes_the_fingerprint(override):
    assert manifest_for(override).fingerprint != manifest_for().fingerprint


@pytest.mark.parametrize("override", ["ray.batch_size=3", "corpus.prompt_column=caption", "engine.batch_size=2"])
def test_what_does_not_decide_a_score_leaves_it(override):
    assert manifest_for(override).fingerprint == manifest_for().fingerprint


def test_another_weight_is_another_fingerprint(tmp_path):
    one = write_random_model(tmp_path / "a", seed=1)
    two = write_random_model(tmp_path / "b", seed=2)
    prints = [
        fingerprint(fingerprint_parts(load_config(None, ["engine.kind=transformers", f"model.path={p}"])))
        for p in (one, one, two)
    ]
    assert prints[0] == prints[1] != prints[2]


def test_a_large_file_is_told_apart_by_a_change_in_its_middle(tmp_path):
    from m3agiqa.models import model_digest

    size = 70 * 2**20
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"\0" * size)
    before = model_digest(tmp_path)
    with file.open("r+b") as stream:
        stream.seek(size // 2)
        stream.write(b"\1" * 2**21)
    assert model_digest(tmp_path) != before


def test_another_fingerprint_is_refused_by_name_and_nothing_is_changed(tmp_path):
    output = Output(str(tmp_path / "out"))
    begin(output, manifest_for())
    begin(output, manifest_for("scoring.max_description_tokens=9"))  # nothing is written yet
    begin(output, manifest_for())
    pq.write_table(pa.table({"status": ["ok"]}), tmp_path / "out" / "scores" / "0.parquet")
    before = (tmp_path / "out" / "run.json").read_text()
    with pytest.raises(UserError, match=r"scoring\.max_description_tokens"):
        output.check(manifest_for("scoring.max_description_tokens=9"))
    assert (tmp_path / "out" / "run.json").read_text() == before
    begin(output, manifest_for())


@pytest.mark.parametrize(
    ("part", "setting", "named"),
    [("adapter", "model.adapters", r"model\.adapters\.quality"), ("predictor", "predictor.path", "predictor")],
)
def test_another_adapter_or_predictor_may_not_go_on_with_an_output(tmp_path, part, setting, named):
    """Of the same name, and one bit apart."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.png").write_bytes(encode(picture()))
    mine, out = tmp_path / part, Output(str(tmp_path / "out"))
    shutil.copytree(Path(m3agiqa.tiny.__file__).parent / part, mine)
    config = load_config(None, ["engine.kind=transformers", f"{setting}={mine}"])
    begin(out, Manifest(*_printed(config), config.model_dump(mode="json"), str(tmp_path / "in")))
    pq.write_table(pa.table({"id": ["0.png"], "status": ["ok"]}), tmp_path / "out" / "scores" / "0.parquet")
    weights = next(mine.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    before = (tmp_path / "out" / "run.json").read_text()
    with pytest.raises(UserError, match=rf"another fingerprint \(.*\b{named} differs\)"):
        run_scoring(config, str(tmp_path / "in"), out.uri)
    assert (tmp_path / "out" / "run.json").read_text() == before


def _printed(config: RunConfig) -> tuple[str, dict[str, Any]]:
    parts = fingerprint_parts(with_states(config))
    return fingerprint(parts), parts


def test_another_input_is_refused_since_its_ids_may_mean_other_images(tmp_path):
    output = Output(str(tmp_path / "out"))
    begin(output, manifest_for())
    pq.write_table(pa.table({"status": ["ok"]}), tmp_path / "out" / "scores" / "0.parquet")
    with pytest.raises(UserError, match="another input"):
        output.check(dataclasses.replace(manifest_for(), input="elsewhere"))
    with pytest.raises(UserError, match="another input"):
        output.check(manifest_for("corpus.prompt_column=caption"))


def test_columns_that_are_left_out_do_not_make_another_input(tmp_path):
    output = Output(str(tmp_path / "out"))
    begin(output, manifest_for())
    pq.write_table(pa.table({"status": ["ok"]}), tmp_path / "out" / "scores" / "0.parquet")
    output.check(manifest_for('corpus.drop=["extra"]'))


def test_a_run_that_was_killed_before_its_manifest_leaves_the_folder_free(tmp_path):
    output = Output(str(tmp_path / "out"))
    output.make()
    output.check(manifest_for())
    (tmp_path / "out" / "scores" / "mine.txt").touch()
    with pytest.raises(UserError, match="is not empty"):
        output.check(manifest_for())


def test_what_a_killed_run_left_half_written_is_not_read(tmp_path):
    output = Output(str(tmp_path / "out"))
    begin(output, manifest_for())
    pq.write_table(pa.table({"status": ["ok"]}), tmp_path / "out" / "scores" / "a_0-0.parquet")
    (tmp_path / "out" / "scores" / "b_0-0.parquet").write_bytes(b"PAR1 half")
    (tmp_path / "out" / "checkpoint").mkdir()
    (tmp_path / "out" / "checkpoint" / "b_0.pending.parquet").write_bytes(b"")
    assert output.count_by_status() == {"ok": 1}


def test_an_output_that_no_file_system_has_is_refused():
    with pytest.raises(UserError, match="s4://x"):
        Output("s4://x/y")


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        Output(str(tmp_path)).check(manifest_for())
    with pytest.raises(UserError, match="is a file"):
        Output(str(tmp_path / "thesis.txt")).check(manifest_for())


def test_a_broken_manifest_is_refused(tmp_path):
    (tmp_path / "run.json").write_text('{"fingerprint": ')
    with pytest.raises(UserError, match=r"run\.json"):
        Output(str(tmp_path)).check(manifest_for())
    (tmp_path / "run.json").write_text(json.dumps({"other": 1}))
    with pytest.raises(UserError, match=r"run\.json"):
        Output(str(tmp_path)).read_manifest()


def test_counts_come_from_the_files(tmp_path):
    output = Output(str(tmp_path / "out"))
    begin(output, manifest_for())
    assert output.count_by_status() == {}
    with pytest.raises(UserError, match="holds no scores"):
        output.rows()
    for i, statuses in enumerate((["ok", "ok", "rejected"], ["ok", "failed"])):
        pq.write_table(pa.table({"status": statuses}), tmp_path / "out" / "scores" / f"{i}.parquet")
    assert output.count_by_status() == {"ok": 3, "rejected": 1, "failed": 1}
    assert status_line(output.count_by_status()) == "5 rows: 3 ok, 1 rejected, 1 failed"


def test_the_engine_is_summed_up_in_a_line():
    totals = {
        "prompt_tokens": 58112.0,
        "prefix_cache_queries": 100.0,
        "prefix_cache_hits": 61.0,
        "generated_tokens": 9.0,
    }
    assert engine_line(totals) == "58,112 prompt tokens (61% from the prefix cache), 9 generated"
    encoded = engine_line(totals | {"images": 40.0, "encoded_images": 42.0})
    assert encoded == "58,112 prompt tokens (61% from the prefix cache, 1.05 encodings an image), 9 generated"
    assert engine_line({"images": 3.0}) is None


def test_differences_name_what_changed():
    assert differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 9}, "e": 3}) == ["a.c", "d", "e"]


def test_the_engines_queue_is_reported():
    line = engine_line({"prompt_tokens": 10.0, "steps": 4.0, "running_requests": 40.0, "waiting_requests": 8.0})
    assert line == "10 prompt tokens, 0 generated; per engine 10 requests at work and 2 queued on average"


def test_the_predictors_share_of_the_run_is_reported():
    # Two engines at once, of which one was up for 150 s and the other for 50 s.
    engine = {"predictor_seconds": 3.0, "images": 100.0, "engines": 2.0, "engine_seconds": 200.0}
    manifest = Manifest("f", {}, {}, "in", engine=engine, images_per_second=1.0)
    assert predictor_line(manifest) == "3.0 s of work, 1.5% of the time that the engine was up"
    assert predictor_line(Manifest("f", {}, {}, "in", engine={"engine_seconds": 100.0})) is None
