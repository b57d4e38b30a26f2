"""Sweeps on the small CartPole dataset. `laws` beside the tests makes synthetic tables."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mesocosm import config
from mesocosm.datasets.dataset import Dataset
from mesocosm.scaling.sweep_config import SweepConfig
from mesocosm.store.artifacts import Storage

sys.path.insert(0, str(Path(__file__).parent))

DATASET = "cart"
SMALL = (
    "model.members=1",
    "model.context=8",
    "model.base_steps=50",
    "grid.sizes=[10k,30k]",
    "grid.data=[300,600]",
    "train.batch=8",
    "model.head_steps=50",
    "train.warmup=1",
    "train.precision=fp32",
    "train.validate_windows=64",
)


@pytest.fixture(scope="session")
def cart(cart_root: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    root = cart_root(tmp_path_factory.mktemp("cart"))
    return Dataset([Storage(root).artifact("datasets", DATASET).path])


@pytest.fixture(scope="session")
def small() -> tuple[str, ...]:
    """The overrides of `sweep_of`."""
    return SMALL


@pytest.fixture(scope="session")
def sweep_of() -> Callable[..., SweepConfig]:
    """`sweep_of(root, *overrides)`"""

    def of(root: str, *overrides: str) -> SweepConfig:
        return config.load(
            SweepConfig,
            overrides=(f"storage.root={root}", f"data.datasets=[{DATASET}]", *SMALL, *overrides),
        )

    return of
