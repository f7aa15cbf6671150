"""`m3agiqa ablate` and `m3agiqa cross-evaluate` from captured sets to tables."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from m3agiqa.ablate_config import AblateConfig
from m3agiqa.ablation.run import ablate
from m3agiqa.ablation.variations import variations
from m3agiqa.cli import main
from m3agiqa.cross_evaluate import cross_evaluate
from m3agiqa.errors import UserError
from m3agiqa.settings import dump_config, load
from tests.ablation.helpers import QUALITY, QUICK, captured, settings, talks

ROOT = Path(__file__).parent.parent.parent


def results(uris, out, *more, **options):
    said = []
    found = ablate(settings(*more), uris, out, QUALITY, say=said.append, **options)
    return found, said


def by_name(found):
    return {row["name"]: row for row in found["variations"]}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return captured(tmp_path_factory.mktemp("captured") / "own", talks(150, prompts=75))


def test_the_shipped_configuration_compares_what_it_says():
    config = load(AblateConfig, ROOT / "configs" / "ablate.yaml")
    assert {one.factor for one in variations(config, ("own",))} == {
        None,
        "rounds",
        "capture",
        "head",
        "pooling",
        "loss",
    }
    assert config.measure.seeds == 5


def test_the_configuration_is_read_back_as_it_is_written(tmp_path):
    config = settings("vary.head=[gru]")
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load(AblateConfig, tmp_path / "c.yaml") == config


def test_what_a_head_is_not_shown_it_cannot_learn(own, tmp_path):
    found, said = results(
        {"own": own},
        tmp_path / "out",
        "base.head=ridge",
        "vary.rounds=[none, description]",
        "vary.capture=[rating_probs]",
        "vary.pooling=[last]",
    )
    rows = by_name(found)
    assert rows["base"]["test"]["srcc"]["mean"] > 0.7
    assert rows["rounds=none"]["difference"]["verdict"] == "worse"
    assert abs(rows["rounds=none"]["test"]["srcc"]["mean"]) < 0.5
    assert rows["rounds=description"]["test"]["srcc"]["mean"] > rows["base"]["test"]["srcc"]["mean"]
    assert rows["capture=rating_probs"]["parameters"] == 6
    assert len(said) == 10
    assert found["images"]["test"] >= 30
    assert not (tmp_path / "out" / "states").exists()


def test_every_head_and_loss_trains_and_the_same_command_goes_on(own, tmp_path):
    more = ("vary.head=[lstm, gru, transformer, mlp, ridge]", "vary.loss=[mse, margin]")
    out = tmp_path / "out"
    found, said = results({"own": own}, out, *more)
    assert len(said) == 16
    files = sorted((out / "cells").glob("*.json"))
    assert len(files) == 16
    table = pq.read_table(out / "results.parquet").to_pylist()
    assert len(table) == 16
    assert {(row["head"], row["loss"]) for row in table if row["variation"] == "head=gru"} == {("gru", "mse+plcc")}
    assert all(row["parameters"] > 0 and row["seconds"] >= 0 for row in table)
    sizes = {name: row["parameters"] for name, row in by_name(found).items()}
    assert len({sizes[f"head={kind}"] for kind in ("lstm", "gru", "transformer", "mlp", "ridge")}) == 5

    kept = {file: file.stat().st_mtime_ns for file in files}
    lost = next(file for file in files if file.name.startswith("head=gru-seed1"))
    lost.unlink()
    again, said = results({"own": own}, out, *more)
    assert [line.partition(":")[0] for line in said] == ["seed 1, head=gru"]
    assert {file: file.stat().st_mtime_ns for file in files if file != lost} == {
        file: at for file, at in kept.items() if file != lost
    }
    for row, before in zip(again["variations"], found["variations"], strict=True):
        assert (row["by_seed"], row.get("difference")) == (before["by_seed"], before.get("difference"))
    assert json.loads((out / "results.json").read_text()) == again

    _, said = results({"own": own}, out, *more, "optim.epochs=1")
    assert len([line for line in said if "ridge" not in line]) == 14


def test_own_and_given_descriptions_are_tested_on_the_same_images(own, tmp_path):
    given = captured(tmp_path / "given", talks(140, prompts=75, noise=0.1, seed=0))
    found, _ = results(
        {"own": own, "given": given}, tmp_path / "out", "base.head=ridge", "vary.descriptions=[given, given/own]"
    )
    rows = by_name(found)
    assert set(rows) == {"base", "descriptions=given/given", "descriptions=given/own"}
    assert found["images"]["train"] + found["images"]["val"] + found["images"]["test"] == 140
    assert rows["descriptions=given/given"]["test"]["srcc"]["mean"] > rows["base"]["test"]["srcc"]["mean"]
    others = [row | {"id": f"i{i:04}"} for i, row in enumerate(talks(140, prefix="x"))]
    uris = {"own": own, "others": captured(tmp_path / "others", others)}
    with pytest.raises(UserError, match="another prompt there"):
        results(uris, tmp_path / "refused", "base.head=ridge", "vary.descriptions=[others]")
    assert not (tmp_path / "refused").exists()


def command(name, *inputs, out, label="quality=mos_quality", more=()):
    told = [part for one in inputs for part in ("--input", one)]
    return main([name, *told, "--out", str(out), "--label", label, "--set", *QUICK, *more])


def test_the_command_prints_the_table(own, tmp_path, capsys):
    assert command("ablate", f"own={own}", out=tmp_path / "out", more=["vary.head=[ridge, mlp]"]) == 0
    said = capsys.readouterr().out
    assert (tmp_path / "out" / "results.md").read_text() in said
    assert "| head=ridge |" in said


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"label": "quality=mos_qualty", "more": ["vary.head=[gru]"]}, "did you mean mos_quality"),
        ({"more": ["vary.head=[rnn]"]}, "vary.head"),
        ({"more": ["vary.descriptions=[teacher]"]}, "the inputs are own"),
        ({"more": ["vary.capture=[top_k]"]}, "--lm-head"),
        ({"more": ["vary.head=[gru]", "data.split_by=split"]}, "column split"),
        ({"more": ["vary.head=[gru]", "measure.test_share=0.01"]}, "give at least 10"),
        ({"more": ["vary.head=[gru]"], "inputs": ["own=/nowhere"]}, "is no folder"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_work(own, tmp_path, capsys, given, told):
    out = tmp_path / "out"
    inputs = given.pop("inputs", [f"own={own}"])
    assert command("ablate", *inputs, out=out, **given) == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.splitlines()) == 1
    assert not out.exists()


def test_a_folder_with_something_else_is_left_alone(own, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="holds no comparison"):
        results({"own": own}, tmp_path, "vary.head=[mlp]")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_each_set_is_trained_on_and_tested_on(own, tmp_path):
    # Numbered like the other set, as published files are, with other prompts.
    made = [row | {"id": f"i{i:04}"} for i, row in enumerate(talks(120, seed=3, prefix="f", sign=-1.0))]
    flipped = captured(tmp_path / "flipped", made)
    uris, said, out = {"own": own, "flipped": flipped}, [], tmp_path / "out"
    found = cross_evaluate(settings("base.head=ridge"), uris, out, QUALITY, say=said.append)
    srcc = {(one["trained_on"], one["tested_on"]): one["test"]["srcc"]["mean"] for one in found["pairs"]}
    assert srcc["own", "own"] > 0.7
    assert srcc["flipped", "flipped"] > 0.7
    assert srcc["own", "flipped"] < -0.7
    assert srcc["flipped", "own"] < -0.7
    assert Image.open(out / "matrix.png").format == "PNG"
    assert json.loads((out / "matrix.json").read_text()) == found
    assert "| trained on | own | flipped |" in (out / "matrix.md").read_text()
    assert len(said) == 4
    said.clear()
    assert cross_evaluate(settings("base.head=ridge"), uris, out, QUALITY, say=said.append) == found
    assert not said


def test_sets_of_different_models_are_refused(own, tmp_path, capsys):
    from tests.captured_sets import STATES_OF

    other = captured(tmp_path / "other", talks(40), states_of=STATES_OF | {"base": "another"})
    assert command("cross-evaluate", f"own={own}", f"other={other}", out=tmp_path / "out") == 2
    assert "base differs" in capsys.readouterr().err
    assert command("cross-evaluate", f"own={own}", out=tmp_path / "out") == 2
    assert "give two or more" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
