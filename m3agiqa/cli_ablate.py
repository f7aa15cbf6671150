"""The commands that compare predictors: `m3agiqa ablate` and `m3agiqa cross-evaluate`."""

import argparse
from pathlib import Path
from typing import Any

from m3agiqa.ablate_config import AblateConfig
from m3agiqa.arguments import add_config, add_labels, aspect_columns, say
from m3agiqa.errors import UserError
from m3agiqa.settings import load


def add_ablate(commands: Any) -> argparse.ArgumentParser:
    """Adds the command to argparse's sub-parsers, and returns its parser."""
    ablate: argparse.ArgumentParser = commands.add_parser(
        "ablate", help="what each part of a predictor is worth: one is changed at a time"
    )
    _add_inputs(ablate)
    ablate.add_argument("--lm-head", metavar="MODEL", help="of the captured states, for capture=top_k")
    ablate.set_defaults(run=_ablate)
    return ablate


def add_cross_evaluate(commands: Any) -> argparse.ArgumentParser:
    """Adds the command to argparse's sub-parsers, and returns its parser."""
    cross: argparse.ArgumentParser = commands.add_parser(
        "cross-evaluate", help="train a predictor on each of several captured sets, test it on every one"
    )
    _add_inputs(cross)
    cross.set_defaults(run=_cross_evaluate)
    return cross


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        required=True,
        action="append",
        metavar="NAME=CAPTURED",
        help="folder of m3agiqa capture, and what it is called (default: the folder's name); several may be given",
    )
    parser.add_argument("--out", required=True, help="folder for the results; an earlier run in it is gone on with")
    add_labels(parser)
    add_config(parser)


def _ablate(args: argparse.Namespace) -> int:
    config, label = load(AblateConfig, args.config, args.set), _one_label(args)
    from m3agiqa.ablation.inputs import named
    from m3agiqa.ablation.report import markdown
    from m3agiqa.ablation.run import ablate
    from m3agiqa.training_run import out_folder

    out, (low, high) = out_folder(args.out), args.scale
    head = _lm_head(args.lm_head) if args.lm_head else None
    found = ablate(config, named(args.input), out, label, scale=(low, high), lm_head=head, say=say)
    print(markdown(found), end="")
    print(f"results: {args.out.rstrip('/')}/results.json, results.parquet, results.md")
    return 0


def _cross_evaluate(args: argparse.Namespace) -> int:
    config, label = load(AblateConfig, args.config, args.set), _one_label(args)
    from m3agiqa.ablation.inputs import named
    from m3agiqa.cross_evaluate import cross_evaluate, markdown
    from m3agiqa.training_run import out_folder

    out, (low, high) = out_folder(args.out), args.scale
    found = cross_evaluate(config, named(args.input), out, label, scale=(low, high), say=say)
    print(markdown(found), end="")
    print(f"matrix: {args.out.rstrip('/')}/matrix.json, matrix.md, matrix.png")
    return 0


def _one_label(args: argparse.Namespace) -> tuple[str, str]:
    columns = aspect_columns(args.label, "--label")
    if len(columns) > 1:
        raise UserError(f"--label {' '.join(args.label)}", "names several aspects", "compare one aspect at a time")
    [(aspect, column)] = columns.items()
    return str(aspect), column


def _lm_head(source: str) -> Any:
    from m3agiqa.config import ModelConfig
    from m3agiqa.models import model_folder
    from m3agiqa.predictor.lm_head import LMHead

    path = Path(source).expanduser()
    return LMHead.load(path if path.is_file() else model_folder(ModelConfig.model_validate({"path": source})))
