"""Real browsers in tests: where they are needed, and their processes."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mesocosm.envs.browser.chromium import BROWSERS

MARK = "MESOCOSM_TEST_BROWSER"
PACKAGES = ("selenium", "miniwob")


def missing(*packages: str) -> list[str]:
    """The programs, and those of the packages, that are not installed."""
    programs = [] if any(map(shutil.which, BROWSERS)) else ["chromium"]
    programs += [] if shutil.which("chromedriver") else ["chromedriver"]
    return programs + [name for name in packages if importlib.util.find_spec(name) is None]


def needs(*packages: str) -> Callable[[Any], Any]:
    """Mark an integration test that needs a browser and packages. It skips without them."""
    absent = ", ".join(missing(*packages))
    reason = f"{absent} not installed: run `make browser`"

    def mark(test: Any) -> Any:
        return pytest.mark.integration(pytest.mark.skipif(bool(absent), reason=reason)(test))

    return mark


needed = needs(*PACKAGES)
"""Marks an integration test that needs a browser and MiniWoB's pages."""


def processes(mark: str) -> list[Path]:
    """The folders of temporary files of the browsers' processes, one each, that were started with
    the environment variable MARK=`mark`.
    """
    result = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            pairs = (path / "environ").read_bytes().decode(errors="replace").split("\0")
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has ended
            continue
        variables = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        if variables.get(MARK) == mark and "chrom" in command:
            result.append(Path(variables.get("TMPDIR", "/")))
    return result
