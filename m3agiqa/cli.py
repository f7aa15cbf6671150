"""The command line: `m3agiqa score | capture | distil | finetune | show | status | ...`; see `--help`."""

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from m3agiqa import __version__
from m3agiqa.ablate_config import AblateConfig
from m3agiqa.arguments import add_config, add_retry, aspect_columns, retried, say
from m3agiqa.aspects import Aspect
from m3agiqa.cli_ablate import add_ablate, add_cross_evaluate
from m3agiqa.cli_curate import add_curate, add_export
from m3agiqa.cli_distil import add_conversations, add_distil
from m3agiqa.cli_evaluate import add_evaluate, add_split
from m3agiqa.cli_plan import add_plan
from m3agiqa.cli_report import add_query, add_report
from m3agiqa.cli_status import add_status
from m3agiqa.cli_train import add_finetune, add_train_predictor
from m3agiqa.config import RunConfig, load_config
from m3agiqa.curation.recipe import Recipe
from m3agiqa.distil_config import DistilConfig
from m3agiqa.errors import UserError
from m3agiqa.finetune_config import FinetuneConfig
from m3agiqa.settings import Config, describe_config, dump_config, load
from m3agiqa.train_config import TrainConfig

KINDS: dict[str, type[Config]] = {
    "score": RunConfig,
    "distil": DistilConfig,
    "finetune": FinetuneConfig,
    "train-predictor": TrainConfig,
    "curate": Recipe,
    "ablate": AblateConfig,
}
"""The commands that are configured."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns 0; 2 for something the user can mend, 3 where too many rows failed, 1 for an error of ours or of a machine.
    """
    args = parser().parse_args(argv)
    args.typed = shlex.join(["m3agiqa", *(sys.argv[1:] if argv is None else argv)])
    level = logging.INFO if args.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    try:
        return int(args.run(args) or 0)
    except UserError as error:
        print(f"m3agiqa: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("m3agiqa: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if args.verbose:
            raise
        print(f"m3agiqa: {type(error).__name__}: {_gist(str(error))} (-v shows where)", file=sys.stderr)
        return 1


def _gist(message: str) -> str:
    """The line of a message that says what happened: its first one, or the last of a traceback, as Ray's errors are."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or ["no more is known"]
    return lines[-1] if any(line.startswith('File "') for line in lines) else lines[0]


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(
        prog="m3agiqa", description="Scores AI-generated images the way people would, at the scale they are made."
    )
    top.add_argument("--version", action="version", version=f"m3agiqa {__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    for add in _COMMANDS:
        add(commands).add_argument(
            "-v", "--verbose", action="store_true", help="what Ray and the engine say; tracebacks"
        )
    return top


def _add_score(commands: Any) -> argparse.ArgumentParser:
    score = commands.add_parser("score", help="score a corpus of images into parquet")
    score.add_argument("--input", required=True, help="folder, CSV/JSONL/parquet manifest or tars; local or a URI")
    score.add_argument("--output", required=True, help="folder for the scores; an earlier run in it is gone on with")
    add_retry(score)
    add_config(score)
    score.set_defaults(run=_score)
    return score


def _add_capture(commands: Any) -> argparse.ArgumentParser:
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
    add_retry(capture)
    add_config(capture)
    capture.set_defaults(run=_capture)
    return capture


def _add_show(commands: Any) -> argparse.ArgumentParser:
    show = commands.add_parser("show", help="print the scores of an output folder as a table")
    show.add_argument("output", help="what --output named")
    show.add_argument("--rows", type=int, default=50, help="most rows to print (default 50)")
    show.set_defaults(run=_show)
    return show


def _add_merge_adapter(commands: Any) -> argparse.ArgumentParser:
    merge = commands.add_parser("merge-adapter", help="merge a PEFT adapter into a full checkpoint")
    merge.add_argument("--model", required=True, help="`tiny`, a folder or a hub id")
    merge.add_argument("--adapter", required=True, help="a folder or a hub id")
    merge.add_argument("--out", required=True, help="a new folder for the merged checkpoint")
    merge.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the checkpoint's")
    merge.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    merge.set_defaults(run=_merge_adapter)
    return merge


def _add_import_predictor(commands: Any) -> argparse.ArgumentParser:
    imported = commands.add_parser("import-predictor", help="turn a released predictor checkpoint into a folder")
    imported.add_argument("file", metavar="FILE", help="Lightning checkpoint of the M3-AGIQA reference")
    imported.add_argument("--out", required=True, help="a new folder for the predictor")
    imported.add_argument(
        "--lm-head",
        metavar="MODEL",
        help="the model that will score (where an adapter is merged, the merged one), as a folder or hub id: the "
        "predictor is folded onto its LM head and is for it alone; or a safetensors file of an LM head",
    )
    imported.add_argument(
        "--aspect",
        choices=[aspect.value for aspect in Aspect],
        default="quality",
        help="what it predicts (default quality)",
    )
    imported.set_defaults(run=_import_predictor)
    return imported


def _add_config(commands: Any) -> argparse.ArgumentParser:
    config = commands.add_parser("config", help="print the configuration")
    config.add_argument("--kind", choices=list(KINDS), default="score", help="of which command (default score)")
    config.add_argument("--show", action="store_true", help="print the effective configuration (the default)")
    config.add_argument("--docs", action="store_true", help="print every key with its default and its meaning")
    add_config(config)
    config.set_defaults(run=_config)
    return config


_COMMANDS: tuple[Callable[[Any], argparse.ArgumentParser], ...] = (
    _add_score,
    _add_capture,
    add_plan,
    _add_show,
    add_report,
    add_query,
    add_status,
    _add_merge_adapter,
    _add_import_predictor,
    add_distil,
    add_conversations,
    add_finetune,
    add_train_predictor,
    add_curate,
    add_export,
    add_ablate,
    add_cross_evaluate,
    add_evaluate,
    add_split,
    _add_config,
)
"""What adds each command, in the order of `--help`."""


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

    retry = retried(args)
    manifest = run_scoring(config, args.input, args.output, retry=retry, command=args.typed, verbose=args.verbose)
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
    if config.report.write and not (config.capture.write or config.corpus.text_only):
        from m3agiqa.report import report_after

        say(report_after(args.output))
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
    kind = KINDS[args.kind]
    if args.docs:
        print(describe_config(kind))
    else:
        print(dump_config(load(kind, args.config, args.set)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
