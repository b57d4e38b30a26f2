"""A model-free peer that is not RLlib's: Stable-Baselines3's SAC on metered reality, ten times as
fast on a CPU as RLlib's.

Its settings are the library's own defaults, which are those of Haarnoja et al. (arXiv 1812.05905):
256 x 256, learning rate 3e-4, batches of 256, an update a step, 100 random steps before.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import torch
from stable_baselines3 import SAC

from mesocosm.envs.config import RealityConfig
from mesocosm.envs.ledger import Ledger
from mesocosm.envs.make import make_env
from mesocosm.envs.meter import Meter
from mesocosm.envs.metered import MeteredEnv
from mesocosm.store.artifacts import Storage

EPISODES = 10
"""Greedy episodes of a measurement."""
BUFFER = 100_000
"""Transitions of the replay buffer: more than any cell takes."""


def metered(reality: RealityConfig, ledger: Ledger, purpose: str) -> gymnasium.Env[Any, Any]:
    env: gymnasium.Env[Any, Any] = MeteredEnv(make_env(reality), Meter(ledger, purpose))
    return (
        gymnasium.wrappers.FlattenObservation(env)
        if isinstance(env.observation_space, gymnasium.spaces.Dict)
        else env
    )


def judge(model: SAC, env: gymnasium.Env[Any, Any]) -> tuple[float, int]:
    """The mean return of greedy episodes, always from the same starts, and their steps."""
    total, steps = 0.0, 0
    for episode in range(EPISODES):
        observation, _ = env.reset(seed=10_000 + episode)
        done = False
        while not done:
            action, _ = model.predict(observation, deterministic=True)
            observation, reward, terminated, truncated, _ = env.step(action)
            total, done, steps = total + float(reward), terminated or truncated, steps + 1
    return total / EPISODES, steps


def sac(
    reality: RealityConfig,
    root: Path,
    name: str,
    save: Callable[[dict[str, Any]], None],
    *,
    seed: int,
    steps: int,
    target: float,
    every: int,
) -> None:
    """A cell of bench_agents: SAC until a measurement reaches `target` or `steps` are taken.

    The model and its replay buffer are saved after each measurement. An interrupted run continues
    from there, with a new episode. Steps after the last measurement are lost, but are part of the
    price.

    Args:
        root: The storage's root, with the ledger and the saved models.
        name: The cell, for the names of both.
        save: Called with the cell's result so far after each measurement: `reached` (real steps at
            the first measurement at the target, or None), `judged` (real steps of the last
            measurement), `price` (of the steps and resets of training), `points` ((real steps, mean
            return) of each measurement), `seconds` (wall time, over all parts of an interrupted
            run) and `finished`.
        every: Real steps between two measurements.
    """
    torch.set_num_threads(1)
    folder = root / "peers" / name.replace("/", "-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "state.json"
    fresh = {"ledger": f"{folder.name}-{time.time_ns()}", "points": [], "seconds": 0.0}
    state: dict[str, Any] = json.loads(path.read_text()) if path.exists() else fresh
    points = state["points"]
    ledger = Ledger(Storage(str(root)), state["ledger"], price=reality.price)
    env, judged_env = (metered(reality, ledger, purpose) for purpose in ("baseline", "judge"))
    saved = folder / str(points[-1][0]) if points else None
    if saved is None:
        model = SAC("MlpPolicy", env, seed=seed, device="cpu", buffer_size=BUFFER)
    else:
        model = SAC.load(saved / "model", env, device="cpu")
        model.load_replay_buffer(saved / "buffer.pkl")
        model.set_random_seed(seed + model.num_timesteps)  # not the first part's draws again
    reached = bool(points) and points[-1][1] >= target
    while not reached and model.num_timesteps < steps:
        began = time.monotonic()
        model.learn(every, reset_num_timesteps=False)
        mean, judged = judge(model, judged_env)
        points.append((model.num_timesteps, mean))
        reached = mean >= target
        print(f"  SAC after {model.num_timesteps} real steps: {mean:.1f}", flush=True)
        new = folder / str(model.num_timesteps)
        new.mkdir(exist_ok=True)
        model.save(new / "model")
        model.save_replay_buffer(new / "buffer.pkl")
        state["seconds"] += time.monotonic() - began
        part = path.with_suffix(".part")
        part.write_text(json.dumps(state))
        os.replace(part, path)
        if saved is not None:
            shutil.rmtree(saved)
        saved = new
        save(
            {
                "reached": model.num_timesteps if reached else None,
                "judged": judged,
                "price": ledger.totals().purposes["baseline"].price,
                "points": points,
                "seconds": state["seconds"],
                "finished": reached or model.num_timesteps >= steps,
            }
        )
    for used in (env, judged_env):
        used.close()
