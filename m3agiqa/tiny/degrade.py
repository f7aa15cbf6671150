"""Damage of known severity: degradations lower the quality score, artefacts the authenticity score.

A severity is in (0, 1]; several severities s combine to 1 - (1 - s1)(1 - s2)..., and the score is
5 * (1 - severity). Sizes are in eye pixels (see `pictures`), so that a picture of any resolution
looks equally damaged to the model. Imports nothing but numpy and pillow.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from m3agiqa.aspects import SCALE_MAX
from m3agiqa.tiny.pictures import EYE, Picture, to_bytes


@dataclass(frozen=True)
class Damage:
    """One degradation or artefact."""

    kind: str
    severity: float


def score(damages: tuple[Damage, ...]) -> float:
    """The score from 0 to 5 that is left after `damages`."""
    left = 1.0
    for damage in damages:
        left *= 1.0 - damage.severity
    return SCALE_MAX * left


def degrade(pixels: Picture, damage: Damage, rng: np.random.Generator) -> Picture:
    """`pixels` with one degradation of `DEGRADATIONS` or `UNSEEN_DEGRADATIONS`."""
    change = (DEGRADATIONS | UNSEEN_DEGRADATIONS)[damage.kind]
    return np.clip(change(pixels, damage.severity, rng), 0, 1).astype(np.float32)


def falsify(pixels: Picture, damage: Damage, rng: np.random.Generator) -> tuple[Picture, NDArray[np.bool_]]:
    """`pixels` with one artefact of `ARTEFACTS`, and where it is (height, width)."""
    where = _region(pixels.shape[:2], damage.severity, rng)
    changed = ARTEFACTS[damage.kind](pixels, damage.severity, rng, where)
    return np.clip(np.where(where[..., None], changed, pixels), 0, 1).astype(np.float32), where


def unit(pixels: Picture) -> float:
    """How many pixels of the picture one eye pixel is."""
    return max(pixels.shape[:2]) / EYE


def _image(pixels: Picture) -> Image.Image:
    return Image.fromarray(to_bytes(pixels))


def _array(image: Image.Image) -> Picture:
    return np.asarray(image, np.float32) / 255.0


def _geometric(low: float, high: float, severity: float) -> float:
    """From `low` at severity 0 to `high` at 1, in equal ratios, which is how eyes judge."""
    return low * (high / low) ** severity


def _eye_size(pixels: Picture) -> tuple[int, int]:
    u = max(1.0, unit(pixels))
    return max(8, round(pixels.shape[1] / u)), max(8, round(pixels.shape[0] / u))


def _blur(pixels: Picture, severity: float, rng: np.random.Generator) -> Picture:
    sigma = _geometric(0.35, 3.6, severity) * unit(pixels)
    return _array(_image(pixels).filter(ImageFilter.GaussianBlur(sigma)))


def _noise(pixels: Picture, severity: float, rng: np.random.Generator) -> Picture:
    width, height = _eye_size(pixels)
    grain = rng.standard_normal((height, width, 3)).astype(np.float32)
    rows = np.arange(pixels.shape[0]) * height // pixels.shape[0]
    cols = np.arange(pixels.shape[1]) * width // pixels.shape[1]
    return pixels + _geometric(0.02, 0.32, severity) * grain[rows][:, cols]


def _compression(pixels: Picture, severity: float, rng: np.random.Generator) -> Picture:
    image = _image(pixels)
    # At the eye's resolution, or its 8-pixel blocks would shrink out of sight.
    small = image.resize(_eye_size(pixels), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=round(_geometric(45, 2, severity)))
    return _array(Image.open(buffer).convert("RGB").resize(image.size, Image.Resampling.BICUBIC))


def _pixelation(pixels: Picture, severity: float, rng: np.random.Generator) -> Picture:
    image = _image(pixels)
    block = _geometric(1.5, 9.0, severity) * unit(pixels)
    small = (max(2, round(image.width / block)), max(2, round(image.height / block)))
    return _array(image.resize(small, Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST))


def _contrast(pixels: Picture, severity: float, rng: np.random.Generator) -> Picture:
    grey = float(rng.uniform(0.45, 0.65))
    return grey + (pixels - grey) * _geometric(0.85, 0.10, severity)


def _dark(pixels: Picture, severity: float, rng: np.random.Generator) -> Picture:
    return pixels * _geometric(0.80, 0.07, severity)


def _bright(pixels: Picture, severity: float, rng: np.random.Generator) -> Picture:
    return pixels * _geometric(1.25, 5.0, severity) + 0.25 * severity


def _banding(pixels: Picture, severity: float, rng: np.random.Generator) -> Picture:
    steps = round(_geometric(10, 1, severity))
    return (np.rint(pixels * steps) / steps).astype(np.float32)


DEGRADATIONS: dict[str, Callable[[Picture, float, np.random.Generator], Picture]] = {
    "blur": _blur,
    "noise": _noise,
    "compression": _compression,
    "pixelation": _pixelation,
    "low contrast": _contrast,
    "underexposure": _dark,
    "overexposure": _bright,
    "banding": _banding,
}


def _motion(pixels: Picture, severity: float, rng: np.random.Generator) -> Picture:
    """A straight move of the camera, level or upright."""
    length = max(2, round(_geometric(1.5, 16.0, severity) * unit(pixels)))
    axis = int(rng.integers(2))
    shifts = range(-(length // 2), length - length // 2)
    return np.mean([np.roll(pixels, shift, axis) for shift in shifts], axis=0)


def _impulse(pixels: Picture, severity: float, rng: np.random.Generator) -> Picture:
    """Single pixels that are black or white."""
    chance = rng.random(pixels.shape[:2])[..., None]
    hit = _geometric(0.005, 0.35, severity)
    return np.where(chance < hit / 2, 0.0, np.where(chance < hit, 1.0, pixels))


UNSEEN_DEGRADATIONS: dict[str, Callable[[Picture, float, np.random.Generator], Picture]] = {
    "motion blur": _motion,
    "impulse noise": _impulse,
}
"""Kinds that the model is never trained on."""


def _region(shape: tuple[int, int], severity: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """An ellipse that covers more of the picture the severer the artefact is: 5 % up to 90 %."""
    height, width = shape
    area = 0.05 + 0.85 * severity**1.2
    ratio = float(rng.uniform(0.75, 1.33))
    a, b = np.sqrt(area / np.pi * ratio), np.sqrt(area / np.pi / ratio)
    reach_x, reach_y = max(0.0, 0.5 - a), max(0.0, 0.5 - b)
    # Centred where objects stand rather than in the sky.
    cx, cy = 0.5 + rng.uniform(-reach_x, reach_x), 0.55 + rng.uniform(-reach_y, reach_y) * 0.8
    x = (np.arange(width) + 0.5) / width - cx
    y = (np.arange(height) + 0.5) / height - cy
    return (x[None, :] / a) ** 2 + (y[:, None] / b) ** 2 < 1


def _sample(pixels: Picture, x: NDArray[np.float32], y: NDArray[np.float32]) -> Picture:
    """Bilinear look-up at pixel coordinates, mirrored at the borders."""
    height, width = pixels.shape[:2]
    x = np.abs(x) % (2 * (width - 1))
    y = np.abs(y) % (2 * (height - 1))
    x, y = np.minimum(x, 2 * (width - 1) - x), np.minimum(y, 2 * (height - 1) - y)
    x0, y0 = np.minimum(x.astype(int), width - 2), np.minimum(y.astype(int), height - 2)
    fx, fy = (x - x0)[..., None], (y - y0)[..., None]
    upper = pixels[y0, x0] * (1 - fx) + pixels[y0, x0 + 1] * fx
    lower = pixels[y0 + 1, x0] * (1 - fx) + pixels[y0 + 1, x0 + 1] * fx
    return upper * (1 - fy) + lower * fy


_Where = NDArray[np.bool_]


def _melted(pixels: Picture, severity: float, rng: np.random.Generator, where: _Where) -> Picture:
    """Wavy displacement: edges run like wax."""
    u = unit(pixels)
    y, x = np.mgrid[: pixels.shape[0], : pixels.shape[1]].astype(np.float32)
    reach = _geometric(2.5, 6.0, severity) * u
    phase = rng.uniform(0, 2 * np.pi, 4)
    k = 2 * np.pi / (rng.uniform(11, 17, 4) * u)
    dx = np.sin(k[0] * y + phase[0]) + 0.6 * np.sin(k[1] * (x + y) + phase[1])
    dy = np.sin(k[2] * x + phase[2]) + 0.6 * np.sin(k[3] * (x - y) + phase[3])
    return _sample(pixels, x + reach * dx, y + reach * dy)


def _repeated(pixels: Picture, severity: float, rng: np.random.Generator, where: _Where) -> Picture:
    """One small tile of the picture over and over."""
    u = unit(pixels)
    tile = round(float(rng.uniform(9, 14)) * u)
    ys, xs = np.nonzero(where)
    i = int(rng.integers(len(ys)))
    top = int(min(ys[i], pixels.shape[0] - tile))
    left = int(min(xs[i], pixels.shape[1] - tile))
    y, x = np.mgrid[: pixels.shape[0], : pixels.shape[1]]
    return pixels[top + y % tile, left + x % tile]


def _checkerboard(pixels: Picture, severity: float, rng: np.random.Generator, where: _Where) -> Picture:
    """The lattice that transposed convolutions leave: every other eye pixel lighter."""
    u = max(1.0, unit(pixels))
    y, x = np.mgrid[: pixels.shape[0], : pixels.shape[1]]
    lattice = ((x // u).astype(int) // 2 + (y // u).astype(int) // 2) % 2 * 2 - 1
    return pixels + _geometric(0.07, 0.20, severity) * lattice[..., None].astype(np.float32)


def _scrambled(pixels: Picture, severity: float, rng: np.random.Generator, where: _Where) -> Picture:
    """Square pieces that change places."""
    piece = max(2, round(float(rng.uniform(7, 11)) * unit(pixels)))
    rows, cols = pixels.shape[0] // piece, pixels.shape[1] // piece
    inside = np.flatnonzero(where[: rows * piece : piece, : cols * piece : piece].ravel())
    order = np.arange(rows * cols)
    order[inside] = rng.permutation(inside)
    out = pixels.copy()
    for target, source in enumerate(order):
        if target != source:
            ty, tx = divmod(target, cols)
            sy, sx = divmod(int(source), cols)
            out[ty * piece : (ty + 1) * piece, tx * piece : (tx + 1) * piece] = pixels[
                sy * piece : (sy + 1) * piece, sx * piece : (sx + 1) * piece
            ]
    return out


def _smeared(pixels: Picture, severity: float, rng: np.random.Generator, where: _Where) -> Picture:
    """Streaks: every row of the region takes the colour that it has at one column."""
    column = int(np.quantile(np.nonzero(where)[1], rng.uniform(0.3, 0.7)))
    return np.broadcast_to(pixels[:, column : column + 1], pixels.shape)


ARTEFACTS: dict[str, Callable[[Picture, float, np.random.Generator, _Where], Picture]] = {
    "melted": _melted,
    "repeated": _repeated,
    "checkerboard": _checkerboard,
    "scrambled": _scrambled,
    "smeared": _smeared,
}
