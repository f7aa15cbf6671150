"""What the figures of several seeds say, and which differences are more than noise.

Two things are left to chance: the seed of a training, and which images happen to be in the test part. A
difference from the base holds up where neither explains it: the interval over seeds (Student's t on the paired
differences) and the interval over images (paired bootstrap of the predictions, averaged over the seeds) both
leave out 0. As many differences are looked at, both are of the level 1 - (1 - level) / comparisons (Bonferroni).
"""

import math
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from scipy import stats

from m3agiqa.predictor.captured import Floats
from m3agiqa.predictor.metrics import agreement

FIGURES = ("srcc", "plcc", "rmse", "mae")


class Interval(TypedDict):
    """A mean and its interval; both ends None where it is undefined."""

    mean: float | None
    low: float | None
    high: float | None


class Difference(TypedDict):
    """Of SRCC from the base's: positive is better. `verdict`: better, worse, noise or undefined."""

    over_seeds: Interval
    over_images: Interval
    verdict: str


def over_seeds(values: Sequence[float | None], level: float) -> Interval:
    """Mean and t interval of a figure over the seeds; undefined if it is undefined for one of them."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return Interval(mean=None, low=None, high=None)
    mean, deviation = float(np.mean(known)), float(np.std(known, ddof=1))
    half = float(stats.t.ppf((1 + level) / 2, len(known) - 1)) * deviation / math.sqrt(len(known))
    return Interval(mean=mean, low=mean - half, high=mean + half)


def difference(
    own: Sequence[float | None],
    base: Sequence[float | None],
    predictions: tuple[Floats, Floats],
    labels: Floats,
    *,
    level: float,
    comparisons: int,
    resamples: int,
    seed: int,
) -> Difference:
    """How a variation differs from the base in SRCC.

    Args:
        own, base: SRCC by seed, the same seeds. predictions: of both, [seeds, n]. labels: [n].
        comparisons: how many differences are looked at in all.
    """
    strict = 1 - (1 - level) / comparisons
    pairs = zip(own, base, strict=True)
    seeds = over_seeds([None if a is None or b is None else a - b for a, b in pairs], strict)
    means = predictions[0].mean(0), predictions[1].mean(0)
    images = _over_images(means, labels, strict, resamples, seed)
    return Difference(over_seeds=seeds, over_images=images, verdict=_verdict(seeds, images))


def _over_images(means: tuple[Floats, Floats], labels: Floats, level: float, resamples: int, seed: int) -> Interval:
    """The paired bootstrap; its spread and the normal distribution give the ends, as few draws lie that far out."""
    first, second, wanted = (torch.from_numpy(one) for one in (*means, labels))
    centre = _apart(first, second, wanted)
    if centre is None:
        return Interval(mean=None, low=None, high=None)
    rng = np.random.default_rng(seed)
    draws = (torch.from_numpy(rng.integers(len(labels), size=len(labels))) for _ in range(resamples))
    found = [_apart(first[draw], second[draw], wanted[draw]) for draw in draws]
    # A draw of one image over and over has no order; it says nothing of the spread.
    spread = float(np.std([one for one in found if one is not None], ddof=1))
    half = float(stats.norm.ppf((1 + level) / 2)) * spread
    return Interval(mean=centre, low=centre - half, high=centre + half)


def _apart(first: torch.Tensor, second: torch.Tensor, labels: torch.Tensor) -> float | None:
    """The difference in SRCC of two predictions [n]; None where one has none."""
    a, b = (agreement(one, labels)["srcc"] for one in (first, second))
    return None if a is None or b is None else a - b


def _verdict(seeds: Interval, images: Interval) -> str:
    if seeds["low"] is None or seeds["high"] is None or images["low"] is None or images["high"] is None:
        return "undefined"
    if seeds["low"] > 0 and images["low"] > 0:
        return "better"
    return "worse" if seeds["high"] < 0 and images["high"] < 0 else "noise"
