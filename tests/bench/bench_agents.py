"""`make bench-agents`: real steps to a target return, an agent trained in the world against model-free training on reality.

    python tests/bench/bench_agents.py [--env ID] [--method world|PPO|DQN|SAC] [--seed N] [--minutes M] [--table-only]

A cell is (environment, method, seed): the loop as shipped in configs/loop, stopped at its target, or the model-free job with the
settings of mesocosm/agents/settings.py. Cells lie in tests/bench/results/bench_agents.json with commit and command, and are never run
twice; --minutes stops after the cell in which they ran out.

What counts: every real step that trained a policy. A world's agent is judged after each round by 10 greedy episodes, which
choose only when the loop stops; `strict` counts those too. Model-free training reaches the target when the mean of its last 10 training episodes
does and 5 greedy episodes, which count, confirm it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from bench_world import HERE, ROOT, commit

from mesocosm import cluster, config, loop, tracking
from mesocosm.agents import baseline
from mesocosm.agents.config import BaselineConfig

RESULTS = HERE / "results" / "bench_agents.json"
CONFIGS = HERE.parents[1] / "configs" / "loop"
CASES = {"InvertedPendulum-v5": ("quickstart.yaml", 950.0, ("world", "PPO", "SAC")), "CartPole-v1": ("cartpole.yaml", 475.0, ("world", "PPO", "DQN"))}
CAP = 30_000
"""Real steps after which a model-free run is censored."""
ROUNDS = 8
SEEDS = (0, 1, 2)


def world(env: str, seed: int) -> dict[str, Any]:
    file, target, _ = CASES[env]
    overrides = [
        f"storage.root={ROOT}",
        f"seed={seed}",
        f"target={target}",
        f"rounds={ROUNDS}",
        "stop_at_target=true",
        "baselines=[]",
        "reality.budget.steps=8000",
    ]
    cfg = config.load(loop.LoopConfig, [CONFIGS / file], overrides)
    with tracking.start("loop", cfg) as run:
        artifact = loop.run(cfg, run)
    summary = json.loads((artifact.path / "summary.json").read_text())
    curve = summary["curves"]["world"][0]
    reached = curve["steps_to_target"]
    judged = sum(row["steps"] for row in summary["real_steps"]["purposes"] if row["purpose"] == "judge")
    points = [(p["real_steps"], p["mean"]) for p in curve["points"]]
    return {"reached": reached, "strict": None if reached is None else reached + judged, "points": points, "seconds": curve["wall_seconds"]}


def model_free(env: str, algo: str, seed: int) -> dict[str, Any]:
    file, target, _ = CASES[env]
    reality = config.load(loop.LoopConfig, [CONFIGS / file]).reality
    cfg = config.load(BaselineConfig, [], [f"storage.root={ROOT}", f"seed={seed}", f"algo={algo}", f"steps={CAP}", f"target={target}"])
    cfg.reality = reality
    with tracking.start("baseline", cfg) as run:
        artifact = baseline.run(cfg, run)
    curve = json.loads((artifact.path / "curve.json").read_text())
    points = [(p["steps"], p["return"]) for p in curve["points"]]
    return {"reached": curve["reached"], "strict": curve["reached"], "points": points[:: max(1, len(points) // 40)], "seconds": curve["seconds"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", choices=CASES)
    parser.add_argument("--method")
    parser.add_argument("--seed", type=int, choices=SEEDS)
    parser.add_argument("--minutes", type=float, default=10_000)
    parser.add_argument("--table-only", action="store_true")
    options = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    began = time.monotonic()
    try:
        for seed in SEEDS:
            for env, (_, _, methods) in CASES.items():
                for method in methods:
                    cell = f"{env}/{method}/{seed}"
                    asked = options.env in (None, env) and options.method in (None, method) and options.seed in (None, seed)
                    if options.table_only or not asked or cell in results or time.monotonic() - began > options.minutes * 60:
                        continue
                    print(f"--- {cell}", flush=True)
                    found = world(env, seed) if method == "world" else model_free(env, method, seed)
                    results[cell] = {**found, "commit": commit(), "command": f"python tests/bench/bench_agents.py --env {env} --method {method} --seed {seed}"}
                    RESULTS.parent.mkdir(exist_ok=True)
                    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    finally:
        cluster.shutdown()
    _table(results)
    return 0


def _table(results: dict[str, Any]) -> None:
    """Median real steps to the target over the seeds; a censored run stands for more than it spent."""
    print(f"{'environment':<22}{'method':<8}{'runs':>5}{'reached':>9}{'median steps':>14}{'strict':>9}{'wall s':>8}")
    for env, (_, target, methods) in CASES.items():
        for method in methods:
            runs = [cell for name, cell in results.items() if name.startswith(f"{env}/{method}/")]
            if not runs:
                continue
            steps, strict = (sorted(float("inf") if run[key] is None else run[key] for run in runs)[len(runs) // 2] for key in ("reached", "strict"))
            hit = sum(run["reached"] is not None for run in runs)
            most = max(run["points"][-1][0] for run in runs if run["points"])
            shown = [f"> {most}" if value == float("inf") else f"{value:.0f}" for value in (steps, strict)]
            wall = sorted(run["seconds"] for run in runs)[len(runs) // 2]
            print(f"{env + f' {target:g}':<22}{method:<8}{len(runs):>5}{hit:>9}{shown[0]:>14}{shown[1]:>9}{wall:>8.0f}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main())
