"""The figures of a report: a few queries over the scores, and no more than its columns are read for each."""

from collections.abc import Sequence
from dataclasses import dataclass

import duckdb
import numpy as np
from scipy import stats

from m3agiqa.aspects import RATING_WORDS, SCALE_MAX, SCALE_MIN, Aspect
from m3agiqa.records import Status

BINS = 50
"""Of a distribution, over the whole scale."""
CELLS = 25
"""Of two aspects against each other, each way."""
_GENERATORS = 24
_PROBLEMS = 40
# Ranks of more pairs than this say nothing more, and take minutes.
_RANKED = 1_000_000
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_RANGE = (SCALE_MIN, SCALE_MAX)


@dataclass(frozen=True)
class Spread:
    """How some scores are spread: number, mean, standard deviation, and the quantiles of 5, 25, 50, 75 and 95 %."""

    count: int
    mean: float
    sd: float
    quantiles: tuple[float, ...]


@dataclass(frozen=True)
class AspectFigures:
    """One aspect over all rows that were judged.

    Attributes:
        source: `mos` where the predictor gave scores, else `rating_score`.
        histogram: rows in each of `BINS` bins of equal width from 0 to 5.
        words: rows by rating word, *bad* to *excellent*.
        interval: mean width of the predictor's interval, or None where there is none.
    """

    aspect: Aspect
    source: str
    spread: Spread
    histogram: tuple[int, ...]
    words: tuple[int, ...]
    interval: float | None


@dataclass(frozen=True)
class PairFigures:
    """Two aspects against each other, over the rows that have both; no correlation of what does not vary.

    Attributes:
        cells: [CELLS, CELLS] rows, x by y, both from 0 to 5.
    """

    x: Aspect
    y: Aspect
    count: int
    pearson: float | None
    spearman: float | None
    cells: np.ndarray


@dataclass(frozen=True)
class GeneratorFigures:
    """One generator: its rows, and the spread of each aspect's scores."""

    name: str | None
    count: int
    spreads: dict[Aspect, Spread]


@dataclass(frozen=True)
class Problem:
    """Rows that ended alike: their status, the reason without its details, how many, and one of them."""

    status: str
    reason: str
    count: int
    example: str
    example_id: str


def sources_of(connection: duckdb.DuckDBPyConnection, columns: Sequence[str]) -> dict[Aspect, str]:
    """For each aspect that has scores, `mos` or `rating_score`: the predictor's are preferred."""
    wanted = [(a, s) for a in Aspect for s in ("mos", "rating_score") if f"{a}_{s}" in columns]
    if not wanted:
        return {}
    listed = ", ".join(f"count({aspect}_{suffix})" for aspect, suffix in wanted)
    (counts,) = connection.execute(f"SELECT {listed} FROM scores WHERE status = ?", [str(Status.OK)]).fetchall()
    found: dict[Aspect, str] = {}
    for (aspect, suffix), count in zip(wanted, counts, strict=True):
        if count:
            found.setdefault(aspect, suffix)
    return found


def make_slim(connection: duckdb.DuckDBPyConnection, columns: Sequence[str], sources: dict[Aspect, str]) -> None:
    """Makes the table `slim` of the rows that are ok: every later question is asked of it, not of the files.

    Columns: `id`, `generator`, each aspect's score under the aspect's name, `ASPECT_doubt` (how far the likeliest
    rating word is before the next), `ASPECT_off` (predictor against words) and `apart` (between aspects).
    """
    there = set(columns)
    fields = ["id", "generator" if "generator" in there else "NULL::VARCHAR AS generator"]
    for aspect, suffix in sources.items():
        fields.append(f"{aspect}_{suffix}::FLOAT AS {aspect}")
        ordered = f"list_sort({aspect}_rating_probs, 'DESC')"
        fields.append(
            f"({ordered}[1] - {ordered}[2])::FLOAT AS {aspect}_doubt"
            if f"{aspect}_rating_probs" in there
            else f"NULL::FLOAT AS {aspect}_doubt"
        )
        both = {f"{aspect}_mos", f"{aspect}_rating_score"} <= there
        fields.append(
            f"abs({aspect}_mos - {aspect}_rating_score)::FLOAT AS {aspect}_off"
            if both
            else f"NULL::FLOAT AS {aspect}_off"
        )
    scores = ", ".join(f"{aspect}_{suffix}" for aspect, suffix in sources.items())
    fields.append(f"(greatest({scores}) - least({scores}))::FLOAT AS apart" if scores else "NULL::FLOAT AS apart")
    connection.execute(
        f"CREATE TEMP TABLE slim AS SELECT {', '.join(fields)} FROM scores WHERE status = ?", [str(Status.OK)]
    )


def scores_of(connection: duckdb.DuckDBPyConnection, aspects: Sequence[Aspect]) -> dict[Aspect, np.ndarray]:
    """The scores of each aspect as float32 [rows], NaN where there is none."""
    if not aspects:
        return {}
    arrays = connection.execute(f"SELECT {', '.join(aspects)} FROM slim").fetchnumpy()
    return {aspect: np.ma.filled(arrays[aspect].astype(np.float32), np.nan) for aspect in aspects}


def aspect_figures(
    connection: duckdb.DuckDBPyConnection,
    columns: Sequence[str],
    sources: dict[Aspect, str],
    scores: dict[Aspect, np.ndarray],
) -> list[AspectFigures]:
    """The distribution of each aspect that has scores."""
    found = []
    for aspect, source in sources.items():
        values = scores[aspect][~np.isnan(scores[aspect])]
        words = dict.fromkeys(RATING_WORDS, 0)
        if f"{aspect}_rating" in columns:
            sql = f"SELECT {aspect}_rating, count(*) FROM scores WHERE {aspect}_rating IS NOT NULL GROUP BY 1"
            words |= {word: n for word, n in connection.execute(sql).fetchall() if word in words}
        interval = None
        if {f"{aspect}_mos_low", f"{aspect}_mos_high"} <= set(columns):
            sql = f"SELECT avg({aspect}_mos_high - {aspect}_mos_low) FROM scores"
            ((interval,),) = connection.execute(sql).fetchall()
        found.append(AspectFigures(aspect, source, spread(values), histogram(values), tuple(words.values()), interval))
    return found


def spread(values: np.ndarray) -> Spread:
    """The spread of scores [n], n at least 1, none of them NaN."""
    quantiles = np.quantile(values, _QUANTILES)
    return Spread(
        len(values),
        float(values.mean(dtype=np.float64)),
        float(values.std(dtype=np.float64)),
        tuple(quantiles.tolist()),
    )


def histogram(values: np.ndarray) -> tuple[int, ...]:
    """Scores [n] counted into `BINS` bins; what lies beyond the scale counts at its end."""
    counts, _ = np.histogram(np.clip(values, *_RANGE), BINS, _RANGE)
    return tuple(counts.tolist())


def pair_figures(scores: dict[Aspect, np.ndarray]) -> list[PairFigures]:
    """Every two aspects against each other."""
    aspects, found = list(scores), []
    for i, x in enumerate(aspects):
        for y in aspects[i + 1 :]:
            both = ~(np.isnan(scores[x]) | np.isnan(scores[y]))
            a, b = scores[x][both], scores[y][both]
            cells, _, _ = np.histogram2d(np.clip(a, *_RANGE), np.clip(b, *_RANGE), CELLS, (_RANGE, _RANGE))
            varies = len(a) > 2 and np.ptp(a) > 0 and np.ptp(b) > 0
            step = max(1, len(a) // _RANKED)
            pearson = float(stats.pearsonr(a, b).statistic) if varies else None
            spearman = float(stats.spearmanr(a[::step], b[::step]).statistic) if varies else None
            found.append(PairFigures(x, y, len(a), pearson, spearman, cells.astype(np.int64)))
    return found


def generator_figures(connection: duckdb.DuckDBPyConnection, aspects: Sequence[Aspect]) -> list[GeneratorFigures]:
    """The generators with the most rows; empty where no row names one."""
    quantiles = ", ".join(map(str, _QUANTILES))
    parts = [f"count({a}), avg({a}), stddev_pop({a}), quantile_cont({a}, [{quantiles}])" for a in aspects]
    sql = f"SELECT {', '.join(['generator', 'count(*)', *parts])} FROM slim GROUP BY 1 ORDER BY 2 DESC, 1"
    rows = connection.execute(f"{sql} LIMIT {_GENERATORS}").fetchall()
    if all(row[0] is None for row in rows):
        return []
    found = []
    for name, count, *figures in rows:
        spreads = {}
        for i, aspect in enumerate(aspects):
            n, mean, sd, quantiles_of = figures[4 * i : 4 * i + 4]
            if n:
                spreads[aspect] = Spread(n, mean, sd, tuple(quantiles_of))
        found.append(GeneratorFigures(name, count, spreads))
    return found


def problems(connection: duckdb.DuckDBPyConnection, columns: Sequence[str]) -> list[Problem]:
    """Rows that are not ok, and notes of those that are, by reason: the part of `error` before its details."""
    if "error" not in columns:
        return []
    # "too large: 9000x9000 pixels ..." and "there is no such file: /a/b.png" differ in their details only.
    reason = (
        "regexp_replace(CASE WHEN status = 'ok' THEN split_part(error, ';', 1) "
        "ELSE regexp_extract(error, '^[^:;(]*') END, '''[^'']*''|[0-9]+', '…', 'g')"
    )
    sql = (
        f"SELECT status, {reason} AS reason, count(*), min_by(error, id), min(id) FROM scores "
        f"WHERE error IS NOT NULL GROUP BY 1, 2 ORDER BY status = 'ok', 3 DESC, 2 LIMIT {_PROBLEMS}"
    )
    return [Problem(*row) for row in connection.execute(sql).fetchall()]
