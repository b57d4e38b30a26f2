"""The page of a study of transfer: imagined against real gains of agents, one in each world.

It is drawn from its summary alone: HTML with inline SVG, nothing loaded from elsewhere.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mesocosm.agents import gate
from mesocosm.evaluate.metrics.ranking import ranking
from mesocosm.evaluate.report import report
from mesocosm.evaluate.report.page import PAGES, percent, share, with_span
from mesocosm.plotting import DASHED, INK, REAL, ROUNDS, STYLE, canvas, document, legend, svg
from mesocosm.store.artifacts import Artifact

TABLE, PLOT = "table.csv", "transfer.svg"
RANKED = "policy_value/pearson"


@dataclass(frozen=True)
class TransferPoint:
    """One world of a study, and the agent that was trained in it."""

    name: str
    """How the world differs from the others."""
    world: str
    agent: str
    evaluation: str
    nats: float
    """Validation loss of the world, in nats a transition."""
    pearson: float | None
    """Correlation of its policy values with reality's; None where no policies were compared."""
    regret: float | None
    passes: bool | None
    """True if it passes the gate of `train-agent`. None if no policies were compared."""
    imagined: float
    """Mean return of the agent in the world."""
    real: float
    """Mean return of the agent in reality."""
    gain: Mapping[str, Any]
    """`evaluate.gain.Gain.to_json`."""

    @classmethod
    def read(cls, name: str, evaluation: Artifact) -> TransferPoint:
        """The point of an evaluation with `gain`."""
        summary = json.loads((evaluation.path / report.SUMMARY).read_text())
        agent = (summary.get("suite") or summary)["agent"]  # a text world's summary is flat
        figures, inputs = evaluation.meta["figures"], evaluation.meta["inputs"]
        return cls(
            name=name,
            world=f"worlds/{inputs['worlds'][0]}",
            agent=f"agents/{inputs['agents'][0]}",
            evaluation=evaluation.name,
            nats=figures["valid/total"],
            pearson=figures.get(RANKED),
            regret=figures.get("policy_value/regret"),
            passes=gate.ranks(figures) if RANKED in figures else None,
            imagined=agent["world"],
            real=agent["real"],
            gain=agent["gain"],
        )

    def row(self) -> dict[str, Any]:
        """A row of table.csv."""
        values = {k: v for k, v in asdict(self).items() if k != "gain"}
        for where in ("world", "real"):
            side = self.gain[where]
            low, high = side["interval"] or (None, None)
            values |= {f"gain_{where}": side["mean"], f"gain_{where}_low": low}
            values |= {f"gain_{where}_high": high, f"start_{where}": side["start"]}
        return values | {"pairs": self.gain["real"]["pairs"]}


def summarise(
    title: str,
    environment: str,
    points: Sequence[TransferPoint],
    cost: Mapping[str, Any],
    seed: int,
) -> dict[str, Any]:
    """The summary of a study.

    Args:
        title: The page's title.
        environment: The name of reality.
        points: In the order of the config, from the poorest world to the best.
        cost: Of judging in reality: {"steps", "resets", "price", "currency"}.
        seed: Of the bootstrap over worlds.
    """
    imagined = [point.gain["world"]["mean"] for point in points]
    real = [point.gain["real"]["mean"] for point in points]
    ranked = ranking(real, imagined, seed=seed)
    names = ("pearson", "pearson_interval", "spearman", "regret", "error", "bias")
    statistics = {name: getattr(ranked, name) for name in names}
    summary = {
        "schema": 1,
        "title": title,
        "environment": environment,
        "points": [asdict(point) for point in points],
        "statistics": statistics,
        "cost": dict(cost),
    }
    return summary | {"findings": findings(points, statistics)}


def findings(points: Sequence[TransferPoint], statistics: Mapping[str, Any]) -> list[str]:
    """The main results, a sentence each."""
    r, interval = statistics["pearson"], statistics["pearson_interval"]
    lines = []
    if r is None:
        lines.append(
            f"Imagined and real gains of {len(points)} agents have no correlation: that takes 3"
            " worlds whose gains differ."
        )
    else:
        lines.append(
            f"Imagined and real gains of {len(points)} agents correlate with r ="
            f" {with_span(r, interval, share)}; choosing the agent by its imagined gain loses"
            f" {percent(statistics['regret'])} of the range of the real gains. On average the"
            f" imagined gain differs from the real one by {statistics['bias']:+.3g}."
        )
    flattered = [point.name for point in points if point.gain["unconfirmed"]]
    lines.append(
        f"{len(flattered)} of {len(points)} worlds show a gain that reality does not show"
        + (f": {', '.join(flattered)}." if flattered else ".")
    )
    gated = [point for point in points if point.passes is not None]
    if gated:
        passed = [point.name for point in gated if point.passes]
        refused = [point for point in gated if not point.passes]
        lines.append(
            f"The gate of train-agent (r >= {gate.RANKS:g}, regret@1 <= {gate.REGRET:.0%}, at least"
            f" {gate.POLICIES} policies) passes {', '.join(passed) or 'none'}, and refuses"
            f" {len(refused)}, of which {sum(p.gain['unconfirmed'] for p in refused)} show a gain"
            " that reality does not show."
        )
    return lines


def write(summary: Mapping[str, Any], points: Sequence[TransferPoint], folder: Path) -> None:
    """Write the summary, the page, the table and the plot."""
    (folder / report.SUMMARY).write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
    (folder / report.PAGE).write_text(render(summary), encoding="utf-8")
    (folder / PLOT).write_text(plot(summary))
    with open(folder / TABLE, "w", newline="") as file:
        rows = [point.row() for point in points]
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def render(summary: Mapping[str, Any]) -> str:
    """The whole page."""
    with matplotlib.rc_context(STYLE):
        drawing = svg(_figure(summary), "transfer", "Imagined against real gain")
    return PAGES.get_template("transfer.html").render(summary=summary, drawing=drawing)


def plot(summary: Mapping[str, Any]) -> str:
    """The plot alone, as an SVG file."""
    with matplotlib.rc_context(STYLE):
        return document(_figure(summary), "transfer")


def _figure(summary: Mapping[str, Any]) -> Figure:
    """Imagined against real gain, a point a world, darker with its place; hollow if refused."""
    points = summary["points"]
    figure, axes = canvas(7.2, 4.6)
    _diagonal(axes, [point["gain"] for point in points])
    for number, point in enumerate(points):
        place = round((len(ROUNDS) - 1) * number / max(len(points) - 1, 1))
        colour, (real, world) = ROUNDS[place], (point["gain"][k] for k in ("real", "world"))
        style: Any = {"color": colour, "alpha": 0.6, "linewidth": 1.6}
        if real["interval"] is not None:
            axes.plot(real["interval"], [world["mean"]] * 2, **style)
        if world["interval"] is not None:
            axes.plot([real["mean"]] * 2, world["interval"], **style)
        face = "white" if point["passes"] is False else colour
        marker: Any = {"marker": "o", "linestyle": "none", "markersize": 7, "zorder": 3}
        marker |= {"markerfacecolor": face, "markeredgecolor": colour, "markeredgewidth": 1.8}
        axes.plot(real["mean"], world["mean"], label=point["name"], **marker)
    axes.set(xlabel="gain in reality", ylabel="gain in the world")
    legend(axes, columns=3)
    return figure


def _diagonal(axes: Axes, gains: Sequence[Mapping[str, Any]]) -> None:
    """The dashed line of gains that are equal in both, and the axes of no gain."""
    ends = [
        value
        for gain in gains
        for side in (gain["real"], gain["world"])
        for value in (side["mean"], *(side["interval"] or ()), 0.0)
    ]
    pad = 0.05 * (max(ends) - min(ends) or 1.0)
    line = [min(ends) - pad, max(ends) + pad]
    axes.plot(line, line, color=REAL, linewidth=1.2, linestyle=DASHED, zorder=1)
    for draw in (axes.axhline, axes.axvline):
        draw(0, color=INK, linewidth=0.7, alpha=0.4, zorder=0)
