"""The commands that make and convert training conversations: `m3agiqa distil` and `m3agiqa conversations`."""

import argparse
from typing import Any

from m3agiqa.arguments import add_config, add_labels, aspect_columns, say
from m3agiqa.aspects import SCALE_MAX, SCALE_MIN, Aspect
from m3agiqa.conversation import WORDINGS
from m3agiqa.distil_config import DistilConfig
from m3agiqa.errors import UserError
from m3agiqa.ratings import NAMED_BINS, Bins, equal_bins, fits, mismatch
from m3agiqa.settings import load


def add_distil(commands: Any) -> argparse.ArgumentParser:
    """Adds the command to argparse's sub-parsers, and returns its parser."""
    distil = commands.add_parser(
        "distil", help="have an online model explain human scores: conversations to learn from"
    )
    distil.add_argument("--input", required=True, help="as for score, with columns of human scores")
    distil.add_argument("--out", required=True, help="local folder for the conversations; earlier answers are kept")
    add_labels(distil)
    distil.add_argument("--max-requests", type=int, metavar="N", help="stop when so many requests are answered, in all")
    distil.add_argument(
        "--max-cost", type=float, metavar="COST", help="stop before more is spent, in all; needs prices"
    )
    distil.add_argument("--blind", action="store_true", help="do not show the teacher the scores")
    distil.add_argument(
        "--batch", action="store_true", help="use the Batch API: answers within a day, at half the price"
    )
    distil.add_argument(
        "--dry-run", action="store_true", help="ask nothing; print the requests and what they would cost"
    )
    add_config(distil)
    distil.set_defaults(run=_distil)
    return distil


def add_conversations(commands: Any) -> argparse.ArgumentParser:
    """Adds the command to argparse's sub-parsers, and returns its parser."""
    aspects = [aspect.value for aspect in Aspect]
    talks = commands.add_parser("conversations", help="convert and check training conversations")
    talks.add_argument("--input", required=True, help="a published file (.json), or what distil wrote")
    talks.add_argument("--output", metavar="FILE", help="file to write: .json (published form) or .parquet (ours)")
    talks.add_argument("--aspect", required=True, choices=aspects, help="what the conversations are about")
    talks.add_argument("--images", metavar="FOLDER", help="where the images are, if not where the file says")
    talks.add_argument("--no-images", action="store_true", help="do not look whether the images are there")
    talks.add_argument("--skip-bad", action="store_true", help="name bad rows and go on without them")
    talks.add_argument("--wording", choices=sorted(WORDINGS), default="published", help="of questions that .json needs")
    check = talks.add_argument_group("check of the rating words against human scores")
    check.add_argument("--check", metavar="COLUMN", help="the column of scores that the words should be made from")
    check.add_argument("--scores", metavar="FILE", help="table with that column (default: the input itself)")
    check.add_argument("--scores-image", metavar="COLUMN", help="its column of image names (default: the usual names)")
    check.add_argument("--dataset", choices=sorted(NAMED_BINS), help="whose bins the words are made in")
    check.add_argument("--fix-words", action="store_true", help="make the words anew from that column, then write")
    check.add_argument("--scale", nargs=2, type=float, default=(SCALE_MIN, SCALE_MAX), metavar=("LOW", "HIGH"))
    talks.set_defaults(run=_conversations)
    return talks


def _distil(args: argparse.Namespace) -> int:
    flags = {"budget.max_requests": args.max_requests, "budget.max_cost": args.max_cost}
    given = [f"{key}={value}" for key, value in flags.items() if value is not None]
    given += [f"{key}=true" for key, used in (("ask.blind", args.blind), ("batch.use", args.batch)) if used]
    config = load(DistilConfig, args.config, [*args.set, *given])
    labels = aspect_columns(args.label, "--label")
    low, high = args.scale
    from m3agiqa.distil.run import distil, dry_run, summary

    if args.dry_run:
        for line in _plan_lines(dry_run(config, args.input, args.out, labels, (low, high), say=say)):
            print(line)
        return 0
    for line in summary(distil(config, args.input, args.out, labels, (low, high), say=say), args.out):
        print(line)
    return 0


def _plan_lines(plan: Any) -> list[str]:
    tokens = f"{plan.usage.input:,} tokens in, {plan.usage.output:,} out"
    cost = "" if plan.cost is None else f", cost about {plan.cost:.4f}"
    lines = [f"to ask: {plan.tasks} descriptions, one request each: about {tokens}{cost}"]
    most = "" if plan.most_cost is None else f", cost about {plan.most_cost:.4f}"
    lines.append(f"at most, if answers have to be asked again: {plan.most_requests} requests{most}")
    if plan.cost is None:
        lines.append("no cost: budget.input_price and budget.output_price are not set")
    return lines


def _conversations(args: argparse.Namespace) -> int:
    from m3agiqa.conversation_files import read_talks, write_ours, write_published

    if args.output is None and args.check is None:
        raise UserError("m3agiqa conversations", "is told neither to write nor to check", "give --output or --check")
    if args.fix_words and args.check is None:
        raise UserError("--fix-words", "is not told from which scores", "name their column: --check COLUMN")
    if args.output is not None and not args.output.lower().endswith((".json", ".parquet")):
        raise UserError(f"--output {args.output}", "ends neither in .json nor in .parquet", "name the form by its end")
    talks = read_talks(args.input, Aspect(args.aspect), images=args.images, look=not args.no_images)
    for line in talks.check(args.input, skip_bad=args.skip_bad):
        say(f"note: left out: {line}")
    if args.check is not None:
        _check(args, talks)
    if args.output is not None:
        if args.output.lower().endswith(".json"):
            write_published(talks, args.output, args.wording)
        else:
            write_ours(talks, args.output)
        print(f"{len(talks.rows)} conversations: {args.output}")
    return 0


def _check(args: argparse.Namespace, talks: Any) -> None:
    from m3agiqa.conversation_files import make_words, scores_of

    scores, bins = scores_of(talks, args.scores, args.scores_image), _bins(args)
    if args.check not in scores:
        raise UserError(
            f"--check {args.check}", "there is no such column of numbers", f"take one of {', '.join(scores)}"
        )
    found = fits([row.get(talks.rating) for row in talks.rows], scores, bins)
    for fit in found:
        print(
            f"{fit.column}: {fit.same:.1%} of {fit.rows} words are those of the score, {fit.within_one:.1%} within one"
        )
    problem = mismatch(found, args.check)
    if args.fix_words:
        changed, without = make_words(talks, scores[args.check], bins)
        left_out = f", {without} conversations without a score left out" if without else ""
        print(f"{changed} words made anew from {args.check}{left_out}")
    elif problem is not None:
        raise UserError(f"--check {args.check}", problem, "make them from the right scores: --fix-words")


def _bins(args: argparse.Namespace) -> Bins:
    low, high = args.scale
    if not low < high:
        raise UserError(f"--scale {low:g} {high:g}", "does not go up", "give the lowest score, then the highest")
    if args.dataset is None:
        return equal_bins(low, high)
    if (bins := NAMED_BINS[args.dataset].get(Aspect(args.aspect))) is None:
        raise UserError(f"--dataset {args.dataset}", f"states no bins for {args.aspect}", "give --scale LOW HIGH")
    return bins
