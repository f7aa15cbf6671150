"""Labelled conversations: what is asked about a sample, what a right answer is, and its token ids.

The questions come from `m3agiqa.conversation` and the ids from `PromptBuilder`, so what the model is
trained on is to the token what an engine asks it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from m3agiqa.aspects import SCALE_MAX, SCALE_MIN, Aspect, word_of_score
from m3agiqa.conversation import questions
from m3agiqa.engine.prompting import PromptBuilder
from m3agiqa.tiny.degrade import Damage
from m3agiqa.tiny.facts import ITEMS, Facts
from m3agiqa.tiny.pictures import Scene, random_scene
from m3agiqa.tiny.prompts import STYLES, foreign_prompt

FAULTS: Mapping[str, str] = MappingProxyType(
    {
        "blur": "blurred",
        "noise": "noisy",
        "compression": "blocky from compression",
        "pixelation": "pixelated",
        "low contrast": "washed out",
        "underexposure": "too dark",
        "overexposure": "too bright",
        "banding": "banded in its colours",
    }
)
"""How a description names each degradation."""

_ADVERBS = ("barely", "slightly", "clearly", "strongly", "extremely")
_SIGNS = {
    "melted": "looks melted",
    "repeated": "repeats the same tile",
    "checkerboard": "shows a checkerboard pattern",
    "scrambled": "is scrambled into square pieces",
    "smeared": "is smeared into streaks",
}
_SIZES = ("tiny", "small", "middling", "large", "huge")
_WEIGHTS = {"count": 0.22, "colour": 0.28, "shape": 0.28, "place": 0.22}
"""What the objects are counts most, and the word follows from the number of items that are met."""


@dataclass(frozen=True)
class Conversation:
    """The right answers of one image and aspect.

    Attributes:
        score: the true score, which decides the rating word; None where the truth is not known.
    """

    aspect: Aspect
    prompt: str | None
    description: str
    score: float | None

    @property
    def word(self) -> str:
        """The rating word; the middle one where the truth is not known."""
        return word_of_score((SCALE_MIN + SCALE_MAX) / 2 if self.score is None else self.score)


def _degree(severity: float, words: tuple[str, ...]) -> str:
    """The word of a fifth of the scale, as the rating words are: one fault alone decides the rating."""
    return words[min(int(severity * len(words)), len(words) - 1)]


def describe_quality(degradations: tuple[Damage, ...]) -> str:
    """Such as "The image is strongly blurred and slightly noisy."; the main fault first."""
    if not degradations:
        return "The image is sharp and clean."
    faults = [f"{_degree(d.severity, _ADVERBS)} {FAULTS[d.kind]}" for d in degradations]
    return f"The image is {' and '.join(faults)}."


def describe_authenticity(artefacts: tuple[Damage, ...]) -> str:
    """Such as "A large area looks melted."."""
    if not artefacts:
        return "Shapes and surfaces look natural."
    return " ".join(f"A {_degree(d.severity, _SIZES)} area {_SIGNS[d.kind]}." for d in artefacts)


def item_word(name: str, value: object) -> str:
    """How an answer names the value of an item: "two", "red", "sphere", and a place by its last word."""
    return ("one", "two", "three")[int(str(value)) - 1] if name == "count" else str(value).split()[-1]


def verdict(asked: str, here: str) -> str:
    """Such as "Asked for red, here blue: different."."""
    return f"Asked for {asked}, here {here}: {'same' if asked == here else 'different'}."


def describe_correspondence(shown: Scene, asked: Scene) -> str:
    """Every item that was asked for beside the one that is shown, and whether they are the same."""
    pairs = [(name, getattr(asked, name), getattr(shown, name)) for name in ITEMS]
    return " ".join(verdict(item_word(name, a), item_word(name, b)) for name, a, b in pairs)


def correspondence_score(shown: Scene, asked: Scene) -> float:
    """The true correspondence score, 0 to 5: the weight of the items that are met."""
    return SCALE_MAX * sum(w for name, w in _WEIGHTS.items() if getattr(shown, name) == getattr(asked, name))


def correspondence(facts: Facts, rng: np.random.Generator) -> Conversation:
    """A prompt that the picture meets, meets in part or does not meet, and what is to be said of it."""
    chance, shown = rng.random(), facts.scene
    foreign = "The prompt asks for something else."
    if shown is None:
        here = "Here is a photograph."
        if chance < 0.5:
            prompt = _styled(random_scene(rng).text, rng)
            return Conversation(Aspect.CORRESPONDENCE, prompt, f"{here} {foreign}", SCALE_MIN)
        unknown = f"{here} Whether the prompt fits cannot be told."
        return Conversation(Aspect.CORRESPONDENCE, foreign_prompt(rng), unknown, None)
    if chance < 0.1:
        return Conversation(Aspect.CORRESPONDENCE, foreign_prompt(rng), foreign, SCALE_MIN)
    asked = altered(shown, 0 if chance < 0.35 else int(rng.integers(1, len(ITEMS) + 1)), rng)
    return Conversation(
        Aspect.CORRESPONDENCE,
        _styled(asked.text, rng),
        describe_correspondence(shown, asked),
        correspondence_score(shown, asked),
    )


def altered(scene: Scene, changes: int, rng: np.random.Generator) -> Scene:
    """`scene` with `changes` of its items made different."""
    items: dict[str, Any] = asdict(scene)
    for name in map(str, rng.permutation(list(ITEMS))[:changes]):
        others = [value for value in ITEMS[name] if value != items[name]]
        items[name] = others[int(rng.integers(len(others)))]
    return Scene(**items)


def _styled(prompt: str, rng: np.random.Generator) -> str:
    """`prompt` as people write them, plain in half of the cases."""
    return prompt if rng.random() < 0.5 else str(rng.choice(STYLES)).format(prompt)


def conversations(facts: Facts, rng: np.random.Generator) -> list[Conversation]:
    """One conversation per aspect; none about correspondence where the contents cannot be made out."""
    about = correspondence(facts, rng)
    # The prompt stands in front of every question, except where an image has none.
    prompt = None if rng.random() < 0.25 else about.prompt
    made = [
        Conversation(Aspect.QUALITY, prompt, describe_quality(facts.degradations), facts.quality),
        Conversation(Aspect.AUTHENTICITY, prompt, describe_authenticity(facts.artefacts), facts.authenticity),
    ]
    return [*made, about] if facts.readable else made


@dataclass(frozen=True)
class Encoded:
    """Token ids of a conversation.

    Attributes:
        targets: whether the token is the assistant's, and so one to learn.
        rating_at: the position of the rating word.
    """

    ids: list[int]
    targets: list[bool]
    rating_at: int


class Encoder:
    """Turns conversations into token ids, the image placeholder expanded as the processor does it."""

    def __init__(self, processor: Any) -> None:
        self.builder = PromptBuilder(processor.tokenizer, image_token=processor.image_token)
        expansion = processor.replace_image_token({"rows": [[0]], "cols": [[0]]}, 0)
        self.pad_id: int = processor.tokenizer.pad_token_id
        self.image_ids: list[int] = processor.tokenizer(expansion, add_special_tokens=False)["input_ids"]

    def expand(self, ids: list[int]) -> list[int]:
        """`ids` with the one image placeholder replaced by the image's tokens."""
        at = ids.index(self.builder.image_token_id)
        return ids[:at] + self.image_ids + ids[at + 1 :]

    def encode(self, conversation: Conversation) -> Encoded:
        """The whole conversation, answers included."""
        asked = questions(conversation.aspect, conversation.prompt, "v1")
        first = self.expand(self.builder.first_round(asked))
        described = self.builder.answer(conversation.description)
        second = self.builder.second_round(asked)
        rated = self.builder.answer(conversation.word)
        end = self.builder.end_of_answer
        targets = (
            [False] * len(first)
            + [True] * (len(described) + 1)  # with the end of turn, which opens the second round
            + [False] * (len(second) - 1)
            + [True] * (len(rated) + 1)
            + [False] * (len(end) - 1)
        )
        return Encoded(first + described + second + rated + end, targets, len(first) + len(described) + len(second))
