"""`mesocosm completion`: Tab completes commands, options, config keys, files, clusters, jobs and
datasets.
"""

from __future__ import annotations

import os
import sys

import click
from click import shell_completion
from click.shell_completion import BashComplete, CompletionItem, ZshComplete, add_completion_class

VARIABLE = "_MESOCOSM_COMPLETE"
"""The environment variable with which the shell's script asks for completions."""


@add_completion_class
class _Bash(BashComplete):
    """Adds no space after `key=` or a folder."""

    source_template = BashComplete.source_template.replace("nosort", "nosort -o nospace")

    def format_completion(self, item: CompletionItem) -> str:
        end = "" if item.value.endswith(("=", "/")) else " "
        return super().format_completion(item) + end


@add_completion_class
class _Zsh(ZshComplete):
    """Adds no space after `key=` or a folder."""

    source_template = ZshComplete.source_template.replace(
        "compadd -U -V unsorted -a completions",
        "compadd -U -V unsorted -S '' -- ${(M)completions:#*[=/]}\n"
        "        compadd -U -V unsorted -- ${completions:#*[=/]}",
    )


def complete(commands: click.Group) -> None:
    """Answer the shell's script and end the process, if the script runs it."""
    if instruction := os.environ.get(VARIABLE):
        sys.exit(shell_completion.shell_complete(commands, {}, "mesocosm", VARIABLE, instruction))


@click.command()
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print a shell's completion script.

    Tab then completes commands, options, config keys, files, clusters, jobs and datasets.

    \b
    Examples:
      eval "$(mesocosm completion bash)"    in this shell; in ~/.bashrc: in every shell
      eval "$(mesocosm completion zsh)"     after compinit, in ~/.zshrc
      mesocosm completion fish > ~/.config/fish/completions/mesocosm.fish
    """
    script = shell_completion.get_completion_class(shell)
    assert script is not None
    print(script(context.find_root().command, {}, "mesocosm", VARIABLE).source())
