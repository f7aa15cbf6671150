import pytest

from m3agiqa.aspects import RATING_LEVELS, RATING_WORDS, Aspect, expected_score, word_of_score
from m3agiqa.conversation import WORDINGS, parse_rating, questions


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        ("good", "good"),
        ("Good.", "good"),
        (" EXCELLENT\n", "excellent"),
        ("The quality is poor", "poor"),
        ("fair, fair", "fair"),
        ("", None),
        ("goodness", None),
        ("good to excellent", None),
        ("bad? no, fair", None),
        ("5", None),
        ("unfair", None),
    ],
)
def test_parse_rating(answer, word):
    assert parse_rating(answer) == word


@pytest.mark.parametrize("version", WORDINGS)
@pytest.mark.parametrize("aspect", Aspect)
def test_questions_hold_the_prompt_as_it_is_and_the_five_words(version, aspect):
    prompt = "a {cat} with {prompt} 100% <image>"
    asked = questions(aspect, prompt, version)
    assert asked.first.count(prompt) == 1
    assert all(word in asked.second for word in RATING_WORDS)


def test_aspects_are_asked_differently():
    assert len({questions(a, "x").first for a in Aspect}) == len({questions(a, "x").second for a in Aspect}) == 3


def test_the_shared_opening_comes_first():
    firsts = [questions(a, "a cat").first for a in Aspect]
    assert all(f.startswith(firsts[0][: len("The prompt of this AI-generated image is: 'a cat'")]) for f in firsts)


def test_without_a_prompt_nothing_is_said_of_one():
    assert "prompt" not in questions(Aspect.QUALITY, None).first
    with pytest.raises(ValueError, match="correspondence"):
        questions(Aspect.CORRESPONDENCE, None)
    with pytest.raises(ValueError, match="v7"):
        questions(Aspect.QUALITY, "a", "v7")


def test_published_wording_is_that_of_the_released_conversations():
    asked = questions(Aspect.QUALITY, "moon sea with stars and galaxies, anime style", "published")
    assert asked.first == (
        "Take a close look at this AI-generated image and tell me everything you can about what you see. "
        "It's original prompt is: 'moon sea with stars and galaxies, anime style'. "
        "Could you please help to analyze the image's quality?"
    )
    assert asked.second == (
        "Now based on your analysis, could you please help to rate the image based on it's overall quality? "
        "Please give me one word from the list [bad, poor, fair, good, excellent]. "
        "Notice that quality word in the list means from low to high."
    )


def test_scale():
    assert RATING_LEVELS == (0.0, 1.25, 2.5, 3.75, 5.0)
    assert expected_score([0, 0, 0, 0.5, 0.5]) == pytest.approx(4.375)
    with pytest.raises(ValueError, match="4 probabilities"):
        expected_score([0.25] * 4)
    assert [word_of_score(s) for s in (-1, 0, 0.99, 1, 2.5, 3.999, 4, 5, 9)] == [
        "bad",
        "bad",
        "bad",
        "poor",
        "fair",
        "good",
        "excellent",
        "excellent",
        "excellent",
    ]
