"""Scenes and damage: the same from the same seed, worse with more severity, at any resolution."""

import numpy as np
import pytest

from m3agiqa.tiny.corpus import make_base, make_sample, to_eye
from m3agiqa.tiny.degrade import ARTEFACTS, DEGRADATIONS, UNSEEN_DEGRADATIONS, Damage, degrade, falsify, score
from m3agiqa.tiny.pictures import COLOURS, PLACES, SHAPES, Scene, random_scene, render

KINDS = [*DEGRADATIONS, *UNSEEN_DEGRADATIONS, *ARTEFACTS]
SCENE = Scene(2, "red", "sphere", "on a sandy plain")


def test_a_scene_says_what_it_shows():
    assert Scene(1, "blue", "cube", "in the snow").text == "a blue cube in the snow"
    assert Scene(3, "white", "star", "in the snow").text == "three white stars in the snow"


def test_rendering_follows_from_the_seed():
    first, again, other = (render(SCENE, seed) for seed in (3, 3, 4))
    assert np.array_equal(first.pixels, again.pixels)
    assert not np.array_equal(first.pixels, other.pixels)


@pytest.mark.parametrize("side", [128, 200, 256])
def test_objects_are_where_the_maps_say(side):
    rendered = render(SCENE, 5, side)
    assert rendered.pixels.shape == (side, side, 3)
    assert rendered.pixels.dtype == np.float32
    assert len(rendered.centres) == 2
    assert set(np.unique(rendered.shape_map)) == {0, SHAPES.index("sphere") + 1}
    red, green, blue = rendered.pixels[rendered.colour_map == list(COLOURS).index("red") + 1].mean(0)
    assert red > 2 * green
    assert red > 2 * blue


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_and_place_can_be_drawn(shape, place):
    rendered = render(Scene(1, "green", shape, place), 1)
    assert 300 < (rendered.shape_map > 0).sum() < 3500
    assert 0 <= rendered.pixels.min() <= rendered.pixels.max() <= 1


def test_random_scenes_stay_in_the_picture():
    rng = np.random.default_rng(0)
    for seed in range(40):
        for x, y in render(random_scene(rng), seed).centres:
            assert 0 < x < 1
            assert 0 < y < 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [128, 256])
def test_more_severe_is_further_from_the_picture(kind, side):
    rng = np.random.default_rng(2)
    pictures = [render(random_scene(rng), seed, side).pixels for seed in range(6)]
    distances = []
    for severity in (0.1, 0.5, 0.95):
        damaged = [_damaged(p, Damage(kind, severity), seed) for seed, p in enumerate(pictures)]
        # As the model sees them, whatever the resolution.
        seen = [np.abs(to_eye(a).astype(float) - to_eye(b)).mean() for a, b in zip(damaged, pictures, strict=True)]
        distances.append(np.mean(seen))
    assert 0 < distances[0] < distances[1] < distances[2]


def test_damage_follows_from_its_generator():
    picture = render(SCENE, 1).pixels
    for kind in KINDS:
        first, again = (_damaged(picture, Damage(kind, 0.5), 7) for _ in range(2))
        assert np.array_equal(first, again)


def test_an_artefact_leaves_the_rest_alone():
    picture = render(SCENE, 1).pixels
    for kind in ARTEFACTS:
        falsified, where = falsify(picture, Damage(kind, 0.3), np.random.default_rng(0))
        assert 0.05 < where.mean() < 0.5
        assert np.array_equal(falsified[~where], picture[~where])
        assert not np.array_equal(falsified[where], picture[where])


def test_the_score_falls_with_every_damage():
    assert score(()) == 5.0
    assert score((Damage("blur", 0.2),)) == pytest.approx(4.0)
    assert score((Damage("blur", 0.2), Damage("noise", 0.5))) == pytest.approx(2.0)


def test_a_sample_is_reproducible_and_mirrors_with_its_maps():
    base = make_base(11)
    sample, again = (make_sample(base, np.random.default_rng(4)) for _ in range(2))
    assert np.array_equal(sample.pixels, again.pixels)
    assert sample.pixels.shape == (128, 128, 3)
    mirrored = sample.mirrored()
    assert np.array_equal(mirrored.pixels[:, ::-1], sample.pixels)
    assert np.array_equal(mirrored.shape_map[:, ::-1], sample.shape_map)
    assert mirrored.facts == sample.facts


def _damaged(picture, damage, seed):
    rng = np.random.default_rng(seed)
    return falsify(picture, damage, rng)[0] if damage.kind in ARTEFACTS else degrade(picture, damage, rng)
