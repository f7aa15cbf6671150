"""What a head is trained with. Every loss takes predictions [n] and labels [n] and gives one number.

The ranking losses are over all n (n - 1) / 2 pairs at once, so they mean something only where n is the whole
batch: `train.py` gathers it from all workers first. Labels are standardised, so 1 is a standard deviation.
Constant predictions or labels, ties and a single pair give finite losses and gradients; nothing at all gives 0.
"""

import math

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from m3agiqa.train_config import LossConfig

# Below these a root's slope would be infinite, or a correlation noise.
_ROOT_EPS = 1e-8
_VARIANCE_EPS = 1e-12


def mse(predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean squared error: the loss of the published predictor (arXiv 2502.15167, section 3.3)."""
    _check(predictions, labels)
    return (predictions - labels).square().sum() / max(len(labels), 1)


def plcc(predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(1 - Pearson correlation) / 2, from 0 to 1; 0 without a slope where either is constant.

    It is the norm-in-norm loss with p = q = 2, up to a factor (Li, Jiang, Jiang, arXiv 2008.03889).
    """
    _check(predictions, labels)
    x, y = predictions - predictions.mean(), labels - labels.mean()
    xx, yy = x.square().sum(), y.square().sum()
    if len(x) < 2 or float(xx.detach()) < _VARIANCE_EPS or float(yy) < _VARIANCE_EPS:
        return predictions.sum() * 0
    return (1 - (x * y).sum() / (xx * yy).sqrt()) / 2


def fidelity(predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """1 - sqrt(p q) - sqrt((1 - p) (1 - q)), the mean over all pairs, from 0 to 1.

    q is the chance that the first of a pair is better, by Thurstone's model with unit variances: the normal
    distribution at the difference over sqrt(2). p is 1, 0, or 1/2 for a tie. Source: Tsai et al., "FRank"
    (SIGIR 2007), as used for images by Zhang et al. (UNIQUE, arXiv 2005.13983, section III).
    """
    difference, wanted = _pairs(predictions, labels)
    q = torch.special.ndtr(difference / math.sqrt(2))
    alike = (wanted * q + _ROOT_EPS).sqrt() + ((1 - wanted) * (1 - q) + _ROOT_EPS).sqrt()
    return (1 - alike).sum() / max(len(difference), 1)


def ranknet(predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of which of a pair is better, the mean over all pairs; 1/2 is wanted for a tie.

    The chance is the logistic function of the difference. Source: Burges et al., "Learning to rank using
    gradient descent" (ICML 2005), section 3.
    """
    difference, wanted = _pairs(predictions, labels)
    losses = binary_cross_entropy_with_logits(difference, wanted, reduction="sum")
    return losses / max(len(difference), 1)


def margin(predictions: torch.Tensor, labels: torch.Tensor, least: float = 0.1) -> torch.Tensor:
    """max(0, least - difference in the right order), the mean over the pairs that are not tied.

    Source: Herbrich et al., "Large margin rank boundaries for ordinal regression" (2000); it is the hinge of
    torch's `MarginRankingLoss`.
    """
    difference, wanted = _pairs(predictions, labels)
    sign = 2 * wanted - 1
    losses = (least - sign * difference).clamp(min=0) * sign.abs()
    return losses.sum() / sign.abs().sum().clamp(min=1)


def total(predictions: torch.Tensor, labels: torch.Tensor, outputs: torch.Tensor, config: LossConfig) -> torch.Tensor:
    """The weighted sum of the losses that are asked for.

    Each is taken among the conversations of one output, and they are averaged over the conversations.

    Args:
        predictions: [n] of the output that each conversation trains, standardised.
        labels: [n], standardised.
        outputs: [n], the index of that output.
    """
    loss = predictions.sum() * 0
    for output in outputs.unique().tolist():
        own = outputs == output
        loss = loss + own.float().mean() * _weighted(predictions[own], labels[own], config)
    return loss


def _weighted(predictions: torch.Tensor, labels: torch.Tensor, config: LossConfig) -> torch.Tensor:
    loss = config.mse * mse(predictions, labels)
    if config.plcc:
        loss = loss + config.plcc * plcc(predictions, labels)
    if config.rank and config.rank_kind == "margin":
        loss = loss + config.rank * margin(predictions, labels, config.margin)
    elif config.rank:
        rank = fidelity if config.rank_kind == "fidelity" else ranknet
        loss = loss + config.rank * rank(predictions, labels)
    return loss


def _pairs(predictions: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every pair once: the difference of the predictions, and 1, 1/2 or 0 as the first is better, alike, worse."""
    _check(predictions, labels)
    first, second = torch.triu_indices(len(labels), len(labels), offset=1, device=labels.device)
    wanted = (labels[first] - labels[second]).sign().add(1).div(2)
    return predictions[first] - predictions[second], wanted.to(predictions.dtype)


def _check(predictions: torch.Tensor, labels: torch.Tensor) -> None:
    if predictions.ndim != 1 or predictions.shape != labels.shape:
        raise ValueError(f"predictions {list(predictions.shape)} and labels {list(labels.shape)} are not both [n]")
