"""The commands `m3agiqa evaluate` and `m3agiqa split`."""

import argparse
from collections.abc import Sequence
from typing import Any

from m3agiqa.arguments import aspect_columns, say
from m3agiqa.errors import UserError


def add_evaluate(commands: Any) -> argparse.ArgumentParser:
    """Adds the command to argparse's sub-parsers, and returns its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "evaluate", help="compare scores with human scores: figures with intervals, baselines, plots, a report"
    )
    parser.add_argument("--scores", required=True, help="output folder of score, or a table (parquet, CSV, JSON)")
    parser.add_argument("--out", required=True, help="folder for evaluation.json, errors.parquet, report.md, plots/")
    parser.add_argument("--truth", help="table or data set's folder with the human scores (default: the scores' own)")
    parser.add_argument("--dataset", metavar="NAME", help="agiqa-3k, aigciqa2023 or aigiqa-20k, in --truth")
    _columns(parser, "--label", "human scores; not needed with --dataset")
    _columns(parser, "--prediction", "scores, 0 to 5 (default ASPECT_mos, then ASPECT_rating_score)")
    _columns(parser, "--words", "rating words or answers that hold one (default ASPECT_rating)")
    parser.add_argument(
        "--scale", nargs=2, type=float, metavar=("LOW", "HIGH"), help="of the human scores (default 0 5)"
    )
    parser.add_argument(
        "--other",
        action="append",
        default=[],
        metavar="NAME=FILE:COLUMN",
        help="another scorer's results, joined by id; {aspect} in COLUMN stands for the aspect",
    )
    parser.add_argument("--split", metavar="FILE", help="of m3agiqa split (columns id, image and part)")
    parser.add_argument("--part", help="the part of --split that is evaluated (default test)")
    parser.add_argument("--train", metavar="FILE", help="instead of --split: a table of the rows that were trained on")
    parser.add_argument("--predictor", metavar="DIR", help="what made the scores, if their run.json does not say")
    parser.add_argument("--force", action="store_true", help="go on where training has met the test set; is marked")
    parser.add_argument("--no-plots", action="store_true", help="figures and tables only")
    _keys(parser)
    parser.add_argument("--samples", type=int, default=1000, help="bootstrap draws (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    parser.set_defaults(run=_evaluate)
    return parser


def _columns(parser: argparse.ArgumentParser, flag: str, what: str) -> None:
    parser.add_argument(
        flag, nargs="+", action="extend", default=[], metavar="ASPECT=COLUMN", help=f"the column that holds {what}"
    )


def _keys(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--id-column", default="id", metavar="COLUMN", help="of the tables (default id)")
    parser.add_argument(
        "--key", choices=["id", "image"], help="what tables are joined by (default ids, else the images' file names)"
    )


def _evaluate(args: argparse.Namespace) -> int:
    if args.samples < 100:
        raise UserError(f"--samples {args.samples}", "are too few for a 95 % interval", "give at least 100")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}", "is negative", "give 0 or more")
    from m3agiqa.evaluate import evaluate
    from m3agiqa.evaluation.gather import Request
    from m3agiqa.evaluation.report import summary

    request = Request(
        scores=args.scores,
        out=args.out,
        truth=args.truth,
        dataset=args.dataset,
        labels=aspect_columns(args.label, "--label"),
        scale=None if args.scale is None else (args.scale[0], args.scale[1]),
        predictions=aspect_columns(args.prediction, "--prediction"),
        words=aspect_columns(args.words, "--words"),
        others=_others(args.other),
        split=args.split,
        part=args.part,
        train=args.train,
        predictor=args.predictor,
        key=args.key,
        id_column=args.id_column,
        force=args.force,
        plots=not args.no_plots,
        samples=args.samples,
        seed=args.seed,
    )
    result = evaluate(request)
    for line in (*result["forced"], *result["notes"]):
        say(f"note: {line}")
    for line in summary(result):
        print(line)
    print(f"report: {args.out.rstrip('/')}/report.md (docs/numbers.md says what the figures mean)")
    return 0


def _others(texts: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Name -> file and column."""
    found: dict[str, tuple[str, str]] = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        uri, colon, column = rest.rpartition(":")
        if not (equals and colon and name and uri and column):
            raise UserError(f"--other {text}", "is not of the form NAME=FILE:COLUMN", "write e.g. hps=hps.csv:score")
        if name in found:
            raise UserError(f"--other {text}", f"{name} is there already", "give each scorer a name of its own")
        found[name] = uri, column
    return found


def add_split(commands: Any) -> argparse.ArgumentParser:
    """Adds the command to argparse's sub-parsers, and returns its parser."""
    parser: argparse.ArgumentParser = commands.add_parser("split", help="split a corpus into parts, as a file")
    parser.add_argument("--input", required=True, help="a corpus as for score, a table, or a data set's folder")
    parser.add_argument(
        "--out", required=True, help="a new .parquet or .csv of id, image and part; FILE.json goes beside it"
    )
    parser.add_argument("--dataset", metavar="NAME", help="agiqa-3k, aigciqa2023 or aigiqa-20k, in --input")
    parser.add_argument(
        "--by",
        choices=["random", "prompt", "generator", "official"],
        default="prompt",
        help="what stays whole (default prompt); official: the column split, or --official",
    )
    parser.add_argument("--shares", default="train=0.8,test=0.2", help="of the rows (default train=0.8,test=0.2)")
    parser.add_argument("--folds", type=int, metavar="K", help="instead of shares: parts fold-0 to fold-(K-1)")
    parser.add_argument(
        "--official", nargs="+", action="extend", default=[], metavar="PART=FILE", help="a published part's file"
    )
    parser.add_argument("--label", metavar="COLUMN", help="human scores that the parts are stratified by")
    parser.add_argument("--no-images", action="store_true", help="do not look for near-duplicate images")
    parser.add_argument("--near", type=int, default=6, metavar="BITS", help="how near duplicates are (default 6 of 64)")
    parser.add_argument("--id-column", default="id", metavar="COLUMN", help="of the table (default id)")
    parser.add_argument("--seed", type=int, default=0, help="of the split (default 0)")
    parser.set_defaults(run=_split)
    return parser


def _split(args: argparse.Namespace) -> int:
    from m3agiqa.evaluation.splits import shares_of
    from m3agiqa.split import SplitRequest, split, summary

    files = {}
    for text in args.official:
        part, equals, uri = text.partition("=")
        if part not in ("train", "val", "test") or not equals or not uri:
            raise UserError(f"--official {text}", "is not of the form PART=FILE", "write e.g. train=train.json")
        files[part] = uri
    if files and args.by != "official":
        raise UserError("--official", f"is given with --by {args.by}", "add --by official")
    content = split(
        SplitRequest(
            input=args.input,
            out=args.out,
            by=args.by,
            dataset=args.dataset,
            shares=shares_of(args.shares),
            folds=args.folds,
            official=files,
            label=args.label,
            seed=args.seed,
            images=not args.no_images,
            distance=args.near,
            id_column=args.id_column,
        )
    )
    for line in summary(content):
        print(line)
    print(f"split: {args.out}")
    return 0
