"""The rules of the code's layout: one public class name means one thing, and files are short."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "platform" / "mesocosm"
FOLDERS = ("platform", "jobs", "tests", "benchmarks", "examples", "docs")
LINES = 400


def test_a_class_name_stands_once() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(str(path.relative_to(PACKAGE)))
    assert len(places) > 100
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


def test_a_module_has_at_most_400_lines() -> None:
    files = [path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py")]
    lengths = {path: len(path.read_text().splitlines()) for path in files}
    assert (
        len(files) > len(FOLDERS)
        and {str(path): lines for path, lines in lengths.items() if lines > LINES} == {}
    )
