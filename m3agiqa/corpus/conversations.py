"""The published conversation files (github.com/strawhatboy/M3-AGIQA, `*_quality.json`) as rows, and any JSON array.

Such a file is one array of objects with an `id`, an `image` (a path of the authors' machine) and `conversations`: four
messages of `role` and `content`, of which the second is a teacher's description and the fourth its rating word.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from m3agiqa.corpus import files
from m3agiqa.corpus.rows import ROWS_PER_TABLE, shorten
from m3agiqa.errors import UserError

DESCRIPTION, RATING = "description_given", "rating_given"
"""The columns that the first and the second answer of a conversation become."""
ERROR = "conversation_error"
"""The column that says what is wrong with a conversation, where such rows are wanted (`lenient`)."""

# The last quote that ends a sentence: a prompt may hold quotes, and what follows it holds "image's".
_PROMPT = re.compile(r"original prompt is:\s*'(.*)'\.(?:\s|$)", re.DOTALL)
_ROLES = ("user", "assistant", "user", "assistant")
_FORM = "is not user, assistant, user, assistant, each with a text"


def objects(uri: str, *, lenient: bool = False) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """Lists of (number of the item, object) of a file that holds one JSON array, conversations taken apart.

    The file is read whole: a hundred bytes or a kilobyte for each row, as its images are not in it.

    Args:
        lenient: a conversation of another form becomes a row without one, and with `ERROR`.

    Raises:
        UserError: not UTF-8, not JSON, not an array, an item that is no object, or a conversation of another form.
    """
    items = _array(uri)
    for start in range(0, len(items), ROWS_PER_TABLE):
        part = items[start : start + ROWS_PER_TABLE]
        for number, item in enumerate(part, start=start):
            if not isinstance(item, dict):
                raise UserError(f"input {uri}", f"item {number} is no JSON object", "give an array of objects")
        yield [(number, _flat(uri, number, item, lenient)) for number, item in enumerate(part, start=start)]


def prompt_in(question: str) -> str | None:
    """What an image was made from, as a published first question quotes it; None where it quotes nothing."""
    found = _PROMPT.search(question)
    return found.group(1) if found else None


def _array(uri: str) -> list[Any]:
    value = f"input {uri}"
    with files.open_stream(uri, "detect") as stream:
        data = stream.read()
    try:
        items = json.loads(data.decode("utf-8-sig"))
        if b"\\ud" in data or b"\\uD" in data:
            json.dumps(items, ensure_ascii=False).encode()  # half a surrogate pair fits no Arrow string
    except UnicodeError as error:
        raise UserError(value, f"it is not UTF-8: {shorten(error)}", "save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        cure = "mend it; a file with one object on each line is named .jsonl"
        raise UserError(value, f"it is not JSON: {shorten(error)}", cure) from error
    if not isinstance(items, list):
        rule = f"it holds one {type(items).__name__}, not an array of objects"
        raise UserError(value, rule, "give an array, or one object on each line of a .jsonl file")
    return items


def _flat(uri: str, number: int, item: dict[str, Any], lenient: bool) -> dict[str, Any]:
    """An item without its conversation, whose parts become columns; any other item as it is."""
    if "conversations" not in item:
        return item
    talk = item["conversations"]
    roles = tuple(m.get("role") if isinstance(m, dict) else None for m in talk) if isinstance(talk, list) else ()
    wrong = not roles or roles != _ROLES[: len(roles)] or not all(isinstance(m.get("content"), str) for m in talk)
    if wrong and not lenient:
        rule = f"the conversation of item {number} {_FORM}"
        raise UserError(f"input {uri}", rule, "give messages of role and content, as the published files have them")
    given = [] if wrong else [message["content"] for message in talk]
    texts = given + [None] * (len(_ROLES) - len(given))
    made: dict[str, Any] = {"prompt": prompt_in(texts[0] or ""), DESCRIPTION: texts[1], RATING: texts[3]}
    if lenient:
        made[ERROR] = f"its conversation {_FORM}" if wrong else None
    flat = {name: value for name, value in item.items() if name != "conversations"}
    if isinstance(image := item.get("image"), str):
        flat["image"] = _image(image)
    return made | flat


def _image(image: str) -> str:
    """Of an absolute path of another machine only the last part means anything here."""
    absent = image.startswith("/") and files.kind_of(image) != "file"
    return image.rsplit("/", 1)[-1] if absent else image
