"""Plots of an evaluation's own parts: values of policies, the gap along training, errors away from
the data, calibration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mesocosm.plotting import FREE, INK, MUTED, REAL, STYLE, WORLD, legend, svg

KINDS = (
    ("given", "policies of the config", INK, "D"),
    ("snapshot", "the agent along its training", WORLD[0], "o"),
    ("graded", "the agent with noise", FREE[0], "s"),
)


def kind_of(row: Mapping[str, Any]) -> str:
    return (
        "snapshot"
        if row["iteration"] is not None
        else "graded"
        if row["noise"] is not None
        else "given"
    )


def values(found: Mapping[str, Any]) -> str:
    """Left: each policy's mean return in the world against reality's, with 90% intervals. Right:
    both along the agent's training.
    """
    rows = found["policies"]
    curve = sorted(
        (row for row in rows if row["iteration"] is not None), key=lambda row: row["iteration"]
    )
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 4.0), layout="constrained")
        left, right = figure.subplots(1, 2) if len(curve) > 1 else (figure.add_subplot(), None)
        _scatter(left, rows)
        if right is not None:
            _along(right, curve)
        return svg(figure, "values", "Policy values in the world and in reality")


def _scatter(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    every = [row[where]["mean"] for row in rows for where in ("real", "world")]
    low, high = min(every), max(every)
    pad = 0.05 * (high - low or 1.0)
    axes.plot(
        [low - pad, high + pad],
        [low - pad, high + pad],
        color=REAL,
        linewidth=1.2,
        linestyle=(0, (4, 3)),
        zorder=1,
    )
    for kind, label, colour, marker in KINDS:
        own = [row for row in rows if kind_of(row) == kind]
        for row in own:
            x, y = row["real"]["mean"], row["world"]["mean"]
            if row["real"]["interval"] is not None:
                axes.plot(row["real"]["interval"], [y, y], color=colour, alpha=0.25, linewidth=1.5)
            if row["world"]["interval"] is not None:
                axes.plot([x, x], row["world"]["interval"], color=colour, alpha=0.25, linewidth=1.5)
        if own:
            means = [row["real"]["mean"] for row in own], [row["world"]["mean"] for row in own]
            axes.plot(*means, marker, color=colour, markersize=5.5, linestyle="none", label=label)
    axes.set_xlabel("return in reality")
    axes.set_ylabel("return in the world")
    legend(axes, columns=1)


def _along(axes: Axes, curve: Sequence[Mapping[str, Any]]) -> None:
    iterations = [row["iteration"] for row in curve]
    for where, colour, label in (("real", INK, "in reality"), ("world", WORLD[0], "in the world")):
        axes.plot(
            iterations,
            [row[where]["mean"] for row in curve],
            color=colour,
            marker="o",
            markersize=4.5,
            label=label,
        )
        spans = [
            row[where]["interval"] or (row[where]["mean"], row[where]["mean"]) for row in curve
        ]
        axes.fill_between(
            iterations,
            [s[0] for s in spans],
            [s[1] for s in spans],
            color=colour,
            alpha=0.12,
            linewidth=0,
        )
    axes.set_xlabel("iterations of training in the world")
    axes.set_ylabel("return")
    legend(axes, columns=1)


def off_policy(found: Mapping[str, Any]) -> str:
    """Open-loop error over no change's by horizon, a line a behaviour, darker with its distance
    from the logs.
    """
    behaviours = found["behaviours"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[3, 2])
        colours = matplotlib.colormaps["viridis"].resampled(max(len(behaviours), 2))
        horizons = list(
            dict.fromkeys(
                line["horizon"]
                for row in behaviours
                for line in row["fidelity"]["open_loop"]["rows"]
            )
        )
        left.set_xticks(range(len(horizons)), horizons)
        for number, row in enumerate(behaviours):
            lines = [line for line in row["fidelity"]["open_loop"]["rows"] if line["ratio"]]
            colour = colours(0.9 * (1 - number / max(len(behaviours) - 1, 1)))
            places = [horizons.index(line["horizon"]) for line in lines]
            left.plot(
                places,
                [line["ratio"] for line in lines],
                color=colour,
                marker="o",
                markersize=4,
                label=row["name"],
            )
            right.barh(number, row["large"], color=colour, height=0.62)
        left.set_yscale("log")
        left.axhline(1, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
        left.set_xlabel("steps ahead")
        left.set_ylabel("RMSE / no change's")
        right.set_yticks(range(len(behaviours)), [row["name"] for row in behaviours], fontsize=8.5)
        right.invert_yaxis()
        right.axvline(0.1, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)))
        right.set_xlim(0, 1)
        right.set_xlabel("share of large one-step errors")
        return svg(figure, "offpolicy", "Errors away from the data")


def calibration(table: Mapping[str, Any]) -> str | None:
    """Share of true numbers inside the world's intervals, by horizon."""
    rows = [row for row in table["rows"] if row["coverage"] is not None]
    if not rows:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 2.4), layout="constrained")
        axes = figure.add_subplot()
        names = ["whole episode" if row["horizon"] == "full" else row["horizon"] for row in rows]
        for place, row in enumerate(rows):
            if row["coverage_interval"] is not None:
                axes.plot(
                    [place, place],
                    row["coverage_interval"],
                    color=WORLD[0],
                    linewidth=6,
                    alpha=0.2,
                    solid_capstyle="butt",
                )
        axes.plot(
            range(len(rows)),
            [row["coverage"] for row in rows],
            color=WORLD[0],
            marker="o",
            markersize=5,
            label="the world",
        )
        axes.axhline(
            table["nominal"],
            color=INK,
            linewidth=1.1,
            linestyle=(0, (4, 3)),
            label=f"calibrated: {table['nominal']:.0%}",
        )
        axes.set_xticks(range(len(rows)), names)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("steps ahead")
        axes.set_ylabel("truth inside")
        legend(axes)
        return svg(figure, "calibration", "Calibration of the world's intervals")
