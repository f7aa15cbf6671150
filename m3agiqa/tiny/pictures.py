"""Procedural scenes with known contents: shaded objects of one colour and shape on a textured ground.

Everything follows from a seed. Sizes are given in *eye pixels*: the tiny model sees 128 of them
along a side, so a scene of 256 pixels is drawn with everything twice as large.
Imports nothing but numpy, so that the demo starts at once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

EYE = 128
"""Pixels along a side of what the model sees."""

Picture = NDArray[np.float32]
"""Height, width, 3; values 0 to 1."""

SHAPES: tuple[str, ...] = ("sphere", "cube", "cone", "cylinder", "ring", "star")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.82, 0.10, 0.10),
    "yellow": (0.93, 0.80, 0.08),
    "green": (0.08, 0.55, 0.16),
    "blue": (0.10, 0.22, 0.80),
    "purple": (0.52, 0.12, 0.62),
    "white": (0.93, 0.93, 0.95),
}
COUNTS: tuple[str, ...] = ("a", "two", "three")
PLACES: tuple[str, ...] = (
    "on a sandy plain",
    "on a green meadow",
    "on a wooden table",
    "in the snow",
    "on a stone floor",
    "on a calm sea",
)


@dataclass(frozen=True)
class Scene:
    """What a picture shows: `count` equal objects at a place."""

    count: int
    colour: str
    shape: str
    place: str

    @property
    def text(self) -> str:
        """Such as "two red spheres on a sandy plain", which is also the prompt that asks for exactly this scene."""
        return f"{COUNTS[self.count - 1]} {self.colour} {self.shape}{'s' if self.count > 1 else ''} {self.place}"


@dataclass(frozen=True)
class Rendered:
    """A picture and where its objects are.

    Attributes:
        shape_map: index into `SHAPES` plus 1 for every pixel, 0 where there is no object.
        colour_map: the same for `COLOURS`.
        centres: x and y of every object, as fractions of the side.
    """

    pixels: Picture
    shape_map: NDArray[np.uint8]
    colour_map: NDArray[np.uint8]
    centres: tuple[tuple[float, float], ...]


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene by chance, every count, colour, shape and place as likely as the others."""
    count = int(rng.integers(1, len(COUNTS) + 1))
    return Scene(count, str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)), str(rng.choice(PLACES)))


def render(scene: Scene, seed: int, side: int = EYE) -> Rendered:
    """Draws `scene`, `side` pixels wide and high."""
    rng = np.random.default_rng([seed, 77])
    horizon = float(rng.uniform(0.30, 0.42))
    pixels = _backdrop(scene.place, horizon, rng, side)
    shape_map = np.zeros((side, side), np.uint8)
    colour_map = np.zeros((side, side), np.uint8)
    centres: list[tuple[float, float]] = []
    radius = float(rng.uniform(0.115, 0.145)) * {1: 1.5, 2: 1.3, 3: 1.05}[scene.count]
    light = float(rng.choice([-1.0, 1.0])) * float(rng.uniform(0.35, 0.65))
    width = 1.0 / scene.count
    for i in range(scene.count):
        slack = max(0.0, width / 2 - radius * 1.08)
        x = (i + 0.5) * width + float(rng.uniform(-slack, slack))
        y = float(rng.uniform(max(horizon + 0.1, radius + 0.04), 0.93 - radius))
        r = radius * float(rng.uniform(0.92, 1.05))
        mask = _draw(pixels, scene, x, y, r, light, rng)
        shape_map[mask > 0.5] = SHAPES.index(scene.shape) + 1
        colour_map[mask > 0.5] = list(COLOURS).index(scene.colour) + 1
        centres.append((x, y))
    np.clip(pixels, 0.0, 1.0, out=pixels)
    return Rendered(pixels, shape_map, colour_map, tuple(centres))


def to_bytes(pixels: Picture) -> NDArray[np.uint8]:
    """A picture with 8 bits per channel."""
    return (np.clip(pixels, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def fractal(rng: np.random.Generator, side: int, slope: float, stretch: float = 1.0) -> NDArray[np.float32]:
    """Noise whose spectrum falls with frequency to the power `slope`; mean 0, deviation 1.

    Args:
        stretch: below 1 draws it out horizontally, as water and wood grain are; above 1 upright.
    """
    fy = np.fft.fftfreq(side)[:, None] * stretch
    fx = np.fft.rfftfreq(side)[None, :]
    amplitude = (fy * fy + fx * fx + (1.0 / side) ** 2) ** (-slope / 2)
    spectrum = amplitude * np.exp(2j * np.pi * rng.random(amplitude.shape))
    noise = np.fft.irfft2(spectrum, s=(side, side)).astype(np.float32)
    return (noise - noise.mean()) / (noise.std() + 1e-6)


def _mix(low: tuple[float, ...], high: tuple[float, ...], t: NDArray[np.float32]) -> Picture:
    a, b = np.asarray(low, np.float32), np.asarray(high, np.float32)
    return a + (b - a) * t[..., None]


def _backdrop(place: str, horizon: float, rng: np.random.Generator, side: int) -> Picture:
    """The sky or wall above the horizon and the ground below it."""
    v = np.repeat(((np.arange(side, dtype=np.float32) + 0.5) / side)[:, None], side, axis=1)
    indoor = place in ("on a wooden table", "on a stone floor")
    if indoor:
        tint = rng.uniform(0.55, 0.8, 3)
        above = _mix(tuple(tint * 0.8), tuple(tint), (v / horizon).astype(np.float32))
        above += 0.02 * fractal(rng, side, 0.8)[..., None]
    else:
        clouds = np.clip(0.25 + 0.35 * fractal(rng, side, 1.9, 0.5), 0, 1)
        blue = (0.35, 0.55, 0.85) if place != "in the snow" else (0.62, 0.70, 0.80)
        height = np.clip(0.6 * v / horizon + 0.5 * clouds, 0, 1).astype(np.float32)
        above = _mix(blue, (0.82, 0.88, 0.94), height)
    ground = _GROUNDS[place](rng, side, v, (v - horizon) / (1 - horizon))
    # A ragged skyline outside, a straight edge inside.
    edge = horizon + (0.0 if indoor or place == "on a calm sea" else 0.012) * fractal(rng, side, 1.5)[:1]
    below = np.clip((v - edge) * side + 0.5, 0, 1)[..., None]
    return (above * (1 - below) + ground * below).astype(np.float32)


def _sand(rng: np.random.Generator, side: int, v: NDArray[np.float32], depth: NDArray[np.float32]) -> Picture:
    t = 0.5 + 0.16 * fractal(rng, side, 0.6) + 0.14 * fractal(rng, side, 1.6, 0.4)
    return _mix((0.62, 0.46, 0.26), (0.90, 0.76, 0.52), t)


def _meadow(rng: np.random.Generator, side: int, v: NDArray[np.float32], depth: NDArray[np.float32]) -> Picture:
    t = 0.45 + 0.24 * fractal(rng, side, 0.5, 2.2) + 0.14 * fractal(rng, side, 1.6)
    return _mix((0.16, 0.30, 0.06), (0.58, 0.74, 0.26), t)


def _wood(rng: np.random.Generator, side: int, v: NDArray[np.float32], depth: NDArray[np.float32]) -> Picture:
    t = 0.5 + 0.2 * fractal(rng, side, 1.0, 0.12) + 0.05 * fractal(rng, side, 0.4)
    planks = np.abs(((depth * 4.2 + float(rng.random())) % 1.0) - 0.5) > 0.47
    return _mix((0.36, 0.20, 0.09), (0.66, 0.42, 0.22), t - 0.4 * planks)


def _snow(rng: np.random.Generator, side: int, v: NDArray[np.float32], depth: NDArray[np.float32]) -> Picture:
    t = 0.62 + 0.10 * fractal(rng, side, 0.6) + 0.18 * fractal(rng, side, 1.8, 0.5)
    return _mix((0.66, 0.72, 0.82), (0.97, 0.98, 1.0), t)


def _stone(rng: np.random.Generator, side: int, v: NDArray[np.float32], depth: NDArray[np.float32]) -> Picture:
    t = 0.5 + 0.16 * fractal(rng, side, 0.7) + 0.1 * fractal(rng, side, 1.6)
    u = (np.arange(side, dtype=np.float32) / side)[None, :] - 0.5
    # Tiles in perspective: lines run to a point above the horizon.
    near = 0.35 + 0.65 * np.clip(depth, 0, 1)
    across, along = (u / near * 5.0) % 1.0, (3.2 / near) % 1.0
    joints = (across < 0.05) | (along < 0.06)
    return _mix((0.30, 0.30, 0.31), (0.66, 0.65, 0.62), t - 0.5 * joints)


def _sea(rng: np.random.Generator, side: int, v: NDArray[np.float32], depth: NDArray[np.float32]) -> Picture:
    t = 0.42 + 0.22 * fractal(rng, side, 1.1, 0.25) + 0.05 * fractal(rng, side, 0.5)
    return _mix((0.02, 0.20, 0.36), (0.36, 0.62, 0.74), t + 0.25 * (1 - np.clip(depth, 0, 1)))


_GROUNDS: dict[str, Callable[..., Picture]] = dict(
    zip(PLACES, (_sand, _meadow, _wood, _snow, _stone, _sea), strict=True)
)


def _draw(
    pixels: Picture, scene: Scene, x: float, y: float, r: float, light: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Paints one object and its shadow in place; returns its coverage."""
    side = pixels.shape[0]
    axis = (np.arange(side, dtype=np.float32) + 0.5) / side
    # Coordinates in units of the radius; q points down.
    p, q = np.broadcast_arrays((axis[None, :] - x) / r, (axis[:, None] - y) / r)
    distance, shade = _FORMS[scene.shape](p, q, light)
    mask = np.clip(0.5 - distance * r * side, 0, 1)
    shadow = np.exp(-((((p + light * 0.9) / 1.25) ** 2 + ((q - 0.93) / 0.3) ** 2) ** 2))
    pixels *= (1 - 0.55 * shadow)[..., None]
    grain = 1 + 0.035 * fractal(rng, side, 0.5)
    colour = np.asarray(COLOURS[scene.colour], np.float32) * float(rng.uniform(0.92, 1.08))
    body = colour * np.clip(shade * grain, 0.16, 1.25)[..., None] + np.clip(shade - 1.02, 0, 1)[..., None]
    pixels *= 1 - mask[..., None]
    pixels += body * mask[..., None]
    return mask


_Form = tuple[NDArray[np.floating], NDArray[np.floating]]


def _sphere(p: NDArray[np.float32], q: NDArray[np.float32], light: float) -> _Form:
    rho = np.sqrt(p * p + q * q)
    z = np.sqrt(np.clip(1 - rho * rho, 0, 1))
    lambert = light * p - 0.6 * q + 0.55 * z
    return rho - 1, 0.35 + 0.65 * np.clip(lambert, 0, 1) + 0.9 * np.clip(lambert, 0, 1) ** 24


def _cube(p: NDArray[np.float32], q: NDArray[np.float32], light: float) -> _Form:
    a, b = np.abs(p), np.abs(q)
    distance = np.maximum(a - 0.87, 0.5 * a + b - 1.0)
    top = q < -0.5 * a
    bright, dim = 0.78, 0.45
    sides = np.where((p > 0) == (light > 0), bright, dim)
    return distance, np.where(top, 1.02, sides).astype(np.float32)


def _cone(p: NDArray[np.float32], q: NDArray[np.float32], light: float) -> _Form:
    half = 0.42 * (q + 1.05)
    slanted = (np.abs(p) - half) * 0.92
    base = np.sqrt(p * p + ((q - 0.75) / 0.3) ** 2 * 0.74) - 0.80
    distance = np.where(q < 0.75, np.maximum(slanted, -1.05 - q), base)
    across = np.clip(p / np.maximum(half, 0.05), -1, 1)
    return distance, 0.42 + 0.55 * np.clip(np.sqrt(1 - across**2) * 0.6 + across * light * 1.1, 0, 1)


def _cylinder(p: NDArray[np.float32], q: NDArray[np.float32], light: float) -> _Form:
    cap = np.sqrt((p / 0.68) ** 2 + ((np.abs(q) - 0.78) / 0.24) ** 2) - 1
    distance = np.where(np.abs(q) < 0.78, np.abs(p) - 0.68, cap * 0.24)
    top = np.sqrt((p / 0.68) ** 2 + ((q + 0.78) / 0.24) ** 2) < 1
    across = np.clip(p / 0.68, -1, 1)
    body = 0.38 + 0.6 * np.clip(np.sqrt(1 - across**2) * 0.6 + across * light * 1.1, 0, 1)
    return distance, np.where(top, 1.02, body).astype(np.float32)


def _ring(p: NDArray[np.float32], q: NDArray[np.float32], light: float) -> _Form:
    rho = np.sqrt(p * p + q * q)
    across = (rho - 0.69) / 0.31
    z = np.sqrt(np.clip(1 - across**2, 0, 1))
    slope = across / np.maximum(rho, 0.05)
    return np.abs(rho - 0.69) - 0.31, 0.4 + 0.62 * np.clip(slope * (light * p - 0.6 * q) + 0.5 * z, 0, 1)


def _star(p: NDArray[np.float32], q: NDArray[np.float32], light: float) -> _Form:
    angle = np.arctan2(p, -q)
    sector = 2 * np.pi / 5
    folded = np.abs((angle + sector / 2) % sector - sector / 2)
    rho = np.sqrt(p * p + q * q)
    # The edge between a tip at radius 1.05 and a notch at radius 0.42.
    ax, ay, bx, by = 1.05, 0.0, 0.42 * np.cos(sector / 2), 0.42 * np.sin(sector / 2)
    px, py = rho * np.cos(folded), rho * np.sin(folded)
    length = float(np.hypot(bx - ax, by - ay))
    distance = ((px - ax) * (by - ay) - (py - ay) * (bx - ax)) / length
    facet = ((angle + sector / 2) % sector) < sector / 2
    return distance.astype(np.float32), np.where(facet == (light > 0), 0.98, 0.66)


_FORMS: dict[str, Callable[[NDArray[np.float32], NDArray[np.float32], float], _Form]] = dict(
    zip(SHAPES, (_sphere, _cube, _cone, _cylinder, _ring, _star), strict=True)
)
