"""`make bench-serve`: imagined steps a second through Ray Serve over the same in this process, both
families, with the disagreement of every step and of none.

    python benchmarks/bench_serve.py [--family NAME] [--envs B ...] [--rounds N] [--save]

Rounds alternate between the two backends of one client in one run, so that a noisy machine disturbs
both equally; the ratio is the median over rounds. The world is an untrained one of
InvertedPendulum-v5's spaces (4 numbers, 1 continuous action) at the default model config; weights
do not change its speed. --save keeps the table in benchmarks/results/bench_serve.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from gymnasium import spaces

from mesocosm.cluster import ray_session
from mesocosm.config import RayConfig, StorageConfig
from mesocosm.model.config import FAMILIES, ModelConfig
from mesocosm.serve.config import ServeConfig
from mesocosm.serve.deployment import deploy
from mesocosm.serve.world_env import WorldVectorEnv
from mesocosm.store.artifacts import Storage
from tests.serve.worlds import untrained

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "bench_serve.json"
SPACES = spaces.Box(-np.inf, np.inf, (4,), np.float64), spaces.Box(-3, 3, (1,), np.float32)
MODEL = {name: getattr(ModelConfig(), name) for name in ("size", "members", "base", "context")}


def seconds(env: WorldVectorEnv, actions: Any, at_least: float) -> float:
    """Mean seconds a call of `step`."""
    calls, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < at_least:
        env.step(actions)
        calls += 1
    return spent / calls


def compare(root: str, family: str, count: int, every: int, rounds: int) -> dict[str, Any]:
    """The row of one family, number of environments and `disagreement_every`."""
    options: dict[str, Any] = {"horizon": 200, "disagreement_every": every}
    local = WorldVectorEnv(count, family, root=root, backend="local", **options)
    served = WorldVectorEnv(count, family, app="bench", **options)
    actions = local.action_space.sample()
    for env in (local, served):
        env.reset(seed=0)
        seconds(env, actions, 0.5)
    pairs = [[seconds(env, actions, 0.5) for env in (local, served)] for _ in range(rounds)]
    served.close()
    ratios = [in_process / over_serve for in_process, over_serve in pairs]
    speeds = [round(count / statistics.median(times)) for times in zip(*pairs, strict=True)]
    row: dict[str, Any] = {"family": family, "envs": count, "disagreement_every": every}
    row |= {"in_process_steps_per_s": speeds[0], "served_steps_per_s": speeds[1]}
    spread = {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    return row | {name: round(value, 3) for name, value in spread.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--family", choices=FAMILIES, action="append")
    parser.add_argument("--envs", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ray_session.ensure(RayConfig(cpus=4))
    rows = []
    with tempfile.TemporaryDirectory() as root:
        for family in options.family or FAMILIES:
            world = untrained(*SPACES, family, terminal=0.01, **MODEL)
            Storage(root).make("worlds", family, {}, world.save)
        deploy(ServeConfig(name="bench", storage=StorageConfig(root)))
        rounds = f"(median of {options.rounds} alternating rounds, range)"
        head = f"{'family':<10} {'envs':>5} {'every':>5} {'in process':>12} {'served':>10}"
        print(f"{head}  ratio {rounds}")
        for family in options.family or FAMILIES:
            for count, every in itertools.product(options.envs, (1, 0)):
                row = compare(root, family, count, every, options.rounds)
                rows.append(row)
                speeds = f"{row['in_process_steps_per_s']:>12,} {row['served_steps_per_s']:>10,}"
                ratio = f"{row['ratio']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})"
                print(f"{family:<10} {count:>5} {every:>5} {speeds}  {ratio}", flush=True)
    ray_session.shutdown()
    if options.save:
        head = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(head, capture_output=True, text=True, cwd=HERE).stdout.strip()
        RESULTS.parent.mkdir(exist_ok=True)
        result = {"commit": commit, "command": "python " + " ".join(sys.argv), "rows": rows}
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
