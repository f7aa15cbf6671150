"""`m3agiqa status`."""

import argparse
import json
from typing import Any


def add_status(commands: Any) -> argparse.ArgumentParser:
    """Adds the command."""
    status = commands.add_parser("status", help="how far a run is, and what to run next")
    status.add_argument("output", help="what --output named")
    status.add_argument("--json", action="store_true", help="for programs")
    status.set_defaults(run=_status)
    return status


def _status(args: argparse.Namespace) -> int:
    from m3agiqa.status import run_status

    found = run_status(args.output)
    print(json.dumps(found.as_json()) if args.json else "\n".join(found.lines()))
    return 0
