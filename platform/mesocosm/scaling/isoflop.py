"""The second approach, independent of any form of the law: parabolas in log N at fixed FLOPs, and a
power law through their minima.

Hoffmann et al. 2022, approach 2. A parabola that opens downward, or whose minimum lies outside the
sizes that were tried, says nothing of an optimum and is refused with a sentence. Where the table
holds no budgets of its own (a grid of N x D), each size's losses are interpolated in log C to
common ones, as Porian et al. do along loss curves (arXiv 2406.19146); nothing is extrapolated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import PchipInterpolator

from mesocosm.errors import UsageError
from mesocosm.scaling.forms import Array
from mesocosm.scaling.law import LEVEL, Budget, IsoFlop, Note, Optimal, Pair, span
from mesocosm.scaling.table import Table

TOLERANCE = 0.1
"""Cells within a tenth of each other in FLOPs are of one budget."""
SIZES = 4
"""Distinct sizes that a parabola needs: three are always on one."""
NEAREST = 7
"""Sizes, nearest to the best one tried, that a parabola is fitted to: losses are no parabola far
from their minimum.
"""
BUDGETS = 8
"""Interpolated budgets."""
WIDE = 0.2
"""An exponent whose interval is wider is poorly determined: over a factor 100 in compute the ends
of the interval are a factor 2.5 apart in N_opt."""


@dataclass(frozen=True)
class Points:
    """Losses at one budget, each [n]: `group` is what is resampled together."""

    flops: float
    log_n: Array
    log_d: Array
    loss: Array
    weight: Array
    group: NDArray[np.int64]


def exponent(flops: ArrayLike, n_opt: ArrayLike) -> tuple[float, float]:
    """(a, kN) of N_opt = kN C^a: plain regression of logarithms over pairs. Raises UsageError below
    two budgets.
    """
    x, y = np.log(np.asarray(flops, dtype=np.float64)), np.log(np.asarray(n_opt, dtype=np.float64))
    if len(np.unique(x)) < 2:
        raise UsageError(
            f"{len(np.unique(x))} distinct flops cannot say an exponent; give at least 2 budgets"
        )
    slope, level = np.polyfit(x, y, 1)
    return float(slope), float(np.exp(level))


def approach(
    table: Table, counts: Array, groups: NDArray[np.int64]
) -> tuple[IsoFlop | None, list[Note]]:
    """The estimate with its interval, and notes; None where the table cannot say.

    `groups` [n] numbers what is resampled; `counts` [B, G] says how often each was drawn. Raises
    UsageError where the table is a design of budgets, each of which is refused: then it holds no
    optimum, and a law through it would only seem to.
    """
    rows, groups = fresh(table), groups[_is_fresh(table)]
    every = budgets(rows, groups)
    if len(every) >= 2:
        found, said = _through(every, counts, "budgets")
        refused = [entry for entry in said if entry.refused]
        if len(refused) == len(said) and _designed(rows, every):
            raise UsageError(
                f"{table.name}: none of its {len(said)} IsoFLOP budgets has an optimum:"
                f" {_joined(refused)}; train sizes on both sides of each minimum"
            )
        notes = [Note(code="isoflop_refused", sentence=f"{_joined(refused)}.")] if refused else []
        if found is not None:
            return found, notes
        if _designed(rows, every):
            return None, [
                *notes,
                _absent("fewer than two budgets have a minimum within their sizes"),
            ]
    usable, without = interpolated(rows)
    found, _ = _through(usable, _counts_of_series(rows, groups, counts), "interpolated")
    if found is None:
        return None, [
            _absent(
                "fewer than two compute budgets have a minimum within the sizes that were trained"
                " for them"
            )
        ]
    if not without:
        return found, []
    left_out = (
        f"{without} of {without + len(usable)} IsoFLOP budgets between the grid's cells have no"
        " minimum within the sizes trained for them"
    )
    sentence = (
        f"{left_out}; the parabolas are of the others, from {usable[0].flops:.3g} to"
        f" {usable[-1].flops:.3g} FLOPs."
    )
    return found, [Note(code="isoflop_refused", sentence=sentence)]


def agreement(form: Optimal, interval: dict[str, Pair], second: IsoFlop | None) -> list[Note]:
    """Warnings about the exponents of N_opt (a) and D_opt (b).

    Args:
        form: the optimum by the form of the law.
        interval: its intervals, by name.
        second: the optimum by the parabolas, None where there is none.

    Returns:
        `approaches_disagree` where either estimate lies outside the other's interval, and
        `wide_interval` where an interval is wider than `WIDE`.
    """
    notes, wide, apart = [], [], []
    for name in ("a", "b"):
        value, inside = getattr(form, name), interval[name]
        by_form = f"{name}={value:.3f} ({span(inside)}) by the form"
        if inside[1] - inside[0] > WIDE:
            wide.append(by_form)
        if second is None:
            continue
        other, around = getattr(second, name), second.interval[name]
        by_parabolas = f"{name}={other:.3f} ({span(around)}) by IsoFLOP parabolas"
        if around[1] - around[0] > WIDE:
            wide.append(by_parabolas)
        if not (around[0] <= value <= around[1] and inside[0] <= other <= inside[1]):
            apart.append(f"{by_form}, {by_parabolas}")
    if apart:
        sentence = f"The two approaches disagree: {'; '.join(apart)}."
        sentence += " An estimate is outside the other's interval; treat the optimum as uncertain."
        notes.append(Note(code="approaches_disagree", sentence=sentence))
    if wide:
        sentence = f"Intervals are wider than {WIDE:g}: {'; '.join(wide)}."
        sentence += " Train more sizes or a wider range of compute to narrow them."
        notes.append(Note(code="wide_interval", sentence=sentence))
    return notes


def fresh(table: Table) -> Table:
    """Its rows without repeats, to which alone N_opt(C) belongs."""
    return table.take(_is_fresh(table))


def _is_fresh(table: Table) -> NDArray[np.bool_]:
    return (
        np.ones(len(table), dtype=np.bool_)
        if table.unique is None
        else table.data <= table.unique * (1 + 1e-9)
    )


def budgets(table: Table, groups: NDArray[np.int64]) -> list[Points]:
    """The table's own budgets of at least `SIZES` sizes, ascending."""
    order = np.argsort(table.flops, kind="stable")
    log_c = np.log(table.flops[order])
    found, begin = [], 0
    for end in range(1, len(order) + 1):
        if end == len(order) or log_c[end] - log_c[begin] > math.log1p(TOLERANCE):
            at = order[begin:end]
            if len(np.unique(table.params[at])) >= SIZES:
                flops = float(np.exp(log_c[begin:end].mean()))
                found.append(
                    Points(
                        flops,
                        np.log(table.params[at]),
                        np.log(table.data[at]),
                        table.loss[at],
                        table.weight[at],
                        groups[at],
                    )
                )
            begin = end
    return found


def interpolated(table: Table) -> tuple[list[Points], int]:
    """At most `BUDGETS` budgets that have a minimum, evenly spaced in log C among those that at
    least `SIZES` sizes reach, and how many, at that spacing, have none. A series' values are
    resampled together.
    """
    curves = []
    for number in np.unique(table.series):
        at = np.flatnonzero(table.series == number)
        at = at[np.argsort(table.flops[at], kind="stable")]
        log_c = np.log(table.flops[at])
        if len(at) >= 2 and (np.diff(log_c) > 1e-9).all():
            curves.append((int(number), at, log_c))
    if not curves:
        return [], 0

    def points(log_c: float) -> Points | None:
        inside = [
            (number, at, xs) for number, at, xs in curves if xs[0] - 1e-9 <= log_c <= xs[-1] + 1e-9
        ]
        if len({float(table.params[at[0]]) for _, at, _ in inside}) < SIZES:
            return None
        rows = [
            (
                np.log(table.params[at[0]]),
                _along(xs, np.log(table.data[at]), log_c),
                math.exp(_along(xs, np.log(table.loss[at]), log_c)),
                table.weight[at].mean(),
                n,
            )
            for n, at, xs in inside
        ]
        log_n, log_d, loss, weight, number = (
            np.array(column) for column in zip(*rows, strict=True)
        )
        return Points(math.exp(log_c), log_n, log_d, loss, weight, number.astype(np.int64))

    fine = [
        points(log_c)
        for log_c in np.linspace(
            min(xs[0] for _, _, xs in curves), max(xs[-1] for _, _, xs in curves), 8 * BUDGETS
        )
    ]
    reached = [found for found in fine if found is not None]
    usable = [found for found in reached if _minimum(found) is not None]
    picked = (
        sorted({round(i) for i in np.linspace(0, len(usable) - 1, min(BUDGETS, len(usable)))})
        if usable
        else []
    )
    return [usable[i] for i in picked], round(
        (len(reached) - len(usable)) * len(picked) / max(len(usable), 1)
    )


def parabola(points: Points) -> tuple[float, float, float]:
    """(c0, c1, c2) of loss = c0 + c1 x + c2 x^2 in x = log N of the sizes nearest to the best one
    tried.
    """
    near = _near(points)
    c2, c1, c0 = np.polyfit(
        points.log_n[near], points.loss[near], 2, w=np.sqrt(points.weight[near])
    )
    return float(c0), float(c1), float(c2)


def _minimum(points: Points) -> float | None:
    """log N of the minimum, or None; see `_why`."""
    _, c1, c2 = parabola(points)
    least = -c1 / (2 * c2) if c2 > 0 else math.nan
    return (
        least
        if points.log_n.min() <= least <= points.log_n.max() and not _at_an_edge(points)
        else None
    )


def _at_an_edge(points: Points) -> bool:
    """Whether the least or the largest size has the least mean loss: nothing then shows that the
    loss rises on that side.
    """
    sizes, which = np.unique(points.log_n.round(9), return_inverse=True)
    means = np.bincount(which, points.weight * points.loss) / np.bincount(which, points.weight)
    return int(means.argmin()) in (0, len(sizes) - 1)


def _why(points: Points) -> str:
    _, c1, c2 = parabola(points)
    low, high = np.exp(points.log_n.min()), np.exp(points.log_n.max())
    if c2 <= 0:
        return (
            f"at {points.flops:.3g} FLOPs the losses of {_sizes(points)} sizes bend downward"
            " (concave), so that their extreme is a maximum"
        )
    least = np.exp(min(-c1 / (2 * c2), 700.0))
    if low <= least <= high:
        return (
            f"at {points.flops:.3g} FLOPs the loss is least at an end of the {low:.3g} to"
            f" {high:.3g} parameters that were trained"
        )
    return (
        f"at {points.flops:.3g} FLOPs the minimum would lie at params={least:.3g}, outside the"
        f" {low:.3g} to {high:.3g} that were trained"
    )


def _through(
    every: list[Points], counts: Array, source: str
) -> tuple[IsoFlop | None, list[Budget]]:
    minima = [_minimum(points) for points in every]
    said = []
    for points, least in zip(every, minima, strict=True):
        d_opt = None if least is None else float(np.exp(_data_at(points, least)))
        n_opt = None if least is None else math.exp(least)
        said.append(
            Budget(
                flops=points.flops,
                n_sizes=_sizes(points),
                N_opt=n_opt,
                D_opt=d_opt,
                refused=_why(points) if least is None else None,
            )
        )
    used = [
        (points, least) for points, least in zip(every, minima, strict=True) if least is not None
    ]
    if len(used) < 2:
        return None, said
    log_c = np.log([points.flops for points, _ in used])
    best_n = np.array([[least for _, least in used]])
    drawn_n = np.stack([_resampled(points, counts) for points, _ in used], 1)
    result: dict[str, float] = {}
    interval: dict[str, tuple[float, float]] = {}
    for slope, level, of in (("a", "kN", lambda n: n), ("b", "kD", lambda n: _data_of(used, n))):
        result[slope], result[level] = (float(value[0]) for value in _line(log_c, of(best_n)))
        for name, draws in zip((slope, level), _line(log_c, of(drawn_n)), strict=True):
            defined = draws[np.isfinite(draws)]
            if len(defined) * 2 <= len(draws):
                return None, said
            low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
            interval[name] = (float(low), float(high))
    return (
        IsoFlop(
            source="budgets" if source == "budgets" else "interpolated",
            interval=interval,
            budgets=said,
            **result,
        ),
        said,
    )


def _resampled(points: Points, counts: Array) -> Array:
    """log N of the minimum under each resample [B]; nan where there is none within the sizes."""
    near = _near(points)
    x, centre = points.log_n[near], points.log_n[near].mean()
    powers = np.stack([(x - centre) ** k for k in range(5)], 1)
    weight = counts[:, points.group[near]] * points.weight[near]
    sums, right = weight @ powers, weight @ (powers[:, :3] * points.loss[near, None])
    square = sums[:, [[0, 1, 2], [1, 2, 3], [2, 3, 4]]]
    distinct = np.stack([(weight[:, x == size] > 0).any(1) for size in np.unique(x)], 1).sum(1) >= 3
    out = np.full(len(counts), np.nan)
    c = np.linalg.solve(square[distinct], right[distinct][:, :, None])[:, :, 0]
    with np.errstate(all="ignore"):
        least = np.where(c[:, 2] > 0, centre - c[:, 1] / (2 * c[:, 2]), np.nan)
    out[distinct] = np.where(
        (least >= points.log_n.min()) & (least <= points.log_n.max()), least, np.nan
    )
    return out


def _line(x: Array, y: Array) -> tuple[Array, Array]:
    """(slope, exp(level)) [B] of the lines through (x [k], y [B, k]), without the nan; nan where
    fewer than two are left.
    """
    there = np.isfinite(y)
    count = there.sum(1)
    filled = np.where(there, y, 0.0)
    with np.errstate(all="ignore"):
        mean_x, mean_y = (there * x).sum(1) / count, filled.sum(1) / count
        dx = np.where(there, x - mean_x[:, None], 0.0)
        slope = np.where(count >= 2, (dx * filled).sum(1) / (dx**2).sum(1), np.nan)
        return slope, np.exp(np.clip(mean_y - slope * mean_x, -700, 700))


def _data_of(used: list[tuple[Points, float]], log_n: Array) -> Array:
    return np.stack([_data_at(points, log_n[:, i]) for i, (points, _) in enumerate(used)], 1)


def _data_at(points: Points, log_n: ArrayLike) -> Array:
    """log D of this budget at log N, between the sizes that were trained."""
    sizes, first = np.unique(points.log_n, return_index=True)
    at = np.asarray(log_n, dtype=np.float64)
    return np.where(np.isfinite(at), np.interp(at, sizes, points.log_d[first]), np.nan)


def _near(points: Points) -> NDArray[np.bool_]:
    sizes = np.unique(points.log_n)
    best = points.log_n[np.argmin(points.loss)]
    return np.isin(points.log_n, sizes[np.argsort(np.abs(sizes - best), kind="stable")[:NEAREST]])


def _along(x: Array, y: Array, at: float) -> float:
    inside = min(max(at, float(x[0])), float(x[-1]))
    return float(PchipInterpolator(x, y)(inside)) if len(x) > 2 else float(np.interp(inside, x, y))


def _counts_of_series(table: Table, groups: NDArray[np.int64], counts: Array) -> Array:
    """[B, series]: a series drawn with its trunk; where cells are what is resampled, in the mean of
    its cells' counts.
    """
    out = np.zeros((len(counts), int(table.series.max()) + 1 if len(table) else 0))
    for number in np.unique(table.series):
        out[:, number] = counts[:, groups[table.series == number]].mean(1)
    return out


def _designed(table: Table, every: list[Points]) -> bool:
    """Is this a table of budgets, rather than a grid of N x D some of whose diagonals happen to be
    ones.
    """
    within = sum(len(points.loss) for points in every) >= 0.8 * len(table)
    cells = len(np.unique(np.stack([table.params, table.data], 1), axis=0))
    return within and cells < 0.6 * len(np.unique(table.params)) * len(np.unique(table.data))


def _sizes(points: Points) -> int:
    return len(np.unique(points.log_n))


def _joined(refused: list[Budget]) -> str:
    return "; ".join(entry.refused or "" for entry in refused)


def _absent(why: str) -> Note:
    return Note(
        code="no_isoflop", sentence=f"No IsoFLOP parabolas to check the law against: {why}."
    )
