"""The token of a world's ingress, in the environment and in its file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mesocosm.errors import UsageError
from mesocosm.serve.bearer import read_token

TOKEN = "planted-token-4f1c9a0b7d"


def test_token_in_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MESOCOSM_WORLD_TOKEN", TOKEN)
    assert read_token() == (TOKEN.encode(), "$MESOCOSM_WORLD_TOKEN")
    assert list(tmp_path.iterdir()) == []
    for bad in ("", "short", "with a space in the middle", "nöt of ASCII characters"):
        monkeypatch.setenv("MESOCOSM_WORLD_TOKEN", bad)
        with pytest.raises(
            UsageError, match="MESOCOSM_WORLD_TOKEN must hold at least 16 visible ASCII characters"
        ) as refused:
            read_token()
        assert not bad or bad not in str(refused.value)


def test_token_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Made once, with mode 0600. A file that others can use, or no plain file, is refused."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MESOCOSM_WORLD_TOKEN", raising=False)
    token, source = read_token()
    file = tmp_path / ".mesocosm/world_token"
    assert (
        source == str(file)
        and file.stat().st_mode & 0o777 == 0o600
        and file.read_bytes().strip() == token
    )
    assert read_token()[0] == token and [each.name for each in file.parent.iterdir()] == [
        "world_token"
    ]
    for mode in (0o640, 0o604, 0o620):
        file.chmod(mode)
        with pytest.raises(
            UsageError,
            match=(rf"world_token must have mode 0600, got {mode:04o}; run `chmod 600 {file}`"),
        ):
            read_token()
    file.chmod(0o600)
    file.write_text("")
    with pytest.raises(UsageError, match="world_token must hold at least 16 visible"):
        read_token()
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="world_token cannot be read"):
        read_token()
    assert not (tmp_path / "elsewhere").exists()
    file.unlink()
    os.mkfifo(file, 0o600)
    with pytest.raises(UsageError, match="must be a plain file of this user"):
        read_token()
