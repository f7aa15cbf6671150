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

# The last quote that ends a sentence: a prompt may hold quotes, and what follows it holds "image's". The wordings are
# those of the published files: one of them goes on without a full stop.
_PROMPT = re.compile(
    r"original prompt(?: for the image)?(?: is| was)?:\s*'(.*)'(?:\.(?:\s|$)|(?=\s+What can you deduce ))", re.DOTALL
)
ROLES = ("user", "assistant", "user", "assistant")
"""Who says the messages of a whole conversation."""


def objects(uri: str, *, lenient: bool = False) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """Lists of (number of the item, object) of a file that holds one JSON array, conversations taken apart.

    The file is read whole: a hundred bytes or a kilobyte for each row, as its images are not in it.

    Args:
        lenient: a conversation of another form becomes a row without one, and with `ERROR`; one without an answer has
            `ERROR`, too.

    Raises:
        UserError: not UTF-8, not JSON, not an array, an item that is no object, or a conversation of another form.
    """
    items = array(uri)
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


def array(uri: str) -> list[Any]:
    """The items of a file that holds one JSON array.

    Raises:
        UserError: not UTF-8, not JSON, or not an array.
    """
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
    made: dict[str, Any]
    try:
        said = texts(item["conversations"])
        whole = said + [None] * (len(ROLES) - len(said))
        made = {"prompt": prompt_in(said[0]), DESCRIPTION: whole[1], RATING: whole[3]}
        made |= {ERROR: None if "".join(said[1::2]).strip() else "its conversation holds no answer"} if lenient else {}
    except ValueError as error:
        rule = f"is not user, assistant, user, assistant, each with a text ({error})"
        if not lenient:
            cure = "give messages of role and content, as the published files have them"
            raise UserError(f"input {uri}", f"the conversation of item {number} {rule}", cure) from None
        made = {"prompt": None, DESCRIPTION: None, RATING: None, ERROR: f"its conversation {rule}"}
    flat = {name: value for name, value in item.items() if name != "conversations"}
    if isinstance(image := item.get("image"), str):
        flat["image"] = image_here(image)
    return made | flat


def texts(talk: object) -> list[str]:
    """The texts of a conversation, which may end early.

    Raises:
        ValueError: it is no list of messages, or one of them is not by whom its place asks for, or has no text.
    """
    if not isinstance(talk, list) or not talk:
        raise ValueError("no list of messages")
    if len(talk) > len(ROLES):
        raise ValueError(f"{len(talk)} messages")
    for number, (message, role) in enumerate(zip(talk, ROLES, strict=False)):
        found = message.get("role") if isinstance(message, dict) else None
        if found != role:
            raise ValueError(f"message {number} has the role {found!r}, not {role}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"message {number} has no text")
    return [message["content"] for message in talk]


def image_here(image: str) -> str:
    """Of an absolute path of another machine only the last part means anything here."""
    absent = image.startswith("/") and files.kind_of(image) != "file"
    return image.rsplit("/", 1)[-1] if absent else image
