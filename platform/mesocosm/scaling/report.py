"""A law for people: tables for the terminal, and an SVG of its fit and its optimum."""

from __future__ import annotations

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
from mesocosm.scaling.forms import Mask
from mesocosm.scaling.law import IsoFlop, Law, Pair, interval_text
from mesocosm.scaling.table import CellTable

LINE, HELD, CROSS = "#1457c2", "#c2570c", "#be185d"
DOTS: Any = {"s": 26, "linewidths": 0, "zorder": 3}


def renderables(law: Law) -> list[Any]:
    """Rich tables and lines: parameters with intervals, the optimum, held-out errors, warnings."""
    title = f"{law.form}: {law.n_cells} cells, resampled by {law.bootstrap.by}"
    if law.provenance.tokenizer is not None:
        title += f", loss in {law.unit}"
    rows = _table(title, "value", f"{law.interval_level:.0%} interval")
    for name, value in law.params.items():
        rows.add_row(name, f"{value:.4g}", interval_text(law.interval[name]))
    rows.add_section()

    def add_power(label: str, level: float, power: float, exponent: str, pair: Pair) -> None:
        rows.add_row(label, f"{level:.3g} C^{power:.3f}", f"{exponent} {interval_text(pair)}")

    add_power("N_opt", law.optimal.kN, law.optimal.a, "a", law.interval["a"])
    add_power("D_opt", law.optimal.kD, law.optimal.b, "b", law.interval["b"])
    if (second := law.isoflop) is not None:
        count = sum(budget.refused is None for budget in second.budgets)
        budgets = "budgets" if second.source == "budgets" else "interpolated budgets"
        add_power(f"N_opt, {count} {budgets}", second.kN, second.a, "a", second.interval["a"])
    out: list[Any] = [rows]
    if (held := law.held_out) is not None:
        factor = held.min_flops / held.max_fitted_flops
        title = f"{held.n_cells} held-out cells, {factor:.3g} times the compute of the"
        title += f" {held.n_fitted} fitted for this test"
        rows = _table(title, "mean relative error", "largest", "of span")
        for name, errors in {
            "the law": held,
            "a power law without E": held.baselines["power_law"],
            "the last size's constant": held.baselines["last_size"],
        }.items():
            relative = f"{errors.mean_rel_error:.2%}", f"{errors.max_rel_error:.2%}"
            rows.add_row(name, *relative, f"{errors.mean_error_of_span:.1%}")
        out.append(rows)
    return out + [f"[bold]{note.code}[/]  {escape(note.sentence)}" for note in law.warnings]


def _table(title: str, *columns: str) -> Rows:
    rows = Rows("", title=title, title_justify="left")
    for name in columns:
        rows.add_column(name, justify="right")
    return rows


def draw(law: Law, table: CellTable) -> str:
    """Draw the law as SVG: predicted against measured loss, contours of equal loss over data and
    size with the optimum, and IsoFLOP curves (residuals where there are none).
    """
    used = ~np.isin(table.line, [row.line for row in law.dropped])
    norm = LogNorm(table.flops.min(), table.flops.max() * (1 + 1e-9))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13.5, 4.3), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        dots = _fit(left, law, table, used, norm)
        _plane(middle, law, table, norm)
        if law.isoflop is not None:
            _curves(right, law.isoflop, table.take(used & table.fresh))
        else:
            _residuals(right, law, table, used, norm)
        bar = figure.colorbar(dots, ax=right, pad=0.02)
        bar.set_label("FLOPs")
        bar.outline.set_visible(False)
        return document(figure, "law")


def _log_ticks(axes: Axes, subs: tuple[float, ...], formatter: Any) -> None:
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(base=10, subs=subs))
        axis.set_major_formatter(formatter)
        axis.set_minor_formatter(NullFormatter())


def _fit(axes: Axes, law: Law, table: CellTable, used: Mask, norm: LogNorm) -> Any:
    predicted, measured = law.predict(table.params, table.data, table.unique), table.loss
    dots = axes.scatter(measured[used], predicted[used], c=table.flops[used], norm=norm, **DOTS)
    if law.held_out is not None:
        held = used & (table.flops >= law.held_out.min_flops)
        ring: Any = {"facecolors": "none", "edgecolors": HELD, "linewidths": 1.3, "zorder": 4}
        axes.scatter(measured[held], predicted[held], s=80, label="the largest cells", **ring)
    if not used.all():
        cross: Any = {"marker": "x", "color": CROSS, "s": 40, "zorder": 4}
        axes.scatter(measured[~used], predicted[~used], label="dropped", **cross)
    ends = [edge(np.concatenate([measured, predicted])) for edge in (np.min, np.max)]
    axes.plot(ends, ends, color=MUTED, linewidth=1, zorder=2)
    _log_ticks(axes, (1, 1.5, 2, 3, 4, 5, 7), FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set(xlabel="measured loss", ylabel="predicted")
    axes.set_title(f"{law.form}: E = {law.params['E']:.3g}, {law.n_cells} cells")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left")
    return dots


def _plane(axes: Axes, law: Law, table: CellTable, norm: LogNorm) -> None:
    d, n = (np.geomspace(x.min() / 1.6, x.max() * 1.6, 120) for x in (table.data, table.params))
    loss = law.predict(n[:, None], d[None, :])
    levels = np.unique(np.geomspace(loss.min(), loss.max(), 11)[1:-1])
    if len(levels) == 9:  # a law may predict one loss everywhere
        lines = axes.contour(d, n, loss, levels=levels, colors=MUTED, linewidths=0.9, alpha=0.8)
        axes.clabel(lines, fmt=lambda value: f"{value:.4g}", fontsize=8.5)
    axes.scatter(table.data, table.params, c=table.flops, norm=norm, **DOTS | {"s": 22})
    n_opt, d_opt = law.optimum(np.geomspace(table.flops.min() / 10, table.flops.max() * 10, 60))
    axes.plot(d_opt, n_opt, color=LINE, linewidth=2)
    _log_ticks(axes, (1, 2, 5), EngFormatter(sep=""))
    axes.set(xlim=(d[0], d[-1]), ylim=(n[0], n[-1]), xlabel="data D", ylabel="params N")
    axes.set_title(f"equal loss; blue, the optimum: N ~ C^{law.optimal.a:.2f}")


def _curves(axes: Axes, second: IsoFlop, table: CellTable) -> None:
    if second.source == "budgets":
        every = isoflop.budgets(table, table.group)
    else:
        every, _ = isoflop.interpolated(table)
    colours = matplotlib.colormaps["viridis"]
    for i, points in enumerate(every):
        colour = colours(i / max(len(every) - 1, 1) * 0.92)
        axes.scatter(np.exp(points.log_n), points.loss, color=colour, **DOTS | {"s": 16})
        c0, c1, c2 = points.parabola()
        x = np.linspace(points.log_n.min(), points.log_n.max(), 80)
        y = c0 + c1 * x + c2 * x * x
        near = y <= points.loss.max() * 1.02
        axes.plot(np.exp(x[near]), y[near], color=colour, linewidth=1.2)
        if c2 > 0 and x[0] <= -c1 / (2 * c2) <= x[-1]:
            least = np.exp(-c1 / (2 * c2)), c0 - c1 * c1 / (4 * c2)
            axes.scatter(*least, marker="D", s=34, color=HELD, zorder=4)
    axes.set(xscale="log", xlabel="params N", ylabel="loss")
    axes.set_title(f"IsoFLOP ({second.source}): N ~ C^{second.a:.2f}")


def _residuals(axes: Axes, law: Law, table: CellTable, used: Mask, norm: LogNorm) -> None:
    residual = 100 * (table.loss / law.predict(table.params, table.data, table.unique) - 1)
    axes.axhline(0, color=MUTED, linewidth=1)
    axes.scatter(table.flops[used], residual[used], c=table.flops[used], norm=norm, **DOTS)
    axes.scatter(table.flops[~used], residual[~used], marker="x", color=CROSS, s=40, zorder=4)
    axes.set(xscale="log", xlabel="FLOPs", ylabel="measured above predicted, %", title="residuals")
    axes.title.set_color(INK)
