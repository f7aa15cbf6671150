"""Rating words against scikit-learn; coverage and reliability by hand; baselines by their formulae."""

import itertools

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from m3agiqa.aspects import RATING_WORDS, word_of_score
from m3agiqa.evaluation import baselines, calibration, words
from m3agiqa.evaluation.baselines import Facts
from m3agiqa.evaluation.draws import Draws
from m3agiqa.evaluation.figures import BINS


def test_words_equal_scikit_learn():
    rng = np.random.default_rng(0)
    wanted = rng.integers(0, 4, 200)
    given = np.clip(wanted + rng.integers(-1, 3, 200), 0, 4)
    found = words.agreement(given, wanted, Draws(200, 200, 0))
    assert found["accuracy"]["value"] == pytest.approx(accuracy_score(wanted, given), abs=1e-12)
    assert found["within_one"]["value"] == pytest.approx(np.mean(abs(wanted - given) <= 1), abs=1e-12)
    assert found["confusion"] == confusion_matrix(wanted, given, labels=range(5)).tolist()
    assert found["macro_f1"]["value"] == pytest.approx(f1_score(wanted, given, average="macro"), abs=1e-12)
    each = f1_score(wanted, given, average=None, labels=range(5))
    assert [found["f1"][word] for word in RATING_WORDS] == pytest.approx(each.tolist(), abs=1e-12)
    for name in ("accuracy", "within_one", "macro_f1"):
        assert found[name]["low"] < found[name]["value"] < found[name]["high"]


def test_a_word_that_nobody_has_has_no_f1():
    found = words.agreement(np.array([0, 1]), np.array([0, 0]), Draws(2, 100, 0))
    assert found["f1"]["excellent"] is None
    assert found["f1"]["poor"] == 0.0
    assert found["accuracy"] == {"value": 0.5, "low": None, "high": None}


def test_scores_on_an_edge_have_the_higher_word():
    scores = np.array([0, 0.999, 1, 2, 3.5, 4, 5.0])
    assert [RATING_WORDS[i] for i in words.of_scores(scores, BINS)] == [word_of_score(one) for one in scores]
    assert words.numbers(["bad", "excellent", None, "superb"]).tolist() == [0, 4, -1, -1]


def test_coverage_and_reliability():
    labels = np.arange(20.0) / 4
    low, high = labels - 0.5, labels + 0.5
    low[:4] = high[:4] = labels[:4] + 1
    found = calibration.coverage(low, high, labels, Draws(20, 200, 0), 0.9)
    assert found["coverage"]["value"] == 0.8
    assert found["coverage"]["low"] < 0.8 < found["coverage"]["high"]
    assert (found["below"], found["above"]) == (0.2, 0.0)
    assert found["mean_width"] == pytest.approx(0.8)
    perfect = calibration.reliability(labels, labels)
    assert perfect["error"] == 0.0
    assert sum(one["rows"] for one in perfect["bins"]) == 20
    assert calibration.reliability(labels, labels + 0.25)["error"] == pytest.approx(0.25)
    assert len(calibration.reliability(labels[:3], labels[:3])["bins"]) == 3


def facts(n, seed=0):
    rng = np.random.default_rng(seed)
    generators = [f"g{i}" for i in rng.integers(0, 4, n)]
    prompts = [f"a prompt {'very ' * int(i)}" for i in rng.integers(0, 9, n)]
    labels = np.array([float(g[1]) for g in generators]) + 0.1 * np.array([len(p) for p in prompts]) / 5
    return generators, prompts, labels + 0.1 * rng.normal(size=n)


def taken(*parts):
    """Facts of several lots of rows that mean the same by a code."""
    generators, prompts = ([one for part in parts for one in part[i]] for i in (0, 1))
    labels = np.concatenate([part[2] for part in parts])
    whole = Facts.of([f"i{i}" for i in range(len(labels))], generators, prompts, labels)
    ends = np.cumsum([0, *(len(part[2]) for part in parts)])
    return [whole.take(np.arange(a, b)) for a, b in itertools.pairwise(ends)]


def test_baselines_by_their_formulae():
    raw = facts(300), facts(80, seed=1)
    found = baselines.predict(*taken(*raw)[::-1])
    generators, prompts, labels = raw[0]
    for i in range(80):
        own = [y for g, y in zip(generators, labels, strict=True) if g == raw[1][0][i]]
        assert found["generator mean"][i] == pytest.approx(np.mean(own), abs=1e-12)
    levels = sorted(set(generators)), sorted(set(prompts))
    design = [
        np.array([[g == one for one in levels[0]] + [p == one for one in levels[1]] for g, p in pairs], float)
        for pairs in (zip(part[0], part[1], strict=True) for part in raw)
    ]
    ridge = Ridge(alpha=1.0, fit_intercept=False, solver="cholesky").fit(design[0], labels - labels.mean())
    assert found["generator + prompt"] == pytest.approx(labels.mean() + ridge.predict(design[1]), abs=1e-6)
    slope, offset = np.polyfit([len(p) for p in prompts], labels, 1)
    assert found["prompt length"] == pytest.approx([offset + slope * len(p) for p in raw[1][1]], abs=1e-9)


def test_what_is_new_gets_the_overall_mean_and_what_is_unknown_no_baseline():
    raw = facts(100)
    train, new, unknown = taken(raw, (["never seen"], ["nor this"], np.ones(1)), ([None], [None], np.ones(1)))
    found = baselines.predict(new, train)
    assert found["generator mean"][0] == pytest.approx(raw[2].mean())
    assert found["generator + prompt"][0] == pytest.approx(raw[2].mean())
    assert baselines.predict(unknown, train) == {}


def test_without_a_training_part_no_row_predicts_itself():
    _, prompts, labels = facts(60)
    (alone,) = taken(([f"g{i}" for i in range(60)], prompts, labels))
    found = baselines.predict(alone, None)["generator mean"]
    for i in range(60):
        assert found[i] == pytest.approx(labels[alone.folds != alone.folds[i]].mean(), abs=1e-12)
    assert (baselines.majority(np.array([1, 1, 2]), None) == 1).all()
    assert (baselines.majority(np.array([1, 1, 2]), np.array([4])) == 4).all()


def test_equal_scores_are_one_bin():
    scores = np.repeat([1.0, 2.5, 4.0], [5, 50, 45])
    found = calibration.reliability(scores, scores + np.arange(100) / 100)
    assert [one["score"] for one in found["bins"]] == [1.0, 2.5, 4.0]
    assert [one["rows"] for one in found["bins"]] == [5, 50, 45]
