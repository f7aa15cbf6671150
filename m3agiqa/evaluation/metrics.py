"""How well scores agree with human scores, one figure each, in float64. What each means is in docs/numbers.md.

A figure that does not exist is None, and `why_none` says why. The rank statistics are scipy's; the logistic is the
five-parameter one of the Video Quality Experts Group (Sheikh et al. 2006, doi 10.1109/TIP.2006.881959, eq. 8).
"""

import warnings
from typing import Any

import numpy as np
from scipy import stats
from scipy.optimize import OptimizeWarning, curve_fit
from scipy.special import expit

from m3agiqa.errors import UserError

Floats = np.ndarray[Any, np.dtype[np.float64]]

METRICS = ("srcc", "plcc", "plcc_fitted", "krcc", "rmse", "rmse_fitted", "pairwise")
"""Names of the pooled figures, in the order in which they are shown."""
LEAST_TO_FIT = 10
"""Rows that the five parameters of the logistic need at least; with fewer it bends to every point."""
MOST_TO_FIT = 20_000
"""Rows that the logistic is fitted on at most: evenly spaced ones in the order of the scores."""


def check(scores: Floats, labels: Floats, what: str = "scores") -> None:
    """Refuses what no figure can be made of.

    Raises:
        UserError: for NaN and infinite values, shapes that differ or are not [n], and n = 0.
    """
    if scores.shape != labels.shape or scores.ndim != 1 or not len(labels):
        rule = f"are {list(scores.shape)}, and the human scores {list(labels.shape)}"
        raise UserError(what, rule, "give one human score for each, and at least one")
    for name, values in ((what, scores), ("human scores", labels)):
        if bad := int((~np.isfinite(values)).sum()):
            raise UserError(name, f"{bad} of {len(values)} are NaN or infinite", "leave them empty (null)")


def why_none(scores: Floats, labels: Floats) -> str | None:
    """Why correlations of scores [n] with labels [n] do not exist; None: they do."""
    if len(labels) < 2:
        return "one row only"
    if scores.min() == scores.max():
        return f"all scores are {scores[0]:g}"
    if labels.min() == labels.max():
        return f"all human scores are {labels[0]:g}"
    return None


def plcc(scores: Floats, labels: Floats) -> float | None:
    """Pearson's correlation."""
    if why_none(scores, labels) is not None:
        return None
    x, y = scores - scores.mean(), labels - labels.mean()
    # By the largest first: the squares of tiny or huge scores would leave the range of a float.
    x, y = x / np.abs(x).max(), y / np.abs(y).max()
    return float(np.clip((x @ y) / np.sqrt((x @ x) * (y @ y)), -1.0, 1.0))


def srcc(scores: Floats, labels: Floats) -> float | None:
    """Spearman's rank correlation; ties share their mean rank."""
    if why_none(scores, labels) is not None:
        return None
    return plcc(stats.rankdata(scores), stats.rankdata(labels))


def rmse(scores: Floats, labels: Floats) -> float:
    """Root of the mean squared error."""
    return float(np.sqrt(np.mean((scores - labels) ** 2)))


def tied_pairs(values: Floats) -> int:
    """How many pairs have equal values."""
    counts = np.unique(values, return_counts=True)[1]
    return int((counts * (counts - 1) // 2).sum())


def surplus(scores: Floats, labels: Floats) -> int:
    """Pairs in the same order by both, less those in opposite order; a pair that is tied in either counts nothing."""
    if why_none(scores, labels) is not None:
        return 0
    return _surplus(float(stats.kendalltau(scores, labels).statistic), scores, labels)


def _surplus(tau: float, scores: Floats, labels: Floats) -> int:
    pairs = len(labels) * (len(labels) - 1) // 2
    free = np.sqrt(float(pairs - tied_pairs(scores))) * np.sqrt(float(pairs - tied_pairs(labels)))
    return round(tau * free)


def krcc(scores: Floats, labels: Floats) -> float | None:
    """Kendall's tau-b."""
    return None if why_none(scores, labels) is not None else float(stats.kendalltau(scores, labels).statistic)


def pairwise(scores: Floats, labels: Floats, tau: float | None = None) -> float | None:
    """The share of pairs with different human scores that the scores order as people do; a tie counts one half.

    Args:
        tau: what `krcc` gave, where it is known.
    """
    differing = len(labels) * (len(labels) - 1) // 2 - tied_pairs(labels)
    if not differing:
        return None
    more = surplus(scores, labels) if tau is None else _surplus(tau, scores, labels)
    return (more + differing) / (2 * differing)


def logistic(x: Floats, b1: float, b2: float, b3: float, b4: float, b5: float) -> Floats:
    """b1 (1/2 - 1 / (1 + exp(b2 (x - b3)))) + b4 x + b5."""
    return b1 * (0.5 - expit(-b2 * (x - b3))) + b4 * x + b5


def fitted(scores: Floats, labels: Floats) -> Floats | None:
    """The scores [n] after the logistic that brings them nearest to the human scores; None where it cannot be fitted.

    It never does worse than a straight line, which is where the fit begins.
    """
    if len(labels) < LEAST_TO_FIT or why_none(scores, labels) is not None:
        return None
    centre, spread = float(scores.mean()), float(scores.std())
    x = (scores - centre) / spread
    places = np.argsort(x, kind="stable")[np.linspace(0, len(x) - 1, min(len(x), MOST_TO_FIT)).round().astype(int)]
    some, wanted = x[places], labels[places]
    slope, offset = (float(one) for one in np.polyfit(some, wanted, 1))
    height, middle = float(np.ptp(wanted)), float(wanted.mean())
    best, error = np.array([0.0, 1.0, 0.0, slope, offset]), np.inf
    for b1, b2, b4, b5 in ((0.0, 1.0, slope, offset), (height, 2.0, 0.0, middle), (-height, 2.0, 0.0, middle)):
        start = (b1, b2, 0.0, b4, b5)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", OptimizeWarning)  # the parameters' own uncertainty is not wanted
                found, _ = curve_fit(logistic, some, wanted, start, jac=_slopes, method="lm", maxfev=2000)
        except RuntimeError:  # not converged from there
            found = np.array(start)
        left = float(np.sum((logistic(some, *found) - wanted) ** 2))
        if left < error:
            best, error = found, left
    return logistic(x, *best)


def _slopes(x: Floats, b1: float, b2: float, b3: float, b4: float, b5: float) -> Floats:
    """Derivatives of `logistic` [n, 5] by its parameters."""
    down = expit(-b2 * (x - b3))
    bend = down * (1.0 - down)
    return np.stack([0.5 - down, b1 * bend * (x - b3), -b1 * bend * b2, x, np.ones_like(x)], axis=1)


def pooled(scores: Floats, labels: Floats, after: Floats | None, *, same_scale: bool) -> dict[str, float | None]:
    """Every figure of `METRICS` over all rows.

    Args:
        after: what `fitted` gave. same_scale: whether the scores are on the scale of the labels; without, no `rmse`.
    """
    tau = krcc(scores, labels)
    return {
        "srcc": srcc(scores, labels),
        "plcc": plcc(scores, labels),
        "plcc_fitted": None if after is None else plcc(after, labels),
        "krcc": tau,
        "rmse": rmse(scores, labels) if same_scale else None,
        "rmse_fitted": None if after is None else rmse(after, labels),
        "pairwise": pairwise(scores, labels, tau),
    }
