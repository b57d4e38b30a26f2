"""The pretrain job, run on the small CartPole dataset as a user would."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from factories import SHORT_RUN, SMALL_WORLD
from pytest import approx

from mesocosm.config import load as load_config
from mesocosm.jobs.pretrain import JOB, PretrainConfig
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Artifact

DATASET = "cart"
SMALL = (*SMALL_WORLD, "train.lr=3e-3")


@dataclass
class Pretrained:
    """A finished pretrain job."""

    artifact: Artifact
    folder: Path
    """The run's folder."""

    @property
    def lines(self) -> list[dict[str, Any]]:
        text = (self.folder / "metrics.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def line(self, step: int) -> dict[str, Any]:
        """The first line of `step`."""
        return next(line for line in self.lines if line["step"] == step)

    @property
    def losses(self) -> dict[int, list[float]]:
        """By step, one for each time that it was trained."""
        losses: dict[int, list[float]] = {}
        for line in self.lines:
            if "train/loss" in line:
                losses.setdefault(line["step"], []).append(line["train/loss"])
        return losses

    @property
    def log(self) -> str:
        return (self.folder / "log.txt").read_text()

    def has_weights_of(self, other: Pretrained) -> bool:
        """Whether both worlds have the same weights to the last bit."""
        one, two = ((x.artifact.path / "model.safetensors").read_bytes() for x in (self, other))
        return bool(one == two)

    def has_losses_of(self, whole: Pretrained, **tolerance: float) -> bool:
        """Whether each step's last loss is that of the undisturbed run."""
        return bool(
            {step: values[-1] for step, values in self.losses.items()}
            == approx({step: whole.losses[step][0] for step in self.losses}, **tolerance)
        )


def _load(root: str, *overrides: str) -> PretrainConfig:
    keys = (f"storage.root={root}", f"data.datasets=[{DATASET}]", *SMALL, *overrides)
    return load_config(PretrainConfig, overrides=keys)


def _pretrain(root: str, *overrides: str) -> Pretrained:
    """Run the job with the small defaults and `overrides`."""
    config = _load(root, *overrides)
    with tracking.start("pretrain", config, quiet=True) as started:
        return Pretrained(JOB.run(config, started), started.folder)


@pytest.fixture(scope="session")
def load() -> Callable[..., PretrainConfig]:
    """`load(root, *overrides)`"""
    return _load


@pytest.fixture(scope="session")
def pretrain() -> Callable[..., Pretrained]:
    """`pretrain(root, *overrides)`"""
    return _pretrain


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory,
    cart_root: Callable[..., str],
    pretrain: Callable[..., Pretrained],
) -> Pretrained:
    """One worker, never disturbed."""
    return pretrain(cart_root(tmp_path_factory.mktemp("whole")), *SHORT_RUN)
