"""Trains a head on captured states in memory: for notebooks, tests and benchmarks.

fitted = fit(
    Examples(states, labels),             # states: list of [tokens, hidden]; labels [n] on the scale
    Examples(other_states, other_labels),  # validation: decides the best epoch and when to stop
    TrainConfig(...),                      # m3agiqa.train_config: head, loss, optim, data
    outputs=("quality",),                  # with several, Examples.outputs says which one each trains
    scale=(0.0, 5.0),
)
fitted.predictor.predict_all(states)       # m3agiqa.predictor.Predictor, the best epoch's, uncalibrated
fitted.history                             # of each epoch: loss, SRCC, PLCC, RMSE, MAE by output
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from m3agiqa.aspects import SCALE_MAX, SCALE_MIN
from m3agiqa.predictor.batches import Batch, batches, generator
from m3agiqa.predictor.head import Head, HeadConfig
from m3agiqa.predictor.store import Predictor
from m3agiqa.predictor.trainer import EpochRecord, Labels, Trainer
from m3agiqa.train_config import TrainConfig


@dataclass(frozen=True)
class Examples:
    """Conversations with their labels, in memory.

    Attributes:
        states: of each, [tokens, H] in any floating type.
        labels: [n], on the scale of the predictor.
        outputs: [n], which output each of them trains; None: the first.
    """

    states: Sequence[torch.Tensor]
    labels: torch.Tensor
    outputs: torch.Tensor | None = None


@dataclass(frozen=True)
class Fitted:
    """What training gave.

    Attributes:
        predictor: with the weights of the best epoch, not calibrated.
        history: of each epoch. best_epoch: from 1.
    """

    predictor: Predictor
    history: list[EpochRecord]
    best_epoch: int


def fit(
    train: Examples,
    validation: Examples,
    config: TrainConfig | None = None,
    *,
    outputs: tuple[str, ...] = ("quality",),
    scale: tuple[float, float] = (SCALE_MIN, SCALE_MAX),
    device: str | torch.device = "cpu",
    on_epoch: Callable[[EpochRecord], None] | None = None,
    build: Callable[[HeadConfig], Head] = Head,
) -> Fitted:
    """Trains on examples in memory, and leaves torch's random state as it was.

    The same call gives the same weights to the bit on a CPU. Of the configuration, `head`, `loss`, `optim` and
    `data.bucket_batches` matter.

    Args:
        build: makes the head: another one than the xLSTM, to compare it with.

    Raises:
        UserError: for constant labels, and a loss that is not finite.
        ValueError: for shapes that do not fit.
    """
    config = config or TrainConfig()
    learnt, judged = _labels(train, len(outputs)), _labels(validation, len(outputs))
    width = train.states[0].shape[1]
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        trainer = Trainer(config, width, outputs, scale, learnt, judged, device=device, build=build)
        source = _InMemory(train, validation, config)
        trainer.run(source, (lambda: on_epoch(trainer.progress.history[-1])) if on_epoch else None)
        return Fitted(trainer.best(), trainer.progress.history, trainer.progress.best_epoch)


class _InMemory:
    def __init__(self, train: Examples, validation: Examples, config: TrainConfig) -> None:
        self._train, self._validation, self._config = train, validation, config
        self.steps = -(-len(train.states) // config.optim.batch_size)

    def train(self, epoch: int) -> Iterator[Batch]:
        size, bucket = self._config.optim.batch_size, self._config.data.bucket_batches
        order = generator(self._config.optim.seed, epoch, 0)
        examples = list(enumerate(self._train.states))
        return batches(examples, size, window=len(examples), bucket=bucket, generator=order)

    def validation(self) -> Iterator[Batch]:
        examples = list(enumerate(self._validation.states))
        return batches(examples, self._config.optim.batch_size, window=len(examples))


def _labels(examples: Examples, outputs: int) -> Labels:
    count = len(examples.states)
    which = torch.zeros(count, dtype=torch.long) if examples.outputs is None else examples.outputs
    if not count or examples.labels.shape != (count,) or which.shape != (count,):
        raise ValueError(f"{count} states, but labels {list(examples.labels.shape)} and outputs {list(which.shape)}")
    if not bool(examples.labels.isfinite().all()) or int(which.min()) < 0 or int(which.max()) >= outputs:
        raise ValueError(f"labels must be finite, and outputs within 0 and {outputs - 1}")
    return Labels(examples.labels, which)
