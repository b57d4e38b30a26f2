"""A storage with a dataset of `Walk`, a world whose base knows the dynamics, and two agents."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch

from mesocosm.config import StorageConfig
from mesocosm.envs.amounts import PurposeTotals
from mesocosm.envs.config import RealityConfig
from mesocosm.envs.ledger import Ledger
from mesocosm.evaluate.config import EvaluateConfig
from mesocosm.jobs.evaluate import JOB
from mesocosm.model.world import World
from mesocosm.policies.policy import Layout, Policy
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Artifact, Storage

from . import worlds

WALK = "evaluated_module:Walk"
"""`worlds.Walk`: the fixture `lab` gives the module this name."""
SLOW = "evaluated_module:slow"


@dataclass(frozen=True)
class Lab:
    root: str
    run: tracking.Run

    @property
    def storage(self) -> Storage:
        return Storage(self.root)

    def config(self, *, horizon: int | None = None, success: str | None = None, **keys: Any) -> Any:
        """An evaluation of `w0`; `horizon` and `success` are keys of `reality`."""
        reality = RealityConfig(env=WALK, kwargs={"limit": 12}, horizon=horizon, success=success)
        small = {"episodes": 5, "horizons": [1, 3], "starts": 16, "samples": 2}
        common = {"world": "worlds/w0", "reality": reality, "storage": StorageConfig(self.root)}
        return EvaluateConfig(**{**common, **small, **keys})

    def evaluate(self, config: EvaluateConfig) -> Artifact:
        return JOB.run(config, self.run)

    def judge_totals(self, ledger: str) -> PurposeTotals:
        return Ledger(self.storage, ledger).totals().purposes["judge"]

    @property
    def log(self) -> str:
        return (self.run.folder / "log.txt").read_text()

    @property
    def figures(self) -> dict[str, Any]:
        """The figures that were logged last."""
        return dict(json.loads((self.run.folder / "metrics.jsonl").read_text().splitlines()[-1]))

    def copy_world(
        self, name: str, datasets: list[str], change: Callable[[Any], None] = lambda codec: None
    ) -> None:
        """Store `w0` again as a world of `datasets`, with a changed codec."""

        def fill(folder: Path) -> None:
            shutil.copytree(self.storage.artifact("worlds", "w0").path, folder, dirs_exist_ok=True)
            (folder / "COMMIT.json").unlink()
            codec = json.loads((folder / "codec.json").read_text())
            change(codec)
            (folder / "codec.json").write_text(json.dumps(codec))

        self.storage.make("worlds", name, {"inputs": {"datasets": datasets}}, fill)


def summary_of(artifact: Artifact) -> dict[str, Any]:
    return dict(json.loads((artifact.path / "summary.json").read_text()))


def judge_row(summary: dict[str, Any]) -> dict[str, Any]:
    rows = {row["purpose"]: row for row in summary["real_steps"]["purposes"]}
    return dict(rows["judge"])


def fill_storage(storage: Storage, folder: Path) -> None:
    data = worlds.collect(folder / "walks", 20)

    def copy(to: Path) -> None:
        shutil.copytree(folder / "walks", to, dirs_exist_ok=True)

    storage.make("datasets", "walks", {"inputs": {}, "dropped": [{"steps": 4}]}, copy)
    made = worlds.untrained_world(data, family="sequence", context=4)
    codec = dict(made.codec)
    environment = {"id": WALK, "kwargs": {"limit": 12}, "max_episode_steps": None}
    codec["environment"] = codec["environment"] | environment
    world = World(made.net, made.base, codec)
    storage.make("worlds", "w0", {"inputs": {"datasets": ["walks"]}}, world.save)
    for name, space in (("a0", worlds.ACTIONS), ("other", gym.spaces.Discrete(3))):

        def save(to: Path, space: gym.Space[Any] = space) -> None:
            """The agent, and a snapshot of its training that acts otherwise."""
            policy(space).save(to)
            (to / "snapshots" / "2").mkdir(parents=True)
            policy(space, seed=1).save(to / "snapshots" / "2")

        storage.make("agents", name, {"inputs": {}, "config": {"iterations": 4}}, save)


def policy(actions: gym.Space[Any], seed: int = 0) -> Policy:
    torch.manual_seed(seed)
    discrete = isinstance(actions, gym.spaces.Discrete)
    layers = [{"kind": "linear", "in": 2, "out": 3 if discrete else 4}]
    layout = Layout("categorical" if discrete else "gaussian", layers)
    return Policy("PPO", worlds.OBSERVATIONS, actions, layout)
