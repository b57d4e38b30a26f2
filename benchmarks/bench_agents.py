"""`make bench-agents`: real steps to a target return, an agent trained in the world against
model-free training on reality.

    python benchmarks/bench_agents.py [--task NAME] [--method world|PPO|DQN|SAC] [--seed N|tune]
    [--minutes M] [--table-only]

A cell is one training run. On the first two tasks each method is tuned by the same budget, one run
of each of its three candidate settings below on seed 100; the one that reaches the target in the
fewest real steps is then run on seeds 0, 1 and 2. On the others no seed is spent on tuning: the
world's settings are those of configs/loop, a model-free method's are published ones. A world's run
is the loop as configs/loop has it, stopped at its target; a model-free run is the job `baseline` on
the same reality. Cells lie in benchmarks/results/bench_agents.json with commit and command and are
never run twice; --minutes stops after the cell in which they ran out. The end prints the table and
draws docs/plots/bench_agents.svg.

What counts: every real step that a policy, or the world it was trained in, was trained on. Policies
are measured by 10 greedy episodes, a world's after each round, a model-free one's every 500 steps;
`reached` is the first measurement at the target, with the measuring apart for all. `strict` counts
it too: for the world all of it, for model-free training only the measurement that found the target.
`tuning` is what the three runs on seed 100 cost. A run that misses is censored at its last step.
The price is the config's declared one, of the steps and resets that count (judging apart).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib

matplotlib.use("svg")
import peers
from bench_world import HERE, ROOT, commit
from matplotlib import pyplot
from matplotlib.ticker import NullFormatter

from mesocosm import config
from mesocosm.agents.config import BaselineConfig
from mesocosm.cluster import ray_session
from mesocosm.envs.ledger import Ledger
from mesocosm.jobs import baseline, loop
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Storage

os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
)  # swingup.py, for the processes that collect
RESULTS = HERE / "results" / "bench_agents.json"
PLOT = HERE.parent / "docs" / "plots" / "bench_agents.svg"
CONFIGS = HERE.parent / "configs" / "loop"
SEEDS = (0, 1, 2)
PEER = "SB3-SAC"
"""Stable-Baselines3's SAC (peers.py): on the tasks that are not tuned, ten times as fast here as
RLlib's.
"""
TUNING_SEED = 100

LARGE = ["collect.steps=1000", "explore.steps=500"]
SMALL = ["collect.steps=500", "explore.steps=250"]
ADAM = "params.actor_lr={0} params.critic_lr={0} params.alpha_lr={0}"
# RL Baselines3 Zoo: its PPO for CartPole-v1, its SAC for PyBullet's continuous tasks, its DQN for
# CartPole-v1 (REAL["DQN"]).
ZOO_PPO = ["num_envs=8", "rollout=32", "gamma=0.98", "params.lambda_=0.8"]
ZOO_PPO += ["params.num_epochs=20", "params.minibatch_size=256"]
ZOO_SAC = [*ADAM.format("7.3e-4").split(), "params.tau=0.02", "gamma=0.98"]


@dataclass(frozen=True)
class Task:
    config: str
    """File in configs/loop: the reality, its price, the world's settings."""
    target: float
    methods: dict[str, list[list[str]]]
    """Candidate settings of each: overrides of the loop's shipped config, or of
    mesocosm/agents/settings.py's REAL. One candidate is not tuned.
    """
    caps: dict[str, int]
    """Real steps after which a model-free run is censored; SAC's updates take a tenth of a second
    here.
    """
    world: list[str] = field(default_factory=list)
    """Overrides for the comparison: how far a world's run may go."""
    every: int = 500
    """Steps between two measurements of a model-free policy."""


FAR = ["rounds=8", "reality.budget.steps=8000"]
LOCAL = ["agent.backend=local"]
"""The same trajectories in one process fewer."""
TASKS = {
    "InvertedPendulum-v5": Task(
        "quickstart.yaml",
        950.0,
        {
            "world": [LARGE, SMALL, [*SMALL, "pretrain.train.steps=800"]],
            "PPO": [[], ["params.lr=3e-4"], ["rollout=128"]],
            "SAC": [[], ADAM.format("3e-4").split(), ZOO_SAC],
        },
        {"PPO": 30_000, "SAC": 6_000},
        FAR,
    ),
    "CartPole-v1": Task(
        "cartpole.yaml",
        475.0,
        {
            "world": [LARGE, SMALL, [*SMALL, "pretrain.train.steps=800"]],
            "PPO": [[], ["params.lr=3e-4"], ZOO_PPO],
            "DQN": [[], ["params.lr=1e-3"], ["params.epsilon=[[0,1.0],[2000,0.04]]"]],
        },
        {"PPO": 30_000, "DQN": 8_000},
        FAR,
    ),
    "Reacher-v5": Task(
        "reacher.yaml",
        -6.0,
        {"world": [[]], "PPO": [[]], PEER: [[]]},
        {"PPO": 100_000, PEER: 20_000},
        LOCAL,
    ),
    "Hopper-v5": Task(
        "hopper.yaml", 1000.0, {"world": [[]], PEER: [[]]}, {PEER: 20_000}, LOCAL, every=2000
    ),
    "cartpole-swingup": Task(
        "../../benchmarks/swingup.yaml", 700.0, {"world": [[]], PEER: [[]]}, {PEER: 20_000}, LOCAL
    ),
}


def world(name: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    task = TASKS[name]
    settings = [f"storage.root={ROOT}", f"seed={seed}", f"target={task.target}"]
    settings += ["stop_at_target=true", "baselines=[]", *task.world, *overrides]
    cfg = config.load(loop.LoopConfig, [CONFIGS / task.config], settings)
    with tracking.start("loop", cfg) as run:
        artifact = loop.JOB.run(cfg, run)
    summary = json.loads((artifact.path / "summary.json").read_text())
    curve = summary["curves"]["world"][0]
    spent = {row["purpose"]: row for row in summary["real_steps"]["purposes"]}
    return {
        "reached": curve["steps_to_target"],
        "judged": spent["judge"]["steps"],
        "price": spent["collect"]["price"],
        "points": [(p["real_steps"], p["mean"]) for p in curve["points"]],
        "seconds": curve["wall_seconds"],
    }


def model_free(name: str, algo: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    task = TASKS[name]
    reality = config.load(loop.LoopConfig, [CONFIGS / task.config]).reality
    if algo == PEER:
        id = f"{name}-{algo}-{seed}-{time.time_ns()}"
        ledger = Ledger(Storage(str(ROOT)), id, price=reality.price)
        return peers.sac(reality, ledger, seed, task.caps[algo], task.target, task.every, {})
    settings = [f"storage.root={ROOT}", f"seed={seed}", f"algo={algo}", f"steps={task.caps[algo]}"]
    settings += [f"target={task.target}", f"judge_every={task.every}", *overrides]
    cfg = config.load(BaselineConfig, [], settings)
    cfg.reality = reality
    with tracking.start("baseline", cfg) as run:
        artifact = baseline.JOB.run(cfg, run)
        ledger = Ledger(run.storage, artifact.meta["ledger"], price=reality.price)
        price = ledger.totals().purposes["baseline"].price
    curve = json.loads((artifact.path / "curve.json").read_text())
    judged = [p for p in curve["points"] if p["kind"] == "judge"]
    return {
        "reached": curve["reached"],
        "judged": judged[-1]["judge_steps"],
        "price": price,
        "points": [(p["steps"], p["return"]) for p in judged],
        "seconds": curve["seconds"],
    }


def name_of(env: str, method: str, seed: int, candidate: int) -> str:
    return f"{env}/{method}/{f'tune-{candidate}' if seed == TUNING_SEED else seed}"


def chosen(results: dict[str, Any], env: str, method: str) -> int | None:
    """The candidate with the fewest real steps on the tuning seed, None until all were run; the
    first of equals.
    """
    candidates = TASKS[env].methods[method]
    if len(candidates) == 1:
        return 0
    runs = [results.get(name_of(env, method, TUNING_SEED, i)) for i in range(len(candidates))]
    if None in runs:
        return None
    steps = [run["reached"] or float("inf") for run in runs if run is not None]
    return steps.index(min(steps))


def cells(options: argparse.Namespace) -> list[tuple[str, str, int, int | None]]:
    """(environment, method, seed, candidate) in the order of running: tuning first; None: the
    chosen one.
    """
    curves: list[tuple[str, str, int, int | None]] = []
    for env, task in TASKS.items():
        for method, candidates in task.methods.items():
            if options.task not in (None, env) or options.method not in (None, method):
                continue
            if len(candidates) > 1 and options.seed in (None, "tune"):
                curves += [(env, method, TUNING_SEED, i) for i in range(len(candidates))]
            seeds = [seed for seed in SEEDS if options.seed in (None, str(seed))]
            curves += [(env, method, seed, None) for seed in seeds]
    return curves


def read() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--method", choices=("world", "PPO", "DQN", "SAC", PEER))
    parser.add_argument("--seed", choices=("tune", *map(str, SEEDS)))
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--table-only", action="store_true")
    options = parser.parse_args()
    began = time.monotonic()
    try:
        for env, method, seed, candidate in [] if options.table_only else cells(options):
            index = chosen(read(), env, method) if candidate is None else candidate
            if index is None:
                print(f"{env}/{method}: not all candidates are tuned yet; run --seed tune first")
                continue
            name, overrides = name_of(env, method, seed, index), TASKS[env].methods[method][index]
            if read().get(name, {}).get("settings") == overrides:
                continue
            if time.monotonic() - began > options.minutes * 60:
                break
            print(f"--- {name}: {' '.join(overrides) or 'as shipped'}", flush=True)
            if method == "world":
                result = world(env, seed, overrides)
            else:
                result = model_free(env, method, seed, overrides)
            which = f"--seed {'tune' if seed == TUNING_SEED else seed}"
            command = f"python benchmarks/bench_agents.py --task {env} --method {method} {which}"
            cell = {**result, "settings": overrides, "commit": commit(), "command": command}
            RESULTS.parent.mkdir(exist_ok=True)
            cells_by_name = dict(sorted({**read(), name: cell}.items()))
            RESULTS.write_text(json.dumps(cells_by_name, indent=1) + "\n")
    finally:
        ray_session.shutdown()
    results = read()
    table(results)
    plot(results)
    return 0


def runs_of(results: dict[str, Any], env: str, method: str) -> list[dict[str, Any]]:
    names = [name_of(env, method, seed, 0) for seed in SEEDS]
    return [results[name] for name in names if name in results]


def table(results: dict[str, Any]) -> None:
    """A Markdown table: medians over the seeds; a censored run stands for more than it spent."""
    print(
        "| task, target | method | seeds at the target | real steps: median (each) | strict | price"
        " to it, USD | best return | tuning | wall s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for env, task in TASKS.items():
        for method in task.methods:
            if runs := runs_of(results, env, method):
                print(f"| {' | '.join(row(results, env, method, runs))} |")


def row(results: dict[str, Any], env: str, method: str, runs: list[dict[str, Any]]) -> list[str]:
    task = TASKS[env]
    names = [name_of(env, method, TUNING_SEED, i) for i in range(len(task.methods[method]))]
    tuning = [results[name] for name in names if name in results]
    tuned = sum(run["points"][-1][0] + run["judged"] for run in tuning)
    reached = [run["reached"] for run in runs]
    strict = [r if r is None else r + run["judged"] for r, run in zip(reached, runs, strict=True)]
    each = ", ".join(map(shown, reached, runs))
    hit = sum(steps is not None for steps in reached)
    prices = [run.get("price") for run in runs]
    price = "-"
    if None not in prices:
        more = "> " if hit * 2 <= len(runs) else ""
        price = f"{more}{statistics.median(prices):,.0f}"
    digits = 0 if abs(task.target) >= 100 else 1
    return [
        f"{env}, {task.target:g}",
        method,
        f"{hit} of {len(runs)}",
        f"{median(reached, runs)} ({each})",
        median(strict, runs),
        price,
        ", ".join(f"{max(y for _, y in run['points']):.{digits}f}" for run in runs),
        f"{tuned:,}" if tuning else "none",
        f"{statistics.median(run['seconds'] for run in runs):.0f}",
    ]


def shown(steps: float | None, run: dict[str, Any]) -> str:
    return f"> {run['points'][-1][0]:,}" if steps is None else f"{steps:,.0f}"


def median(steps: list[float | None], runs: list[dict[str, Any]]) -> str:
    pairs = zip(steps, runs, strict=True)
    ordered = sorted(pairs, key=lambda pair: float("inf") if pair[0] is None else pair[0])
    return shown(*ordered[len(ordered) // 2])


def plot(results: dict[str, Any]) -> None:
    """Return against real steps, one line a run of seeds 0-2; a cross ends a censored one."""
    pyplot.rcParams["svg.hashsalt"] = "mesocosm"
    columns = 3
    figure, grid = pyplot.subplots(
        -(-len(TASKS) // columns), columns, figsize=(12, 7.4), layout="constrained"
    )
    for axis in grid.flat[len(TASKS) :]:
        axis.set_axis_off()
    for axis, (env, task) in zip(grid.flat, TASKS.items(), strict=False):
        for colour, method in zip(("#d1495b", "#30638e", "#7a8b99"), task.methods, strict=False):
            label = "in the world (PPO)" if method == "world" else f"model-free {method}"
            for run in runs_of(results, env, method):
                x, y = zip(*run["points"], strict=True)
                axis.plot(x, y, color=colour, linewidth=1.2, alpha=0.8, label=label)
                marker, size = ("x", 7) if run["reached"] is None else ("o", 5)
                axis.plot(x[-1], y[-1], color=colour, marker=marker, markersize=size)
                label = "_"  # no further entry in the legend
        axis.axhline(task.target, color="grey", linewidth=0.8, linestyle=":")
        axis.set(xscale="log", title=f"{env}, target {task.target:g}")
        axis.legend(frameon=False, fontsize=8, loc="best")
        axis.set_xlim(left=300)
        axis.xaxis.set_minor_formatter(NullFormatter())
    figure.supxlabel("real steps trained on")
    figure.supylabel("mean return of greedy real episodes")
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
