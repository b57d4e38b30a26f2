from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from mesocosm.config import StorageConfig
from mesocosm.evaluate.config import EvaluateConfig
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Storage

from . import worlds
from .lab import Lab, fill_storage


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A storage to evaluate in, and a run. The tests of a module share it."""
    folder = tmp_path_factory.mktemp("evaluate")
    root = str(folder / "root")
    sys.modules["evaluated_module"] = worlds
    fill_storage(Storage(root), folder)
    config = EvaluateConfig(storage=StorageConfig(root))
    with tracking.start("evaluate", config, quiet=True) as run:
        yield Lab(root, run)
