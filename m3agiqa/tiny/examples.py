"""Labelled conversations: what is asked about a sample, what a right answer is, and its token ids.

The questions come from `m3agiqa.conversation` and the ids from `PromptBuilder`, so what the model is
trained on is to the token what an engine asks it.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from m3agiqa.aspects import SCALE_MAX, SCALE_MIN, Aspect, word_of_score
from m3agiqa.conversation import questions
from m3agiqa.engine.prompting import PromptBuilder
from m3agiqa.tiny.degrade import Damage
from m3agiqa.tiny.pictures import COLOURS, PLACES, SHAPES, Group, Scene, random_scene
from m3agiqa.tiny.prompts import STYLES, foreign_prompt
from m3agiqa.tiny.samples import Sample


@dataclass(frozen=True)
class Conversation:
    """The right answers of one image and aspect.

    Attributes:
        score: the true score, which decides the rating word; None where the truth is not known.
        match: how far the items of the prompt are met, where that was asked and is known.
    """

    aspect: Aspect
    prompt: str | None
    description: str
    score: float | None
    match: "Match | None" = None

    @property
    def word(self) -> str:
        """The rating word; the middle one where the truth is not known."""
        return word_of_score((SCALE_MIN + SCALE_MAX) / 2 if self.score is None else self.score)


_ADVERBS = ((0.3, "slightly"), (0.65, "clearly"), (1.1, "strongly"))
_FAULTS = {
    "blur": "blurred",
    "noise": "noisy",
    "compression": "blocky from compression",
    "pixelation": "pixelated",
    "low contrast": "washed out",
    "underexposure": "too dark",
    "overexposure": "too bright",
    "banding": "banded in its colours",
}
_SIZES = ((0.3, "small"), (0.65, "large"), (1.1, "very large"))
_SIGNS = {
    "melted": "looks melted",
    "repeated": "repeats the same tile",
    "checkerboard": "shows a checkerboard pattern",
    "scrambled": "is scrambled into square pieces",
    "smeared": "is smeared into streaks",
}


def _degree(severity: float, steps: tuple[tuple[float, str], ...]) -> str:
    return next(word for limit, word in steps if severity < limit)


def describe_quality(degradations: tuple[Damage, ...]) -> str:
    """Such as "The image is strongly blurred and slightly noisy."; the main fault first."""
    if not degradations:
        return "The image is sharp and clean."
    faults = [f"{_degree(d.severity, _ADVERBS)} {_FAULTS[d.kind]}" for d in degradations]
    return f"The image is {' and '.join(faults)}."


def describe_authenticity(artefacts: tuple[Damage, ...]) -> str:
    """Such as "A large area looks melted."."""
    if not artefacts:
        return "Shapes and surfaces look natural."
    return " ".join(f"A {_degree(d.severity, _SIZES)} area {_SIGNS[d.kind]}." for d in artefacts)


@dataclass(frozen=True)
class Match:
    """How far each item of a prompt is met, from 0 to 1."""

    shape: float
    colour: float
    number: float
    place: float

    @property
    def score(self) -> float:
        """The correspondence score: what the objects are counts most, and one miss is never excellent."""
        return SCALE_MAX * (0.28 * (self.shape + self.colour) + 0.22 * (self.number + self.place))

    @property
    def text(self) -> str:
        """Such as "The shape matches, the colour differs, ..."."""
        verdicts = [
            f"the {name} {'matches' if met == 1 else 'differs' if met == 0 else 'partly differs'}"
            for name, met in (("shape", self.shape), ("colour", self.colour), ("number", self.number))
        ]
        place = "matches" if self.place == 1 else "differs"
        return f"{', '.join(verdicts)} and the place {place}.".capitalize()


_NOTHING = Match(0.0, 0.0, 0.0, 0.0)


def compare(shown: Scene, asked: Scene) -> Match:
    """How well `shown` meets `asked`; both have equally many groups."""
    pairs = list(zip(shown.groups, asked.groups, strict=True))
    return Match(
        shape=float(np.mean([a.shape == b.shape for a, b in pairs])),
        colour=float(np.mean([a.colour == b.colour for a, b in pairs])),
        number=float(np.mean([a.count == b.count for a, b in pairs])),
        place=float(shown.place == asked.place),
    )


def correspondence(sample: Sample, rng: np.random.Generator) -> Conversation:
    """A prompt that the sample meets, meets in part or does not meet, and what is to be said of it."""
    shown = "The image shows a photograph." if sample.scene is None else f"The image shows {sample.scene.text}."
    chance = rng.random()
    if sample.scene is None:
        asked = random_scene(rng).text if chance < 0.5 else foreign_prompt(rng)
        known = chance < 0.5
        verdict = "The prompt asks for something else." if known else "Whether the prompt fits cannot be told."
        met = _NOTHING if known else None
        return Conversation(
            Aspect.CORRESPONDENCE, _styled(asked, rng), f"{shown} {verdict}", met.score if met else None, met
        )
    if chance < 0.12:
        verdict = "The prompt asks for something else."
        return Conversation(Aspect.CORRESPONDENCE, foreign_prompt(rng), f"{shown} {verdict}", 0.0, _NOTHING)
    changes = 0 if chance < 0.40 else int(rng.integers(1, 5))
    asked_scene = altered(sample.scene, changes, rng)
    match = compare(sample.scene, asked_scene)
    prompt = _styled(asked_scene.text, rng)
    return Conversation(Aspect.CORRESPONDENCE, prompt, f"{shown} {match.text}", match.score, match)


def altered(scene: Scene, changes: int, rng: np.random.Generator) -> Scene:
    """`scene` with `changes` of its four items (shape, colour, number, place) made different."""
    for item in rng.permutation(["shape", "colour", "number", "place"])[:changes]:
        if item == "place":
            scene = replace(scene, place=_other(PLACES, scene.place, rng))
            continue
        # In one of two groups or in both.
        chosen = [g for g in range(len(scene.groups)) if rng.random() < 0.7] or [0]
        groups = tuple(_change(g, str(item), rng) if i in chosen else g for i, g in enumerate(scene.groups))
        scene = replace(scene, groups=groups)
    return scene


def _change(group: Group, item: str, rng: np.random.Generator) -> Group:
    if item == "shape":
        return replace(group, shape=_other(SHAPES, group.shape, rng))
    if item == "colour":
        return replace(group, colour=_other(tuple(COLOURS), group.colour, rng))
    return replace(group, count=int(_other(("1", "2", "3"), str(group.count), rng)))


def _other(choices: tuple[str, ...], current: str, rng: np.random.Generator) -> str:
    return str(rng.choice([choice for choice in choices if choice != current]))


def _styled(prompt: str, rng: np.random.Generator) -> str:
    """`prompt` as people write them, plain in half of the cases."""
    return prompt if rng.random() < 0.5 else str(rng.choice(STYLES)).format(prompt)


def conversations(sample: Sample, rng: np.random.Generator) -> list[Conversation]:
    """One conversation per aspect; none about correspondence where the contents cannot be made out."""
    about = correspondence(sample, rng)
    # The prompt stands in front of every question, except where an image has none.
    prompt = None if rng.random() < 0.25 else about.prompt
    made = [
        Conversation(Aspect.QUALITY, prompt, describe_quality(sample.degradations), sample.quality),
        Conversation(Aspect.AUTHENTICITY, prompt, describe_authenticity(sample.artefacts), sample.authenticity),
    ]
    return [*made, about] if sample.readable else made


@dataclass(frozen=True)
class Encoded:
    """Token ids of a conversation.

    Attributes:
        targets: whether the token is the assistant's, and so one to learn.
        described_at, rating_at: the positions where the two answers begin.
    """

    ids: list[int]
    targets: list[bool]
    described_at: int
    rating_at: int


class Encoder:
    """Turns conversations into token ids, the image placeholder expanded as the processor does it."""

    def __init__(self, processor: Any) -> None:
        self.builder = PromptBuilder(processor.tokenizer, image_token=processor.image_token)
        expansion = processor.replace_image_token({"rows": [[0]], "cols": [[0]]}, 0)
        self.pad_id: int = processor.tokenizer.pad_token_id
        self.image_ids: list[int] = processor.tokenizer(expansion, add_special_tokens=False)["input_ids"]

    def opening(self, conversation: Conversation) -> Encoded:
        """The conversation up to where the description begins."""
        asked = questions(conversation.aspect, conversation.prompt, "v1")
        ids = self.expand(self.builder.first_round(asked))
        return Encoded(ids, [False] * len(ids), len(ids), len(ids))

    def expand(self, ids: list[int]) -> list[int]:
        """`ids` with the one image placeholder replaced by the image's tokens."""
        at = ids.index(self.builder.image_token_id)
        return ids[:at] + self.image_ids + ids[at + 1 :]

    def encode(self, conversation: Conversation, said: list[int] | None = None) -> Encoded:
        """The whole conversation, answers included.

        Args:
            said: a description of the model's own in place of the right one; it is not to be learnt then.
        """
        asked = questions(conversation.aspect, conversation.prompt, "v1")
        first = self.expand(self.builder.first_round(asked))
        described = self.builder.answer(conversation.description) if said is None else said
        second = self.builder.second_round(asked)
        rated = self.builder.answer(conversation.word)
        end = self.builder.end_of_answer
        targets = (
            [False] * len(first)
            + [said is None] * (len(described) + 1)  # with the end of turn, which opens the second round
            + [False] * (len(second) - 1)
            + [True] * (len(rated) + 1)
            + [False] * (len(end) - 1)
        )
        before = len(first) + len(described) + len(second)
        return Encoded(first + described + second + rated + end, targets, len(first), before)
