"""`make bench-families`: where `sequence` overtakes `ensemble`, in different transitions and in
compute, and whether lower loss bought better agents.

    python benchmarks/bench_families.py [--worlds] [--minutes M] [--table-only]

Sweeps each family over sizes x D x U x seeds of random actions, on a HalfCheetah whose actuators
err, whose losses seeds hardly disturb, and on InvertedPendulum-v5, which agents learn (resumable:
finished cells are kept in the bench's root). With --worlds, the cells of `judged` are made worlds,
by the pretrain job that a cell equals; an agent is trained in each as the quickstart has it, and
the evaluation suite judges both (resumable by world). Writes docs/tables/families.csv, a row a
cell, and docs/plots/families.svg.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib

matplotlib.use("svg")
from bench_evaluate import evaluated
from bench_pessimism import agent_of, configured, saved
from bench_world import HERE, ROOT, commit
from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from scipy.stats import spearmanr

from mesocosm import config
from mesocosm.cluster import ray_session
from mesocosm.jobs import collect, sweep
from mesocosm.jobs import pretrain as pretraining
from mesocosm.plotting import STYLE
from mesocosm.runs import tracking
from mesocosm.scaling.grid import Cell, lay_out
from mesocosm.scaling.sweep_config import SweepConfig
from mesocosm.store.artifacts import Storage

REPOSITORY = HERE.parent
RESULTS = HERE / "results" / "bench_families.json"
TABLE, PLOT = (
    REPOSITORY / "docs" / "tables" / "families.csv",
    REPOSITORY / "docs" / "plots" / "families.svg",
)
FAMILIES = {"ensemble": "#30638e", "sequence": "#d1495b"}


@dataclass(frozen=True)
class Task:
    collected: str
    """File in configs/collect."""
    steps: int
    sizes: tuple[str, ...]
    data: tuple[int, ...]
    unique: tuple[int, ...]
    seeds: tuple[int, ...] = (0, 1)
    judged: Callable[[Cell], bool] = lambda cell: False
    """Selects the cells from which worlds are pretrained."""


PENDULUM = "InvertedPendulum-v5"
TASKS = {
    "domains:halfcheetah": Task(
        "halfcheetah.yaml",
        400_000,
        ("10k", "100k", "300k"),
        (40_000, 160_000),
        (1000, 4000, 16_000, 64_000, 256_000),
    ),
    PENDULUM: Task(
        "pendulum.yaml",
        40_000,
        ("10k", "30k", "100k"),
        (20_000, 80_000),
        (250, 1000, 4000, 16_000),
        judged=lambda cell: cell.target == 80_000 and cell.seed == 0 and cell.size != "30k",
    ),
}
JUDGED = {"policy_value_error": "error", "pearson": "pearson", "regret": "regret"}
"""Columns of the table, and what the suite calls them."""
EVALUATION = ["adversary=0", "graded=10", "policy_episodes=5"]


def dataset(task: Task) -> str:
    settings = [f"storage.root={ROOT}", f"steps={task.steps}", "workers=0"]
    cfg = config.load(
        collect.CollectConfig, [REPOSITORY / "configs" / "collect" / task.collected], settings
    )
    with tracking.start("collect", cfg) as run:
        return collect.JOB.run(cfg, run).id


def configured_sweep(task: Task, family: str, data: str) -> SweepConfig:
    grid = [
        f"grid.{key}={json.dumps(getattr(task, key))}"
        for key in ("sizes", "data", "unique", "seeds")
    ]
    settings = [
        f"storage.root={ROOT}",
        f"data.datasets=[{data}]",
        f"model.family={family}",
        "model.members=1",
        "model.context=8",
    ]
    return config.load(SweepConfig, [], [*settings, *grid])


def rows_of(cfg: SweepConfig) -> list[dict[str, Any]]:
    with tracking.start("sweep", cfg) as run:
        made = sweep.JOB.run(cfg, run)
    with open(made.path / "table.csv", newline="") as file:
        return list(csv.DictReader(file))


def judged(cfg: SweepConfig, cell: Cell, precision: str) -> dict[str, Any]:
    """The cell's world, an agent of it, and what the suite says of both."""
    train = cfg.training(cell.steps, cell.warmup, cell.decay, precision)
    job = cfg.pretraining(cell.size, cell.seed, cell.unique_limit, train)
    with tracking.start("pretrain", job) as run:
        world = pretraining.JOB.run(job, run)
    agent = agent_of(configured(PENDULUM, cell.seed, []), world)
    report = evaluated(PENDULUM, cell.seed, world, agent, EVALUATION)
    suite = {key: report[key] for key in JUDGED.values()}
    return {
        "world": world.id,
        "agent": agent.id,
        "return": report["agent"]["real"],
        "imagined": report["agent"]["world"],
        **suite,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worlds", action="store_true")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--table-only", action="store_true")
    options = parser.parse_args()
    began = time.monotonic()
    try:
        if not options.table_only:
            rows = []
            for (env, task), family in itertools.product(TASKS.items(), FAMILIES):
                cfg = configured_sweep(task, family, dataset(task))
                rows += [{"env": env} | row for row in rows_of(cfg)]
                plan = sweep.JOB.resolve(cfg, Storage(cfg.storage.root))
                grid = lay_out(cfg, plan.dataset, plan.cluster)
                for cell in filter(task.judged, grid.cells if options.worlds else ()):
                    if cell.id in saved(RESULTS) or time.monotonic() - began > options.minutes * 60:
                        continue
                    print(f"--- {family} {cell.size}, U={cell.unique}", flush=True)
                    result = {
                        **judged(cfg, cell, grid.precision),
                        "commit": commit(),
                        "command": "python benchmarks/bench_families.py --worlds",
                    }
                    RESULTS.parent.mkdir(exist_ok=True)
                    RESULTS.write_text(
                        json.dumps({**saved(RESULTS), cell.id: result}, indent=1) + "\n"
                    )
            write(rows, saved(RESULTS))
    finally:
        ray_session.shutdown()
    with open(TABLE, newline="") as file:
        published = list(csv.DictReader(file))
    plot(published)
    print(summary(published))
    return 0


def write(rows: list[dict[str, Any]], results: dict[str, Any]) -> None:
    """The sweeps' tables, one under the other, with what was judged of the subset."""
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    more = {**JUDGED, "return": "return", "imagined_return": "imagined"}
    for row in rows:
        result = results.get(row["cell"], {})
        row.update(
            {
                name: "" if result.get(key) is None else f"{result[key]:.6g}"
                for name, key in more.items()
            }
        )
        row.pop("seconds")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(TABLE, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@dataclass(frozen=True)
class Setting:
    """The seeds of one size, U and asked D."""

    unique: int
    flops: float
    losses: list[float]

    @property
    def loss(self) -> float:
        return statistics.mean(self.losses)


def settings(rows: list[dict[str, Any]], env: str, family: str) -> list[Setting]:
    """D by the nearest that the grid asks for: with another seed's U a cell may be a step longer or
    shorter.
    """
    runs: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in rows:
        if row["env"] == env and row["family"] == family:
            target = min(TASKS[env].data, key=lambda data: abs(data - int(row["data"])))
            runs.setdefault((row["size"], row["unique"], target), []).append(row)
    return [
        Setting(
            int(unique),
            statistics.mean(float(row["flops"]) for row in some),
            [float(row["loss"]) for row in some],
        )
        for (_, unique, _), some in runs.items()
    ]


def best(rows: list[dict[str, Any]], env: str, family: str) -> dict[int, Setting]:
    """The setting of the least loss for each U, ascending."""
    made: dict[int, Setting] = {}
    for setting in sorted(
        settings(rows, env, family), key=lambda setting: (setting.unique, setting.loss)
    ):
        made.setdefault(setting.unique, setting)
    return made


def frontier(rows: list[dict[str, Any]], env: str, family: str) -> list[tuple[float, float]]:
    """(FLOPs, least loss of all settings with at most these FLOPs), over all sizes, D and U."""
    made: list[tuple[float, float]] = []
    for setting in sorted(settings(rows, env, family), key=lambda setting: setting.flops):
        if not made or setting.loss < made[-1][1]:
            made.append((setting.flops, setting.loss))
    return made


def plot(rows: list[dict[str, Any]]) -> None:
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "mesocosm"}):
        figure, axes = pyplot.subplots(2, 3, figsize=(13, 7.6), layout="constrained")
        for env, (by_u, by_c, _) in zip(TASKS, axes, strict=True):
            for family, colour in FAMILIES.items():
                of_u = best(rows, env, family)
                low, high = (
                    [end(setting.losses) for setting in of_u.values()] for end in (min, max)
                )
                by_u.plot(
                    list(of_u),
                    [setting.loss for setting in of_u.values()],
                    color=colour,
                    marker="o",
                    label=family,
                )
                by_u.fill_between(list(of_u), low, high, color=colour, alpha=0.15, linewidth=0)
                by_c.step(
                    *zip(*frontier(rows, env, family), strict=True),
                    where="post",
                    color=colour,
                    label=family,
                )
            by_u.set(
                xscale="log",
                yscale="log",
                xlabel="different transitions U",
                ylabel="least nats a transition",
                title=f"{env}: by U",
            )
            by_c.set(
                xscale="log",
                xlabel="training FLOPs",
                ylabel="least nats a transition",
                title=f"{env}: by compute",
            )
            by_u.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 1.2, 1.5, 2, 3, 4, 5, 7)))
            by_u.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            by_u.yaxis.set_minor_formatter(NullFormatter())
            by_u.legend()
        shown = (
            ("policy_value_error", "policy-value error"),
            ("return", "the agent's return in reality"),
        )
        for (column, label), of in zip(shown, axes[:, 2], strict=True):
            for family, colour in FAMILIES.items():
                some = [row for row in rows if row["family"] == family and row[column]]
                sizes = [20 + 12 * math.log(int(row["unique"]) / 200) for row in some]
                of.scatter(
                    [float(row["loss"]) for row in some],
                    [float(row[column]) for row in some],
                    s=sizes,
                    color=colour,
                    label=family,
                )
            of.set(
                xscale="log",
                xlabel="nats a transition (larger dots: more U)",
                ylabel=label,
                title=f"{PENDULUM}: does lower loss buy it?",
            )
        figure.savefig(PLOT, metadata={"Date": None})
        pyplot.close(figure)


def summary(rows: list[dict[str, Any]]) -> str:
    """Markdown: the least loss by U, and the subset."""
    lines = []
    for env in TASKS:
        lines += [f"| {env}: U | {' | '.join(FAMILIES)} |", "|---|" + "---|" * len(FAMILIES)]
        by_family = {family: best(rows, env, family) for family in FAMILIES}
        for unique in sorted({u for made in by_family.values() for u in made}):
            cells = [
                (
                    f"{p.loss:.2f} ({min(p.losses):.2f} to {max(p.losses):.2f})"
                    if (p := made.get(unique))
                    else "-"
                )
                for made in by_family.values()
            ]
            lines.append(f"| {unique:,} | {' | '.join(cells)} |")
        lines.append("")
    lines += [
        (
            "| family, size, U | loss | Pearson r | policy-value error | return in reality | in the"
            " world |"
        ),
        "|---|---|---|---|---|---|",
    ]
    some = sorted((row for row in rows if row["return"]), key=lambda row: float(row["loss"]))
    for row in some:
        shown = [
            f"{float(row[name]):.4g}" if row[name] else "-"
            for name in ("loss", "pearson", "policy_value_error", "return", "imagined_return")
        ]
        lines.append(
            f"| {row['family']}, {row['size']}, {int(row['unique']):,} | {' | '.join(shown)} |"
        )
    if len(some) > 2:
        losses = [float(row["loss"]) for row in some]
        for column in ("policy_value_error", "return"):
            both = [
                (loss, float(row[column]))
                for loss, row in zip(losses, some, strict=True)
                if row[column]
            ]
            alike = len({value for _, value in both}) == 1
            correlations = (
                "none: it is the same for all"
                if alike
                else f"{spearmanr(*zip(*both, strict=True)).statistic:.2f}"
            )
            lines.append(f"\nSpearman of loss and {column}, {len(both)} worlds: {correlations}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
