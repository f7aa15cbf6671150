"""From scores to rating words, by bins that are stated."""

from bisect import bisect_right
from dataclasses import dataclass

from m3agiqa.aspects import RATING_WORDS


@dataclass(frozen=True)
class Bins:
    """Which scores a rating word stands for.

    Attributes:
        edges: where *poor*, *fair*, *good* and *excellent* begin; what is below the first is *bad*.
    """

    edges: tuple[float, float, float, float]

    def word(self, score: float) -> str:
        """The rating word of a score."""
        return RATING_WORDS[bisect_right(self.edges, score)]


def equal_bins(low: float, high: float) -> Bins:
    """Five bins of equal width between the lowest and the highest score."""
    width = (high - low) / len(RATING_WORDS)
    return Bins((low + width, low + 2 * width, low + 3 * width, low + 4 * width))
