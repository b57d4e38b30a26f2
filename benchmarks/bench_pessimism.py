"""Settings that keep an agent's gain real: the real return of agents trained in one world, by
penalty, threshold, horizon, members and base.

    python benchmarks/bench_pessimism.py [--env ID] [--seed N] [--cell TEXT] [--minutes M]
    [--table-only]

For each task and seed one world is trained on 500 random real steps (Reacher-v5: 1000), as
configs/loop has it (Reacher-v5: agents/reacher-ppo.yaml). In that world (or, where the variant says
members or base, in one of its own on the same steps) an agent is trained for each of the variants
below, with everything else as shipped, and judged by 10 greedy real episodes (Reacher-v5: 50).
PLAIN variants are the last policy of their training, the others the best of it by imagined return.
The default penalty is 0.3, and 0.02 that of agents/reacher-ppo.yaml. A cell is one agent. Cells lie
in benchmarks/results/bench_pessimism.json with commit and command and are never run twice;
--minutes stops after the cell in which they ran out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from bench_world import HERE, ROOT, commit

from mesocosm import config
from mesocosm.cluster import ray_session
from mesocosm.envs.ledger import Ledger
from mesocosm.evaluate.judge import judge
from mesocosm.jobs import collect, loop
from mesocosm.jobs import pretrain as pretraining
from mesocosm.jobs import train_agent as agents
from mesocosm.jobs.loop_config import fill
from mesocosm.policies.stored import policy_of
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Artifact, Storage

RESULTS = HERE / "results" / "bench_pessimism.json"
CONFIGS = HERE.parent / "configs" / "loop"
FILES = {
    "InvertedPendulum-v5": CONFIGS / "quickstart.yaml",
    "CartPole-v1": CONFIGS / "cartpole.yaml",
    "Reacher-v5": HERE / "agents" / "reacher-ppo.yaml",
}
STEPS = {"InvertedPendulum-v5": 500, "CartPole-v1": 500, "Reacher-v5": 1000}
EPISODES = {"InvertedPendulum-v5": 10, "CartPole-v1": 10, "Reacher-v5": 50}
SEEDS = (0, 1, 2)
PLAIN = ["agent.penalty=0", "agent.max_disagreement=null", "agent.snapshots=0"]
BRANCH = [*PLAIN, "agent.starts=logged"]
VARIANTS: dict[str, list[str]] = {
    "nothing": PLAIN,
    "penalty 0.03": [*PLAIN, "agent.penalty=0.03"],
    "penalty 0.1": [*PLAIN, "agent.penalty=0.1"],
    "penalty 0.3": [*PLAIN, "agent.penalty=0.3"],
    "penalty 1": [*PLAIN, "agent.penalty=1"],
    "truncated above 10": [*PLAIN, "agent.max_disagreement=10"],
    "logged starts, full": BRANCH,
    "logged starts, k = 15": [*BRANCH, "agent.horizon=15"],
    "logged starts, k = 5": [*BRANCH, "agent.horizon=5"],
    "logged starts, k = 1": [*BRANCH, "agent.horizon=1"],
    "nothing, the best of its training": ["agent.penalty=0"],
    "as shipped": [],
    "as shipped, penalty 0.3": ["agent.penalty=0.3"],
    "as shipped, 1 member": ["pretrain.model.members=1"],
    "as shipped, 2 members": ["pretrain.model.members=2"],
    "as shipped, 8 members": ["pretrain.model.members=8"],
    "as shipped, no base": ["pretrain.model.base=false"],
}


def world_of(cfg: loop.LoopConfig) -> Artifact:
    """The first round's world; found where it was trained before."""
    first, stage = fill(cfg.collect, cfg, 0), fill(cfg.pretrain, cfg, 0)
    with tracking.start("collect", first, quiet=True) as run:
        data = collect.JOB.run(first, run)
    stage.data.datasets = [data.id]
    with tracking.start("pretrain", stage, quiet=True) as run:
        return pretraining.JOB.run(stage, run)


def agent_of(cfg: loop.LoopConfig, world: Artifact) -> Artifact:
    """The first round's agent; found where it was trained before."""
    stage = fill(cfg.agent, cfg, 0)
    stage.world, stage.backend = world.id, "local"
    with tracking.start("train-agent", stage) as run:
        return agents.JOB.run(stage, run)


def configured(env: str, seed: int, overrides: list[str]) -> loop.LoopConfig:
    settings = [f"storage.root={ROOT}", f"seed={seed}", f"collect.steps={STEPS[env]}"]
    return config.load(loop.LoopConfig, [FILES[env]], [*settings, *overrides])


def cell(env: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    cfg = configured(env, seed, overrides)
    world = world_of(cfg)
    agent = agent_of(cfg, world)
    storage = Storage(str(ROOT))
    ledger = Ledger(storage, f"pessimism-{agent.id}", price=cfg.reality.price)
    policy = policy_of(storage, agent.name)
    judged = judge(policy, cfg.reality, ledger, episodes=EPISODES[env], seed=seed)
    metrics = agent.meta["metrics"]
    return {
        "return": judged.mean,
        "imagined": metrics.get("imagined_return"),
        "disagreement": metrics["disagreement"],
        "world": world.id,
        "settings": overrides,
    }


def saved(results: Path) -> dict[str, Any]:
    return json.loads(results.read_text()) if results.exists() else {}


def measure(
    doc: str | None,
    script: str,
    results: Path,
    every: list[tuple[str, str, int, Callable[[], dict[str, Any]]]],
) -> None:
    """Measure the cells (name, task, seed, function) that the command line names and `results`
    lacks. Each is stored with its commit and command.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--env", choices=FILES)
    parser.add_argument("--seed", choices=[str(s) for s in SEEDS])
    parser.add_argument("--cell", default="", help="only cells whose name holds this")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--table-only", action="store_true")
    options = parser.parse_args()
    began = time.monotonic()
    try:
        for name, env, seed, run_cell in [] if options.table_only else every:
            if (
                options.env not in (None, env)
                or options.seed not in (None, str(seed))
                or options.cell not in name
                or name in saved(results)
            ):
                continue
            if time.monotonic() - began > options.minutes * 60:
                break
            print(f"--- {name}", flush=True)
            result = {
                **run_cell(),
                "commit": commit(),
                "command": f"python benchmarks/{script} --env {env} --seed {seed}",
            }
            results.parent.mkdir(exist_ok=True)
            cells_by_name = dict(sorted({**saved(results), name: result}.items()))
            results.write_text(json.dumps(cells_by_name, indent=1) + "\n")
    finally:
        ray_session.shutdown()


def main() -> int:
    every = [
        (f"{env}/{variant}/{seed}", env, seed, partial(cell, env, seed, overrides))
        for variant, overrides in VARIANTS.items()
        for seed in SEEDS
        for env in FILES
    ]
    measure(__doc__, "bench_pessimism.py", RESULTS, every)
    print(table(saved(RESULTS)))
    return 0


def table(results: dict[str, Any]) -> str:
    heads = [f"{env}: seeds {', '.join(map(str, SEEDS))}" for env in FILES]
    lines = [f"| variant | {' | '.join(heads)} |", "|---|" + "---|" * len(FILES)]
    for variant in VARIANTS:
        cells = []
        for env in FILES:
            names = [f"{env}/{variant}/{seed}" for seed in SEEDS]
            returns = [results[name]["return"] if name in results else None for name in names]
            digits = 0 if all(value is None or abs(value) >= 50 for value in returns) else 1
            text = ", ".join("-" if value is None else f"{value:.{digits}f}" for value in returns)
            defined = [value for value in returns if value is not None]
            cells.append(f"{text} (mean {np.mean(defined):.{digits}f})" if defined else "-")
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
