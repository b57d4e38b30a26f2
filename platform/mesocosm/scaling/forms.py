"""Loss as a function of parameters N, data D and unique data U: two laws behind one interface.

`chinchilla` (Hoffmann et al. 2022, arXiv 2203.15556, approach 3):

    L = E + A/N^alpha + B/D^beta

`data_constrained` (Muennighoff et al. 2023, arXiv 2305.16264):

    L = E + A/N'^alpha + B/D'^beta
    D' = U_D + U_D r_d (1 - exp(-R_D / r_d)),  U_D = min(U, D),           R_D = D/U_D - 1
    N' = U_N + U_N r_n (1 - exp(-R_N / r_n)),  U_N = min(N, N_opt(U)),    R_N = N/U_N - 1

N_opt(U) is the size for which U is the compute-optimal data: alpha A / N^alpha = beta B / U^beta.
Without repeats and up to that size the two forms are equal. Both are fitted in logarithms: theta =
(e, a, b, alpha, beta[, log r_n, log r_d]) with E = exp(e), A = exp(a), B = exp(b) and log L =
log(exp(e) + exp(a - alpha log N') + exp(b - beta log D')).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

NOTHING = -700.0
"""The logarithm of a term that is zero: `e` where E = 0."""
_ALPHA_MIN = 0.02
"""N_opt(U) is undefined at alpha = 0, which starts and trial steps may touch."""
LOG_R = (-10.0, 12.0)
"""Bounds of log r_n and log r_d. Beyond them a half-life is effectively zero or infinite."""


@dataclass(frozen=True)
class Cells:
    """Natural logarithms of N, D and U, each [n]. `unique` equals `data` without repeats."""

    params: Array
    data: Array
    unique: Array

    def shifted(self, params: float, data: float) -> Cells:
        return Cells(self.params - params, self.data - data, self.unique - data)


@dataclass(frozen=True)
class Expansion:
    """Log loss and its derivatives at m thetas of P coordinates, for n cells."""

    value: Array
    """[m, n]."""
    slope: Array
    """[m, P, n]."""
    curvature: Callable[[Array], Array]
    """Weights [m, n] -> sum over cells of weight x (hessian + slope slope^T), [m, P, P]."""


class Chinchilla:
    """theta [m, P] = (e, a, b, alpha, beta)."""

    name = "chinchilla"
    params = ("E", "A", "B", "alpha", "beta")

    def powers(self, theta: Array, cells: Cells) -> tuple[Array, Array]:
        """log N^-alpha and log D^-beta, [m, n]. Neither depends on E, A and B."""
        return -theta[:, 3, None] * cells.params, -theta[:, 4, None] * cells.data

    def log_loss(self, theta: Array, cells: Cells) -> Array:
        """Log loss, [m, n]."""
        e, a, b, alpha, beta = (theta[:, i, None] for i in range(5))
        return _mixture(e, a - alpha * cells.params, b - beta * cells.data)[0]

    def expand(self, theta: Array, cells: Cells) -> Expansion:
        e, a, b, alpha, beta = (theta[:, i, None] for i in range(5))
        x, z = cells.params, cells.data
        value, p0, p1, p2 = _mixture(e, a - alpha * x, b - beta * z)
        slope = np.stack([p0, p1, p2, -x * p1, -z * p2], 1)
        ones = np.ones_like(x)
        n_powers, d_powers = np.stack([ones, -x, x * x], 1), np.stack([ones, -z, z * z], 1)

        def curvature(weight: Array) -> Array:
            out = np.zeros((len(theta), 5, 5))
            out[:, 0, 0] = np.einsum("mn,mn->m", weight, p0)
            for share, powers, level, power in ((p1, n_powers, 1, 3), (p2, d_powers, 2, 4)):
                sums = (weight * share) @ powers
                out[:, level, level], out[:, power, power] = sums[:, 0], sums[:, 2]
                out[:, level, power] = out[:, power, level] = sums[:, 1]
            return out

        return Expansion(value, slope, curvature)


class DataConstrained:
    """theta = (e, a, b, alpha, beta, log r_n, log r_d)."""

    name = "data_constrained"
    params = ("E", "A", "B", "alpha", "beta", "r_n", "r_d")

    def powers(self, theta: Array, cells: Cells) -> tuple[Array, Array]:
        # N' depends on A and B through N_opt, so that N stands for it.
        d_eff = _Effective(cells.data, cells.unique, theta[:, 6, None]).value
        return -theta[:, 3, None] * cells.params, -theta[:, 4, None] * d_eff

    def log_loss(self, theta: Array, cells: Cells) -> Array:
        e, a, b, alpha, beta, log_rn, log_rd = (theta[:, i, None] for i in range(7))
        n_eff = _Effective(cells.params, _OptimalSize(theta, cells).value, log_rn).value
        d_eff = _Effective(cells.data, cells.unique, log_rd).value
        return _mixture(e, a - alpha * n_eff, b - beta * d_eff)[0]

    def expand(self, theta: Array, cells: Cells) -> Expansion:
        e, a, b, alpha, beta, log_rn, log_rd = (theta[:, i, None] for i in range(7))
        n_opt = _OptimalSize(theta, cells)
        n_eff = _Effective(cells.params, n_opt.value, log_rn)
        d_eff = _Effective(cells.data, cells.unique, log_rd)
        value, p0, p1, p2 = _mixture(e, a - alpha * n_eff.value, b - beta * d_eff.value)
        m, n = value.shape
        n_opt_slope = n_opt.slope()
        n_slope = n_eff.d_unique[:, None] * n_opt_slope  # of log N'
        n_slope[:, 5] = n_eff.d_r
        s_slope = -alpha[:, None] * n_slope  # of s = a - alpha log N'
        s_slope[:, 1] += 1.0
        s_slope[:, 3] -= n_eff.value
        # Of t = b - beta log D', by b, beta and log r_d, on which alone it depends.
        t_slope = np.stack([np.ones((m, n)), -d_eff.value, -beta * d_eff.d_r], 1)
        slope = np.empty((m, 7, n))
        slope[:, 0] = p0
        np.multiply(p1[:, None], s_slope[:, 1:6], out=slope[:, 1:6])
        slope[:, 2] += p2
        slope[:, 4] += p2 * t_slope[:, 1]
        np.multiply(p2, t_slope[:, 2], out=slope[:, 6])

        def curvature(weight: Array) -> Array:
            w1, w2 = weight * p1, weight * p2
            out = outer(s_slope, w1)
            out[:, 2::2, 2::2] += outer(t_slope, w2)
            out[:, 0, 0] += (weight * p0).sum(1)
            # Second derivatives of s by (a, b, alpha, beta, log r_n) ...
            cross = np.einsum("mn,mpn->mp", w1, n_slope)
            out[:, 3] -= cross
            out[:, :, 3] -= cross
            inner = outer(n_opt_slope, w1 * n_eff.d_unique2)
            inner += n_opt.curvature(w1 * n_eff.d_unique, n_opt_slope)
            mixed = np.einsum("mn,mpn->mp", w1 * n_eff.d_unique_r, n_opt_slope)
            inner[:, 5] += mixed
            inner[:, :, 5] += mixed
            inner[:, 5, 5] += (w1 * n_eff.d_r2).sum(1)
            out -= alpha[:, None] * inner
            # ... and of t by (beta, log r_d).
            pair = (w2 * d_eff.d_r).sum(1)
            out[:, 4, 6] -= pair
            out[:, 6, 4] -= pair
            out[:, 6, 6] -= beta[:, 0] * (w2 * d_eff.d_r2).sum(1)
            return out

        return Expansion(value, slope, curvature)


Form = Chinchilla | DataConstrained
FORMS: dict[str, Form] = {form.name: form for form in (Chinchilla(), DataConstrained())}


def outer(vectors: Array, weight: Array) -> Array:
    """Sum over cells of weight [m, n] x vector vector^T, of vectors [m, P, n]: [m, P, P]."""
    return np.matmul(vectors * weight[:, None], vectors.transpose(0, 2, 1))


def _mixture(e: Array, s: Array, t: Array) -> tuple[Array, Array, Array, Array]:
    """log(exp e + exp s + exp t) [m, n] and the three terms' shares of the sum."""
    top = np.maximum(np.maximum(s, t), e)
    p0, p1, p2 = np.exp(e - top), np.exp(s - top), np.exp(t - top)
    total = p0 + p1 + p2
    for share in (p0, p1, p2):
        share /= total
    top += np.log(total)
    return top, p0, p1, p2


class _OptimalSize:
    """h = log N_opt(U) = (log alpha + a - log beta - b + beta log U) / alpha [m, n]."""

    def __init__(self, theta: Array, cells: Cells) -> None:
        self.theta, self.unique = theta, cells.unique
        self.alpha, self.beta = (np.maximum(theta[:, i, None], _ALPHA_MIN) for i in (3, 4))
        level = np.log(self.alpha / self.beta) + theta[:, 1, None] - theta[:, 2, None]
        self.value = (level + self.beta * cells.unique) / self.alpha

    def slope(self) -> Array:
        """The gradient of h, [m, P, n]."""
        alpha, beta = self.alpha, self.beta
        slope = np.zeros((*self.theta.shape, len(self.unique)))
        slope[:, 1], slope[:, 2] = 1 / alpha, -1 / alpha
        slope[:, 3], slope[:, 4] = (
            (1 / alpha - self.value) / alpha,
            (self.unique - 1 / beta) / alpha,
        )
        return slope

    def curvature(self, weight: Array, slope: Array) -> Array:
        """Sum over cells of weight [m, n] x the hessian of h, [m, P, P]."""
        alpha, beta, total = self.alpha[:, 0], self.beta[:, 0], weight.sum(1)
        by_alpha, by_beta = (np.einsum("mn,mn->m", weight, slope[:, i]) for i in (3, 4))
        out = np.zeros((*self.theta.shape, self.theta.shape[1]))
        out[:, 3, 3] = -total / alpha**3 - 2 * by_alpha / alpha
        out[:, 4, 4] = total / (alpha * beta**2)
        for i, entry in ((1, -total / alpha**2), (2, total / alpha**2), (4, -by_beta / alpha)):
            out[:, 3, i] = out[:, i, 3] = entry
        return out


class _Effective:
    """Log of the effective amount x' = U + U r (1 - exp(-(x/U - 1)/r)) of x, of which only U =
    exp(log_unique) is new, with derivatives by log U and log r. All are [m, n].
    """

    def __init__(self, log_x: Array, log_unique: Array, log_r: Array) -> None:
        r = np.exp(np.clip(log_r, *LOG_R))
        excess = log_x - log_unique
        repeated = excess > 0
        q = np.exp(np.clip(excess, 0.0, 50.0))
        repeats = q - 1
        decay = np.exp(-repeats / r)
        grown = r * (1 - decay)
        g, m = 1 + grown, q * decay
        g_r = grown - decay * repeats
        share, r_share, by_r = m / g, g_r / g, repeats / r
        self.value = np.minimum(log_x, log_unique) + np.log(g)
        self.d_unique = 1 - share  # 0 where q = 1
        self.d_unique2 = repeated * (share * (1 - q / r) - share**2)
        self.d_r = r_share
        self.d_r2 = (g_r - decay * repeats * by_r) / g - r_share**2
        self.d_unique_r = share * (r_share - by_r)
