"""The two stages of the training: first to see, then to speak."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m3agiqa.aspects import RATING_LEVELS
from m3agiqa.tiny.heads import Heads, truth_of
from m3agiqa.tiny.samples import Sample
from m3agiqa.tiny.talks import Batch, States, Teacher, states_of

OWN_SHARE, OWN_FROM = 0.5, 0.75
"""In the last quarter of stage 2, half of the conversations hold the model's own description."""

_HEADS_WEIGHT = 0.3
"""How much the heads of stage 1 still count in stage 2."""

Draw = Callable[[int], list[Sample]]
Log = Callable[[str], None]


def learn_to_see(model: Any, heads: Heads, teacher: Teacher, draw: Draw, log: Log, **how: Any) -> None:
    """Stage 1: everything that is known of a picture, by eye and at the end of the first question."""

    def losses() -> dict[str, Tensor]:
        samples = draw(how["batch"])
        batch = teacher.openings(samples)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return _of_heads(model, heads, samples, batch, states_of(model, batch))

    _run(losses, _groups(model, heads, how), how["steps"], "see", log)


def learn_to_speak(model: Any, heads: Heads, teacher: Teacher, draw: Draw, log: Log, **how: Any) -> None:
    """Stage 2: the assistant's tokens."""
    rating_ids = torch.tensor([ids[0] for ids in teacher.encoder.builder.rating_ids])
    done = 0

    def losses() -> dict[str, Tensor]:
        nonlocal done
        samples = draw(how["batch"])
        batch = teacher.conversations(samples, OWN_SHARE if done >= OWN_FROM * how["steps"] else 0.0)
        done += 1
        with torch.autocast("cpu", dtype=torch.bfloat16):
            states = states_of(model, batch)
            known = _of_heads(model, heads, samples, batch, states)
            return _of_words(model, batch, states.last, rating_ids) | {"heads": _HEADS_WEIGHT * _sum(known.values())}

    _run(losses, _groups(model, heads, how), how["steps"], "say", log)


def _groups(model: Any, heads: Heads, how: dict[str, Any]) -> list[dict[str, Any]]:
    """The eye learns more slowly than the rest, which would otherwise wipe out what it begins with.

    The connector too: it sums so many inputs that a step of the usual size would upset every token.
    """
    eye, connector = [*model.model.vision_model.parameters()], [*model.model.connector.parameters()]
    apart = {id(p) for p in [*eye, *connector]}
    rest = [p for p in [*model.parameters(), *heads.parameters()] if id(p) not in apart]
    rates = ((eye, how["eye_rate"]), (connector, how["connector_rate"]), (rest, how["rate"]))
    return [{"params": params, "lr": rate} for params, rate in rates]


def _of_heads(model: Any, heads: Heads, samples: Sequence[Sample], batch: Batch, states: States) -> dict[str, Tensor]:
    truth = truth_of(samples, model.config)
    rows = torch.arange(len(batch.ids))
    begun = states.inner[rows, batch.described_at - 1]
    return heads.of_the_eye(states.patches, states.tokens, truth) | heads.of_the_talk(
        begun, truth, batch.image_of, batch.matches
    )


def _of_words(model: Any, batch: Batch, last: Tensor, rating_ids: Tensor) -> dict[str, Tensor]:
    """Cross-entropy of the answers, that of the rating words once more, and the squared error of the expected score."""
    rows = torch.arange(len(batch.ids))
    logits = model.lm_head(last[batch.learn]).float()
    rating = model.lm_head(last[rows, batch.rating_at - 1]).float()
    expected = rating[:, rating_ids].softmax(-1) @ torch.tensor(RATING_LEVELS)
    known = ~batch.score.isnan()
    return {
        "words": F.cross_entropy(logits, batch.ids.roll(-1, 1)[batch.learn]),
        "rating": 0.4 * F.cross_entropy(rating, batch.ids[rows, batch.rating_at]),
        "score": 0.2 * F.mse_loss(expected[known], batch.score[known]),
    }


def _sum(losses: Iterable[Tensor]) -> Tensor:
    return torch.stack([loss.float() for loss in losses]).sum()


def _run(
    losses: Callable[[], dict[str, Tensor]], groups: list[dict[str, Any]], steps: int, name: str, log: Log
) -> None:
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine(steps))
    learned = [p for group in groups for p in group["params"]]
    lately: dict[str, float] = {}
    for step in range(steps):
        parts = losses()
        optimizer.zero_grad()
        _sum(parts.values()).backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        lately = {k: 0.95 * lately.get(k, v.item()) + 0.05 * v.item() for k, v in parts.items()}
        if step % 25 == 0 or step == steps - 1:
            log(f"{name} {step}/{steps} " + ", ".join(f"{k} {v:.2f}" for k, v in lately.items()))


def warm_cosine(steps: int) -> Callable[[int], float]:
    """A learning rate that rises over the first steps and falls to a fiftieth along a cosine."""
    warm = min(100, 1 + steps // 10)

    def factor(step: int) -> float:
        done = min(step / max(steps, 1), 1.0)
        return min((step + 1) / warm, 1.0) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))

    return factor
