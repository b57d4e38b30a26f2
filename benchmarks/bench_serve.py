"""`make bench-serve`: imagined steps a second through Ray Serve over the same in this process, both
families.

    python benchmarks/bench_serve.py [--family NAME] [--envs B ...] [--rounds N] [--save]

Rounds alternate between the two backends of one client in one run, so that a noisy machine disturbs
both alike; the ratio is the median over rounds. The world is an untrained one of
InvertedPendulum-v5's spaces (4 numbers, 1 continuous action) at the default model config; weights
do not change its speed. --save keeps the table in benchmarks/results/bench_serve.json.
"""

from __future__ import annotations

import argparse
import importlib.util
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

import numpy as np
import torch
from gymnasium import spaces

from mesocosm.cluster import ray_session
from mesocosm.config import RayConfig, StorageConfig
from mesocosm.model.config import FAMILIES, ModelConfig
from mesocosm.serve.client import WorldVectorEnv
from mesocosm.serve.config import ServeConfig
from mesocosm.serve.deployment import deploy
from mesocosm.store.artifacts import Storage

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "bench_serve.json"


def untrained(family: str) -> Any:
    spec = importlib.util.spec_from_file_location(
        "worlds", HERE.parent / "tests" / "serve" / "conftest.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = ModelConfig()
    observation, action = (
        spaces.Box(-np.inf, np.inf, (4,), np.float64),
        spaces.Box(-3, 3, (1,), np.float32),
    )
    model = {
        "size": config.size,
        "members": config.members,
        "base": config.base,
        "context": config.context,
    }
    return module.untrained(observation, action, family, terminal=0.01, **model)


def seconds(env: WorldVectorEnv, actions: Any, at_least: float) -> float:
    """Mean seconds a call of `step`."""
    calls, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < at_least:
        env.step(actions)
        calls += 1
    return spent / calls


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--family", choices=FAMILIES, action="append")
    parser.add_argument("--envs", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ray_session.ensure(RayConfig(cpus=4))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for family in options.family or FAMILIES:
            Storage(folder).make("worlds", family, {}, untrained(family).save)
        deploy(ServeConfig(name="bench", storage=StorageConfig(folder)))
        print(
            f"{'family':<10} {'envs':>5} {'in process':>12} {'served':>10}  ratio (median of"
            f" {options.rounds} alternating rounds, range)"
        )
        for family in options.family or FAMILIES:
            for count in options.envs:
                local = WorldVectorEnv(count, family, root=folder, backend="local", horizon=200)
                served = WorldVectorEnv(count, family, app="bench", horizon=200)
                actions = local.action_space.sample()
                for env in (local, served):
                    env.reset(seed=0)
                    seconds(env, actions, 0.5)
                pairs = [
                    (seconds(local, actions, 0.5), seconds(served, actions, 0.5))
                    for _ in range(options.rounds)
                ]
                ratios = [a / b for a, b in pairs]
                here, served = (
                    count / statistics.median(times) for times in zip(*pairs, strict=True)
                )
                row = {
                    "family": family,
                    "envs": count,
                    "in_process_steps_per_s": round(here),
                    "served_steps_per_s": round(served),
                }
                row |= {
                    "ratio": round(statistics.median(ratios), 3),
                    "lowest": round(min(ratios), 3),
                    "highest": round(max(ratios), 3),
                }
                rows.append(row)
                print(
                    f"{family:<10} {count:>5} {here:>12,.0f} {served:>10,.0f}  {row['ratio']:.2f}"
                    f" ({row['lowest']:.2f} to {row['highest']:.2f})",
                    flush=True,
                )
                served.close()
    ray_session.shutdown()
    if options.save:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE
        ).stdout.strip()
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(
            json.dumps(
                {"commit": commit, "command": "python " + " ".join(sys.argv), "rows": rows},
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
