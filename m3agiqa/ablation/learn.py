"""One training of one variation with one seed, and what it says of the test part."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch

from m3agiqa.ablate_config import LOSSES, AblateConfig
from m3agiqa.ablation.heads import builder
from m3agiqa.ablation.variations import Variation
from m3agiqa.predictor.metrics import Agreement, agreement
from m3agiqa.predictor.train import Examples, fit
from m3agiqa.predictor.trainer import score_of
from m3agiqa.train_config import TrainConfig

# Of the squared weights of the standardised features; the best one on validation is taken, as the best epoch is.
_PENALTIES = tuple(10.0**power for power in range(-2, 7))


class Learnt(TypedDict):
    """What a training gave.

    `seconds` are of the CPU (the wall on a GPU), predictions are by test part, in the order of its conversations.
    """

    parameters: int
    seconds: float
    epochs: int | None
    best_epoch: int | None
    validation: Agreement
    predictions: dict[str, list[float]]


@dataclass(frozen=True)
class Shown:
    """Conversations as a head sees them, and their labels [n]."""

    states: Sequence[torch.Tensor]
    labels: torch.Tensor


def learn(
    variation: Variation,
    seed: int,
    train: Shown,
    validation: Shown,
    tests: dict[str, Shown],
    config: AblateConfig,
    scale: tuple[float, float],
) -> Learnt:
    """Trains by one rule: the epoch, or the ridge's penalty, that is best on validation; no test label is looked at.

    Args:
        tests: by name. scale: lowest and highest label.

    Raises:
        UserError: for labels that are all equal, and a loss that is not finite.
    """
    if variation.head == "ridge":
        return _ridge(variation, train, validation, tests, config, scale)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = TrainConfig(
        head=config.shape.model_copy(update={"pooling": variation.pooling}),
        loss=LOSSES[variation.loss],
        optim=config.optim.model_copy(update={"seed": seed}),
        data=config.data,
    )
    clock = time.perf_counter if device == "cuda" else time.process_time
    started = clock()
    fitted = fit(
        Examples(train.states, train.labels),
        Examples(validation.states, validation.labels),
        settings,
        scale=scale,
        device=device,
        build=builder(variation.head),
    )
    seconds = round(clock() - started, 2)
    predictor = fitted.predictor.to(device)
    [judged] = fitted.history[fitted.best_epoch - 1]["validation"].values()
    return Learnt(
        parameters=sum(one.numel() for one in predictor.head.parameters()),
        seconds=seconds,
        epochs=len(fitted.history),
        best_epoch=fitted.best_epoch,
        validation=judged,
        predictions={name: _rounded(predictor.predict_all(one.states)) for name, one in tests.items()},
    )


def _ridge(
    variation: Variation,
    train: Shown,
    validation: Shown,
    tests: dict[str, Shown],
    config: AblateConfig,
    scale: tuple[float, float],
) -> Learnt:
    """Ridge regression on the pooled states. It has no seed: all of its trainings are equal."""
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    started = time.process_time()
    features, judged = pooled(train.states, variation.pooling), pooled(validation.states, variation.pooling)
    best, found, best_score = None, None, -math.inf
    for penalty in _PENALTIES:
        model = make_pipeline(StandardScaler(), Ridge(penalty)).fit(features, train.labels.numpy())
        predictions = torch.from_numpy(model.predict(judged).clip(*scale))
        one = agreement(predictions, validation.labels)
        score = score_of({"": one}, config.optim.metric)
        if found is None or (score is not None and score > best_score):
            best, found, best_score = model, one, -math.inf if score is None else score
    assert best is not None
    assert found is not None
    seconds = round(time.process_time() - started, 2)
    given = {name: best.predict(pooled(one.states, variation.pooling)).clip(*scale) for name, one in tests.items()}
    return Learnt(
        parameters=features.shape[1] + 1,
        seconds=seconds,
        epochs=None,
        best_epoch=None,
        validation=found,
        predictions={name: _rounded(torch.from_numpy(one)) for name, one in given.items()},
    )


def pooled(states: Sequence[torch.Tensor], pooling: str) -> np.ndarray:
    """Conversations [tokens, H] -> [n, H] in float32, as a head pools them."""
    ways = {
        "mean": lambda one: one.mean(0),
        "max": lambda one: one.amax(0),
        "last": lambda one: one[-1],
        "first_last": lambda one: (one[0] + one[-1]) / 2,
    }
    return torch.stack([ways[pooling](states[i].float()) for i in range(len(states))]).numpy()


def _rounded(predictions: torch.Tensor) -> list[float]:
    return [round(value, 6) for value in predictions.double().tolist()]
