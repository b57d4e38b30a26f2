"""Roots, private temporary folders and processes of tests of storage."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


def python(code: str, **environment: str) -> subprocess.Popen[str]:
    """A process that runs `code`."""
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, env=os.environ | environment, text=True, **pipes)


def fill_with(**files: str | bytes) -> Callable[[Path], None]:
    """Writes files into an artifact."""

    def fill(folder: Path) -> None:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            (folder / name).write_bytes(data)

    return fill


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.integration)])
def any_root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh root of either kind."""
    if request.param == "local":
        return str(tmp_path / "root")
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}"


@pytest.fixture
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A temporary folder for caches, scratch and Ray's sockets, made after pytest's own."""
    with tempfile.TemporaryDirectory(prefix="meso-", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield
