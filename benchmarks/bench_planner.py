"""`make bench-planner`: CPU milliseconds of a planned action and of the agent's own; and what a
planner earns in reality.

    python benchmarks/bench_planner.py                      # milliseconds, on spaces of two tasks
    python benchmarks/bench_planner.py --agent agents/ID [--root ROOT] [--episodes N]

The first form times worlds of 30k parameters with 4 members and agents of 128 x 128 units, all with
random weights (their values do not matter to the time): the spaces of Reacher-v5 and of
CartPole-v1, with 1, 16 and 64 environments in a call. The second form plays the same N real
episodes (seeds 10,000 on) with the agent, with the planner and the agent in the agent's own world,
and with a planner alone, and prints mean returns and the paired differences. No ledger counts these
steps. The milliseconds of a task are added to benchmarks/results/bench_planner.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium
import numpy as np
import torch
from bench_world import commit
from gymnasium import spaces
from gymnasium.vector.utils import concatenate, create_empty_array, iterate

from mesocosm.data.loading.codec import Codec, Scaling
from mesocosm.data.planners import load_agent, load_planner
from mesocosm.datasets.spaces import SpaceCodec
from mesocosm.envs.config import RealityConfig
from mesocosm.envs.make import make_env
from mesocosm.model.base import Base
from mesocosm.model.config import ModelConfig
from mesocosm.model.families import build
from mesocosm.model.mup import init_
from mesocosm.model.world import World
from mesocosm.policies.planner import Planner
from mesocosm.policies.planner_policy import PlannerPolicy
from mesocosm.policies.policy import Layout, Policy, sequential
from mesocosm.policies.value import ValueFunction
from mesocosm.store.artifacts import Storage

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "bench_planner.json"
BATCHES = (1, 16, 64)
REPEATS = 5
"""Rounds, in each of which every case is timed in turn; the best one counts."""
HIDDEN = 128
FIRST_SEED = 10_000


def box(size: int, bound: float = np.inf) -> spaces.Box:
    return spaces.Box(-bound, bound, (size,), np.float32)


TASKS: dict[str, tuple[spaces.Box, Any]] = {
    "Reacher-v5 (continuous)": (box(10), box(2, 1.0)),
    "CartPole-v1 (discrete)": (box(4), spaces.Discrete(2)),
}


def scaling(size: int) -> Scaling:
    return Scaling(np.zeros(size), np.ones(size), np.full(size, 1e-4))


def random_world(observation: Any, action: Any, family: str) -> tuple[World, Codec]:
    o, a = SpaceCodec(observation), SpaceCodec(action, "action")
    environment = {"id": "?", "version": "0", "kwargs": {}, "task": []}
    environment |= {"max_episode_steps": None, "success": None}
    rest: dict[str, Any] = {"reward_values": None, "reward_mean": 0.0, "reward_scale": 1.0}
    rest |= {"reward_bin": 1e-3, "durations": False, "duration_mean": 0.0, "duration_scale": 1.0}
    rest |= {"duration_bin": 1e-3, "terminal_rate": 0.01}
    sizes = {"observation": o.numbers, "action": a.numbers, "options": 0}
    scalings = {name: scaling(size) for name, size in sizes.items()}
    codec = Codec(o, a, environment, [], scalings, np.ones(o.numbers), rest)
    config = ModelConfig(family=family, size="30k", members=4)
    net, base = build(codec.spec, config), Base(codec.spec, config)
    init_(net, 0)
    return World(net, base, codec.to_json()), codec


def random_agent(observation: Any, action: Any) -> tuple[Policy, ValueFunction]:
    def layers(inputs: int, outputs: int) -> list[dict[str, Any]]:
        return [
            {"kind": "linear", "in": inputs, "out": HIDDEN},
            {"kind": "relu"},
            {"kind": "linear", "in": HIDDEN, "out": HIDDEN},
            {"kind": "relu"},
            {"kind": "linear", "in": HIDDEN, "out": outputs},
        ]

    size = observation.shape[0]
    if isinstance(action, spaces.Box):
        policy = Policy(
            "SAC",
            observation,
            action,
            Layout("squashed_gaussian", layers(size, 2 * action.shape[0])),
        )
        critics = [sequential(layers(size + action.shape[0], 1)) for _ in range(2)]
        return policy, ValueFunction("state_action", critics, 0.99)
    count = int(action.n)
    policy = Policy("SAC", observation, action, Layout("categorical", layers(size, count)))
    critics = [sequential(layers(size, count)) for _ in range(2)]
    return policy, ValueFunction("actions", critics, 0.99)


def milliseconds(act: Callable[[Any], Any], observations: list[Any]) -> float:
    """CPU milliseconds per action over some calls."""
    began = time.process_time()
    for batch in observations:
        act(batch)
    return 1e3 * (time.process_time() - began) / (len(observations) * len(observations[0]))


def speed(family: str) -> dict[str, Any]:
    """{task: {batch: {"agent", "planner and agent", "planner alone": ms per action}}}"""
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    for task, (observation, action) in TASKS.items():
        world, codec = random_world(observation, action, family)
        known = random_agent(observation, action)
        rng = np.random.default_rng(0)
        rows: dict[str, Any] = {}
        for batch in BATCHES:
            calls = max(3, 24 // batch)
            seen = [
                rng.standard_normal((batch, *observation.shape)).astype(np.float32)
                for _ in range(calls)
            ]
            best: dict[str, float] = {}
            for _ in range(REPEATS):
                cases: dict[str, Callable[[Any], Any]] = {"agent": known[0].act}
                for name, agent in (("planner and agent", known), ("planner alone", None)):
                    policy = PlannerPolicy(Planner(world, codec, agent))
                    policy.reset(batch)
                    cases[name] = policy.act
                for name, act in cases.items():
                    best[name] = min(best.get(name, np.inf), milliseconds(act, seen))
            rows[str(batch)] = best
            text = "  ".join(f"{name} {value:.3f}" for name, value in best.items())
            ratio = best["planner and agent"] / best["agent"]
            print(f"{family}, {task}, B={batch}: {text} ms; ratio {ratio:.0f}", flush=True)
        result[task] = rows
    return result


def played(act: Any, codec: Codec, episodes: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Returns of whole real episodes, all of which step together."""
    known = codec.environment
    config = RealityConfig(env=known["id"], kwargs=known["kwargs"], task=known["task"])
    envs = [make_env(config) for _ in range(episodes)]
    observations = [env.reset(seed=FIRST_SEED + i)[0] for i, env in enumerate(envs)]
    total, running = np.zeros(episodes), np.ones(episodes, np.bool_)
    space, action_space = codec.observation_space, codec.action_space
    batched = gymnasium.vector.utils.batch_space(action_space, episodes)
    while running.any():
        batch = concatenate(space, observations, create_empty_array(space, episodes))
        actions = list(iterate(batched, act(batch)))
        for i in np.flatnonzero(running):
            observations[i], reward, terminated, truncated, _ = envs[i].step(actions[i])
            total[i] += float(reward)
            running[i] = not (terminated or truncated)
    return total


def returns(storage: Storage, agent: str, episodes: int) -> None:
    """Print the returns of the agent, the planner with it, and the planner alone."""
    policy, _ = load_agent(storage, agent)
    with_agent = load_planner(storage, agent)
    world, codec = with_agent.world, with_agent.codec
    assert isinstance(codec, Codec)
    acts = {
        "agent": (policy.act, None),
        "planner and agent": (None, with_agent),
        "planner alone": (None, Planner(world, codec)),
    }
    base = None
    for name, (act, planner) in acts.items():
        planned = None
        if planner is not None:
            planned = PlannerPolicy(planner)
            planned.reset(episodes)
            act = planned.act
        earned = played(act, codec, episodes)
        base = earned if base is None else base
        error, gain = earned.std(ddof=1) / len(earned) ** 0.5, earned - base
        text = f"{name}: {earned.mean():.2f} +- {error:.2f}"
        if planned is not None:
            of_gain = gain.std(ddof=1) / len(gain) ** 0.5
            text += f", {gain.mean():+.2f} +- {of_gain:.2f} than the agent (paired)"
            text += f", {planned.ms_per_action:.2f} ms of CPU an action at B={episodes}"
        print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--agent")
    parser.add_argument("--root", default=".mesocosm")
    parser.add_argument("--episodes", type=int, default=50)
    args = parser.parse_args()
    if args.agent:
        returns(Storage(args.root), args.agent, args.episodes)
        return
    stored = {family: speed(family) for family in ("ensemble", "sequence")}
    about = {"commit": commit(), "command": " ".join(["python", *sys.argv])}
    RESULTS.write_text(json.dumps(about | {"ms_per_action": stored}, indent=1) + "\n")


if __name__ == "__main__":
    main()
