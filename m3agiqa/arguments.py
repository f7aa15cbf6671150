"""Arguments that several commands take, and how they are read."""

import argparse
import sys
from collections.abc import Sequence

from m3agiqa.aspects import SCALE_MAX, SCALE_MIN, Aspect
from m3agiqa.errors import UserError
from m3agiqa.records import Status


def add_config(parser: argparse.ArgumentParser) -> None:
    """Adds `--config` and `--set`."""
    parser.add_argument("--config", metavar="FILE", help="YAML file; see configs/ and `m3agiqa config --docs`")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="e.g. engine.kind=transformers"
    )


def add_labels(parser: argparse.ArgumentParser) -> None:
    """Adds `--label`, which must be given, and `--scale`."""
    parser.add_argument(
        "--label",
        required=True,
        nargs="+",
        action="extend",
        metavar="ASPECT=COLUMN",
        help="the column that holds an aspect's human scores",
    )
    add_scale(parser)


def add_scale(parser: argparse.ArgumentParser) -> None:
    """Adds `--scale`."""
    parser.add_argument(
        "--scale", nargs=2, type=float, default=(SCALE_MIN, SCALE_MAX), metavar=("LOW", "HIGH"), help="of the scores"
    )


def add_retry(parser: argparse.ArgumentParser) -> None:
    """Adds `--retry-failed` and `--retry-rejected`."""
    parser.add_argument("--retry-failed", action="store_true", help="score only the failed rows anew and replace them")
    parser.add_argument("--retry-rejected", action="store_true", help="the same with the rejected ones")


def retried(args: argparse.Namespace) -> list[Status]:
    """How rows ended that are to be scored anew."""
    chosen = {Status.FAILED: args.retry_failed, Status.REJECTED: args.retry_rejected}
    return [status for status, wanted in chosen.items() if wanted]


def aspect_columns(texts: Sequence[str], flag: str) -> dict[Aspect, str]:
    """The columns that `ASPECT=COLUMN` name, by aspect.

    Raises:
        UserError: for another form, a word that is no aspect, or an aspect that is named twice.
    """
    found: dict[Aspect, str] = {}
    for text in texts:
        aspect, equals, column = text.partition("=")
        if not equals or not column:
            raise UserError(f"{flag} {text}", "is not of the form ASPECT=COLUMN", "write e.g. quality=my_column")
        if aspect not in list(Aspect):
            raise UserError(f"{flag} {text}", f"{aspect!r} is no aspect", f"take one of {', '.join(Aspect)}")
        if Aspect(aspect) in found:
            raise UserError(f"{flag} {' '.join(texts)}", "names an aspect twice", "give each aspect one column")
        found[Aspect(aspect)] = column
    return found


def say(line: str) -> None:
    """Prints a line. Notes go beside what a command prints, as its output may be kept."""
    print(line, file=sys.stderr if line.startswith("note: ") else sys.stdout, flush=True)
