"""`m3agiqa evaluate` as a user runs it: what it writes, what it says, and what it refuses."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from m3agiqa.aspects import Aspect
from m3agiqa.cli import main
from m3agiqa.evaluate import evaluate
from m3agiqa.evaluation.gather import Request
from m3agiqa.seen import FILE, VALIDATION, seen, union
from tests.evaluation.evaluating import labelled, write

LABELS = ["--label", "quality=mos_q", "authenticity=mos_a", "correspondence=mos_c"]
QUALITY = {Aspect.QUALITY: "mos_q"}
TRUTH = ("id", "image_path", "prompt", "generator", "mos_q", "mos_a", "mos_c")
SCORES = ("id", "image_path", "quality_mos", "quality_mos_low", "quality_mos_high", "quality_rating")


def named(result, name, aspect="quality"):
    return next(one for one in result["aspects"][aspect]["scorers"] if one["name"] == name)


@pytest.fixture(scope="module")
def rows():
    return labelled(160)


@pytest.fixture(scope="module")
def tables(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    return write(folder / "truth.csv", rows, TRUTH), write(folder / "scores.csv", rows, SCORES)


@pytest.fixture(scope="module")
def whole(rows, tmp_path_factory):
    """All aspects from one table, with a split: the folder, the command, and which rows are in the test part."""
    folder = tmp_path_factory.mktemp("whole")
    table = write(folder / "scored.csv", rows)
    tested = np.random.default_rng(1).random(len(rows)) < 0.5
    parts = ["test" if one else "train" for one in tested]
    split = write(folder / "split.csv", [{"id": r["id"], "part": p} for r, p in zip(rows, parts, strict=True)])
    args = ["evaluate", "--scores", table, "--out", str(folder / "out"), *LABELS, "--split", split, "--samples", "100"]
    assert main(args) == 0
    return folder / "out", args, tested


def test_the_folder_holds_figures_errors_plots_and_a_report(whole, rows):
    out, _, tested = whole
    result = json.loads((out / "evaluation.json").read_text())
    test = [row for row, one in zip(rows, tested, strict=True) if one]
    x, y = (np.array([row[name] for row in test]) for name in ("quality_mos", "mos_q"))
    pooled = named(result, "quality_mos")["pooled"]
    assert pooled["srcc"]["value"] == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-8)
    assert pooled["srcc"]["low"] < pooled["srcc"]["value"] < pooled["srcc"]["high"]
    assert pooled["plcc_fitted"]["value"] >= pooled["plcc"]["value"] - 1e-6
    assert named(result, "quality_rating")["words"]["accuracy"]["value"] > 0.4
    blind = {one["name"] for one in result["aspects"]["correspondence"]["scorers"] if one["kind"] == "baseline"}
    names = {"generator mean", "prompt mean", "generator + prompt", "prompt length", "majority word", "copy of quality"}
    assert blind == names
    assert result["aspects"]["quality"]["training_rows"] == 160 - len(test)
    coverage = result["aspects"]["quality"]["intervals"]
    assert coverage["coverage"]["value"] == pytest.approx(np.mean(np.abs(x - y) <= 0.8), abs=0.03)
    assert result["shared_with_training"]["prompts"]["train, test"]["shared"] > 0
    errors = pq.read_table(out / "errors.parquet")
    assert errors["id"].to_pylist() == sorted(row["id"] for row in test)
    assert errors["quality_mos_error"].to_numpy() == pytest.approx(x - y)
    report = (out / "report.md").read_text()
    pictures = re.findall(r"\]\((plots/[^)]+)\)", report)
    assert len(pictures) >= 4 * 3 + 1
    assert all((out / picture).stat().st_size > 2000 for picture in pictures)
    assert all((out / picture.replace(".png", ".svg")).is_file() for picture in pictures)
    assert not re.search(r"\bnan\b", report, re.IGNORECASE)


def test_an_earlier_evaluation_is_replaced_where_the_link_to_it_points(tables, tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    link.symlink_to(real)
    for samples in (100, 101):
        args = ["--truth", tables[0], "--scores", tables[1], "--samples", str(samples), "--no-plots"]
        assert main(["evaluate", *args, "--out", f"file://{link}", "--label", "quality=mos_q"]) == 0
        assert link.is_symlink()
        assert json.loads((real / "evaluation.json").read_text())["bootstrap"]["samples"] == samples


def test_the_same_input_gives_the_same_bytes(whole, tmp_path):
    out, args, _ = whole
    before = (out / "evaluation.json").read_bytes()
    assert main([*args, "--no-plots"]) == 0
    assert (out / "evaluation.json").read_bytes() == before
    assert not (out / "plots").exists()


def test_other_scorers_are_compared_on_the_same_rows(tables, rows, tmp_path, capsys):
    truth, scores = tables
    worse = [{"id": row["id"], "score": 10 * (row["quality_mos"] + 2 * np.sin(i))} for i, row in enumerate(rows)]
    other = write(tmp_path / "other.csv", worse[:150][::-1])
    out = tmp_path / "out"
    args = ["evaluate", "--truth", truth, "--scores", scores, "--label", "quality=mos_q", "--out", str(out)]
    assert main([*args, "--other", f"rival={other}:score", "--samples", "200", "--no-plots"]) == 0
    result = json.loads((out / "evaluation.json").read_text())
    rival = named(result, "rival")
    assert rival["rows"] == 150
    assert rival["pooled"]["rmse"]["value"] is None
    assert "scale" in rival["pooled"]["rmse"]["reason"]
    assert rival["pooled"]["rmse_fitted"]["value"] > 0
    assert rival["note"].startswith("10 of 160 rows have no score of it (i0150, i0151, i0152, i0153, i0154, ...)")
    (compared,) = (one for one in result["aspects"]["quality"]["comparisons"] if one["theirs"] == "rival")
    assert compared["rows"] == 150
    assert compared["differences"]["srcc"]["holds_up"]
    assert compared["differences"]["srcc"]["low"] > 0


def test_scores_join_by_image_name_and_what_is_unmatched_is_named(tables, rows, tmp_path):
    scored = [row | {"image_path": f"/elsewhere/{i:04}.png"} for i, row in enumerate(rows)]
    scored += [scored[0] | {"image_path": "/elsewhere/unknown.png"}]
    file = write(tmp_path / "s.csv", scored[3:], ("image_path", "quality_mos"))
    result = evaluate(Request(file, str(tmp_path / "out"), truth=tables[0], labels=QUALITY, samples=100, plots=False))
    assert result["aspects"]["quality"]["rows"] == 157
    assert any(note.startswith("3 of 160 human scores have no score (0000.png, 0001.png") for note in result["notes"])
    assert any("1 of 158 scored rows have no human score (unknown.png)" in note for note in result["notes"])


def test_baselines_say_what_they_were_fitted_on(tables, rows, tmp_path):
    """Scores of the test part alone, with human scores passed through: no row of the training part is there."""
    parts = [row | {"part": "test" if i % 4 else "train"} for i, row in enumerate(rows)]
    split = write(tmp_path / "split.csv", parts, ("id", "part"))
    alone = write(tmp_path / "s.csv", [row for row in parts if row["part"] == "test"])
    options = {"split": split, "labels": QUALITY, "samples": 100, "plots": False}
    unfitted, fitted = (
        evaluate(Request(alone, str(tmp_path / "out"), truth=truth, **options)) for truth in (None, tables[0])
    )
    assert fitted["aspects"]["quality"]["baselines"] == "fitted on the training part"
    assert unfitted["aspects"]["quality"]["baselines"] == "fitted in five folds of these rows"
    note = "no row of the training part has a mos_q here: baselines are not fitted on that part"
    assert note in unfitted["notes"]
    assert note not in fitted["notes"]


def test_another_scale_is_brought_to_ours(tables, rows, tmp_path):
    percent = [row | {"mos_q": row["mos_q"] * 20} for row in rows]
    truth = write(tmp_path / "t.csv", percent, TRUTH)
    options = {"labels": QUALITY, "samples": 100, "plots": False}
    ours = evaluate(Request(tables[1], str(tmp_path / "a"), truth=tables[0], **options))
    theirs = evaluate(Request(tables[1], str(tmp_path / "b"), truth=truth, scale=(0, 100), **options))
    for metric in ("srcc", "rmse"):
        a, b = (named(one, "quality_mos")["pooled"][metric]["value"] for one in (ours, theirs))
        assert a == pytest.approx(b, abs=1e-6)
    flat = write(tmp_path / "f.csv", [row | {"mos_q": row["mos_q"] / 5} for row in rows], TRUTH)
    doubted = evaluate(Request(tables[1], str(tmp_path / "c"), truth=flat, **options))
    assert any("is --scale right?" in note for note in doubted["notes"])


def test_constant_scores_and_few_rows_are_null_with_a_reason(tables, rows, tmp_path):
    scores = write(tmp_path / "s.csv", [row | {"quality_mos": 3.0} for row in rows[:6]], ("id", "quality_mos"))
    result = evaluate(Request(scores, str(tmp_path / "out"), truth=tables[0], labels=QUALITY, samples=100, plots=False))
    pooled = named(result, "quality_mos")["pooled"]
    assert (pooled["srcc"]["value"], pooled["srcc"]["reason"]) == (None, "all scores are 3")
    assert pooled["rmse"]["value"] > 0
    assert "too few for an interval" in pooled["rmse"]["reason"]
    assert "NaN" not in (tmp_path / "out" / "evaluation.json").read_text()


def test_words_made_from_human_scores_are_noticed(tables, rows, tmp_path):
    words = ("bad", "poor", "fair", "good", "excellent")
    made = [row | {"answer": f"It is {words[min(int(row['mos_q']), 4)]}."} for row in rows]
    scores = write(tmp_path / "s.csv", made, ("id", "answer"))
    request = Request(
        scores,
        str(tmp_path / "out"),
        truth=tables[0],
        labels=QUALITY,
        words={Aspect.QUALITY: "answer"},
        samples=100,
        plots=False,
    )
    result = evaluate(request)
    assert result["aspects"]["quality"]["notes"] == ["answer agrees with the words of mos_q in 100.0%: made from it?"]


def test_a_training_that_met_the_test_set_is_refused_unless_forced(tables, rows, tmp_path, capsys):
    truth, scores = tables
    predictor = tmp_path / "predictor"
    predictor.mkdir()
    seen(["i0007", "x"], [], ["another prompt"]).write(predictor / FILE)
    args = ["--truth", truth, "--scores", scores, "--label", "quality=mos_q", "--out", str(tmp_path / "out")]
    args += ["--predictor", str(predictor), "--samples", "100", "--no-plots"]
    line = refused(capsys, *args)
    assert f"predictor {predictor}: was trained on 1 ids of the evaluated rows (i0007)" in line
    assert "--force" in line
    assert not (tmp_path / "out").exists()
    assert main(["evaluate", *args, "--force"]) == 0
    assert "**Forced: the training has met the test set." in (tmp_path / "out" / "report.md").read_text()
    seen(["y"], [], ["prompt 3"]).write(predictor / FILE)
    capsys.readouterr()
    assert "1 prompts of the evaluated rows" in refused(capsys, *args)
    seen(["y"], [], ["another"]).write(predictor / FILE)
    assert main(["evaluate", *args]) == 0
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["forced"] == []


def refused(capsys, *args):
    """The one line that the command ends with, exit code 2 checked."""
    assert main(["evaluate", *args]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert len(err.splitlines()) == 1, err
    return err


def test_what_cannot_be_evaluated_is_refused(tables, rows, tmp_path, capsys):
    truth, scores = tables
    out = ["--out", str(tmp_path / "out")]
    base = ["--truth", truth, "--scores", scores, *out]
    quality = ["--label", "quality=mos_q"]
    assert "did you mean mos_q" in refused(capsys, *base, "--label", "quality=mos_qq")
    assert "--label: is missing" in refused(capsys, *base)
    assert "has no scores of authenticity" in refused(capsys, *base, "--label", "authenticity=mos_a")
    assert "outside the scale 1 to 2" in refused(capsys, *base, *quality, "--scale", "1", "2")
    for scale in (("5", "0"), ("0", "inf"), ("nan", "5")):
        assert "does not go up" in refused(capsys, *base, *quality, "--scale", *scale)
    assert "--key" in refused(capsys, "--truth", truth, "--scores", odd_ids(tmp_path, rows), *out, *quality)
    twice = write(tmp_path / "twice.csv", [*rows, rows[4]], SCORES)
    assert "'i0004' occurs more than once" in refused(capsys, "--truth", truth, "--scores", twice, *out, *quality)
    percent = write(tmp_path / "p.csv", [row | {"quality_mos": 20 * row["quality_mos"]} for row in rows], SCORES)
    assert "--other" in refused(capsys, "--truth", truth, "--scores", percent, *out, *quality)
    nan = [row | {"quality_mos": "nan" if i == 9 else row["quality_mos"]} for i, row in enumerate(rows)]
    file = write(tmp_path / "n.csv", nan, SCORES)
    assert "1 values of quality_mos are NaN" in refused(capsys, "--truth", truth, "--scores", file, *out, *quality)
    assert "NAME=FILE:COLUMN" in refused(capsys, *base, *quality, "--other", "rival.csv")
    assert "at least 100" in refused(capsys, *base, *quality, "--samples", "10")
    assert "no numbers" not in refused(capsys, *base, "--label", "quality=prompt")
    split = write(tmp_path / "split.csv", [{"id": "i0001", "part": "train"}])
    assert "--part test: " in refused(capsys, *base, *quality, "--split", split)
    assert "add --split" in refused(capsys, *base, *quality, "--part", "val")
    assert "does not exist" in refused(capsys, "--scores", str(tmp_path / "none.csv"), *out, *quality)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    assert "--out s3://bucket/e: is not on this" in refused(capsys, *base[:-2], "--out", "s3://bucket/e", *quality)
    assert "not empty" in refused(capsys, *base[:-2], "--out", str(tmp_path / "full"), *quality)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["mos", "quality_mos", "label", "mos_error", "generator mean", "majority_word"])
def test_a_scorer_whose_name_is_taken_is_refused(tables, tmp_path, capsys, name):
    truth, scores = tables
    out = tmp_path / "out"
    args = ["--truth", truth, "--scores", scores, "--out", str(out), "--label", "quality=mos_q"]
    assert f"--other {name}: would be quality_" in refused(capsys, *args, "--other", f"{name}={truth}:mos_a")
    both = ["--other", f"a={truth}:mos_a", "--other", f"a={truth}:mos_c"]
    assert "a is there already" in refused(capsys, *args, *both)
    assert not out.exists()


def test_columns_that_hold_no_scores_or_words_are_refused(rows, tmp_path, capsys):
    made = pa.Table.from_pylist(rows)
    for name, values in {
        "nothing": pa.nulls(len(rows), pa.float64()),
        "list": pa.array([["good"]] * len(rows)),
        "bytes": pa.array([b"\xff"] * len(rows)),
        "quality_label": made["quality_mos"],
    }.items():
        made = made.append_column(name, values)
    pq.write_table(made, tmp_path / "t.parquet")
    args = ["--scores", str(tmp_path / "t.parquet"), "--out", str(tmp_path / "out"), "--label", "quality=mos_q"]
    assert "--prediction quality=nothing: holds no score" in refused(capsys, *args, "--prediction", "quality=nothing")
    assert "quality_label in errors.parquet" in refused(capsys, *args, "--prediction", "quality=quality_label")
    for name in ("list", "bytes"):
        assert f"the column {name} holds" in refused(capsys, *args, "--words", f"quality={name}")
    assert "--seed -1: is negative" in refused(capsys, *args, "--seed", "-1")
    assert not (tmp_path / "out").exists()


def test_names_of_generators_are_no_formulas(rows, tmp_path):
    made = [row | {"generator": ("$\\frac{$", "a_$b$")[i % 2]} for i, row in enumerate(rows)]
    table = write(tmp_path / "t.csv", made)
    result = evaluate(Request(table, str(tmp_path / "out"), labels=QUALITY, samples=100))
    assert {one["generator"] for one in result["aspects"]["quality"]["generators"]} == {"$\\frac{$", "a_$b$"}
    assert (tmp_path / "out" / "plots" / "quality-generators.png").is_file()


def odd_ids(folder, rows):
    columns = ("id", "quality_mos")
    return write(folder / "odd.csv", [row | {"id": f"other-{row['id']}"} for row in rows], columns)


def write_run(folder, rows, predictor=None, **more):
    """As `make demo` leaves one: human scores passed through, some rows not ok, some aspects not judged."""
    (folder / "scores").mkdir(parents=True)
    made = [
        row | {"status": "ok" if i % 10 else "failed", "quality_rating_score": row["quality_mos"]}
        for i, row in enumerate(rows)
    ]
    table = pa.Table.from_pylist(
        [{k: v for k, v in row.items() if k != "image_path"} | {"image": "x.png"} for row in made]
    )
    pq.write_table(table, folder / "scores" / "part-0.parquet")
    config = {"predictor": {"path": predictor}}
    manifest = {"fingerprint": "f0", "fingerprint_parts": {}, "config": config, "input": "x"} | more
    (folder / "run.json").write_text(json.dumps(manifest))
    return folder


def test_an_adapter_that_met_the_test_set_is_refused_as_a_predictor_is(rows, tmp_path, capsys):
    predictor = tmp_path / "predictor"
    predictor.mkdir()
    seen(["i0002"], [], []).write(predictor / FILE)
    folder = write_run(tmp_path / "run", rows, str(predictor))
    union([seen(["x"], [], []), seen(["i0003", "i0010"], [], [], VALIDATION)]).write(folder / FILE)
    args = ["--scores", str(folder), "--label", "quality=mos_q", "--out", str(tmp_path / "out")]
    args += ["--samples", "100", "--no-plots"]
    assert f"predictor {predictor}: was trained on 1 ids of" in refused(capsys, *args)
    seen(["x"], [], []).write(predictor / FILE)
    # i0010 is not ok, and not evaluated.
    assert f"adapter of {folder}: was trained on 1 ids of the evaluated rows (i0003)" in refused(capsys, *args)
    assert main(["evaluate", *args, "--force"]) == 0
    mark = "The adapter was trained on 1 ids of the evaluated rows (i0003)"
    assert f"the training has met the test set. {mark}. These" in (tmp_path / "out" / "report.md").read_text()
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["forced"] == [mark]


@pytest.mark.parametrize(
    ("said", "more", "note"),
    [
        ((), {}, "what the scorer was trained on is not known"),
        (("predictor",), {}, None),
        (("run",), {}, "what the predictor PREDICTOR was trained on is not known"),
        (("predictor", "run"), {"silent_adapters": ["b_1"]}, "what the adapter b_1 was trained on is not known"),
        (
            ("predictor",),
            {"fingerprint_parts": {"model": {"adapters": {"quality": "1"}}}},
            "what the adapter of the run",
        ),
    ],
)
def test_what_is_not_known_of_a_training_is_noted(rows, tmp_path, said, more, note):
    (tmp_path / "predictor").mkdir()
    folder = write_run(tmp_path / "run", rows, str(tmp_path / "predictor"), **more)
    for name in said:
        seen(["x"], [], []).write(tmp_path / name / FILE)
    notes = evaluate(Request(str(folder), str(tmp_path / "out"), labels=QUALITY, samples=100, plots=False))["notes"]
    found = [one for one in notes if "not known" in one]
    assert len(found) == (note is not None)
    assert all(one.startswith(note.replace("PREDICTOR", str(tmp_path / "predictor"))) for one in found)


def test_a_run_is_evaluated_by_its_own_columns(rows, tmp_path):
    folder = write_run(tmp_path / "run", rows)
    result = evaluate(Request(str(folder), str(tmp_path / "out"), labels=QUALITY, samples=100, plots=False))
    assert result["fingerprint"] == "f0"
    assert result["aspects"]["quality"]["rows"] == 144
    names = [one["name"] for one in result["aspects"]["quality"]["scorers"] if one["kind"] == "model"]
    assert names == ["quality_mos", "quality_rating_score", "quality_rating"]
    assert result["aspects"]["quality"]["baselines"] == "fitted in five folds of these rows"
