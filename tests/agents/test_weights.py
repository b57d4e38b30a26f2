"""Environment runners act by the learner's last weights, also on a busy machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import ray
import torch
from ray.rllib.utils import actor_manager

from mesocosm.agents import learner_access, rllib
from mesocosm.agents.env import AgentEnv
from mesocosm.agents.settings import Setup


@pytest.mark.slow
def test_no_weights_are_dropped_on_a_busy_machine(
    ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There `ray.wait` without patience finds nothing ready."""

    class BusyRay:
        def __getattr__(self, name: str) -> Any:
            return getattr(ray, name)

        def wait(self, refs: list[Any], *, timeout: float | None, **options: Any) -> Any:
            return ([], refs) if timeout == 0 else ray.wait(refs, timeout=timeout, **options)

    monkeypatch.setattr(actor_manager, "ray", BusyRay())
    model = {"fcnet_hiddens": [4]}
    setup = Setup("PPO", {"minibatch_size": 32}, model, 1, 32, 0, runners=1, gamma=0.99, seed=0)
    algorithm = rllib.build(
        setup,
        lambda count: AgentEnv(gym.vector.SyncVectorEnv([lambda: gym.make("CartPole-v1")] * count)),
        tmp_path / "rllib",
    )
    try:
        for _ in range(2):
            rllib.train(algorithm)
        (acting,) = rllib.runners(algorithm).foreach_env_runner(
            lambda runner: runner.module.state_dict(), local_env_runner=False
        )
        learned = learner_access.learner_of(algorithm).module["default_policy"].state_dict()
        for name, weights in acting.items():
            assert torch.equal(weights, learned[name]), f"{name} is of an earlier policy"
    finally:
        algorithm.stop()
