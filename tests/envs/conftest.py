from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def user_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in the folder of a user's module, `ownenvs`."""
    folder = Path(__file__).parents[1] / "sample_envs"
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
