"""The predictor in a run: its scores in the rows, and predictors that are for something else."""

import asyncio
import json
import shutil

import numpy as np
import pytest
import torch

from m3agiqa.aspects import Aspect
from m3agiqa.config import load_config
from m3agiqa.errors import UserError
from m3agiqa.models import model_digest, predictor_folder
from m3agiqa.opinions import Opinions, check_predictor, with_states
from m3agiqa.pipeline import run_scoring
from m3agiqa.predictor import load
from m3agiqa.predictor.lm_head import LMHead
from m3agiqa.predictor.published import import_predictor
from m3agiqa.predictor.states import decode as decode_states
from m3agiqa.runs import Output, fingerprint_parts
from m3agiqa.tiny.architecture import Size, write_random_model
from tests.corpora import write_corpus
from tests.predictor.reference import Reference

TINY = ("model.path=tiny", "model.dtype=float32", "engine.kind=transformers", "scoring.max_description_tokens=64")


def config_for(*more):
    return load_config(None, [*TINY, *more])


@pytest.fixture
def embedded(tmp_path):
    """A copy of the embedded predictor, and a way to change its sheet."""
    folder = tmp_path / "predictor"
    shutil.copytree(predictor_folder(config_for()), folder)

    def change(edit=lambda sheet: None):
        file = folder / "predictor.json"
        sheet = json.loads(file.read_text())
        edit(sheet)
        file.write_text(json.dumps(sheet))
        return f"predictor.path={folder}"

    return change


@pytest.mark.slow
def test_rows_have_the_predictors_scores_and_intervals(demo_corpus, local_ray, tmp_path):
    config = config_for("capture.kind=states", "capture.write=true")
    done = run_scoring(config, f"{demo_corpus}/manifest.csv", str(tmp_path / "out"))
    assert set(done.counts) == {"ok"}
    assert done.engine["predictor_seconds"] > 0
    predictor = load(predictor_folder(config))
    for row in Output(str(tmp_path / "out")).rows().to_pylist():
        for column, aspect in enumerate(predictor.outputs):
            if row[f"{aspect}_states"] is None:
                assert row[f"{aspect}_mos"] is None
                continue
            states = decode_states(row[f"{aspect}_states"], row[f"{aspect}_tokens"])
            mos = predictor.predict_all([states])
            low, high = (float(end[0, column]) for end in predictor.intervals(mos))
            # What is written is rounded to bfloat16, what was predicted from is not.
            assert row[f"{aspect}_mos"] == pytest.approx(float(mos[0, column]), abs=0.05)
            assert row[f"{aspect}_mos_low"] == pytest.approx(low, abs=0.05)
            assert row[f"{aspect}_mos_high"] == pytest.approx(high, abs=0.05)
            assert 0 <= row[f"{aspect}_mos_low"] <= row[f"{aspect}_mos"] <= row[f"{aspect}_mos_high"] <= 5


def test_a_run_with_a_predictor_captures_states_and_one_without_does_not():
    assert with_states(config_for()).capture.kind == "states"
    assert with_states(config_for("predictor.path=null")).capture.kind == "none"
    with pytest.raises(UserError, match=r"capture\.kind=top_k.*a predictor reads states"):
        with_states(config_for("capture.kind=top_k"))


@pytest.mark.parametrize(
    "other", ["model.adapters=x", "scoring.conversation=published", "corpus.text_only=true", "engine.kind=simulated"]
)
def test_the_embedded_predictor_is_taken_only_where_it_fits(other):
    assert predictor_folder(config_for()) is not None
    assert predictor_folder(config_for(other)) is None


def test_the_predictor_is_part_of_the_fingerprint():
    parts = fingerprint_parts(config_for())
    assert parts["predictor"] == model_digest(predictor_folder(config_for()))
    assert "predictor" not in fingerprint_parts(config_for("predictor.path=null"))


def test_a_predictor_of_another_model_is_refused(embedded):
    path = embedded(lambda sheet: sheet["states_of"].update(base="0123456789abcdef"))
    with pytest.raises(UserError, match=r"trained on states of another model.*base is '.*' and was '0123456789abcdef'"):
        check_predictor(config_for(path))


def test_what_was_judged_beside_does_not_matter(embedded):
    check_predictor(config_for(embedded(), "scoring.aspects=quality"))


def test_a_predictor_of_other_aspects_is_refused(embedded):
    def rename(sheet):
        sheet["head"]["outputs"], sheet["calibration"] = ["a", "b", "c"], {}
        sheet["affine"] = dict(zip("abc", sheet["affine"].values(), strict=True))

    path = embedded(rename)
    with pytest.raises(UserError, match=r"is for a, b, c, but the run judges quality, correspondence, authenticity"):
        check_predictor(config_for(path))


def test_a_predictor_of_logits_is_refused(embedded):
    path = embedded(lambda sheet: sheet["head"].update(takes="logits"))
    with pytest.raises(UserError, match=r"takes logits, not states.*--lm-head"):
        check_predictor(config_for(path))


def test_scores_of_another_scale_become_0_to_5(embedded):
    from m3agiqa.records import Assessment, Captured

    width = load(predictor_folder(config_for())).head.config.input_width
    states = torch.from_numpy(np.random.default_rng(0).normal(size=(30, width)).astype(np.float32))
    judged = {Aspect.QUALITY: Assessment("", None, "", None, 30, 0, "stop", Captured(states))}

    def mos(path):
        return asyncio.run(Opinions(config_for(path)).of([judged]))[0][Aspect.QUALITY].mos

    usual = mos("predictor.path=auto")
    assert 0 < usual < 5
    assert mos(embedded(lambda sheet: sheet.update(scale=[-5.0, 15.0]))) == pytest.approx((usual + 5) / 4, abs=1e-5)


def random_model(folder, *, seed=0, width=48):
    size = Size(
        image_size=64, vision_width=48, vision_layers=1, vision_mlp=64, vision_heads=2,
        text_width=width, text_layers=1, text_mlp=64, text_head_dim=16,
    )  # fmt: skip
    return write_random_model(folder, size, vocabulary=512, seed=seed)


def imported(model, out, lm_head):
    """The setting that names a predictor of a released checkpoint on the logits of a model."""
    checkpoint = out.with_suffix(".ckpt")
    torch.save(Reference(inputs=len(LMHead.load(model).weight)).lightning(), checkpoint)
    import_predictor(checkpoint, out, lm_head=str(lm_head))
    return f"predictor.path={out}"


def test_an_imported_predictor_is_for_the_model_that_it_was_folded_onto(tmp_path):
    model, other = (random_model(tmp_path / f"model {seed}", seed=seed) for seed in (0, 1))
    predictor = imported(model, tmp_path / "predictor", model)
    aspects = "scoring.aspects=quality"
    check_predictor(config_for(f"model.path={model}", predictor, aspects))
    assert load(tmp_path / "predictor").states_of == {"base": model_digest(model), "hidden": "48"}
    with pytest.raises(UserError, match=r"imported for states of another model.*base is .*--lm-head") as caught:
        check_predictor(config_for(f"model.path={other}", predictor, aspects))
    assert "\n" not in str(caught.value)
    # Before any work: the output is not even made.
    with pytest.raises(UserError, match="imported for states of another model"):
        run_scoring(
            config_for(f"model.path={other}", predictor, aspects),
            write_corpus(tmp_path / "c", 2),
            str(tmp_path / "out"),
        )
    assert not (tmp_path / "out").exists()


def test_a_predictor_that_does_not_say_its_model_is_refused_by_one_of_another_width(tmp_path):
    model, same, wide = (
        random_model(tmp_path / name, seed=i, width=width)
        for i, (name, width) in enumerate((("model", 48), ("same", 48), ("wide", 64)))
    )
    predictor = imported(model, tmp_path / "predictor", model / "model.safetensors")
    assert load(tmp_path / "predictor").states_of == {}
    check_predictor(config_for(f"model.path={same}", predictor, "scoring.aspects=quality"))
    with pytest.raises(
        UserError, match=r"takes states of 48 numbers a token, but the model's have 64; import"
    ) as caught:
        check_predictor(config_for(f"model.path={wide}", predictor, "scoring.aspects=quality"))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="but the model's have"):
        check_predictor(config_for("engine.kind=simulated", predictor, "scoring.aspects=quality"))


def test_a_missing_predictor_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"holds no predictor\.json"):
        check_predictor(config_for(f"predictor.path={tmp_path}"))


def test_a_row_without_states_has_no_score():
    assert asyncio.run(Opinions(config_for()).of([{}])) == [{}]
