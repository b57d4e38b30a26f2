"""The table and the plot of `make bench-domains`."""

from __future__ import annotations

from statistics import median
from typing import Any

import matplotlib
from domain_tasks import CLONE, DOMAINS, EXPERT, FREE, METHODS, WORLD
from matplotlib.figure import Figure

from mesocosm import plotting


def runs_of(results: dict[str, Any], domain: str, method: str) -> list[dict[str, Any]]:
    return [results[name] for name in sorted(results) if name.startswith(f"{domain}/{method}/")]


def table(results: dict[str, Any]) -> None:
    """Print the Markdown table of docs/domains.md: medians over the seeds, and each seed's steps
    and return. A run that missed the target counts as more than its steps.
    """
    head = ("domain", "method", "seeds at the target", "real steps", "seconds", "USD")
    head = (*head, "last return", "wall s")
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for domain in DOMAINS:
        for method in METHODS:
            if runs := runs_of(results, domain, method):
                hit = sum(run["reached"] is not None for run in runs)
                more = "> " if 2 * hit <= len(runs) else ""
                ends = [end_of(run) for run in runs]
                each = ", ".join(
                    f"{'> ' if run['reached'] is None else ''}{end['real_steps']:,}"
                    for run, end in zip(runs, ends, strict=True)
                )
                returns = ", ".join(f"{end['return']:.2f} ± {end['error']:.2f}" for end in ends)
                money, seconds = (median(e[key] for e in ends) for key in ("price", "seconds"))
                cells = [
                    f"{hit} of {len(runs)}",
                    each,
                    f"{more}{seconds:,.0f}",
                    f"{more}{money:.3g}",
                ]
                cells += [returns, f"{median(run['wall_seconds'] for run in runs):,.0f}"]
                print(f"| {domain} | {method} | {' | '.join(cells)} |")
        for run in runs_of(results, domain, EXPERT)[:1]:
            for name, other in run["others"].items():
                value = f"{other['mean']:.2f} ± {other['error']:.2f}"
                print(f"| {domain} | {name} | | | | | {value} | |")


def end_of(run: dict[str, Any]) -> dict[str, Any]:
    """The point at the target, or else the last one."""
    hits = [p for p in run["points"] if p["real_steps"] == run["reached"]]
    point: dict[str, Any] = (hits or run["points"])[-1]
    return point


def plot(results: dict[str, Any]) -> Figure:
    """Return against money, a panel a domain: lines of the world's agent and of PPO, a marker for
    each clone, and a dashed line for the expert.
    """
    names = [name for name in DOMAINS if any(runs_of(results, name, m) for m in METHODS)]
    with matplotlib.rc_context(plotting.STYLE):
        figure = Figure(figsize=(4.6 * len(names), 3.2), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            for method, colour in ((WORLD, plotting.WORLD[0]), (FREE, plotting.FREE[0])):
                label = "the world's agent" if method == WORLD else "model-free PPO"
                for run in runs_of(results, name, method):
                    x, y = ([p[key] for p in run["points"]] for key in ("price", "return"))
                    axes.plot(x, y, color=colour, marker="o", markersize=4, label=label)
                    label = "_"
            for i, run in enumerate(runs_of(results, name, CLONE)):
                end, label = end_of(run), "_" if i else "clone"
                axes.plot(end["price"], end["return"], "s", color=plotting.FREE[1], label=label)
            if runs := runs_of(results, name, EXPERT):
                level = median(end_of(run)["return"] for run in runs)
                axes.axhline(level, color=plotting.MUTED, linestyle="--", label="expert")
            axes.set(xscale="log", title=name, xlabel="USD of real steps", ylabel="return")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4)
        return figure
