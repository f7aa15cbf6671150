"""Splits as files: which row is in which part, so that everybody evaluates the same rows.

A split is decided by the seed, the names and the human scores alone. Whole groups (prompts, generators) go to one part;
groups are dealt in the order of their mean human score, so that every part has its share of the good and the bad.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from m3agiqa.errors import UserError
from m3agiqa.evaluation.metrics import Floats
from m3agiqa.predictor.splits import part_of_name

_STRATA = 10


def groups_of(
    way: str, ids: Sequence[str], prompts: Sequence[str | None], generators: Sequence[str | None]
) -> list[str]:
    """What each row [n] must stay together with: itself, its prompt, or its generator.

    Raises:
        UserError: if no row has what is split by.
    """
    if way == "random":
        return [f"id {one}" for one in ids]
    values = prompts if way == "prompt" else generators
    if all(value is None for value in values):
        raise UserError(f"--by {way}", f"no row has a {way}", "give a table with that column, or split at random")
    return [f"id {one}" if value is None else f"{way} {value}" for one, value in zip(ids, values, strict=True)]


def deal(groups: Sequence[str], shares: Mapping[str, float], labels: Floats | None, seed: int) -> list[str]:
    """A part for each row [n], with whole groups, shares of the rows as near as groups allow, stratified by labels.

    Args:
        shares: part -> its share; they sum to 1. labels: [n], NaN where not known; None: not stratified.

    Raises:
        UserError: if there are fewer groups than parts, or a part gets no row.
    """
    names, codes = np.unique(np.array(groups), return_inverse=True)
    if len(names) < len(shares):
        cure = "ask for fewer parts, or split by something finer"
        raise UserError(f"{len(shares)} parts", f"there are only {len(names)} groups to deal to them", cure)
    sizes = np.bincount(codes)
    strata = _strata(codes, labels, len(names))
    shuffled = np.array([hashlib.sha256(f"{seed} {name}".encode()).hexdigest() for name in names])
    dealt = np.zeros(len(shares))
    wanted = np.array(list(shares.values()))
    part_of = np.empty(len(names), np.int64)
    for group in np.lexsort((shuffled, strata)).tolist():
        # To the part that lacks most of its share of what has been dealt so far, this group included.
        lacking = wanted * (dealt.sum() + sizes[group]) - dealt
        part_of[group] = int(np.argmax(lacking))
        dealt[part_of[group]] += sizes[group]
    parts = list(shares)
    if empty := [part for part, rows in zip(parts, dealt, strict=True) if not rows]:
        raise UserError(f"part {empty[0]}", "gets no row", "give it a larger share, or more rows")
    return [parts[i] for i in part_of[codes].tolist()]


def _strata(codes: Any, labels: Floats | None, count: int) -> Any:
    """The tenth that each group's mean label is in [groups]; groups without labels are a stratum of their own."""
    if labels is None:
        return np.zeros(count, np.int64)
    # In one order, since sums in another differ in their last bit, which is enough to cross the edge of a tenth.
    known = np.flatnonzero(np.isfinite(labels))
    known = known[np.lexsort((labels[known], codes[known]))]
    rows = np.bincount(codes[known], minlength=count)
    means = np.bincount(codes[known], labels[known], count) / np.maximum(rows, 1)
    found = np.full(count, _STRATA, np.int64)
    if (rows > 0).any():
        edges = np.quantile(means[rows > 0], np.linspace(0, 1, _STRATA + 1)[1:-1])
        found[rows > 0] = np.searchsorted(edges, means[rows > 0], side="right")
    return found


def official(given: Sequence[str | None], said: str) -> list[str | None]:
    """The parts that a column `split` names: train, val or test, however they are written; None stays out.

    Raises:
        UserError: for a name that is none of these.
    """
    unknown = Counter(one for one in given if one is not None and part_of_name(one) is None)
    if unknown:
        value, count = unknown.most_common(1)[0]
        raise UserError(said, f"{count} rows have the part {value!r}", "name the parts train, val or test")
    return [None if one is None else part_of_name(one) for one in given]


def shares_of(text: str) -> dict[str, float]:
    """`train=0.8,test=0.2` as shares.

    Raises:
        UserError: for another form, and shares that are not positive or do not sum to 1.
    """
    flag, found = f"--shares {text}", {}
    for item in text.split(","):
        name, equals, share = item.partition("=")
        try:
            found[name.strip()] = float(share)
        except ValueError:
            equals = ""
        if not equals or not name.strip():
            raise UserError(flag, f"{item!r} is not of the form PART=SHARE", "write e.g. train=0.8,test=0.2")
    if min(found.values()) <= 0 or abs(sum(found.values()) - 1) > 1e-6:
        raise UserError(flag, f"sums to {sum(found.values()):g}", "give positive shares that sum to 1")
    return found


def describe(parts: Sequence[str | None], labels: Floats | None) -> dict[str, dict[str, Any]]:
    """Rows of each part, and mean and standard deviation of its labels [n]; rows in no part are left out."""
    names = np.array([str(part) if part is not None else "" for part in parts])
    found: dict[str, dict[str, Any]] = {}
    for name in sorted(set(names.tolist()) - {""}):
        own = None if labels is None else np.sort(labels[(names == name) & np.isfinite(labels)])
        mean, spread = (None, None) if own is None or not len(own) else (float(own.mean()), float(own.std()))
        found[name] = {"rows": int((names == name).sum()), "mean_label": mean, "label_deviation": spread}
    return found
