"""A law for people: tables for the terminal, and one SVG of how well it fits and where its optimum
lies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter
from rich.markup import escape
from rich.table import Table as Rows

from mesocosm.plotting import INK, MUTED, STYLE, document
from mesocosm.scaling import isoflop
from mesocosm.scaling.law import Law, span
from mesocosm.scaling.table import Table

LINE, HELD, CROSS = "#1457c2", "#c2570c", "#be185d"


def facts(values: Mapping[str, Any]) -> Rows:
    rows = Rows(box=None, show_header=False, pad_edge=False)
    for name, value in values.items():
        rows.add_row(name, escape(str(value)))
    return rows


def said(law: Law) -> list[Any]:
    """What the terminal shows: parameters with intervals, the optimum, the test on larger cells,
    warnings.
    """
    level = f"{law.interval_level:.0%} interval"
    rows = Rows(
        title=f"{law.form}: {law.n_cells} cells, resampled by {law.bootstrap.by}",
        title_justify="left",
    )
    for name in ("", "value", level):
        rows.add_column(name, justify="left" if not name else "right")
    for name, value in law.params.items():
        rows.add_row(name, f"{value:.4g}", span(law.interval[name]))
    rows.add_section()
    rows.add_row(
        "N_opt", f"{law.optimal.kN:.3g} C^{law.optimal.a:.3f}", f"a {span(law.interval['a'])}"
    )
    rows.add_row(
        "D_opt", f"{law.optimal.kD:.3g} C^{law.optimal.b:.3f}", f"b {span(law.interval['b'])}"
    )
    if law.isoflop is not None:
        source = (
            f"{sum(b.refused is None for b in law.isoflop.budgets)}"
            f" {'budgets' if law.isoflop.source == 'budgets' else 'interpolated budgets'}"
        )
        rows.add_row(
            f"N_opt, {source}",
            f"{law.isoflop.kN:.3g} C^{law.isoflop.a:.3f}",
            f"a {span(law.isoflop.interval['a'])}",
        )
    out: list[Any] = [rows]
    if law.held_out is not None:
        held = law.held_out
        above = (
            f"{held.min_flops / held.max_fitted_flops:.3g} times the compute of the {held.n_fitted}"
            " that were fitted for this"
        )
        test = Rows(title=f"{held.n_cells} held-out cells, {above}", title_justify="left")
        for name in ("", "mean relative error", "largest", "of span"):
            test.add_column(name, justify="left" if not name else "right")
        named = {
            "the law": held,
            "a power law without E": held.baselines["power_law"],
            "the last size's constant": held.baselines["last_size"],
        }
        for name, errors in named.items():
            test.add_row(
                name,
                f"{errors.mean_rel_error:.2%}",
                f"{errors.max_rel_error:.2%}",
                f"{errors.mean_error_of_span:.1%}",
            )
        out.append(test)
    return out + [f"[bold]{note.code}[/]  {escape(note.sentence)}" for note in law.warnings]


def draw(law: Law, table: Table) -> str:
    """Predicted against measured loss, iso-loss contours over data and size with the optimum's
    path, and IsoFLOP curves (else residuals).
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13.5, 4.3), layout="constrained")
        fit, plane, third = figure.subplots(1, 3)
        dots = _fit(fit, law, table)
        _plane(plane, law, table)
        if law.isoflop is not None:
            used = isoflop.fresh(table.take(_kept(law, table)))
            _curves(
                third,
                law,
                (
                    isoflop.budgets(used, used.group)
                    if law.isoflop.source == "budgets"
                    else isoflop.interpolated(used)[0]
                ),
            )
        else:
            _residuals(third, law, table)
        bar = figure.colorbar(dots, ax=third, pad=0.02)
        bar.set_label("FLOPs")
        bar.outline.set_visible(False)
        return document(figure, "law")


def _kept(law: Law, table: Table) -> Any:
    return ~np.isin(table.line, [row.line for row in law.dropped])


def _fit(axes: Axes, law: Law, table: Table) -> Any:
    predicted, kept = law.predict(table.params, table.data, table.unique), _kept(law, table)
    dots = axes.scatter(
        table.loss[kept],
        predicted[kept],
        c=table.flops[kept],
        norm=_norm(table),
        s=26,
        linewidths=0,
        zorder=3,
    )
    if law.held_out is not None:
        held = kept & (table.flops >= law.held_out.min_flops)
        axes.scatter(
            table.loss[held],
            predicted[held],
            s=80,
            facecolors="none",
            edgecolors=HELD,
            linewidths=1.3,
            zorder=4,
            label="the largest cells",
        )
    if not kept.all():
        axes.scatter(
            table.loss[~kept],
            predicted[~kept],
            marker="x",
            color=CROSS,
            s=40,
            zorder=4,
            label="dropped",
        )
    low, high = min(table.loss.min(), predicted.min()), max(table.loss.max(), predicted.max())
    axes.plot([low, high], [low, high], color=MUTED, linewidth=1, zorder=2)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="measured loss",
        ylabel="predicted",
        title=f"{law.form}: E = {law.params['E']:.3g}, {law.n_cells} cells",
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(base=10, subs=(1, 1.5, 2, 3, 4, 5, 7)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left")
    return dots


def _plane(axes: Axes, law: Law, table: Table) -> None:
    d, n = (
        np.geomspace(values.min() / 1.6, values.max() * 1.6, 120)
        for values in (table.data, table.params)
    )
    grid = law.predict(n[:, None], d[None, :])
    levels = np.unique(np.geomspace(grid.min(), grid.max(), 11)[1:-1])
    if len(levels) == 9:  # a law may foretell one loss for all
        lines = axes.contour(d, n, grid, levels=levels, colors=MUTED, linewidths=0.9, alpha=0.8)
        axes.clabel(lines, fmt=lambda value: f"{value:.4g}", fontsize=8.5)
    axes.scatter(
        table.data, table.params, c=table.flops, norm=_norm(table), s=22, linewidths=0, zorder=3
    )
    budget = np.geomspace(table.flops.min() / 10, table.flops.max() * 10, 60)
    n_opt, d_opt = law.optimum(budget)
    axes.plot(d_opt, n_opt, color=LINE, linewidth=2)
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(d[0], d[-1]),
        ylim=(n[0], n[-1]),
        xlabel="data D",
        ylabel="params N",
        title=f"equal loss; blue, the optimum: N ~ C^{law.optimal.a:.2f}",
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axis.set_major_formatter(EngFormatter(sep=""))
        axis.set_minor_formatter(NullFormatter())


def _curves(axes: Axes, law: Law, every: list[isoflop.Points]) -> None:
    colours = matplotlib.colormaps["viridis"]
    for i, points in enumerate(every):
        colour = colours(i / max(len(every) - 1, 1) * 0.92)
        axes.scatter(np.exp(points.log_n), points.loss, s=16, color=colour, linewidths=0, zorder=3)
        c0, c1, c2 = isoflop.parabola(points)
        x = np.linspace(points.log_n.min(), points.log_n.max(), 80)
        y = c0 + c1 * x + c2 * x * x
        near = y <= points.loss.max() * 1.02
        axes.plot(np.exp(x[near]), y[near], color=colour, linewidth=1.2)
        if c2 > 0 and x[0] <= -c1 / (2 * c2) <= x[-1]:
            axes.scatter(
                np.exp(-c1 / (2 * c2)),
                c0 - c1 * c1 / (4 * c2),
                marker="D",
                s=34,
                color=HELD,
                zorder=4,
            )
    assert law.isoflop is not None
    axes.set(
        xscale="log",
        xlabel="params N",
        ylabel="loss",
        title=f"IsoFLOP ({law.isoflop.source}): N ~ C^{law.isoflop.a:.2f}",
    )


def _residuals(axes: Axes, law: Law, table: Table) -> None:
    kept = _kept(law, table)
    residual = 100 * (table.loss / law.predict(table.params, table.data, table.unique) - 1)
    axes.axhline(0, color=MUTED, linewidth=1)
    axes.scatter(
        table.flops[kept],
        residual[kept],
        c=table.flops[kept],
        norm=_norm(table),
        s=26,
        linewidths=0,
        zorder=3,
    )
    axes.scatter(table.flops[~kept], residual[~kept], marker="x", color=CROSS, s=40, zorder=4)
    axes.set(xscale="log", xlabel="FLOPs", ylabel="measured above predicted, %", title="residuals")
    axes.title.set_color(INK)


def _norm(table: Table) -> LogNorm:
    return LogNorm(table.flops.min(), table.flops.max() * (1 + 1e-9))
