"""Small made-up episodes whose every value says where it stands."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from mesocosm.datasets.dataset import Dataset, Environment, write_dataset
from mesocosm.datasets.episode import Episode, Outcome
from mesocosm.jobs import curate as curate_job
from mesocosm.jobs.import_logs import JOB, ImportConfig
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Artifact, Storage

from . import walks
from .logs import configured

INTEGERS = spaces.Box(-(10**6), 10**6, (2,), np.int64)


def counted_episode(
    index: int, length: int, outcome: Outcome = "terminated", **rest: Any
) -> Episode:
    """Observation t of episode k is [k, t], its action t % 3, its reward t + 0.5: exact through any
    codec.
    """
    return Episode(
        index=index,
        seed=1000 + index,
        behaviour=rest.pop("behaviour", "random"),
        observations=[np.array([index, t], np.int64) for t in range(length + 1)],
        actions=[np.int64(t % 3) for t in range(length)],
        rewards=np.arange(length) + 0.5,
        outcome=outcome,
        **rest,
    )


@pytest.fixture(scope="module")
def a_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tracking.Run]:
    """A run for the jobs of one module's tests."""
    config = ImportConfig()
    config.storage.root = str(tmp_path_factory.mktemp("run"))
    with tracking.start("import", config, quiet=True) as started:
        yield started


@pytest.fixture(scope="module")
def cart(tmp_path_factory: pytest.TempPathFactory, cart_root: Callable[..., str]) -> Dataset:
    """400 transitions of CartPole-v1 and more, by a random policy."""
    storage = Storage(cart_root(tmp_path_factory.mktemp("cart")))
    return Dataset([storage.artifact("datasets", "cart").path])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of logs alone."""
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs"


@pytest.fixture
def import_logs(root: str, a_run: tracking.Run) -> Callable[..., Artifact]:
    """`import_logs(path, ..., key=value)` imports, in this process by default."""

    def make(*paths: Path | str, to: str = root, **keys: Any) -> Artifact:
        config = configured(*paths, **keys)
        config.storage.root = to
        a_run.storage = Storage(to)
        return JOB.run(config, a_run)

    return make


@pytest.fixture
def write_walks(root: str) -> Callable[..., str]:
    """`write_walks(episodes, id, **facts)` writes a dataset into storage."""
    return functools.partial(walks.write_walks, root)


@pytest.fixture
def curate(root: str, a_run: tracking.Run) -> Callable[..., Artifact]:
    """`curate(operation, ..., datasets=[...])`, in this process unless `workers` is set."""

    def make(*operations: dict[str, Any], **keys: Any) -> Artifact:
        a_run.storage = Storage(root)
        return curate_job.JOB.run(walks.configured(root, *operations, **keys), a_run)

    return make


@pytest.fixture
def counted() -> Callable[..., Episode]:
    return counted_episode


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write episodes into a fresh folder: `write(episodes, id="d", observation_space=..., ...)`."""

    def make(episodes: Sequence[Episode], id: str = "d", **facts: Any) -> Path:
        defaults: dict[str, Any] = {
            "environment": Environment(id="Counted-v0", task=facts.pop("task", [])),
            "observation_space": INTEGERS,
            "action_space": spaces.Discrete(3),
            "seed": 0,
        }
        write_dataset(tmp_path / id, episodes, id=id, **(defaults | facts))
        return tmp_path / id

    return make


@pytest.fixture
def counted_dataset(write: Callable[..., Path]) -> Callable[..., Dataset]:
    """A dataset of counted episodes of the given lengths."""

    def make(lengths: Sequence[int], outcome: Outcome = "terminated", **facts: Any) -> Dataset:
        return Dataset(
            [
                write(
                    [counted_episode(k, length, outcome) for k, length in enumerate(lengths)],
                    **facts,
                )
            ]
        )

    return make
