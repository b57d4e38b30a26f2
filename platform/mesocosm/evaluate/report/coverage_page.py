"""The page of a dataset's coverage, drawn from its summary alone: HTML with inline SVG, nothing
loaded from elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mesocosm.evaluate.report.page import PAGES
from mesocosm.plotting import DASHED, INK, MUTED, STYLE, WORLD, canvas, legend, short, svg

PAGE, SUMMARY = "coverage.html", "summary.json"
PANELS, ACROSS = 24, 4
"""Number columns that are drawn, and plots in a row."""
VALID, FREE = "#c2570c", "#8b3fa8"
DENSITY = ListedColormap(matplotlib.colormaps["Blues"](np.linspace(0.25, 1, 200)))


def write(summary: Mapping[str, Any], folder: Path) -> None:
    """Write the page, and the summary next to it."""
    (folder / SUMMARY).write_text(json.dumps(summary, indent=1, allow_nan=False))
    (folder / PAGE).write_text(render(summary))


def render(summary: Mapping[str, Any]) -> str:
    """The whole page."""
    gaps = [
        ("training to its other episodes", summary["gaps"]["train"], WORLD[0]),
        ("held out to training", summary["gaps"]["valid"], VALID),
        ("any action at logged states", summary["gaps"]["any_action"], FREE),
    ]
    gaps = [(name, gap, colour) for name, gap, colour in gaps if gap["curve"] is not None]
    figures = {
        "gaps": _gaps(gaps, summary["gaps"]["threshold"]) if gaps else None,
        "numbers": _numbers(summary["numbers"][:PANELS]),
        "plane": None if summary["plane"] is None else _plane(summary["plane"]),
    }
    return PAGES.get_template("coverage.html").render(
        summary=summary,
        verdict=verdict(summary),
        figures=figures,
        gaps=gaps,
        quantile_names=[f"{float(q):.0%}" for q in gaps[0][1]["quantiles"]] if gaps else [],
        panels=PANELS,
        short=short,
    )


def verdict(summary: Mapping[str, Any]) -> list[str]:
    """The main findings, a sentence each."""
    lines, entropy, tried = [], summary["behaviour_entropy"], summary["actions"]["tried"]
    if entropy["of"] > 1:  # a note covers a single behaviour
        varied = f"as varied as {entropy['effective']:.1f} of equal share"
        lines.append(f"{entropy['of']} behaviours, {varied}")
    if tried is not None:
        near = f"{tried:.0%} of the action space was tried near logged states"
        lines.append(f"{near}; behaviour that is uniform comes to 95%")
    beyond = summary["gaps"]["any_action"]["beyond"]
    if beyond is not None:
        lines.append(
            f"{_percent(beyond)} of uniform actions at logged states are farther from training than"
            " 99% of its own transitions do from other episodes"
        )
    lines += map(_text_line, summary["texts"])
    missing = summary["missing"]
    if missing is not None:
        share = f"{_percent(missing['beyond'])} of held-out transitions lie that far from training"
        lines.append(f"{share}; chance gives {_percent(missing['expected'])}")
    return [*lines, *summary["notes"]]


def _text_line(row: Mapping[str, Any]) -> str:
    episodes = row["episodes"]
    shortest, median, longest = (row["lengths"][q] for q in ("0", "0.5", "1"))
    growth = row["growth"]["exponent"]
    parts = [
        f"{row['name']}: {row['texts']:,} texts, {row['distinct']:,} of them distinct",
        f"{episodes['all']:,} episodes, {episodes['distinct']:,} of them distinct in these texts",
        f"{shortest:,.0f} to {longest:,.0f} bytes, median {median:,.0f}",
        f"{row['vocabulary']:,} distinct words among {row['words']:,}"
        + ("" if growth is None else f", growing with exponent {growth:.2f}"),
    ]
    if row["valid"] is not None and row["valid"]["ngrams"] is not None:
        seen = 1.0 - row["valid"]["texts"]
        new = f"{_percent(row['valid']['ngrams'])} of held-out 5-grams are new"
        parts.append(f"{_percent(seen)} of held-out texts are in training, {new}")
    return "; ".join(parts)


def _percent(value: float) -> str:
    return f"{value:.1%}" if value < 0.1 else f"{value:.0%}"


def _gaps(gaps: Sequence[tuple[str, Mapping[str, Any], str]], threshold: float | None) -> str:
    with matplotlib.rc_context(STYLE):
        figure, axes = canvas(9.2, 3.3)
        floor = min((v for _, gap, _ in gaps for v in gap["curve"] if v > 0), default=1e-3)
        for name, gap, colour in gaps:
            shares = np.linspace(0, 1, len(gap["curve"]))
            axes.plot(np.maximum(gap["curve"], floor), shares, color=colour, label=name)
        if threshold is not None:
            axes.axvline(max(threshold, floor), color=INK, linewidth=1.0, linestyle=DASHED)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0%}"))
        axes.set(xlabel="gap, standard deviations", ylabel="transitions within it")
        legend(axes)
        return svg(figure, "gaps", "Gaps of transitions to the nearest of training")


def _numbers(rows: Sequence[Mapping[str, Any]]) -> str:
    """A histogram of each number, training filled and held-out data as a line."""
    with matplotlib.rc_context(STYLE | {"axes.titlesize": 9.5, "font.size": 9}):
        deep = -(-len(rows) // ACROSS)
        figure = Figure(figsize=(9.2, 1.55 * deep + 0.1), layout="constrained")
        for k, row in enumerate(rows):
            axes = figure.add_subplot(deep, ACROSS, k + 1)
            axes.set_title(row["name"])
            axes.set_yticks([])
            axes.grid(False)
            if row["constant"]:
                axes.set_xticks([])
                style: Any = {"ha": "center", "va": "center", "color": MUTED}
                text = f"always {row['low']:.4g}"
                axes.text(0.5, 0.5, text, transform=axes.transAxes, **style)
                continue
            train, valid = (np.array(row[split]) for split in ("train", "valid"))
            axes.stairs(train / max(train.sum(), 1), row["edges"], color=WORLD[2], fill=True)
            if valid.any():
                axes.stairs(valid / valid.sum(), row["edges"], color=VALID, linewidth=1.3)
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
        return svg(figure, "numbers", "Histograms of each number of state and action")


def _plane(plane: Mapping[str, Any]) -> str:
    train, valid = np.array(plane["train"]), np.array(plane["valid"])
    with matplotlib.rc_context(STYLE):
        figure, axes = canvas(9.2, 4.6)
        drawn = np.ma.masked_equal(train, 0).T  # type: ignore[no-untyped-call]
        norm = LogNorm(1, max(int(train.max()), 2))
        mesh = axes.pcolormesh(*plane["edges"], drawn, cmap=DENSITY, norm=norm)
        bar = figure.colorbar(mesh, ax=axes, shrink=0.8, label="training transitions in a cell")
        bar.outline.set_visible(False)  # type: ignore[operator]
        x, y = ((np.array(e)[:-1] + np.array(e)[1:]) / 2 for e in plane["edges"])
        i, j = np.nonzero((valid > 0) & (train == 0))
        if len(i):
            style: Any = {"s": 16, "facecolor": "none", "edgecolor": VALID, "linewidth": 1.2}
            axes.scatter(x[i], y[j], label="held out, where training has nothing", **style)
        axes.grid(False)
        axes.set_facecolor("#fbfcfd")
        of_variance = [f"component ({share:.0%} of the variance)" for share in plane["shares"]]
        axes.set(xlabel=f"first {of_variance[0]}", ylabel=f"second {of_variance[1]}")
        legend(axes)
        return svg(figure, "plane", "State and action on two principal components")
