"""Whether intervals hold the human score as often as they say, and scores mean what they say."""

from typing import Any

import numpy as np
from scipy import stats

from m3agiqa.evaluation.bootstrap import interval, mean_deviations
from m3agiqa.evaluation.draws import Draws
from m3agiqa.evaluation.metrics import Floats

BINS = 10


def coverage(low: Floats, high: Floats, labels: Floats, draws: Draws, level: float | None) -> dict[str, Any]:
    """The share of labels [n] within [low, high] [n], ends included, and how wide these are.

    Args:
        level: how often they are meant to hold; None where that is not known.
    """
    inside = ((low <= labels) & (labels <= high)).astype(np.float64)
    share = float(inside.mean())
    ends = interval(share, mean_deviations(inside, draws), len(labels))
    return {
        "rows": len(labels),
        "stated_level": level,
        "coverage": {"value": share, "low": ends and ends[0], "high": ends and ends[1]},
        "mean_width": float((high - low).mean()),
        "below": float((labels < low).mean()),
        "above": float((labels > high).mean()),
    }


def reliability(scores: Floats, labels: Floats, bins: int = BINS) -> dict[str, Any]:
    """Mean score beside mean human score, in bins of ascending score: tenths of the rows, equal scores never apart.

    Returns:
        `bins`: `rows`, `score`, `label` and `spread` (standard deviation of the labels) of each; `error`: the mean
        absolute difference of the two means, weighted by rows.
    """
    places = np.ceil(stats.rankdata(scores) * bins / len(scores)).astype(np.int64)
    parts = [np.flatnonzero(places == place) for place in np.unique(places)]
    found = [
        {
            "rows": len(part),
            "score": float(scores[part].mean()),
            "label": float(labels[part].mean()),
            "spread": float(labels[part].std()),
        }
        for part in parts
    ]
    error = sum(one["rows"] * abs(one["score"] - one["label"]) for one in found) / len(scores)
    return {"bins": found, "error": error}
