"""The token of a world's ingress, in the environment and in its file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mesocosm.errors import UsageError
from mesocosm.serve.bearer import read_token

from .worlds import TOKEN


def refused(message: str) -> str:
    """The error of `read_token`, which matches `message`."""
    with pytest.raises(UsageError, match=message) as error:
        read_token()
    return str(error.value)


def test_token_in_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MESOCOSM_WORLD_TOKEN", TOKEN)
    assert read_token() == (TOKEN.encode(), "$MESOCOSM_WORLD_TOKEN")
    assert list(tmp_path.iterdir()) == []
    for bad in ("", "short", "with a space in the middle", "nöt of ASCII characters"):
        monkeypatch.setenv("MESOCOSM_WORLD_TOKEN", bad)
        message = refused("MESOCOSM_WORLD_TOKEN must hold at least 16 visible ASCII characters")
        assert not bad or bad not in message


def test_token_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Made once, with mode 0600. A file that others can use, or no plain file, is refused."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MESOCOSM_WORLD_TOKEN", raising=False)
    token, source = read_token()
    file = tmp_path / ".mesocosm/world_token"
    assert source == str(file) and file.stat().st_mode & 0o777 == 0o600
    assert file.read_bytes().strip() == token == read_token()[0]
    assert [path.name for path in file.parent.iterdir()] == ["world_token"]
    for mode in (0o640, 0o604, 0o620):
        file.chmod(mode)
        refused(rf"world_token must have mode 0600, got {mode:04o}; run `chmod 600 {file}`")
    file.chmod(0o600)
    file.write_text("")
    refused("world_token must hold at least 16 visible")
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere")
    refused("world_token cannot be read")
    assert not (tmp_path / "elsewhere").exists()
    file.unlink()
    os.mkfifo(file, 0o600)
    refused("must be a plain file of this user")
