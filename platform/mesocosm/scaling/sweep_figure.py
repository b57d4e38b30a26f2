"""The losses of a sweep as SVG."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from mesocosm.plotting import STYLE, document
from mesocosm.scaling.cells import CellRecord
from mesocosm.scaling.forms import loss_unit
from mesocosm.scaling.progress_table import short


def figure(records: Iterable[CellRecord]) -> str:
    """Draw loss against transitions, a line for each size and U, as the mean over seeds."""
    trunks: dict[tuple[int, str, int, int], list[CellRecord]] = defaultdict(list)
    for record in sorted(records, key=lambda record: record.steps):
        trunks[record.params, record.size, record.unique, record.seed].append(record)
    # Points are matched by their place: a seed's D may be a step more or less.
    lines: dict[tuple[int, str, int], dict[int, list[CellRecord]]] = {}
    for (params, size, unique, _), trunk in trunks.items():
        points = lines.setdefault((params, size, unique), {})
        for place, record in enumerate(trunk):
            points.setdefault(place, []).append(record)
    several = len({unique for _, _, unique in lines}) > 1
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.add_subplot()
        colours = matplotlib.colormaps["viridis"].resampled(len(lines) + 1)
        for i, ((_, size, unique), by_place) in enumerate(sorted(lines.items())):
            means = [
                (np.mean([r.data for r in group]), np.mean([r.loss for r in group]))
                for group in by_place.values()
            ]
            label = f"{size}, U={short(unique)}" if several else size
            style: Any = {"marker": "o", "markersize": 4, "color": colours(i)}
            axes.plot(*zip(*sorted(means), strict=True), **style, label=label)
        axes.set(xscale="log", xlabel="transitions seen")
        first = next(iter(trunks.values()))[0]
        unit = loss_unit(first.family) if first.family == "language" else "nats a transition"
        axes.set_ylabel(f"{unit}, validation, mean of seeds")
        if first.tokenizer is not None:
            axes.set_title(f"given tokenizers/{first.tokenizer}")
        axes.legend()
        return document(figure, "sweep")
