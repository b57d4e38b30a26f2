"""A table of trained cells -> a law of loss, with intervals, a test on larger cells, and what the
data cannot say. Imports neither torch nor Ray.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from mesocosm import __version__
from mesocosm.errors import UsageError
from mesocosm.scaling import isoflop
from mesocosm.scaling.forms import FORMS, NOTHING, Array, Form
from mesocosm.scaling.law import (
    LEVEL,
    Bootstrap,
    Dropped,
    Errors,
    Flops,
    HeldOut,
    Law,
    Note,
    Optimal,
    Pair,
    Provenance,
    WithoutE,
    optimal_of,
    params_of,
    span,
)
from mesocosm.scaling.solve import DELTA, Solution, solve
from mesocosm.scaling.table import Table, levels

RESAMPLES = 300
EXPONENTS = (0.15, 0.4, 1.0)
"""Of alpha and of beta: every pair is a start, whose E, A and B the solver brings to the losses'
level.
"""
REPEATS = (3.0, 30.0)
"""Of r_n and r_d."""
COARSE = ((0.2, 0.2, 10.0, 10.0), (0.7, 0.7, 10.0, 10.0))
"""(alpha, beta, r_n, r_d) where resamples of the data-constrained form start, beside the whole
table's optimum: its steps cost six times as much.
"""
OUTLIER = 5.0
"""Robust standard deviations: a normal residual is beyond with a chance of 6e-7."""
JUDGED = 3
"""Rows a parameter, below which no row is called an outlier."""
LEAST_TRUNKS = 3
"""Fewer trunks are not resampled: their cells are."""
HELD_OUT_FACTOR = 4.0
HELD_OUT_SHARE = 0.1
"""At most this share of the cells, though at least one, is held out."""
NO_E = 0.01
"""An interval of E that begins below this share of the least loss touches 0."""
FLOPS_OFF = 1.0
"""No count of FLOPs is so far, relatively, from a power law in N and D over a table."""
LARGEST_R = 1e4
"""Repeats that are as good as fresh data up to here, beyond any number of epochs, have no measured
half-life.
"""


@dataclass(frozen=True)
class _Fit:
    """One form on one table: the best theta [P], its objective, and the residuals of log loss [n]."""

    theta: Array
    objective: float
    residual: Array


def fit(
    table: Table,
    *,
    drop_outliers: bool = False,
    seed: int = 0,
    command: str = "",
    swept: dict[str, Any] | None = None,
) -> Law:
    """The law of `table`; `swept` is kept in its provenance. Deterministic in (table,
    drop_outliers, seed). Raises UsageError where there is none.
    """
    form = form_of(table)
    check(table, form)
    notes = list(table.notes)
    if table.unique is not None and not table.repeated:
        notes.append(
            _note(
                "no_repeats",
                "No cell saw its `unique` data more than once: chinchilla was fitted, not the form"
                " for repeated data.",
            )
        )
    if table.by_trunk and len(np.unique(table.group)) < LEAST_TRUNKS:
        few = (
            f"There are fewer than {LEAST_TRUNKS} trunks, of which no resample says anything: cells"
            " were resampled, as if they shared no noise."
        )
        notes.append(_note("few_trunks", few))
        table = replace(table, group=np.arange(len(table)), by_trunk=False)
    starts = starts_of(form)
    given = table
    whole = _best(form, table, starts)
    dropped: list[Dropped] = []
    outliers = _outliers(whole)
    if len(outliers) and drop_outliers:
        dropped = _listed(table, whole, outliers)
        table = table.take(np.setdiff1d(np.arange(len(table)), outliers))
        check(table, form)
        whole = _best(form, table, starts)
        notes.append(
            _note(
                "outliers_dropped",
                f"{_outlier_lines(dropped)} left out: more than {OUTLIER:g} robust standard"
                " deviations from the law.",
            )
        )
    elif len(outliers):
        lines = _outlier_lines(_listed(table, whole, outliers))
        notes.append(
            _note(
                "outliers",
                f"{lines} more than {OUTLIER:g} robust standard deviations from the law;"
                " --drop-outliers leaves such rows out.",
            )
        )
    _refuse_nonsense(table, whole)

    flops, said = _flops(table)
    notes += said
    counts, groups = _resamples(table, seed)
    if counts.shape[1] < 10:
        by = "trunks" if table.by_trunk else "cells"
        notes.append(
            _note(
                "few_groups",
                f"Intervals rest on resamples of only {counts.shape[1]} {by}: they are narrower"
                " than the truth.",
            )
        )
    again = (
        starts
        if form.name == "chinchilla"
        else np.array(
            [(0.0, 0.0, 0.0, alpha, beta, *np.log(repeats)) for alpha, beta, *repeats in COARSE]
        )
    )
    drawn = _drawn(form, table, counts[:, groups], np.concatenate([again, whole.theta[None]]))
    params, draws = params_of(form.name, whole.theta[None]), params_of(form.name, drawn)
    best, best_draws = optimal_of(whole.theta[None], flops), optimal_of(drawn, flops)
    interval = _interval(draws | best_draws)
    if form.name == "data_constrained":
        notes += _unmeasured(params, interval)
    without = None
    if interval["E"][0] < NO_E * float(table.loss.min()):
        without, said = _without_e(
            form, table, counts[:, groups], again, flops, params, interval, whole
        )
        notes += said
    held_out, said = _held_out(form, given, starts, drop_outliers=drop_outliers)
    notes += said
    second, said = isoflop.approach(table, counts, groups)
    notes += said
    optimal = Optimal(**_first(best))
    notes += isoflop.agreement(optimal, interval, second)
    seen = {
        "params": table.params,
        "data": table.data,
        "flops": table.flops,
        "loss": table.loss,
    } | ({} if table.unique is None else {"unique": np.minimum(table.unique, table.data)})
    return Law(
        form=cast(Literal["chinchilla", "data_constrained"], form.name),
        params=_first(params),
        interval=interval,
        optimal=optimal,
        flops=flops,
        objective=whole.objective,
        n_cells=len(table),
        residual=float(np.sqrt(np.mean(whole.residual**2))),
        range={name: (float(values.min()), float(values.max())) for name, values in seen.items()},
        correlation={
            f"E,{name}": _correlation(draws["E"], draws[name]) for name in ("alpha", "beta")
        },
        held_out=held_out,
        isoflop=second,
        without_E=without,
        dropped=dropped,
        warnings=notes,
        bootstrap=Bootstrap(
            resamples=RESAMPLES,
            by="trunk" if table.by_trunk else "cell",
            groups=counts.shape[1],
            seed=seed,
            draws={
                name: [float(f"{value:.8g}") for value in values] for name, values in draws.items()
            },
        ),
        provenance=Provenance(
            table=table.name,
            sha256=table.sha256,
            rows=table.rows,
            command=command,
            version=__version__,
            swept=swept,
        ),
    )


def plan(table: Table) -> dict[str, Any]:
    """What `fit` would fit. Raises UsageError as it does before it fits."""
    form = form_of(table)
    check(table, form)
    held = _split(table, form)
    fresh = isoflop.fresh(table)
    budgets = isoflop.budgets(fresh, fresh.group)
    return {
        "form": form.name,
        "rows": f"{len(table)} of {table.rows}",
        "sizes": (
            f"{len(np.unique(table.params))}, {table.params.min():.4g} to {table.params.max():.4g}"
            " params"
        ),
        "data": f"{len(np.unique(table.data))}, {table.data.min():.4g} to {table.data.max():.4g}",
        "flops": (
            f"{table.flops.min():.4g} to {table.flops.max():.4g}"
            + ("" if table.flops_given else " (6 x params x data)")
        ),
        "held out": (
            "nothing"
            if held is None
            else (
                f"lines {', '.join(map(str, table.line[held[1]]))}; fitted for it:"
                f" {int(held[0].sum())} rows"
            )
        ),
        "isoflop": (
            f"{len(budgets)} budgets of the table"
            if len(budgets) >= 2
            else "interpolated budgets, if any"
        ),
        "resamples": (
            f"{RESAMPLES} by {'trunk' if table.by_trunk else 'cell'} ({len(np.unique(table.group))}"
            " of them)"
        ),
        "warnings": "; ".join(note.sentence for note in table.notes) or "none so far",
    }


def form_of(table: Table) -> Form:
    return FORMS["data_constrained" if table.repeated else "chinchilla"]


def check(table: Table, form: Form) -> None:
    """Raises UsageError where `form` has no single answer on `table`."""
    wanted = len(form.params)
    cells = len(
        np.unique(
            np.stack(
                [
                    levels(np.exp(values))
                    for values in (table.cells().params, table.cells().data, table.cells().unique)
                ],
                1,
            ),
            axis=0,
        )
    )
    if cells <= wanted:
        raise UsageError(
            f"{table.name} has {cells} distinct cells for the {wanted} parameters of {form.name}:"
            f" train at least {wanted + 1}"
        )
    for name, values in (("params", table.params), ("data", table.data)):
        first = np.unique(levels(values), return_index=True)[1]
        if len(first) < 3:
            listed = ", ".join(f"{values[i]:g}" for i in first)
            raise UsageError(
                f"{table.name} has {len(first)} distinct {name} ({listed}), which cannot tell its"
                " exponent from E: train at least 3"
            )
    x, z = np.log(table.params), np.log(table.data)
    if abs(np.corrcoef(x, z)[0, 1]) > 1 - 1e-6:
        raise UsageError(
            f"{table.name}: data is a power of params in every cell, so that their exponents cannot"
            " be told apart: vary data at one size"
        )


def starts_of(form: Form) -> Array:
    """[S, P]: every pair of exponents (times every pair of r_n and r_d)."""
    repeats = (
        itertools.product(np.log(REPEATS), repeat=2) if form.name == "data_constrained" else [()]
    )
    return np.array(
        [
            (0.0, 0.0, 0.0, *exponents, *rest)
            for rest in repeats
            for exponents in itertools.product(EXPONENTS, repeat=2)
        ]
    )


def _solved(
    form: Form, table: Table, weights: Array, starts: Array, *, without_e: bool = False
) -> Solution:
    if without_e:
        starts = starts.copy()
        starts[..., 0] = NOTHING
    return solve(
        form,
        table.cells(),
        np.log(table.loss),
        weights * table.weight,
        starts,
        fixed=(0,) if without_e else (),
    )


def _best(form: Form, table: Table, starts: Array, *, without_e: bool = False) -> _Fit:
    theta, objective = _solved(
        form, table, np.ones((1, len(table))), starts, without_e=without_e
    ).best()
    return _Fit(
        theta[0], float(objective[0]), np.log(table.loss) - form.log_loss(theta, table.cells())[0]
    )


def _drawn(
    form: Form, table: Table, weights: Array, starts: Array, *, without_e: bool = False
) -> Array:
    """The best theta of every resample, [B, P]."""
    return _solved(form, table, weights, starts, without_e=without_e).best()[0]


def _resamples(table: Table, seed: int) -> tuple[Array, NDArray[np.int64]]:
    """(how often each group was drawn [B, G], each row's group [n]). A draw of fewer than three
    sizes or data sizes is drawn again: it says nothing.
    """
    names, groups = np.unique(table.group, return_inverse=True)
    rng = np.random.default_rng([seed, len(names)])
    size, data = levels(table.params), levels(table.data)
    counts = np.empty((RESAMPLES, len(names)))
    left = np.arange(RESAMPLES)
    for _ in range(200):
        counts[left] = rng.multinomial(
            len(names), np.full(len(names), 1 / len(names)), size=len(left)
        )
        there = counts[left][:, groups] > 0
        left = left[np.minimum(_distinct(there, size), _distinct(there, data)) < 3]
        if not len(left):
            break
    counts[left] = 1.0
    return counts, groups


def _distinct(there: NDArray[np.bool_], of: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.stack([there[:, of == value].any(1) for value in range(int(of.max()) + 1)], 1).sum(1)


def _interval(draws: dict[str, Array]) -> dict[str, Pair]:
    out = {}
    for name, values in draws.items():
        defined = values[np.isfinite(values)]
        low, high = np.quantile(
            defined if len(defined) else np.zeros(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
        )
        out[name] = (float(low), float(high))
    return out


def _refuse_nonsense(table: Table, whole: _Fit) -> None:
    for name, at, of in (("alpha", 3, "params"), ("beta", 4, "data")):
        if not whole.theta[at] > 0:
            raise UsageError(
                f"{table.name}: loss does not fall with {of} ({name}={whole.theta[at]:.3g} fits"
                " best): there is no law; check the column, or train longer"
            )


def _flops(table: Table) -> tuple[Flops, list[Note]]:
    """C(N, D) as the table says it: 6 N D where that is within 1%, else a power law through its own
    counts.
    """
    counted = 6 * table.params * table.data
    off = float(np.abs(table.flops / counted - 1).max())
    if not table.flops_given or off <= 0.01:
        return (
            Flops(
                source="6ND",
                k=6.0,
                p=1.0,
                q=1.0,
                max_rel_residual=off if table.flops_given else 0.0,
            ),
            [],
        )
    design = np.stack([np.ones(len(table)), np.log(table.params), np.log(table.data)], 1)
    (log_k, p, q), *_ = np.linalg.lstsq(design, np.log(table.flops), rcond=None)
    apart = np.abs(np.exp(design @ np.array([log_k, p, q]) - np.log(table.flops)) - 1)
    worst, residual = int(apart.argmax()), float(apart.max())
    if residual > FLOPS_OFF:
        said = (
            f"flops={table.flops[worst]:.4g} in line {table.line[worst]} is {residual:.0%} from"
            " what params and data say of the others"
        )
        raise UsageError(
            f"{table.name}: {said}; correct the column, or leave it out for 6 x params x data"
        )
    if p <= 0 or q <= 0:
        raise UsageError(
            f"{table.name}: flops do not rise with params and data (C ~ N^{p:.2g} D^{q:.2g});"
            " correct the column, or leave it out for 6 x params x data"
        )
    said = (
        f"flops are up to {off:.0%} from 6 x params x data: the optimum follows C ="
        f" {math.exp(log_k):.3g} N^{p:.3f} D^{q:.3f}, "
    )
    said += f"which fits them within {residual:.1%}."
    found = Flops(
        source="table",
        k=math.exp(log_k),
        p=float(p),
        q=float(q),
        max_rel_residual=residual,
        params_most=float(table.params.max()),
    )
    return found, [_note("flops_not_6nd", said)]


def _outliers(whole: _Fit) -> NDArray[np.int64]:
    """None of fewer than `JUDGED` rows a parameter: the fit follows them too closely to tell."""
    if len(whole.residual) < JUDGED * len(whole.theta):
        return np.zeros(0, dtype=np.int64)
    return np.flatnonzero(_deviations(whole) > OUTLIER)


def _deviations(whole: _Fit) -> Array:
    """Residuals in robust standard deviations (of at least delta, below which the loss takes none
    for an outlier): the median of those but the P least, since a fit of P parameters that is nearly
    of absolute residuals passes through about P cells, widened by n / (n - P) for the rest.
    """
    size, free = np.abs(whole.residual), len(whole.residual) - len(whole.theta)
    middle = (
        float(np.median(np.sort(size)[len(whole.theta) :])) * len(size) / free if free > 0 else 0.0
    )
    return size / max(1.4826 * middle, DELTA)


def _listed(table: Table, whole: _Fit, at: NDArray[np.int64]) -> list[Dropped]:
    far = _deviations(whole)
    return [
        Dropped(
            line=int(table.line[i]),
            params=float(table.params[i]),
            data=float(table.data[i]),
            loss=float(table.loss[i]),
            predicted=float(table.loss[i] * np.exp(-whole.residual[i])),
            deviations=float(far[i]),
        )
        for i in at
    ]


def _outlier_lines(rows: list[Dropped]) -> str:
    shown = ", ".join(
        f"line {row.line} (loss={row.loss:.4g}, the law says {row.predicted:.4g})"
        for row in rows[:5]
    )
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    return f"{shown}{more} {'is' if len(rows) == 1 else 'are'}"


def _unmeasured(params: dict[str, Array], interval: dict[str, Pair]) -> list[Note]:
    return [
        _note(
            f"{name}_unmeasured",
            f"{name} has no upper end ({name}={params[name][0]:.3g}, {span(interval[name])}): these"
            f" cells do not show how repeats of {of} wear off.",
        )
        for name, of in (("r_d", "data"), ("r_n", "size"))
        if interval[name][1] > LARGEST_R or params[name][0] > LARGEST_R
    ]


def _without_e(
    form: Form,
    table: Table,
    weights: Array,
    starts: Array,
    flops: Flops,
    params: dict[str, Array],
    interval: dict[str, Pair],
    whole: _Fit,
) -> tuple[WithoutE, list[Note]]:
    zero = _best(form, table, starts, without_e=True)
    drawn = _drawn(form, table, weights, np.concatenate([starts, zero.theta[None]]), without_e=True)
    found = params_of(form.name, zero.theta[None])
    fitted = WithoutE(
        params=_first(found),
        interval=_interval(params_of(form.name, drawn) | optimal_of(drawn, flops)),
        optimal=Optimal(**_first(optimal_of(zero.theta[None], flops))),
        objective=zero.objective,
    )
    said = (
        f"The interval of E ({params['E'][0]:.3g}, {span(interval['E'])}) touches 0. With E = 0:"
        f" alpha={found['alpha'][0]:.3f}, beta={found['beta'][0]:.3f}, "
    )
    said += (
        f"objective {zero.objective:.4g} against {whole.objective:.4g}; both fits are in the law."
    )
    return fitted, [_note("e_touches_zero", said)]


def _split(table: Table, form: Form) -> tuple[NDArray[np.bool_], NDArray[np.bool_]] | None:
    """(fitted [n], held out [n]): the largest cells by compute, `HELD_OUT_FACTOR` above all that
    are fitted; None where too few would be left.
    """
    found = None
    for least in np.unique(table.flops)[::-1]:
        held = table.flops >= least
        fitted = table.flops <= least / HELD_OUT_FACTOR * (1 + 1e-9)
        try:
            check(table.take(fitted), form)
        except UsageError:
            break
        if found is not None and (
            held.sum() > HELD_OUT_SHARE * len(table) or fitted.sum() < len(table) / 2
        ):
            break
        found = fitted, held
    return found


def _held_out(
    form: Form, table: Table, starts: Array, *, drop_outliers: bool
) -> tuple[HeldOut | None, list[Note]]:
    """Of the table as it was given: outliers are dropped from the fitted cells alone, by a law that
    saw no other, and every held-out cell counts.
    """
    split = _split(table, form)
    if split is None:
        said = (
            f"No out-of-sample error: below {1 / HELD_OUT_FACTOR:g} of the largest compute"
            f" ({table.flops.max():.3g} FLOPs) too few cells are left to fit."
        )
        return None, [_note("no_held_out", said)]
    below, above = table.take(split[0]), table.take(split[1])
    if drop_outliers:
        below = below.take(
            np.setdiff1d(np.arange(len(below)), _outliers(_best(form, below, starts)))
        )
    size = below.params == below.params.max()
    foretold = {
        "law": _foretold(form, _best(form, below, starts), above),
        "power_law": _foretold(form, _best(form, below, starts, without_e=True), above),
        "last_size": np.full(
            len(above), below.loss[size & (below.data == below.data[size].max())].mean()
        ),
    }
    errors = {
        name: _errors(predicted, above.loss, float(np.ptp(table.loss)))
        for name, predicted in foretold.items()
    }
    ours, baselines = (
        errors["law"],
        {name: found for name, found in errors.items() if name != "law"},
    )
    better = [
        name for name, found in baselines.items() if found.mean_rel_error < ours.mean_rel_error
    ]
    notes = []
    if better:
        names = {"power_law": "a power law without E", "last_size": "the last size's constant"}
        said = " and ".join(
            f"{names[name]} ({baselines[name].mean_rel_error:.2%})" for name in better
        )
        notes = [
            _note(
                "baseline_not_beaten",
                f"On the held-out cells the law's mean relative error ({ours.mean_rel_error:.2%})"
                f" is above that of {said}: do not extrapolate with it.",
            )
        ]
    held = HeldOut(
        **ours.model_dump(),
        n_cells=len(above),
        n_fitted=len(below),
        min_flops=float(above.flops.min()),
        max_fitted_flops=float(below.flops.max()),
        baselines=baselines,
        beats_baselines=not better,
    )
    return held, notes


def _foretold(form: Form, law: _Fit, table: Table) -> Array:
    return np.exp(form.log_loss(law.theta[None], table.cells())[0])


def _errors(predicted: Array, measured: Array, span: float) -> Errors:
    error = np.abs(predicted - measured)
    relative = error / measured
    return Errors(
        mean_rel_error=float(relative.mean()),
        max_rel_error=float(relative.max()),
        mean_error_of_span=float(error.mean()) / span,
    )


def _correlation(x: Array, y: Array) -> float | None:
    return float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) > 0 and np.ptp(y) > 0 else None


def _first(values: dict[str, Array]) -> dict[str, float]:
    return {name: float(value[0]) for name, value in values.items()}


def _note(code: str, sentence: str) -> Note:
    return Note(code=code, sentence=sentence)
