"""The figures: what they are of scores that are known."""

import json
from importlib.resources import files
from pathlib import Path

from m3agiqa.aspects import Aspect, word_of_score
from m3agiqa.tiny.card import write_card
from m3agiqa.tiny.examples import describe_quality
from m3agiqa.tiny.figures import faults_named, first_fault, measured, monotone, of_aspect, srcc
from m3agiqa.tiny.opinions import LADDER, LADDER_KINDS, label_column

MODEL = Path(str(files("m3agiqa.tiny"))) / "model"


def scored(part, truth, mos, fault=None, said="", **more):
    row = {"part": part, "fault": fault, "severity": None, "crop": None, "quality_description": said} | more
    for aspect in Aspect:
        row |= {
            label_column(aspect): truth,
            f"{aspect}_mos": mos,
            f"{aspect}_rating_score": mos,
            f"{aspect}_rating": None if mos is None else word_of_score(mos),
        }
    return row


def test_scores_in_the_right_order_have_srcc_1():
    rows = [scored("scenes", truth, truth / 2) for truth in (0.5, 1.5, 2.5, 3.5, 4.5)]
    found = of_aspect(rows, Aspect.QUALITY)
    assert found["srcc"] == found["srcc_rating"] == 1
    assert (found["images"], found["word"], found["word_within_one"], found["majority_word"]) == (5, 0.2, 0.6, 0.2)


def test_rows_of_which_nothing_is_known_do_not_count():
    rows = [scored("scenes", None, 2.0), scored("scenes", 1.0, None), scored("scenes", 1.0, 2.0)]
    assert of_aspect(rows, Aspect.QUALITY) is None
    assert srcc([1, 1], [1, 2]) is None


def test_a_fault_must_be_named_first():
    said = ["The image is clearly noisy and slightly blurred.", "The image is sharp and clean."]
    assert [first_fault(text) for text in said] == ["noise", None]
    rows = [scored("scenes", 1.0, 1.0, fault, said[0]) for fault in ("noise", "blur", None)]
    assert faults_named(rows) == 0.5
    assert faults_named([]) is None


def test_a_crop_falls_only_where_every_level_is_below_the_one_before():
    rows = [
        scored("ladder", None, score - (0.01 if kind == "blur" else 0), crop=crop, severity=level)
        for crop, scores in ((0, (5, 4, 3, 2, 1)), (1, (5, 4, 4, 2, 1)))
        for level, score in zip(LADDER, scores, strict=True)
        for kind in LADDER_KINDS
    ]
    assert monotone(rows) == {"crops": 2, "falling": 0.5}
    assert monotone([]) == {"crops": 0, "falling": None}


def test_the_card_says_what_was_measured(tmp_path):
    said = describe_quality(())
    rows = [scored(part, t, t, "blur", said) for part in ("scenes", "photographs", "unseen") for t in (1.0, 2.0, 4.0)]
    card = json.loads((MODEL / "card.json").read_text()) | {
        "results": measured(rows) | {"eye": {"quality": 0.5, "authenticity": None}}
    }
    write_card(tmp_path, card)
    assert json.loads((tmp_path / "card.json").read_text())["results"] == card["results"]
    text = (tmp_path / "README.md").read_text()
    for line in ("| scenes | quality | 3 | 1.000 |", "| both | quality | 6 | 1.000 |"):
        assert line in text
