"""The figures of a report against the same figures computed in another way."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats

from m3agiqa.aspects import Aspect
from m3agiqa.query import connect
from m3agiqa.report import drift, gather, strips
from m3agiqa.report.charts import box, heat_map, histogram, two_histograms, words
from m3agiqa.runs import Output
from tests.scored import scored_folder

ROWS = 200


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    return scored_folder(tmp_path_factory.mktemp("figures") / "run", ROWS)


@pytest.fixture(scope="module")
def frame(scores):
    return pq.read_table(scores / "scores").to_pandas()


def opened(folder):
    connection = connect(Output(str(folder)))
    columns = connection.view("scores").columns
    sources = gather.sources_of(connection, columns)
    gather.make_slim(connection, columns, sources)
    return connection, columns, sources


@pytest.fixture(scope="module")
def run(scores):
    return opened(scores)


def test_the_predictors_scores_are_preferred(run, tmp_path):
    assert run[2] == dict.fromkeys(Aspect, "mos")
    _, _, without = opened(scored_folder(tmp_path / "run", 12, predictor=False))
    assert without == dict.fromkeys(Aspect, "rating_score")


def test_distributions(run, frame):
    connection, columns, sources = run
    scores = gather.scores_of(connection, list(sources))
    for figures in gather.aspect_figures(connection, columns, sources, scores):
        truth = frame[f"{figures.aspect}_mos"].dropna()
        assert figures.spread.count == sum(figures.histogram) == sum(figures.words) == len(truth)
        assert figures.spread.mean == pytest.approx(truth.mean(), abs=1e-5)
        assert figures.spread.sd == pytest.approx(truth.std(ddof=0), abs=1e-5)
        assert figures.spread.quantiles[2] == pytest.approx(truth.median(), abs=1e-5)
        rated = frame[f"{figures.aspect}_rating"].value_counts()
        assert dict(zip(("bad", "poor", "fair", "good", "excellent"), figures.words, strict=True)) == rated.to_dict()
        width = (frame[f"{figures.aspect}_mos_high"] - frame[f"{figures.aspect}_mos_low"]).mean()
        assert figures.interval == pytest.approx(width, abs=1e-5)


def test_aspects_against_each_other(run, frame):
    connection, _, sources = run
    pairs = gather.pair_figures(gather.scores_of(connection, list(sources)))
    assert [(p.x, p.y) for p in pairs] == [
        ("quality", "correspondence"),
        ("quality", "authenticity"),
        ("correspondence", "authenticity"),
    ]
    for pair in pairs:
        both = frame[[f"{pair.x}_mos", f"{pair.y}_mos"]].dropna()
        assert pair.count == pair.cells.sum() == len(both)
        assert pair.pearson == pytest.approx(both.corr().iloc[0, 1], abs=1e-5)
        assert pair.spearman == pytest.approx(both.corr("spearman").iloc[0, 1], abs=1e-5)


def test_what_does_not_vary_has_no_correlation():
    flat = {Aspect.QUALITY: np.full(9, 2.0, np.float32), Aspect.AUTHENTICITY: np.arange(9, dtype=np.float32) / 2}
    (pair,) = gather.pair_figures(flat)
    assert (pair.pearson, pair.spearman, pair.count) == (None, None, 9)


def test_generators(run, frame):
    connection, _, sources = run
    ok = frame[frame["status"] == "ok"]
    found = gather.generator_figures(connection, list(sources))
    assert {figures.name for figures in found} == {"alpha", "beta", None}
    for figures in found:
        rows = ok[ok["generator"].isna()] if figures.name is None else ok[ok["generator"] == figures.name]
        assert figures.count == len(rows)
        spread = figures.spreads[Aspect.QUALITY]
        assert spread.mean == pytest.approx(rows["quality_mos"].mean(), abs=1e-5)
        wanted = rows["quality_mos"].quantile([0.05, 0.25, 0.5, 0.75, 0.95])
        assert spread.quantiles == pytest.approx(tuple(wanted), abs=1e-4)


def test_problems_are_put_together_by_reason(run):
    found = {(p.status, p.reason): p for p in gather.problems(run[0], run[1])}
    assert set(found) == {
        ("rejected", "there is no such file"),
        ("failed", "cannot read ….png"),
        ("ok", "correspondence: not judged, the row has no prompt"),
    }
    assert found["rejected", "there is no such file"].example_id == f"row-{ROWS - 1:04d}"


def test_the_strips_hold_the_rows_that_they_promise(run, frame):
    connection, columns, sources = run
    chosen = {strip.title: strip.ids for strip in strips.choose(connection, sources)}
    ok = frame[frame["status"] == "ok"].set_index("id")
    best = ok["quality_mos"].sort_values(ascending=False, kind="stable").index[: strips.PER_STRIP]
    assert chosen["Best quality"] == tuple(best)
    worst = ok["quality_mos"].sort_values(kind="stable").index[: strips.PER_STRIP]
    assert chosen["Worst quality"] == tuple(worst)
    sorted_probs = ok["quality_rating_probs"].map(lambda probs: sorted(probs, reverse=True))
    doubt = sorted_probs.map(lambda probs: np.float32(probs[0] - probs[1])).sort_values(kind="stable")
    assert set(chosen["Borderline quality"]) == set(doubt.index[: strips.PER_STRIP])
    off = (ok["quality_mos"] - ok["quality_rating_score"]).abs().sort_values(ascending=False)
    assert chosen["Disagreement about quality"][0] == off.index[0]
    mos = ok[[f"{aspect}_mos" for aspect in Aspect]]
    assert chosen["Aspects disagree most"][0] == (mos.max(axis=1) - mos.min(axis=1)).idxmax()
    rows = strips.details(connection, columns, sources, chosen["Best quality"])
    assert list(rows[best[0]]["aspects"][0])[:2] == ["name", "score"]
    assert rows[best[0]]["aspects"][0]["score"] == pytest.approx(ok["quality_mos"][best[0]])
    assert rows[best[0]]["prompt"] == ok["prompt"][best[0]]


def test_drift(run, frame, tmp_path):
    other = scored_folder(tmp_path / "other", 120, shift=0.5, seed=3)
    connection, _, _ = opened(other)
    there = pq.read_table(other / "scores").to_pandas()
    for found in drift.compare(run[0], connection, list(Aspect)):
        a, b = frame[f"{found.aspect}_mos"].dropna(), there[f"{found.aspect}_mos"].dropna()
        assert found.distance == pytest.approx(stats.ks_2samp(a, b).statistic, abs=1e-9)
        assert found.change is not None
        assert found.change[0] == pytest.approx(a.mean() - b.mean(), abs=1e-5)
        assert found.change[1] < found.change[0] < found.change[2]
        joined = frame.merge(there, on="id")
        moved = (joined[f"{found.aspect}_mos_x"] - joined[f"{found.aspect}_mos_y"]).dropna()
        assert found.moved is not None
        assert (found.moved.count, found.moved.mean) == (len(moved), pytest.approx(moved.mean(), abs=1e-5))


def test_a_run_does_not_drift_from_itself(run, scores):
    connection, _, _ = opened(scores)
    for found in drift.compare(run[0], connection, list(Aspect)):
        assert (found.distance, found.moved.mean, found.change[0]) == (0.0, 0.0, 0.0)


def test_charts_hold_what_they_draw():
    assert histogram([1, 0, 3], "three").count('class="bar"') == 2
    assert two_histograms([1, 2], [0, 0], "two").count("<polyline") == 2
    assert heat_map(np.eye(4, dtype=int), "x", "y", "<b>").count('class="cell"') == 4
    assert "&lt;b&gt;" in heat_map(np.zeros((4, 4), int), "x", "y", "<b>")
    assert "excellent 40%" in words([1, 1, 1, 3, 4])
    assert words([0] * 5) == ""
    assert 'role="img"' in box(gather.spread(np.array([1.0, 2.0])), "box")
