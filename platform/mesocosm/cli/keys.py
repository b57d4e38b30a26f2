"""The keys of a config, read from the source of its dataclass.

Importing a job takes seconds, too long for a Tab.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def config_keys(
    module: str, schema: str, prefix: str = "", without: Sequence[str] = ()
) -> Iterator[str]:
    """The keys of the dataclass `schema`, in the order of its job's `--help`."""
    for name, (where, annotation) in _fields(module, schema).items():
        block = _find_class(where, annotation)
        if name in without:
            continue
        if block is None:
            yield f"{prefix}{name}"
            continue
        is_stage = "tracking" in _fields(*block)  # it gets what all jobs share from its loop
        shared = (*_fields("mesocosm.config", "JobConfig"), "reality") if is_stage else ()
        yield from config_keys(*block, f"{prefix}{name}.", shared)


def _fields(module: str, schema: str) -> dict[str, tuple[str, str]]:
    """Each field's module and annotation; those of base classes first."""
    node = _names(module)[schema]
    if isinstance(node, str):
        return _fields(node, schema)
    fields: dict[str, tuple[str, str]] = {}
    for base in node.bases:
        if found := _find_class(module, ast.unparse(base)):
            fields |= _fields(*found)
    for line in node.body:
        if isinstance(line, ast.AnnAssign):
            fields[ast.unparse(line.target)] = (module, ast.unparse(line.annotation))
    return fields


def _find_class(module: str, name: str) -> tuple[str, str] | None:
    """The module of this package that defines the class `name` of `module`; None elsewhere."""
    node = _names(module).get(name)
    if isinstance(node, str):
        return _find_class(node, name)
    return None if node is None else (module, name)


@functools.cache
def _names(module: str) -> dict[str, ast.ClassDef | str]:
    """A module's classes, and the modules of this package that its other names come from."""
    names: dict[str, ast.ClassDef | str] = {}
    path = PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("mesocosm."):
            names |= {alias.name: str(node.module) for alias in node.names if alias.asname is None}
    return names
