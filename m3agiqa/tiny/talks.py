"""Batches of conversations, and the model's states over them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from m3agiqa.aspects import RATING_LEVELS
from m3agiqa.tiny.examples import Conversation, Encoded, conversations
from m3agiqa.tiny.facts import Facts

NAN = float("nan")

Talk = tuple[int, Conversation]
"""The number of an image in its batch, and a conversation about it."""


@dataclass(frozen=True)
class Batch:
    """Conversations about a few images, padded on the right.

    Attributes:
        image_of: which image each conversation is about.
        learn: the positions whose *next* token is the assistant's.
        rating_at: where the rating words stand.
        score: the truth; NaN where it is not known.
    """

    ids: Tensor
    image_of: Tensor
    learn: Tensor
    rating_at: Tensor
    score: Tensor


def choose(facts: Sequence[Facts], rng: np.random.Generator) -> list[Talk]:
    """One conversation per picture, by chance on any of the aspects that it can be asked about.

    Every second one about a scene is on correspondence, which asks for most: to find, to see and to compare.
    """
    talks: list[Talk] = []
    for i, known in enumerate(facts):
        made = conversations(known, rng)
        compared = known.scene and known.readable and rng.random() < 0.5
        talks.append((i, made[-1] if compared else made[int(rng.integers(len(made)))]))
    return talks


def collate(talks: Sequence[Talk], encoded: Sequence[Encoded], pad: int) -> Batch:
    """One batch of `talks`."""
    ids, learn = padded([e.ids for e in encoded], [e.targets for e in encoded], pad)
    return Batch(
        ids=ids,
        image_of=torch.tensor([i for i, _ in talks]),
        learn=learn,
        rating_at=torch.tensor([e.rating_at for e in encoded]),
        score=torch.tensor([NAN if c.score is None else c.score for _, c in talks]),
    )


def padded(rows: Sequence[list[int]], targets: Sequence[list[bool]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids padded on the right, and the positions whose next token is a target."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    learn = torch.tensor([row[1:] + [False] * (longest - len(row) + 1) for row in targets])
    return ids, learn


def states_of(model: Any, ids: Tensor, tokens: Tensor | None = None) -> Tensor:
    """The language side's last states, [n, length, width].

    Args:
        ids: padded on the right, so that no mask is needed: nothing attends to what comes after it.
        tokens: what stands in the place of each row's image tokens, [n, tokens, width].
    """
    embedded = model.get_input_embeddings()(ids)
    if tokens is not None:
        places = (ids == model.config.image_token_id)[..., None]
        embedded = embedded.masked_scatter(places, tokens.to(embedded.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        last: Tensor = model.model.text_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    return last.float()


def word_loss(model: Any, ids: Tensor, learn: Tensor, last: Tensor) -> Tensor:
    """Cross-entropy of the tokens to learn."""
    return F.cross_entropy(model.lm_head(last[learn]).float(), ids.roll(-1, 1)[learn])


def rating_losses(model: Any, batch: Batch, last: Tensor, rating_ids: Tensor) -> dict[str, Tensor]:
    """Cross-entropy of the rating words, and the squared error of the expected score."""
    rows = torch.arange(len(batch.ids))
    rating = model.lm_head(last[rows, batch.rating_at - 1]).float()
    expected = rating[:, rating_ids].softmax(-1) @ torch.tensor(RATING_LEVELS)
    known = ~batch.score.isnan()
    return {
        "rating": 0.4 * F.cross_entropy(rating, batch.ids[rows, batch.rating_at]),
        "score": 0.2 * F.mse_loss(expected[known], batch.score[known]),
    }
