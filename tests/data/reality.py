"""Configs of collections in CartPole and in the sample environments, whose trouble is planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mesocosm.data.collecting.config import CollectConfig
from mesocosm.data.collecting.workers import CollectTask
from mesocosm.envs.config import RealityConfig
from mesocosm.envs.episode import episode_seed
from mesocosm.envs.ledger import Ledger
from mesocosm.policies.behaviours import BehaviourConfig
from mesocosm.store.artifacts import Artifact, Storage

SAMPLE_ENVS = Path(__file__).parent.parent / "sample_envs"


def config(
    root: str,
    env: str = "CartPole-v1",
    *,
    steps: int = 200,
    workers: int = 0,
    reality: dict[str, Any] | None = None,
    **keys: Any,
) -> CollectConfig:
    cfg = CollectConfig(
        reality=RealityConfig(env=env, **(reality or {})), steps=steps, workers=workers, **keys
    )
    cfg.storage.root = root
    return cfg


def scripted(name: str) -> list[BehaviourConfig]:
    """A function of the sample module."""
    return [BehaviourConfig("scripted", function=f"ownenvs:{name}")]


def troubled(trouble: dict[int, str], **more: Any) -> dict[str, Any]:
    """Reality's config, with trouble in episodes of seed 0."""
    seeded = {str(episode_seed(0, k)): name for k, name in trouble.items()}
    return {"kwargs": {"trouble": seeded}, "horizon": 12, **more}


def a_task(root: str, trouble: dict[int, str], **kwargs: Any) -> CollectTask:
    """A task of workers in `ownenvs:Line`, whose steps may take 0.3 s."""
    reality = troubled(trouble, env="ownenvs:Line", step_timeout_s=0.3) | {"horizon": 10}
    reality["kwargs"] |= {"stretch": 0.0, **kwargs}
    behaviours = [BehaviourConfig()]
    return CollectTask(
        RealityConfig(**reality), behaviours, 0, root, "x", "d", "r", str(SAMPLE_ENVS)
    )


def spent(cfg: CollectConfig, artifact: Artifact) -> Any:
    return Ledger(Storage(cfg.storage.root), cfg.ledger or artifact.id).totals()
