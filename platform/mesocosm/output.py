"""Standard output and the question before a costly command.

With `--json` standard output carries the result alone, so that a program can parse it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from mesocosm.errors import MesocosmError, UsageError

_results: TextIO | None = None


def write(text: str, end: str = "\n") -> None:
    """Write part of the command's result to the real standard output."""
    print(text, end=end, file=_results or sys.stdout, flush=True)


@contextmanager
def results_only(*, for_good: bool) -> Iterator[None]:
    """While the block runs, whatever else prints goes to standard error: environments, libraries
    and child processes. `write` alone reaches standard output.

    Args:
        for_good: Leave it so after the block: the process is about to end, and what its exit prints
            is no result.
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
    """Ask, unless `yes`. Raises UsageError where nobody can be asked, MesocosmError where the
    answer is no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError(f"{question} Nobody can be asked here; give --yes")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise MesocosmError("nothing was done")
