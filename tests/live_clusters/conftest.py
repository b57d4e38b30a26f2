"""One cluster a module, of a head and two nodes with a CPU each; the tests that kill nodes put new
ones in their place.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .lab import Lab, logs, permitted


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    if not permitted():
        pytest.skip(
            "making network and PID namespaces is not permitted here: run as root, or in a"
            " container with CAP_SYS_ADMIN"
        )
    made = Lab.make(tmp_path_factory.mktemp("lab"))
    try:
        for _ in range(3):
            made.add("node")
        made.ready()
        yield made
    finally:
        print(logs(list(made.nodes.values())))
        made.end()
