"""`mesocosm completion bash|zsh|fish`: a script with which Tab completes commands, options, config
keys, files, clusters, jobs and datasets.

The script asks `mesocosm` itself, through argcomplete, at every Tab. So nothing here imports what a
job runs on: config keys are read from the source of its schema, which takes a hundredth of the time
of importing it.
"""

from __future__ import annotations

import argparse
import ast
import copy
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

SHELLS = ("bash", "zsh", "fish")
PACKAGE = Path(__file__).resolve().parents[1]
ASKED = "_ARGCOMPLETE"
"""The environment variable with which the script asks."""
MOST = 50
"""Config keys in one command that are completed."""

EXAMPLE = """\
examples:
  eval "$(mesocosm completion bash)"                                             in this shell; in ~/.bashrc: in every one
  eval "$(mesocosm completion zsh)"                                              after compinit, in ~/.zshrc
  mesocosm completion fish > ~/.config/fish/completions/mesocosm.fish
"""


def add(commands: Any) -> None:
    """Add the command to argparse's `commands`."""
    said = (
        "print the script with which a shell completes commands, options, config keys, clusters,"
        " jobs and datasets"
    )
    parser = commands.add_parser(
        "completion",
        help=said,
        description=said,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell that reads it")


def run(options: argparse.Namespace) -> int:
    """Print the script."""
    from argcomplete.shell_integration import shellcode

    print(shellcode(["mesocosm"], shell=options.shell), end="")
    return 0


def answer(parser: argparse.ArgumentParser) -> None:
    """Answer the script, where it is the one that asks, and end the process; otherwise return at
    once.
    """
    if ASKED not in os.environ:
        return
    import argcomplete

    _attach(parser, "")
    argcomplete.autocomplete(parser, always_complete_options=False)


def _attach(parser: Any, command: str) -> None:
    """Tell argcomplete what each argument of `parser` and of the commands below it may be; without
    a word it proposes files.
    """
    from argcomplete.completers import FilesCompleter

    for action in list(parser._actions):
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                _attach(sub, f"{command} {name}".strip())
        elif action.dest == "config":
            action.completer = FilesCompleter(("yaml", "yml"))
        elif action.dest == "cluster" or (command.startswith("cluster ") and action.dest == "name"):
            action.completer = _listed(_clusters)
        elif command.startswith("data ") and action.dest in ("id", "a", "b"):
            action.completer = _listed(_datasets)
        elif action.dest == "id":
            action.completer = _listed(_jobs)
        elif action.dest == "overrides":
            module, schema = (
                ("mesocosm.config", "JobConfig")
                if parser.job is None
                else (parser.job[1].module, parser.job[1].schema)
            )
            action.completer = _listed(functools.partial(_overrides, module, schema))
            # argparse takes what `*` stands for in one go, before an option or after it: words on
            # both sides are so many arguments of their own.
            action.nargs = None
            for _ in range(MOST):
                parser._add_action(copy.copy(action))
        elif (
            action.dest not in ("table", "out", "law")
            and action.nargs != 0
            and action.choices is None
        ):
            action.completer = _listed(list)


def _listed(names: Callable[[], Sequence[str]]) -> Callable[..., list[str]]:
    return lambda prefix, **asked: [name for name in names() if name.startswith(prefix)]


def _clusters() -> list[str]:
    from mesocosm.cluster import spec as cluster_spec

    return cluster_spec.names()


def _jobs() -> list[str]:
    from mesocosm.cluster import records

    return [record.id for record in records.every()]


def _datasets() -> list[str]:
    """Those of the root that is taken where none is said; a bucket is not asked at every Tab."""
    return [file.parent.name for file in sorted(Path(".mesocosm/datasets").glob("*/COMMIT.json"))]


def _overrides(module: str, schema: str) -> list[str]:
    return [f"{key}=" for key in keys(module, schema)]


def keys(module: str, schema: str) -> list[str]:
    """The keys that a config of the dataclass `schema` of `module` takes, in its order, as its
    job's `--help` lists them. Imports nothing.
    """
    found = _class(module, schema)
    assert found is not None, (module, schema)
    return list(_keys(*found, "", ()))


def _keys(module: str, schema: str, prefix: str, without: Sequence[str]) -> Iterator[str]:
    for name, (where, annotation) in _fields(module, schema).items():
        if name in without:
            continue
        inner = _class(where, annotation) if annotation.isidentifier() else None
        if inner is None:
            yield f"{prefix}{name}"
        else:
            shared = (
                (*_fields("mesocosm.config", "JobConfig"), "reality") if _is_job(*inner) else ()
            )  # what a stage gets from its loop
            yield from _keys(*inner, f"{prefix}{name}.", shared)


def _fields(module: str, schema: str) -> dict[str, tuple[str, str]]:
    """Each field's (module of its class, annotation as written); those of base classes first."""
    found: dict[str, tuple[str, str]] = {}
    node = _tree(module)[schema]
    assert isinstance(node, ast.ClassDef), (module, schema)
    for base in _bases(module, node):
        found |= _fields(*base)
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            found[line.target.id] = (module, ast.unparse(line.annotation))
    return found


def _is_job(module: str, schema: str) -> bool:
    node = _tree(module)[schema]
    assert isinstance(node, ast.ClassDef), (module, schema)
    return schema == "JobConfig" or any(_is_job(*base) for base in _bases(module, node))


def _bases(module: str, node: ast.ClassDef) -> list[tuple[str, str]]:
    return [base for name in node.bases if (base := _class(module, ast.unparse(name))) is not None]


def _class(module: str, name: str) -> tuple[str, str] | None:
    """(module, name) of the class of this package that `name` means in `module`; None where it is
    none.
    """
    node = _tree(module).get(name)
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mesocosm."):
        return _class(str(node.module), name)
    return (module, name) if isinstance(node, ast.ClassDef) else None


@functools.cache
def _tree(module: str) -> dict[str, ast.ClassDef | ast.ImportFrom]:
    """What names stand for at a module's top level: classes, and what is imported by its own name."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    found: dict[str, ast.ClassDef | ast.ImportFrom] = {}
    for node in ast.parse(
        (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    ).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.name: node for alias in node.names if alias.asname is None}
    return found
