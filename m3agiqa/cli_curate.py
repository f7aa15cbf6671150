"""The commands that make training sets of scores: `m3agiqa curate` and `m3agiqa export`."""

import argparse
from typing import Any

from m3agiqa.arguments import add_config, say
from m3agiqa.aspects import Aspect
from m3agiqa.curation.recipe import Recipe
from m3agiqa.errors import UserError
from m3agiqa.export.rows import FORMATS, Captions
from m3agiqa.settings import load


def add_curate(commands: Any) -> argparse.ArgumentParser:
    """Adds the command to argparse's sub-parsers, and returns its parser."""
    curate: argparse.ArgumentParser = commands.add_parser(
        "curate", help="choose the rows of a training set by a recipe; every removal is recorded"
    )
    curate.add_argument("scores", help="folder of m3agiqa score (or capture, or curate)")
    curate.add_argument("--out", required=True, help="a new folder for the rows that are kept")
    curate.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="SQL",
        help='a condition on the columns, after those of the recipe: "quality_mos_low > 3"; several may be given',
    )
    add_config(curate)
    curate.set_defaults(run=_curate)
    return curate


def add_export(commands: Any) -> argparse.ArgumentParser:
    """Adds the command to argparse's sub-parsers, and returns its parser."""
    export: argparse.ArgumentParser = commands.add_parser(
        "export", help="write a curated set, or scores, in the layout that a trainer reads"
    )
    export.add_argument("scores", help="folder of m3agiqa curate (or score)")
    export.add_argument(
        "--out", required=True, help="folder for the training set; an export begun there is gone on with"
    )
    export.add_argument("--format", required=True, choices=FORMATS, help="the trainer's layout")
    export.add_argument(
        "--images", choices=["copy", "reference"], default="copy", help="bit for bit (default), or by link or path"
    )
    export.add_argument("--caption", choices=["prompt", "description", "both"], default="prompt", help="default prompt")
    export.add_argument(
        "--aspect", choices=list(Aspect), default=Aspect.QUALITY, help="whose description a caption has"
    )
    export.add_argument(
        "--tags", action="store_true", help='add words for the scores: "good quality, fair authenticity"'
    )
    export.add_argument("--rows-per-shard", type=int, metavar="N", help="default 10,000 in a folder, 1,000 in a file")
    export.set_defaults(run=_export)
    return export


def _export(args: argparse.Namespace) -> int:
    if args.rows_per_shard is not None and args.rows_per_shard < 1:
        raise UserError(f"--rows-per-shard {args.rows_per_shard}", "a shard has one row at least", "give 1 or more")
    from m3agiqa.export.run import Options, export

    captions = Captions(args.caption, Aspect(args.aspect), args.tags)
    options = Options(args.format, captions, args.images == "reference", args.rows_per_shard)
    what = "pairs" if args.format == "diffusion-dpo" else "rows"
    for part, count in export(args.scores, args.out, options).items():
        say(f"{part}: {count:,} {what}")
    say(f"exported: {args.out}")
    return 0


def _curate(args: argparse.Namespace) -> int:
    recipe = load(Recipe, args.config, args.set)
    if args.where:
        rows = recipe.rows.model_copy(update={"where": (*recipe.rows.where, *args.where)})
        recipe = recipe.model_copy(update={"rows": rows})
    from m3agiqa.curate import curate

    done = curate(recipe, args.scores, args.out, verbose=args.verbose)
    for note in done.funnel.notes:
        say(f"note: {note}")
    for line in done.funnel.lines():
        say(line)
    for part, rows in done.sheet.get("split", {}).items():
        say(f"{part}: {rows:,} rows")
    if "pairs" in done.sheet:
        say(f"pairs: {done.sheet['pairs']:,}")
    out = args.out.rstrip("/")
    say(f"curated: {out}/scores/*.parquet, what was dropped and why: {out}/removed.parquet")
    from m3agiqa.report import report_after

    say(report_after(out))
    return 0
