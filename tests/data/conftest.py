"""Fixtures of datasets and of the jobs that make them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mesocosm.data.collecting.config import CollectConfig
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.episode import Episode, Outcome
from mesocosm.jobs import collect as collect_job
from mesocosm.jobs import curate as curate_job
from mesocosm.jobs.import_logs import JOB, ImportConfig
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Artifact, Storage

from . import walks
from .counted import counted_episode, write_counted
from .logs import configured
from .reality import SAMPLE_ENVS


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
def user_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in the folder of a user's module, `ownenvs`."""
    monkeypatch.chdir(SAMPLE_ENVS)
    monkeypatch.syspath_prepend(str(SAMPLE_ENVS))


@pytest.fixture
def collect(a_run: tracking.Run) -> Callable[[CollectConfig], Artifact]:
    """`collect(config)` collects into its storage."""

    def run(config: CollectConfig) -> Artifact:
        a_run.storage = Storage(config.storage.root)
        return collect_job.JOB.run(config, a_run)

    return run


@pytest.fixture
def counted() -> Callable[..., Episode]:
    return counted_episode


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write episodes into a fresh folder: `write(episodes, id="d", observation_space=..., ...)`."""
    return functools.partial(write_counted, tmp_path)


@pytest.fixture
def counted_dataset(write: Callable[..., Path]) -> Callable[..., Dataset]:
    """A dataset of counted episodes of the given lengths."""

    def make(lengths: Sequence[int], outcome: Outcome = "terminated", **facts: Any) -> Dataset:
        episodes = [counted_episode(k, length, outcome) for k, length in enumerate(lengths)]
        return Dataset([write(episodes, **facts)])

    return make
