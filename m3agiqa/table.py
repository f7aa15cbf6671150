"""Scores as a table for people."""

import pyarrow as pa
from rich.console import Console
from rich.table import Table
from rich.text import Text

from m3agiqa.aspects import Aspect
from m3agiqa.records import Status

_COLOURS = {"bad": "red", "poor": "dark_orange", "fair": "yellow", "good": "green", "excellent": "bright_green"}
_PROMPT_CHARS = 46
COLUMNS = ["id", "image", "prompt", "status", "error"] + [
    f"{aspect}_{suffix}" for aspect in Aspect for suffix in ("rating", "rating_score", "mos", "mos_low", "mos_high")
]
"""The columns of a scores file that the table needs."""


def print_scores(rows: pa.Table, console: Console, limit: int = 50) -> None:
    """Prints up to `limit` rows: image, prompt, and for each aspect the rating and its score (0 to 5).

    The score is the predictor's mean opinion score with its interval where there is one, else the expected
    value of the rating words. A dash stands for what could not be judged.
    """
    aspects = [a for a in Aspect if rows[f"{a}_rating_score"].null_count < rows.num_rows]
    table = Table(box=None, pad_edge=False, header_style="bold", row_styles=("", "dim"))
    table.add_column("image", no_wrap=True, overflow="ellipsis", max_width=34)
    table.add_column("prompt", no_wrap=True, overflow="ellipsis", max_width=_PROMPT_CHARS)
    for aspect in aspects:
        table.add_column(str(aspect), no_wrap=True)
    for row in rows.slice(0, limit).to_pylist():
        prompt = " ".join((row["prompt"] or "").split())
        cells: list[Text | str] = [Text(str(row["image"]).rsplit("/", 1)[-1]), Text(prompt or "-")]
        if row["status"] == Status.OK:
            cells += [_cell(row, aspect) for aspect in aspects]
        else:
            cells.append(Text(row["status"], style="red"))
        table.add_row(*cells)
    console.print(table)
    for row in rows.slice(0, limit).to_pylist():
        if row["status"] != Status.OK:
            console.print(Text(f"{str(row['image']).rsplit('/', 1)[-1] or row['id']}: {row['status']}: {row['error']}"))
    if rows.num_rows > limit:
        console.print(f"... and {rows.num_rows - limit} more")


def _cell(row: dict[str, object], aspect: Aspect) -> Text:
    rating, mos, score = (row[f"{aspect}_{suffix}"] for suffix in ("rating", "mos", "rating_score"))
    value = mos if mos is not None else score
    if value is None:
        return Text("-")
    low, high = row[f"{aspect}_mos_low"], row[f"{aspect}_mos_high"]
    interval = "" if low is None else f" [{low:.1f}, {high:.1f}]"
    return Text(f"{value:.2f}{interval} {rating or '?'}", style=_COLOURS.get(str(rating), ""))
