"""The page of a dataset's coverage, drawn from its summary alone: HTML with inline SVG, nothing
loaded from elsewhere.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mesocosm.evaluate.report.page import count, figure, number, section, share, table, text
from mesocosm.plotting import INK, MUTED, STYLE, WORLD, legend, short, svg

PAGE, SUMMARY = "coverage.html", "summary.json"
PANELS, ACROSS = 24, 4
"""Number columns that are drawn, and how many beside each other."""
VALID, FREE = "#c2570c", "#8b3fa8"
DENSITY = ListedColormap(matplotlib.colormaps["Blues"](np.linspace(0.25, 1, 200)))


def write(summary: Mapping[str, Any], folder: Path) -> None:
    """The page and the summary beside it."""
    (folder / SUMMARY).write_text(json.dumps(summary, indent=1, allow_nan=False))
    (folder / PAGE).write_text(render(summary))


def render(summary: Mapping[str, Any]) -> str:
    """The whole page."""
    template = Template(
        files("mesocosm.evaluate.report").joinpath("report.html").read_text(encoding="utf-8")
    )
    of = summary["sampled"]
    subtitle = (
        f"{summary['environment']} · {count(of['train']['of'])} transitions to train on,"
        f" {count(of['valid']['of'])} held out; distances are measured on"
        f" {count(of['train']['transitions'])} and {count(of['valid']['transitions'])} of them"
    )
    body = "\n".join(
        part
        for make in (_verdict, _behaviours, _gaps, _missing, _numbers, _plane, _categories)
        if (part := make(summary))
    )
    return template.substitute(
        title=html.escape(summary["title"]), subtitle=html.escape(subtitle), body=body
    )


def verdict(summary: Mapping[str, Any]) -> list[str]:
    """What is to be known first, in sentences."""
    said, entropy, actions = [], summary["behaviour_entropy"], summary["actions"]
    if entropy["of"] > 1:  # of one a note says what that means
        said.append(
            f"{entropy['of']} behaviours, as varied as {entropy['effective']:.1f} of equal share"
        )
    if actions["tried"] is not None:
        said.append(
            f"{actions['tried']:.0%} of the action space was tried near logged states; behaviour"
            " that is uniform comes to 95%"
        )
    beyond = summary["gaps"]["any_action"]["beyond"]
    if beyond is not None:
        said.append(
            f"{_percent(beyond)} of uniform actions at logged states lie farther from training than"
            " 99% of its own transitions do from other episodes"
        )
    missing = summary["missing"]
    if missing is not None:
        said.append(
            f"{_percent(missing['beyond'])} of held-out transitions lie so far from training;"
            f" {_percent(missing['expected'])} is what chance gives"
        )
    return [*said, *summary["notes"]]


def _percent(value: float) -> str:
    return f"{value:.1%}" if value < 0.1 else f"{value:.0%}"


def _verdict(summary: Mapping[str, Any]) -> str:
    return (
        '<div class="verdict">'
        + "".join(f"<p>{html.escape(line)}</p>" for line in verdict(summary))
        + "</div>"
    )


def _behaviours(summary: Mapping[str, Any]) -> str:
    rows = [
        [
            text(row["name"]),
            count(row["episodes"]),
            count(row["valid_episodes"]),
            count(row["transitions"]),
            *(number(value) for value in row["returns"]),
            *(count(value) for value in row["outcomes"].values()),
            "–" if row["success"] is None else f"{row['success']:.0%}",
        ]
        for row in summary["behaviours"]
    ]
    head = [
        "behaviour",
        "episodes",
        "held out",
        "transitions",
        "lowest return",
        "median",
        "highest",
        "terminated",
        "truncated",
        "unfinished",
        "success",
    ]
    body = table(head, rows)
    for task in summary["tasks"]:
        said = (
            ", ".join(f"{k}: {count(v)}" for k, v in task["values"].items())
            if "values" in task
            else f"{task['low']:g} to {task['high']:g}"
        )
        body += f"<p class='why'>Task {html.escape(task['name'])}: {html.escape(said)}.</p>"
    return section("Who acted", body)


def _gaps(summary: Mapping[str, Any]) -> str:
    lines = [
        ("training to its other episodes", summary["gaps"]["train"], WORLD[0]),
        ("held out to training", summary["gaps"]["valid"], VALID),
        ("any action at logged states", summary["gaps"]["any_action"], FREE),
    ]
    known = [(name, found, colour) for name, found, colour in lines if found["curve"] is not None]
    if not known:
        return ""
    why = (
        "The gap of a transition is the distance of its state and action to the nearest one of"
        " training, in standard deviations, root mean square over columns. Where an agent goes"
        " beyond training's own gaps, the world extrapolates. Dashed: 99% of training's own gaps."
    )
    with matplotlib.rc_context(STYLE):
        canvas = Figure(figsize=(9.2, 3.3), layout="constrained")
        axes = canvas.add_subplot()
        floor = min((v for _, found, _ in known for v in found["curve"] if v > 0), default=1e-3)
        for name, found, colour in known:
            shares = np.linspace(0, 1, len(found["curve"]))
            axes.plot(np.maximum(found["curve"], floor), shares, color=colour, label=name)
        if summary["gaps"]["threshold"] is not None:
            axes.axvline(
                max(summary["gaps"]["threshold"], floor),
                color=INK,
                linewidth=1.0,
                linestyle=(0, (4, 3)),
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0%}"))
        axes.set_xlabel("gap, standard deviations")
        axes.set_ylabel("transitions within it")
        legend(axes)
        drawn = svg(canvas, "gaps", "Gaps of transitions to the nearest of training")
    head = ["gap of", *(f"{float(q):.0%}" for q in known[0][1]["quantiles"])]
    rows = [
        [text(name), *(f"{v:.3g}" for v in found["quantiles"].values())] for name, found, _ in known
    ]
    return section(
        "How far from training", f"<p class='why'>{why}</p>{figure(drawn)}{table(head, rows)}"
    )


def _missing(summary: Mapping[str, Any]) -> str:
    missing = summary["missing"]
    if missing is None:
        return ""
    body = ""
    if missing["behaviours"]:
        body += (
            "<p>Behaviours that only held-out episodes have:"
            f" {html.escape(', '.join(missing['behaviours']))}.</p>"
        )
    if missing["outside"]:
        said = ", ".join(
            f"{name} ({low:.3g} to {high:.3g})" for name, (low, high) in missing["outside"].items()
        )
        body += f"<p>Held-out values go beyond training's range in {html.escape(said)}.</p>"
    only = [
        f"{row['name']} {', '.join(map(str, row['only_valid']))}"
        for row in summary["categories"]
        if row["only_valid"]
    ]
    if only:
        body += f"<p>Values that only held-out episodes have: {html.escape('; '.join(only))}.</p>"
    rows = [
        [
            text(row["episode"]),
            text(row["behaviour"]),
            count(row["length"]),
            number(row["return"]),
            f"{row['beyond']:.1%}",
            f"{row['farthest']:.2g}",
            text(row["most"]),
        ]
        for row in missing["episodes"]
    ]
    head = ["episode", "behaviour", "steps", "return", "beyond", "farthest gap", "most in"]
    if rows:
        body += (
            "<p class='why'>Held-out episodes by the share of their transitions that are beyond"
            " training.</p>" + table(head, rows, texts=2)
        )
    return section("What is held out and not in training", body or "<p>Nothing stands out.</p>")


def _numbers(summary: Mapping[str, Any]) -> str:
    rows = summary["numbers"]
    if not rows:
        return ""
    cells = [
        [
            text(row["name"]),
            f"{row['low']:.4g}",
            f"{row['high']:.4g}",
            f"{row['mean']:.3g}",
            f"{row['std']:.3g}",
            share(row["entropy"]),
            "–" if row["covered"] is None else f"{row['covered']:.0%}",
            "–" if row["valid_outside"] is None else f"{row['valid_outside']:.1%}",
        ]
        for row in rows
    ]
    head = [
        "number",
        "lowest",
        "highest",
        "mean",
        "deviation",
        "evenness",
        "of its space",
        "held out beyond",
    ]
    why = (
        "Evenness is the entropy over 32 equal bins of the range, 1 where every bin holds as much."
        " Of its space: bins of the space's own bounds that hold anything. Blue: training, orange:"
        " held out, each as a share of its own."
    )
    left = (
        f"<p class='why'>The first {PANELS} of {len(rows)} numbers are drawn.</p>"
        if len(rows) > PANELS
        else ""
    )
    return section(
        "Each number",
        f"<p class='why'>{why}</p>{figure(_panels(rows[:PANELS]))}{left}{table(head, cells)}",
    )


def _panels(rows: Sequence[Mapping[str, Any]]) -> str:
    with matplotlib.rc_context(STYLE | {"axes.titlesize": 9.5, "font.size": 9}):
        deep = -(-len(rows) // ACROSS)
        canvas = Figure(figsize=(9.2, 1.55 * deep + 0.1), layout="constrained")
        for k, row in enumerate(rows):
            axes = canvas.add_subplot(deep, ACROSS, k + 1)
            axes.set_title(row["name"])
            axes.set_yticks([])
            axes.grid(False)
            if row["constant"]:
                axes.set_xticks([])
                axes.text(
                    0.5,
                    0.5,
                    f"always {row['low']:.4g}",
                    ha="center",
                    va="center",
                    color=MUTED,
                    transform=axes.transAxes,
                )
                continue
            _steps(axes, row["edges"], row["train"], WORLD[2], filled=True)
            if sum(row["valid"]):
                _steps(axes, row["edges"], row["valid"], VALID, filled=False)
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
        return svg(canvas, "numbers", "Histograms of each number of state and action")


def _steps(
    axes: Axes, edges: Sequence[float], counts: Sequence[int], colour: str, *, filled: bool
) -> None:
    shares = np.array(counts) / max(sum(counts), 1)
    if filled:
        axes.stairs(shares, edges, color=colour, fill=True)
    else:
        axes.stairs(shares, edges, color=colour, linewidth=1.3)


def _plane(summary: Mapping[str, Any]) -> str:
    plane = summary["plane"]
    if plane is None:
        return ""
    train, valid = np.array(plane["train"]), np.array(plane["valid"])
    with matplotlib.rc_context(STYLE):
        canvas = Figure(figsize=(9.2, 4.6), layout="constrained")
        axes = canvas.add_subplot()
        drawn = np.ma.masked_equal(train, 0).T  # type: ignore[no-untyped-call]
        mesh = axes.pcolormesh(
            *plane["edges"], drawn, cmap=DENSITY, norm=LogNorm(1, max(int(train.max()), 2))
        )
        bar = canvas.colorbar(mesh, ax=axes, shrink=0.8, label="training transitions in a cell")
        bar.outline.set_visible(False)  # type: ignore[operator]
        middles = [(np.array(e)[:-1] + np.array(e)[1:]) / 2 for e in plane["edges"]]
        i, j = np.nonzero((valid > 0) & (train == 0))
        if len(i):
            axes.scatter(
                middles[0][i],
                middles[1][j],
                s=16,
                facecolor="none",
                edgecolor=VALID,
                linewidth=1.2,
                label="held out, where training has nothing",
            )
        axes.grid(False)
        axes.set_facecolor("#fbfcfd")
        for k, name in enumerate(("first", "second")):
            said = f"{name} component ({plane['shares'][k]:.0%} of the variance)"
            axes.set_xlabel(said) if k == 0 else axes.set_ylabel(said)
        legend(axes)
        picture = svg(canvas, "plane", "State and action on two principal components")
    return section(
        "State and action together",
        "<p class='why'>On the two principal components of training's"
        f" transitions.</p>{figure(picture)}",
    )


def _categories(summary: Mapping[str, Any]) -> str:
    rows = [
        [
            text(row["name"]),
            f"{count(row['seen'])} of {count(row['of'])}",
            number(row["effective"]),
            text(", ".join(f"{value}: {short(n)}" for value, n in row["counts"].items())),
        ]
        for row in summary["categories"]
    ]
    why = (
        "<p class='why'>Values as the space numbers them from 0, in training; effective: as varied"
        " as so many of equal share.</p>"
    )
    return (
        section(
            "Each category",
            why + table(["category", "values seen", "effective", "the most common"], rows),
        )
        if rows
        else ""
    )
