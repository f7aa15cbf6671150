"""The steps of a fine-tuning, its evaluations and its checkpoints. Knows nothing of Ray.

A step is over `optim.batch_size` conversations of all processes: each has an equal share, takes it in pieces of
`optim.micro_batch`, and adds up the gradients. Losses are divided by what all of them weigh together, so that
neither the pieces nor the number of processes change what is minimised. Order and dropout of a step hang on the
seed and the step's number alone: a training that goes on from a checkpoint takes the very same steps.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import torch
from safetensors.torch import load_file, save_file

from m3agiqa.errors import UserError
from m3agiqa.finetune_config import FinetuneConfig
from m3agiqa.finetuning.encoding import Batch, Encoded, Encoder, collate
from m3agiqa.finetuning.figures import Figures, Judged, figures, value_of
from m3agiqa.finetuning.learner import Learner, Outcome
from m3agiqa.finetuning.order import batches_of, pieces
from m3agiqa.finetuning.parallel import Parallel, add_up, gathered, spread_as
from m3agiqa.finetuning.parts import Share
from m3agiqa.finetuning.pictures import Pictures, Prepared
from m3agiqa.finetuning.talks import Bad, Talk
from m3agiqa.predictor.batches import generator
from m3agiqa.predictor.group import Group

LAST, BEST, OPTIMIZER, PROGRESS = "last.safetensors", "best.safetensors", "optimizer.safetensors", "progress.json"
"""The files of a checkpoint: what is learnt, the same at its best, AdamW's moments, and the rest."""


class Record(TypedDict):
    """What is known after a step: of the steps since the last such, or of an evaluation."""

    step: int
    epoch: int
    loss: NotRequired[float]
    learning_rate: NotRequired[float]
    conversations_per_second: NotRequired[float]
    validation: NotRequired[dict[str, Figures]]
    best: NotRequired[bool]


@dataclass
class Progress:
    """Where a training stands.

    Attributes:
        step: steps taken. history: what was told. best_step: 0 before the first evaluation. best: what it came to.
        losses, logged: of the steps since the last line, and how many.
    """

    step: int = 0
    history: list[Record] = field(default_factory=list)
    best_step: int = 0
    best: float | None = None
    losses: float = 0.0
    logged: int = 0


@dataclass(frozen=True)
class Part:
    """Conversations of one process, with their token ids, the images' put in."""

    talks: Sequence[Talk]
    encoded: Sequence[Encoded]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each."""
        return [len(one.ids) for one in self.encoded]


def encoded_parts(
    share: Share, encoder: Encoder, pictures: Pictures | None, context: int
) -> tuple[Part, Part, list[Bad]]:
    """Training and validation part of a share with their token ids; what does not fit into the context is bad.

    Args:
        pictures: opened; conversations about an image that it could not read are left out. None: there are none.
    """
    made: list[tuple[list[Talk], list[Encoded]]] = [([], []), ([], [])]
    bad = []
    for (talks, encoded), part in zip(made, (share.train, share.validation), strict=True):
        for talk in part:
            if pictures is not None and talk.picture not in pictures.tokens:
                continue
            one = encoder.encode(talk)
            if pictures is not None:
                one = one.expand(pictures.tokens[talk.picture], encoder.builder.image_token_id)
            if len(one.ids) > context:
                why = f"{talk.aspect}: the conversation has {len(one.ids)} tokens, and the context {context}"
                bad.append(Bad(share.pictures[talk.picture].row, why))
                continue
            talks.append(talk)
            encoded.append(one)
    train, validation = (Part(talks, encoded) for talks, encoded in made)
    return train, validation, bad


class Trainer:
    """One learner, its optimizer and how far they are.

    Args:
        pictures: gives images ready for the model, by number; None in a training of text only.
        group: the processes that take each step together. All make the same trainer.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        learner: Learner,
        train: Part,
        validation: Part,
        pictures: Callable[[Iterable[int]], dict[int, Prepared]] | None,
        group: Group,
        pad: int,
    ) -> None:
        self._config, self._learner, self._group = config, learner, group
        self._train, self._validation, self._pictures, self._pad = train, validation, pictures, pad
        self._size = config.optim.batch_size // group.size
        self._device = next(learner.parameters()).device
        self.model = Parallel(learner, group.size, spread=config.compute.parallel == "fsdp")
        self._optimizer = torch.optim.AdamW(
            learner.learnt().values(), lr=config.optim.learning_rate, weight_decay=config.optim.weight_decay
        )
        self.steps = max(group.gather_objects(-(-len(train.talks) // self._size)))
        """Steps of an epoch."""
        self._judge_steps = max(group.gather_objects(-(-len(validation.talks) // self._judge_size)))
        self.progress = Progress()
        self._best = self.weights()
        self._order: tuple[int, list[list[int]]] = (-1, [])
        self._lengths = train.lengths

    @property
    def all_steps(self) -> int:
        """Steps of the whole training."""
        return self.steps * self._config.optim.epochs

    @property
    def _judge_size(self) -> int:
        return 2 * self._config.optim.micro_batch

    def run(self, told: Callable[[Record], None], save: Callable[[], None]) -> None:
        """Trains to the end.

        Args:
            told: takes what is known, as it is. save: is called where a checkpoint is due.

        Raises:
            UserError: if the loss is not finite.
        """
        watch, progress = self._config.watch, self.progress
        self._learner.train()
        seconds, conversations = 0.0, 0
        for batches in self._ahead():
            started = time.monotonic()
            progress.losses += self._step(batches)
            progress.step += 1
            progress.logged += 1
            seconds += time.monotonic() - started
            conversations += sum(len(batch.ids) for batch in batches) * self._group.size
            ended = progress.step % self.steps == 0
            if progress.step % watch.log_steps == 0 or ended:
                self._log(told, conversations / max(seconds, 1e-9))
                seconds, conversations = 0.0, 0
            if ended or (watch.evaluate_steps and progress.step % watch.evaluate_steps == 0):
                self._evaluate(told)
            if ended or progress.step % watch.checkpoint_steps == 0:
                save()

    def weights(self) -> dict[str, torch.Tensor]:
        """What is learnt, by PEFT's names of it in the model. All processes must ask."""
        return {name: gathered(one) for name, one in self._learner.learnt().items()}

    def checkpoint(self) -> dict[str, Any]:
        """All that is to be saved. All processes must ask."""
        moments: dict[str, torch.Tensor] = {}
        for i, state in self._optimizer.state_dict()["state"].items():
            moments |= {f"{i}.{name}": gathered(value) for name, value in state.items()}
        return {LAST: self.weights(), BEST: self._best, OPTIMIZER: moments, PROGRESS: asdict(self.progress)}

    def load(self, folder: Path) -> None:
        """Goes on from a checkpoint of the same training."""
        found = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        found.pop("sizes")
        self.progress = Progress(**found)
        self._best = load_file(folder / BEST)
        self.use(load_file(folder / LAST))
        parameters = list(self._learner.learnt().values())
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in load_file(folder / OPTIMIZER).items():
            index, _, name = key.partition(".")
            like = parameters[int(index)]
            moments.setdefault(int(index), {})[name] = spread_as(like, value) if value.dim() else value
        self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": moments})

    @torch.no_grad()
    def use(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Takes weights that `weights` gave."""
        for name, one in self._learner.learnt().items():
            one.copy_(spread_as(one, weights[name]))

    def judge(self) -> dict[str, Figures]:
        """Figures of the validation part, as the learner is."""
        self._learner.eval()
        found: list[Judged] = []
        with torch.no_grad():
            places = sorted(range(len(self._validation.talks)), key=lambda i: len(self._validation.encoded[i].ids))
            for part in pieces(places, self._judge_size, self._judge_steps):
                batch = self._collate(self._validation, part).to(self._device)
                outcome = self.model(batch)
                if part:
                    found += _judged([self._validation.talks[i] for i in part], batch, outcome)
        self._learner.train()
        return figures([one for share in self._group.gather_objects(found) for one in share])

    def _ahead(self) -> Iterator[list[Batch]]:
        """The batches of every step that is left, the next one being made while one is taken."""
        steps = range(self.progress.step, self.all_steps)
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(self._batches, steps[0]) if steps else None
            for step in steps:
                assert coming is not None
                batches = coming.result()
                if step + 1 < self.all_steps:
                    coming = pool.submit(self._batches, step + 1)
                yield batches

    def _batches(self, step: int) -> list[Batch]:
        """This process's pieces of a step: as many as every other has."""
        epoch, at = divmod(step, self.steps)
        if self._order[0] != epoch:
            data, order = self._config.data, generator(self._config.optim.seed, epoch, self._group.rank)
            how: dict[str, Any] = {"bucket": data.bucket_batches, "together": data.together, "generator": order}
            self._order = epoch, batches_of(self._train.talks, self._lengths, self._size, **how)
        own = self._order[1]
        places = own[at] if at < len(own) else []
        micro = self._config.optim.micro_batch
        most = -(-self._size // micro)
        # Alone, an epoch's last step need not be filled up.
        count = most if self._group.size > 1 else -(-len(places) // micro)
        return [self._collate(self._train, part) for part in pieces(places, micro, count)]

    def _collate(self, part: Part, places: Sequence[int]) -> Batch:
        """A batch; where there is nothing to put in, one that counts nothing."""
        chosen = list(places) or [0]
        talks = [part.talks[i] for i in chosen]
        pictures = self._pictures(talk.picture for talk in talks) if self._pictures is not None else {}
        batch = collate(talks, [part.encoded[i] for i in chosen], pictures, self._pad)
        return batch if places else batch.silenced()

    def _step(self, batches: Sequence[Batch]) -> float:
        """Takes one step. Returns its loss, over all processes."""
        optim, loss = self._config.optim, self._config.loss
        torch.manual_seed(generator(optim.seed, self.progress.step, self._group.rank, 2).initial_seed())
        rate = self._rate(self.progress.step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        own = [
            [float(b.weights[:, 1:].sum()) for b in batches],
            [float(len(b.ids)) if bool(b.weights.any()) else 0.0 for b in batches],
        ]
        weight, talks = add_up(torch.tensor([sum(row) for row in own], device=self._device)).tolist()
        self._optimizer.zero_grad(set_to_none=True)
        total = torch.zeros(1, device=self._device)
        for i, batch in enumerate(batches):
            batch = batch.to(self._device)
            with self.model.step_part(last=i == len(batches) - 1):
                outcome = self.model(batch)
                part = outcome.loss.sum() / weight
                if loss.score:
                    errors = (outcome.expected() - batch.scores).square()
                    part = part + loss.score * (errors * (outcome.weight > 0)).sum() / talks
                # Gradients are averaged over the processes, and the loss is to be a sum.
                (part * self._group.size).backward()
            total += part.detach()
        torch.nn.utils.clip_grad_norm_(self._learner.learnt().values(), optim.clip_norm)
        self._optimizer.step()
        return float(add_up(total))

    def _rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        optim = self._config.optim
        warmup = optim.warmup if optim.warmup >= 1 else optim.warmup * self.all_steps
        if step + 1 < warmup:
            return optim.learning_rate * (step + 1) / warmup
        if not optim.cosine:
            return optim.learning_rate
        done = min((step - warmup) / max(self.all_steps - warmup, 1), 1)
        return optim.learning_rate * (1 + math.cos(math.pi * max(done, 0))) / 2

    def _log(self, told: Callable[[Record], None], speed: float) -> None:
        progress = self.progress
        loss = progress.losses / progress.logged
        if not math.isfinite(loss):
            rate = f"optim.learning_rate={self._config.optim.learning_rate:g}"
            raise UserError(rate, f"the loss was not finite before step {progress.step}", "lower it")
        record = self._record(
            loss=loss, learning_rate=self._rate(progress.step - 1), conversations_per_second=round(speed, 2)
        )
        progress.losses, progress.logged = 0.0, 0
        progress.history.append(record)
        told(record)

    def _evaluate(self, told: Callable[[Record], None]) -> None:
        progress = self.progress
        found = self.judge()
        value = value_of(found, self._config.watch.best_by)
        best = not progress.best_step or (value is not None and (progress.best is None or value > progress.best))
        if best:
            progress.best_step, progress.best, self._best = progress.step, value, self.weights()
        record = self._record(validation=found, best=best)
        progress.history.append(record)
        told(record)

    def _record(self, **more: Any) -> Record:
        record = {"step": self.progress.step, "epoch": -(-self.progress.step // self.steps), **more}
        return cast(Record, record)


def _judged(talks: Sequence[Talk], batch: Batch, outcome: Outcome) -> list[Judged]:
    loss, weight = outcome.loss.tolist(), outcome.weight.tolist()
    said, expected = outcome.ratings.argmax(-1).tolist(), outcome.expected().tolist()
    words, scores = batch.words.tolist(), batch.scores.tolist()
    rows = zip(talks, loss, weight, words, said, expected, scores, strict=True)
    return [Judged(talk.aspect, *values) for talk, *values in rows]


def write_checkpoint(folder: Path, content: Mapping[str, Any]) -> None:
    """Writes what `Trainer.checkpoint` gave into an existing folder; nothing in it is code."""
    names = (LAST, BEST, OPTIMIZER)
    for name in names:
        save_file(content[name], folder / name)
    sizes = {name: (folder / name).stat().st_size for name in names}
    text = json.dumps(content[PROGRESS] | {"sizes": sizes}, indent=1)
    (folder / PROGRESS).write_text(text + "\n", encoding="utf-8")
