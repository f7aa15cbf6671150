"""Conversations about one aspect, between our parquet form and the published JSON form, without loss; and their check.

Ours is one row an image: `id`, `image`, `prompt`, `teacher_{aspect}_description`, `teacher_{aspect}_rating` and any
further columns. Theirs is an array of `id`, `image`, `conversations` (four messages) and any further keys. What theirs
says otherwise than we would is kept in `published_*` columns.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from m3agiqa.aspects import RATING_WORDS, Aspect
from m3agiqa.conversation import questions
from m3agiqa.corpus import FIXED_FIELDS, conversations, files, open_corpus
from m3agiqa.errors import UserError
from m3agiqa.ratings import Bins

PUBLISHED_IMAGE = "published_image"
PUBLISHED_QUESTIONS = ("published_question_0", "published_question_1")
_IMAGE_MARK = "<image>\n"
# Bad rows that an error names; the others are counted.
_NAMED = 5


@dataclass
class Talks:
    """Conversations about one aspect.

    Attributes:
        rows: in our form; a value that does not exist is left out. numbers: of these rows in their file, from 0.
        bad: number of the row in its file -> its id, and what is wrong with it. Such rows are not in `rows`.
    """

    aspect: Aspect
    rows: list[dict[str, Any]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    bad: dict[int, tuple[str, str]] = field(default_factory=dict)

    def add(self, number: int, row: dict[str, Any]) -> None:
        """Takes a good row."""
        self.rows.append(row)
        self.numbers.append(number)

    @property
    def description(self) -> str:
        """The column of the descriptions."""
        return f"teacher_{self.aspect}_description"

    @property
    def rating(self) -> str:
        """The column of the rating words."""
        return f"teacher_{self.aspect}_rating"

    def check(self, uri: str, *, skip_bad: bool) -> list[str]:
        """The bad rows, a line each, if they may be skipped.

        Raises:
            UserError: if they may not, or if nothing is left.
        """
        lines = [f"row {number} (id {name}): {reason}" for number, (name, reason) in sorted(self.bad.items())]
        if lines and not (skip_bad and self.rows):
            more = f"; and {len(lines) - _NAMED} more" if len(lines) > _NAMED else ""
            rule = f"{len(lines)} of {len(lines) + len(self.rows)} rows are bad: {'; '.join(lines[:_NAMED])}{more}"
            raise UserError(
                f"input {uri}", rule, "mend them, or leave them out: --skip-bad (images elsewhere: --images)"
            )
        return lines


def read_talks(uri: str, aspect: Aspect, *, images: str | None = None, look: bool = True) -> Talks:
    """Reads conversations in either form.

    Args:
        uri: a JSON file in the published form, or anything in ours that `open_corpus` opens.
        images: folder of the images, where they are not where the file says. look: whether they must be there.

    Raises:
        UserError: if the input cannot be used as a whole; bad rows are told apart.
    """
    talks = Talks(aspect)
    if uri.lower().endswith((".json", ".json.gz")):
        _read_published(uri, talks, images)
    else:
        _read_ours(uri, talks, images)
    if look:
        _look_for_images(talks)
    return talks


def _read_published(uri: str, talks: Talks, images: str | None) -> None:
    base = files.absolute(images) if images is not None else files.split(files.absolute(uri))[0]
    seen: Counter[str] = Counter()
    for number, item in enumerate(conversations.array(uri)):
        try:
            row = _row(item, talks, base)
            seen[row["id"]] += 1
            if seen[row["id"]] > 1:
                raise ValueError("its id has been there before")
        except ValueError as error:
            name = item.get("id") if isinstance(item, dict) else None
            talks.bad[number] = (str(name), str(error))
        else:
            talks.add(number, row)


def _row(item: Any, talks: Talks, base: str) -> dict[str, Any]:
    """An item of the published form in ours.

    Raises:
        ValueError: says what is wrong with it.
    """
    if not isinstance(item, dict):
        raise ValueError("it is no JSON object")
    name, image = item.get("id"), item.get("image")
    if not isinstance(name, str) or not name:
        raise ValueError("its id is no text")
    if not isinstance(image, str) or not image:
        raise ValueError("it names no image")
    said = conversations.texts(item.get("conversations"))
    if len(said) != len(conversations.ROLES):
        raise ValueError(f"its conversation has {len(said)} messages, not {len(conversations.ROLES)}")
    if any(set(message) != {"role", "content"} for message in item["conversations"]):
        raise ValueError("a message has more than a role and a content, which cannot be kept")
    here = conversations.image_here(image)
    uri = here if here.startswith("/") or "://" in here else files.join(base, here)
    row = {"id": name, "image": uri, "prompt": conversations.prompt_in(said[0])}
    row |= {talks.description: said[1], talks.rating: said[3]}
    row |= {PUBLISHED_IMAGE: image, **dict(zip(PUBLISHED_QUESTIONS, (said[0], said[2]), strict=True))}
    for key, value in item.items():
        if key in ("id", "image", "conversations"):
            continue
        if key == "prompt" and isinstance(value, str) and value != row["prompt"]:
            row["prompt"] = value
            continue
        if key in row or key.startswith("_") or value is None:
            raise ValueError(f"its key {key!r} cannot be kept: that name, or null, has another meaning here")
        row[key] = value
    _check(row, talks)
    return row


def _check(row: Mapping[str, Any], talks: Talks) -> None:
    if not (row.get(talks.description) or "").strip():
        raise ValueError("its description is empty")
    if row.get(talks.rating) not in RATING_WORDS:
        raise ValueError(f"its rating {row.get(talks.rating)!r} is none of {', '.join(RATING_WORDS)}")


def _read_ours(uri: str, talks: Talks, images: str | None) -> None:
    corpus = open_corpus(uri, images=images, text_only=True)
    for column in (talks.description, talks.rating):
        if column not in corpus.schema.names:
            listed = ", ".join(name for name in corpus.schema.names if not name.startswith("_"))
            raise UserError(f"input {uri}", f"it has no column {column} ({listed})", "take another --aspect or input")
    passing = corpus.schema.names[len(FIXED_FIELDS) :]
    number = 0
    for shard in corpus.shards:
        for table in shard.read():
            embedded = table["_bytes"].is_valid().to_pylist()
            for inside, row in zip(embedded, table.drop_columns("_bytes").to_pylist(), strict=True):
                kept = {name: row[name] for name in ("id", "prompt", "generator", *passing) if row[name] is not None}
                try:
                    if inside or not row["_uri"]:
                        raise ValueError("its image is within the file, and JSON can only name one")
                    if row["prompt"] is None and talks.aspect.needs_prompt and PUBLISHED_QUESTIONS[0] not in kept:
                        raise ValueError(f"it has no prompt, and {talks.aspect} is of one")
                    _check(row, talks)
                except ValueError as error:
                    talks.bad[number] = (row["id"], str(error))
                else:
                    talks.add(number, {"id": row["id"], "image": row["_uri"], **kept})
                number += 1


def _look_for_images(talks: Talks) -> None:
    with ThreadPoolExecutor(files.PARALLEL_REQUESTS) as pool:
        kinds = list(pool.map(lambda row: files.kind_of(row["image"]), talks.rows))
    read, talks.rows, talks.numbers = list(zip(talks.numbers, talks.rows, kinds, strict=True)), [], []
    for number, row, kind in read:
        if kind == "file":
            talks.add(number, row)
        else:
            talks.bad[number] = (row["id"], f"its image {row['image']} is not there")


def write_published(talks: Talks, path: str, wording: str = "published") -> None:
    """Writes the published form, laid out as the published files; rows without questions get those of `wording`.

    Raises:
        UserError: for a value that JSON has no form for, or a path that cannot be written.
    """
    items = []
    for row in talks.rows:
        first, second = (row.get(name) for name in PUBLISHED_QUESTIONS)
        if first is None or second is None:
            asked = questions(talks.aspect, row.get("prompt"), wording)
            first, second = _IMAGE_MARK + asked.first, asked.second
        said = (first, row[talks.description], second, row[talks.rating])
        item = {"id": row["id"], "image": row.get(PUBLISHED_IMAGE, row["image"])}
        item["conversations"] = [
            {"role": role, "content": text} for role, text in zip(conversations.ROLES, said, strict=True)
        ]
        ours = {"id", "image", "prompt", talks.description, talks.rating, PUBLISHED_IMAGE, *PUBLISHED_QUESTIONS}
        if row.get("prompt") != conversations.prompt_in(first):
            ours.remove("prompt")  # the question does not say it
        items.append(item | {name: value for name, value in row.items() if name not in ours})
    try:
        text = json.dumps(items, indent=4) + "\n"
    except (TypeError, ValueError) as error:
        raise UserError(f"--output {path}", f"a column does not fit into JSON ({error})", "leave it out") from None
    _write(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_ours(talks: Talks, path: str) -> None:
    """Writes our form, one parquet file.

    Raises:
        UserError: for a column of mixed types, or a path that cannot be written.
    """
    names: dict[str, None] = dict.fromkeys(("id", "image", "prompt"))
    for row in talks.rows:
        names |= dict.fromkeys(row)
    columns = {}
    for name in names:
        try:
            columns[name] = pa.array([row.get(name) for row in talks.rows])
        except pa.ArrowException as error:
            raise UserError(f"column {name}", f"holds values of several types ({error})", "make them one") from None
    if pa.types.is_null(columns["prompt"].type):
        columns["prompt"] = columns["prompt"].cast(pa.string())
    _write(path, lambda file: pq.write_table(pa.table(columns), file, compression="zstd"))


def _write(path: str, write: Any) -> None:
    target = Path(path)
    new = target.with_name(f"{target.name}.new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(new)
        new.replace(target)
    except OSError as error:
        raise UserError(f"--output {path}", f"cannot be written ({error})", "give a local file") from None


def scores_of(
    talks: Talks, uri: str | None = None, image_column: str | None = None
) -> dict[str, Sequence[float | None]]:
    """The columns of numbers that the words can be compared with, each [rows].

    Args:
        uri: a table of scores, matched by the images' file names; None: the rows' own columns.
        image_column: its column of image names.

    Raises:
        UserError: if there are none, or no row of the table is of one of the images.
    """
    rows: Sequence[Mapping[str, Any]] = talks.rows
    if uri is not None:
        by_name: dict[str, dict[str, Any]] = {}
        corpus = open_corpus(uri, image_column=image_column)
        for shard in corpus.shards:
            for table in shard.read():
                for row in table.drop_columns("_bytes").to_pylist():
                    by_name[row["image"].rsplit("/", 1)[-1]] = row
        rows = [by_name.get(row["image"].rsplit("/", 1)[-1], {}) for row in talks.rows]
        if not any(rows):
            raise UserError(f"--scores {uri}", "no row is of one of the images", "give their own, or --scores-image")
    found: dict[str, list[float | None]] = {}
    for name in dict.fromkeys(name for row in rows for name, value in row.items() if _is_number(value)):
        found[name] = [float(row[name]) if _is_number(row.get(name)) else None for row in rows]
    if not found:
        raise UserError("--check", "there are no scores to compare with", "name a table of them: --scores FILE")
    return dict(found)


def make_words(talks: Talks, scores: Sequence[float | None], bins: Bins) -> tuple[int, int]:
    """Makes the rating words anew from scores [rows]; conversations without one are left out.

    Returns:
        how many words have changed, and how many conversations were left out.
    """
    read, talks.rows, talks.numbers = list(zip(talks.numbers, talks.rows, scores, strict=True)), [], []
    changed = 0
    for number, row, score in read:
        if score is not None:
            word = bins.word(score)
            changed += row[talks.rating] != word
            talks.add(number, row | {talks.rating: word})
    return changed, len(read) - len(talks.rows)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)
