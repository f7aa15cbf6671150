"""What is to be asked: the labelled images of a corpus, and the answers that each has had."""

import base64
import io
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
from PIL import Image

from m3agiqa.aspects import RATING_WORDS, Aspect
from m3agiqa.config import AccessConfig, CorpusConfig
from m3agiqa.corpus import IMAGE_COLUMNS, Access, Corpus, open_corpus
from m3agiqa.corpus.numbers import are_numbers, floats
from m3agiqa.distil.journal import Entry, Verdict
from m3agiqa.distil_config import RatingsConfig, SamplingConfig, TeacherImages
from m3agiqa.errors import UserError
from m3agiqa.images import decode
from m3agiqa.ratings import Bins


@dataclass(frozen=True)
class Task:
    """One aspect of one image that people have rated: `score`, which is `word` in the stated bins."""

    id: str
    aspect: Aspect
    prompt: str | None
    score: float
    word: str

    @property
    def key(self) -> tuple[str, str]:
        """Identifies it within an output."""
        return self.id, str(self.aspect)


@dataclass(frozen=True)
class Row:
    """An image and what is to be asked about it; `data` is the file's content where the corpus embeds it."""

    uri: str | None
    data: bytes | None
    tasks: tuple[Task, ...]
    access: Access


@dataclass(frozen=True)
class Labels:
    """Which column holds the human scores of which aspect, on which scale and in which bins."""

    columns: Mapping[Aspect, str]
    scale: tuple[float, float]
    bins: Mapping[Aspect, Bins]


def labels_of(columns: Mapping[Aspect, str], scale: tuple[float, float], ratings: RatingsConfig) -> Labels:
    """The labels with the bins that the configuration states.

    Raises:
        UserError: for a scale that does not go up, or a data set that has no bins for an aspect.
    """
    low, high = scale
    if not low < high:
        raise UserError(f"--scale {low:g} {high:g}", "does not go up", "give the lowest score, then the highest")
    return Labels(columns, scale, {aspect: ratings.bins(aspect, scale) for aspect in columns})


def open_labelled(uri: str, config: CorpusConfig, access: AccessConfig, labels: Labels) -> Corpus:
    """Opens a corpus that has the columns of the labels.

    Raises:
        UserError: for an input that cannot be used, or a label that is no column of numbers.
    """
    # The first name that an image column is looked for under: a column of that name would be taken for ours.
    reserved = [IMAGE_COLUMNS[0], *(name for aspect in labels.columns for name in teacher_columns(aspect))]
    corpus = open_corpus(uri, **config.model_dump(), access=access, reserved=reserved)
    for aspect, column in labels.columns.items():
        said = f"--label {aspect}={column}"
        if column not in corpus.schema.names:
            listed = ", ".join(name for name in corpus.schema.names if not name.startswith("_"))
            raise UserError(said, f"{uri} has no column {column}", f"its columns are {listed}")
        kind = corpus.schema.field(column).type
        if not are_numbers(kind):
            raise UserError(said, f"the column holds {kind}, not numbers", "name a column of scores")
    return corpus


def teacher_columns(aspect: Aspect) -> tuple[str, str, str, str]:
    """The columns that a distillation adds for an aspect: description, rating, implied rating, and why not."""
    return tuple(f"teacher_{aspect}_{suffix}" for suffix in ("description", "rating", "implied", "note"))  # type: ignore[return-value]


def tables(corpus: Corpus) -> Iterator[pa.Table]:
    """All rows of a corpus, some thousand at a time."""
    for shard in corpus.shards:
        yield from shard.read()


def scores_in(table: pa.Table, labels: Labels) -> dict[Aspect, list[float | None]]:
    """The human scores in rows of the corpus [n], by aspect; null where nobody rated.

    Raises:
        UserError: for a score that is not finite or not on the scale.
    """
    low, high = labels.scale
    found: dict[Aspect, list[float | None]] = {}
    for aspect, column in labels.columns.items():
        said = f"--label {aspect}={column}"
        values = floats(table[column]).to_pylist()
        for value in values:
            if value is not None and not math.isfinite(value):
                raise UserError(said, f"holds {value}", "leave it empty (null) where nobody rated")
            if value is not None and not low <= value <= high:
                raise UserError(
                    said, f"{value:g} is outside the scale {low:g} to {high:g}", "state the scale: --scale LOW HIGH"
                )
        found[aspect] = values
    return found


def tasks_in(table: pa.Table, labels: Labels) -> Iterator[tuple[Task, ...]]:
    """The tasks of each row of a table: of every aspect that has a score, and a prompt where it needs one."""
    scores = scores_in(table, labels)
    for i, (name, prompt) in enumerate(zip(table["id"].to_pylist(), table["prompt"].to_pylist(), strict=True)):
        tasks = []
        for aspect, values in scores.items():
            score = values[i]
            if score is not None and not (prompt is None and aspect.needs_prompt):
                tasks.append(Task(name, aspect, prompt, score, labels.bins[aspect].word(score)))
        yield tuple(tasks)


def rows(corpus: Corpus, labels: Labels) -> Iterator[Row]:
    """The rows of a corpus that have a task, with what their images are read from."""
    for table in tables(corpus):
        for i, tasks in enumerate(tasks_in(table, labels)):
            if tasks:
                data = table["_bytes"][i]
                yield Row(table["_uri"][i].as_py(), data.as_py() if data.is_valid else None, tasks, corpus.access)


def survey(corpus: Corpus, labels: Labels) -> Counter[str]:
    """Counts `images`, those `embedded` in the corpus and the tasks of each aspect; looks at every label on the way.

    Raises:
        UserError: for a label that is not on the scale, or if there is nothing to ask.
    """
    counts: Counter[str] = Counter()
    for table in tables(corpus):
        counts["images"] += table.num_rows
        counts["embedded"] += table.num_rows - table["_bytes"].null_count
        for tasks in tasks_in(table, labels):
            counts.update(str(task.aspect) for task in tasks)
    missing = [aspect for aspect in labels.columns if not counts[str(aspect)]]
    if missing:
        said = f"--label {missing[0]}={labels.columns[missing[0]]}"
        need = " and a prompt" if missing[0].needs_prompt else ""
        raise UserError(said, f"no image has a score{need}", "name another column")
    return counts


def data_url(row: Row, config: TeacherImages) -> tuple[str, tuple[int, int]]:
    """The image of a row as a data URL, and its width and height as sent, in pixels.

    Raises:
        ImageRejected: the image cannot be used. FileNotFoundError: it is not there.
        OSError: it cannot be read now.
    """
    data = row.data if row.data is not None else row.access.fetch(row.uri or "")
    limits = config.model_dump(include={"max_pixels", "min_side", "max_side", "max_aspect_ratio"})
    image = Image.fromarray(decode(data, **limits).pixels)
    buffer = io.BytesIO()
    if config.encoding == "png":
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=config.jpeg_quality, subsampling=0)
    text = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/{config.encoding};base64,{text}", image.size


@dataclass(frozen=True)
class State:
    """How far a task is.

    Attributes:
        done: whether there is nothing more to ask. kept: the answer that is kept, if any.
        note: why a done task has none. refused: the last answer and its fault, where it is to be asked again.
    """

    done: bool
    kept: Entry | None = None
    note: str | None = None
    refused: tuple[str, str] | None = None


def state_of(word: str, entries: Sequence[Entry], config: SamplingConfig) -> State:
    """Where a task stands after these answers, in the order in which they came; nothing else decides what is next.

    Args:
        word: the human rating word.
    """
    good = [entry for entry in entries if entry.verdict == Verdict.OK]
    bad = [entry for entry in entries if entry.verdict != Verdict.OK]
    agreeing = [entry for entry in good if config.candidates == 1 or entry.rating == word]
    if agreeing:
        return State(True, agreeing[0])
    given_up = len(bad) > config.again or any(entry.verdict == Verdict.REFUSED for entry in bad)
    if len(good) < config.candidates and not given_up:
        last = entries[-1] if entries else None
        again = last is not None and last.verdict != Verdict.OK
        return State(False, refused=(last.content, last.reason or "") if last is not None and again else None)
    if good and config.if_none_agrees == "nearest":
        place = RATING_WORDS.index(word)
        return State(True, min(good, key=lambda entry: abs(RATING_WORDS.index(str(entry.rating)) - place)))
    if good:
        ratings = ", ".join(str(entry.rating) for entry in good)
        return State(True, note=f"no candidate agrees with the human word (they say {ratings})")
    return State(True, note=f"{bad[-1].verdict}: {bad[-1].reason}")
