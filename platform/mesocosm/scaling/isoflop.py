"""The second approach, which assumes no form of the law: parabolas of loss in log N at fixed FLOPs,
and a power law through their minima (Hoffmann et al. 2022, approach 2).

Where the table holds no budgets (a grid of N x D), each size's losses are interpolated in log C to
common budgets, as Porian et al. do along loss curves (arXiv 2406.19146). Nothing is extrapolated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.interpolate import PchipInterpolator

from mesocosm.errors import UsageError
from mesocosm.scaling.forms import Array, Ints, Mask
from mesocosm.scaling.law import Budget, IsoFlop, Optimal, Pair, interval_text, quantiles
from mesocosm.scaling.table import CellTable, Notes

TOLERANCE = 0.1
"""Cells whose FLOPs differ by at most a tenth share a budget."""
SIZES = 4
"""Fewest distinct sizes for a parabola. Any three points are on a parabola."""
NEAREST = 7
"""A parabola is fitted to this many sizes, nearest to the best one, because losses are a parabola
only near their minimum.
"""
BUDGETS = 8
"""Interpolated budgets."""
WIDE = 0.2
"""A wider interval of an exponent is a warning."""


@dataclass(frozen=True)
class Points:
    """Losses at one budget, each [n]. Points with one `group` are resampled together."""

    flops: float
    log_n: Array
    log_d: Array
    loss: Array
    weight: Array
    group: Ints

    def parabola(self) -> tuple[float, float, float]:
        """(c0, c1, c2) of loss = c0 + c1 x + c2 x^2 in x = log N of the sizes near the best one."""
        near = self._near()
        weight = np.sqrt(self.weight[near])
        c2, c1, c0 = np.polyfit(self.log_n[near], self.loss[near], 2, w=weight)
        return float(c0), float(c1), float(c2)

    def minimum(self) -> tuple[float | None, str]:
        """log N of the minimum, or None and the reason."""
        _, c1, c2 = self.parabola()
        low, high = self.log_n.min(), self.log_n.max()
        sizes, index = np.unique(self.log_n.round(9), return_inverse=True)
        at = f"at {self.flops:.3g} FLOPs"
        trained = f"the trained params {np.exp(low):.3g} to {np.exp(high):.3g}"
        if c2 <= 0:
            return None, f"{at} the losses of {len(sizes)} sizes are concave and have a maximum"
        least = -c1 / (2 * c2)
        if not low <= least <= high:
            value = f"params={np.exp(min(least, 700.0)):.3g}"
            return None, f"{at} the minimum would be at {value}, outside {trained}"
        means = np.bincount(index, self.weight * self.loss) / np.bincount(index, self.weight)
        if means.argmin() in (0, len(sizes) - 1):  # no data show that the loss rises beyond
            return None, f"{at} the loss is least at an end of {trained}"
        return least, ""

    def data_at(self, log_n: ArrayLike) -> Array:
        """log D at log N, interpolated between the trained sizes."""
        sizes, first = np.unique(self.log_n, return_index=True)
        at = np.asarray(log_n, dtype=np.float64)
        return np.where(np.isfinite(at), np.interp(at, sizes, self.log_d[first]), np.nan)

    def resampled(self, counts: Array) -> Array:
        """log N of the minimum in each resample [B]; nan where none is within the sizes."""
        near = self._near()
        x, centre = self.log_n[near], self.log_n[near].mean()
        powers = np.stack([(x - centre) ** k for k in range(5)], 1)
        weight = counts[:, self.group[near]] * self.weight[near]
        sums, right = weight @ powers, weight @ (powers[:, :3] * self.loss[near, None])
        square = sums[:, [[0, 1, 2], [1, 2, 3], [2, 3, 4]]]
        drawn = np.stack([(weight[:, x == size] > 0).any(1) for size in np.unique(x)], 1)
        enough = drawn.sum(1) >= 3
        out = np.full(len(counts), np.nan)
        c = np.linalg.solve(square[enough], right[enough][:, :, None])[:, :, 0]
        with np.errstate(all="ignore"):
            least = np.where(c[:, 2] > 0, centre - c[:, 1] / (2 * c[:, 2]), np.nan)
        inside = (least >= self.log_n.min()) & (least <= self.log_n.max())
        out[enough] = np.where(inside, least, np.nan)
        return out

    def _near(self) -> Mask:
        sizes, best = np.unique(self.log_n), self.log_n[np.argmin(self.loss)]
        nearest = np.argsort(np.abs(sizes - best), kind="stable")[:NEAREST]
        return np.isin(self.log_n, sizes[nearest])


def approach(table: CellTable, counts: Array, groups: Ints) -> tuple[IsoFlop | None, Notes]:
    """Estimate the optimum by parabolas.

    Args:
        table: the cells. Rows that repeat data are not used.
        counts: [B, G], how often each resample drew each group.
        groups: [n], each row's group.

    Returns:
        The estimate, None where the table shows none, and warnings.

    Raises:
        UsageError: the table is a design of budgets, none of which has an optimum.
    """
    rows, groups = table.take(table.fresh), groups[table.fresh]
    every = budgets(rows, groups)
    if len(every) >= 2:
        notes: Notes = {}
        estimate, entries = _through(every, counts, "budgets")
        reasons = [entry.refused for entry in entries if entry.refused]
        designed = _is_design(rows, every)
        if len(reasons) == len(entries) and designed:
            text = f"{table.name}: none of its {len(entries)} IsoFLOP budgets has an optimum"
            fix = "train sizes on both sides of each minimum"
            raise UsageError(f"{text}: {'; '.join(reasons)}; {fix}")
        if reasons:
            notes["isoflop_refused"] = f"{'; '.join(reasons)}."
        if estimate is None and designed:
            notes["no_isoflop"] = "Fewer than two budgets have a minimum within their sizes."
        if estimate is not None or designed:
            return estimate, notes
    usable, without = interpolated(rows)
    series = np.unique(rows.series)
    by_series = np.zeros((len(counts), int(series.max(initial=-1)) + 1))
    for number in series:  # a series is drawn with its trunk, or as the mean of its cells
        by_series[:, number] = counts[:, groups[rows.series == number]].mean(1)
    estimate, _ = _through(usable, by_series, "interpolated")
    if estimate is None:
        text = "Fewer than two compute budgets have a minimum within the sizes trained for them"
        return None, {"no_isoflop": f"{text}: no parabolas check the law."}
    if not without:
        return estimate, {}
    text = f"{without} of {without + len(usable)} IsoFLOP budgets between the grid's cells have no"
    return estimate, {"isoflop_refused": f"{text} minimum within the sizes trained for them."}


def agreement(form: Optimal, interval: dict[str, Pair], second: IsoFlop | None) -> Notes:
    """Warnings about the exponents of N_opt (a) and D_opt (b).

    Args:
        form: the optimum by the form of the law.
        interval: its intervals, by name.
        second: the optimum by the parabolas, None where there is none.

    Returns:
        `approaches_disagree` where either estimate lies outside the other's interval, and
        `wide_interval` where an interval is wider than `WIDE`.
    """
    wide, apart = [], []
    for name in ("a", "b"):
        estimates = [(getattr(form, name), interval[name], "the form")]
        if second is not None:
            estimates.append((getattr(second, name), second.interval[name], "IsoFLOP parabolas"))
        texts = [f"{name}={x:.3f} ({interval_text(pair)}) by {by}" for x, pair, by in estimates]
        widths = [pair[1] - pair[0] for _, pair, _ in estimates]
        wide += [text for text, width in zip(texts, widths, strict=True) if width > WIDE]
        (x, inside, _), (y, around, _) = estimates[0], estimates[-1]
        if not (around[0] <= x <= around[1] and inside[0] <= y <= inside[1]):
            apart.append(", ".join(texts))
    notes: Notes = {}
    if apart and second is not None:
        text = f"The two approaches disagree: {'; '.join(apart)}. An estimate is outside the"
        notes["approaches_disagree"] = f"{text} other's interval: the optimum is uncertain."
    if wide:
        text = f"Intervals are wider than {WIDE:g}: {'; '.join(wide)}. Train more sizes or a wider"
        notes["wide_interval"] = f"{text} range of compute to narrow them."
    return notes


def budgets(table: CellTable, groups: Ints) -> list[Points]:
    """The table's budgets of at least `SIZES` sizes, ascending."""
    order = np.argsort(table.flops, kind="stable")
    log_c = np.log(table.flops[order])
    every, begin = [], 0
    for end in range(1, len(order) + 1):
        if end < len(order) and log_c[end] - log_c[begin] <= math.log1p(TOLERANCE):
            continue
        at = order[begin:end]
        if len(np.unique(table.params[at])) >= SIZES:
            flops, rows = float(np.exp(log_c[begin:end].mean())), table.take(at)
            log_n, log_d = np.log(rows.params), np.log(rows.data)
            every.append(Points(flops, log_n, log_d, rows.loss, rows.weight, groups[at]))
        begin = end
    return every


def interpolated(table: CellTable) -> tuple[list[Points], int]:
    """Interpolate budgets between the cells of each size. A series is resampled as one.

    Returns:
        At most `BUDGETS` budgets with a minimum, evenly spaced in log C among those that at least
        `SIZES` sizes reach, and how many have none at that spacing.
    """
    curves: list[tuple[Ints, Array]] = []
    for number in np.unique(table.series):
        at = np.flatnonzero(table.series == number)
        at = at[np.argsort(table.flops[at], kind="stable")]
        log_c = np.log(table.flops[at])
        if len(at) >= 2 and (np.diff(log_c) > 1e-9).all():
            curves.append((at, log_c))
    if not curves:
        return [], 0
    low, high = min(xs[0] for _, xs in curves), max(xs[-1] for _, xs in curves)
    fine = [_points(table, curves, log_c) for log_c in np.linspace(low, high, 8 * BUDGETS)]
    reached = [points for points in fine if points is not None]
    usable = [points for points in reached if points.minimum()[0] is not None]
    if not usable:
        return [], 0
    spaced = np.linspace(0, len(usable) - 1, min(BUDGETS, len(usable)))
    chosen = sorted({round(i) for i in spaced})
    without = round((len(reached) - len(usable)) * len(chosen) / len(usable))
    return [usable[i] for i in chosen], without


def _points(table: CellTable, curves: list[tuple[Ints, Array]], log_c: float) -> Points | None:
    """Each curve's values at log C. None where fewer than `SIZES` sizes reach it."""
    inside = [(at, xs) for at, xs in curves if xs[0] - 1e-9 <= log_c <= xs[-1] + 1e-9]
    if len({float(table.params[at[0]]) for at, _ in inside}) < SIZES:
        return None

    def along(x: Array, y: Array) -> float:
        within = min(max(log_c, float(x[0])), float(x[-1]))
        return float(PchipInterpolator(x, y)(within) if len(x) > 2 else np.interp(within, x, y))

    return Points(
        math.exp(log_c),
        np.array([np.log(table.params[at[0]]) for at, _ in inside]),
        np.array([along(xs, np.log(table.data[at])) for at, xs in inside]),
        np.array([math.exp(along(xs, np.log(table.loss[at]))) for at, xs in inside]),
        np.array([table.weight[at].mean() for at, _ in inside]),
        np.array([table.series[at[0]] for at, _ in inside]),
    )


def _through(
    every: list[Points], counts: Array, source: Literal["budgets", "interpolated"]
) -> tuple[IsoFlop | None, list[Budget]]:
    """The power laws through the minima, None where the resamples define none, and each budget."""
    entries, used = [], []
    for points in every:
        least, reason = points.minimum()
        entry = Budget(flops=points.flops, n_sizes=len(np.unique(points.log_n)))
        if least is None:
            entry.refused = reason
        else:
            used.append((points, least))
            entry.N_opt, entry.D_opt = math.exp(least), float(np.exp(points.data_at(least)))
        entries.append(entry)
    if len(used) < 2:
        return None, entries
    log_c = np.log([points.flops for points, _ in used])
    # The first column is the estimate, the others are the resamples.
    n = [np.append(least, points.resampled(counts)) for points, least in used]
    d = [points.data_at(log_n) for (points, _), log_n in zip(used, n, strict=True)]
    lines = *power_law(log_c, np.stack(n, 1)), *power_law(log_c, np.stack(d, 1))
    values: dict[str, float] = {}
    interval: dict[str, Pair] = {}
    for name, (value, *draws) in zip(("a", "kN", "b", "kD"), lines, strict=True):
        if np.isfinite(draws).sum() * 2 <= len(draws):
            return None, entries
        values[name], interval[name] = float(value), quantiles(draws)
    return IsoFlop(source=source, interval=interval, budgets=entries, **values), entries


def power_law(x: Array, y: Array) -> tuple[Array, Array]:
    """Regress logarithms: (slope, exp(level)) [B] of the lines through (x [k], y [B, k]).

    nan in y is left out. A line through fewer than two points is nan.
    """
    finite = np.isfinite(y)
    count = finite.sum(1)
    filled = np.where(finite, y, 0.0)
    with np.errstate(all="ignore"):
        mean_x, mean_y = (finite * x).sum(1) / count, filled.sum(1) / count
        dx = np.where(finite, x - mean_x[:, None], 0.0)
        slope = np.where(count >= 2, (dx * filled).sum(1) / (dx**2).sum(1), np.nan)
        return slope, np.exp(np.clip(mean_y - slope * mean_x, -700, 700))


def _is_design(table: CellTable, every: list[Points]) -> bool:
    """True if the table is a design of budgets, and not a grid with diagonals of equal compute."""
    within = sum(len(points.loss) for points in every) >= 0.8 * len(table)
    cells = len(np.unique(np.stack([table.params, table.data], 1), axis=0))
    return within and cells < 0.6 * len(np.unique(table.params)) * len(np.unique(table.data))
