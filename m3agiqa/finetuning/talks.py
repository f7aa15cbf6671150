"""The conversations of a corpus: which image, what is to be answered about it, and what is wrong with a row."""

import difflib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from m3agiqa.aspects import SCALE_MAX, SCALE_MIN, Aspect
from m3agiqa.conversation import parse_rating
from m3agiqa.corpus import Access, Corpus, Shard
from m3agiqa.corpus.conversations import DESCRIPTION, ERROR, RATING
from m3agiqa.corpus.numbers import are_numbers
from m3agiqa.distil_config import RatingsConfig
from m3agiqa.errors import UserError
from m3agiqa.ratings import Bins, fits, mismatch

SPLIT = "split"
"""The column that names a row's part."""


@dataclass(frozen=True)
class Columns:
    """Which columns hold the answers and the human scores.

    Attributes:
        descriptions, ratings: of the columns that do not have the usual names, by aspect.
        labels: of the human scores, by aspect. scale: the lowest and the highest of them.
    """

    descriptions: Mapping[Aspect, str] = field(default_factory=dict)
    ratings: Mapping[Aspect, str] = field(default_factory=dict)
    labels: Mapping[Aspect, str] = field(default_factory=dict)
    scale: tuple[float, float] = (SCALE_MIN, SCALE_MAX)

    def description(self, aspect: Aspect) -> str:
        """The column of the first answers; `teacher_quality_description` unless another is named."""
        return self.descriptions.get(aspect, f"teacher_{aspect}_description")

    def rating(self, aspect: Aspect) -> str:
        """The column of the rating words."""
        return self.ratings.get(aspect, f"teacher_{aspect}_rating")


@dataclass(frozen=True)
class Talk:
    """One conversation.

    Attributes:
        picture: number of its image. word: one of the five.
        score: the human score on the scale of 0 to 5, or None where there is none.
    """

    picture: int
    aspect: Aspect
    prompt: str | None
    description: str
    word: str
    score: float | None


@dataclass(frozen=True)
class Picture:
    """One row of a corpus: where its image is.

    Attributes:
        row: how errors call it. id, prompt, split: of the row.
        uri: of the image; None where it is embedded, or the corpus has none.
        place: number of the shard and of the row in it, where the image is embedded.
        origin: number of its input.
        access: how the image is read.
    """

    row: str
    id: str
    prompt: str | None
    split: str | None
    uri: str | None
    place: tuple[int, int] | None
    origin: int
    access: Access


@dataclass(frozen=True)
class Bad:
    """A row that cannot be trained on, and why."""

    row: str
    why: str

    def __str__(self) -> str:
        return f"{self.row}: {self.why}"


@dataclass
class Talks:
    """All conversations, and the rows they are of.

    Attributes:
        shards: those that embedded images are read from.
        bad: rows that cannot be used. aspects: those that there are conversations of.
    """

    talks: list[Talk] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    shards: list[Shard] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)
    aspects: tuple[Aspect, ...] = ()
    silent: int = 0
    """Rows that hold no conversation."""
    unanswered: Counter[Aspect] = field(default_factory=Counter)
    """Rows that have nothing to learn of an aspect beside conversations of others."""
    misfits: list[str] = field(default_factory=list)
    """Where rating words do not fit the human scores beside them, a line each."""

    def notes(self) -> list[str]:
        """What a user should know of rows that nothing is learnt from, and of words that may be wrong, a line each."""
        whole = [f"{self.silent} rows without a conversation left out"] if self.silent else []
        none = [f"{aspect}: {count} rows without an answer" for aspect, count in self.unanswered.items()]
        return [*whole, *none, *self.misfits]


@dataclass
class _Rated:
    """Rating words of an aspect that have a human score beside them [n], and all human scores of those rows [n]."""

    words: list[str] = field(default_factory=list)
    scores: dict[str, list[float | None]] = field(default_factory=dict)

    def add(self, word: str, row: Mapping[str, Any], columns: Columns) -> None:
        """Takes a row, in which a score may be missing, or its column."""
        self.words.append(word)
        for column in columns.labels.values():
            value = row.get(column)
            self.scores.setdefault(column, [])
            self.scores[column].append(None if value is None else float(value))


@dataclass(frozen=True)
class _Plan:
    """The columns of one input, by aspect; a column that it lacks is None. `bins`: what makes words of its scores."""

    description: Mapping[Aspect, str]
    rating: Mapping[Aspect, str | None]
    label: Mapping[Aspect, str | None]
    bins: Mapping[Aspect, Bins]

    @property
    def names(self) -> list[str]:
        """Every column to read."""
        found = [*self.description.values(), *self.rating.values(), *self.label.values()]
        return list(dict.fromkeys(name for name in found if name is not None))


def read_talks(inputs: Mapping[str, Corpus], columns: Columns, ratings: RatingsConfig | None = None) -> Talks:
    """Reads all rows of some corpora, but for their images.

    Args:
        inputs: URI -> the corpus, opened `lenient`. ratings: which word a score becomes where there is none.

    Raises:
        UserError: for columns that are named and not there, or not of text or numbers, and if there are none; for an
            aspect with scores that `ratings` states no bins for.
    """
    _check_named(inputs, columns)
    ratings = ratings or RatingsConfig.model_construct()
    bins = {aspect: ratings.bins(aspect, columns.scale) for aspect in columns.labels}
    found = Talks()
    present: set[Aspect] = set()
    rated = {aspect: _Rated() for aspect in columns.labels}
    for origin, (uri, corpus) in enumerate(inputs.items()):
        plan = _plan(uri, corpus.schema, columns, bins)
        present |= set(plan.description)
        for row, label, picture in _rows(uri, origin, corpus, plan, found.shards, several=len(inputs) > 1):
            _take(row, label, picture, plan, columns, found, rated)
    if not present:
        raise _no_columns(inputs)
    found.aspects = tuple(aspect for aspect in Aspect if aspect in present)
    found.misfits = [line for aspect in rated if (line := _misfit(aspect, rated[aspect], columns, bins[aspect]))]
    return found


def _misfit(aspect: Aspect, rated: _Rated, columns: Columns, bins: Bins) -> str | None:
    """What is wrong with the rating words of an aspect, going by its scores; None: nothing, or there are not both."""
    column = columns.labels[aspect]
    wrong = mismatch(fits(rated.words, rated.scores, bins), column) if rated.words else None
    if wrong is None:
        return None
    anew = f"`m3agiqa conversations --aspect {aspect} --check {column} --fix-words`"
    return f"{aspect}: {columns.rating(aspect)}: {wrong}; {anew} makes them anew, ratings.edges.{aspect} states bins"


def _rows(
    uri: str, origin: int, corpus: Corpus, plan: _Plan, shards: list[Shard], *, several: bool
) -> Iterator[tuple[dict[str, Any], str, Picture]]:
    """Rows with how they are called; shards that embed images are added to `shards`."""
    wanted = ["id", "prompt", "_uri", *plan.names]
    wanted += [name for name in (SPLIT, ERROR) if name in corpus.schema.names and name not in wanted]
    at = 0
    for shard in corpus.shards:
        in_shard, number = 0, len(shards)
        for table in shard.read():
            embedded = table["_bytes"].is_valid().to_pylist()
            if any(embedded) and len(shards) == number:
                shards.append(shard)
            for row, embeds in zip(table.select(wanted).to_pylist(), embedded, strict=True):
                label = f"{f'{uri} ' if several else ''}row {at} (id {row['id']})"
                place = (number, in_shard) if embeds else None
                split = row.get(SPLIT)
                named = None if split is None else str(split)
                where = (row["_uri"], place, origin, corpus.access)
                yield row, label, Picture(label, row["id"], row["prompt"], named, *where)
                at, in_shard = at + 1, in_shard + 1


def _take(
    row: dict[str, Any],
    label: str,
    picture: Picture,
    plan: _Plan,
    columns: Columns,
    found: Talks,
    rated: Mapping[Aspect, _Rated],
) -> None:
    """Adds a row's conversations, or what is wrong with it."""
    if row.get(ERROR):
        found.bad.append(Bad(label, row[ERROR]))
        return
    why: list[str] = []
    talks: list[Talk] = []
    unanswered: list[Aspect] = []
    for aspect, column in plan.description.items():
        values = (row[column], _value(row, plan.rating[aspect]), _value(row, plan.label[aspect]))
        # A teacher that was not asked, or gave no answer of use, has left nothing; an answer that is empty is a fault.
        # In a CSV, which has no nulls, it is one only beside a rating or a score.
        nothing = values[0] is None and (values[1] is None or plan.rating[aspect] is None)
        if nothing or values in (("", "", None), ("", None, None)):
            unanswered.append(aspect)
            continue
        try:
            description, word, score = _answers(values, columns.scale, plan.bins.get(aspect), picture.prompt, aspect)
            talks.append(Talk(len(found.pictures), aspect, picture.prompt, description, word, score))
        except ValueError as error:
            why.append(f"{aspect}: {error}")
    if why:
        found.bad.append(Bad(label, "; ".join(why)))
    elif talks:
        found.talks += talks
        found.pictures.append(picture)
        found.unanswered.update(unanswered)
        for talk in talks:
            if talk.score is not None and _value(row, plan.rating[talk.aspect]) is not None:
                rated[talk.aspect].add(talk.word, row, columns)
    else:
        found.silent += 1


def _value(row: Mapping[str, Any], column: str | None) -> Any:
    return None if column is None else row[column]


def _answers(
    values: tuple[Any, Any, Any], scale: tuple[float, float], bins: Bins | None, prompt: str | None, aspect: Aspect
) -> tuple[str, str, float | None]:
    """Description, word and score of a conversation.

    Raises:
        ValueError: saying what is wrong with it.
    """
    description, rating, label = values
    label = None if label is None else float(label)  # a decimal does not mix with floats
    if not (description or "").strip():
        raise ValueError("the description is empty")
    if prompt is None and aspect.needs_prompt:
        raise ValueError("there is no prompt")
    score = None
    if label is not None:
        low, high = scale
        if not math.isfinite(label) or not low <= label <= high:
            raise ValueError(f"the score {label:g} is outside the scale {low:g} to {high:g}")
        score = SCALE_MIN + (label - low) / (high - low) * (SCALE_MAX - SCALE_MIN)
    if rating is None:
        if label is None or bins is None:
            raise ValueError("there is neither a rating word nor a score")
        return description, bins.word(label), score
    word = parse_rating(rating)
    if not rating.strip():
        raise ValueError("the rating is empty")
    if word is None or rating.strip().rstrip(".").lower() != word:
        raise ValueError(f"the rating {rating[:40]!r} is not one of the five words")
    return description, word, score


def _plan(uri: str, schema: pa.Schema, columns: Columns, bins: Mapping[Aspect, Bins]) -> _Plan:
    names = set(schema.names)
    description = {a: c for a in Aspect if (c := columns.description(a)) in names}
    rating = {a: r if (r := columns.rating(a)) in names else None for a in description}
    label = {a: s if (s := columns.labels.get(a)) in names else None for a in description}
    for aspect, answers in description.items():
        if rating[aspect] is None and label[aspect] is None:
            rule = f"has {answers}, but no column {columns.rating(aspect)} with the rating words"
            cure = f"name it (--rating {aspect}=COLUMN), or the scores to make words of (--label {aspect}=COLUMN)"
            raise UserError(f"input {uri}", rule, cure)
    _check_types(uri, schema, [*description.values(), *(c for c in rating.values() if c)], text=True)
    _check_types(uri, schema, [c for c in label.values() if c], text=False)
    return _Plan(description, rating, label, bins)


def _check_types(uri: str, schema: pa.Schema, names: Sequence[str], *, text: bool) -> None:
    for name in names:
        kind = schema.field(name).type
        texts = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)
        if not (texts if text else are_numbers(kind)):
            rule = f"column {name} is of type {kind}, not {'text' if text else 'numbers'}"
            raise UserError(f"input {uri}", rule, "name another column")


def _check_named(inputs: Mapping[str, Corpus], columns: Columns) -> None:
    """Columns that are named must be in one of the inputs at least."""
    known = {f.name for corpus in inputs.values() for f in corpus.schema if not f.name.startswith("_")}
    named = (("--description", columns.descriptions), ("--rating", columns.ratings), ("--label", columns.labels))
    for flag, by_aspect in named:
        for aspect, column in by_aspect.items():
            if column not in known:
                near = difflib.get_close_matches(column, sorted(known), n=1)
                cure = f"did you mean {near[0]}?" if near else f"the columns are {', '.join(sorted(known))}"
                raise UserError(f"{flag} {aspect}={column}", "no input has such a column", cure)
            if flag == "--label" and columns.description(aspect) not in known:
                rule = f"no input has descriptions of {aspect} (column {columns.description(aspect)})"
                raise UserError(f"{flag} {aspect}={column}", rule, f"name it: --description {aspect}=COLUMN")


def _no_columns(inputs: Mapping[str, Corpus]) -> UserError:
    names = {f.name for corpus in inputs.values() for f in corpus.schema if not f.name.startswith("_")} - {ERROR}
    cure = "make them with `m3agiqa distil`, or name others: --description quality=COLUMN --rating quality=COLUMN"
    if DESCRIPTION in names:
        cure = f"say which aspect they are of, e.g. --description quality={DESCRIPTION} --rating quality={RATING}"
    rule = f"no column teacher_ASPECT_description among its columns ({', '.join(sorted(names))})"
    return UserError(f"input {', '.join(inputs)}", rule, cure)
