"""The commands that look at scores: `m3agiqa report` and `m3agiqa query`."""

import argparse
import sys
from typing import Any

_ROWS_SHOWN = 50


def add_report(commands: Any) -> argparse.ArgumentParser:
    """Adds the command to argparse's sub-parsers, and returns its parser."""
    report: argparse.ArgumentParser = commands.add_parser(
        "report", help="one HTML file of what a folder of scores holds, to open in a browser"
    )
    report.add_argument("output", metavar="DIR", help="folder of scores, or a curated one; local or a URI")
    report.add_argument("--against", metavar="OTHER", help="another folder of scores to show the drift from")
    report.add_argument("--out", metavar="FILE", help="where to write it (default DIR/report.html)")
    report.set_defaults(run=_report)
    return report


def add_query(commands: Any) -> argparse.ArgumentParser:
    """Adds the command to argparse's sub-parsers, and returns its parser."""
    query: argparse.ArgumentParser = commands.add_parser("query", help="run SQL over a folder of scores, with DuckDB")
    query.add_argument("output", metavar="DIR", help="folder of scores: the view `scores`; if curated also `removed`")
    query.add_argument("sql", metavar="SQL", help='e.g. "SELECT generator, avg(quality_mos) FROM scores GROUP BY ALL"')
    query.add_argument("--format", choices=["table", "csv", "json"], default="table", help="default table")
    query.set_defaults(run=_query)
    return query


def _report(args: argparse.Namespace) -> int:
    from m3agiqa.report import write_report

    print(f"report: {write_report(args.output, against=args.against, out=args.out)}")
    return 0


def _query(args: argparse.Namespace) -> int:
    from m3agiqa.query import query, write_csv, write_json
    from m3agiqa.runs import Output

    result = query(Output(args.output), args.sql)
    if args.format == "csv":
        write_csv(result, args.sql, sys.stdout)
    elif args.format == "json":
        write_json(result, args.sql, sys.stdout)
    else:
        _print_table(result, args.sql)
    return 0


def _print_table(result: Any, sql: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from m3agiqa.query import batches, names_of

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names_of(result):
        table.add_column(Text(name), overflow="fold")
    count = 0
    for rows in batches(result, sql):
        for row in rows[: max(_ROWS_SHOWN - count, 0)]:
            table.add_row(*[Text(_cell(value)) for value in row])
        count += len(rows)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if count > _ROWS_SHOWN:
        print(f"... and {count - _ROWS_SHOWN} more (--format csv or json prints all)")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"[{', '.join(map(_cell, value))}]" if isinstance(value, list) else str(value)
