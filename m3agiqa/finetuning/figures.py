"""How good the answers are: loss, how often the rating word is right or one off, rank correlation with the scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch

from m3agiqa.aspects import Aspect
from m3agiqa.finetune_config import BestBy
from m3agiqa.predictor.metrics import agreement


class Figures(TypedDict):
    """Of one aspect. `loss` is None where no answers were given; SRCC where scores or ratings are all equal."""

    loss: float | None
    accuracy: float
    within_one: float
    srcc: float | None
    conversations: int


@dataclass(frozen=True)
class Judged:
    """One conversation of the validation part.

    Attributes:
        loss, weight: of its answers. word, said: numbers of the right word and the likeliest.
        expected: the expected rating. score: the human one, or that of the right word.
    """

    aspect: Aspect
    loss: float
    weight: float
    word: int
    said: int
    expected: float
    score: float


def figures(judged: Sequence[Judged]) -> dict[str, Figures]:
    """The figures of each aspect that there are conversations of."""
    found = {}
    for aspect in Aspect:
        own = [one for one in judged if one.aspect is aspect]
        if not own:
            continue
        weight = sum(one.weight for one in own)
        expected, scores = (torch.tensor([getattr(one, name) for one in own]) for name in ("expected", "score"))
        found[str(aspect)] = Figures(
            loss=sum(one.loss for one in own) / weight if weight else None,
            accuracy=sum(one.word == one.said for one in own) / len(own),
            within_one=sum(abs(one.word - one.said) <= 1 for one in own) / len(own),
            srcc=agreement(expected, scores)["srcc"],
            conversations=len(own),
        )
    return found


def value_of(found: dict[str, Figures], best_by: BestBy) -> float | None:
    """What is best: the mean over the aspects, larger is better; None where it is undefined."""
    values = [one[best_by] for one in found.values()]
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return None
    mean = sum(known) / len(known)
    return -mean if best_by == "loss" else mean


def figures_line(found: dict[str, Figures]) -> str:
    """`quality loss 0.912 right 0.64 within one 0.97 SRCC 0.871`, of each aspect."""
    parts = []
    for name, one in found.items():
        loss, srcc = ("--" if value is None else f"{value:.3f}" for value in (one["loss"], one["srcc"]))
        said = f"right {one['accuracy']:.2f} within one {one['within_one']:.2f} SRCC {srcc}"
        parts.append(f"{name} {'' if one['loss'] is None else f'loss {loss} '}{said}")
    return "; ".join(parts)
