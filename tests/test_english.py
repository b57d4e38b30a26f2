"""The source is written in plain English: names, docstrings and messages."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = [p for d in ("platform", "benchmarks") for p in sorted((REPOSITORY / d).rglob("*.py"))]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]

NAMES = re.compile("found|said|told|what|kept|theirs|there|gone|wanted|asked|heard|away|own")
"""Names to replace by a word of the field: artifact, message, report, config, ..."""
JSON_FIELDS = {("checks.py", "found"), ("cells.py", "what")}
"""Dataclass fields that are keys of files or of `--json`, whose names are fixed."""
FRAGMENT = re.compile(r"(Of|What|Whether|Those|Who|Where)\b")
BANNED = re.compile(
    r"cannot be; give|\bis no (share|price|discount|rung|budget)\b|foretell|foretold|\bon end\b"
    r"|\bdear ",
    re.IGNORECASE,
)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def names(path: Path) -> Iterator[tuple[str, int]]:
    """The names that a file defines or assigns, with their lines."""
    for node in ast.walk(parsed(path)):
        name = None
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = node.name
        elif isinstance(node, ast.arg):
            name = node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            name = node.attr
        elif isinstance(node, ast.alias):
            name = node.asname
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar):
            name = node.name
        if name is not None:
            yield name, getattr(node, "lineno", 0)


def docstrings(path: Path) -> Iterator[tuple[str, int]]:
    """Strings that stand alone: docstrings of modules, classes, functions and attributes."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            text = node.value.value
            if isinstance(text, str):
                yield text, node.lineno


def strings(path: Path) -> Iterator[tuple[str, int]]:
    """All strings, each with adjacent literals and lines joined."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value for part in node.values if isinstance(part, ast.Constant)]
            yield " ".join("".join(map(str, parts)).split()), node.lineno
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield " ".join(node.value.split()), node.lineno


def at(path: Path, line: int) -> str:
    return f"{path.relative_to(REPOSITORY)}:{line}"


def test_names_are_nouns_of_the_field() -> None:
    wrong = [
        f"{at(path, line)} {name}"
        for path in SOURCES
        for name, line in names(path)
        if NAMES.fullmatch(name.lstrip("_")) and (path.name, name) not in JSON_FIELDS
    ]
    assert wrong == []


def test_docstrings_are_noun_phrases_or_sentences() -> None:
    wrong = [
        f"{at(path, line)} {text.strip().splitlines()[0]}"
        for path in SOURCES
        for text, line in docstrings(path)
        if FRAGMENT.match(text.strip())
    ]
    assert wrong == []


@pytest.mark.parametrize("paths", [SOURCES, PAGES], ids=["sources", "pages"])
def test_banned_phrases_are_absent(paths: list[Path]) -> None:
    wrong = []
    for path in paths:
        if path.suffix == ".py":
            texts = list(strings(path))
        else:
            texts = [(" ".join(path.read_text().split()), 1)]
        for text, line in texts:
            wrong += [f"{at(path, line)} {match[0]}" for match in BANNED.finditer(text)]
    assert wrong == []
