"""Stage 2: conversations. The loss is on the assistant's tokens only."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Idefics3ForConditionalGeneration

from m3agiqa.aspects import RATING_LEVELS
from m3agiqa.tiny.examples import Conversation, Encoded, Encoder, conversations
from m3agiqa.tiny.measure import describe
from m3agiqa.tiny.samples import Sample
from m3agiqa.tiny.vision import pixel_values, see, warm_cosine

OWN_SHARE, OWN_FROM = 0.5, 0.7
"""In the last three tenths of the steps, half of the conversations hold the model's own description."""

_RATING_WEIGHT = 2.0
"""How much the rating word counts against a whole description."""


@dataclass(frozen=True)
class Batch:
    """Conversations of one batch of images, padded on the right.

    Attributes:
        image_of: which image each conversation is about.
        learn: the positions whose *next* token is the assistant's.
        score: the true scores; NaN where the truth is not known.
    """

    images: Tensor
    ids: Tensor
    mask: Tensor
    image_of: Tensor
    learn: Tensor
    rating_at: Tensor
    score: Tensor


def collate(
    samples: Sequence[Sample], talks: Sequence[tuple[int, Conversation]], encoded: Sequence[Encoded], pad: int
) -> Batch:
    """One batch of conversations about `samples`; each is given with the index of its sample."""
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
        rating_at=torch.tensor([e.rating_at for e in encoded]),
        score=torch.tensor([float("nan") if c.score is None else c.score for _, c in talks]),
    )


def choose(samples: Sequence[Sample], rng: np.random.Generator) -> list[tuple[int, Conversation]]:
    """Two conversations per sample: on correspondence, the hardest, wherever it can be, and one of the others."""
    talks: list[tuple[int, Conversation]] = []
    for i, sample in enumerate(samples):
        *damage, about = conversations(sample, rng) if sample.readable else [*conversations(sample, rng), None]
        talks.append((i, damage[int(rng.integers(len(damage)))]))
        talks += [(i, about)] if about else []
    return talks


def hidden_states(model: Idefics3ForConditionalGeneration, batch: Batch) -> Tensor:
    """The last hidden states of every position; each image is looked at once, however many conversations it has."""
    _, tokens = see(model, batch.images)
    embedded = model.get_input_embeddings()(batch.ids)
    places = (batch.ids == model.config.image_token_id)[..., None]
    merged = embedded.masked_scatter(places, tokens[batch.image_of].to(embedded.dtype))
    return model.model.text_model(inputs_embeds=merged, attention_mask=batch.mask, use_cache=False).last_hidden_state


def loss_of(
    model: Idefics3ForConditionalGeneration, batch: Batch, rating_ids: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of the answers, that of the rating words apart, and the squared error of the expected score."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = hidden_states(model, batch)
        logits = model.lm_head(states[batch.learn])
        rows = torch.arange(len(batch.ids))
        rating = model.lm_head(states[rows, batch.rating_at - 1]).float()
    target = batch.ids.roll(-1, 1)[batch.learn]
    words = F.cross_entropy(logits.float(), target)
    rated = F.cross_entropy(rating, batch.ids[rows, batch.rating_at])
    expected = rating[:, rating_ids].softmax(-1) @ torch.tensor(RATING_LEVELS)
    known = ~batch.score.isnan()
    error = F.mse_loss(expected[known], batch.score[known])
    total = words + _RATING_WEIGHT * (0.2 * rated + 0.1 * error)
    return total, {"words": words.item(), "rating": rated.item(), "score mse": error.item()}


class Teacher:
    """Makes the batches of stage 2.

    Args:
        own: the share of conversations in which the model's own description stands before the second
            question, so that it learns to rate by what it sees rather than by what it happened to say.
    """

    def __init__(self, model: Idefics3ForConditionalGeneration, encoder: Encoder, rng: np.random.Generator) -> None:
        self.model, self.encoder, self.rng = model, encoder, rng

    def batch(self, samples: Sequence[Sample], own: float) -> Batch:
        """A batch of two conversations per sample."""
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


def train_language(
    model: Idefics3ForConditionalGeneration,
    encoder: Encoder,
    draw: Callable[[int], list[Sample]],
    *,
    steps: int,
    batch: int,
    rate: float,
    eye_rate: float,
    rng: np.random.Generator,
    log: Callable[[str], None],
) -> None:
    """Trains the whole model on conversations; the eye at a lower rate than the rest."""
    eye = [*model.model.vision_model.parameters()]
    rest = [*model.model.connector.parameters(), *model.model.text_model.parameters(), *model.lm_head.parameters()]
    groups = [{"params": eye, "lr": eye_rate}, {"params": rest, "lr": rate}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine(steps))
    rating_ids = torch.tensor([ids[0] for ids in encoder.builder.rating_ids])
    teacher = Teacher(model, encoder, rng)
    model.train()
    for step in range(steps):
        own = OWN_SHARE if step >= OWN_FROM * steps else 0.0
        loss, parts = loss_of(model, teacher.batch(draw(batch), own), rating_ids)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*eye, *rest], 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            log(f"language {step}/{steps} " + " ".join(f"{k} {v:.3f}" for k, v in parts.items()))
    model.eval()
