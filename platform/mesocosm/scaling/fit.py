"""Fit a law of loss to a table of trained cells, or refuse to. Imports neither torch nor Ray.

`forms` has the forms of a law, `estimate` chooses one and resamples the table, `solve` minimises.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal, cast

import numpy as np

from mesocosm import __version__
from mesocosm.errors import UsageError
from mesocosm.scaling import estimate, isoflop
from mesocosm.scaling.forms import Array, Form, Ints, Mask
from mesocosm.scaling.law import (
    Bootstrap,
    Dropped,
    Flops,
    HeldOut,
    Law,
    LawErrors,
    Note,
    Optimal,
    Pair,
    Provenance,
    WithoutE,
    interval_text,
    optimal_of,
    params_of,
    quantiles,
)
from mesocosm.scaling.table import CellTable, Notes

LEAST_TRUNKS = 3
"""The least number of trunks to resample. With fewer, cells are resampled instead."""
FEW_GROUPS = 10
HELD_OUT_FACTOR = 4.0
HELD_OUT_SHARE = 0.1
"""The largest share of the cells that is held out. At least one cell is."""
NO_E = 0.01
"""An interval of E that begins below this share of the least loss touches 0."""
FLOPS_OFF = 1.0
"""The largest relative error of a power law through a table's FLOPs."""
LARGEST_R = 1e4
"""A half-life above this many repeats, beyond any number of epochs, is not measured."""


def fit(
    table: CellTable,
    *,
    drop_outliers: bool = False,
    seed: int = 0,
    command: str = "",
    swept: dict[str, Any] | None = None,
) -> Law:
    """Fit the law of `table`. Deterministic in (table, drop_outliers, seed).

    Args:
        table: the trained cells.
        drop_outliers: leave out rows more than `OUTLIER` robust standard deviations from the law.
        seed: of the resamples.
        command: what the provenance names.
        swept: the sweep's config, for the provenance.

    Raises:
        UsageError: the table determines no law.
    """
    form = estimate.form_of(table)
    estimate.check(table, form)
    notes = dict(table.notes)
    if table.unique is not None and not table.repeated:
        notes["no_repeats"] = "No cell repeats its `unique` data: the form is chinchilla."
    if table.by_trunk and len(np.unique(table.group)) < LEAST_TRUNKS:
        text = f"There are fewer than {LEAST_TRUNKS} trunks: cells are resampled"
        notes["few_trunks"] = f"{text}, as if they shared no noise."
        table = replace(table, group=np.arange(len(table)), by_trunk=False)
    full_table, dropped = table, list[Dropped]()
    whole = estimate.best_fit(table, form)
    if len(outliers := whole.outliers()):
        rows = _dropped(table, whole, outliers)
        shown = [f"line {r.line} (loss={r.loss:.4g}, law {r.predicted:.4g})" for r in rows[:5]]
        text = f"{len(rows)} rows are more than {estimate.OUTLIER:g} robust standard deviations"
        text = f"{text} from the law: {', '.join(shown)}"
        if drop_outliers:
            notes["outliers_dropped"] = f"{text}. They are left out."
            dropped, table = rows, table.take(np.setdiff1d(np.arange(len(table)), outliers))
            estimate.check(table, form)
            whole = estimate.best_fit(table, form)
        else:
            notes["outliers"] = f"{text}; --drop-outliers leaves them out."
    for name, at, column in (("alpha", 3, "params"), ("beta", 4, "data")):
        if not (value := whole.theta[0, at]) > 0:
            text = f"{table.name}: loss does not fall with {column} ({name}={value:.3g})"
            raise UsageError(f"{text}; check the column, or train longer")

    flops = _flops(table, notes)
    counts, groups = estimate.resample(table, seed)
    if counts.shape[1] < FEW_GROUPS:
        text = f"Intervals rest on {counts.shape[1]} {'trunks' if table.by_trunk else 'cells'}"
        notes["few_groups"] = f"{text} and are too narrow."
    starts = np.concatenate([estimate.resample_starts(form), whole.theta])
    thetas, _ = estimate.draws(table, form, counts[:, groups], starts)
    params = _first(params_of(form.name, whole.theta))
    optimal = Optimal(**_first(optimal_of(whole.theta, flops)))
    spread = params_of(form.name, thetas)
    interval = _intervals(spread | optimal_of(thetas, flops))
    for name, kind in (("r_d", "data"), ("r_n", "size")):
        if name in params and max(interval[name][1], params[name]) > LARGEST_R:
            text = f"{name} has no upper end ({params[name]:.3g}, {interval_text(interval[name])})"
            notes[f"{name}_unmeasured"] = f"{text}: no cell shows how repeats of {kind} wear off."
    without = None
    if interval["E"][0] < NO_E * float(table.loss.min()):
        without = _without_e(table, form, counts[:, groups], starts, flops)
        zero = ", ".join(f"{name}={without.params[name]:.3f}" for name in ("alpha", "beta"))
        notes["e_touches_zero"] = (
            f"The interval of E ({params['E']:.3g}, {interval_text(interval['E'])}) touches 0. With"
            f" E = 0: {zero}, objective {without.objective:.4g} against {whole.objective:.4g}."
        )
    held_out = _held_out(full_table, form, drop_outliers, notes)
    second, more = isoflop.approach(table, counts, groups)
    notes |= more | isoflop.agreement(optimal, interval, second)
    columns = {name: getattr(table, name) for name in ("params", "data", "flops", "loss")}
    if table.unique is not None:
        columns["unique"] = np.minimum(table.unique, table.data)
    correlation = {f"E,{x}": _correlation(spread["E"], spread[x]) for x in ("alpha", "beta")}
    return Law(
        form=cast(Literal["chinchilla", "data_constrained"], form.name),
        params=params,
        interval=interval,
        optimal=optimal,
        flops=flops,
        objective=whole.objective,
        n_cells=len(table),
        residual=float(np.sqrt(np.mean(whole.residual**2))),
        range={name: (float(x.min()), float(x.max())) for name, x in columns.items()},
        correlation=correlation,
        held_out=held_out,
        isoflop=second,
        without_E=without,
        dropped=dropped,
        warnings=[Note(code=code, sentence=sentence) for code, sentence in notes.items()],
        bootstrap=Bootstrap(
            resamples=estimate.RESAMPLES,
            by="trunk" if table.by_trunk else "cell",
            groups=counts.shape[1],
            seed=seed,
            draws={name: [float(f"{x:.8g}") for x in values] for name, values in spread.items()},
        ),
        provenance=Provenance(
            table=table.name,
            sha256=table.sha256,
            rows=table.rows,
            command=command,
            version=__version__,
            swept=swept,
            tokenizer=table.tokenizer,
        ),
    )


def plan(table: CellTable) -> dict[str, Any]:
    """Describe what `fit` would fit. Raises UsageError as `fit` does before it fits."""
    form = estimate.form_of(table)
    estimate.check(table, form)
    split, fresh, flops = split_held_out(table, form), table.take(table.fresh), table.flops
    held = "nothing"
    if split is not None:
        lines = ", ".join(map(str, table.line[split[1]]))
        held = f"lines {lines}; {int(split[0].sum())} rows are fitted for it"
    budgets = len(isoflop.budgets(fresh, fresh.group))
    groups, unit = len(np.unique(table.group)), "trunk" if table.by_trunk else "cell"
    sizes, data = np.unique(table.params), np.unique(table.data)
    return {
        "form": form.name,
        "rows": f"{len(table)} of {table.rows}",
        "sizes": f"{len(sizes)}, {sizes[0]:.4g} to {sizes[-1]:.4g} params",
        "data": f"{len(data)}, {data[0]:.4g} to {data[-1]:.4g}",
        "flops": f"{flops.min():.4g} to {flops.max():.4g}"
        + " (6 x params x data)" * (not table.flops_given),
        "held out": held,
        **({} if table.tokenizer is None else {"tokenizer": table.tokenizer}),
        "isoflop": f"{budgets} budgets" if budgets >= 2 else "interpolated budgets, if any",
        "resamples": f"{estimate.RESAMPLES} by {unit} ({groups})",
        "warnings": "; ".join(table.notes.values()) or "none so far",
    }


def _flops(table: CellTable, notes: Notes) -> Flops:
    """C(N, D) of the table: 6 N D where that is within 1%, else a power law through its counts."""
    off = float(np.abs(table.flops / (6 * table.params * table.data) - 1).max())
    if off <= 0.01:
        return Flops(source="6ND", k=6.0, p=1.0, q=1.0, max_rel_residual=off)
    design = np.stack([np.ones(len(table)), np.log(table.params), np.log(table.data)], 1)
    coefficients, *_ = np.linalg.lstsq(design, np.log(table.flops), rcond=None)
    k, p, q = math.exp(coefficients[0]), float(coefficients[1]), float(coefficients[2])
    apart = np.abs(np.exp(design @ coefficients - np.log(table.flops)) - 1)
    worst, residual = int(apart.argmax()), float(apart.max())
    fix = "correct the column, or leave it out for 6 x params x data"
    if residual > FLOPS_OFF:
        value = f"flops={table.flops[worst]:.4g} in line {table.line[worst]}"
        raise UsageError(f"{table.name}: {value} is {residual:.0%} off the other rows; {fix}")
    if p <= 0 or q <= 0:
        power = f"C ~ N^{p:.2g} D^{q:.2g}"
        raise UsageError(f"{table.name}: flops do not rise with params and data ({power}); {fix}")
    notes["flops_not_6nd"] = (
        f"flops are up to {off:.0%} from 6 x params x data: the optimum follows C = {k:.3g}"
        f" N^{p:.3f} D^{q:.3f}, which fits them within {residual:.1%}."
    )
    most = float(table.params.max())
    return Flops(source="table", k=k, p=p, q=q, max_rel_residual=residual, params_most=most)


def _dropped(table: CellTable, whole: estimate.Fit, at: Ints) -> list[Dropped]:
    columns = {
        "line": table.line,
        "params": table.params,
        "data": table.data,
        "loss": table.loss,
        "predicted": table.loss * np.exp(-whole.residual),
        "deviations": whole.deviations(),
    }
    return [Dropped(**{name: values[i].item() for name, values in columns.items()}) for i in at]


def _without_e(
    table: CellTable, form: Form, weights: Array, starts: Array, flops: Flops
) -> WithoutE:
    zero = estimate.best_fit(table, form, starts, without_e=True)
    starts = np.concatenate([starts, zero.theta])
    thetas, _ = estimate.draws(table, form, weights, starts, without_e=True)
    return WithoutE(
        params=_first(params_of(form.name, zero.theta)),
        interval=_intervals(params_of(form.name, thetas) | optimal_of(thetas, flops)),
        optimal=Optimal(**_first(optimal_of(zero.theta, flops))),
        objective=zero.objective,
    )


def split_held_out(table: CellTable, form: Form) -> tuple[Mask, Mask] | None:
    """(fitted [n], held out [n]). The largest cells by compute are held out, `HELD_OUT_FACTOR`
    above all fitted ones. None where too few would be left.
    """
    split = None
    for least in np.unique(table.flops)[::-1]:
        held = table.flops >= least
        fitted = table.flops <= least / HELD_OUT_FACTOR * (1 + 1e-9)
        try:
            estimate.check(table.take(fitted), form)
        except UsageError:
            break
        enough = held.sum() <= HELD_OUT_SHARE * len(table) and fitted.sum() >= len(table) / 2
        if split is not None and not enough:
            break
        split = fitted, held
    return split


def _held_out(table: CellTable, form: Form, drop_outliers: bool, notes: Notes) -> HeldOut | None:
    """Errors of a second fit on the largest cells of the table, before outliers are dropped.

    The second fit drops its own outliers. Held-out cells are never dropped.
    """
    split = split_held_out(table, form)
    if split is None:
        limit = f"{1 / HELD_OUT_FACTOR:g} of the largest compute ({table.flops.max():.3g} FLOPs)"
        notes["no_held_out"] = f"No out-of-sample error: too few cells are below {limit}."
        return None
    below, above = table.take(split[0]), table.take(split[1])
    if drop_outliers:
        outliers = estimate.best_fit(below, form).outliers()
        below = below.take(np.setdiff1d(np.arange(len(below)), outliers))
    largest = below.params == below.params.max()
    last = below.loss[largest & (below.data == below.data[largest].max())].mean()
    span = float(np.ptp(table.loss))
    law, power_law = (
        _errors(estimate.best_fit(below, form, without_e=zero).predict(above), above, span)
        for zero in (False, True)
    )
    baselines = {"power_law": power_law, "last_size": _errors(last, above, span)}
    better = [name for name, e in baselines.items() if e.mean_rel_error < law.mean_rel_error]
    if better:
        values = ", ".join(f"{name} {baselines[name].mean_rel_error:.2%}" for name in better)
        notes["baseline_not_beaten"] = (
            f"On the held-out cells the law's mean relative error ({law.mean_rel_error:.2%}) is"
            f" above a baseline's ({values}): do not extrapolate with it."
        )
    return HeldOut(
        **law.model_dump(),
        n_cells=len(above),
        n_fitted=len(below),
        min_flops=float(above.flops.min()),
        max_fitted_flops=float(below.flops.max()),
        baselines=baselines,
        beats_baselines=not better,
    )


def _errors(predicted: Array | float, table: CellTable, span: float) -> LawErrors:
    error = np.abs(predicted - table.loss)
    relative = error / table.loss
    return LawErrors(
        mean_rel_error=float(relative.mean()),
        max_rel_error=float(relative.max()),
        mean_error_of_span=float(error.mean()) / span,
    )


def _intervals(values: dict[str, Array]) -> dict[str, Pair]:
    return {name: quantiles(x) for name, x in values.items()}


def _correlation(x: Array, y: Array) -> float | None:
    return float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) > 0 and np.ptp(y) > 0 else None


def _first(values: dict[str, Array]) -> dict[str, float]:
    return {name: float(value[0]) for name, value in values.items()}
