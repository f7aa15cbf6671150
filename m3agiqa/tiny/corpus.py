"""The corpus that the tiny model is trained and measured on: pictures of which everything is known.

A picture is a rendered scene (two in three), a collage or a square cut from a photograph, with artefacts and
degradations of known severity. What it is measured on is never trained on:

- *Scenes*: the combinations of colour, shape and place for which `is_held_out` holds, one in seven.
- *Photographs*: the six that the package ships; training has the others of `TRAINING_PHOTOGRAPHS`.
- *Degradation kinds*: `degrade.UNSEEN_DEGRADATIONS` (motion blur, impulse noise), measured apart.

Everything follows from a seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from m3agiqa.tiny.collages import collage, cutting
from m3agiqa.tiny.degrade import ARTEFACTS, degrade, falsify
from m3agiqa.tiny.facts import ITEMS, Facts, draw_damage
from m3agiqa.tiny.pictures import EYE, Picture, Scene, random_scene, render, to_bytes

TRAINING_PHOTOGRAPHS = {
    "skimage": (
        "data/brick.png",
        "data/camera.png",
        "data/coins.png",
        "data/grass.png",
        "data/gravel.png",
        "data/hubble_deep_field.jpg",
        "data/ihc.png",
        "data/moon.png",
        "data/motorcycle_left.png",
        "data/retina.jpg",
    ),
    "matplotlib": ("mpl-data/sample_data/grace_hopper.jpg",),
}
"""By the package that they come with."""

SCENELESS_SHARE = 0.35
"""How many of the pictures are no scenes: collages and photographs."""

COLLAGE_SHARE = 0.2
"""How many are collages: of these the greater part."""


@dataclass(frozen=True)
class Base:
    """An undamaged picture: what takes longest to make, so it serves for several samples.

    Attributes:
        pixels: square, height x width x 3 bytes.
        shape_map, colour_map: see `pictures.Rendered`; 0 everywhere for a photograph or a collage.
        centres: x and y of every object, as fractions of the side.
    """

    pixels: NDArray[np.uint8]
    scene: Scene | None
    shape_map: NDArray[np.uint8]
    colour_map: NDArray[np.uint8]
    centres: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Sample:
    """A damaged picture as the model sees it, and the truth about it.

    Attributes:
        pixels: `EYE` x `EYE` x 3 bytes.
        shape_map, colour_map: as those of `Base`, `EYE` x `EYE`.
        artefact_map: index into `ARTEFACTS` plus 1 per pixel, 0 where there is none.
    """

    pixels: NDArray[np.uint8]
    facts: Facts
    shape_map: NDArray[np.uint8]
    colour_map: NDArray[np.uint8]
    artefact_map: NDArray[np.uint8]
    centres: tuple[tuple[float, float], ...]

    def mirrored(self) -> "Sample":
        """The sample flipped left to right."""
        return replace(
            self,
            pixels=self.pixels[:, ::-1],
            shape_map=self.shape_map[:, ::-1],
            colour_map=self.colour_map[:, ::-1],
            artefact_map=self.artefact_map[:, ::-1],
            centres=tuple((1 - x, y) for x, y in self.centres),
        )


def is_held_out(scene: Scene) -> bool:
    """Whether this combination of colour, shape and place is kept from the training; the count is not looked at."""
    colour, shape, place = (ITEMS[name].index(getattr(scene, name)) for name in ("colour", "shape", "place"))
    return (colour + 2 * shape + 3 * place) % 7 == 0


def draw_scene(rng: np.random.Generator, held_out: bool) -> Scene:
    """A scene of those held out, or of the others."""
    while is_held_out(scene := random_scene(rng)) is not held_out:
        pass
    return scene


@cache
def load_photographs() -> tuple[Image.Image, ...]:
    """The photographs of the training."""
    paths = [files(package) / name for package, names in TRAINING_PHOTOGRAPHS.items() for name in names]
    return tuple(Image.open(str(path)).convert("RGB") for path in paths)


def scene_base(scene: Scene, seed: int, rng: np.random.Generator) -> Base:
    """`scene` drawn; most are drawn at the eye's own size, because that is four times as fast."""
    rendered = render(scene, seed, _side(rng))
    return Base(to_bytes(rendered.pixels), scene, rendered.shape_map, rendered.colour_map, rendered.centres)


def photograph_base(photographs: Sequence[Image.Image], rng: np.random.Generator) -> Base:
    """A random square of a photograph."""
    return _unknown(cutting(photographs, rng, _side(rng)))


def collage_base(photographs: Sequence[Image.Image], rng: np.random.Generator) -> Base:
    """A collage, which counts as a photograph."""
    return _unknown(collage(photographs, rng, _side(rng)))


def _unknown(pixels: Picture) -> Base:
    """A base of which nothing is known."""
    nothing = np.zeros(pixels.shape[:2], np.uint8)
    return Base(to_bytes(pixels), None, nothing, nothing)


def _side(rng: np.random.Generator) -> int:
    return 2 * EYE if rng.random() < 0.15 else EYE


def make_base(seed: int) -> Base:
    """The undamaged picture `seed` of the training."""
    rng = np.random.default_rng([seed, 13])
    chance = rng.random()
    if chance < SCENELESS_SHARE:
        kind = collage_base if chance < COLLAGE_SHARE else photograph_base
        return kind(load_photographs(), rng)
    return scene_base(draw_scene(rng, held_out=False), seed, rng)


def make_sample(base: Base, rng: np.random.Generator, facts: Facts | None = None) -> Sample:
    """`base` with the damage of `facts`, or with damage by chance."""
    facts = facts or draw_damage(base.scene, rng)
    pixels: Picture = base.pixels.astype(np.float32) / 255.0
    artefact_map = np.zeros_like(base.shape_map)
    for damage in facts.artefacts:
        pixels, where = falsify(pixels, damage, rng)
        artefact_map = (where * (list(ARTEFACTS).index(damage.kind) + 1)).astype(np.uint8)
    for damage in facts.degradations:
        pixels = degrade(pixels, damage, rng)
    step = len(pixels) // EYE
    thin = slice(step // 2, None, step)
    return Sample(
        pixels=to_eye(pixels),
        facts=facts,
        shape_map=base.shape_map[thin, thin],
        colour_map=base.colour_map[thin, thin],
        artefact_map=artefact_map[thin, thin],
        centres=base.centres,
    )


def to_eye(pixels: Picture) -> NDArray[np.uint8]:
    """A square picture at the model's resolution, scaled as its image processor scales."""
    image = Image.fromarray(to_bytes(pixels))
    return np.asarray(image.resize((EYE, EYE), Image.Resampling.LANCZOS))


class Pool:
    """Training pictures: each base is drawn once, and mirrored and damaged anew every time it is asked for."""

    def __init__(self, first: int, size: int) -> None:
        self.first, self.size = first, size
        self._bases: dict[int, Base] = {}

    def draw(self, count: int, rng: np.random.Generator) -> list[Sample]:
        """`count` samples; they follow from the state of `rng` alone."""
        samples = []
        for number in rng.integers(0, self.size, count).tolist():
            base = self._bases.setdefault(number, self._bases.get(number) or make_base(self.first + number))
            sample = make_sample(base, rng)
            samples.append(sample.mirrored() if rng.random() < 0.5 else sample)
        return samples
