"""The report's plots, each an SVG string drawn from the summary alone. Imports matplotlib without a
display.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from mesocosm.plotting import (
    FREE,
    INK,
    MUTED,
    PARTS,
    REAL,
    ROUNDS,
    STYLE,
    WORLD,
    legend,
    short,
    svg,
)


def returns(summary: Mapping[str, Any]) -> str:
    """Return in reality against real steps spent: the world's agent with its intervals, model-free
    runs through the same ledger.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _canvas(9.2, 4.5)
        world, free = summary["curves"]["world"], summary["curves"]["model_free"]
        steps = [
            p["real_steps"]
            for curve in [*world, *free]
            for p in curve["points"]
            if p["real_steps"] > 0
        ]
        names = list(dict.fromkeys(curve["name"] for curve in free))
        seen: set[str] = set()

        def label(name: str) -> str | None:
            return None if name in seen or seen.add(name) else name  # type: ignore[func-returns-value]

        for curve in free:
            xs, ys = _points(curve)
            colour = FREE[names.index(curve["name"]) % len(FREE)]
            _bars(axes, curve, colour)
            axes.plot(xs, ys, color=colour, linewidth=1.5, alpha=0.85, label=label(curve["name"]))
            if curve["censored"] and xs:
                axes.plot(
                    xs[-1],
                    ys[-1],
                    marker=">",
                    markersize=9,
                    markerfacecolor="white",
                    markeredgecolor=colour,
                    markeredgewidth=1.6,
                    clip_on=False,
                )
                axes.annotate(
                    "stopped",
                    (xs[-1], ys[-1]),
                    textcoords="offset points",
                    xytext=(-5, 9),
                    ha="right",
                    color=colour,
                    fontsize=9.5,
                )
        for number, curve in enumerate(world):
            xs, ys = _points(curve)
            colour = WORLD[number % len(WORLD)]
            _bars(axes, curve, colour)
            axes.plot(
                xs,
                ys,
                color=colour,
                marker="o",
                markersize=6,
                linewidth=2.2,
                label=label(curve["name"]),
            )
            if curve["censored"] and xs:
                axes.plot(
                    xs[-1],
                    ys[-1],
                    marker=">",
                    markersize=11,
                    markerfacecolor="white",
                    markeredgecolor=colour,
                    markeredgewidth=1.8,
                    clip_on=False,
                )
        if steps and max(steps) > 6 * min(steps):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
        if summary["target"] is not None:
            axes.axhline(summary["target"], color=INK, linewidth=1.1, linestyle=(0, (4, 3)))
            axes.annotate(
                f"target {summary['target']:g}",
                (0, summary["target"]),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                xytext=(4, -13),
                fontsize=9.5,
            )
        axes.set_xlabel("real steps spent")
        axes.set_ylabel("return in reality")
        legend(axes)
        return svg(figure, "returns", "Return in reality against real steps spent")


def _bars(axes: Axes, curve: Mapping[str, Any], colour: str) -> None:
    """The intervals of a curve's judged points."""
    spans = [
        (p["real_steps"], p["mean"], p["interval"])
        for p in curve["points"]
        if p["interval"] is not None
    ]
    if spans:
        down, up = [m - i[0] for _, m, i in spans], [i[1] - m for _, m, i in spans]
        axes.errorbar(
            [x for x, _, _ in spans],
            [m for _, m, _ in spans],
            yerr=[down, up],
            fmt="none",
            ecolor=colour,
            elinewidth=1.4,
            capsize=3,
        )


def losses(summary: Mapping[str, Any]) -> str | None:
    """Validation nats a transition by part, over rounds; None below two rounds, where the table
    says it all.
    """
    rows = summary["losses"]
    parts = list(dict.fromkeys(part for row in rows for part in row["parts"]))
    if len(rows) < 2 or not parts:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 2.5), layout="constrained")
        for number, part in enumerate(parts):
            axes = figure.add_subplot(1, len(parts), number + 1)
            pairs = [
                (row["round"], row["parts"][part])
                for row in rows
                if row["parts"].get(part) is not None
            ]
            axes.plot(
                [r for r, _ in pairs],
                [v for _, v in pairs],
                color=PARTS[number % len(PARTS)],
                marker="o",
                markersize=4.5,
            )
            axes.set_title(part)
            axes.set_xlabel("round")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
            axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
            if number == 0:
                axes.set_ylabel("nats a transition")
        return svg(figure, "losses", "Validation loss by part over rounds")


def open_loop(summary: Mapping[str, Any]) -> str | None:
    """RMSE over persistence's by horizon, one line a round; 1 is no better than predicting no
    change. Whole episodes stand apart.
    """
    rounds = [
        entry
        for entry in summary["open_loop"]
        if any(row["ratio"] for row in entry["table"]["rows"])
    ]
    if not rounds:
        return None
    horizons = list(
        dict.fromkeys(row["horizon"] for entry in rounds for row in entry["table"]["rows"])
    )
    with matplotlib.rc_context(STYLE):
        figure, axes = _canvas(9.2, 3.6)
        shades = [
            ROUNDS[round((len(ROUNDS) - 3) * (k + 1) / len(rounds))] for k in range(len(rounds))
        ]
        for number, (entry, colour) in enumerate(zip(rounds, shades, strict=True)):
            places = {
                row["horizon"]: (horizons.index(row["horizon"]), row)
                for row in entry["table"]["rows"]
                if row["ratio"]
            }
            name = "the world" if entry["round"] is None else f"round {entry['round']}"
            line = [found for horizon, found in places.items() if horizon != "full"]
            axes.plot(
                [x for x, _ in line],
                [row["ratio"] for _, row in line],
                color=colour,
                marker="o",
                markersize=5,
                label=name,
            )
            if "full" in places:
                x, row = places["full"]
                axes.plot(x, row["ratio"], color=colour, marker="D", markersize=5.5)
            if number == len(rounds) - 1:
                for x, row in places.values():
                    if row["interval"] is not None and row["interval"][0] > 0:
                        axes.plot(
                            [x, x],
                            row["interval"],
                            color=colour,
                            linewidth=7,
                            alpha=0.2,
                            solid_capstyle="butt",
                        )
        axes.set_yscale("log")
        axes.axhline(1, color=INK, linewidth=1.1, linestyle=(0, (4, 3)))
        axes.annotate(
            "persistence: no change",
            (0, 1),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            xytext=(4, 4),
            fontsize=9.5,
        )
        axes.set_xticks(
            range(len(horizons)), ["whole episode" if h == "full" else h for h in horizons]
        )
        axes.set_xlim(-0.35, len(horizons) - 0.65)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("steps ahead")
        axes.set_ylabel("RMSE / persistence's")
        legend(axes)
        return svg(figure, "openloop", "Open-loop error by horizon")


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
                axes.plot(
                    range(len(real)),
                    real,
                    color=REAL,
                    linewidth=2.8,
                    solid_capstyle="round",
                    solid_joinstyle="round",
                )
                for sample in episode["imagined"]:
                    values = [state[row] for state in sample]
                    axes.plot(range(len(values)), values, color=WORLD[0], linewidth=1.0, alpha=0.7)
                seen = [
                    *real,
                    *(
                        state[row]
                        for sample in episode["imagined"]
                        for state in sample[: len(real)]
                    ),
                ]
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
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure, axes = _canvas(9.2, 0.38 * len(names) + 0.8)
        for place, name in enumerate(names):
            left = 0.0
            for row in (row for row in rows if row["name"] == name):
                shade = (
                    ROUNDS[2 + rounds.index(row["round"]) % 4]
                    if row["round"] is not None
                    else MUTED
                )
                axes.barh(
                    place,
                    row["seconds"],
                    left=left,
                    height=0.62,
                    color=shade,
                    edgecolor="white",
                    linewidth=0.8,
                )
                left += row["seconds"]
            axes.annotate(
                f"{left:.0f} s",
                (left, place),
                textcoords="offset points",
                xytext=(5, 0),
                va="center",
                color=MUTED,
            )
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.invert_yaxis()
        axes.set_xlabel("wall seconds" + (", a shade a round" if len(rounds) > 1 else ""))
        axes.margins(x=0.08)
        axes.spines["left"].set_visible(False)
        return svg(figure, "stages", "Wall seconds by stage")


def _points(curve: Mapping[str, Any]) -> tuple[Sequence[float], Sequence[float]]:
    kept = [p for p in curve["points"] if p["mean"] is not None]
    return [p["real_steps"] for p in kept], [p["mean"] for p in kept]


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()
