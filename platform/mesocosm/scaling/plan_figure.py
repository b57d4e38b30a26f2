"""A plan as a picture: iso-loss contours with the budget through them, and what the loss would be
at other splits of the budget. SVG.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mesocosm.scaling.law import Law
from mesocosm.scaling.optimum import Problem

RED, BLUE, GREY = "#d1495b", "#30638e", "#7a8b99"
ROOM = 4.0
"""Factor of N and D around what is to be seen."""


def figure(law: Law, problem: Problem, answer: dict[str, Any]) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    from mesocosm.plotting import STYLE, document

    with matplotlib.rc_context(STYLE):
        made = Figure(figsize=(11, 4.4), layout="constrained")
        left, right = made.subplots(1, 2)
        _contours(left, law, problem, answer)
        if answer["shares"] is not None:
            _shares(right, answer)
        else:
            _sizes(right, law, problem, answer)
        return document(made, "plan")


def _contours(axis: Any, law: Law, problem: Problem, answer: dict[str, Any]) -> None:
    best, plan = answer["optimum"], answer["plan"]
    n_range, d_range = law.range["params"], law.range["data"]
    n = np.geomspace(
        min(n_range[0], best["params"]) / ROOM, max(n_range[1], best["params"]) * ROOM, 120
    )
    d = np.geomspace(
        min(d_range[0], best["data"]) / ROOM, max(d_range[1], best["data"]) * ROOM, 120
    )
    grid_n, grid_d = np.meshgrid(n, d, indexing="ij")
    repeats = law.form == "data_constrained"
    loss = law.predict(grid_n, grid_d, np.minimum(grid_d, best["unique"]) if repeats else None)
    lines = axis.contour(grid_n, grid_d, loss, levels=_levels(loss), colors=GREY, linewidths=0.8)
    axis.clabel(lines, fontsize=7, fmt="%.4g")
    axis.add_patch(_box(n_range, d_range))
    axis.plot([], [], color="black", linewidth=0.8, linestyle="--", label="fitted range")
    spent = best["flops"]
    afford = (spent / np.exp(law.flops.log_each(np.log(n)))) ** (1 / law.flops.q)
    axis.plot(n, afford, color=BLUE, linewidth=1.2, label=f"{spent:.3g} FLOPs")
    axis.plot(best["params"], best["data"], "o", color=RED, markersize=6, label="optimum")
    axis.plot(
        plan["params"],
        plan["data"],
        "D",
        color=RED,
        markerfacecolor="none",
        markersize=7,
        label=f"plan: {plan['size']}",
    )
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="parameters N",
        ylabel="transitions seen D",
        xlim=(n[0], n[-1]),
        ylim=(d[0], d[-1]),
    )
    axis.set_title(f"loss in nats{', U = ' + format(best['unique'], '.3g') if repeats else ''}")
    axis.legend(fontsize=8, loc="upper right", frameon=True, framealpha=0.9, edgecolor="none")


def _levels(loss: Any) -> Any:
    """Levels that crowd where the loss is low, as the contours themselves do."""
    return np.unique(np.quantile(loss, np.linspace(0.03, 0.9, 12)))


def _box(n_range: tuple[float, float], d_range: tuple[float, float]) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(
        (n_range[0], d_range[0]),
        n_range[1] - n_range[0],
        d_range[1] - d_range[0],
        fill=False,
        linestyle="--",
        linewidth=0.8,
    )


def _shares(axis: Any, answer: dict[str, Any]) -> None:
    best, coin = answer["optimum"], answer["budget"]["currency"]
    rows = answer["shares"]
    axis.plot(
        [row["share"] for row in rows], [row["loss"] for row in rows], color=BLUE, linewidth=1.4
    )
    if best["share"] > 0:
        axis.plot(best["share"], best["loss"], "o", color=RED)
        low, high = answer["next"]["share_interval"]
        axis.axvspan(
            max(low, 1e-9),
            high,
            color=RED,
            alpha=0.12,
            linewidth=0,
            label=f"optimum's interval, {low:.1%} to {high:.1%}",
        )
        axis.legend(fontsize=8)
    axis.set(
        xscale="logit",
        xlabel=(
            f"share of {answer['budget']['money']:g} {coin} for real transitions, the rest for"
            " compute"
        ),
        ylabel="predicted loss, nats",
    )
    axis.set_title("compute or reality?")


def _sizes(axis: Any, law: Law, problem: Problem, answer: dict[str, Any]) -> None:
    best = answer["optimum"]
    n = np.geomspace(best["params"] / 30, best["params"] * 30, 80)
    data, unique = problem.buy(np.log(n), np.zeros_like(n))
    there = unique >= 1
    n, data, unique = n[there], data[there], unique[there]
    low, high = law.predict_interval(n, data, unique)
    axis.fill_between(
        n,
        low,
        high,
        color=BLUE,
        alpha=0.15,
        linewidth=0,
        label=f"{law.interval_level:.0%} interval of the law",
    )
    axis.plot(n, law.predict(n, data, unique), color=BLUE, linewidth=1.4)
    axis.plot(best["params"], best["loss"], "o", color=RED)
    axis.plot(
        answer["plan"]["params"], answer["plan"]["loss"], "D", color=RED, markerfacecolor="none"
    )
    axis.set(xscale="log", xlabel="parameters N", ylabel="predicted loss, nats a transition")
    axis.set_title(
        f"{answer['budget']['flops']:.3g} FLOPs, spent on larger models or longer training"
    )
    axis.legend(fontsize=8)
