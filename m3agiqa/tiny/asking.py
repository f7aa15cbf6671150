"""Puts both rounds to the model by transformers alone, in batches: what the training and its tests ask with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Idefics3ForConditionalGeneration

from m3agiqa.aspects import RATING_WORDS, expected_score
from m3agiqa.conversation import questions
from m3agiqa.tiny.examples import Conversation, Encoder
from m3agiqa.tiny.vision import pixel_values

_MOST_TOKENS = 64


@dataclass(frozen=True)
class Answer:
    """What the model said in both rounds."""

    description: str
    word: str
    score: float


@torch.no_grad()
def ask(
    model: Idefics3ForConditionalGeneration,
    encoder: Encoder,
    pixels: Sequence[Any],
    asked: Sequence[Conversation],
    batch: int = 48,
) -> list[Answer]:
    """Puts both questions of each conversation to the model; its own description stands before the second."""
    answers: list[Answer] = []
    for start in range(0, len(asked), batch):
        chunk = slice(start, start + batch)
        answers += _ask_batch(model, encoder, pixels[chunk], asked[chunk])
    return answers


def _ask_batch(model: Any, encoder: Encoder, pixels: Sequence[Any], asked: Sequence[Conversation]) -> list[Answer]:
    builder = encoder.builder
    described = describe(model, encoder, pixels, asked)
    rounds = [questions(c.aspect, c.prompt, "v1") for c in asked]
    second = [
        encoder.expand(builder.first_round(q)) + d + builder.second_round(q)
        for q, d in zip(rounds, described, strict=True)
    ]
    ids, mask = _left_padded(second, encoder.pad_id)
    images = pixel_values(pixels)[:, None]
    logits = model(input_ids=ids, attention_mask=mask, pixel_values=images, logits_to_keep=1).logits[:, -1].float()
    chances = logits[:, [rating[0] for rating in builder.rating_ids]].softmax(-1)
    return [
        Answer(builder.decode(d), RATING_WORDS[int(p.argmax())], expected_score(p.tolist()))
        for d, p in zip(described, chances, strict=True)
    ]


@torch.no_grad()
def describe(model: Any, encoder: Encoder, pixels: Sequence[Any], asked: Sequence[Conversation]) -> list[list[int]]:
    """Token ids of the greedy descriptions of one batch, without their end."""
    first = [encoder.expand(encoder.builder.first_round(questions(c.aspect, c.prompt, "v1"))) for c in asked]
    ids, mask = _left_padded(first, encoder.pad_id)
    images = pixel_values(pixels)[:, None]
    generated = model.generate(
        input_ids=ids, attention_mask=mask, pixel_values=images, max_new_tokens=_MOST_TOKENS, do_sample=False
    )
    stops = {*encoder.builder.stop_ids, encoder.pad_id}
    return [_until(tokens, stops) for tokens in generated[:, ids.shape[1] :].tolist()]


def _left_padded(rows: Sequence[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _until(tokens: list[int], stops: set[int]) -> list[int]:
    for i, token in enumerate(tokens):
        if token in stops:
            return tokens[:i]
    return tokens
