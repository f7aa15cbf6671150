"""Token ids of a conversation, which of them are to be learnt, and batches.

The ids are those of `PromptBuilder`, which every engine asks with: what is trained is to the token what is scored.

Shapes: B conversations, T tokens of the longest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from m3agiqa.aspects import RATING_LEVELS, RATING_WORDS
from m3agiqa.conversation import questions
from m3agiqa.engine.prompting import PromptBuilder
from m3agiqa.errors import UserError
from m3agiqa.finetuning.pictures import Prepared
from m3agiqa.finetuning.talks import Talk


@dataclass(frozen=True)
class Encoded:
    """One conversation.

    Attributes:
        ids: token ids; the image is one placeholder until `expand`.
        weights: of each token, how much learning it counts: 0 for what is not the assistant's.
        rating_at: where the rating begins.
    """

    ids: np.ndarray
    weights: np.ndarray
    rating_at: int

    def expand(self, image: np.ndarray, image_token_id: int) -> "Encoded":
        """The same with the image's tokens in place of its placeholder."""
        at = int(np.flatnonzero(self.ids == image_token_id)[0])
        nothing = np.zeros(len(image), self.weights.dtype)
        return Encoded(
            np.concatenate([self.ids[:at], image, self.ids[at + 1 :]]),
            np.concatenate([self.weights[:at], nothing, self.weights[at + 1 :]]),
            self.rating_at + len(image) - 1,
        )


class Encoder:
    """Makes token ids of conversations.

    Args:
        version: of the questions. rating: how much a token of the rating counts.

    Raises:
        UserError: if the tokenizer begins two rating words with the same token.
    """

    def __init__(self, builder: PromptBuilder, version: str, rating: float = 1.0) -> None:
        self.builder, self._version, self._rating = builder, version, rating
        self.word_ids = [ids[0] for ids in builder.rating_ids]
        """The token that each rating word begins with."""
        if len(set(self.word_ids)) < len(RATING_WORDS):
            rule = "its tokenizer begins two of the rating words with the same token"
            raise UserError("model.path", rule, "take a model whose tokenizer has the five words")

    def encode(self, talk: Talk) -> Encoded:
        """Both rounds, answers included; each answer with the token that ends it."""
        asked = questions(talk.aspect, talk.prompt, self._version)
        first, second = self.builder.first_round(asked), self.builder.second_round(asked)
        described, rated = self.builder.answer(talk.description), self.builder.answer(talk.word)
        end = self.builder.end_of_answer
        weights = (
            [0.0] * len(first)
            + [1.0] * (len(described) + 1)  # with the end of the turn, which opens the second round
            + [0.0] * (len(second) - 1)
            + [self._rating] * len(rated)
            + [1.0] * min(len(end), 1)
            + [0.0] * (len(end) - 1)
        )
        ids = np.asarray(first + described + second + rated + end, np.int32)
        return Encoded(ids, np.asarray(weights, np.float32), len(first) + len(described) + len(second))


@dataclass(frozen=True)
class Batch:
    """Conversations, padded on the right.

    Attributes:
        ids: [B, T]. mask: [B, T], 1 for what is no padding.
        weights: [B, T], how much *predicting* the token at a place counts.
        rating_at: [B], where the ratings begin. words: [B], the number of the rating word.
        scores: [B], the human score or that of the word, on the scale of 0 to 5.
        image_of: [B], which of the images each is about; empty without images.
        images: each image once.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    weights: torch.Tensor
    rating_at: torch.Tensor
    words: torch.Tensor
    scores: torch.Tensor
    image_of: list[int]
    images: list[Prepared]

    def to(self, device: torch.device) -> "Batch":
        """The same with its token ids on a device; images go there when they are looked at."""
        moved: dict[str, Any] = {
            f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **moved)

    def silenced(self) -> "Batch":
        """The same with nothing to learn: for a worker that has to take part in a step and has no data for it."""
        return replace(self, weights=torch.zeros_like(self.weights))


def collate(talks: Sequence[Talk], encoded: Sequence[Encoded], pictures: dict[int, Prepared], pad: int) -> Batch:
    """One batch of conversations, their images' tokens put in.

    Args:
        pictures: by `Talk.picture`; empty in a training of text only.
    """
    width = max(len(one.ids) for one in encoded)
    ids = np.full((len(encoded), width), pad, np.int64)
    mask, weights = np.zeros((len(encoded), width), np.int64), np.zeros((len(encoded), width), np.float32)
    for row, one in enumerate(encoded):
        ids[row, : len(one.ids)] = one.ids
        mask[row, : len(one.ids)] = 1
        weights[row, : len(one.ids)] = one.weights
    numbers = {number: i for i, number in enumerate(pictures)}
    words = [RATING_WORDS.index(talk.word) for talk in talks]
    scores = [RATING_LEVELS[w] if t.score is None else t.score for w, t in zip(words, talks, strict=True)]
    return Batch(
        ids=torch.from_numpy(ids),
        mask=torch.from_numpy(mask),
        weights=torch.from_numpy(weights),
        rating_at=torch.tensor([one.rating_at for one in encoded]),
        words=torch.tensor(words),
        scores=torch.tensor(scores, dtype=torch.float32),
        image_of=[numbers[talk.picture] for talk in talks] if pictures else [],
        images=list(pictures.values()),
    )


def pad_id(builder: PromptBuilder) -> int:
    """The token that fills up; it is masked, so that any will do."""
    own: Any = builder.tokenizer.pad_token_id
    return int(builder.stop_ids[0] if own is None else own)
