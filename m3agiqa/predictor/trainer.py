"""The training of a head, step by step, wherever its batches come from. Knows nothing of Ray.

With several processes the losses are over the whole batch, not over a process's share: every process gathers
the predictions of all, computes the same loss, takes its slope at its own predictions, and the gradients are
added up. So a correlation or a ranking means the same whatever the number of workers; only rounding differs.

Shapes: b conversations of this process, B of a whole step, T tokens, H numbers a token.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypedDict

import torch
from safetensors.torch import load_file, save_file

from m3agiqa.errors import UserError
from m3agiqa.predictor.batches import Batch, generator
from m3agiqa.predictor.group import Alone, Group
from m3agiqa.predictor.head import Head, HeadConfig
from m3agiqa.predictor.losses import total
from m3agiqa.predictor.metrics import Agreement, agreement
from m3agiqa.predictor.store import Affine, Predictor
from m3agiqa.train_config import TrainConfig

HEAD, BEST, OPTIMIZER, PROGRESS = "head.safetensors", "best.safetensors", "optimizer.safetensors", "progress.json"
"""The files of a checkpoint: the last weights, the best, AdamW's moments, and the rest."""


class EpochRecord(TypedDict):
    """What is known of one epoch: `score` is what is best on validation, larger is better, None if undefined."""

    epoch: int
    loss: float
    learning_rate: float
    validation: dict[str, Agreement]
    score: float | None
    best: bool
    seconds: float


@dataclass
class Progress:
    """Where a training stands.

    Attributes:
        step: steps taken. history: of the epochs that are done. best_epoch: from 1; 0 before the first.
    """

    step: int = 0
    history: list[EpochRecord] = field(default_factory=list)
    best_epoch: int = 0

    @property
    def epoch(self) -> int:
        """Epochs that are done."""
        return len(self.history)


@dataclass(frozen=True)
class Labels:
    """The labels of one part.

    Attributes:
        values: [n] on the scale. outputs: [n], which output each belongs to.
    """

    values: torch.Tensor
    outputs: torch.Tensor


class Source(Protocol):
    """Where a process gets its share of the batches from, of at most `batch_size / workers` conversations."""

    steps: int
    """Steps of an epoch, the same for all processes; a process that has fewer batches takes part with none."""

    def train(self, epoch: int) -> Iterator[Batch]:
        """The share of an epoch, counted from 1, in the order of that epoch."""

    def validation(self) -> Iterator[Batch]:
        """The share of the validation part, in any order."""


class Trainer:
    """One head, its optimizer and how far they are.

    Args:
        labels: of the training part; their means and standard deviations by output become the predictor's.
        judged: labels of the validation part.
        group: the processes that take each step together. All make the same trainer.
        build: makes the head of a configuration, with weights from torch's random state.

    Raises:
        UserError: for labels of an output that are all equal.
    """

    def __init__(
        self,
        config: TrainConfig,
        input_width: int,
        outputs: tuple[str, ...],
        scale: tuple[float, float],
        labels: Labels,
        judged: Labels,
        *,
        device: str | torch.device = "cpu",
        group: Group | None = None,
        build: Callable[[HeadConfig], Head] = Head,
    ) -> None:
        self._config, self._outputs, self._scale = config, outputs, scale
        self._device, self._group = torch.device(device), group or Alone()
        self.affine = standardisation(labels, outputs)
        self._judged = judged
        offset, factor = (torch.tensor([getattr(a, n) for a in self.affine.values()]) for n in ("offset", "factor"))
        which = labels.outputs
        self._targets = ((labels.values.double() - offset[which]) / factor[which]).float().to(self._device)
        self._which = which.to(self._device)
        torch.manual_seed(config.optim.seed)
        self._build = build
        self.head = build(head_config(config, input_width, outputs)).to(self._device)
        self._best = self._weights()
        matrices = [parameter for parameter in self.head.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in self.head.parameters() if parameter.ndim <= 1]
        decay = config.optim.weight_decay
        groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=config.optim.learning_rate)
        self.progress = Progress()

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or too many have brought nothing."""
        progress, optim = self.progress, self._config.optim
        stale = progress.epoch - progress.best_epoch
        return progress.epoch >= optim.epochs or stale >= optim.patience

    def run(self, source: Source, after_epoch: Callable[[], None] | None = None) -> None:
        """Trains until it is finished; `after_epoch` may save.

        Raises:
            UserError: if the loss is not finite.
        """
        while not self.finished:
            started = time.monotonic()
            epoch = self.progress.epoch + 1
            loss = self._train(epoch, source.train(epoch), source.steps)
            predictions = self.predict(source.validation(), len(self._judged.values), self._judged.outputs)
            found = by_output(predictions, self._judged, self._outputs)
            score = score_of(found, self._config.optim.metric)
            best = self._is_best(score)
            record = EpochRecord(
                epoch=epoch,
                loss=loss,
                learning_rate=self._rate(self.progress.step - 1, source.steps),
                validation=found,
                score=score,
                best=best,
                seconds=round(time.monotonic() - started, 3),
            )
            self.progress.history.append(record)
            if best:
                self.progress.best_epoch, self._best = epoch, self._weights()
            if after_epoch is not None:
                after_epoch()

    def predict(self, share: Iterable[Batch], count: int, outputs: torch.Tensor) -> torch.Tensor:
        """Scores of a part whose batches the processes share: [count] on the scale, clipped, on the CPU.

        Args:
            share: this process's batches. outputs: [count], which output is meant.
        """
        predictor = Predictor(self.head, self._scale, self.affine)
        found: dict[int, float] = {}
        for batch in share:
            scores = predictor.predict(batch.states, batch.lengths).view(len(batch.rows), -1)
            mine = scores[torch.arange(len(scores)), outputs[batch.rows]]
            found |= dict(zip(batch.rows.tolist(), mine.tolist(), strict=True))
        merged = {row: value for part in self._group.gather_objects(found) for row, value in part.items()}
        if len(merged) != count:
            raise ValueError(f"{count} conversations were to be scored, but {len(merged)} were")
        return torch.tensor([merged[row] for row in range(count)])

    def best(self) -> Predictor:
        """A predictor with the weights of the best epoch, on the CPU."""
        head = self._build(self.head.config)
        head.load_state_dict(self._best)
        return Predictor(head, self._scale, dict(self.affine))

    def use_best(self) -> None:
        """Goes back to the weights of the best epoch."""
        self.head.load_state_dict(self._best)

    def save(self, folder: Path) -> None:
        """Writes a checkpoint into an existing folder; nothing in it is code."""
        save_file(self._weights(), folder / HEAD)
        save_file(self._best, folder / BEST)
        moments = self._optimizer.state_dict()["state"]
        tensors = {f"{i}.{name}": value.cpu().contiguous() for i, one in moments.items() for name, value in one.items()}
        save_file(tensors, folder / OPTIMIZER)
        progress = {
            "step": self.progress.step,
            "best_epoch": self.progress.best_epoch,
            "history": self.progress.history,
            "sizes": {name: (folder / name).stat().st_size for name in (HEAD, BEST, OPTIMIZER)},
        }
        (folder / PROGRESS).write_text(json.dumps(progress, indent=1) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Goes on from a checkpoint of the same training."""
        self.head.load_state_dict(load_file(folder / HEAD))
        self._best = load_file(folder / BEST)
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in load_file(folder / OPTIMIZER).items():
            index, _, name = key.partition(".")
            moments.setdefault(int(index), {})[name] = value
        self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": moments})
        found = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        self.progress = Progress(found["step"], found["history"], found["best_epoch"])

    def _train(self, epoch: int, share: Iterator[Batch], steps: int) -> float:
        """One epoch. Returns its mean loss."""
        # From the epoch and the rank alone, so that a training that was interrupted goes on to the same end.
        seed = generator(self._config.optim.seed, epoch, self._group.rank, 1).initial_seed()
        torch.manual_seed(seed)
        self.head.train()
        losses = torch.zeros((), dtype=torch.float64)
        for _ in range(steps):
            rate = self._rate(self.progress.step, steps)
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            losses += self._step(next(share, None))
            self.progress.step += 1
        if next(share, None) is not None:
            raise ValueError(f"there are more batches than the {steps} of an epoch")
        if not bool(losses.isfinite()):
            raise UserError(
                f"optim.learning_rate={self._config.optim.learning_rate:g}",
                f"the loss was not finite in epoch {epoch}",
                "lower it, or look for states that are not finite",
            )
        return float(losses) / steps

    def _step(self, batch: Batch | None) -> float:
        self._optimizer.zero_grad(set_to_none=False)
        own, rows = torch.zeros(0, device=self._device), torch.zeros(0, dtype=torch.long, device=self._device)
        if batch is not None:
            batch = batch.to(self._device)
            rows = batch.rows
            out = self.head(batch.states, batch.lengths)
            own = out[torch.arange(len(rows), device=self._device), self._which[rows]]
        predictions, rows = self._whole_batch(own, rows)
        loss = total(predictions, self._targets[rows], self._which[rows], self._config.loss)
        if batch is not None:
            loss.backward()
        parameters = list(self.head.parameters())
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        self._group.add(p.grad for p in parameters if p.grad is not None)
        torch.nn.utils.clip_grad_norm_(parameters, self._config.optim.clip_norm)
        self._optimizer.step()
        return float(loss.detach())

    def _whole_batch(self, own: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predictions [b] and rows [b] of this process -> those of all [B]; the slope is that of its own."""
        if self._group.size == 1:
            return own, rows
        most = self._config.optim.batch_size // self._group.size
        lacking = most - len(own)
        padded = torch.nn.functional.pad(own, (0, lacking))
        everywhere = list(self._group.gather(padded.detach()).split(most))
        everywhere[self._group.rank] = padded
        all_rows = self._group.gather(torch.nn.functional.pad(rows, (0, lacking), value=-1))
        real = all_rows >= 0
        return torch.cat(everywhere)[real], all_rows[real]

    def _rate(self, step: int, steps_an_epoch: int) -> float:
        """The learning rate of a step, counted from 0."""
        optim = self._config.optim
        all_steps = steps_an_epoch * optim.epochs
        warmup = optim.warmup if optim.warmup >= 1 else optim.warmup * all_steps
        if step + 1 < warmup:
            return optim.learning_rate * (step + 1) / warmup
        if not optim.cosine:
            return optim.learning_rate
        done = min((step - warmup) / max(all_steps - warmup, 1), 1)
        return optim.learning_rate * (1 + math.cos(math.pi * max(done, 0))) / 2

    def _is_best(self, score: float | None) -> bool:
        best = self.progress.best_epoch
        before = self.progress.history[best - 1]["score"] if best else None
        return best == 0 or (score is not None and (before is None or score > before))

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().cpu().clone().contiguous() for name, value in self.head.state_dict().items()}


def head_config(config: TrainConfig, input_width: int, outputs: tuple[str, ...]) -> HeadConfig:
    """The head that a configuration asks for."""
    return HeadConfig(input_width=input_width, outputs=outputs, **config.head.model_dump())


def standardisation(labels: Labels, outputs: Sequence[str]) -> dict[str, Affine]:
    """Mean and standard deviation of the labels of each output.

    Raises:
        UserError: if there are none of one, or they are all equal.
    """
    found = {}
    for i, name in enumerate(outputs):
        values = labels.values[labels.outputs == i].double()
        deviation = float(values.std(correction=0)) if len(values) else 0.0
        if not deviation > 1e-9:
            raise UserError(
                f"the labels of {name}", f"{len(values)} to train on, all of them equal", "give labels that differ"
            )
        found[name] = Affine(offset=float(values.mean()), factor=deviation)
    return found


def by_output(predictions: torch.Tensor, labels: Labels, outputs: Sequence[str]) -> dict[str, Agreement]:
    """How predictions [n] on the scale agree with the labels, by the name of the output."""
    own = {name: labels.outputs == i for i, name in enumerate(outputs)}
    return {n: agreement(predictions[mask], labels.values[mask]) for n, mask in own.items() if bool(mask.any())}


def score_of(found: dict[str, Agreement], metric: str) -> float | None:
    """What is best on validation: the mean over the outputs, larger is better; None where it is undefined."""
    values = []
    for one in found.values():
        if metric in ("rmse", "mae"):
            values.append(-float(one[metric]))  # type: ignore[literal-required]
            continue
        for part in metric.split("+"):
            if (value := one[part]) is None:  # type: ignore[literal-required]
                return None
            values.append(float(value))
    return sum(values) / len(values) if values else None
