"""The corpus: what is held out never is in the training, and everything that is written down is true."""

import csv
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from m3agiqa.aspects import Aspect
from m3agiqa.tiny import corpus
from m3agiqa.tiny.corpus import Pool, collage_base, draw_scene, is_held_out, load_photographs, make_base
from m3agiqa.tiny.degrade import DEGRADATIONS, UNSEEN_DEGRADATIONS
from m3agiqa.tiny.facts import ITEMS, Facts, draw_damage
from m3agiqa.tiny.opinions import (
    LADDER,
    LADDER_KINDS,
    description_column,
    held_out_pictures,
    label_column,
    training_pictures,
    write,
)
from m3agiqa.tiny.pictures import Scene


def test_one_combination_in_seven_is_held_out_and_every_value_is_on_both_sides():
    scenes = [Scene(1, c, s, p) for c in ITEMS["colour"] for s in ITEMS["shape"] for p in ITEMS["place"]]
    held = [scene for scene in scenes if is_held_out(scene)]
    assert 0.1 < len(held) / len(scenes) < 0.2
    for chosen in (held, [scene for scene in scenes if not is_held_out(scene)]):
        for name in ("colour", "shape", "place"):
            assert {getattr(scene, name) for scene in chosen} == set(ITEMS[name])


def test_training_never_sees_what_is_held_out():
    bases = [make_base(seed) for seed in range(60)]
    assert not any(is_held_out(base.scene) for base in bases if base.scene)
    rng = np.random.default_rng(0)
    kinds = Counter(d.kind for _ in range(500) for d in draw_damage(None, rng).degradations)
    assert set(kinds) == set(DEGRADATIONS)
    assert not set(kinds) & set(UNSEEN_DEGRADATIONS)
    assert all(is_held_out(draw_scene(rng, held_out=True)) for _ in range(20))


def test_facts_follow_the_damage():
    rng = np.random.default_rng(1)
    drawn = [draw_damage(None, rng) for _ in range(300)]
    for facts in drawn:
        severities = [d.severity for d in facts.degradations]
        assert severities == sorted(severities, reverse=True)
        left = np.prod([1 - s for s in severities])
        assert facts.quality == pytest.approx(5 * left)
    assert {len(facts.degradations) for facts in drawn} == {0, 1, 2}
    assert Facts(None).quality == Facts(None).authenticity == 5


def test_a_pool_draws_the_same_from_the_same_generator():
    first, again = (Pool(1, 6).draw(5, np.random.default_rng(3)) for _ in range(2))
    assert all(np.array_equal(a.pixels, b.pixels) and a.facts == b.facts for a, b in zip(first, again, strict=True))


def test_the_manifest_of_what_is_held_out(tmp_path):
    manifest = write(tmp_path, held_out_pictures(40))
    with manifest.open(newline="") as file:
        rows = list(csv.DictReader(file))
    parts = Counter(row["part"] for row in rows)
    assert parts == {"scenes": 30, "photographs": 10, "unseen": 8, "ladder": len(LADDER) * len(LADDER_KINDS)}
    assert {row["fault"] for row in rows if row["part"] == "unseen"} <= set(UNSEEN_DEGRADATIONS)
    for row in rows:
        with Image.open(tmp_path / row["image_path"]) as image:
            assert image.size == (128, 128)
        assert 0 <= float(row[label_column("quality")]) <= 5
        # No prompt that is drawn fits a photograph.
        assert row["part"] != "photographs" or row[label_column("correspondence")] == ""
        # Nobody is to learn from it.
        assert row[description_column("quality")] == ""


def test_what_is_taught_stands_beside_the_scores(tmp_path):
    with write(tmp_path, training_pictures(12)).open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert row[description_column("quality")].startswith("The image is ")
        for aspect in Aspect:
            assert (row[label_column(aspect)] == "") == (row[description_column(aspect)] == "")


def test_training_pictures_are_other_ones_than_the_model_was_trained_on():
    assert [labelled.part for labelled in training_pictures(2)] == ["training"] * 2
    (first, second), (later,) = training_pictures(2), training_pictures(1, start=1)
    assert (later.sample.pixels == second.sample.pixels).all()
    assert (later.sample.pixels != first.sample.pixels).any()


def test_collages_differ_and_are_whole_pictures():
    photographs = load_photographs()
    first, second = (collage_base(photographs, np.random.default_rng(seed)) for seed in (1, 2))
    again = collage_base(photographs, np.random.default_rng(1))
    assert np.array_equal(first.pixels, again.pixels)
    for base in (first, second):
        assert base.scene is None
        assert not base.shape_map.any()
        assert base.pixels.shape[0] == base.pixels.shape[1] >= 128
        assert 10 < base.pixels.std() < 120
    assert first.pixels.mean() != second.pixels.mean()


def test_two_in_three_pictures_are_scenes_and_most_others_are_collages(monkeypatch):
    calls: Counter[str] = Counter()
    for name in ("scene_base", "collage_base", "photograph_base"):
        monkeypatch.setattr(corpus, name, lambda *_, name=name: calls.update([name]))
    for seed in range(600):
        corpus.make_base(seed)
    assert 0.6 < calls["scene_base"] / 600 < 0.7
    assert calls["collage_base"] > calls["photograph_base"] > 60
