"""How well rating words agree with the words of human scores."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from m3agiqa.aspects import RATING_WORDS
from m3agiqa.evaluation.bootstrap import interval, mean_deviations
from m3agiqa.evaluation.draws import Draws, Ints
from m3agiqa.evaluation.metrics import Floats
from m3agiqa.ratings import Bins


def numbers(words: Sequence[str | None]) -> Ints:
    """Places [n] of words among the five; -1 for None and anything else."""
    place = {word: i for i, word in enumerate(RATING_WORDS)}
    return np.array([place.get(str(word), -1) for word in words], np.int64)


def of_scores(scores: Floats, bins: Bins) -> Ints:
    """Places [n] of the words of scores [n]; one that equals an edge has the higher word."""
    return np.searchsorted(np.array(bins.edges), scores, side="right")


def agreement(given: Ints, wanted: Ints, draws: Draws) -> dict[str, Any]:
    """Compares words [n] with those of the human scores [n], all 0 to 4.

    Returns:
        `accuracy` and `within_one` with their intervals; `confusion`, rows are the human words; `f1` of each word, None
        where nobody has it; `macro_f1` over the words that either has.
    """
    confusion = np.zeros((5, 5), np.int64)
    np.add.at(confusion, (wanted, given), 1)
    f1, macro = _f1(confusion[None])
    found: dict[str, Any] = {"rows": len(given)}
    for name, hits in (("accuracy", given == wanted), ("within_one", np.abs(given - wanted) <= 1)):
        share = float(hits.mean())
        ends = interval(share, mean_deviations(hits.astype(np.float64), draws), len(hits))
        found[name] = {"value": share, "low": ends and ends[0], "high": ends and ends[1]}
    ends = interval(float(macro[0]), _macro_deviations(given, wanted, draws), len(given))
    found["macro_f1"] = {"value": float(macro[0]), "low": ends and ends[0], "high": ends and ends[1]}
    f1_by_word = zip(RATING_WORDS, f1[0].tolist(), strict=True)
    found["f1"] = {word: None if np.isnan(value) else value for word, value in f1_by_word}
    return found | {"confusion": confusion.tolist()}


def _macro_deviations(given: Ints, wanted: Ints, draws: Draws) -> Floats:
    parts = []
    for subset in draws.by_row:
        cells = np.eye(25)[wanted[subset.rows] * 5 + given[subset.rows]]
        drawn = (subset.weights.astype(np.float64) @ cells).reshape(-1, 5, 5)
        parts.append(_f1(drawn)[1] - _f1(cells.sum(0).reshape(1, 5, 5))[1])
    return np.concatenate(parts)


def _f1(confusion: Any) -> tuple[Floats, Floats]:
    """F1 of each word [m, 5], NaN where neither has it, and their mean [m], of confusions [m, 5, 5]."""
    right = np.einsum("mii->mi", confusion).astype(np.float64)
    both = confusion.sum(1) + confusion.sum(2)
    each = np.where(both > 0, 2 * right / np.maximum(both, 1), np.nan)
    return each, np.nanmean(each, axis=1)
