from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run in the folder of a user's own module, `ownenvs`."""
    folder = Path(__file__).parents[1] / "sample_envs"
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    return folder
