"""A model-free peer that is not RLlib's: Stable-Baselines3's SAC on metered reality, ten times as
fast on a CPU as RLlib's.

Its settings are the library's own defaults, which are those of Haarnoja et al. (arXiv 1812.05905):
256 x 256, learning rate 3e-4, batches of 256, an update a step, 100 random steps before.
"""

from __future__ import annotations

import time
from typing import Any

import gymnasium
import numpy as np
import torch
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback

from mesocosm.envs.config import RealityConfig
from mesocosm.envs.ledger import Ledger
from mesocosm.envs.make import make_env
from mesocosm.envs.meter import Meter, MeteredEnv

EPISODES = 10


def metered(reality: RealityConfig, ledger: Ledger, purpose: str) -> gymnasium.Env[Any, Any]:
    env: gymnasium.Env[Any, Any] = MeteredEnv(make_env(reality), Meter(ledger, purpose))
    return (
        gymnasium.wrappers.FlattenObservation(env)
        if isinstance(env.observation_space, gymnasium.spaces.Dict)
        else env
    )


class Judge(BaseCallback):
    """Measures the greedy policy every so many steps, and stops at the target."""

    def __init__(self, env: gymnasium.Env[Any, Any], every: int, target: float):
        super().__init__()
        self.env, self.every, self.target = env, every, target
        self.points: list[tuple[int, float]] = []
        self.steps = 0
        """Real steps before the last measurement."""

    def _on_step(self) -> bool:
        if self.num_timesteps % self.every:
            return True
        returns = []
        self.steps = 0
        for episode in range(EPISODES):
            observation, _ = self.env.reset(seed=10_000 + episode)
            total, done = 0.0, False
            while not done:
                action, _ = self.model.predict(observation, deterministic=True)
                observation, reward, terminated, truncated, _ = self.env.step(action)
                total, done, self.steps = (
                    total + float(reward),
                    terminated or truncated,
                    self.steps + 1,
                )
            returns.append(total)
        self.points.append((self.num_timesteps, float(np.mean(returns))))
        print(f"  SAC after {self.num_timesteps} real steps: {self.points[-1][1]:.1f}", flush=True)
        return self.points[-1][1] < self.target


def sac(
    reality: RealityConfig,
    ledger: Ledger,
    seed: int,
    steps: int,
    target: float,
    every: int,
    overrides: dict[str, Any],
) -> dict[str, Any]:
    """A cell of bench_agents: real steps at the first measurement at the target (None: not within
    `steps`), and what they cost.
    """
    torch.set_num_threads(1)
    began = time.monotonic()
    env = metered(reality, ledger, "baseline")
    judge = Judge(metered(reality, ledger, "judge"), every, target)
    SAC("MlpPolicy", env, seed=seed, device="cpu", **overrides).learn(steps, callback=judge)
    for used in (env, judge.env):
        used.close()
    reached = judge.points[-1][0] if judge.points[-1][1] >= target else None
    price = ledger.totals().purposes["baseline"].price
    return {
        "reached": reached,
        "judged": judge.steps,
        "price": price,
        "points": judge.points,
        "seconds": time.monotonic() - began,
    }
