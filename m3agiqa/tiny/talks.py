"""Batches of conversations, and the model's states over them."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m3agiqa.tiny.examples import Conversation, Encoded, Encoder, conversations
from m3agiqa.tiny.measure import describe
from m3agiqa.tiny.samples import Sample
from m3agiqa.tiny.vision import pixel_values

NAN = float("nan")


@dataclass(frozen=True)
class Batch:
    """Conversations about a few images, padded on the right.

    Attributes:
        image_of: which image each conversation is about.
        learn: the positions whose *next* token is the assistant's.
        described_at, rating_at: where the answers begin.
        score, matches: the truth; NaN where it is not known.
    """

    images: Tensor
    ids: Tensor
    mask: Tensor
    image_of: Tensor
    learn: Tensor
    described_at: Tensor
    rating_at: Tensor
    score: Tensor
    matches: Tensor


Talk = tuple[int, Conversation]
"""The number of an image in its batch, and a conversation about it."""


def choose(samples: Sequence[Sample], rng: np.random.Generator) -> list[Talk]:
    """Two conversations per sample: on correspondence, the hardest, wherever it can be, and one of the others."""
    talks: list[Talk] = []
    for i, sample in enumerate(samples):
        quality, authenticity, *about = conversations(sample, rng)
        talks.append((i, quality if rng.random() < 0.5 else authenticity))
        talks += [(i, conversation) for conversation in about]
    return talks


def collate(samples: Sequence[Sample], talks: Sequence[Talk], encoded: Sequence[Encoded], pad: int) -> Batch:
    """One batch of `talks` about `samples`."""
    longest = max(len(e.ids) for e in encoded)
    ids = torch.full((len(encoded), longest), pad)
    learn = torch.zeros((len(encoded), longest), dtype=torch.bool)
    mask = torch.zeros((len(encoded), longest), dtype=torch.long)
    for row, talk in enumerate(encoded):
        length = len(talk.ids)
        ids[row, :length] = torch.tensor(talk.ids)
        mask[row, :length] = 1
        learn[row, : length - 1] = torch.tensor(talk.targets[1:])
    return Batch(
        images=pixel_values([s.pixels for s in samples]),
        ids=ids,
        mask=mask,
        image_of=torch.tensor([i for i, _ in talks]),
        learn=learn,
        described_at=torch.tensor([e.described_at for e in encoded]),
        rating_at=torch.tensor([e.rating_at for e in encoded]),
        score=torch.tensor([NAN if c.score is None else c.score for _, c in talks]),
        matches=torch.tensor([[NAN] * 4 if c.match is None else list(astuple(c.match)) for _, c in talks]),
    )


@dataclass(frozen=True)
class States:
    """What the model makes of a batch: the eye's patches and tokens, the language side's inner and last states."""

    patches: Tensor
    tokens: Tensor
    inner: Tensor
    last: Tensor


def states_of(model: Any, batch: Batch) -> States:
    """Runs the model; each image is looked at once, however many conversations it has.

    The inner states are those before the last layer: what is in them, later tokens can still attend to.
    """
    seen = model.model.get_image_features(batch.images[:, None])
    tokens = seen.pooler_output
    embedded = model.get_input_embeddings()(batch.ids)
    places = (batch.ids == model.config.image_token_id)[..., None]
    merged = embedded.masked_scatter(places, tokens[batch.image_of].to(embedded.dtype))
    out = model.model.text_model(
        inputs_embeds=merged, attention_mask=batch.mask, use_cache=False, output_hidden_states=True
    )
    return States(seen.last_hidden_state, tokens, out.hidden_states[-2], out.last_hidden_state)


class Teacher:
    """Makes the batches of the training."""

    def __init__(self, model: Any, encoder: Encoder, rng: np.random.Generator) -> None:
        self.model, self.encoder, self.rng = model, encoder, rng

    def openings(self, samples: Sequence[Sample]) -> Batch:
        """Conversations up to where the description begins."""
        talks = choose(samples, self.rng)
        return collate(samples, talks, [self.encoder.opening(c) for _, c in talks], self.encoder.pad_id)

    def conversations(self, samples: Sequence[Sample], own: float) -> Batch:
        """Whole conversations.

        Args:
            own: in this share of them the model's own description stands before the second question, so
                that it learns to rate by what it sees and not only by what was said.
        """
        talks = choose(samples, self.rng)
        said: list[list[int] | None] = [None] * len(talks)
        chosen = [i for i in range(len(talks)) if self.rng.random() < own]
        if chosen:
            self.model.eval()
            pixels = [samples[talks[i][0]].pixels for i in chosen]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                answers = describe(self.model, self.encoder, pixels, [talks[i][1] for i in chosen])
            for i, answer in zip(chosen, answers, strict=True):
                said[i] = answer
            self.model.train()
        encoded = [self.encoder.encode(c, s) for (_, c), s in zip(talks, said, strict=True)]
        return collate(samples, talks, encoded, self.encoder.pad_id)
