"""`make bench-domains`: real steps, seconds and money to a target in expensive domains, by an agent
that was trained in a world, model-free PPO, cloning and a script.

    python benchmarks/bench_domains.py [--domain NAME] [--method NAME] [--seed N] [--minutes M]
    [--dry-run | --table-only]

A cell is one run of a method in a domain of domain_tasks.py, of one seed. `world` is the loop of
the domain's config, measured after each round; `PPO` is the job `baseline`; `clone` fits the best
episodes of as many logged steps as all rounds of the world take; `expert` is a script. All act on
the same metered reality, and all measurements of one seed are greedy episodes of the same starts.
`reached` is the first measurement at the target; a run ends there, or is censored at its last step.

Steps, seconds and money are those that a policy, or the world it was trained in, was trained on:
the ledger's, at the config's declared durations and price. Measuring is apart (`judged`). Cells lie
in benchmarks/results/bench_domains.json with commit and command, and a finished one is never run
again. A cell that takes longer than --minutes, 20 by default, is interrupted and continues when the
command is run again: the world after its last finished stage, PPO from the beginning. --dry-run
lists the cells and the minutes that are left. Otherwise the end prints the table of docs/domains.md
and draws docs/plots/domains.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from bench_world import ROOT, commit
from cells import add_options, read_results, run_cells, save_result
from domain_report import plot, runs_of, table
from domain_tasks import CLONE, DOMAINS, EXPERT, FREE, METHODS, WORLD, Domain

from mesocosm import config, plotting
from mesocosm.agents.cloning import CloneConfig
from mesocosm.agents.config import BaselineConfig
from mesocosm.envs.ledger import Ledger
from mesocosm.envs.make import facts_of
from mesocosm.evaluate import policy_set
from mesocosm.evaluate.judge import judge
from mesocosm.jobs import baseline, clone, collect, loop
from mesocosm.jobs.loop_config import fill
from mesocosm.policies.behaviours import BehaviourConfig
from mesocosm.policies.policy import Acts
from mesocosm.policies.stored import policy_of
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Storage

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "bench_domains.json"
PLOT = HERE.parent / "docs" / "plots" / "domains.svg"
SEEDS = (0, 1, 2)
LEAN = ["evaluate.episodes=5", "evaluate.horizons=[1,5]", "evaluate.full=false"]
LEAN += ["evaluate.starts=64", "evaluate.samples=5"]
"""Overrides of every world's run, whose agent is measured here, by more episodes."""
Save = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Cell:
    domain_name: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.domain_name}/{self.method}/{self.seed}"

    @property
    def domain(self) -> Domain:
        return DOMAINS[self.domain_name]

    @property
    def command(self) -> str:
        words = f"--domain {self.domain_name} --method {self.method} --seed {self.seed}"
        return f"python benchmarks/bench_domains.py {words}"

    @cached_property
    def loop(self) -> loop.LoopConfig:
        """The loop's config; cells of other methods use its reality and its logs."""
        settings = [f"storage.root={ROOT}", f"seed={self.seed}", *LEAN]
        settings += ["target=null", "stop_at_target=false"]
        return config.load(loop.LoopConfig, [self.domain.config], settings)

    @property
    def steps(self) -> int:
        """The most real steps of the cell."""
        cfg = self.loop
        world = cfg.collect.steps + (cfg.rounds - 1) * cfg.explore.steps
        return {WORLD: world, CLONE: world, FREE: self.domain.steps, EXPERT: 0}[self.method]

    def measure(self, policy: Acts) -> dict[str, Any]:
        """The mean return, its standard error and the successes of the seed's episodes."""
        reality, began = self.loop.reality, time.monotonic()
        ledger = Ledger(Storage(str(ROOT)), f"bench-domains-{self.domain_name}-{self.seed}")
        about: dict[str, Any] = {"episodes": self.domain.episodes, "seed": self.seed}
        result = judge(policy, reality, ledger, **about)
        print(f"  {self.name}: {result.mean:.2f} in {time.monotonic() - began:.0f} s", flush=True)
        return {
            "mean": result.mean,
            "error": standard_error(result.returns),
            "successes": result.successes,
            "steps": result.steps,
        }


def world(cell: Cell, save: Save) -> None:
    """Run the loop round by round. A later part keeps the earlier rounds."""
    cfg, storage, points = cell.loop, Storage(str(ROOT)), read().get(cell.name, EMPTY)["points"]
    for rounds in range(1, cfg.rounds + 1):
        part = replace(cfg, rounds=rounds)
        with tracking.start("loop", part) as run:
            artifact = loop.JOB.run(part, run)
        summary = json.loads((artifact.path / "summary.json").read_text())
        curve = summary["curves"]["world"][0]
        spent = next(r for r in summary["real_steps"]["purposes"] if r["purpose"] == "collect")
        if len(points) < rounds:
            policy = policy_of(storage, f"agents/{artifact.meta['inputs']['agents'][-1]}")
            steps = curve["points"][-1]["real_steps"]
            points.append(point(steps, spent["price"], spent["duration"], cell.measure(policy)))
        reached = at_target(cell, points)
        finished = reached is not None or rounds == cfg.rounds
        save(result(points, reached, curve["wall_seconds"], finished))
        if finished:
            break


def model_free(cell: Cell, save: Save) -> None:
    domain, cfg = cell.domain, cell.loop
    target = target_of(cell)
    words = [f"storage.root={ROOT}", f"seed={cell.seed}", "algo=PPO", f"steps={domain.steps}"]
    words += [f"target={target}", f"judge_every={domain.every}", *domain.free]
    words += [f"judge_episodes={domain.episodes}", "select_episodes=0"]
    job = config.load(BaselineConfig, [], words)
    job.reality = cfg.reality
    with tracking.start("baseline", job) as run:
        artifact = baseline.JOB.run(job, run)
        ledger = Ledger(run.storage, artifact.meta["ledger"], price=job.reality.price)
        total = ledger.totals().purposes["baseline"]
    curve = json.loads((artifact.path / "curve.json").read_text())
    points = []
    for judged in (p for p in curve["points"] if p["kind"] == "judge"):
        error = standard_error(judged["returns"])
        seconds = total.duration * judged["price"] / total.price  # exact at the end
        measured = {"mean": judged["return"], "error": error, "steps": judged["judge_steps"]}
        points.append(point(judged["steps"], judged["price"], seconds, measured))
    save(result(points, curve["reached"], curve["seconds"], True))


def cloning(cell: Cell, save: Save) -> None:
    """Clone as many logged steps, of the same behaviours, as the world's rounds take."""
    began, cfg = time.monotonic(), cell.loop
    logs = fill(cfg.collect, cfg, 0)
    logs = replace(logs, steps=cell.steps)
    with tracking.start("collect", logs) as run:
        data = collect.JOB.run(logs, run)
    words = [f"storage.root={ROOT}", f"seed={cell.seed}", f"datasets=[{data.id}]"]
    job = config.load(CloneConfig, [], [*words, *cell.domain.clone])
    with tracking.start("clone", job) as run:
        agent = clone.JOB.run(job, run)
    total = data.meta["ledger"]["purposes"]["collect"]
    measured = cell.measure(policy_of(Storage(str(ROOT)), agent.name))
    points = [point(total["steps"], total["price"], total["duration"], measured)]
    save(result(points, at_target(cell, points), time.monotonic() - began, True))


def script(cell: Cell, save: Save) -> None:
    """Measure the expert, and the other scripts of the domain."""
    began, storage = time.monotonic(), Storage(str(ROOT))
    facts = facts_of(cell.loop.reality)

    def judged(function: str) -> dict[str, Any]:
        behaviour = BehaviourConfig(kind="scripted", function=function)
        return cell.measure(policy_set.named(behaviour, storage, *facts.spaces).policy)

    expert = point(0, 0.0, 0.0, judged(cell.domain.expert))
    others = {name: judged(function) for name, function in cell.domain.scripts.items()}
    random = policy_set.named(BehaviourConfig(kind="random"), storage, *facts.spaces).policy
    others["uniform actions"] = cell.measure(random)
    save(result([expert], 0, time.monotonic() - began, True) | {"others": others})


def standard_error(returns: Sequence[float]) -> float:
    """The standard error of the mean of returns."""
    return float(np.std(returns, ddof=1) / len(returns) ** 0.5)


RUN = {WORLD: world, FREE: model_free, CLONE: cloning, EXPERT: script}
EMPTY: dict[str, Any] = {"points": [], "finished": False}


def point(steps: int, price: float, seconds: float, measured: dict[str, Any]) -> dict[str, Any]:
    return {
        "real_steps": steps,
        "price": round(price, 6),
        "seconds": round(seconds, 3),
        "return": measured["mean"],
        "error": measured["error"],
        "successes": measured.get("successes"),
        "judged": measured["steps"],
    }


def result(
    points: list[dict[str, Any]], reached: int | None, seconds: float, finished: bool
) -> dict[str, Any]:
    about = {"wall_seconds": round(seconds, 1), "finished": finished}
    return {"points": points, "reached": reached, **about}


def target_of(cell: Cell) -> float:
    """The return to reach. Raises SystemExit where it is the expert's, which was not measured."""
    if cell.domain.target is not None:
        return cell.domain.target
    expert = replace(cell, method=EXPERT)
    if expert.name not in read():
        raise SystemExit(f"{cell.name} needs {expert.name}; run {expert.command}")
    return float(read()[expert.name]["points"][0]["return"])


def at_target(cell: Cell, points: list[dict[str, Any]]) -> int | None:
    """The real steps of the first point at the target."""
    target = target_of(cell)
    return next((p["real_steps"] for p in points if p["return"] >= target), None)


def read() -> dict[str, Any]:
    return read_results(RESULTS)


def run(cell: Cell) -> None:
    """Run the cell, or the rest of it, and save it."""

    def save(values: dict[str, Any]) -> None:
        shown = {**values, "commit": commit(), "command": cell.command}
        save_result(RESULTS, cell.name, shown)

    if cell.method != EXPERT:
        target_of(cell)  # before any cost
    RUN[cell.method](cell, save)


def cells(options: argparse.Namespace) -> list[Cell]:
    """The cells of the options, all methods of one seed before the next seed's."""
    return [
        Cell(domain, method, seed)
        for seed in SEEDS
        for domain in DOMAINS
        for method in METHODS
        if options.domain in (None, domain)
        and options.method in (None, method)
        and options.seed in (None, seed)
    ]


def is_finished(cell: Cell) -> bool:
    return bool(read().get(cell.name, EMPTY)["finished"])


def left_minutes(cell: Cell, results: dict[str, Any]) -> float:
    """The minutes that a cell still takes, by those of the method's other seeds."""
    if results.get(cell.name, EMPTY)["finished"]:
        return 0.0
    runs = runs_of(results, cell.domain_name, cell.method)
    known = [run["wall_seconds"] / 60 for run in runs if run["finished"]]
    return median(known) if known else cell.domain.minutes[cell.method]


def dry_run(chosen: list[Cell]) -> None:
    results, total = read(), 0.0
    print("| cell | state | at most real steps | minutes left |\n|---|---|---|---|")
    for cell in chosen:
        done, minutes = results.get(cell.name, EMPTY), left_minutes(cell, results)
        total += minutes
        state = f"{len(done['points'])} points" if done["points"] else "not run"
        state = "finished" if done["finished"] else state
        print(f"| {cell.name} | {state} | {cell.steps:,} | {minutes:.0f} |")
    print(f"| total | | | {total:.0f} |")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--domain", choices=DOMAINS)
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--seed", type=int, choices=SEEDS)
    add_options(parser)
    options = parser.parse_args()
    chosen = cells(options)
    if options.dry_run:
        dry_run(chosen)
        return 0
    code = 0
    if not options.table_only:
        code = run_cells(chosen, run, is_finished, options.minutes)
    table(read())
    if read():
        PLOT.write_text(plotting.svg(plot(read()), "domains", "Return against money by domain"))
    return code


if __name__ == "__main__":
    sys.exit(main())
