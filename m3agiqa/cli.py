"""The command line: `m3agiqa score | capture | distil | finetune | train-predictor | show | ...`; see `--help`."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from rich.console import Console

from m3agiqa import __version__
from m3agiqa.arguments import add_config, aspect_columns
from m3agiqa.aspects import Aspect
from m3agiqa.cli_distil import add_conversations, add_distil
from m3agiqa.cli_train import add_finetune, add_train_predictor
from m3agiqa.config import Config, RunConfig, describe_config, dump_config, load, load_config
from m3agiqa.distil_config import DistilConfig
from m3agiqa.errors import UserError
from m3agiqa.finetune_config import FinetuneConfig
from m3agiqa.train_config import TrainConfig

_KINDS: dict[str, type[Config]] = {
    "score": RunConfig,
    "distil": DistilConfig,
    "finetune": FinetuneConfig,
    "train-predictor": TrainConfig,
}
"""The commands that are configured."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0, or 2 for something the user can mend, or 1 for an error of ours."""
    args = _parser().parse_args(argv)
    level = logging.INFO if args.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    try:
        return int(args.run(args) or 0)
    except UserError as error:
        print(f"m3agiqa: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("m3agiqa: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if args.verbose:
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        print(f"m3agiqa: {type(error).__name__}: {reason} (-v shows where)", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="m3agiqa", description="Scores AI-generated images the way people would, at the scale they are made."
    )
    parser.add_argument("--version", action="version", version=f"m3agiqa {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    score = commands.add_parser("score", help="score a corpus of images into parquet")
    score.add_argument("--input", required=True, help="folder, CSV/JSONL/parquet manifest or tars; local or a URI")
    score.add_argument("--output", required=True, help="folder for the scores; an earlier run in it is gone on with")
    add_config(score)
    score.set_defaults(run=_score)

    capture = commands.add_parser("capture", help="score a corpus and keep the states that a predictor is trained on")
    capture.add_argument("--input", required=True, help="as for score, or a published conversation file (JSON)")
    capture.add_argument("--output", required=True, help="folder for the states; an earlier run in it is gone on with")
    capture.add_argument(
        "--prefer",
        choices=["own", "given"],
        help="whose description the conversation goes on with (default own: what a predictor will see in use)",
    )
    capture.add_argument(
        "--description",
        metavar="ASPECT=COLUMN",
        nargs="+",
        action="extend",
        default=[],
        help="with --prefer given: the column that holds an aspect's description",
    )
    add_config(capture)
    capture.set_defaults(run=_capture)

    show = commands.add_parser("show", help="print the scores of an output folder as a table")
    show.add_argument("output", help="what --output named")
    show.add_argument("--rows", type=int, default=50, help="most rows to print (default 50)")
    show.set_defaults(run=_show)

    merge = commands.add_parser("merge-adapter", help="merge a PEFT adapter into a full checkpoint")
    merge.add_argument("--model", required=True, help="`tiny`, a folder or a hub id")
    merge.add_argument("--adapter", required=True, help="a folder or a hub id")
    merge.add_argument("--out", required=True, help="a new folder for the merged checkpoint")
    merge.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the checkpoint's")
    merge.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    merge.set_defaults(run=_merge_adapter)

    imported = commands.add_parser("import-predictor", help="turn a released predictor checkpoint into a folder")
    imported.add_argument("file", metavar="FILE", help="Lightning checkpoint of the M3-AGIQA reference")
    imported.add_argument("--out", required=True, help="a new folder for the predictor")
    imported.add_argument("--lm-head", metavar="MODEL", help="model folder, hub id or safetensors to fold it onto")
    imported.add_argument(
        "--aspect",
        choices=[aspect.value for aspect in Aspect],
        default="quality",
        help="what it predicts (default quality)",
    )
    imported.set_defaults(run=_import_predictor)

    made = [add(commands) for add in (add_distil, add_conversations, add_finetune, add_train_predictor)]

    config = commands.add_parser("config", help="print the configuration")
    config.add_argument("--kind", choices=list(_KINDS), default="score", help="of which command (default score)")
    config.add_argument("--show", action="store_true", help="print the effective configuration (the default)")
    config.add_argument("--docs", action="store_true", help="print every key with its default and its meaning")
    add_config(config)
    config.set_defaults(run=_config)

    for command in (score, capture, show, merge, imported, *made, config):
        command.add_argument("-v", "--verbose", action="store_true", help="what Ray and the engine say; tracebacks")
    return parser


def _score(args: argparse.Namespace) -> int:
    return _run(args, load_config(args.config, args.set), "scores")


def _capture(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.set)
    first_answer = args.prefer or config.capture.first_answer
    descriptions = config.capture.descriptions | aspect_columns(args.description, "--description")
    if descriptions and first_answer == "own":
        value = "--description " + " ".join(f"{aspect}={column}" for aspect, column in descriptions.items())
        raise UserError(value, "is read with --prefer given only", "add --prefer given, or leave it out")
    capture = config.capture.model_copy(
        update={"kind": "states", "write": True, "first_answer": first_answer, "descriptions": descriptions}
    )
    predictor = config.predictor.model_copy(update={"path": None})
    return _run(args, config.model_copy(update={"capture": capture, "predictor": predictor}), "states")


def _run(args: argparse.Namespace, config: RunConfig, what: str) -> int:
    from m3agiqa.pipeline import run_scoring
    from m3agiqa.progress import duration
    from m3agiqa.runs import engine_line, predictor_line, status_line

    manifest = run_scoring(config, args.input, args.output, verbose=args.verbose)
    rate = f" ({manifest.images_per_second:.1f} images/s once the engine was up)" if manifest.images_per_second else ""
    print(f"{status_line(manifest.counts)} in {duration(manifest.seconds or 0)}{rate}")
    if (line := engine_line(manifest.engine)) is not None:
        print(f"engine: {line}")
    if (line := predictor_line(manifest)) is not None:
        print(f"predictor: {line}")
    if not manifest.counts:
        print(f"nothing to score in {args.input}")
        return 0
    print(f"{what}: {args.output.rstrip('/')}/scores/*.parquet (m3agiqa show {args.output})")
    return 0


def _show(args: argparse.Namespace) -> int:
    from m3agiqa.runs import Output, status_line
    from m3agiqa.table import COLUMNS, print_scores

    output = Output(args.output)
    rows = output.rows(COLUMNS).sort_by("id")
    wide = None if sys.stdout.isatty() else 160
    print_scores(rows, Console(width=wide), args.rows)
    print(status_line(output.count_by_status()))
    return 0


def _merge_adapter(args: argparse.Namespace) -> int:
    from m3agiqa.adapters import merge_adapter

    folder = merge_adapter(
        args.model, args.adapter, args.out, trust_remote_code=args.trust_remote_code, dtype=args.dtype
    )
    print(f"merged checkpoint: {folder} (use it with --set model.path={folder})")
    return 0


def _import_predictor(args: argparse.Namespace) -> int:
    from m3agiqa.predictor.published import import_predictor

    predictor = import_predictor(args.file, args.out, lm_head=args.lm_head, outputs=(str(args.aspect),))
    print(f"predictor: {args.out} (takes {predictor.head.config.takes} of {predictor.head.config.input_width} numbers)")
    return 0


def _config(args: argparse.Namespace) -> int:
    kind = _KINDS[args.kind]
    if args.docs:
        print(describe_config(kind))
    else:
        print(dump_config(load(kind, args.config, args.set)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
