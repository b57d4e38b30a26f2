"""Plot style, colours and SVG text, shared by the reports. Uses matplotlib without a display."""

from __future__ import annotations

import html
import io
import logging
import re
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, GRID = "#1c2430", "#667085", "#e6e9ee"
REAL = "#b4bcc8"
WORLD = ("#1457c2", "#4a86e0", "#88b1ee")
FREE = ("#c2570c", "#8a6d1f", "#8b3fa8", "#4d7c0f", "#be185d", "#57534e")
ROUNDS = ("#b9cdf0", "#8fb0e6", "#6694da", "#3d77cd", "#1457c2", "#0f4191", "#0a2b61")
PARTS = ("#1457c2", "#0f766e", "#c2570c", "#8b3fa8", "#be185d", "#4d7c0f", "#57534e")
DASHED = (0, (4, 3))
"""A line style."""

STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.edgecolor": "#c3c9d2",
    "axes.labelcolor": MUTED,
    "axes.titlesize": 10.5,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def short(value: float) -> str:
    """1500 -> 1.5k, 2000000 -> 2M."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of one plot. Sizes are in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def legend(axes: Axes, columns: int = 4) -> None:
    """A legend above the plot, if it has anything to name."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            handles,
            labels,
            loc="lower left",
            bbox_to_anchor=(-0.01, 1.0),
            ncols=min(len(handles), columns),
            handlelength=1.6,
            columnspacing=1.8,
            borderaxespad=0.2,
        )


def document(figure: Figure, name: str) -> str:
    """The figure as the text of an SVG file, with deterministic bytes."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an inline <svg>: scalable, ids unique in the page, deterministic bytes."""
    buffer = io.StringIO()
    fonts = logging.getLogger("matplotlib.font_manager")
    level = fonts.level
    fonts.setLevel(logging.ERROR)  # else a warning for each font that the machine lacks
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    try:
        with matplotlib.rc_context({"svg.hashsalt": name}):
            figure.savefig(buffer, format="svg", metadata=metadata, transparent=True)
    finally:
        fonts.setLevel(level)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    head = f'<svg class="plot" {spaces} role="img" aria-label="{html.escape(title)}"'
    return re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', rf'{head} viewBox="\1">', text, count=1)
