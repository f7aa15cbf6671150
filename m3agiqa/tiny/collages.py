"""Collages: leaves of many sizes, shades and textures that fall on one another, with an occluding edge around each.

There are few freely licensed photographs to train on, and what an eye learns of sharpness, grain and edges from
eleven of them does not carry over to others. Pictures of this "dead leaves" kind share much of the statistics of
photographs (Ruderman, "Origins of scaling in natural images", 1997) and are as different as one likes.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from m3agiqa.tiny.pictures import Picture, fractal

_LEAST, _LARGEST = 0.05, 0.6
"""Radii of leaves, as fractions of the side."""


def collage(photographs: Sequence[Image.Image], rng: np.random.Generator, side: int) -> Picture:
    """One of them, square; leaves are of a plain colour, of fractal noise or cut out of `photographs`."""
    pixels = _texture(photographs, rng, side)
    axis = (np.arange(side, dtype=np.float32) + 0.5) / side
    for _ in range(int(rng.integers(8, 60))):
        radius = _radius(rng)
        x, y, turn, ratio = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0, np.pi), rng.uniform(0.35, 1.0)
        # Only the box of the leaf's longer axis; what reaches out of it, a turned one's corners, is cut off straight.
        rows = slice(*np.searchsorted(axis, (y - radius, y + radius)))
        cols = slice(*np.searchsorted(axis, (x - radius, x + radius)))
        down, across = axis[rows, None] - y, axis[None, cols] - x
        p = (across * np.cos(turn) + down * np.sin(turn)) / radius
        q = (down * np.cos(turn) - across * np.sin(turn)) / (radius * ratio)
        power = float(rng.choice([1.0, 2.0, 6.0]))  # a diamond, an ellipse, nearly a rectangle
        reach = (np.abs(p) ** power + np.abs(q) ** power) ** (1 / power)
        soft = 0.5 if rng.random() < 0.85 else float(rng.uniform(0.5, 3.0))  # some lie out of focus
        cover = np.clip(0.5 + (1 - reach) * radius * ratio * side / (2 * soft), 0, 1)[..., None]
        shade = 1 + float(rng.uniform(0, 0.5)) * (p * float(rng.choice([-1, 1])))[..., None]
        leaf = _texture(photographs, rng, side)[rows, cols] * np.clip(shade, 0.3, 1.5)
        pixels[rows, cols] += (leaf - pixels[rows, cols]) * cover
    return np.clip(pixels, 0, 1).astype(np.float32)


def _radius(rng: np.random.Generator) -> float:
    """Small ones are the commonest; their density falls with the square of the radius."""
    smallest, largest = 1 / _LEAST, 1 / _LARGEST
    return float(1 / (smallest + (largest - smallest) * rng.random()))


def _texture(photographs: Sequence[Image.Image], rng: np.random.Generator, side: int) -> Picture:
    """A square of one surface."""
    chance = rng.random()
    # Mostly dull, as surfaces are.
    base = np.clip(rng.uniform(0.05, 0.95) + rng.uniform(0, 0.3) * rng.standard_normal(3), 0, 1).astype(np.float32)
    if chance < 0.35:
        return np.broadcast_to(base, (side, side, 3)).copy()
    if chance < 0.75:
        slope, contrast = float(rng.uniform(0.8, 2.2)), float(rng.uniform(0.02, 0.12))
        tint = rng.uniform(0.8, 1.2, 3).astype(np.float32)
        noise = fractal(rng, side, slope, float(np.exp(rng.uniform(-1.5, 1.5))))
        return np.clip(base + contrast * noise[..., None] * tint, 0, 1).astype(np.float32)
    return cutting(photographs, rng, side)


def cutting(photographs: Sequence[Image.Image], rng: np.random.Generator, side: int) -> Picture:
    """A random square of a photograph, turned, its colour channels exchanged and tinted by chance."""
    photograph = photographs[int(rng.integers(len(photographs)))]
    edge = int(min(photograph.size) * rng.uniform(0.35, 1.0))
    left = int(rng.integers(photograph.width - edge + 1))
    top = int(rng.integers(photograph.height - edge + 1))
    piece = photograph.crop((left, top, left + edge, top + edge)).resize((side, side), Image.Resampling.LANCZOS)
    pixels = np.rot90(np.asarray(piece, np.float32) / 255.0, int(rng.integers(4)))
    if rng.random() < 0.5:
        pixels = pixels[..., rng.permutation(3)]
    tint = rng.uniform(0.75, 1.0, 3).astype(np.float32) if rng.random() < 0.5 else np.ones(3, np.float32)
    return np.ascontiguousarray(pixels * tint)
