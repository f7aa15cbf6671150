"""What gives a score away, and what does not."""

import pytest

from m3agiqa.distil.leaks import find_leak


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("It comes to about 3.4.", "3.4"),
        ("It comes to 3,4 in all.", "3,4"),
        ("A solid 3.41 picture.", "3.41"),
        ("That makes 3.4/5.", "3.4"),
        ("Worth 4 out of 5.", "4 out of 5"),
        ("A clear 7/10.", "7/10"),
        ("Around 68% of perfection.", "68%"),
        ("Some three point four.", "three point four"),
        ("Three and a half would be generous.", "three and a half"),
        ("A three-star image.", "three-star image"),
        ("It deserves a 3.", "deserves a 3"),
        ("It comes to about 3.", "comes to about 3"),
        ("Sharp in front, soft behind; all in all that comes to three.", "comes to three"),
        ("Its realism settles near 3, as the hands are wrong.", "settles near 3"),
        ("The quality is close to 3 because of the grain.", "quality is close to 3"),
        ("Soft edges. Around 3.", "around 3"),
        ("Soft edges. Overall, perhaps around three!", "around three"),
        ("This fits its score of three.", "score"),
        ("Its rating is no surprise.", "rating"),
        ("Viewers rated it so.", "rated"),
        ("On a scale it is high.", "on a scale"),
        ("Human judgements agree.", "human judgements"),
        ("The quality is good.", "quality is good"),
        ("The overall quality can be described as quite poor, for the grain.", "poor"),
        ("This is an excellent image.", "is an excellent image"),
        ("Sharp eyes. Overall, fair.", "overall, fair"),
        ("It shows poor technical quality.", "poor technical quality"),
        ("I would call it 'good'.", "good"),
        ("Judged as fair.", "judged as fair"),
        ("Good.", "good"),
    ],
)
def test_leaks(text, what):
    found = find_leak(text, 3.41)
    assert found is not None
    assert what in found


@pytest.mark.parametrize(
    "text",
    [
        "Good lighting, fair skin and poor contrast in the two corners; excellent detail in the fur.",
        "Three people and 2 dogs stand before 11 trees under two points of light.",
        "An f/1.8 blur, like that of a 50 mm lens, lies over the background.",
        "The image shows a good deal of grain, and it is fair to say that the edges are soft.",
        "Its subject is separated from a background of scorecards.",
        "Seen in 1994 on five-pointed stars.",
        "The number of dogs comes to three, and that of cats to about 3.",
        "Of the five dogs that were asked for there are around three, and the picture is about 3 metres wide.",
        "It comes to three people and is around 1994. About three, each with a hat, stand near; the clock sits at 3.",
        "The image is about three friends; it comes to about 3 mm, or 3-4 pixels, and it is close to 2,500 years old.",
    ],
)
def test_what_describes_a_part_or_counts_things_is_no_leak(text):
    assert find_leak(text, 3.41) is None


def test_what_stands_in_the_prompt_is_no_leak():
    text = "The word rating on the poster is legible, and so is 3.4 below it."
    assert find_leak(text, 3.41) is not None
    assert find_leak(text, 3.41, "a poster that says: Rating 3.4") is None
    assert find_leak(text, 3.41, "a poster that says: 3.4") == "mentions a rating ('rating')"


def test_scales_of_many_steps():
    assert find_leak("About 56 in all.", 56.23) == "states the score ('56')"
    assert find_leak("Fifty-six point two, to be exact.", 56.23) is not None
    assert find_leak("There are 55 windows.", 56.23) is None
    assert find_leak("There are 3 windows.", 3.0) is None


@pytest.mark.parametrize("text", ["Some .85 in all.", "It is (.85).", "That makes 0.85.", "0,85 at most."])
def test_scales_below_one(text):
    assert (find_leak(text, 0.85) or "").startswith("states the score ('")
    assert find_leak(text, 0.4) is None


def test_a_point_within_a_name_is_no_number():
    assert find_leak("The sign reads v.85 ...85, model.85 and 1.2.85.", 0.85) is None


@pytest.mark.parametrize(
    "text",
    [
        "Some -0.6 in all.",
        "It is −.6 in all.",
        "Minus zero point six.",
        "A negative 0.6, then.",
        "Minus .6 it is.",
        "(-0,61)",
    ],
)
def test_scores_below_zero(text):
    assert (find_leak(text, -0.6) or "").startswith("states the score ('")
    assert find_leak(text, -0.2) is None


def test_a_hyphen_that_joins_or_spans_is_no_minus():
    assert find_leak("An f-0.6 lens and a blur of 0.2-0.6 mm.", -0.6) is None
    # One that stands by itself may be a dash.
    assert find_leak("So be it - 0.6 it is.", 0.6) is not None
