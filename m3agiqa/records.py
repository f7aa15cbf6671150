"""The rows that are written: names, types and meaning of every column of a scores file."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from m3agiqa.aspects import RATING_WORDS, Aspect, expected_score

if TYPE_CHECKING:
    import torch


class Status(StrEnum):
    """How a row ended."""

    OK = "ok"
    """Every aspect that can be judged was; an aspect that needs a prompt is null where there is none."""
    REJECTED = "rejected"
    """The input is bad (`error` says what): scoring it again gives the same."""
    FAILED = "failed"
    """The system failed (`error` says how): scoring it again may succeed."""


@dataclass(frozen=True)
class Captured:
    """What was kept of the conversation [image, question 1, description, question 2], `tokens` positions.

    Attributes:
        values: [tokens, hidden] last hidden states after the final norm, or logits [tokens, vocabulary or k].
        ids: [tokens, k] the tokens that top-k logits belong to; None for the other kinds.
    """

    values: "torch.Tensor"
    ids: "torch.Tensor | None" = None


@dataclass(frozen=True)
class Assessment:
    """What an engine says of one aspect of one image.

    Attributes:
        description: the answer of round 1, in words.
        rating: the rating word in the answer of round 2, or None where it holds none.
        rating_answer: the answer of round 2 as it came.
        rating_probs: softmax over the five rating words, *bad* to *excellent*, of the log-probability
            that the answer of round 2 begins with that word; a word of several tokens counts all of
            them. None where the engine cannot tell.
        prompt_tokens: tokens of the second round's prompt, image and description included.
        generated_tokens: tokens that both rounds generated, their end tokens not counted.
        finish_reason: `stop`; `length` where the description was cut at its limit; `given` where it is not the
            model's own but came with the item.
        captured: what the engine kept of the second round's prompt for a predictor, if it was asked to; written
            only into a training set (`STATES_COLUMNS`).
        bounds: the place in the second round's prompt where the description begins, and where it ends; None where
            an engine cannot tell.
        rating_cut: whether the answer of round 2 was cut at its limit; `finish_reason` is the description's.
        note: what was done to the image or the conversation to be able to ask, for the row's `error`.
    """

    description: str
    rating: str | None
    rating_answer: str
    rating_probs: tuple[float, ...] | None
    prompt_tokens: int
    generated_tokens: int
    finish_reason: str
    captured: "Captured | None" = None
    bounds: tuple[int, int] | None = None
    rating_cut: bool = False
    note: str | None = None


@dataclass(frozen=True)
class Opinion:
    """What a predictor says of one aspect of one image: a mean opinion score and its interval, 0 to 5.

    The interval is None where the predictor is not calibrated for the aspect; the score where it gives none.
    """

    mos: float | None
    low: float | None
    high: float | None


# Suffix -> (Arrow type, meaning). Each aspect has one column `{aspect}_{suffix}` of each.
ASPECT_COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "description": (pa.string(), "What the model says about the aspect (round 1)"),
    "rating": (pa.string(), f"One of {', '.join(RATING_WORDS)} (round 2); null where the answer holds none of them"),
    "rating_probs": (pa.list_(pa.float32()), "Five probabilities of the rating words, bad to excellent; they sum to 1"),
    "rating_score": (pa.float32(), "Expected value of rating_probs, 0 to 5, the words at 0, 1.25, 2.5, 3.75 and 5"),
    "mos": (pa.float32(), "The predictor's mean opinion score, 0 to 5; null without a predictor"),
    "mos_low": (pa.float32(), "Lower end of the predictor's interval, 0 to 5; null without a predictor"),
    "mos_high": (pa.float32(), "Upper end of the predictor's interval, 0 to 5; null without a predictor"),
    "finish_reason": (pa.string(), "stop: the description is whole; length: cut at its limit; given: by the corpus"),
}

# The same, of a training set only: the states of `Captured` as they are, one number after the other.
STATES_COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "states": (pa.large_binary(), "Last hidden states after the final norm: bfloat16, C order, [tokens, hidden]"),
    "tokens": (pa.int32(), "Tokens of [image, question 1, description, question 2]: the first extent of the states"),
    "asked_tokens": (pa.int32(), "Of these, [image, question 1]; null where that is not known"),
    "described_tokens": (pa.int32(), "Of these, [image, question 1, description]; null where that is not known"),
}

ROW_COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "status": (pa.string(), "ok, rejected (the input is bad) or failed (the system failed)"),
    "error": (pa.string(), "Why a row is not ok, or what an ok row lacks or had done to it; else null"),
    "width": (pa.int32(), "Width of the image in pixels, upright; null where it could not be read"),
    "height": (pa.int32(), "Height of the image in pixels, upright; null where it could not be read"),
    "image_sha256": (pa.string(), "SHA-256 of the image file; null where it could not be read"),
    "prompt_tokens": (pa.int32(), "Tokens of the second-round prompts, over the aspects"),
    "generated_tokens": (pa.int32(), "Tokens that were generated, over the aspects and rounds"),
    "fingerprint": (pa.string(), "Identifies everything that decides a score; rows are comparable where it is equal"),
}

INPUT_COLUMNS = ("id", "image", "prompt", "generator")
"""Columns of the corpus that a scores file begins with."""

RESERVED_COLUMNS = frozenset(ROW_COLUMNS) | {f"{a}_{s}" for a in Aspect for s in (*ASPECT_COLUMNS, *STATES_COLUMNS)}
"""Names that an input may not use for columns of its own."""


def scores_schema(corpus: pa.Schema, states: Collection[Aspect] = ()) -> pa.Schema:
    """The one schema of a scores file: the corpus's columns that are not internal, then ours.

    Columns whose name begins with an underscore are internal: they carry the image to the engine.
    Every aspect has its columns, whether a run judges it or not, so that all files fit together;
    those of states are only of the aspects in `states`.
    """
    fields = [f for f in corpus if not f.name.startswith("_")]
    for aspect in Aspect:
        columns = ASPECT_COLUMNS | (STATES_COLUMNS if aspect in states else {})
        fields += [
            pa.field(f"{aspect}_{suffix}", kind, metadata={"description": doc})
            for suffix, (kind, doc) in columns.items()
        ]
    fields += [pa.field(name, kind, metadata={"description": doc}) for name, (kind, doc) in ROW_COLUMNS.items()]
    return pa.schema(fields)


@dataclass
class ScoredRow:
    """What scoring adds to one row of the corpus. Whatever is not set is null in the file."""

    status: Status = Status.OK
    error: str | None = None
    width: int | None = None
    height: int | None = None
    image_sha256: str | None = None
    assessments: Mapping[Aspect, Assessment] = field(default_factory=dict)
    opinions: Mapping[Aspect, Opinion] = field(default_factory=dict)

    def columns(self, fingerprint: str, states: Collection[Aspect] = ()) -> dict[str, Any]:
        """Column name -> value, for every column that scoring adds; states of the aspects in `states`."""
        values: dict[str, Any] = dict.fromkeys(RESERVED_COLUMNS)
        for aspect, found in self.assessments.items():
            values |= {f"{aspect}_{suffix}": value for suffix, value in _aspect_values(found).items()}
            if aspect in states and found.captured is not None:
                values[f"{aspect}_states"] = states_to_bytes(found.captured.values)
                values[f"{aspect}_tokens"] = len(found.captured.values)
                if found.bounds is not None:
                    values[f"{aspect}_asked_tokens"], values[f"{aspect}_described_tokens"] = found.bounds
        for aspect, opinion in self.opinions.items():
            values |= {
                f"{aspect}_mos": opinion.mos,
                f"{aspect}_mos_low": opinion.low,
                f"{aspect}_mos_high": opinion.high,
            }
        values |= {
            "status": str(self.status),
            "error": self.error,
            "width": self.width,
            "height": self.height,
            "image_sha256": self.image_sha256,
            "fingerprint": fingerprint,
        }
        if self.assessments:
            values["prompt_tokens"] = sum(a.prompt_tokens for a in self.assessments.values())
            values["generated_tokens"] = sum(a.generated_tokens for a in self.assessments.values())
        return values


def _aspect_values(found: Assessment) -> dict[str, Any]:
    return {
        "description": found.description,
        "rating": found.rating,
        "rating_probs": None if found.rating_probs is None else list(found.rating_probs),
        "rating_score": None if found.rating_probs is None else expected_score(found.rating_probs),
        "finish_reason": found.finish_reason,
    }


def states_to_bytes(states: "torch.Tensor") -> bytes:
    """States [tokens, hidden] of any float type as they are written: rounded to bfloat16, in C order."""
    import torch

    return states.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint16).numpy().tobytes()


def scores_table(
    corpus_rows: pa.Table, scored: Sequence[ScoredRow], fingerprint: str, states: Collection[Aspect] = ()
) -> pa.Table:
    """Rows of the corpus with their scores, in the same order, in exactly `scores_schema`.

    Raises:
        ValueError: if there is not one scored row for each row of the corpus.
    """
    if len(scored) != corpus_rows.num_rows:
        raise ValueError(f"{corpus_rows.num_rows} rows went in, but {len(scored)} were scored")
    schema = scores_schema(corpus_rows.schema, states)
    added = [row.columns(fingerprint, states) for row in scored]
    arrays = [
        pa.array([row[f.name] for row in added], f.type) if f.name in RESERVED_COLUMNS else corpus_rows.column(f.name)
        for f in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)
