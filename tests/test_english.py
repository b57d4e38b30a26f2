"""The source is written in plain English: names, docstrings and messages."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PLACES = ("platform", "benchmarks", "jobs")
SOURCES = [p for d in PLACES for p in sorted((REPOSITORY / d).rglob("*.py"))]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
NOTES = [REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "CHANGELOG.md"]
CONFIGS = [
    p
    for d in ("configs", "clusters", "benchmarks", "platform")
    for p in sorted((REPOSITORY / d).rglob("*"))
    if p.suffix in (".yaml", ".j2", ".html") and p.is_file()
]
"""Configs and templates, whose comments and sentences are read too."""
IN_IDS = ("miniwob.py",)
"""Files whose hash is part of an environment's version, and so of ids: they keep their words."""

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
BANNED_IN_SOURCES = re.compile(
    r"\banew\b|\bfor want of\b|\bso many\b|\bis no world\b|\bbroken off\b|\bbounds what\b"
    r"|\bfor nobody\b|\bshared? out\b",
    re.IGNORECASE,
)
"""Also absent outside of the pages."""


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


def comments(path: Path) -> Iterator[tuple[str, int]]:
    """The comments of a Python file, each with the comment lines below it joined."""
    block: list[str] = []
    start = 0
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.COMMENT:
            start = start if block else token.start[0]
            block.append(token.string.lstrip("# "))
        elif token.type != tokenize.NL and block:
            yield " ".join(block), start
            block = []


def test_configs_and_templates_are_read() -> None:
    kinds = {path.suffix for path in CONFIGS}
    assert kinds == {".yaml", ".j2", ".html"} and len(CONFIGS) > 40


def texts(path: Path) -> Iterator[tuple[str, int]]:
    """The sentences of a file: strings and comments of Python, or else all of it."""
    if path.suffix == ".py":
        yield from strings(path)
        yield from comments(path)
    else:
        words = path.read_text().replace("\n#", "\n")
        yield " ".join(words.split()), 1


@pytest.mark.parametrize(
    "paths", [SOURCES, PAGES, NOTES, CONFIGS], ids=["sources", "pages", "notes", "configs"]
)
def test_banned_phrases_are_absent(paths: list[Path]) -> None:
    wrong = []
    for path in paths:
        banned = [BANNED]
        if paths is not PAGES and path.name not in IN_IDS:
            banned.append(BANNED_IN_SOURCES)
        for text, line in texts(path):
            for pattern in banned:
                wrong += [f"{at(path, line)} {match[0]}" for match in pattern.finditer(text)]
    assert wrong == []
