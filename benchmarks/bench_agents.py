"""`make bench-agents`: real steps to a target return, an agent trained in the world against
model-free training on reality and against published curves.

    python benchmarks/bench_agents.py [--task NAME] [--method NAME] [--seed N] [--ablation NAME]
    [--minutes M] [--dry-run | --table-only]

A cell is one training run. A world's is the loop of agent_tasks.py's config, a model-free one the
job `baseline` or SB3's SAC (peers.py), on the same metered reality; each stops at its target, or is
censored at its last step. Cells are stored in benchmarks/results/bench_agents.json with commit and
command, and a finished one is never run again. A cell that takes longer than --minutes, which is 20
by default, is interrupted and continues when the command is run again: `make bench-agents` as often
as it says so. --ablation adds one of agent_tasks.ABLATIONS to the world's settings. --dry-run lists
the cells, their states and the minutes that are left by the cells measured so far. Otherwise the
end prints the tables of docs/benchmarks.md and draws docs/plots/bench_agents.svg.

What counts: every real step that a policy, or the world it was trained in, was trained on. Policies
are measured by 10 greedy episodes (Reacher-v5's world by 100), a world's after each round, a
model-free one's after a fixed number of steps. `reached` is the first measurement at the target;
measuring steps are apart (`judged`). The price is the config's declared one, of the steps and
resets that count. On a DMC task a decision is two environment steps. The ledger and the price count
decisions, the tables environment steps, as the published curves do. Those are read from --dmc
(default: the environment variable MESOCOSM_DMC, or else ../shared/data/dmc) and left out where it
has none.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import agent_report
import peers
from agent_tasks import ABLATED, ABLATIONS, FORMER, HERE, LEAN, PEER, PLANNER, TASKS, WORLD
from bench_planner import played
from bench_world import ROOT, commit
from cells import add_options, read_results, run_cells, save_result

from mesocosm import config
from mesocosm.agents.config import BaselineConfig
from mesocosm.data.planners import load_planner
from mesocosm.envs.ledger import Ledger
from mesocosm.jobs import baseline, loop
from mesocosm.policies.planner_policy import PlannerPolicy
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Storage

RESULTS = HERE / "results" / "bench_agents.json"
PLOT = HERE.parent / "docs" / "plots" / "bench_agents.svg"
DMC = Path(os.environ.get("MESOCOSM_DMC") or HERE.parent.parent / "shared" / "data" / "dmc")
SEEDS = (0, 1, 2)
PARTS = 5
"""The number of times that a world's cell is saved before its last round."""


@dataclass(frozen=True)
class Cell:
    task: str
    method: str
    seed: int
    ablation: str | None = None

    @property
    def name(self) -> str:
        method = f"{self.method}, {self.ablation}" if self.ablation else self.method
        return f"{self.task}/{method}/{self.seed}"

    @property
    def command(self) -> str:
        words = [f"--task {self.task}", f"--method {self.method}", f"--seed {self.seed}"]
        words += [f"--ablation {self.ablation}"] if self.ablation else []
        return f"python benchmarks/bench_agents.py {' '.join(words)}"

    @property
    def settings(self) -> list[str]:
        extra = ABLATIONS[self.ablation] if self.ablation else []
        return [*TASKS[self.task].methods[self.method], *extra]

    def loop(self) -> loop.LoopConfig:
        """The loop's config of a world's cell; of others its reality counts."""
        task = TASKS[self.task]
        settings = [f"storage.root={ROOT}", f"seed={self.seed}", f"target={task.target}", *LEAN]
        settings += self.settings if self.method == WORLD else task.methods[WORLD]
        return config.load(loop.LoopConfig, [task.config], settings)

    def steps(self) -> int:
        """The most decisions of the cell."""
        if self.method != WORLD:
            return TASKS[self.task].caps[self.method]
        cfg = self.loop()
        return cfg.collect.steps + (cfg.rounds - 1) * cfg.explore.steps


def world(cell: Cell, save: Callable[[dict[str, Any]], None]) -> None:
    """Run the loop, and save the curve so far a few times. More rounds keep the first ones."""
    cfg, target = cell.loop(), TASKS[cell.task].target
    step = max(1, cfg.rounds // PARTS)
    for rounds in [*range(step, cfg.rounds, step), cfg.rounds]:
        part = replace(cfg, rounds=rounds)
        with tracking.start("loop", part) as run:
            artifact = loop.JOB.run(part, run)
        summary = json.loads((artifact.path / "summary.json").read_text())
        curve = summary["curves"]["world"][0]
        points = [(p["real_steps"], p["mean"]) for p in curve["points"]]
        if cell.ablation == PLANNER:
            points = planned(
                cell, part, artifact.meta["inputs"]["agents"], [at for at, _ in points]
            )
        reached = next((steps for steps, mean in points if mean >= target), None)
        spent = {row["purpose"]: row for row in summary["real_steps"]["purposes"]}
        save(
            {
                "reached": reached,
                "judged": spent["judge"]["steps"],
                "price": spent["collect"]["price"],
                "points": points,
                "seconds": curve["wall_seconds"],
                "finished": rounds == cfg.rounds or reached is not None,
            }
        )
        if reached is not None:
            break


def planned(
    cell: Cell, cfg: loop.LoopConfig, agents: list[str], steps: list[int]
) -> list[tuple[int, float]]:
    """(real steps, mean return) of the planner with each round's agent, instead of the agent's. No
    ledger counts these measurements, whose episodes step together.
    """
    storage, points = Storage(str(ROOT)), read().get(cell.name, {"points": []})["points"]
    for agent in agents[len(points) :]:
        planner = load_planner(storage, f"agents/{agent}")
        policy = PlannerPolicy(planner)
        policy.reset(cfg.evaluate.episodes)
        mean = float(played(policy.act, planner.codec, cfg.evaluate.episodes).mean())
        points.append((steps[len(points)], mean))
        print(f"  planner after {points[-1][0]} real steps: {mean:.1f}", flush=True)
    return points


def model_free(cell: Cell, save: Callable[[dict[str, Any]], None]) -> None:
    task, algo, reality = TASKS[cell.task], cell.method, cell.loop().reality
    cap, target = task.caps[algo], task.target
    if algo == PEER:
        peers.sac(
            reality,
            ROOT,
            cell.name,
            save,
            seed=cell.seed,
            steps=cap,
            target=target,
            every=task.every,
        )
        return
    settings = [f"storage.root={ROOT}", f"seed={cell.seed}", f"algo={algo}", f"steps={cap}"]
    settings += [f"target={target}", f"judge_every={task.every}", *cell.settings]
    cfg = config.load(BaselineConfig, [], settings)
    cfg.reality = reality
    with tracking.start("baseline", cfg) as run:
        artifact = baseline.JOB.run(cfg, run)
        ledger = Ledger(run.storage, artifact.meta["ledger"], price=reality.price)
        price = ledger.totals().purposes["baseline"].price
    curve = json.loads((artifact.path / "curve.json").read_text())
    judged = [p for p in curve["points"] if p["kind"] == "judge"]
    save(
        {
            "reached": curve["reached"],
            "judged": judged[-1]["judge_steps"],
            "price": price,
            "points": [(p["steps"], p["return"]) for p in judged],
            "seconds": curve["seconds"],
            "finished": True,
        }
    )


def cells(options: argparse.Namespace) -> list[Cell]:
    """The cells of the options, those of one seed of all tasks before the next seed's."""
    if options.ablation is not None:
        tasks = [options.task] if options.task else ABLATED
        seeds = [options.seed] if options.seed is not None else SEEDS
        cells = [Cell(task, WORLD, seed, options.ablation) for seed in seeds for task in tasks]
        plain = [replace(cell, ablation=None).loop() for cell in cells]
        pairs = zip(cells, plain, strict=True)
        return [cell for cell, base in pairs if cell.ablation == PLANNER or cell.loop() != base]
    return [
        Cell(name, method, seed)
        for seed in SEEDS
        for name, task in TASKS.items()
        for method in task.methods
        if method != FORMER
        and options.task in (None, name)
        and options.method in (None, method)
        and options.seed in (None, seed)
    ]


def read() -> dict[str, Any]:
    return read_results(RESULTS)


def run(cell: Cell) -> None:
    """Run the cell, or what is left of it, and save it."""

    def save(result: dict[str, Any]) -> None:
        shown = {**result, "settings": cell.settings, "commit": commit(), "command": cell.command}
        save_result(RESULTS, cell.name, shown)

    (world if cell.method == WORLD else model_free)(cell, save)


def is_finished(cell: Cell) -> bool:
    return bool(read().get(cell.name, {}).get("finished"))


def title(cell: Cell) -> str:
    return f"{cell.name}: {' '.join(cell.settings) or 'as shipped'}"


def left(cell: Cell, results: dict[str, Any]) -> tuple[str, float]:
    """(state, minutes left) of a cell. Minutes are those of the same task and method's others."""
    total, done = cell.steps(), results.get(cell.name)
    if done is not None and done["finished"]:
        return "finished", 0.0
    steps = 0 if done is None else done["points"][-1][0]
    state = "not run" if done is None else f"{steps:,} of {total:,} steps"
    prefix = f"{cell.task}/{cell.method}"
    known = [r for name, r in results.items() if name.rpartition("/")[0].startswith(prefix)]
    rates = [r["seconds"] / r["points"][-1][0] / 60 for r in known if r["points"]]
    rate = sum(rates) / len(rates) if rates else TASKS[cell.task].minutes[cell.method] / total
    return state, rate * (total - steps)


def dry_run(chosen: list[Cell]) -> None:
    results, total = read(), 0.0
    print("| cell | state | minutes left, if it misses its target |\n|---|---|---|")
    for cell in chosen:
        state, minutes = left(cell, results)
        total += minutes
        print(f"| {cell.name} | {state} | {minutes:.0f} |")
    print(f"| total | | {total:.0f} |")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--method", choices=(WORLD, "PPO", "DQN", "SAC", PEER))
    parser.add_argument("--seed", type=int, choices=SEEDS)
    parser.add_argument("--ablation", choices=ABLATIONS)
    parser.add_argument("--dmc", type=Path, default=DMC, help="folder of curves.csv")
    add_options(parser)
    options = parser.parse_args()
    chosen = cells(options)
    if options.dry_run:
        dry_run(chosen)
        return 0
    code = 0
    if not options.table_only:
        code = run_cells(chosen, run, is_finished, options.minutes, title)
    curves = agent_report.published(options.dmc)
    agent_report.tables(read(), curves)
    agent_report.plot(read(), curves, PLOT)
    return code


if __name__ == "__main__":
    sys.exit(main())
