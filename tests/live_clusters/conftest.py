"""One cluster a module, of a head and two nodes with a CPU each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .lab import Lab, running


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with running(tmp_path_factory.mktemp("lab")) as lab:
        lab.add_nodes(3)
        yield lab
