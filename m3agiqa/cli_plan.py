"""The command that looks before a run: `m3agiqa plan`."""

import argparse
from typing import Any

from m3agiqa.arguments import add_config
from m3agiqa.config import load_config


def add_plan(commands: Any) -> argparse.ArgumentParser:
    """Adds the command to argparse's sub-parsers, and returns its parser."""
    plan: argparse.ArgumentParser = commands.add_parser(
        "plan", help="check a run before it starts, and tell what it would take"
    )
    plan.add_argument("--input", required=True, help="as for score")
    plan.add_argument("--output", required=True, help="as for score; nothing is left in it")
    plan.add_argument(
        "--images", type=int, default=0, metavar="N", help="score so many in the real engine, to measure (default 0)"
    )
    add_config(plan)
    plan.set_defaults(run=_plan)
    return plan


def _plan(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.set)
    from m3agiqa.plan import plan, report

    made = plan(config, args.input, args.output, max(args.images, 0), verbose=args.verbose)
    for line in report(made, config):
        print(line)
    if made.failed:
        print(f"{len(made.failed)} of {len(made.checks)} checks failed: {', '.join(c.name for c in made.failed)}")
    return 2 if made.failed else 0
