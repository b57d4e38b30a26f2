"""The plots of `report.html`: each an SVG string drawn from the summary alone, or None where the
summary has nothing to draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from mesocosm.plotting import (
    DASHED,
    FREE,
    INK,
    MUTED,
    PARTS,
    REAL,
    ROUNDS,
    STYLE,
    WORLD,
    canvas,
    legend,
    short,
    svg,
)

KINDS = (
    ("given", "policies of the config", INK, "D"),
    ("snapshot", "the agent along its training", WORLD[0], "o"),
    ("graded", "the agent with noise", FREE[0], "s"),
)
WHOLE = "whole episode"


def returns(summary: Mapping[str, Any]) -> str | None:
    """Return in reality against real steps spent: the agent of the world with its intervals, and
    model-free runs through the same ledger.
    """
    world, free = summary["curves"]["world"], summary["curves"]["model_free"]
    steps = [p["real_steps"] for curve in [*world, *free] for p in curve["points"]]
    if not steps:
        return None
    names = list(dict.fromkeys(curve["name"] for curve in free))
    line: dict[str, Any] = {"linewidth": 1.5, "alpha": 0.85}
    with matplotlib.rc_context(STYLE):
        figure, axes = canvas(9.2, 4.5)
        for curve in free:
            _curve(axes, curve, FREE[names.index(curve["name"]) % len(FREE)], 9, 1.6, **line)
        line = {"linewidth": 2.2, "marker": "o", "markersize": 6}
        for number, curve in enumerate(world):
            _curve(axes, curve, WORLD[number % len(WORLD)], 11, 1.8, **line)
        style: Any = {"textcoords": "offset points", "xytext": (-5, 9), "ha": "right"}
        for curve in free:
            points = [p for p in curve["points"] if p["mean"] is not None]
            if curve["censored"] and points:
                colour = FREE[names.index(curve["name"]) % len(FREE)]
                end = points[-1]["real_steps"], points[-1]["mean"]
                axes.annotate("stopped", end, color=colour, fontsize=9.5, **style)
        positive = [step for step in steps if step > 0]
        if positive and max(positive) > 6 * min(positive):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
        if summary["target"] is not None:
            _reference(axes, summary["target"], f"target {summary['target']:g}", -13)
        axes.set(xlabel="real steps spent", ylabel="return in reality")
        legend(axes)
        return svg(figure, "returns", "Return in reality against real steps spent")


def _curve(
    axes: Axes, curve: Mapping[str, Any], colour: str, size: float, edge: float, **line: Any
) -> None:
    """One run, the intervals of its judged points, and an open arrow where it was stopped."""
    points = [p for p in curve["points"] if p["mean"] is not None]
    spans = [p for p in points if p["interval"] is not None]
    if spans:
        errors = [[abs(p["interval"][side] - p["mean"]) for p in spans] for side in (0, 1)]
        xs, ys = [p["real_steps"] for p in spans], [p["mean"] for p in spans]
        bars: Any = {"fmt": "none", "elinewidth": 1.4, "capsize": 3}
        axes.errorbar(xs, ys, yerr=errors, ecolor=colour, **bars)
    xs, ys = [p["real_steps"] for p in points], [p["mean"] for p in points]
    seen = axes.get_legend_handles_labels()[1]
    label = None if curve["name"] in seen else curve["name"]
    axes.plot(xs, ys, color=colour, label=label, **line)
    if curve["censored"] and points:
        arrow: dict[str, Any] = {"marker": ">", "markerfacecolor": "white", "clip_on": False}
        arrow |= {"markersize": size, "markeredgecolor": colour, "markeredgewidth": edge}
        axes.plot(xs[-1], ys[-1], **arrow)


def _reference(axes: Axes, y: float, text: str, below: float) -> None:
    """A dashed horizontal line with its name."""
    axes.axhline(y, color=INK, linewidth=1.1, linestyle=DASHED)
    where: Any = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate(text, (0, y), xytext=(4, below), fontsize=9.5, **where)


def losses(summary: Mapping[str, Any]) -> str | None:
    """Validation nats a transition by part, over rounds; None below two rounds."""
    rows = summary["losses"]
    parts = list(dict.fromkeys(part for row in rows for part in row["parts"]))
    if len(rows) < 2 or not parts:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 2.5), layout="constrained")
        for number, part in enumerate(parts):
            axes = figure.add_subplot(1, len(parts), number + 1)
            known = [row for row in rows if row["parts"].get(part) is not None]
            rounds, nats = [row["round"] for row in known], [row["parts"][part] for row in known]
            axes.plot(rounds, nats, color=PARTS[number % len(PARTS)], marker="o", markersize=4.5)
            axes.set(title=part, xlabel="round")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
            axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
            if number == 0:
                axes.set_ylabel("nats a transition")
        return svg(figure, "losses", "Validation loss by part over rounds")


def open_loop(summary: Mapping[str, Any]) -> str | None:
    """Plot the RMSE over that of persistence by horizon, one line a round. 1 is no better than
    predicting no change. Whole episodes are drawn apart.
    """
    tables = [(entry["round"], entry["table"]["rows"]) for entry in summary["open_loop"]]
    tables = [(round, rows) for round, rows in tables if any(row["ratio"] for row in rows)]
    if not tables:
        return None
    horizons = list(dict.fromkeys(row["horizon"] for _, rows in tables for row in rows))
    with matplotlib.rc_context(STYLE):
        figure, axes = canvas(9.2, 3.6)
        for number, (round_, rows) in enumerate(tables):
            colour = ROUNDS[round((len(ROUNDS) - 3) * (number + 1) / len(tables))]
            known = [(horizons.index(row["horizon"]), row) for row in rows if row["ratio"]]
            line = [(x, row["ratio"]) for x, row in known if row["horizon"] != "full"]
            name = "the world" if round_ is None else f"round {round_}"
            xs, ys = [x for x, _ in line], [y for _, y in line]
            axes.plot(xs, ys, color=colour, marker="o", markersize=5, label=name)
            for x, row in known:
                if row["horizon"] == "full":
                    axes.plot(x, row["ratio"], color=colour, marker="D", markersize=5.5)
            for x, row in known if number == len(tables) - 1 else ():
                if row["interval"] is not None and row["interval"][0] > 0:
                    _bar(axes, x, row["interval"], colour, 7)
        axes.set_yscale("log")
        _reference(axes, 1, "persistence: no change", 4)
        axes.set_xticks(range(len(horizons)), [WHOLE if h == "full" else h for h in horizons])
        axes.set_xlim(-0.35, len(horizons) - 0.65)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel="steps ahead", ylabel="RMSE / persistence's")
        legend(axes)
        return svg(figure, "openloop", "Open-loop error by horizon")


def _bar(axes: Axes, x: float, interval: Sequence[float], colour: str, width: float) -> None:
    style: Any = {"alpha": 0.2, "solid_capstyle": "butt"}
    axes.plot([x, x], interval, color=colour, linewidth=width, **style)


def trajectories(group: Mapping[str, Any], number: int) -> str | None:
    """Reality (broad, grey) and imagined rollouts (thin, blue) of one agent from the same first
    states: a row a dimension, a column an episode.
    """
    episodes, names = group["episodes"], group["names"]
    if not episodes or not names:
        return None
    with matplotlib.rc_context(STYLE | {"font.size": 9.5, "axes.titlesize": 9.5}):
        figure = Figure(figsize=(9.2, 1.35 * len(names) + 0.6), layout="constrained")
        grid = figure.subplots(len(names), len(episodes), squeeze=False, sharex="col", sharey="row")
        for column, episode in enumerate(episodes):
            for row, name in enumerate(names):
                axes = grid[row][column]
                real = [state[row] for state in episode["reality"]]
                imagined = [[state[row] for state in sample] for sample in episode["imagined"]]
                style: Any = {"solid_capstyle": "round", "solid_joinstyle": "round"}
                axes.plot(range(len(real)), real, color=REAL, linewidth=2.8, **style)
                for values in imagined:
                    axes.plot(range(len(values)), values, color=WORLD[0], linewidth=1.0, alpha=0.7)
                seen = [*real, *(value for values in imagined for value in values[: len(real)])]
                pad = 0.06 * (max(seen) - min(seen) or 1.0)
                low, high = axes.get_ylim() if column else (float("inf"), float("-inf"))
                axes.set_ylim(min(low, min(seen) - pad), max(high, max(seen) + pad))
                axes.yaxis.set_major_locator(MaxNLocator(nbins=3))
                axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
                if column == 0:
                    axes.set_ylabel(name, rotation=0, ha="right", va="center")
                if row == 0:
                    axes.set_title(episode["title"])
                if row == len(names) - 1:
                    axes.set_xlabel("step")
        figure.align_ylabels()
        return svg(figure, f"trajectories{number}", f"{group['title']}: reality and imagination")


def stages(summary: Mapping[str, Any]) -> str | None:
    """Wall seconds by stage, one bar a stage, split by round."""
    rows = summary["wall"]["stages"]
    if not rows:
        return None
    names = list(dict.fromkeys(row["name"] for row in rows))
    rounds = sorted({row["round"] for row in rows if row["round"] is not None})
    shades = {round: ROUNDS[2 + k % 4] for k, round in enumerate(rounds)}
    bar: Any = {"height": 0.62, "edgecolor": "white", "linewidth": 0.8}
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure, axes = canvas(9.2, 0.38 * len(names) + 0.8)
        for place, name in enumerate(names):
            left = 0.0
            for row in (row for row in rows if row["name"] == name):
                shade = shades.get(row["round"], MUTED)
                axes.barh(place, row["seconds"], left=left, color=shade, **bar)
                left += row["seconds"]
            style: Any = {"textcoords": "offset points", "va": "center", "color": MUTED}
            axes.annotate(f"{left:.0f} s", (left, place), xytext=(5, 0), **style)
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.invert_yaxis()
        axes.set_xlabel("wall seconds" + (", a shade a round" if len(rounds) > 1 else ""))
        axes.margins(x=0.08)
        axes.spines["left"].set_visible(False)
        return svg(figure, "stages", "Wall seconds by stage")


def policy_values(value: Mapping[str, Any]) -> str:
    """Left: each policy's mean return in the world against its return in reality, with 90%
    intervals. Right: both along the agent's training.
    """
    rows = value["policies"]
    snapshots = [row for row in rows if row["iteration"] is not None]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 4.0), layout="constrained")
        if len(snapshots) > 1:
            left, right = figure.subplots(1, 2)
            _along(right, sorted(snapshots, key=lambda row: row["iteration"]))
        else:
            left = figure.add_subplot()
        _scatter(left, rows)
        return svg(figure, "values", "Policy values in the world and in reality")


def _kind(row: Mapping[str, Any]) -> str:
    if row["iteration"] is not None:
        return "snapshot"
    return "given" if row["noise"] is None else "graded"


def _scatter(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    means = [row[where]["mean"] for row in rows for where in ("real", "world")]
    pad = 0.05 * (max(means) - min(means) or 1.0)
    ends = [min(means) - pad, max(means) + pad]
    axes.plot(ends, ends, color=REAL, linewidth=1.2, linestyle=DASHED, zorder=1)
    for kind, label, colour, marker in KINDS:
        members = [row for row in rows if _kind(row) == kind]
        for row in members:
            (x, across), (y, up) = ((row[k]["mean"], row[k]["interval"]) for k in ("real", "world"))
            for xs, ys in ((across, (y, y)), ((x, x), up)):
                if xs is not None and ys is not None:
                    axes.plot(xs, ys, color=colour, alpha=0.25, linewidth=1.5)
        if members:
            xs, ys = ([row[k]["mean"] for row in members] for k in ("real", "world"))
            axes.plot(xs, ys, marker, color=colour, markersize=5.5, linestyle="none", label=label)
    axes.set(xlabel="return in reality", ylabel="return in the world")
    legend(axes, columns=1)


def _along(axes: Axes, curve: Sequence[Mapping[str, Any]]) -> None:
    iterations = [row["iteration"] for row in curve]
    for where, colour, label in (("real", INK, "in reality"), ("world", WORLD[0], "in the world")):
        means = [row[where]["mean"] for row in curve]
        axes.plot(iterations, means, color=colour, marker="o", markersize=4.5, label=label)
        spans = [row[where]["interval"] or (row[where]["mean"],) * 2 for row in curve]
        low, high = zip(*spans, strict=True)
        axes.fill_between(iterations, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.set(xlabel="iterations of training in the world", ylabel="return")
    legend(axes, columns=1)


def off_policy(off: Mapping[str, Any]) -> str:
    """Left: open-loop error over that of no change by horizon, a line a behaviour, darker with its
    distance from the logs. Right: shares of large errors.
    """
    behaviours = off["behaviours"]
    tables = [row["fidelity"]["open_loop"]["rows"] for row in behaviours]
    horizons = list(dict.fromkeys(line["horizon"] for lines in tables for line in lines))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[3, 2])
        colours = matplotlib.colormaps["viridis"].resampled(max(len(behaviours), 2))
        left.set_xticks(range(len(horizons)), horizons)
        for number, (row, lines) in enumerate(zip(behaviours, tables, strict=True)):
            colour = colours(0.9 * (1 - number / max(len(behaviours) - 1, 1)))
            known = [(horizons.index(line["horizon"]), line["ratio"]) for line in lines]
            known = [(x, ratio) for x, ratio in known if ratio]
            xs, ys = [x for x, _ in known], [y for _, y in known]
            left.plot(xs, ys, color=colour, marker="o", markersize=4, label=row["name"])
            right.barh(number, row["large"], color=colour, height=0.62)
        left.set_yscale("log")
        left.axhline(1, color=INK, linewidth=1.0, linestyle=DASHED)
        left.set(xlabel="steps ahead", ylabel="RMSE / no change's")
        right.set_yticks(range(len(behaviours)), [row["name"] for row in behaviours], fontsize=8.5)
        right.invert_yaxis()
        right.axvline(0.1, color=MUTED, linewidth=1.0, linestyle=DASHED)
        right.set_xlim(0, 1)
        right.set_xlabel("share of large one-step errors")
        return svg(figure, "offpolicy", "Errors away from the data")


def calibration(table: Mapping[str, Any]) -> str | None:
    """Share of true numbers inside the world's intervals, by horizon."""
    rows = [row for row in table["rows"] if row["coverage"] is not None]
    if not rows:
        return None
    nominal = table["nominal"]
    with matplotlib.rc_context(STYLE):
        figure, axes = canvas(9.2, 2.4)
        for x, row in enumerate(rows):
            if row["coverage_interval"] is not None:
                _bar(axes, x, row["coverage_interval"], WORLD[0], 6)
        style: Any = {"color": WORLD[0], "marker": "o", "markersize": 5, "label": "the world"}
        axes.plot(range(len(rows)), [row["coverage"] for row in rows], **style)
        name = f"calibrated: {nominal:.0%}"
        axes.axhline(nominal, color=INK, linewidth=1.1, linestyle=DASHED, label=name)
        names = [WHOLE if row["horizon"] == "full" else row["horizon"] for row in rows]
        axes.set_xticks(range(len(rows)), names)
        axes.set_ylim(0, 1.02)
        axes.set(xlabel="steps ahead", ylabel="truth inside")
        legend(axes)
        return svg(figure, "calibration", "Calibration of the world's intervals")
