"""The best parameters of one form on one table, and under each of its resamples."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from mesocosm.errors import UsageError
from mesocosm.scaling.forms import FORMS, NOTHING, Array, Form, Ints
from mesocosm.scaling.solve import DELTA, solve
from mesocosm.scaling.table import CellTable, levels

RESAMPLES = 300
EXPONENTS = (0.15, 0.4, 1.0)
"""Starts of alpha and beta, in every pair. The solver sets E, A and B to the losses' level."""
REPEATS = (3.0, 30.0)
"""Starts of r_n and r_d, in every pair."""
COARSE = (0.2, 0.7)
"""alpha = beta in the starts of the data-constrained form's resamples."""
OUTLIER = 5.0
"""Robust standard deviations. A normal residual is beyond with a probability of 6e-7."""
JUDGED = 3
"""Rows a parameter that a fit needs for outliers: with fewer it follows them too closely."""


@dataclass(frozen=True)
class Fit:
    """A form fitted to a table."""

    form: Form
    theta: Array
    """[1, P]."""
    objective: float
    residual: Array
    """Residuals of log loss, [n]."""

    def predict(self, table: CellTable) -> Array:
        return np.exp(self.form.log_loss(self.theta, table.cells())[0])

    def deviations(self) -> Array:
        """Residuals [n] in robust standard deviations of at least delta.

        A fit of P parameters that nearly minimises absolute residuals passes through about P cells.
        The deviation is therefore the median of the others, widened by n / (n - P).
        """
        size, parameters = np.abs(self.residual), self.theta.shape[1]
        free, middle = len(size) - parameters, 0.0
        if free > 0:
            middle = float(np.median(np.sort(size)[parameters:])) * len(size) / free
        return size / max(1.4826 * middle, DELTA)

    def outliers(self) -> Ints:
        if len(self.residual) < JUDGED * self.theta.shape[1]:
            return np.zeros(0, dtype=np.int64)
        return np.flatnonzero(self.deviations() > OUTLIER)


def form_of(table: CellTable) -> Form:
    return FORMS["data_constrained" if table.repeated else "chinchilla"]


def check(table: CellTable, form: Form) -> None:
    """Raise UsageError where `table` does not determine the parameters of `form`."""
    log, parameters = table.cells(), len(form.params)
    numbers = [levels(np.exp(values)) for values in (log.params, log.data, log.unique)]
    cells = len(np.unique(np.stack(numbers, 1), axis=0))
    if cells <= parameters:
        text = f"{table.name} has {cells} distinct cells for the {parameters} parameters of"
        raise UsageError(f"{text} {form.name}; train at least {parameters + 1}")
    for name, values in (("params", table.params), ("data", table.data)):
        first = np.unique(levels(values), return_index=True)[1]
        if len(first) < 3:
            listed = ", ".join(f"{values[i]:g}" for i in first)
            text = f"{table.name} has {len(first)} distinct {name} ({listed}), too few to separate"
            raise UsageError(f"{text} its exponent from E; train at least 3")
    if abs(np.corrcoef(log.params, log.data)[0, 1]) > 1 - 1e-6:
        text = f"{table.name}: data is a power of params in every cell, so that their exponents"
        raise UsageError(f"{text} cannot be separated; vary data at one size")


def starts_of(form: Form) -> Array:
    """[S, P]: every pair of exponents (times every pair of r_n and r_d)."""
    pairs = itertools.product(EXPONENTS, repeat=2)
    halves = itertools.product(np.log(REPEATS), repeat=len(form.params) - 5)
    return np.array([(0, 0, 0, *pair, *rest) for rest, pair in itertools.product(halves, pairs)])


def resample_starts(form: Form) -> Array:
    """The starts of the resamples, in addition to the whole table's optimum."""
    if form.name == "chinchilla":
        return starts_of(form)
    return np.array([(0, 0, 0, x, x, np.log(10), np.log(10)) for x in COARSE])


def best_fit(
    table: CellTable, form: Form, starts: Array | None = None, *, without_e: bool = False
) -> Fit:
    """The best fit of all starts (by default `starts_of`); with `without_e` E is 0."""
    starts, weights = starts_of(form) if starts is None else starts, np.ones((1, len(table)))
    theta, objective = draws(table, form, weights, starts, without_e=without_e)
    residual = np.log(table.loss) - form.log_loss(theta, table.cells())[0]
    return Fit(form, theta, float(objective[0]), residual)


def draws(
    table: CellTable, form: Form, weights: Array, starts: Array, *, without_e: bool = False
) -> tuple[Array, Array]:
    """(theta [B, P], objective [B]) of the best start under each row of weights [B, n]."""
    if without_e:
        starts = starts.copy()
        starts[..., 0] = NOTHING
    weights, fixed = weights * table.weight, (0,) if without_e else ()
    return solve(form, table.cells(), np.log(table.loss), weights, starts, fixed=fixed).best()


def resample(table: CellTable, seed: int) -> tuple[Array, Ints]:
    """(how often each group was drawn [B, G], each row's group [n]).

    A resample with fewer than three sizes or data sizes determines nothing and is drawn again.
    """
    groups = np.unique(table.group, return_inverse=True)[1]
    total, left = int(groups.max()) + 1, np.arange(RESAMPLES)
    rng = np.random.default_rng([seed, total])
    counts, shares = np.empty((RESAMPLES, total)), np.full(total, 1 / total)
    for _ in range(200):
        counts[left] = rng.multinomial(total, shares, size=len(left))
        drawn, enough = counts[left][:, groups] > 0, np.ones(len(left), dtype=np.bool_)
        for numbers in (levels(table.params), levels(table.data)):
            enough &= sum(drawn[:, numbers == i].any(1) for i in np.unique(numbers)) >= 3
        left = left[~enough]
        if not len(left):
            break
    counts[left] = 1.0
    return counts, groups
