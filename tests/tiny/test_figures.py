"""The figures: what they are of scores that are known, and those of the shipped model."""

import itertools
import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from m3agiqa.aspects import Aspect, word_of_score
from m3agiqa.tiny.asking import ask
from m3agiqa.tiny.card import write_card
from m3agiqa.tiny.examples import Conversation, Encoder, describe_quality
from m3agiqa.tiny.figures import faults_named, first_fault, measured, monotone, of_aspect, srcc
from m3agiqa.tiny.opinions import LADDER, LADDER_KINDS, held_out_pictures, label_column

MODEL = Path(str(files("m3agiqa.tiny"))) / "model"


FLOORS = (0.45, 0.2, 0.12)
"""SRCC of quality, authenticity and correspondence."""


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
    card = json.loads((MODEL / "card.json").read_text()) | {"results": measured(rows)}
    write_card(tmp_path, card)
    assert json.loads((tmp_path / "card.json").read_text())["results"] == card["results"]
    text = (tmp_path / "README.md").read_text()
    for line in ("| scenes | quality | 3 | 1.000 |", "| both | quality | 6 | 1.000 |"):
        assert line in text


def test_the_shipped_figures_are_of_a_thousand_pictures():
    results = json.loads((MODEL / "card.json").read_text())["results"]
    assert results["scenes"]["quality"]["images"] == 750
    assert results["photographs"]["quality"]["images"] == 250
    assert results["both"]["quality"]["images"] == 1000
    assert results["ladder"]["crops"] >= 20


@pytest.mark.slow
def test_the_shipped_model_does_what_its_card_says():
    """On another 80 held-out pictures: floors far below the card, since so few scatter."""
    processor = AutoProcessor.from_pretrained(MODEL)
    model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()
    labelled = list(itertools.islice(held_out_pictures(1000, seed=8_000_000), 80))
    asked = [
        [Conversation(Aspect.QUALITY, k.about.prompt, "", k.sample.facts.quality) for k in labelled],
        [Conversation(Aspect.AUTHENTICITY, k.about.prompt, "", k.sample.facts.authenticity) for k in labelled],
    ]
    fitting = [k for k in labelled if k.sample.facts.readable and k.sample.facts.scene]
    asked.append([k.about for k in fitting])
    pixels = [[k.sample.pixels for k in chosen] for chosen in (labelled, labelled, fitting)]
    found = [
        srcc([answer.score for answer in ask(model, Encoder(processor), p, a)], [c.score for c in a])
        for p, a in zip(pixels, asked, strict=True)
    ]
    assert all(value > floor for value, floor in zip(found, FLOORS, strict=True)), found
