from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.integration)])
def any_root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh root of either kind."""
    if request.param == "local":
        return str(tmp_path / "root")
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}"
