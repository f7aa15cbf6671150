"""The folder that a distillation writes.

OUT/conversations.parquet   one row an image: the corpus's columns, and of each aspect the teacher's description
OUT/distil.json             what was asked of whom, what came of it, what it cost, and what is left
OUT/journal.jsonl           every answer that was paid for (`journal.py`)
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from m3agiqa.config import AccessConfig
from m3agiqa.corpus import FIXED_FIELDS, access_of
from m3agiqa.corpus.files import is_local, local_out
from m3agiqa.distil.desk import Desk
from m3agiqa.distil.journal import Journal
from m3agiqa.distil.prompts import TEACHER_WORDINGS
from m3agiqa.distil.tasks import Labels, Task, scores_in, tables, tasks_in, teacher_columns
from m3agiqa.distil_config import DistilConfig
from m3agiqa.errors import UserError

MANIFEST, CONVERSATIONS = "distil.json", "conversations.parquet"
_DECIDES: Any = {"teacher": {"model", "temperature", "extra"}, "ask": True, "images": True, "corpus": True}


def out_folder(out: str) -> Path:
    """The folder of the output.

    Raises:
        UserError: for a URI.
    """
    return local_out(out, "give a local folder: answers must be on a disk at once")


def decides(config: DistilConfig, input_uri: str, labels: Labels) -> dict[str, Any]:
    """What all answers of one output have in common; limits, budgets and addresses may change in between."""
    wording = repr(TEACHER_WORDINGS[config.ask.wording])
    return {
        "input": input_uri,
        "labels": {str(aspect): column for aspect, column in labels.columns.items()},
        "scale": list(labels.scale),
        "bins": {str(aspect): list(bins.edges) for aspect, bins in labels.bins.items()},
        "wording": f"{config.ask.wording} {hashlib.sha256(wording.encode()).hexdigest()[:16]}",
        "config": config.model_dump(mode="json", include=_DECIDES),
    }


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What distil.json holds, or None where there is none.

    Raises:
        UserError: if the folder holds something else.
    """
    file = folder / MANIFEST
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"--out {folder}", "is not empty and holds no distillation", "give a new folder") from None
        return None
    except NotADirectoryError:
        raise UserError(f"--out {folder}", "is a file", "give a folder") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(str(file), f"cannot be read ({error})", "mend it, or give a new folder") from None


def taught_from(uri: str) -> tuple[str, ...]:
    """The folders that the images of a distillation lie in, for who learns from it; none if `uri` is no distillation.

    Raises:
        UserError: if its distil.json cannot be read, or the file system of its input does not answer.
    """
    if not is_local(uri) or not (Path(uri).expanduser() / MANIFEST).is_file():
        return ()
    asked = (read_manifest(Path(uri).expanduser()) or {}).get("decides", {})
    if "input" not in asked:
        return ()
    images = asked.get("config", {}).get("corpus", {}).get("images")
    return access_of(asked["input"], images, AccessConfig.model_construct()).roots


def check_same(folder: Path, parts: dict[str, Any]) -> None:
    """Refuses to mix answers to different requests.

    Raises:
        UserError: names what differs from what began the folder.
    """
    earlier = read_manifest(folder)
    if earlier is None or earlier.get("decides") == parts:
        return
    journal = Journal.peek(folder)
    # The answers of a batch under way are paid for, and this request could not use them.
    if not journal.requests and not journal.pending:
        return
    from m3agiqa.runs import differences  # loads what only a refusal needs

    changed = ", ".join(differences(earlier.get("decides", {}), parts)) or "the version"
    began = "the command that began it"
    if journal.pending:
        began += " with --batch, to take the answers of its batch under way"
    cure = f"give {began}, or another --out"
    raise UserError(f"--out {folder}", f"holds a distillation that differs ({changed})", cure)


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Writes distil.json whole.

    Raises:
        UserError: if the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        new = folder / f"{MANIFEST}.new"
        new.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        new.replace(folder / MANIFEST)
    except OSError as error:
        raise UserError(f"--out {folder}", f"cannot be written ({error})", "give a folder you own") from None


def write_conversations(desk: Desk, folder: Path, embedded: bool) -> dict[str, Counter[str]]:
    """Writes conversations.parquet whole, with all that the journal holds.

    Args:
        embedded: whether the corpus has images within its files, which are then copied.

    Returns:
        as `count`.
    """
    counts = _no_counts(desk)
    schema, new = _schema(desk, embedded), folder / f"{CONVERSATIONS}.new"
    with pq.ParquetWriter(new, schema, compression="zstd") as writer:
        for table in tables(desk.corpus):
            arrays = {name: table[name] for name in table.schema.names} | _taught(desk, table, counts)
            arrays["image"] = _images(table) if embedded else table["_uri"]
            writer.write_table(pa.table([arrays[name] for name in schema.names], schema=schema))
    with new.open("rb") as file:
        os.fsync(file.fileno())
    new.replace(folder / CONVERSATIONS)
    return counts


def count(desk: Desk) -> dict[str, Counter[str]]:
    """By aspect: `described`, `given_up`, `unreadable`, `no_prompt` and `left` images that have a score."""
    counts = _no_counts(desk)
    for table in tables(desk.corpus):
        _taught(desk, table, counts)
    return counts


def _no_counts(desk: Desk) -> dict[str, Counter[str]]:
    return {str(aspect): Counter[str]() for aspect in desk.labels.columns}


def _schema(desk: Desk, embedded: bool) -> pa.Schema:
    image = pa.struct([("bytes", pa.large_binary()), ("path", pa.string())]) if embedded else pa.string()
    fields = [pa.field("id", pa.string()), pa.field("image", image)]
    fields += [field for field in FIXED_FIELDS if field.name in ("prompt", "generator")]
    fields += list(desk.corpus.schema)[len(FIXED_FIELDS) :]
    for aspect in desk.labels.columns:
        fields += [pa.field(name, pa.string()) for name in teacher_columns(aspect)]
    return pa.schema(fields)


def _images(table: pa.Table) -> pa.Array:
    """The images as bytes where the corpus embeds them, and as a path for the others."""
    blobs, uris = table["_bytes"].combine_chunks(), table["_uri"].combine_chunks()
    return pa.StructArray.from_arrays([blobs, uris], names=["bytes", "path"])


def _taught(desk: Desk, table: pa.Table, counts: dict[str, Counter[str]]) -> dict[str, list[str | None]]:
    """The teacher's columns for rows of the corpus [n]."""
    found: dict[str, list[str | None]] = {}
    scores, tasks_of = scores_in(table, desk.labels), list(tasks_in(table, desk.labels))
    for aspect in desk.labels.columns:
        by_row: Iterator[Task | None] = (
            next((task for task in tasks if task.aspect is aspect), None) for tasks in tasks_of
        )
        values: list[tuple[str | None, ...]] = []
        for task, score in zip(by_row, scores[aspect], strict=True):
            if score is None:
                values.append((None, None, None, None))
            else:
                description, implied, note = _one(desk, task, counts[str(aspect)])
                # A word alone would be half a conversation, which whoever learns from it has to take for a fault.
                word = None if description is None else desk.labels.bins[aspect].word(score)
                values.append((description, word, implied, note))
        names = teacher_columns(aspect)
        found |= {name: [value[i] for value in values] for i, name in enumerate(names)}
    return found


def _one(desk: Desk, task: Task | None, counts: Counter[str]) -> tuple[str | None, str | None, str | None]:
    """Description, implied rating and note of one image and aspect that has a score."""
    if task is None:
        counts["no_prompt"] += 1
        return None, None, "no prompt, without which it cannot be asked"
    state = desk.state(task)
    if state.kept is not None:
        counts["described"] += 1
        return state.kept.description, state.kept.rating, None
    if state.done:
        counts["given_up"] += 1
        return None, None, state.note
    if task.id in desk.unreadable:
        counts["unreadable"] += 1
        return None, None, f"image: {desk.unreadable[task.id]}"
    counts["left"] += 1
    return None, None, "not asked yet"
