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
