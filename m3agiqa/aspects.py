"""The three aspects, the five rating words and the score scale. Imports nothing of the project.

Source: M3-AGIQA (arXiv 2502.15167), section 3: three aspects, five words, MOS from 0 to 5.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from enum import StrEnum


class Aspect(StrEnum):
    """What is judged about an AI-generated image."""

    QUALITY = "quality"
    CORRESPONDENCE = "correspondence"
    AUTHENTICITY = "authenticity"

    @property
    def needs_prompt(self) -> bool:
        """Whether the aspect has a meaning only for an image whose prompt is known."""
        return self is Aspect.CORRESPONDENCE


RATING_WORDS: tuple[str, ...] = ("bad", "poor", "fair", "good", "excellent")
"""The answers of round 2, from the lowest to the highest."""

SCALE_MIN = 0.0
SCALE_MAX = 5.0
"""Every score, mean opinion scores included, is on this one scale: 0 is worst, 5 is best."""

RATING_LEVELS: tuple[float, ...] = tuple(
    SCALE_MIN + (SCALE_MAX - SCALE_MIN) * i / (len(RATING_WORDS) - 1) for i in range(len(RATING_WORDS))
)
"""The score that each rating word stands for: 0, 1.25, 2.5, 3.75 and 5."""


def expected_score(probs: Sequence[float]) -> float:
    """The expected value of the rating words on the 0 to 5 scale.

    Args:
        probs: five probabilities, *bad* to *excellent*, that sum to 1.

    Raises:
        ValueError: if there are not exactly five.
    """
    if len(probs) != len(RATING_WORDS):
        raise ValueError(f"{len(probs)} probabilities, but there are {len(RATING_WORDS)} rating words")
    return sum(p * level for p, level in zip(probs, RATING_LEVELS, strict=True))


def word_between(score: float, edges: Sequence[float]) -> str:
    """The rating word of a score; each of the four ascending `edges` is where the next word begins.

    Raises:
        ValueError: for a score that is not finite: it has no word.
    """
    if not math.isfinite(score):
        raise ValueError(f"a score of {score} has no rating word")
    return RATING_WORDS[bisect_right(edges, score)]


_EDGES = tuple(SCALE_MIN + (SCALE_MAX - SCALE_MIN) * i / len(RATING_WORDS) for i in range(1, len(RATING_WORDS)))


def word_of_score(score: float) -> str:
    """The rating word of a score in [0, 5], in five bins of equal width (paper, section 4.1)."""
    return word_between(score, _EDGES)
