"""Baselines that look at no image: what the generator's name, the prompt and other human scores give away.

They are fitted on the training part. Where there is none, five folds of the evaluated rows stand in for it: each
fold is predicted from the other four.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import csr_array
from scipy.sparse.linalg import lsqr

from m3agiqa.evaluation.draws import Ints
from m3agiqa.evaluation.groups import Grouping
from m3agiqa.evaluation.metrics import Floats

FOLDS = 5
# Pseudo-rows that pull each effect of the additive model towards nought: a prompt seen once says little.
_RIDGE = 1.0


@dataclass(frozen=True)
class Facts:
    """What is known of rows beside their images; codes mean the same in all rows that were taken from one `Facts`.

    Attributes:
        generators, prompts: [n]. lengths: of the prompts in characters [n], NaN where not known.
        folds: [n]. labels: [n], human scores.
    """

    generators: Grouping
    prompts: Grouping
    lengths: Floats
    folds: Ints
    labels: Floats

    @classmethod
    def of(cls, ids: Sequence[str], generators: pa.Array, prompts: pa.Array, labels: Floats) -> "Facts":
        """From text [n], None where not known."""
        lengths = pc.utf8_length(pa.array(prompts, pa.string())).cast(pa.float64())
        known = np.array(pc.fill_null(lengths, np.nan), np.float64)
        return cls(Grouping.of(generators), Grouping.of(prompts), known, folds_of(ids), labels)

    def take(self, rows: Ints) -> "Facts":
        """Some rows."""
        generators, prompts = self.generators.take(rows), self.prompts.take(rows)
        return Facts(generators, prompts, self.lengths[rows], self.folds[rows], self.labels[rows])


Fit = Callable[[Facts, Facts], Floats | None]
"""From facts to learn from and facts to predict [n]: predictions [n], or None where they lack what it needs."""


def predict(rows: Facts, train: Facts | None) -> dict[str, Floats]:
    """The predictions [n] of every baseline that has what it needs, by its name."""
    found = {}
    for name, fit in BASELINES.items():
        if (scores := fit(train, rows) if train is not None else _crossed(fit, rows)) is not None:
            found[name] = scores
    return found


def majority(words: Ints, train_words: Ints | None) -> Ints:
    """The most frequent word of the training part, or of the rows [n] themselves, for every row: [n]."""
    counts = np.bincount(words if train_words is None else train_words, minlength=5)
    return np.full(len(words), int(counts.argmax()), np.int64)


def folds_of(ids: Sequence[str], folds: int = FOLDS) -> Ints:
    """A fold [n] for each id, by its hash alone: it does not depend on the order or on other rows."""
    return np.array([int(hashlib.sha256(one.encode()).hexdigest()[:8], 16) % folds for one in ids], np.int64)


def _crossed(fit: Fit, rows: Facts) -> Floats | None:
    found = np.empty(len(rows.labels))
    for fold in np.unique(rows.folds).tolist():
        own, others = np.flatnonzero(rows.folds == fold), np.flatnonzero(rows.folds != fold)
        scores = fit(rows.take(others), rows.take(own)) if len(others) else None
        if scores is None:
            return None
        found[own] = scores
    return found


def _generator_mean(train: Facts, rows: Facts) -> Floats | None:
    return _means(train.generators, train.labels, rows.generators)


def _prompt_mean(train: Facts, rows: Facts) -> Floats | None:
    return _means(train.prompts, train.labels, rows.prompts)


def _means(groups: Grouping, labels: Floats, wanted: Grouping) -> Floats | None:
    """The mean label of each group; that of all where a group is new."""
    known = groups.codes >= 0
    if not known.any() or not (wanted.codes >= 0).any():
        return None
    counts = np.bincount(groups.codes[known], minlength=len(groups.names))
    sums = np.bincount(groups.codes[known], labels[known], len(groups.names))
    means = np.where(counts > 0, sums / np.maximum(counts, 1), labels.mean())
    return np.where(wanted.codes >= 0, means[wanted.codes], labels.mean())


def _additive(train: Facts, rows: Facts) -> Floats | None:
    """Mean + effect of the generator + effect of the prompt, by ridge regression; a new one has no effect."""
    if any(not (groups.codes >= 0).any() for one in (train, rows) for groups in (one.generators, one.prompts)):
        return None
    overall = float(train.labels.mean())
    # What no training row has keeps the effect that it starts with, nought.
    effects = lsqr(_design(train), train.labels - overall, damp=np.sqrt(_RIDGE), atol=1e-10, btol=1e-10)[0]
    return overall + _design(rows) @ effects


def _design(facts: Facts) -> csr_array:
    """Which effects each row has: [rows, generators + prompts] of 0 and 1."""
    first = len(facts.generators.names)
    codes = np.stack([facts.generators.codes, np.where(facts.prompts.codes >= 0, facts.prompts.codes + first, -1)], 1)
    at, which = np.nonzero(codes >= 0)
    shape = (len(codes), first + len(facts.prompts.names))
    return csr_array((np.ones(len(at)), (at, codes[at, which])), shape=shape)


def _prompt_length(train: Facts, rows: Facts) -> Floats | None:
    """A straight line through the lengths of the prompts in characters."""
    known = np.isfinite(train.lengths)
    if not known.any() or not np.isfinite(rows.lengths).any():
        return None
    lengths, overall = train.lengths[known], float(train.labels.mean())
    if lengths.min() == lengths.max():
        return np.full(len(rows.labels), overall)
    slope, offset = np.polyfit(lengths, train.labels[known], 1)
    return np.where(np.isfinite(rows.lengths), offset + slope * np.nan_to_num(rows.lengths), overall)


BASELINES: dict[str, Fit] = {
    "generator mean": _generator_mean,
    "prompt mean": _prompt_mean,
    "generator + prompt": _additive,
    "prompt length": _prompt_length,
}
