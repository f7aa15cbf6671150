"""Draws as weights against draws as rows, and whether intervals hold what they promise."""

import numpy as np
import pytest
from scipy import stats

from m3agiqa.evaluation import bootstrap, draws, metrics
from m3agiqa.evaluation.bootstrap import Drawn
from m3agiqa.evaluation.draws import Draws


def data(n, seed=0, ties=False):
    rng = np.random.default_rng(seed)
    y = rng.normal(size=n)
    x = 0.8 * y + 0.6 * rng.normal(size=n)
    return (np.round(x, 1), np.round(y, 1)) if ties else (x, y)


def deviations(x, y, drawn, after=None):
    """Of one scorer."""
    return bootstrap.deviations([Drawn(x, after, same_scale=True)], y, drawn)[0]


@pytest.mark.parametrize("ties", [False, True])
def test_a_draw_by_weights_is_the_draw_by_rows(ties):
    x, y = data(80, ties=ties)
    after = metrics.fitted(x, y)
    found = deviations(x, y, Draws(80, 30, seed=3), after)
    own = metrics.pooled(x, y, after, same_scale=True)
    assert set(found) == set(metrics.METRICS)
    for number, weights in enumerate(Draws(80, 30, seed=3).by_row[0].weights):
        rows = np.repeat(np.arange(80), weights)
        assert len(rows) == 80
        again = metrics.pooled(x[rows], y[rows], after[rows], same_scale=True)
        for name, value in again.items():
            assert found[name][number] + own[name] == pytest.approx(value, abs=1e-9), name


def test_above_the_limit_the_spread_is_that_of_the_whole(monkeypatch):
    x, y = data(1500, seed=5)
    whole = deviations(x, y, Draws(1500, 400, 0))
    monkeypatch.setattr(draws, "MOST_ROWS", 500)
    monkeypatch.setattr(draws, "MOST_PAIRED", 400)
    little = Draws(1500, 400, 0)
    assert len(little.by_row) == 20
    assert {len(subset.rows) for subset in little.by_row} == {500}
    assert all((subset.weights.sum(1) == 1500).all() for subset in little.by_row)
    bag = deviations(x, y, little)
    for name in ("srcc", "plcc", "krcc", "rmse", "pairwise"):
        assert len(bag[name]) == 400
        assert np.std(bag[name]) == pytest.approx(np.std(whole[name]), rel=0.2), name
        assert abs(np.mean(bag[name])) < 0.4 * np.std(bag[name])


def test_an_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        values = rng.normal(size=60)
        spread = bootstrap.mean_deviations(values, Draws(60, 300, seed=trial))
        low, high = bootstrap.interval(values.mean(), spread, 60)
        held += low <= 0 <= high
    assert 0.88 <= held / 200 <= 0.99


def test_where_there_is_no_interval():
    x, y = data(9)
    found = deviations(x, y, Draws(9, 50, 0))
    assert bootstrap.interval(0.5, found["srcc"], 9) is None
    assert bootstrap.interval(None, found["srcc"], 100) is None
    # One row alone differs: a third of the draws lack it, and have no correlation.
    x, y = np.zeros(20), np.arange(20.0)
    x[3] = 1.0
    found = deviations(x, y, Draws(20, 200, 0))
    assert np.isnan(found["srcc"]).any()
    assert bootstrap.interval(0.1, found["srcc"], 20) is None
    assert bootstrap.interval(0.1, found["rmse"], 20) is not None


def test_the_same_seed_pairs_two_scorers():
    x, y = data(200)
    close = x + 0.001 * np.sin(np.arange(200))
    ours, theirs = (deviations(scores, y, Draws(200, 200, 1)) for scores in (x, close))
    paired = dict(bootstrap.differences(ours, theirs))
    assert np.std(paired["srcc"]) < 0.1 * np.std(ours["srcc"])


@pytest.mark.parametrize("ties", [False, True])
def test_scorers_that_are_drawn_together_are_as_when_alone(ties):
    """Also where rows fill more than one block of pairs, and with a constant scorer among them."""
    x, y = data(300, ties=ties)
    others = [x, -np.abs(x), np.ones(300), np.round(x)]
    together = bootstrap.deviations([Drawn(one, same_scale=True) for one in others], y, Draws(300, 50, 4))
    for one, found in zip(others, together, strict=True):
        alone = deviations(one, y, Draws(300, 50, 4))
        for name, values in alone.items():
            np.testing.assert_array_equal(found[name], values)
    assert np.isnan(together[2]["srcc"]).all()
    assert np.isnan(together[2]["krcc"]).all()
    np.testing.assert_array_equal(together[2]["pairwise"], 0)
    rows = np.repeat(np.arange(300), Draws(300, 50, 4).by_row[0].weights[7])
    assert together[0]["krcc"][7] + metrics.krcc(x, y) == pytest.approx(metrics.krcc(x[rows], y[rows]), abs=1e-9)


def test_threads_make_no_difference(monkeypatch):
    monkeypatch.setattr(draws, "MOST_ROWS", 500)
    monkeypatch.setattr(draws, "MOST_PAIRED", 200)
    x, y = data(4000, ties=True)
    found = []
    for cores in ({0}, {0, 1, 2, 3}):
        monkeypatch.setattr(draws.os, "sched_getaffinity", lambda _, cores=cores: cores)
        found.append(deviations(x, y, Draws(4000, 60, 2)))
    for name, values in found[0].items():
        np.testing.assert_array_equal(found[1][name], values)


@pytest.mark.parametrize(("n", "k"), [(50_000, 400), (900, 30)])
def test_items_fall_on_rows_as_multinomial_ones_do(n, k):
    weights = draws._spread(np.random.default_rng(0), n, k, 3000).astype(float)
    assert (weights.sum(1) == n).all()
    assert weights.mean(0) == pytest.approx(n / k, rel=0.02)
    expected = n * (1 / k) * (1 - 1 / k)
    # Bounds of five standard errors; the variance of one count, then the covariance of two.
    assert weights.var(0).mean() == pytest.approx(expected, rel=5 * np.sqrt(2 / 3000 / k) + 1e-3)
    assert np.corrcoef(weights[:, 0], weights[:, 1])[0, 1] == pytest.approx(-1 / (k - 1), abs=5 / np.sqrt(3000))
    reference = np.random.default_rng(1).multinomial(n, np.full(k, 1 / k), size=3000)
    assert stats.ks_2samp(weights[:, ::7].ravel(), reference[:, ::7].ravel()).pvalue > 1e-3
