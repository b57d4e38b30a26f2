"""`make bench-evaluate`: does the evaluation suite trust the shipped worlds, and is it right:
policy values on every shipped task, 3 seeds.

    python benchmarks/bench_evaluate.py [--env ID] [--seed N] [--minutes M] [--table-only]

A cell is the job `evaluate` as configs/evaluate has it, on one world (that of bench_pessimism: 500
random real steps, Reacher-v5 1000) and its agent as shipped. Goals: r >= .9, regret@1 <= 5% of the
range, the starts' two-sample AUC <= .6. Cells are stored in benchmarks/results/bench_evaluate.json
with commit and command and never run twice; --minutes stops after the cell in which they ran out.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from bench_pessimism import FILES, SEEDS, agent_of, configured, measure, saved, world_of
from bench_world import HERE, ROOT

from mesocosm import config
from mesocosm.evaluate.config import EvaluateConfig
from mesocosm.jobs import evaluate as evaluation
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Artifact

RESULTS = HERE / "results" / "bench_evaluate.json"
CONFIGS = HERE.parent / "configs" / "evaluate"
OWN = {
    "InvertedPendulum-v5": "pendulum.yaml",
    "CartPole-v1": "cartpole.yaml",
    "Reacher-v5": "reacher.yaml",
}
RANKING = (
    "policies",
    "fifths",
    "low",
    "high",
    "pearson",
    "pearson_interval",
    "spearman",
    "spearman_top",
    "mmrv",
    "regret",
    "error",
)


def cell(env: str, seed: int) -> dict[str, Any]:
    cfg = configured(env, seed, [])
    world = world_of(cfg)
    return evaluated(env, seed, world, agent_of(cfg, world), [])


def evaluated(
    env: str, seed: int, world: Artifact, agent: Artifact, overrides: list[str]
) -> dict[str, Any]:
    """The suite's results for `world` and `agent`, with the settings of configs/evaluate."""
    settings = [f"storage.root={ROOT}", f"seed={seed}", f"world={world.id}", f"agent={agent.id}"]
    stage = config.load(EvaluateConfig, [CONFIGS / OWN[env]], [*settings, *overrides])
    with tracking.start("evaluate", stage) as run:
        made = evaluation.JOB.run(stage, run)
    suite = json.loads((made.path / "summary.json").read_text())["suite"]
    value, off, starts = suite["policy_value"], suite["off_policy"], suite["starts"]
    return {
        **{key: value["ranking"][key] for key in RANKING},
        "judge_steps": value["real_steps"],
        "auroc": off["auroc"],
        "auroc_interval": off["auroc_interval"],
        "starts_auc": starts["auc"],
        "starts_auc_interval": starts["auc_interval"],
        "agent": suite["agent"],
    }


def main() -> int:
    measure(
        __doc__,
        "bench_evaluate.py",
        RESULTS,
        [(f"{env}/{seed}", env, seed, partial(cell, env, seed)) for seed in SEEDS for env in FILES],
    )
    print(table(saved(RESULTS)))
    return 0


def table(results: dict[str, Any]) -> str:
    lines = [
        (
            "| task, seed | agent in reality | policies (by fifth) | Pearson r (90%) | Spearman,"
            " top half | regret@1 | error | AUROC | starts' AUC | judged |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, cell in sorted(results.items()):
        row = [
            name.replace("/", ", "),
            f"{cell['agent']['real']:.4g}",
            f"{cell['policies']} ({' '.join(map(str, cell['fifths']))})",
            f"{shown(cell['pearson'])} ({' to '.join(map(shown, cell['pearson_interval'] or ()))})",
            f"{shown(cell['spearman'])}, {shown(cell['spearman_top'])}",
            "-" if cell["regret"] is None else f"{cell['regret']:.1%}",
            f"{cell['error']:.4g}",
            shown(cell["auroc"]),
            shown(cell["starts_auc"]),
            f"{cell['judge_steps']:,}",
        ]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(main())
