"""`mesocosm fit TABLE.csv --out law.json`: the command. Light to import; what it needs it imports
when run.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from mesocosm import output
from mesocosm.errors import UsageError

EXAMPLE = """\
The table is CSV, one row a trained cell: params, data, loss [, unique, flops, seed, lr, trunk, weight]. docs/scaling.md says what each means,
and what law.json holds. A plot is drawn beside it (law.svg).

example:
  mesocosm fit table.csv --out law.json
"""


def add(commands: Any) -> None:
    """Add the command to argparse's `commands`."""
    said = "a table of trained cells into a law of loss, with intervals"
    parser = commands.add_parser(
        "fit",
        help=said,
        description=said,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("table", metavar="TABLE.csv", help="the trained cells")
    parser.add_argument(
        "--out",
        default="law.json",
        metavar="FILE",
        help="where the law goes (law.json); the plot lies beside it",
    )
    parser.add_argument(
        "--drop-outliers",
        action="store_true",
        help="leave out rows more than 5 robust standard deviations from the law, and list them",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would be fitted and held out, and do nothing",
    )
    parser.add_argument("--json", action="store_true", help="the law on stdout")


def run(options: argparse.Namespace) -> int:
    """Fit, write, draw and say. Raises UsageError."""
    from rich.console import Console

    from mesocosm.scaling import fit, report
    from mesocosm.scaling.table import Table

    plot = Path(options.out).with_suffix(".svg")
    if plot == Path(options.out):
        raise UsageError(
            f"--out {options.out}: the plot is written there, beside the law; give the law another"
            f" name, such as {plot.with_suffix('.json')}"
        )
    table = Table.read(options.table)
    console = Console(highlight=False, soft_wrap=True)
    if options.dry_run:
        facts = fit.plan(table)
        (
            output.write(json.dumps(facts, indent=1))
            if options.json
            else console.print(report.facts(facts))
        )
        return 0
    words = [
        "mesocosm",
        "fit",
        options.table,
        "--out",
        options.out,
        *(["--drop-outliers"] if options.drop_outliers else []),
    ]
    law = fit.fit(table, drop_outliers=options.drop_outliers, command=shlex.join(words))
    law.write(options.out)
    try:
        plot.write_text(report.draw(law, table))
    except OSError as error:
        raise UsageError(
            f"the plot cannot be written to {str(plot)!r}: {error.strerror}; the law is in"
            f" {options.out}"
        ) from error
    if options.json:
        output.write(json.dumps(law.model_dump(mode="json"), indent=1))
        return 0
    for part in report.said(law):
        console.print(part)
    console.print(f"{options.out}  {plot}")
    return 0
