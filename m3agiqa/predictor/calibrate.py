"""Intervals that hold the human score as often as they say, from held-out predictions.

Split conformal prediction (Papadopoulos et al. 2002; Lei et al., arXiv 1604.04173, section 2.2): of n held-out
absolute errors, the ceil((n + 1) * level)-th smallest is the half width. On new images that are drawn like
those held out, the interval holds the label with at least that probability, whatever the predictor.
"""

import math
from fractions import Fraction

import torch
from pydantic import BaseModel, ConfigDict, Field

from m3agiqa.errors import UserError

LEVEL = 0.9
"""How often an interval is to hold the human score, unless another level is asked for."""


class Calibration(BaseModel):
    """The interval of one output: the score, more or less `half_width`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    level: float = Field(gt=0, lt=1, description="Least probability that the interval holds the label")
    half_width: float = Field(ge=0, allow_inf_nan=False, description="On the scale of the labels")
    samples: int = Field(gt=0, description="Held-out labels that it comes from")


def calibrate(predictions: torch.Tensor, labels: torch.Tensor, level: float = LEVEL) -> tuple[Calibration, ...]:
    """Calibrates each output.

    Args:
        predictions: [images] or [images, outputs], on the scale of the labels, of images not trained on.
        labels: of the same shape; NaN where nobody rated.
        level: within 0 and 1.

    Returns:
        One calibration for each output.

    Raises:
        UserError: if there are too few labels for the level.
        ValueError: for shapes that differ, a level outside 0 to 1, and predictions that are not finite.
    """
    if predictions.shape != labels.shape or predictions.ndim not in (1, 2):
        raise ValueError(f"predictions are {list(predictions.shape)}, but labels are {list(labels.shape)}")
    if not 0 < level < 1:
        raise ValueError(f"level {level} is not within 0 and 1")
    if not bool(predictions.isfinite().all()):
        raise ValueError("some predictions are not finite")
    errors = (predictions.double() - labels.double()).abs().reshape(len(labels), -1)
    return tuple(_calibrate_one(column[~column.isnan()], level) for column in errors.unbind(1))


def _calibrate_one(errors: torch.Tensor, level: float) -> Calibration:
    # As fractions, since 10 * 0.7 is 7.000000000000001 in floating point.
    exact, samples = Fraction(str(level)), len(errors)
    rank = math.ceil((samples + 1) * exact)
    if rank > samples:
        needed = math.ceil(exact / (1 - exact))
        raise UserError(
            f"{samples} held-out labels",
            f"are too few for intervals at level {level:g}, which need {needed}",
            "hold out more images or ask for a lower level",
        )
    return Calibration(level=level, half_width=float(errors.sort().values[rank - 1]), samples=samples)


def coverage(low: torch.Tensor, high: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of labels [...] within their intervals, ends included; labels that are NaN do not count.

    Raises:
        ValueError: if there are no labels.
    """
    known = ~labels.isnan()
    if not bool(known.any()):
        raise ValueError("there are no labels")
    return float(((low <= labels) & (labels <= high))[known].double().mean())
