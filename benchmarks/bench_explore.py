"""Which data find a goal that random actions do not reach: an agent that seeks disagreement between
the world's members (Plan2Explore, Sekar et al., arXiv 2005.05960), the agent's own policy, or an
even split?

    python benchmarks/bench_explore.py [--task NAME] [--arm NAME] [--seed N] [--minutes M]
    [--dry-run | --table-only]

A cell is a loop of agents/explore.yaml: 1000 random real steps, then rounds of 1000 by the arm:
`own`, the stochastic policy of an agent that earns reward in the world; `disagreement`, that of one
that seeks disagreement; `even`, half the episodes random, half the agent's. All arms of a seed have
the same first world. `goal` is the real step at which the data first hold a reward of at least the
task's goal; None is a run that did not find it. `return` is that of a new agent, trained in the
last world for the reward, in 10 greedy real episodes. Cells lie in
benchmarks/results/bench_explore.json with commit and command, and a finished one is not run again.
A run that takes longer than --minutes is interrupted and continues when the command is run again.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from agent_tasks import OWN
from bench_world import HERE, ROOT, commit
from cells import add_options, read_results, run_cells, save_result

from mesocosm import config
from mesocosm.datasets.dataset import Dataset
from mesocosm.envs.ledger import Ledger
from mesocosm.evaluate.judge import judge
from mesocosm.jobs import loop
from mesocosm.jobs import train_agent as agents
from mesocosm.jobs.loop_config import fill
from mesocosm.policies.stored import policy_of
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Artifact, Storage

RESULTS = HERE / "results" / "bench_explore.json"
SEEDS = (0, 1, 2, 3, 4)
EPISODES = 10


@dataclass(frozen=True)
class Task:
    settings: list[str]
    """Overrides of agents/explore.yaml."""
    goal: float
    """The least reward of a step at the goal."""


def _dmc(task: str) -> list[str]:
    return ["reality.env=dmc:Control", f"reality.kwargs.task={task}"]


TASKS = {
    "MountainCarContinuous-v0": Task(["reality.env=MountainCarContinuous-v0"], 50.0),
    "pendulum-swingup": Task(_dmc("pendulum-swingup"), 0.5),
    "cartpole-swingup_sparse": Task(_dmc("cartpole-swingup_sparse"), 0.5),
}
ARMS = {
    "own": [],
    "disagreement": ["agent.objective=disagreement"],
    "even": ["explore.behaviours=[{kind: random}, {kind: trained}]"],
}


@dataclass(frozen=True)
class Cell:
    task: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}/{self.arm}/{self.seed}"

    @property
    def settings(self) -> list[str]:
        return [*TASKS[self.task].settings, *ARMS[self.arm]]

    def loop(self) -> loop.LoopConfig:
        settings = [f"storage.root={ROOT}", f"seed={self.seed}", *self.settings]
        return config.load(loop.LoopConfig, [OWN / "explore.yaml"], settings)


def run(cell: Cell) -> None:
    """Run a cell and save it. What an interrupted one made is found again."""
    cfg, began = cell.loop(), time.monotonic()
    storage = Storage(str(ROOT))
    with tracking.start("loop", cfg) as run:
        inputs = loop.JOB.run(cfg, run).meta["inputs"]
    data = [storage.artifact("datasets", id) for id in inputs["datasets"]]
    stage = fill(cfg.agent, cfg, cfg.rounds)
    stage.world, stage.objective = inputs["worlds"][-1], "return"
    with tracking.start("train-agent", stage) as run:
        agent = agents.JOB.run(stage, run)
    ledger = Ledger(storage, f"explore-{agent.id}", price=cfg.reality.price)
    policy = policy_of(storage, agent.name)
    judged = judge(policy, cfg.reality, ledger, episodes=EPISODES, seed=cell.seed)
    words = f"--task {cell.task} --arm {cell.arm} --seed {cell.seed}"
    result = {
        "goal": first_goal(data, TASKS[cell.task].goal),
        "steps": cfg.collect.steps + (cfg.rounds - 1) * cfg.explore.steps,
        "return": judged.mean,
        "seconds": time.monotonic() - began,
        "settings": cell.settings,
        "commit": commit(),
        "command": f"python benchmarks/bench_explore.py {words}",
    }
    save_result(RESULTS, cell.name, result)


def first_goal(data: list[Artifact], goal: float) -> int | None:
    """Real steps up to the first reward of at least `goal`."""
    before = 0
    for artifact in data:
        for episode in Dataset([artifact.path]).iter_episodes():
            for i, reward in enumerate(episode.rewards):
                if reward >= goal:
                    return before + i + 1
            before += len(episode)
    return None


def cells(options: argparse.Namespace) -> list[Cell]:
    return [
        Cell(task, arm, seed)
        for seed in SEEDS
        for task in TASKS
        for arm in ARMS
        if options.task in (None, task)
        and options.arm in (None, arm)
        and options.seed in (None, seed)
    ]


def read() -> dict[str, Any]:
    return read_results(RESULTS)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument("--seed", type=int, choices=SEEDS)
    add_options(parser)
    options = parser.parse_args()
    todo = [cell for cell in cells(options) if cell.name not in read()]
    if options.dry_run:
        for cell in cells(options):
            print(f"{cell.name}: {'not run' if cell in todo else 'finished'}")
        return 0
    code = 0
    if not options.table_only:
        code = run_cells(todo, run, lambda cell: cell.name in read(), options.minutes)
    table(read())
    return code


def table(results: dict[str, Any]) -> None:
    """Print the Markdown table of docs/benchmarks.md."""
    print("| task | data by | goal found | real steps to it: median (each) | return: mean (each) |")
    print("|---|---|---|---|---|")
    for task in TASKS:
        for arm in ARMS:
            names = [f"{task}/{arm}/{seed}" for seed in SEEDS]
            runs = [results[name] for name in names if name in results]
            if not runs:
                continue
            hit = sum(run["goal"] is not None for run in runs)
            ordered = sorted(runs, key=lambda run: run["goal"] or float("inf"))
            each = ", ".join(map(_steps, runs))
            mean = statistics.mean(run["return"] for run in runs)
            returns = ", ".join(f"{run['return']:.0f}" for run in runs)
            row = [
                task,
                arm,
                f"{hit} of {len(runs)}",
                f"{_steps(ordered[len(runs) // 2])} ({each})",
            ]
            print(f"| {' | '.join([*row, f'{mean:.0f} ({returns})'])} |")


def _steps(run: dict[str, Any]) -> str:
    return f"> {run['steps']:,}" if run["goal"] is None else f"{run['goal']:,}"


if __name__ == "__main__":
    sys.exit(main())
