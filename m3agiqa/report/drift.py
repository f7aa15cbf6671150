"""How the scores of one run differ from those of another."""

from collections.abc import Sequence
from dataclasses import dataclass

import duckdb
import numpy as np
import pyarrow as pa
from scipy import stats

from m3agiqa.aspects import Aspect
from m3agiqa.report.gather import Spread, histogram, scores_of, spread


@dataclass(frozen=True)
class Moved:
    """The rows that both runs have, under the same id: their number, the mean change, and its standard deviation."""

    count: int
    mean: float
    sd: float


@dataclass(frozen=True)
class AspectDrift:
    """One aspect here and there.

    Attributes:
        change: mean here less mean there, with the ends of its 95 % confidence interval (Welch's); None of fewer than
            two rows.
        distance: Kolmogorov and Smirnov's: the largest gap between the two cumulative distributions, 0 to 1.
        moved: None where no row is in both.
    """

    aspect: Aspect
    here: Spread
    there: Spread
    histogram_here: tuple[int, ...]
    histogram_there: tuple[int, ...]
    change: tuple[float, float, float] | None
    distance: float
    moved: Moved | None


def compare(
    here: duckdb.DuckDBPyConnection,
    there: duckdb.DuckDBPyConnection,
    aspects: Sequence[Aspect],
) -> list[AspectDrift]:
    """The drift of each aspect that both runs have scores of; both connections have the table `slim`."""
    ours, theirs = scores_of(here, aspects), scores_of(there, aspects)
    found = []
    for aspect in aspects:
        a, b = (scores[aspect][~np.isnan(scores[aspect])] for scores in (ours, theirs))
        if len(a) and len(b):
            found.append(
                AspectDrift(
                    aspect,
                    spread(a),
                    spread(b),
                    histogram(a),
                    histogram(b),
                    _change(a, b),
                    float(stats.ks_2samp(a, b, method="asymp").statistic),
                    _moved(here, there, aspect),
                )
            )
    return found


def _change(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float] | None:
    if min(len(a), len(b)) < 2:
        return None
    difference = float(a.mean(dtype=np.float64) - b.mean(dtype=np.float64))
    if np.ptp(a) == 0 and np.ptp(b) == 0:
        return difference, difference, difference
    interval = stats.ttest_ind(a.astype(np.float64), b.astype(np.float64), equal_var=False).confidence_interval(0.95)
    return difference, float(interval.low), float(interval.high)


def _moved(here: duckdb.DuckDBPyConnection, there: duckdb.DuckDBPyConnection, aspect: Aspect) -> Moved | None:
    other: pa.Table = there.sql(f"SELECT id, {aspect} AS score FROM slim WHERE {aspect} IS NOT NULL").to_arrow_table()
    here.register("other_scores", other)
    sql = (
        f"SELECT count(*), avg({aspect} - score), stddev_pop({aspect} - score) FROM slim "
        f"JOIN other_scores USING (id) WHERE {aspect} IS NOT NULL"
    )
    ((count, mean, sd),) = here.execute(sql).fetchall()
    here.unregister("other_scores")
    return Moved(count, mean, sd) if count else None
