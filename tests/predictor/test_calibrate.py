import math

import pytest
import torch

from m3agiqa.errors import UserError
from m3agiqa.predictor.calibrate import calibrate, coverage


@pytest.mark.parametrize("level", [0.5, 0.8, 0.9, 0.95])
def test_new_labels_are_covered_as_often_as_said(level):
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(300):
        errors = torch.empty(160).exponential_(generator=generator)
        (one,) = calibrate(torch.zeros(60), errors[:60], level)
        found.append(coverage(torch.full((100,), -one.half_width), torch.full((100,), one.half_width), errors[60:]))
    mean = sum(found) / len(found)
    # In expectation within [level, level + 1 / 61]; the slack is five standard errors of the mean.
    assert level - 0.02 < mean < level + 1 / 61 + 0.02


def test_the_quantile_is_that_of_finite_samples():
    labels = torch.arange(1.0, 10.0)
    assert calibrate(torch.zeros(9), labels, 0.9)[0].half_width == 9
    assert calibrate(torch.zeros(9), -labels, 0.7)[0].half_width == 7
    assert calibrate(torch.zeros(9), labels, 0.71)[0].half_width == 8


@pytest.mark.parametrize(("level", "needed"), [(0.9, 9), (0.95, 19), (0.99, 99), (0.7, 3)])
def test_too_few_labels_are_refused_with_the_number_needed(level, needed):
    assert calibrate(torch.zeros(needed), torch.zeros(needed), level)[0].samples == needed
    with pytest.raises(UserError, match=rf"{needed - 1} held-out.*need {needed};"):
        calibrate(torch.zeros(needed - 1), torch.zeros(needed - 1), level)


def test_each_output_by_its_own_labels():
    labels = torch.stack((torch.arange(20.0), torch.full((20,), 3.0)), 1)
    labels[:5, 1] = math.nan
    first, second = calibrate(torch.zeros(20, 2), labels, 0.9)
    assert (first.half_width, first.samples) == (18, 20)
    assert (second.half_width, second.samples) == (3, 15)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"\[20\].*\[20, 1\]"):
        calibrate(torch.zeros(20), torch.zeros(20, 1))
    with pytest.raises(ValueError, match="level 1"):
        calibrate(torch.zeros(20), torch.zeros(20), 1.0)
    with pytest.raises(ValueError, match="not finite"):
        calibrate(torch.full((20,), math.nan), torch.zeros(20))
    with pytest.raises(ValueError, match="no labels"):
        coverage(torch.zeros(1), torch.ones(1), torch.tensor([math.nan]))


def test_coverage_counts_the_ends():
    low, high = torch.zeros(4), torch.ones(4)
    assert coverage(low, high, torch.tensor([0.0, 1.0, 1.5, math.nan])) == pytest.approx(2 / 3)
