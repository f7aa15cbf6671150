"""A teacher that is not shown the scores is not to learn them in another way."""

import re

from tests.distil.distilling import run, written
from tests.distil.teacher_server import described, good


def test_a_number_near_the_score_tells_a_blind_teacher_nothing(teacher, labelled, tmp_path):
    """p3 has the score 3.4; a blind teacher cannot know, and names a number near it by chance."""
    texts = {"p3": "Its grain is some 3.4 pixels wide.", "p2": "The quality is good, of 2.37 kinds."}
    teacher.behave = lambda ask: described(texts[ask.prompt]) if ask.prompt in texts and ask.number == 1 else good(ask)
    done = run(teacher, labelled, tmp_path / "blind", "ask.blind=true")
    assert written(tmp_path / "blind")["i3"]["teacher_quality_description"] == texts["p3"]
    assert done["answers"] == {"paid": 6, "ok": 5, "leak": 1}
    (again,) = (ask.body["messages"] for ask in teacher.asks if len(ask.body["messages"]) > 2)
    assert "gives a verdict ('quality is good')" in again[-1]["content"]
    assert not re.search(r"\d", again[-1]["content"])


def test_a_teacher_that_was_told_is_asked_again(teacher, labelled, tmp_path):
    teacher.behave = lambda ask: described("Some 3.4 pixels wide.") if ask.number == 1 else good(ask)
    assert run(teacher, labelled, tmp_path / "out")["answers"] == {"paid": 6, "ok": 5, "leak": 1}
