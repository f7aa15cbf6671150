"""Rating words from human scores: stated bins by data set and aspect, and whether given words fit given scores."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from m3agiqa.aspects import RATING_WORDS, Aspect, word_between

_FITS = 0.99
"""Words that agree with scores in this share of the rows were made from them; the rest is rounding."""


@dataclass(frozen=True)
class Bins:
    """Where one rating word ends and the next begins.

    Attributes:
        edges: four ascending scores, on the scale of the scores; one that equals an edge has the higher word.
    """

    edges: tuple[float, float, float, float]

    def __post_init__(self) -> None:
        if len(self.edges) != len(RATING_WORDS) - 1 or not all(map(math.isfinite, self.edges)):
            raise ValueError(f"{list(self.edges)} are not four finite scores")
        if any(a >= b for a, b in itertools.pairwise(self.edges)):
            raise ValueError(f"{list(self.edges)} do not ascend")

    def word(self, score: float) -> str:
        """The rating word of a score.

        Raises:
            ValueError: for a score that is not finite.
        """
        return word_between(score, self.edges)


def equal_bins(low: float, high: float) -> Bins:
    """Five bins of equal width on a scale; each edge is the float nearest to it.

    Raises:
        ValueError: if the scale does not go up.
    """
    # In decimal fractions, as people write scores: of floats the third edge of 1 to 5 would be just above 3.4.
    lowest, width = Fraction(str(low)), (Fraction(str(high)) - Fraction(str(low))) / len(RATING_WORDS)
    first, second, third, fourth = (float(lowest + i * width) for i in range(1, len(RATING_WORDS)))
    return Bins((first, second, third, fourth))


NAMED_BINS: dict[str, dict[Aspect, Bins]] = {
    # The published quality words of AGIQA-3k are those of mos_quality in these bins, in each of 2,982 rows. The
    # published correspondence words are the same words; ours are made from mos_align.
    "agiqa-3k": {Aspect.QUALITY: equal_bins(0, 5), Aspect.CORRESPONDENCE: equal_bins(0, 5)},
    "aigciqa2023": {aspect: equal_bins(0, 100) for aspect in Aspect},
    # Its one score weighs quality and correspondence together, and is used as that of quality.
    "aigiqa-20k": {Aspect.QUALITY: equal_bins(0, 5)},
}
"""Bins by data set and aspect, on the scale that the data set's scores are published on."""


@dataclass(frozen=True)
class Fit:
    """How well rating words agree with the words of one column of scores.

    Attributes:
        rows: that have both. same, within_one: shares of them.
    """

    column: str
    rows: int
    same: float
    within_one: float


def fits(words: Sequence[str | None], scores: Mapping[str, Sequence[float | None]], bins: Bins) -> list[Fit]:
    """Compares words [n] with each column of scores [n], the best first; a column that shares no row is left out.

    Raises:
        ValueError: if a column is not as long as the words, or a word is none of the five.
    """
    found = []
    for column, values in scores.items():
        pairs = [
            (RATING_WORDS.index(word), RATING_WORDS.index(bins.word(value)))
            for word, value in zip(words, values, strict=True)
            if word is not None and value is not None and math.isfinite(value)
        ]
        if pairs:
            same = sum(a == b for a, b in pairs) / len(pairs)
            within = sum(abs(a - b) <= 1 for a, b in pairs) / len(pairs)
            found.append(Fit(column, len(pairs), same, within))
    return sorted(found, key=lambda fit: -fit.same)


def mismatch(found: Sequence[Fit], column: str) -> str | None:
    """What is wrong with words that should have been made from `column`; None: nothing.

    Args:
        found: what `fits` returned for that column and any others.
    """
    own = next((fit for fit in found if fit.column == column), None)
    if own is None:
        return f"no row has both a word and {column}"
    if own.same >= _FITS:
        return None
    share = f"the words agree with {column} in {own.same:.0%} of {own.rows} rows"
    best = found[0]
    if best.column != column and best.same >= _FITS:
        return f"{share}, and with {best.column} in {best.same:.0%}: they were made from {best.column}"
    return f"{share}: they were made in other bins, or not from these scores"
