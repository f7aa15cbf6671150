"""Figures within groups against scipy, group by group."""

import numpy as np
import pytest
from scipy import stats

from m3agiqa.evaluation import groups, metrics
from m3agiqa.evaluation.bootstrap import Drawn
from m3agiqa.evaluation.draws import Draws
from m3agiqa.evaluation.groups import Grouping, row_intervals, within


def data(sizes, seed=0, step=0.5):
    rng = np.random.default_rng(seed)
    names = [f"g{i}" for i, size in enumerate(sizes) for _ in range(size)]
    order = rng.permutation(len(names))
    y = rng.normal(size=len(names))
    x = y + rng.normal(size=len(names))
    if step:
        x, y = np.round(x / step) * step, np.round(y / step) * step
    return x, y, [names[i] for i in order]


@pytest.mark.parametrize("small", [4, 256])
def test_each_group_is_what_scipy_says(monkeypatch, small):
    monkeypatch.setattr(groups, "_SMALL", small)
    x, y, names = data([40, 7, 3, 2, 1, 12])
    names[5] = None
    (found,) = within([x], y, Grouping.of(names))
    right = pairs = up = below = 0.0
    for place, name in enumerate(found.names):
        rows = [i for i, one in enumerate(names) if one == name]
        assert len(rows) == found.size[place] >= 3
        expected = stats.spearmanr(x[rows], y[rows]).statistic
        assert found.rank[place] == pytest.approx(expected, abs=1e-9)
        differing = len(rows) * (len(rows) - 1) // 2 - metrics.tied_pairs(y[rows])
        assert found.pairs[place] == differing
        assert found.right[place] == pytest.approx(metrics.pairwise(x[rows], y[rows]) * differing, abs=1e-9)
        right, pairs = right + found.right[place], pairs + differing
        up, below = up + expected * len(rows), below + len(rows)
    assert "g3" not in found.names
    assert found.pairwise == pytest.approx(right / pairs, abs=1e-12)
    assert found.srcc == pytest.approx(up / below, abs=1e-9)


def test_generator_means_reach_nothing_within_a_generator():
    y = np.random.default_rng(0).normal(size=200)
    names = [f"g{i % 4}" for i in range(200)]
    x = np.array([i % 4 for i in range(200)], float)
    (found,) = within([x], y, Grouping.of(names))
    assert found.srcc is None
    assert found.pairwise == 0.5


def by_rows(x, y, names, found):
    (made,) = row_intervals([Drawn(x)], y, Grouping.of(names), [found], 500, 0)
    return made.ends


def test_intervals_by_group_and_by_row():
    x, y, names = data([30] * 20, step=0)
    (found,) = within([x], y, Grouping.of(names))
    by_group, by_row = found.intervals(Draws(20, 500, 0)), by_rows(x, y, names, found)
    for name in ("srcc", "pairwise"):
        estimate = getattr(found, name)
        for low, high in (by_group[name], by_row[name]):
            assert low < estimate < high
            assert high - low < 0.2
    x, y, names = data([30] * 3, step=0)
    (found,) = within([x], y, Grouping.of(names))
    assert found.intervals(Draws(3, 500, 0)) == {"srcc": None, "pairwise": None}
    assert by_rows(x, y, names, found)["srcc"] is not None


def test_no_groups():
    (found,) = within([np.arange(3.0)], np.arange(3.0), Grouping.of([None, None, "a"]))
    assert (found.names, found.srcc, found.pairwise) == ([], None, None)
