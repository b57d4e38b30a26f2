"""`mesocosm fit`: a scaling law from a table."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from mesocosm import output
from mesocosm.cli import options
from mesocosm.errors import UsageError


@click.command(params=[options.DRY_RUN, options.JSON])
@click.argument("table", metavar="TABLE.csv", type=click.Path())
@click.option(
    "--out",
    default="law.json",
    metavar="FILE",
    type=click.Path(),
    help="The law's file (law.json). The plot is written next to it.",
)
@click.option(
    "--drop-outliers",
    is_flag=True,
    help="Leave out, and list, rows more than 5 robust standard deviations from the law.",
)
def fit(table: str, out: str, drop_outliers: bool, dry_run: bool, as_json: bool) -> None:
    """Fit a scaling law to a table of trained cells.

    The table is CSV, one row a trained cell: params, data, loss [, unique, flops, seed, lr, trunk,
    weight]. docs/scaling.md explains the columns and law.json.

    \b
    Example:
      mesocosm fit table.csv --out law.json
    """
    from rich.console import Console

    from mesocosm.scaling import fit, report
    from mesocosm.scaling.table import CellTable

    plot = Path(out).with_suffix(".svg")
    if plot == Path(out):
        raise UsageError(
            f"--out must not be an .svg file, got {out}: the plot is written there; try"
            f" {plot.with_suffix('.json')}"
        )
    cells = CellTable.read(table)
    console = Console(highlight=False, soft_wrap=True)
    if dry_run:
        output.facts(fit.plan(cells), as_json)
        return
    command = ["mesocosm", "fit", table, "--out", out, *["--drop-outliers"] * drop_outliers]
    law = fit.fit(cells, drop_outliers=drop_outliers, command=shlex.join(command))
    law.write(out)
    try:
        plot.write_text(report.draw(law, cells))
    except OSError as error:
        raise UsageError(
            f"the plot cannot be written to {str(plot)!r}: {error.strerror}; the law is in {out}"
        ) from error
    if as_json:
        output.write_json(law.model_dump(mode="json"))
        return
    for part in report.renderables(law):
        console.print(part)
    console.print(f"{out}  {plot}")
