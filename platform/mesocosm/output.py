"""Standard output and the question before a costly command.

With `--json` standard output carries the result alone, so that a program can parse it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from mesocosm.errors import MesocosmError, UsageError

_results: TextIO | None = None


def write(text: str, end: str = "\n") -> None:
    """Write part of the command's result to the real standard output."""
    print(text, end=end, file=_results or sys.stdout, flush=True)


def write_json(value: Any) -> None:
    """Write a result as JSON."""
    write(json.dumps(value, indent=1, default=str))


def facts(values: Mapping[str, Any], as_json: bool) -> None:
    """Write a result: as JSON, or a line a key, with a table for a list of rows."""
    if as_json:
        write_json(values)
        return
    width = max(map(len, values), default=0)
    for key, value in values.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            write(table(value) + "\n")
        else:
            write(f"{key:<{width}}  {_words(value)}")


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items()) or "-"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys, in columns: numbers on the right, text on the left."""
    cells = [list(rows[0])] + [
        [f"{value:,}" if isinstance(value, int) else str(value) for value in row.values()]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    aligns = [">" if isinstance(value, int | float) else "<" for value in rows[0].values()]
    return "\n".join(
        "  ".join(f"{c:{a}{w}}" for c, a, w in zip(line, aligns, widths, strict=True)).rstrip()
        for line in cells
    )


def size(count: float) -> str:
    """A number of bytes in the largest unit that fits."""
    units = iter(("B", "KiB", "MiB", "GiB"))
    unit = next(units)
    while count >= 1024 and unit != "GiB":
        count, unit = count / 1024, next(units)
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"


@contextmanager
def results_only(*, for_good: bool) -> Iterator[None]:
    """While the block runs, the output of environments, libraries and child processes goes to
    standard error. Only `write` reaches standard output.

    Args:
        for_good: Keep the redirection after the block: the process is about to end, and output at
            exit is not a result.
    """
    global _results
    stdout = sys.stdout
    if stdout is None or sys.stderr is None or _results is not None:
        yield
        return
    stdout.flush()
    saved = os.dup(1)
    _results = os.fdopen(os.dup(1), "w", encoding="utf-8") if _is_descriptor_1(stdout) else stdout
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        if _results is not stdout:
            _results.close()
        _results = None
        if not for_good:
            os.dup2(saved, 1)
            sys.stdout = stdout
        os.close(saved)


def _is_descriptor_1(stream: TextIO) -> bool:
    try:
        return stream.fileno() == 1
    except (OSError, ValueError, AttributeError):  # a test's capture, a notebook
        return False


def confirm(question: str, *, yes: bool) -> None:
    """Ask the user, unless `yes`.

    Raises:
        UsageError: There is no terminal.
        MesocosmError: The answer is not yes.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError(f"{question} There is no terminal to ask; give --yes")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise MesocosmError("nothing was done")
