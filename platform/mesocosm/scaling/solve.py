"""Solves all starts of all resamples of a fit at once: batched steps of iteratively reweighted
least squares on the Huber loss of log residuals.

A problem is one start under one row of weights (a bootstrap resample is a row: how often each cell
was drawn). It minimises

    sum_i w_i huber_delta(log L_i - f_i(theta))

in units of delta, so that residuals beyond it count |r|. It is the sum: with the mean, tolerances
end a fit early (arXiv 2404.10102). Steps have Levenberg-Marquardt damping per problem. The loss is
close to least absolute deviations, whose kinks stop such methods far from the minimum. Each problem
therefore first descends with wider deltas. Starts of one row that reach the same point (to 1e-6 in
every coordinate) continue as one problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mesocosm.scaling.forms import Array, Cells, Form, Ints, Mask, outer

DELTA = 1e-3
FTOL, GTOL = 1e-13, 1e-6
"""A problem has converged when a step promises and brings at most FTOL, or no gradient is above
GTOL. The last steps converge linearly, so that FTOL is small.
"""
LIMIT, ROUND = 200, 10
"""Most steps at the final delta. After each round the arrays shrink to the unconverged problems."""
_WIDER = ((100.0, 30), (30.0, 10), (10.0, 10), (5.0, 8), (2.5, 8))
"""(multiple of delta, most steps) of each earlier stage, which ends at a step of _LOOSE."""
_LOOSE = 1e-4
_STRIDE = 2.0
"""The most that a step changes a coordinate: a term that becomes zero has no gradient and would
never come back.
"""
_CHUNK = 8192
"""Problems x cells of one chunk, whose arrays then stay in the cache."""


@dataclass(frozen=True)
class Solution:
    """The ends of all problems: theta [B, S, P], objective and converged [B, S]."""

    theta: Array
    objective: Array
    converged: Mask

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
    fixed: Sequence[int] = (),
) -> Solution:
    """Minimise from every start under every row of weights. Deterministic.

    A problem's result does not depend on the other problems.

    Args:
        form: the form of the law.
        cells: n cells.
        log_loss: their log losses, [n].
        weights: [B, n].
        starts: [S, P].
        fixed: coordinates that stay at the start's value.
    """
    rows, (count, size) = len(weights), starts.shape
    mean_n, mean_d = float(cells.params.mean()), float(cells.data.mean())
    # a - alpha log N = (a - alpha mean) - alpha (log N - mean): these coordinates hardly correlate.
    shift = np.zeros((size, size))
    shift[1, 3], shift[2, 4] = -mean_n, -mean_d
    theta = np.tile(starts @ (np.eye(size) + shift).T, (rows, 1))
    row = np.repeat(np.arange(rows), count)
    problem = _Problem(form, cells.shifted(mean_n, mean_d), log_loss, weights, tuple(fixed))
    theta = np.concatenate(
        [problem.levelled(theta[at], weights[row[at]]) for at in problem.chunks(len(theta))]
    )
    index, theta, row = _merged(theta, row, np.arange(len(theta)))
    damping = np.full(len(theta), 1e-3)
    for stage, (wider, steps) in enumerate(_WIDER):
        ftol = _LOOSE if stage else FTOL
        theta, _, _, damping = problem.descend(theta, row, DELTA * wider, damping, steps, ftol)
        if stage == 0:
            index, theta, row = _merged(theta, row, index)
            damping = np.full(len(theta), 1e-3)
    theta, objective, converged, _ = problem.descend(theta, row, DELTA, damping, LIMIT, FTOL)
    theta = theta @ (np.eye(size) - shift).T
    return Solution(
        theta[index].reshape(rows, count, size),
        (objective * DELTA)[index].reshape(rows, count),
        converged[index].reshape(rows, count),
    )


def _merged(theta: Array, row: Ints, index: Ints) -> tuple[Ints, Array, Ints]:
    """Merge problems of one row that stand at the same point, to 1e-6.

    `index` maps each start to its problem. Returns the new (index, theta, row).
    """
    points = np.column_stack([row, np.round(theta, 6)])
    _, first, new = np.unique(points, axis=0, return_index=True, return_inverse=True)
    return new.reshape(-1)[index], theta[first], row[first]


class _State(NamedTuple):
    """m problems at their current points, in units of delta: theta [m, P], the objective [m], its
    gradient [m, P] and the Hessian [m, P, P] of iteratively reweighted least squares.
    """

    theta: Array
    objective: Array
    gradient: Array
    hessian: Array

    def where(self, at: Mask, other: _State) -> _State:
        """The other's problems at `at`, this one's elsewhere."""
        pairs = zip(self, other, strict=True)
        return _State(
            *(np.where(at.reshape(-1, *[1] * (new.ndim - 1)), new, old) for old, new in pairs)
        )


@dataclass(frozen=True)
class _Problem:
    form: Form
    cells: Cells
    log_loss: Array
    weights: Array
    """[B, n]. Each problem's `row` selects one."""
    fixed: tuple[int, ...]

    def chunks(self, count: int) -> list[slice]:
        size = max(1, _CHUNK // len(self.log_loss))
        return [slice(begin, begin + size) for begin in range(0, count, size)]

    def levelled(self, theta: Array, weight: Array) -> Array:
        """`theta` with E, A and B set by least squares of relative errors for its exponents.

        All three are above 0, so that no term starts as nothing.
        """
        n_power, d_power = self.form.powers(theta, self.cells)
        terms = np.stack([np.zeros_like(n_power), n_power, d_power], 1) - self.log_loss
        top = terms.max(2)
        terms = np.exp(terms - top[:, :, None])
        square = outer(terms, weight)
        right = np.einsum("mkn,mn->mk", terms, weight)
        level = np.ones((len(theta), 3)) / 3
        for i in self.fixed:
            level[:, i] = np.exp(theta[:, i] + top[:, i])
        for _ in range(40):  # the multiplicative rule of non-negative least squares
            level *= right / np.einsum("mkl,ml->mk", square, level)
        out = theta.copy()
        free = [i for i in range(3) if i not in self.fixed]
        out[:, free] = (np.log(level) - top)[:, free]
        return out

    def descend(
        self, theta: Array, row: Ints, delta: float, damping: Array, limit: int, ftol: float
    ) -> tuple[Array, Array, Mask, Array]:
        """(theta [m, P], objective [m], converged [m], damping [m]) after at most `limit` steps."""
        theta, damping, objective = theta.copy(), damping.copy(), np.empty(len(theta))
        converged, left = np.zeros(len(theta), dtype=np.bool_), np.arange(len(theta))
        for begin in range(0, limit, ROUND):
            steps = min(ROUND, limit - begin)
            for chunk in self.chunks(len(left)):
                at = left[chunk]
                theta[at], objective[at], converged[at], damping[at] = self._steps(
                    theta[at], self.weights[row[at]], delta, damping[at], steps, ftol
                )
            left = left[~converged[left]]
        return theta, objective, converged, damping

    def _steps(
        self, theta: Array, weight: Array, delta: float, damping: Array, count: int, ftol: float
    ) -> tuple[Array, Array, Mask, Array]:
        state, converged = self.state(theta, weight, delta), np.zeros(len(theta), dtype=np.bool_)
        for _ in range(count):
            step, promised = _step(state, damping)
            new = self.state(state.theta + step, weight, delta)
            gained = state.objective - new.objective
            better = gained >= 0  # false where the objective is not finite
            state = state.where(better & ~converged, new)
            done = (np.abs(gained) <= ftol) & (promised <= ftol) & (damping <= 1.0)
            done |= np.abs(state.gradient).max(1) <= GTOL
            done |= damping > 1e14  # no step descends, however small
            ratio = gained / promised
            accepted = damping * np.where(ratio > 0.75, 0.1, np.where(ratio > 0.25, 0.4, 2.0))
            changed = np.where(better, accepted, np.maximum(5 * damping, 1e-3))
            damping = np.where(converged, damping, np.maximum(changed, 1e-12))
            converged |= done
            if converged.all():
                break
        return state.theta, state.objective, converged, damping

    def state(self, theta: Array, weight: Array, delta: float) -> _State:
        """The objective and its derivatives at `theta` [m, P] under `weight` [m, n]."""
        value, slope = self.form.expand(theta, self.cells)
        residual = self.log_loss - value
        size = np.abs(residual)
        near = np.minimum(size, delta)
        objective = np.einsum("mn,mn->m", weight * near, size - near / 2) / delta
        reach = weight / np.maximum(size, delta)
        gradient = -np.einsum("mpn,mn->mp", slope, reach * residual)
        hessian = outer(slope, reach)
        for i in self.fixed:
            gradient[:, i], hessian[:, i], hessian[:, :, i], hessian[:, i, i] = 0.0, 0.0, 0.0, 1.0
        return _State(theta, objective, gradient, hessian)


def _step(state: _State, damping: Array) -> tuple[Array, Array]:
    """(step [m, P], the decrease [m] above 0 that its damped quadratic model promises)."""
    diagonal = damping[:, None] * (np.diagonal(state.hessian, axis1=1, axis2=2) + 1e-12)
    matrix = state.hessian + diagonal[:, :, None] * np.eye(diagonal.shape[1])
    step = np.linalg.solve(matrix, state.gradient[:, :, None])[:, :, 0]
    part = np.minimum(1.0, _STRIDE / np.maximum(np.abs(step).max(1), 1e-300))
    promised = part * (1 - part / 2) * np.einsum("mp,mp->m", step, state.gradient)
    return -part[:, None] * step, promised + 1e-300
