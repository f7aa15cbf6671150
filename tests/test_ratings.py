"""Rating words from scores, and whether words and scores belong together."""

import math

import pytest

from m3agiqa.aspects import RATING_WORDS, Aspect, word_of_score
from m3agiqa.ratings import NAMED_BINS, Bins, equal_bins, fits, mismatch


def test_equal_bins_are_those_of_the_0_to_5_scale():
    bins = equal_bins(0, 5)
    assert bins.edges == (1, 2, 3, 4)
    for score in (-1, 0, 0.99, 1, 1.999, 2, 2.5, 3, 3.99, 4, 5, 9):
        assert bins.word(score) == word_of_score(score)
    assert [equal_bins(0, 100).word(s) for s in (19.9, 20, 59, 60, 80)] == ["bad", "poor", "fair", "good", "excellent"]
    assert [equal_bins(1, 5).word(s) for s in (1.7, 1.9)] == ["bad", "poor"]


EDGES = [
    ((1, 5), ("1.8", "2.6", "3.4", "4.2")),
    ((0, 1), ("0.2", "0.4", "0.6", "0.8")),
    ((1, 100), ("20.8", "40.6", "60.4", "80.2")),
    ((1, 7), ("2.2", "3.4", "4.6", "5.8")),
    ((1, 10), ("2.8", "4.6", "6.4", "8.2")),
    ((-1, 1), ("-0.6", "-0.2", "0.2", "0.6")),
    ((0.1, 1.1), ("0.3", "0.5", "0.7", "0.9")),
    ((-1, 1.5), ("-0.5", "0", "0.5", "1")),
]


@pytest.mark.parametrize(("scale", "written"), EDGES)
def test_a_score_on_an_edge_has_the_higher_word(scale, written):
    bins = equal_bins(*map(float, scale))
    edges = [float(text) for text in written]
    assert [bins.word(edge) for edge in edges] == list(RATING_WORDS[1:])
    assert [bins.word(math.nextafter(edge, -math.inf)) for edge in edges] == list(RATING_WORDS[:-1])


def test_bins_of_data_sets():
    assert NAMED_BINS["agiqa-3k"][Aspect.CORRESPONDENCE].word(3.2) == "good"
    assert NAMED_BINS["aigciqa2023"][Aspect.AUTHENTICITY].word(50) == "fair"
    assert Aspect.CORRESPONDENCE not in NAMED_BINS["aigiqa-20k"]


@pytest.mark.parametrize("edges", [(1, 2, 3), (1, 2, 2, 3), (4, 3, 2, 1), (1, 2, 3, math.inf)])
def test_edges_that_are_none(edges):
    with pytest.raises(ValueError):
        Bins(edges)


def test_a_score_that_does_not_exist_has_no_word():
    with pytest.raises(ValueError, match="no rating word"):
        Bins((1, 2, 3, 4)).word(math.nan)
    with pytest.raises(ValueError, match="no rating word"):
        word_of_score(math.nan)


QUALITY = [0.5, 1.5, 2.5, 3.5, 4.5, None]
ALIGN = [4.5, 1.5, 3.5, 3.5, 0.5, 1.0]
SCORES = {"mos_quality": QUALITY, "mos_align": ALIGN, "std": [None] * 6}


def test_words_that_were_made_from_another_column_are_found_out():
    found = fits([*RATING_WORDS, None], SCORES, equal_bins(0, 5))
    assert [(fit.column, fit.rows, fit.same, fit.within_one) for fit in found] == [
        ("mos_quality", 5, 1.0, 1.0),
        ("mos_align", 5, 0.4, 0.6),
    ]
    assert mismatch(found, "mos_quality") is None
    assert mismatch(found, "mos_align") == (
        "the words agree with mos_align in 40% of 5 rows, and with mos_quality in 100%: they were made from mos_quality"
    )
    assert mismatch(found, "std") == "no row has both a word and std"


def test_words_of_other_bins_are_found_out():
    found = fits([*RATING_WORDS, None], SCORES, Bins((2, 3, 4, 4.2)))
    assert "other bins" in (mismatch(found, "mos_quality") or "")
