"""How well predictions agree with labels: SRCC, PLCC, RMSE and MAE, in float64."""

import math
from typing import TypedDict

import torch


class Agreement(TypedDict):
    """Of predictions with labels. Correlations are None where either is constant."""

    srcc: float | None
    plcc: float | None
    rmse: float
    mae: float
    samples: int


def agreement(predictions: torch.Tensor, labels: torch.Tensor) -> Agreement:
    """Compares predictions [n] with labels [n], both on the scale of the labels.

    Raises:
        ValueError: for shapes that differ, and if there are none.
    """
    if predictions.shape != labels.shape or predictions.ndim != 1 or not len(labels):
        raise ValueError(f"predictions {list(predictions.shape)} and labels {list(labels.shape)} are not both [n > 0]")
    x, y = predictions.double().cpu(), labels.double().cpu()
    errors = x - y
    return Agreement(
        srcc=_pearson(ranks(x), ranks(y)),
        plcc=_pearson(x, y),
        rmse=float(errors.square().mean().sqrt()),
        mae=float(errors.abs().mean()),
        samples=len(y),
    )


def ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks [n] from 1, in float64; those that are tied share their mean rank."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[place]


def _pearson(x: torch.Tensor, y: torch.Tensor) -> float | None:
    x, y = x - x.mean(), y - y.mean()
    size = float((x.square().sum() * y.square().sum()).sqrt())
    if not size > 0 or not math.isfinite(size):
        return None
    return max(-1.0, min(1.0, float((x * y).sum()) / size))
