"""The training's parts: what the eye is to tell, stages that are taken up where they stopped, and a whole run."""

import json
import re

import numpy as np
import pytest
import torch
from torch import nn

from m3agiqa.errors import UserError
from m3agiqa.tiny import runner
from m3agiqa.tiny.architecture import Size, build, train_tokenizer
from m3agiqa.tiny.corpus import Pool, draw_scene
from m3agiqa.tiny.degrade import Damage
from m3agiqa.tiny.eyecode import PART, WHOLE, EyeLoss, directions, whole_of
from m3agiqa.tiny.facts import Facts
from m3agiqa.tiny.pictures import Scene
from m3agiqa.tiny.stages import Plan, drill_lines, prepare_to_compare
from m3agiqa.tiny.train import train
from m3agiqa.tiny.vision import initialise, join, pixel_values

FACTS = Facts(Scene(2, "red", "sphere", "in the snow"), (Damage("blur", 0.7),), (Damage("melted", 0.3),))


@pytest.fixture(scope="module")
def model():
    return build(Size(vision_layers=2, text_layers=1), train_tokenizer(["a red cube"], 600))


def test_the_directions_of_the_code_are_orthonormal():
    code = directions(192)
    assert code.shape == (WHOLE + PART, 192)
    assert torch.allclose(code @ code.T, torch.eye(WHOLE + PART), atol=1e-5)


def test_what_the_code_tells_of_a_picture():
    damaged, whole = whole_of([FACTS, Facts(None)])
    # Severities and losses, the verdicts (blur, melted, both words), and the four items of the scene.
    assert damaged.sum() == pytest.approx(0.7 + 0.7 + 0.3 + 0.3 + 4 + 4, abs=1e-5)
    assert whole.sum() == 1 + 4  # a photograph without damage, and nothing else is known of it


def test_the_eye_loses_nothing_where_it_tells_the_truth(model):
    samples = Pool(1, 20).draw(6, np.random.default_rng(1))
    loss = EyeLoss(model)
    whole, parts, _ = loss.targets(samples)
    true = (whole @ loss.code[:WHOLE])[:, None] + parts @ loss.code[WHOLE:]
    patches = torch.zeros(6, 256, 192)
    right, wrong = loss(patches, true, samples), loss(patches, torch.zeros_like(true), samples)
    for name in ("amounts", "each", "parts", "rest"):
        assert right[name] < 1e-6
    verdicts, items = ("fault", "sign", "quality", "authenticity"), ("count", "colour", "shape", "place")
    for name in ("amounts", "each", "parts", *verdicts, *items):
        assert right[name] < wrong[name]


def test_the_eye_begins_with_some_idea_of_what_it_sees(model):
    pool, rng = Pool(1, 40), np.random.default_rng(2)
    seen, unseen = pool.draw(50, rng), pool.draw(40, rng)
    loss = EyeLoss(model)
    initialise(model, seen)
    whole, parts, _ = loss.targets(seen)
    join(
        model, pixel_values([s.pixels for s in seen]), (whole @ loss.code[:WHOLE])[:, None] + parts @ loss.code[WHOLE:]
    )
    with torch.no_grad():
        tokens = model.model.get_image_features(pixel_values([s.pixels for s in unseen])[:, None]).pooler_output
    told, truth = (tokens @ loss.code[:WHOLE].T).mean(1), loss.targets(unseen)[0]
    lost = told[:, 8], truth[:, 8]
    assert np.corrcoef(*(x.numpy() for x in lost))[0, 1] > 0.2


def test_drill_lines_are_true_and_of_scenes_that_are_not_held_out():
    verdicts, not_held_out = [], {draw_scene(np.random.default_rng(n), held_out=False).text for n in range(6000)}
    for given, said in drill_lines(200, np.random.default_rng(3)):
        shown, asked = re.fullmatch(r"Here: (.+)\. Prompt: (.+)\.", given).groups()
        assert shown in not_held_out
        shown, asked = ({"one" if w == "a" else w.removesuffix("s") for w in t.split()} for t in (shown, asked))
        found = re.findall(r"Asked for (\w+), here (\w+): (same|different)\.", said)
        assert len(found) == 4
        for wanted, here, verdict in found:
            assert wanted.removesuffix("s") in asked
            assert here.removesuffix("s") in shown
            assert (wanted == here) == (verdict == "same")
            verdicts.append(verdict)
    assert 0.35 < verdicts.count("same") / len(verdicts) < 0.65


def test_half_of_the_heads_begin_with_keys_equal_to_queries(model):
    prepare_to_compare(model)
    attention = model.model.text_model.layers[0].self_attn
    half = attention.q_proj.weight.shape[0] // 2
    assert torch.equal(attention.q_proj.weight[:half], attention.k_proj.weight[:half])
    assert not torch.equal(attention.q_proj.weight[half:], attention.k_proj.weight[half:])


def test_a_stage_that_was_stopped_ends_as_one_that_was_not(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_SAVE_EVERY", 2)

    def run(work, stop=None, steps=8):
        torch.manual_seed(0)
        layer, done = nn.Linear(3, 1), iter(range(8))

        def losses(rng):
            if next(done) == stop:
                raise KeyboardInterrupt
            return {"error": layer(torch.from_numpy(rng.standard_normal((4, 3))).float()).square().mean()}

        groups = [{"params": list(layer.parameters()), "lr": 0.1}]
        runner.run_stage("s", losses, groups, {"layer": layer}, steps=steps, work=work, log=lambda _: None)
        return layer.weight.detach()

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", stop=5)
    assert int(torch.load(tmp_path / "stopped" / "s.pt", weights_only=True)["step"]) == 4
    assert torch.equal(run(tmp_path / "stopped"), whole)
    # What is done is not done again.
    assert torch.equal(run(tmp_path / "stopped", stop=0), whole)
    with pytest.raises(UserError, match=r"s.pt: it is from a stage of 8 steps with seed 0, not 9 with 0; give another"):
        run(tmp_path / "stopped", steps=9)


@pytest.mark.slow
def test_the_stages_make_a_model(tmp_path):
    plan, lines = Plan(bases=4, begin_on=30, drill_steps=1, read_steps=1, see_steps=1, say_steps=1), []
    train(tmp_path / "out", tmp_path / "work", plan=plan, log=lines.append)
    assert [line.split()[0] for line in lines] == ["see", "drill", "read", "say", "the"]
    assert json.loads((tmp_path / "out" / "card.json").read_text())["plan"]["bases"] == 4
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 20_000_000
    first = (tmp_path / "out" / "model.safetensors").read_bytes()
    train(tmp_path / "again", tmp_path / "work", plan=plan, log=lines.append)
    assert len(lines) == 6  # no stage is run again
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == first
