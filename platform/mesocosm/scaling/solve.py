"""Every start of every resample of a fit, at once: batched Newton steps on the Huber loss of log
residuals.

A problem is one start under one row of weights (a bootstrap resample is a row: how often each cell
was drawn). It minimises

    sum_i w_i huber_delta(log L_i - f_i(theta))                the *sum*; with the mean, tolerances end a fit early (arXiv 2404.10102)

in units of delta, so that far residuals count |r|. A step solves with the exact Hessian where that
is positive definite, else with that of iteratively reweighted least squares, damped as Levenberg
and Marquardt do, per problem. The loss is nearly that of least absolute deviations, whose kinks
stop such methods far from the minimum: hence each problem goes down through wider deltas first.
Starts of one row that meet there (to 1e-6 in every coordinate) go on as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mesocosm.scaling.forms import Array, Cells, Form, outer

DELTA = 1e-3
FTOL, GTOL = 1e-10, 1e-6
"""A problem is done when a step promises and brings no more than FTOL, or no gradient is above
GTOL; scipy's `ftol` and `gtol` on the same objective.
"""
LIMIT, ROUND = 200, 25
"""Steps at most at the wanted delta; after each round those that are left close ranks."""
_WIDER = ((100.0, 30), (30.0, 10), (10.0, 10), (5.0, 8), (2.5, 8))
"""(times delta, steps at most) on the way, each until a step brings no more than _LOOSE."""
_LOOSE = 1e-4
_STRIDE = 2.0
"""A step changes no coordinate by more: a term that is nothing has no gradient, and would never
come back.
"""
_CELLS_AT_ONCE = 8192
"""Problems x cells of one chunk, whose arrays then stay in the cache."""


@dataclass(frozen=True)
class Solution:
    theta: Array
    """[B, S, P]."""
    objective: Array
    """[B, S], the sum of Huber losses of log residuals."""
    converged: NDArray[np.bool_]
    """[B, S]."""

    def best(self) -> tuple[Array, Array]:
        """(theta [B, P], objective [B]) of each row's best start."""
        at = np.argmin(self.objective, 1)
        rows = np.arange(len(at))
        return self.theta[rows, at], self.objective[rows, at]


def solve(
    form: Form,
    cells: Cells,
    log_loss: Array,
    weights: Array,
    starts: Array,
    *,
    delta: float = DELTA,
    fixed: Sequence[int] = (),
) -> Solution:
    """Minimise from `starts` [S, P] or [B, S, P] under each row of `weights` [B, n]; coordinates in
    `fixed` stay at the start's.

    `log_loss` is [n]. Deterministic; a problem's result does not depend on the others'.
    """
    rows, count = len(weights), starts.shape[-2]
    mean_n, mean_d = float(cells.params.mean()), float(cells.data.mean())
    shift = np.zeros((starts.shape[-1], starts.shape[-1]))
    shift[1, 3], shift[2, 4] = (
        -mean_n,
        -mean_d,
    )  # a - alpha log N = (a - alpha mean) - alpha (log N - mean): coordinates that hardly correlate
    move, back = np.eye(len(shift)) + shift, np.eye(len(shift)) - shift
    theta = np.broadcast_to(starts, (rows, *starts.shape[-2:])).reshape(rows * count, -1) @ move.T
    row = np.repeat(np.arange(rows), count)
    problem = _Problem(form, cells.shifted(mean_n, mean_d), log_loss, weights, tuple(fixed))
    theta = problem.levelled(theta, row)
    of, theta, row = _met(theta, row, np.arange(len(theta)))
    damping = np.full(len(theta), 1e-3)
    for number, (wider, steps) in enumerate(_WIDER):
        theta, _, _, damping = problem.descend(
            theta, row, delta * wider, damping, steps, _LOOSE if number else FTOL
        )
        if number == 0:
            of, theta, row = _met(theta, row, of)
            damping = np.full(len(theta), 1e-3)
    objective, converged = np.empty(len(theta)), np.zeros(len(theta), dtype=np.bool_)
    left = np.arange(len(theta))
    for _ in range(LIMIT // ROUND):
        theta[left], objective[left], converged[left], damping[left] = problem.descend(
            theta[left], row[left], delta, damping[left], ROUND, FTOL
        )
        left = left[~converged[left]]
    theta, objective, converged = (theta @ back.T)[of], objective[of] * delta, converged[of]
    return Solution(
        theta.reshape(rows, count, -1),
        objective.reshape(rows, count),
        converged.reshape(rows, count),
    )


def _met(
    theta: Array, row: NDArray[np.int64], of: NDArray[np.int64]
) -> tuple[NDArray[np.int64], Array, NDArray[np.int64]]:
    """(which problem each start is now, theta, row) once problems of one row that stand at the same
    place, to 1e-6, go on as one.
    """
    places = np.column_stack([row, np.round(theta, 6)])
    _, first, now = np.unique(places, axis=0, return_index=True, return_inverse=True)
    return now.reshape(-1)[of], theta[first], row[first]


@dataclass(frozen=True)
class _State:
    """Where m problems stand, in units of delta."""

    theta: Array
    objective: Array
    gradient: Array
    hessian: Array
    """Exact."""
    reweighted: Array
    """Of iteratively reweighted least squares: positive, and above the objective's own."""

    def take(self, at: NDArray[np.bool_]) -> _State:
        return _State(*(values[at] for values in self._all()))

    def put(self, at: NDArray[np.int64], other: _State) -> None:
        for values, new in zip(self._all(), other._all(), strict=True):
            values[at] = new

    def where(self, at: NDArray[np.bool_], other: _State) -> _State:
        """The other's at `at`, this one's elsewhere."""
        return _State(
            *(
                np.where(at.reshape(-1, *[1] * (new.ndim - 1)), new, old)
                for old, new in zip(self._all(), other._all(), strict=True)
            )
        )

    def _all(self) -> tuple[Array, ...]:
        return self.theta, self.objective, self.gradient, self.hessian, self.reweighted


@dataclass(frozen=True)
class _Problem:
    form: Form
    cells: Cells
    log_loss: Array
    weights: Array
    """[B, n]; a problem's `row` says which."""
    fixed: tuple[int, ...]

    def levelled(self, theta: Array, row: NDArray[np.int64]) -> Array:
        """`theta` with E, A and B, all above 0, of about the least squares of relative errors for
        its exponents: no term starts as nothing.
        """
        return np.concatenate(
            [self._levelled(theta[at], self.weights[row[at]]) for at in self._chunks(len(theta))]
        )

    def _levelled(self, theta: Array, weight: Array) -> Array:
        n_power, d_power = self.form.powers(theta, self.cells)
        terms = np.stack([np.zeros_like(n_power), n_power, d_power], 1) - self.log_loss
        top = terms.max(2)
        terms = np.exp(terms - top[:, :, None])
        square = outer(terms, weight)
        toward = np.einsum("mkn,mn->mk", terms, weight)
        level = np.ones((len(theta), 3)) / 3
        for i in self.fixed:
            if i < 3:
                level[:, i] = np.exp(theta[:, i] + top[:, i])
        for _ in range(40):  # the multiplicative rule of non-negative least squares
            level *= toward / np.einsum("mkl,ml->mk", square, level)
        out = theta.copy()
        free = [i for i in range(3) if i not in self.fixed]
        out[:, free] = (np.log(level) - top)[:, free]
        return out

    def descend(
        self,
        theta: Array,
        row: NDArray[np.int64],
        delta: float,
        damping: Array,
        limit: int,
        ftol: float,
    ) -> tuple[Array, Array, NDArray[np.bool_], Array]:
        """(theta [m, P], objective [m], converged [m], damping [m]) after at most `limit` steps
        from `theta`.
        """
        parts = [
            self._descend(theta[at], self.weights[row[at]], delta, damping[at], limit, ftol)
            for at in self._chunks(len(theta))
        ]
        ends, done, damped = zip(*parts, strict=True)
        return (
            np.concatenate([end.theta for end in ends]),
            np.concatenate([end.objective for end in ends]),
            np.concatenate(done),
            np.concatenate(damped),
        )

    def _chunks(self, count: int) -> list[slice]:
        size = max(1, _CELLS_AT_ONCE // len(self.log_loss))
        return [slice(begin, begin + size) for begin in range(0, max(count, 1), size)]

    def _descend(
        self, theta: Array, weight: Array, delta: float, damping: Array, limit: int, ftol: float
    ) -> tuple[_State, NDArray[np.bool_], Array]:
        end, converged, end_damping = (
            self.state(theta, weight, delta),
            np.zeros(len(theta), dtype=np.bool_),
            damping.copy(),
        )
        left, state = np.arange(len(theta)), end
        for _ in range(limit):
            step, promised = _step(state, damping)
            new = self.state(state.theta + step, weight, delta)
            gained = state.objective - new.objective
            better = gained >= 0  # never where the objective is not finite
            state = state.where(better, new)
            done = (np.abs(gained) <= ftol) & (promised <= ftol) & (damping <= 1.0)
            done |= np.abs(state.gradient).max(1) <= GTOL
            done |= damping > 1e14  # no step, however small, goes down
            ratio = gained / promised
            kept = damping * np.where(ratio > 0.75, 0.1, np.where(ratio > 0.25, 0.4, 2.0))
            damping = np.maximum(np.where(better, kept, np.maximum(5 * damping, 1e-3)), 1e-12)
            if done.any():
                end.put(left[done], state.take(done))
                converged[left[done]], end_damping[left[done]] = True, damping[done]
                keep = ~done
                left, state, damping, weight = (
                    left[keep],
                    state.take(keep),
                    damping[keep],
                    weight[keep],
                )
                if not len(left):
                    break
        end.put(left, state)
        end_damping[left] = damping
        return end, converged, end_damping

    def state(self, theta: Array, weight: Array, delta: float) -> _State:
        at = self.form.expand(theta, self.cells)
        residual = self.log_loss - at.value
        size = np.abs(residual)
        near = np.minimum(size, delta)
        objective = np.einsum("mn,mn->m", weight * near, size - near / 2) / delta
        reach = weight / np.maximum(size, delta)
        pull = reach * residual
        gradient = -np.einsum("mpn,mn->mp", at.slope, pull)
        hessian = outer(at.slope, np.where(size <= delta, reach + pull, pull)) - at.curvature(pull)
        reweighted = outer(at.slope, reach)
        for i in self.fixed:
            gradient[:, i] = 0.0
            for matrix in (hessian, reweighted):
                matrix[:, i], matrix[:, :, i] = 0.0, 0.0
                matrix[:, i, i] = 1.0
        return _State(theta, objective, gradient, hessian, reweighted)


def _step(state: _State, damping: Array) -> tuple[Array, Array]:
    """(step [m, P], the decrease that its damped quadratic model promises [m], above 0)."""
    diagonal = damping[:, None] * (np.diagonal(state.reweighted, axis1=1, axis2=2) + 1e-12)
    step, positive = _solve_positive(state.hessian, diagonal, state.gradient)
    if not positive.all():
        other = ~positive
        step[other] = _solve_positive(
            state.reweighted[other], diagonal[other], state.gradient[other]
        )[0]
    part = np.minimum(1.0, _STRIDE / np.maximum(np.abs(step).max(1), 1e-300))
    promised = part * (1 - part / 2) * np.einsum("mp,mp->m", step, state.gradient)
    return -part[:, None] * step, promised + 1e-300


def _solve_positive(
    matrix: Array, diagonal: Array, right: Array
) -> tuple[Array, NDArray[np.bool_]]:
    """(x [m, P] with (matrix + diag) x = right, where it is positive definite [m]) by LDL^T, over
    all m at once: LAPACK costs a call each.
    """
    p = matrix.shape[1]
    a = np.ascontiguousarray(matrix.transpose(1, 2, 0))
    x = right.T.copy()
    d = np.empty((p, len(matrix)))
    positive = np.ones(len(matrix), dtype=np.bool_)
    for j in range(p):
        pivot = a[j, j] + diagonal[:, j]
        for k in range(j):
            pivot -= a[j, k] ** 2 * d[k]
        good = pivot > 1e-14 * np.abs(a[j, j]) + 1e-300
        positive &= good
        d[j] = np.where(good, pivot, 1.0)
        for i in range(j + 1, p):
            entry = a[i, j]
            for k in range(j):
                entry = entry - a[i, k] * a[j, k] * d[k]
            a[i, j] = entry / d[j]
        for k in range(j):
            x[j] -= a[j, k] * x[k]
    x /= d
    for j in range(p - 2, -1, -1):
        for i in range(j + 1, p):
            x[j] -= a[i, j] * x[i]
    return x.T.copy(), positive
