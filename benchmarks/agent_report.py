"""The tables and the plot of `make bench-agents`."""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import yaml

matplotlib.use("svg")
from agent_tasks import ABLATED, ABLATIONS, FORMER, PEER, TASKS, WORLD
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from mesocosm.plotting import DASHED, FREE, MUTED, STYLE

Curves = dict[str, dict[str, list[list[tuple[int, float]]]]]
"""Task -> published method -> (environment steps, return) of each seed."""
Results = dict[str, dict[str, Any]]

PUBLISHED = {"tdmpc2": "TD-MPC2", "dreamerv3": "DreamerV3", "sac": "SAC"}
"""Methods of the curves in the repository nicklashansen/tdmpc2, results/, commit e9f5932 (MIT)."""
COLOURS = {
    WORLD: "#1457c2",
    FORMER: "#88b1ee",
    PEER: FREE[0],
    "SAC": FREE[0],
    "PPO": FREE[1],
    "DQN": FREE[2],
    "TD-MPC2, published": FREE[3],
    "DreamerV3, published": FREE[2],
    "SAC, published": FREE[0],
}
COLUMNS = 3


def published(folder: Path) -> Curves:
    """The published curves in `folder`/curves.csv (method, task, step, return, seed); empty where
    there is no such file.
    """
    seeds: dict[tuple[str, str, str], list[tuple[int, float]]] = defaultdict(list)
    if (folder / "curves.csv").exists():
        with (folder / "curves.csv").open() as file:
            for row in csv.DictReader(file):
                if row["method"] in PUBLISHED and row["task"] in TASKS:
                    key = row["task"], PUBLISHED[row["method"]], row["seed"]
                    seeds[key].append((int(float(row["step"])), float(row["return"])))
    curves: Curves = {}
    for (task, method, _), points in seeds.items():
        curves.setdefault(task, {}).setdefault(method, []).append(sorted(points))
    return curves


def runs_of(results: Results, task: str, method: str) -> list[dict[str, Any]]:
    """The cells of a method, its steps as environment steps, in the order of seeds."""
    repeat, prefix = TASKS[task].repeat, f"{task}/{method}/"
    cells = [results[name] for name in sorted(results) if name.startswith(prefix)]
    return [
        cell
        | {
            "points": [(steps * repeat, value) for steps, value in cell["points"]],
            "reached": None if cell["reached"] is None else cell["reached"] * repeat,
            "judged": cell["judged"] * repeat,
        }
        for cell in cells
    ]


def tables(results: Results, curves: Curves) -> None:
    """Print the Markdown tables of docs/benchmarks.md."""
    print("| task, target | method | seeds at it | steps: median (each) | price, USD | wall s |")
    print("|---|---|---|---|---|---|")
    for name, task in TASKS.items():
        for method in task.methods:
            if runs := runs_of(results, name, method):
                _print_row(f"{name}, {task.target:g}", method, *_to_target(runs))
        for method, seeds in curves.get(name, {}).items():
            _print_row(f"{name}, {task.target:g}", f"{method}, published", *_of_curves(name, seeds))
    print("\n| task | steps | demand | world: median (each) | model-free: median (each) |")
    print("|---|---|---|---|---|")
    for name, task in TASKS.items():
        world = runs_of(results, name, WORLD)
        peer = [method for method in task.methods if method not in (WORLD, FORMER)]
        free = {method: runs_of(results, name, method) for method in peer}
        for steps, demand in task.demands.items():
            others = [
                f"{method} {text}"
                for method, runs in free.items()
                if (text := _at(runs, steps)) != "-"
            ]
            demanded, shown = "-" if demand is None else f"{demand:g}", _at(world, steps)
            if shown == "-" and not others:
                continue
            _print_row(name, f"{steps:,}", demanded, shown, "; ".join(others) or "-")
    _ablations(results)


def _print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |")


def _to_target(runs: list[dict[str, Any]]) -> list[str]:
    """The cells of a method's row."""
    hit = sum(run["reached"] is not None for run in runs)
    prices = [run.get("price") for run in runs]
    price = "-"
    if None not in prices:
        price = f"{'> ' if hit * 2 <= len(runs) else ''}{statistics.median(prices):,.0f}"
    seconds = statistics.median(run["seconds"] for run in runs)
    return [f"{hit} of {len(runs)}", _each(runs), price, f"{seconds:,.0f}"]


def _each(runs: list[dict[str, Any]]) -> str:
    """Median and each run's steps to the target."""
    ordered = sorted(runs, key=lambda run: run["reached"] or float("inf"))
    return f"{_steps(ordered[len(ordered) // 2])} ({', '.join(map(_steps, runs))})"


def _steps(run: dict[str, Any]) -> str:
    """Steps to the target, or the steps of a censored run, which stands for more."""
    return f"> {run['points'][-1][0]:,}" if run["reached"] is None else f"{run['reached']:,}"


def _of_curves(name: str, seeds: list[list[tuple[int, float]]]) -> list[str]:
    """The cells of a published method's row: its first point at the target, of each seed. Its price
    is that of its decisions and of a reset every 1000 environment steps.
    """
    task, runs = TASKS[name], []
    for points in seeds:
        reached = next((steps for steps, value in points if value >= task.target), None)
        runs.append({"points": points, "reached": reached})
    hit = sum(run["reached"] is not None for run in runs)
    declared = yaml.safe_load(task.config.read_text())["reality"]["price"]
    a_step = declared["per_step"] / task.repeat + declared["per_reset"] / 1000
    steps = statistics.median(run["reached"] or run["points"][-1][0] for run in runs)
    price = f"{'> ' if hit * 2 <= len(runs) else ''}{steps * a_step:,.0f}"
    return [f"{hit} of {len(runs)}", _each(runs), price, "-"]


def _at(runs: list[dict[str, Any]], steps: int) -> str:
    """The return at the last measurement within the steps; a run that reached its target earlier
    counts with that measurement. "-" if no run has that many steps.
    """
    values = []
    for run in runs:
        within = [value for at, value in run["points"] if at <= steps]
        far_enough = run["reached"] is not None or run["points"][-1][0] >= steps * 0.95
        if within and far_enough:
            values.append(within[-1])
    if not values:
        return "-"
    digits = 1 if abs(statistics.median(values)) < 30 else 0
    each = ", ".join(f"{value:.{digits}f}" for value in values)
    return f"{statistics.median(values):.{digits}f} ({each})"


def _ablations(results: Results) -> None:
    """Print the table of ablations, where any was run."""
    rows = []
    for name in ABLATED:
        for label, method in [("as shipped", WORLD)] + [(a, f"{WORLD}, {a}") for a in ABLATIONS]:
            if runs := runs_of(results, name, method):
                ends = [f"{run['points'][-1][1]:.1f}" for run in runs]
                best = [f"{max(value for _, value in run['points']):.1f}" for run in runs]
                steps = ", ".join(map(_steps, runs))
                rows.append((name, label, steps, ", ".join(best), ", ".join(ends)))
    if any(label != "as shipped" for _, label, *_ in rows):
        print("\n| task | world's settings | steps to target | best return | last return |")
        print("|---|---|---|---|---|")
        for row in rows:
            _print_row(*row)


def plot(results: Results, curves: Curves, path: Path) -> None:
    """Return against environment steps of each task that has any: a line a seed, a cross at a
    censored end.
    """
    names = [
        name
        for name, task in TASKS.items()
        if name in curves or any(runs_of(results, name, method) for method in task.methods)
    ]
    with pyplot.rc_context({**STYLE, "svg.hashsalt": "mesocosm"}):
        rows = -(-len(names) // COLUMNS)
        figure, grid = pyplot.subplots(
            rows, COLUMNS, figsize=(12, 2.9 * rows), layout="constrained"
        )
        for axis in grid.flat[len(names) :]:
            axis.set_axis_off()
        for axis, name in zip(grid.flat, names, strict=False):
            _panel(axis, name, results, curves.get(name, {}))
        figure.supxlabel("real environment steps trained on")
        figure.supylabel("mean return of greedy real episodes")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def _panel(
    axis: Axes, name: str, results: Results, curves: dict[str, list[list[tuple[int, float]]]]
) -> None:
    task = TASKS[name]
    for method in sorted(task.methods, key=lambda method: method == WORLD):  # the world on top
        label = {WORLD: "the world's agent", FORMER: "PPO in the world"}.get(
            method, f"model-free {method}"
        )
        for run in runs_of(results, name, method):
            x, y = zip(*run["points"], strict=True)
            colour = COLOURS[method]
            axis.plot(x, y, color=colour, linewidth=1.4, alpha=0.85, label=label)
            marker, size = ("x", 7) if run["reached"] is None else ("o", 5)
            axis.plot(x[-1], y[-1], color=colour, marker=marker, markersize=size)
            label = "_"  # no further entry in the legend
    for method, seeds in curves.items():
        x = [step for step, _ in seeds[0]]
        y = [
            statistics.mean(values)
            for values in zip(*([v for _, v in s] for s in seeds), strict=False)
        ]
        within = [i for i, step in enumerate(x) if 0 < step <= 500_000]
        label = f"{method}, published"
        axis.plot(
            [x[i] for i in within],
            [y[i] for i in within],
            color=COLOURS[label],
            linestyle=DASHED,
            linewidth=1.2,
            marker=".",
            label=label,
        )
    axis.axhline(task.target, color=MUTED, linewidth=0.8, linestyle=":")
    axis.set(xscale="log", title=f"{name}, target {task.target:g}")
    axis.set_xlim(left=200)
    axis.xaxis.set_minor_formatter(NullFormatter())
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8, loc="best")
