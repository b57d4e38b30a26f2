"""The keys of a config and their descriptions, read from the source of its dataclass.

Importing a job takes seconds, too long for a Tab.
"""

from __future__ import annotations

import ast
import functools
import importlib
import itertools
import json
import operator
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

from mesocosm.config import JobConfig, to_dict

SHARED = [field.name for field in fields(JobConfig)]
"""The keys of every job, which the stages of a loop get from the loop."""
PACKAGE = Path(__file__).resolve().parents[1]
WIDTH = 98


def config_of(module: str) -> tuple[str, str]:
    """The module and name of a job's config, from the job's class `NAME(Job[CONFIG, PLAN])`."""
    names = _names(module)
    if isinstance(source := names.get("JOB"), str):
        return config_of(source)
    classes = [node for node in names.values() if isinstance(node, ast.ClassDef)]
    bases = [ast.unparse(base) for node in classes for base in node.bases]
    (job,) = (base for base in bases if base.startswith("Job["))
    return module, job.removeprefix("Job[").partition(",")[0]


def config_class(module: str) -> type[JobConfig]:
    """The class of a job's config, imported without the job."""
    source = _find_class(*config_of(module))
    assert source is not None, module
    schema: type[JobConfig] = getattr(importlib.import_module(source[0]), source[1])
    return schema


def field_names(module: str) -> list[str]:
    """The top-level keys of a job's config."""
    return [key for key, _, _ in config_keys(*config_of(module)) if "." not in key]


def config_keys(
    module: str, schema: str, prefix: str = "", without: Sequence[str] = ()
) -> Iterator[tuple[str, str, bool]]:
    """The keys of the dataclass `schema`: (dotted key, docstring, whether it is a block of keys).

    The stages of a loop are listed without the keys that they get from the loop.
    """
    for name, (where, annotation, text) in _fields(module, schema).items():
        if name in without:
            continue
        block = _find_class(where, annotation)
        yield f"{prefix}{name}", text, block is not None
        if block is not None:
            is_stage = "tracking" in _fields(*block)
            shared = (*SHARED, "reality") if is_stage else ()
            yield from config_keys(*block, f"{prefix}{name}.", shared)


def describe(job: str, schema: type[JobConfig]) -> dict[str, list[str]]:
    """The lines of each section of a config: the job's own keys, a section for each block, and the
    keys of every job. A docstring becomes a comment above its line `key = value`.
    """
    sections: dict[str, list[str]] = {job: []}
    defaults = to_dict(schema())
    for key, text, is_block in config_keys(schema.__module__, schema.__name__):
        top, *rest = key.split(".")
        name = "every job" if top in SHARED else top if rest or is_block else job
        lines = sections.setdefault(name, [])
        lines += textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="# ")
        if not is_block:
            value = functools.reduce(operator.getitem, key.split("."), defaults)
            lines.append(f"{key} = {json.dumps(value)}")
    sections["every job"] = sections.pop("every job")  # the last
    return sections


def _fields(module: str, schema: str) -> dict[str, tuple[str, str, str]]:
    """Each field's module, annotation and docstring; those of base classes first."""
    node = _names(module)[schema]
    if isinstance(node, str):
        return _fields(node, schema)
    entries: dict[str, tuple[str, str, str]] = {}
    for base in node.bases:
        if source := _find_class(module, ast.unparse(base)):
            entries |= _fields(*source)
    for line, after in itertools.pairwise([*node.body, ast.Pass()]):
        if isinstance(line, ast.AnnAssign):
            text = ast.literal_eval(after.value) if isinstance(after, ast.Expr) else ""
            name, annotation = ast.unparse(line.target), ast.unparse(line.annotation)
            entries[name] = (module, annotation, " ".join(text.split()))
    return entries


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
