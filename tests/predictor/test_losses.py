import itertools
import math

import pytest
import torch

from m3agiqa.predictor import losses
from m3agiqa.predictor.metrics import agreement, ranks
from m3agiqa.train_config import LossConfig

ALL = [losses.mse, losses.plcc, losses.fidelity, losses.ranknet, losses.margin]


@pytest.fixture
def drawn():
    generator = torch.Generator().manual_seed(0)
    predictions = torch.randn(9, generator=generator, dtype=torch.float64)
    labels = torch.randn(9, generator=generator, dtype=torch.float64)
    labels[3] = labels[7]
    return predictions, labels


def phi(x):
    return (1 + math.erf(x / math.sqrt(2))) / 2


def by_pairs(predictions, labels, loss, skip_ties=False):
    """The mean of loss(difference, wanted) over all pairs, one by one."""
    found = []
    for i, j in itertools.combinations(range(len(labels)), 2):
        wanted = 0.5 if labels[i] == labels[j] else float(labels[i] > labels[j])
        if not (skip_ties and wanted == 0.5):
            found.append(loss(float(predictions[i] - predictions[j]), wanted))
    return sum(found) / len(found)


def test_they_are_what_the_formulas_say(drawn):
    predictions, labels = drawn
    assert losses.mse(*drawn).item() == pytest.approx(((predictions - labels) ** 2).mean().item())
    correlation = torch.corrcoef(torch.stack(drawn))[0, 1].item()
    assert losses.plcc(*drawn).item() == pytest.approx((1 - correlation) / 2)

    def fidelity(d, p):
        q = phi(d / math.sqrt(2))
        return 1 - math.sqrt(p * q) - math.sqrt((1 - p) * (1 - q))

    def ranknet(d, p):
        q = 1 / (1 + math.exp(-d))
        return -p * math.log(q) - (1 - p) * math.log(1 - q)

    assert losses.fidelity(*drawn).item() == pytest.approx(by_pairs(*drawn, fidelity), abs=2e-4)
    assert losses.ranknet(*drawn).item() == pytest.approx(by_pairs(*drawn, ranknet))
    hinge = by_pairs(*drawn, lambda d, p: max(0, 0.3 - (2 * p - 1) * d), skip_ties=True)
    assert losses.margin(*drawn, 0.3).item() == pytest.approx(hinge)


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: loss.__name__)
def test_their_slopes_are_right(drawn, loss):
    predictions, labels = drawn
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), predictions.requires_grad_(), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize(
    ("predictions", "labels"),
    [
        ([1.0, 1.0, 1.0], [0.0, 1.0, 2.0]),
        ([0.0, 1.0, 2.0], [1.0, 1.0, 1.0]),
        ([1.0, 1.0], [1.0, 1.0]),
        ([1.0], [2.0]),
        ([], []),
        ([60.0, -60.0], [-1.0, 1.0]),
        ([60.0, -60.0], [1.0, -1.0]),
    ],
)
def test_nothing_makes_them_not_finite(loss, predictions, labels):
    x = torch.tensor(predictions, requires_grad=True)
    found = loss(x, torch.tensor(labels))
    found.backward()
    assert found.isfinite()
    assert x.grad.isfinite().all()


def test_the_right_order_is_better_than_the_wrong_one():
    labels = torch.arange(6.0)
    for loss in ALL:
        assert loss(labels, labels) < loss(labels.flip(0), labels)


def test_outputs_are_not_compared_with_each_other(drawn):
    predictions, labels = drawn
    outputs = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0, 1])
    config = LossConfig(mse=0.5, plcc=2.0, rank=3.0, rank_kind="ranknet")
    expected = 0.0
    for output in (0, 1):
        x, y = predictions[outputs == output], labels[outputs == output]
        one = 0.5 * losses.mse(x, y) + 2 * losses.plcc(x, y) + 3 * losses.ranknet(x, y)
        expected += len(x) / 9 * one.item()
    assert losses.total(predictions, labels, outputs, config).item() == pytest.approx(expected)
    with pytest.raises(ValueError, match="all 0"):
        LossConfig(mse=0, plcc=0)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\[2\].*\[3\]"):
        losses.mse(torch.zeros(2), torch.zeros(3))


def test_agreement_is_that_of_scipy(drawn):
    stats = pytest.importorskip("scipy.stats")
    predictions, labels = drawn
    found = agreement(predictions, labels)
    assert found["srcc"] == pytest.approx(stats.spearmanr(predictions, labels)[0])
    assert found["plcc"] == pytest.approx(stats.pearsonr(predictions, labels)[0])
    assert found["samples"] == 9
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]
    constant = agreement(torch.ones(4), torch.arange(4.0))
    assert constant["srcc"] is None
    assert constant["mae"] == 1.0
