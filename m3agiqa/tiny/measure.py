"""What the trained model can do, measured on pictures it has not seen, in two rounds as an engine asks it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import Idefics3ForConditionalGeneration

from m3agiqa.aspects import RATING_WORDS, Aspect, expected_score, word_of_score
from m3agiqa.conversation import questions
from m3agiqa.tiny.examples import Conversation, Encoder, conversations
from m3agiqa.tiny.samples import Sample
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


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; ties take their mean rank."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[where]


def measure(
    model: Idefics3ForConditionalGeneration, encoder: Encoder, samples: Sequence[Sample], seed: int
) -> dict[str, dict[str, float]]:
    """Per aspect: rank correlation of the expected score, and how often rating word and description are right."""
    rng = np.random.default_rng([seed, 99])
    pairs = [(s, c) for s in samples for c in conversations(s, rng) if c.score is not None]
    answers = ask(model, encoder, [s.pixels for s, _ in pairs], [c for _, c in pairs])
    results: dict[str, dict[str, float]] = {}
    for aspect in Aspect:
        chosen = [(c, a) for (_, c), a in zip(pairs, answers, strict=True) if c.aspect is aspect]
        truth = [c.score or 0.0 for c, _ in chosen]
        if len(set(truth)) < 2:
            continue  # nothing to rank: no prompt fits a photograph
        words = [word_of_score(t) for t in truth]
        results[str(aspect)] = {
            "images": len(chosen),
            "srcc": round(spearman([a.score for _, a in chosen], truth), 3),
            "word_accuracy": _share([a.word == w for (_, a), w in zip(chosen, words, strict=True)]),
            "majority_word_accuracy": round(max(words.count(w) for w in RATING_WORDS) / len(words), 3),
            "description_exact": _share([a.description == c.description for c, a in chosen]),
        }
        if aspect is Aspect.CORRESPONDENCE:
            captions = [a.description.split(".")[0] == c.description.split(".")[0] for c, a in chosen]
            results[str(aspect)]["caption_exact"] = _share(captions)
    return results


def _share(hits: Sequence[bool]) -> float:
    return round(sum(hits) / max(len(hits), 1), 3)
