"""A plan as SVG: contours of equal loss with the budget, and the loss at other splits of it."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mesocosm.plotting import STYLE, document
from mesocosm.scaling.law import Law
from mesocosm.scaling.optimum import PlanProblem

RED, BLUE, GREY = "#d1495b", "#30638e", "#7a8b99"
HOLLOW: Any = {"marker": "D", "color": RED, "markerfacecolor": "none", "linestyle": "none"}
MARGIN = 4.0
"""Factor of N and D around the fitted range and the optimum."""


def figure(law: Law, problem: PlanProblem, answer: dict[str, Any]) -> str:
    """Draw the contents of plan.json."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        _contours(left, law, answer)
        if answer["shares"] is not None:
            _shares(right, answer)
        else:
            _sizes(right, law, problem, answer)
        return document(figure, "plan")


def _contours(axis: Any, law: Law, answer: dict[str, Any]) -> None:
    best, plan = answer["optimum"], answer["plan"]
    n_range, d_range = law.range["params"], law.range["data"]
    n, d = (
        np.geomspace(min(low, x) / MARGIN, max(high, x) * MARGIN, 120)
        for (low, high), x in ((n_range, best["params"]), (d_range, best["data"]))
    )
    grid_n, grid_d = np.meshgrid(n, d, indexing="ij")
    unique, title = None, f"loss in {law.unit}"
    if law.form == "data_constrained":
        unique, title = np.minimum(grid_d, best["unique"]), f"{title}, U = {best['unique']:.3g}"
    loss = law.predict(grid_n, grid_d, unique)
    levels = np.unique(np.quantile(loss, np.linspace(0.03, 0.9, 12)))
    lines = axis.contour(grid_n, grid_d, loss, levels=levels, colors=GREY, linewidths=0.8)
    axis.clabel(lines, fontsize=7, fmt="%.4g")
    dashed: Any = {"linewidth": 0.8, "linestyle": "--"}
    corner, width, height = (n_range[0], d_range[0]), np.ptp(n_range), np.ptp(d_range)
    axis.add_patch(Rectangle(corner, width, height, fill=False, **dashed))
    axis.plot([], [], color="black", label="fitted range", **dashed)
    flops = best["flops"]
    affordable = (flops / np.exp(law.flops.log_each(np.log(n)))) ** (1 / law.flops.q)
    axis.plot(n, affordable, color=BLUE, linewidth=1.2, label=f"{flops:.3g} FLOPs")
    axis.plot(best["params"], best["data"], "o", color=RED, markersize=6, label="optimum")
    label = f"plan: {plan['size']}"
    axis.plot(plan["params"], plan["data"], **HOLLOW, markersize=7, label=label)
    axis.set(xscale="log", yscale="log", xlim=(n[0], n[-1]), ylim=(d[0], d[-1]), title=title)
    axis.set(xlabel="parameters N", ylabel="transitions seen D")
    axis.legend(fontsize=8, loc="upper right", frameon=True, framealpha=0.9, edgecolor="none")


def _shares(axis: Any, answer: dict[str, Any]) -> None:
    best, budget, rows = answer["optimum"], answer["budget"], answer["shares"]
    shares, losses = ([row[key] for row in rows] for key in ("share", "loss"))
    axis.plot(shares, losses, color=BLUE, linewidth=1.4)
    if best["share"] > 0:
        axis.plot(best["share"], best["loss"], "o", color=RED)
        low, high = answer["next"]["share_interval"]
        label = f"optimum's interval, {low:.1%} to {high:.1%}"
        axis.axvspan(max(low, 1e-9), high, color=RED, alpha=0.12, linewidth=0, label=label)
        axis.legend(fontsize=8)
    money = f"{budget['money']:g} {budget['currency']}"
    xlabel = f"share of {money} for real transitions, the rest for compute"
    axis.set(xscale="logit", xlabel=xlabel, ylabel="predicted loss")
    axis.set_title("compute or reality?")


def _sizes(axis: Any, law: Law, problem: PlanProblem, answer: dict[str, Any]) -> None:
    best, plan = answer["optimum"], answer["plan"]
    n = np.geomspace(best["params"] / 30, best["params"] * 30, 80)
    data, unique = problem.buy(np.log(n), np.zeros_like(n))
    n, data, unique = (values[unique >= 1] for values in (n, data, unique))
    low, high = law.predict_interval(n, data, unique)
    label = f"{law.interval_level:.0%} interval of the law"
    axis.fill_between(n, low, high, color=BLUE, alpha=0.15, linewidth=0, label=label)
    axis.plot(n, law.predict(n, data, unique), color=BLUE, linewidth=1.4)
    axis.plot(best["params"], best["loss"], "o", color=RED)
    axis.plot(plan["params"], plan["loss"], **HOLLOW)
    axis.set(xscale="log", xlabel="parameters N", ylabel=f"predicted loss, {law.unit}")
    axis.set_title(f"{answer['budget']['flops']:.3g} FLOPs: larger models or longer training")
    axis.legend(fontsize=8)
