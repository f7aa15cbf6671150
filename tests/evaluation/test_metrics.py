"""Every figure against scipy, scikit-learn or a formula written anew, on random and degenerate input."""

import itertools

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import root_mean_squared_error

from m3agiqa.errors import UserError
from m3agiqa.evaluation import metrics


def samples():
    rng = np.random.default_rng(0)
    y = rng.normal(size=40)  # scipy's Somers' D takes the fourth power of it
    yield "random", y + rng.normal(size=40), y
    yield "opposite", -y, y
    yield "ties in both", rng.integers(0, 5, 200).astype(float), rng.integers(0, 4, 200).astype(float)
    yield "ties in the scores", np.round(y), y
    yield "two rows", np.array([1.0, 2.0]), np.array([3.0, 1.0])
    yield "three with a tie", np.array([1.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0])
    yield "tiny numbers", y * 1e-160, y
    yield "far from nought", y + 1e6, y * 1e-3


CASES = list(samples())


@pytest.mark.parametrize(("scores", "labels"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_every_figure_equals_an_independent_one(scores, labels):
    found = metrics.pooled(scores, labels, None, same_scale=True)
    assert found["srcc"] == pytest.approx(stats.spearmanr(scores, labels).statistic, abs=1e-9)
    ranks = [stats.rankdata(values) for values in (scores, labels)]
    assert found["srcc"] == pytest.approx(stats.pearsonr(*ranks).statistic, abs=1e-9)
    assert found["plcc"] == pytest.approx(np.corrcoef(scores / np.abs(scores).max(), labels)[0, 1], abs=1e-9)
    assert found["krcc"] == pytest.approx(stats.kendalltau(scores, labels).statistic, abs=1e-9)
    assert found["rmse"] == pytest.approx(root_mean_squared_error(labels, scores), rel=1e-9)
    # Somers' D of the scores given the labels leaves out pairs that are tied in the labels.
    assert found["pairwise"] == pytest.approx((1 + stats.somersd(labels, scores).statistic) / 2, abs=1e-9)
    assert found["plcc_fitted"] is None


@pytest.mark.parametrize("seed", range(20))
def test_pairs_are_counted_as_one_by_one(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 6, 30).astype(float), rng.integers(0, 6, 30).astype(float)
    right = wrong = half = 0
    for i, j in itertools.combinations(range(30), 2):
        product = (x[i] - x[j]) * (y[i] - y[j])
        right, wrong = right + (product > 0), wrong + (product < 0)
        half += x[i] == x[j] and y[i] != y[j]
    assert metrics.surplus(x, y) == right - wrong
    assert metrics.pairwise(x, y) == pytest.approx((right + half / 2) / (right + wrong + half), abs=1e-12)


def test_what_does_not_exist_is_none_and_says_why():
    y = np.array([1.0, 2.0, 3.0])
    same = np.full(3, 2.0)
    found = metrics.pooled(same, y, None, same_scale=False)
    assert [found[name] for name in ("srcc", "plcc", "krcc", "rmse")] == [None] * 4
    assert found["pairwise"] == 0.5
    assert metrics.why_none(same, y) == "all scores are 2"
    assert metrics.why_none(y, same) == "all human scores are 2"
    assert metrics.pairwise(y, same) is None
    assert metrics.why_none(y[:1], y[:1]) == "one row only"
    assert metrics.pooled(y[:1], y[:1] + 1, None, same_scale=True)["rmse"] == 1.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_is_refused(bad):
    y = np.arange(4.0)
    with pytest.raises(UserError, match="1 of 4 are NaN or infinite"):
        metrics.check(np.array([1.0, bad, 2.0, 3.0]), y, "quality_mos")
    with pytest.raises(UserError, match="human scores"):
        metrics.check(y, np.array([1.0, bad, 2.0, 3.0]))
    with pytest.raises(UserError):
        metrics.check(y, y[:3])
    with pytest.raises(UserError):
        metrics.check(y[:0], y[:0])


def test_the_logistic_finds_a_logistic_and_is_never_worse_than_a_line():
    rng = np.random.default_rng(1)
    x = rng.uniform(-3, 3, 400)
    y = metrics.logistic(x, 4.0, 2.5, 0.4, 0.1, 2.0)
    after = metrics.fitted(7 * x + 100, y)
    assert np.abs(after - y).max() < 1e-6
    assert metrics.plcc(after, y) == pytest.approx(1.0, abs=1e-9)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=60)
        y = -x + rng.normal(size=60)
        after = metrics.fitted(x, y)
        line = np.polyval(np.polyfit(x, y, 1), x)
        assert metrics.rmse(after, y) <= metrics.rmse(line, y) + 1e-9
    assert metrics.fitted(x[:9], y[:9]) is None
    assert metrics.fitted(np.ones(60), y) is None
