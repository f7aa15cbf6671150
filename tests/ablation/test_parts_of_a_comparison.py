"""What is shown to a head, who is in which part, and what a difference is worth."""

import numpy as np
import pytest
import torch
from scipy import stats

from m3agiqa.ablate_config import AblateConfig
from m3agiqa.ablation.compare import difference, over_seeds
from m3agiqa.ablation.heads import builder
from m3agiqa.ablation.inputs import named, open_inputs
from m3agiqa.ablation.parts import assign, common_ids
from m3agiqa.ablation.variations import variations
from m3agiqa.errors import UserError
from m3agiqa.predictor.head import HeadConfig
from m3agiqa.predictor.lm_head import LMHead
from m3agiqa.settings import load
from tests.ablation.helpers import ASKED, DESCRIBED, QUALITY, TOKENS, captured, settings, talks
from tests.captured_sets import WIDTH, rows, write

SCALE = (0.0, 5.0)


def opened(tmp_path, *sets, **more):
    uris = {f"s{i}": captured(tmp_path / f"s{i}", made) for i, made in enumerate(sets)}
    return open_inputs(uris, QUALITY, SCALE, tmp_path / "states", **more)


def original(row):
    return torch.frombuffer(bytearray(row["quality_states"]), dtype=torch.bfloat16).view(-1, WIDTH)


@pytest.mark.parametrize("kind", ["xlstm", "lstm", "gru", "transformer", "mlp"])
def test_no_head_sees_the_pads(kind):
    torch.manual_seed(0)
    head = builder(kind)(HeadConfig(input_width=6, width=16, blocks=2, hidden=8)).eval()
    states, lengths = torch.randn(3, 9, 6), torch.tensor([9, 4, 1])
    together = head(states, lengths)
    alone = torch.cat([head(states[i : i + 1, :n], lengths[i : i + 1]) for i, n in enumerate(lengths.tolist())])
    assert torch.allclose(together, alone, atol=1e-5)
    together.sum().backward()
    assert all(one.grad is not None and bool(one.grad.isfinite().all()) for one in head.parameters())


def test_a_round_shows_the_tokens_up_to_its_end(tmp_path):
    made = talks(40)
    one = opened(tmp_path, made)["s0"]
    ends = {"none": ASKED, "description": DESCRIBED, "description+rating": TOKENS}
    places = {name: i for i, name in enumerate(one.ids)}
    for rounds, end in ends.items():
        shown = one.shown(rounds, "states")
        assert len(shown) == len(made)
        for row in made:
            assert torch.equal(shown[places[row["id"]]], original(row)[:end])
    probs = one.shown("description+rating", "rating_probs")
    for row in made[:5]:
        found = probs[places[row["id"]]]
        assert found.shape == (1, 5)
        assert torch.allclose(found.float(), torch.tensor(row["quality_rating_probs"])[None].float(), rtol=2**-7)


def test_top_k_states_are_what_the_logits_tell(tmp_path):
    made = talks(20)
    weight = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(1))
    one = opened(tmp_path, made, lm_head=LMHead(weight), top_k=3)["s0"]
    shown = one.shown("description", "top_k")
    place = one.ids.index(made[7]["id"])
    for token, found in enumerate(shown[place]):
        logits = weight @ original(made[7])[token].float()
        best = sorted(range(50), key=lambda i: -float(logits[i]))[:3]
        shares = torch.tensor([float(logits[i]) for i in best]).softmax(0)
        expected = sum(share * weight[i] for share, i in zip(shares, best, strict=True))
        assert torch.allclose(found.float(), expected, rtol=2**-7, atol=1e-2)


def test_a_set_without_bounds_is_refused_where_they_are_needed(tmp_path):
    one = open_inputs({"old": write(tmp_path / "old", rows(30))}, QUALITY, SCALE, tmp_path / "states")["old"]
    one.check("description+rating", "states")
    for rounds, capture, cure in (
        ("none", "states", "capture it again"),
        ("description+rating", "rating_probs", "capture it again"),
        ("description+rating", "top_k", "--lm-head"),
    ):
        with pytest.raises(UserError, match=cure):
            one.check(rounds, capture)
    for weight, top_k, told in ((torch.zeros(9, WIDTH + 1), 3, "not 12"), (torch.zeros(9, WIDTH), 10, "the 9 tokens")):
        one.lm_head, one.top_k = LMHead(weight), top_k
        with pytest.raises(UserError, match=told):
            one.check("description+rating", "top_k")


def test_a_prompt_is_in_one_part_only_in_all_inputs(tmp_path):
    inputs = opened(tmp_path, talks(80, prompts=20), talks(60, seed=1, prompts=20))
    parts = assign(list(inputs.values()), settings(), same_images=True)
    by_prompt = {}
    for one in inputs.values():
        for name, prompt in zip(one.ids, one.prompts, strict=True):
            by_prompt.setdefault(prompt, set()).add(parts.of[one.name][name])
    assert all(len(found) == 1 for found in by_prompt.values())
    assert set().union(*by_prompt.values()) == {"train", "val", "test"}
    assert not parts.notes
    a, b = inputs.values()
    both = common_ids([a, b], parts, ("train",), "--input")
    assert both == {i for i in b.ids if parts.of[b.name][i] == "train"}
    assert [a.ids[i] for i in parts.places(a, "train", both)] == [b.ids[i] for i in parts.places(b, "train", both)]


@pytest.mark.parametrize("split_by", ["prompt", "split"])
def test_sets_that_number_their_images_alike_are_split_by_their_own_prompts(tmp_path, split_by):
    sets = []
    for seed, prompts in enumerate((75, 30)):
        made = talks(150, seed=seed, prompts=prompts, prefix=f"set {seed}")
        parts = ("test", "val", "train")
        sets.append([row | {"id": str(i), "split": parts[(i // 50 + seed) % 3]} for i, row in enumerate(made)])
    inputs = list(opened(tmp_path, *sets).values())
    parts = assign(inputs, settings(f"data.split_by={split_by}"), same_images=False)
    for one, made in zip(inputs, sets, strict=True):
        own = parts.of[one.name]
        train, test = ({row["prompt"] for row in made if own[row["id"]] == part} for part in ("train", "test"))
        if split_by == "prompt":
            assert test
            assert not test & train
        else:
            assert own == {row["id"]: row["split"] for row in made}


def test_inputs_of_the_same_images_that_say_different_things_are_refused(tmp_path):
    made = talks(40, prompts=10, split=lambda i: "test" if i < 20 else "train")
    unknown = [row | {"prompt": None} for row in made]
    other = [*made[:7], made[7] | {"prompt": "another"}, *made[8:]]
    moved = [*made[:7], made[7] | {"split": "train"}, *made[8:]]
    first, without, differing, elsewhere = opened(tmp_path, made, unknown, other, moved).values()
    for pair in ([first, without], [without, first]):
        parts = assign(pair, settings(), same_images=True)
        assert parts.of[first.name] == parts.of[without.name] == assign([first], settings(), same_images=True).of["s0"]
    with pytest.raises(UserError, match=r"--input s2: the id i0007 has another prompt .*'another', not 'i 7'"):
        assign([first, differing], settings(), same_images=True)
    with pytest.raises(UserError, match=r"--input s3: the id i0007 has another split .*'train', not 'test'"):
        assign([first, elsewhere], settings("data.split_by=split"), same_images=True)
    assign([first, elsewhere], settings(), same_images=True)


def test_a_part_whose_labels_are_equal_is_refused(tmp_path):
    made = talks(60, split=lambda i: "test" if i < 20 else "val" if i < 40 else "train")
    made = [row | {"mos_quality": 2.0} if row["split"] == "val" else row for row in made]
    inputs = list(opened(tmp_path, made).values())
    parts = assign(inputs, settings("data.split_by=split"), same_images=True)
    assert len(common_ids(inputs, parts, ("train", "test"), "--input")) == 40
    with pytest.raises(UserError, match="all 20 labels of the val part are 2"):
        common_ids(inputs, parts, ("train", "val"), "--input")


def test_given_parts_are_kept_and_shared_prompts_are_told(tmp_path):
    made = talks(60, prompts=6, split=lambda i: "test" if i % 3 == 0 else "train")
    inputs = opened(tmp_path, made)
    parts = assign(list(inputs.values()), settings("data.split_by=split"), same_images=True)
    assert {i for i, part in parts.of["s0"].items() if part == "test"} == {
        row["id"] for row in made if row["split"] == "test"
    }
    assert "val" in parts.of["s0"].values()
    more = settings("data.split_by=split", "data.validation_share=0.5")
    crossing = assign(list(inputs.values()), more, same_images=True)
    assert len(crossing.holds(inputs["s0"], "val")) > len(parts.holds(inputs["s0"], "val"))


def test_prompts_of_both_train_and_test_are_noted(tmp_path):
    made = talks(40, prompts=5, split=lambda i: "test" if i < 20 else "val" if i < 24 else "train")
    parts = assign(list(opened(tmp_path, made).values()), settings("data.split_by=split"), same_images=True)
    assert parts.notes == ("5 of 5 test prompts are also trained on: scores flatter",)


def test_one_thing_is_changed_at_a_time():
    config = settings("vary.head=[gru, xlstm, ridge]", "vary.rounds=[none]", "vary.descriptions=[given, own/given]")
    chosen = variations(config, ("own", "given"))
    assert [one.name for one in chosen] == [
        "base",
        "rounds=none",
        "head=gru",
        "head=ridge",
        "descriptions=given/given",
        "descriptions=own/given",
    ]
    base = chosen[0]
    for one in chosen[1:]:
        differs = [
            f
            for f in ("rounds", "capture", "head", "pooling", "loss", "descriptions")
            if getattr(one, f) != getattr(base, f)
        ]
        assert differs == [one.factor]


def test_a_comparison_that_cannot_be_is_refused():
    with pytest.raises(UserError, match="nothing that differs"):
        variations(settings("vary.head=[xlstm]"), ("own",))
    with pytest.raises(UserError, match="'teacher', but the inputs are own"):
        variations(settings("vary.descriptions=[teacher/own]"), ("own",))
    for bad, told in (
        ("vary.loss=[hinge]", "there is no loss 'hinge'"),
        ("vary.head=[rnn]", "vary.head"),
        ("measure.seeds=1", "greater than or equal to 2"),
        ("base.hed=gru", "did you mean base.head"),
        ("base.rounds=none base.capture=rating_probs", "whole conversation"),
        ("base.rounds=none vary.capture=[rating_probs]", "whole conversation"),
        ("base.capture=rating_probs vary.rounds=[none]", "leave vary.rounds out"),
        ("base.head=ridge vary.loss=[mse]", "leave vary.loss out"),
    ):
        with pytest.raises(UserError, match=told):
            load(AblateConfig, None, bad.split())
    with pytest.raises(UserError, match="is there already"):
        named(["/a/x", "x=/b"])
    assert named(["/a/x/", "y=s3://b/c"]) == {"x": "/a/x/", "y": "s3://b/c"}


def test_the_interval_over_seeds_is_students():
    values = [0.81, 0.83, 0.82, 0.86, 0.80]
    found = over_seeds(values, 0.95)
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((np.mean(values), low, high))
    assert over_seeds([0.8, None], 0.95) == {"mean": None, "low": None, "high": None}


def compare(first, second, labels, comparisons=1):
    srcc = [[float(stats.spearmanr(one, labels).statistic) for one in many] for many in (first, second)]
    return difference(*srcc, (first, second), labels, level=0.95, comparisons=comparisons, resamples=200, seed=0)


def test_a_difference_holds_up_only_beyond_seeds_and_images():
    rng = np.random.default_rng(0)
    labels = np.round(rng.uniform(0, 5, 300), 1)
    good = np.stack([labels + rng.normal(size=300) * 0.5 for _ in range(5)])
    poor = np.stack([labels + rng.normal(size=300) * 3 for _ in range(5)])
    alike = np.stack([labels + rng.normal(size=300) * 0.5 for _ in range(5)])
    assert compare(good, poor, labels)["verdict"] == "better"
    assert compare(poor, good, labels)["verdict"] == "worse"
    assert compare(good, alike, labels, comparisons=10)["verdict"] == "noise"
    exact = stats.spearmanr(good.mean(0), labels).statistic - stats.spearmanr(poor.mean(0), labels).statistic
    assert compare(good, poor, labels)["over_images"]["mean"] == pytest.approx(exact, abs=1e-12)
    wide, narrow = (compare(good, poor, labels, comparisons=n)["over_seeds"] for n in (20, 1))
    assert wide["high"] - wide["low"] > narrow["high"] - narrow["low"]


def test_constant_predictions_have_no_difference():
    rng = np.random.default_rng(0)
    labels = rng.uniform(0, 5, 50)
    same, good = np.full((3, 50), 2.0), np.stack([labels + rng.normal(size=50) for _ in range(3)])
    found = difference([None] * 3, [0.9] * 3, (same, good), labels, level=0.95, comparisons=1, resamples=100, seed=0)
    assert found["verdict"] == "undefined"
    assert found["over_images"]["mean"] is None
