"""`mesocosm configs`: the configs that come with the package."""

from __future__ import annotations

import json

import click

from mesocosm import output, shipped
from mesocosm.cli.options import JSON, complete_configs


@click.group()
def configs() -> None:
    """List and show the shipped configs, which `-c NAME` takes.

    \b
    Examples:
      mesocosm configs list
      mesocosm configs show loop/quickstart > mine.yaml
    """


@configs.command("list", params=[JSON])
def list_configs(as_json: bool) -> None:
    """List the names of the shipped configs, with their first line."""
    lines = {
        name: path.read_text().partition("\n")[0].lstrip("# ")
        for name, path in shipped.configs().items()
    }
    if as_json:
        output.write(json.dumps(lines, indent=1))
        return
    width = max(map(len, lines))
    for name, line in lines.items():
        click.echo(f"{name:<{width}}  {line}")


@configs.command("show")
@click.argument("name", shell_complete=complete_configs)
def show_config(name: str) -> None:
    """Print a shipped config."""
    click.echo(shipped.config_path(name).read_text(), nl=False)
