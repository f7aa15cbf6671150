"""Training pictures: a scene or a photograph, damaged by chance, with everything that is known of it."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from m3agiqa.tiny.degrade import ARTEFACTS, DEGRADATIONS, Damage, degrade, falsify, score
from m3agiqa.tiny.pictures import EYE, Picture, Scene, random_scene, render, to_bytes

TRAINING_PHOTOGRAPHS = (
    "brick.png",
    "camera.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "retina.jpg",
)
"""Of scikit-image's package; the photographs of the demo are not among them."""


@dataclass(frozen=True)
class Sample:
    """A picture as the model sees it, and the truth about it.

    Attributes:
        pixels: `EYE` x `EYE` x 3 bytes.
        scene: what is shown; None for a photograph.
        shape_map, colour_map: see `pictures.Rendered`; 0 everywhere for a photograph.
        artefact_map: index into `ARTEFACTS` plus 1 per pixel, 0 where there is none.
        centres: x and y of every object, as fractions of the side.
    """

    pixels: NDArray[np.uint8]
    scene: Scene | None
    degradations: tuple[Damage, ...]
    artefacts: tuple[Damage, ...]
    shape_map: NDArray[np.uint8]
    colour_map: NDArray[np.uint8]
    artefact_map: NDArray[np.uint8]
    centres: tuple[tuple[float, float], ...]

    @property
    def quality(self) -> float:
        """The true quality score."""
        return score(self.degradations)

    @property
    def authenticity(self) -> float:
        """The true authenticity score."""
        return score(self.artefacts)

    @property
    def readable(self) -> bool:
        """Whether the contents can still be made out."""
        return self.quality >= 1.0 and self.authenticity >= 2.5

    def mirrored(self) -> "Sample":
        """The sample flipped left to right."""
        return replace(
            self,
            pixels=self.pixels[:, ::-1],
            scene=self.scene and self.scene.mirrored(),
            shape_map=self.shape_map[:, ::-1],
            colour_map=self.colour_map[:, ::-1],
            artefact_map=self.artefact_map[:, ::-1],
            centres=tuple((1 - x, y) for x, y in self.centres),
        )


def load_photographs(names: tuple[str, ...] = TRAINING_PHOTOGRAPHS) -> list[Image.Image]:
    """Photographs of the scikit-image package."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    return [Image.open(folder / name).convert("RGB") for name in names]


@dataclass(frozen=True)
class Base:
    """An undamaged picture: what takes longest to make, so it serves for several samples."""

    pixels: NDArray[np.uint8]
    scene: Scene | None
    shape_map: NDArray[np.uint8]
    colour_map: NDArray[np.uint8]
    centres: tuple[tuple[float, float], ...]


def make_base(seed: int, photographs: list[Image.Image]) -> Base:
    """The undamaged picture of `seed`; one in six is cut from a photograph."""
    rng = np.random.default_rng([seed, 13])
    # Most are drawn at the eye's own size, because that is four times as fast.
    side = 2 * EYE if rng.random() < 0.15 else EYE
    if photographs and rng.random() < 1 / 6:
        nothing = np.zeros((side, side), np.uint8)
        pixels = _cut(photographs[int(rng.integers(len(photographs)))], rng, side)
        return Base(to_bytes(pixels), None, nothing, nothing, ())
    scene = random_scene(rng)
    rendered = render(scene, seed, side)
    return Base(to_bytes(rendered.pixels), scene, rendered.shape_map, rendered.colour_map, rendered.centres)


def make_sample(base: Base, rng: np.random.Generator) -> Sample:
    """`base` with artefacts and degradations by chance."""
    pixels: Picture = base.pixels.astype(np.float32) / 255.0
    artefacts = _draw_damage(rng, list(ARTEFACTS), (0.45, 0.55))
    # Under a strong degradation no eye could tell what the artefact is.
    degradations = _draw_damage(rng, list(DEGRADATIONS), (0.25, 0.55, 0.20), 0.5 if artefacts else 1.0)
    artefact_map = np.zeros_like(base.shape_map)
    for damage in artefacts:
        pixels, where = falsify(pixels, damage, rng)
        artefact_map = (where * (list(ARTEFACTS).index(damage.kind) + 1)).astype(np.uint8)
    for damage in degradations:
        pixels = degrade(pixels, damage, rng)
    step = len(pixels) // EYE
    thin = slice(step // 2, None, step)
    return Sample(
        pixels=to_eye(pixels),
        scene=base.scene,
        degradations=degradations,
        artefacts=artefacts,
        shape_map=base.shape_map[thin, thin],
        colour_map=base.colour_map[thin, thin],
        artefact_map=artefact_map[thin, thin],
        centres=base.centres,
    )


def to_eye(pixels: Picture) -> NDArray[np.uint8]:
    """A square picture at the model's resolution, scaled as its image processor scales."""
    image = Image.fromarray(to_bytes(pixels))
    return np.asarray(image.resize((EYE, EYE), Image.Resampling.LANCZOS))


def _cut(photograph: Image.Image, rng: np.random.Generator, side: int) -> Picture:
    """A random square of a photograph, mirrored, tinted or turned by chance: there are few of them."""
    edge = int(min(photograph.size) * rng.uniform(0.35, 1.0))
    left = int(rng.integers(photograph.width - edge + 1))
    top = int(rng.integers(photograph.height - edge + 1))
    piece = photograph.crop((left, top, left + edge, top + edge)).resize((side, side), Image.Resampling.LANCZOS)
    pixels = np.asarray(piece, np.float32) / 255.0
    pixels = np.rot90(pixels, int(rng.integers(4)))
    if rng.random() < 0.5:
        pixels = pixels[..., rng.permutation(3)]
    tint = rng.uniform(0.75, 1.0, 3).astype(np.float32) if rng.random() < 0.5 else np.ones(3, np.float32)
    return np.ascontiguousarray(pixels * tint)


def _draw_damage(
    rng: np.random.Generator, kinds: list[str], chances: tuple[float, ...], most: float = 1.0
) -> tuple[Damage, ...]:
    """As many damages as `chances` says, none of a kind twice, the severest first."""
    count = int(rng.choice(len(chances), p=chances))
    chosen = rng.choice(kinds, count, replace=False)
    if {"underexposure", "overexposure"} <= set(chosen):
        chosen = chosen[:1]
    damages = [Damage(str(kind), float(rng.uniform(0.08, 1.0)) * most) for kind in chosen]
    return tuple(sorted(damages, key=lambda d: -d.severity))
