"""Opens and checks what is compared, before any work is done."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from m3agiqa.ablation.data import Input, open_input
from m3agiqa.errors import UserError
from m3agiqa.predictor.captured import common_states_of, open_captured
from m3agiqa.predictor.lm_head import LMHead

_NAME = re.compile(r"[A-Za-z0-9_.-]+")


def named(texts: Sequence[str]) -> dict[str, str]:
    """`NAME=FOLDER`, or a folder that is called as it is -> the folders by name.

    Raises:
        UserError: for a name that is given twice or is none.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, uri = text.partition("=")
        if not equals:
            name, uri = text.rstrip("/").rpartition("/")[2], text
        if not _NAME.fullmatch(name) or not uri:
            raise UserError(f"--input {text}", "has no plain name", "write NAME=FOLDER, with letters and digits")
        if name in found:
            raise UserError(f"--input {text}", f"{name} is there already", "write NAME=FOLDER, with another name")
        found[name] = uri
    return found


def open_inputs(
    uris: Mapping[str, str],
    label: tuple[str, str],
    scale: tuple[float, float],
    folder: Path,
    lm_head: LMHead | None = None,
    top_k: int = 0,
) -> dict[str, Input]:
    """The inputs by name.

    Args:
        label: an aspect and the column of its human scores. folder: for the mapped states.

    Raises:
        UserError: for a set that is none, sets of different models, labels or a scale that cannot be.
    """
    if not scale[0] < scale[1]:
        said = f"--scale {scale[0]:g} {scale[1]:g}"
        raise UserError(said, "does not go up", "give the lowest label, then the highest")
    sets = {name: open_captured(uri) for name, uri in uris.items()}
    common_states_of(list(sets.values()), label[:1])
    found = {name: open_input(name, one, label, scale, folder) for name, one in sets.items()}
    widths = {name: one.width for name, one in found.items()}
    if len(set(widths.values())) > 1:
        shown = ", ".join(f"{width} in {name}" for name, width in widths.items())
        raise UserError("--input", f"the states have different widths: {shown}", "give sets of one model")
    for one in found.values():
        one.lm_head, one.top_k = lm_head, top_k
    return found
