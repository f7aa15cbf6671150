"""The commands that train: `m3agiqa finetune` and `m3agiqa train-predictor`."""

import argparse
from typing import Any

from m3agiqa.arguments import add_config, add_labels, add_scale, aspect_columns, say
from m3agiqa.finetune_config import FinetuneConfig
from m3agiqa.settings import load
from m3agiqa.train_config import TrainConfig


def add_finetune(commands: Any) -> argparse.ArgumentParser:
    """Adds the command to argparse's sub-parsers, and returns its parser."""
    tune: argparse.ArgumentParser = commands.add_parser(
        "finetune", help="train a LoRA adapter on a teacher's descriptions and ratings"
    )
    tune.add_argument(
        "--input", required=True, action="append", help="as for score, with the teacher's answers; several may be given"
    )
    tune.add_argument(
        "--validation",
        action="append",
        default=[],
        metavar="INPUT",
        help="corpus to choose the best step by (default: a share of the input, by prompt)",
    )
    tune.add_argument("--out", required=True, help="folder for the adapter; logs go beside it, to OUT.training")
    for flag, what in (
        ("--description", "the descriptions (default teacher_ASPECT_description)"),
        ("--rating", "the rating words (default teacher_ASPECT_rating)"),
        ("--label", "human scores: to measure by, and to make rating words of where there are none"),
    ):
        tune.add_argument(
            flag, nargs="+", action="extend", default=[], metavar="ASPECT=COLUMN", help=f"the column that holds {what}"
        )
    add_scale(tune)
    tune.add_argument("--skip-bad", action="store_true", help="go on without rows that cannot be used")
    add_config(tune)
    tune.set_defaults(run=_finetune)
    return tune


def add_train_predictor(commands: Any) -> argparse.ArgumentParser:
    """Adds the command to argparse's sub-parsers, and returns its parser."""
    train: argparse.ArgumentParser = commands.add_parser(
        "train-predictor", help="train a predictor on captured states and human scores"
    )
    train.add_argument("--input", required=True, action="append", metavar="CAPTURED", help="folder of m3agiqa capture")
    train.add_argument(
        "--validation",
        action="append",
        default=[],
        metavar="CAPTURED",
        help="captured folder to choose the best epoch by (default: a share of the input, by prompt)",
    )
    train.add_argument("--out", required=True, help="folder for the predictor; logs go beside it, to OUT.training")
    add_labels(train)
    add_config(train)
    train.set_defaults(run=_train_predictor)
    return train


def _finetune(args: argparse.Namespace) -> int:
    config = load(FinetuneConfig, args.config, args.set)
    flags = ("--description", "--rating", "--label")
    descriptions, ratings, labels = (aspect_columns(getattr(args, flag[2:]), flag) for flag in flags)
    from m3agiqa.finetune import finetune, summary
    from m3agiqa.finetuning.talks import Columns

    columns = Columns(descriptions, ratings, labels, tuple(args.scale))
    done = finetune(
        config,
        args.input,
        args.out,
        columns,
        validation=args.validation,
        skip_bad=args.skip_bad,
        verbose=args.verbose,
        say=say,
    )
    for line in summary(done, config):
        print(line)
    return 0


def _train_predictor(args: argparse.Namespace) -> int:
    config = load(TrainConfig, args.config, args.set)
    columns = aspect_columns(args.label, "--label")
    from m3agiqa.train_predictor import train_predictor
    from m3agiqa.training_run import summary

    labels = {str(aspect): column for aspect, column in columns.items()}
    low, high = args.scale
    done = train_predictor(
        config,
        args.input,
        args.out,
        labels,
        validation=args.validation,
        scale=(low, high),
        verbose=args.verbose,
        say=say,
    )
    for line in summary(done, args.out):
        print(line)
    return 0
