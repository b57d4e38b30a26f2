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


class Chinchilla:
    """theta [m, P] = (e, a, b, alpha, beta)."""

    name = "chinchilla"
    params = ("E", "A", "B", "alpha", "beta")

    def powers(self, theta: Array, cells: Cells) -> tuple[Array, Array]:
        """log N^-alpha and log D^-beta, [m, n]. Neither depends on E, A and B."""
        return -theta[:, 3, None] * cells.params, -theta[:, 4, None] * cells.data

    def log_loss(self, theta: Array, cells: Cells) -> Array:
        """Log loss, [m, n]."""
        return self.expand(theta, cells)[0]

    def expand(self, theta: Array, cells: Cells) -> tuple[Array, Array]:
        """Log loss [m, n] and its gradient [m, P, n]."""
        e, a, b, alpha, beta = (theta[:, i, None] for i in range(5))
        value, p0, p1, p2 = _mixture(e, a - alpha * cells.params, b - beta * cells.data)
        return value, np.stack([p0, p1, p2, -cells.params * p1, -cells.data * p2], 1)


class DataConstrained:
    """theta = (e, a, b, alpha, beta, log r_n, log r_d)."""

    name = "data_constrained"
    params = ("E", "A", "B", "alpha", "beta", "r_n", "r_d")

    def powers(self, theta: Array, cells: Cells) -> tuple[Array, Array]:
        # N' depends on A and B through N_opt, so N replaces it.
        d_eff, _, _ = _effective(cells.data, cells.unique, theta[:, 6, None])
        return -theta[:, 3, None] * cells.params, -theta[:, 4, None] * d_eff

    def log_loss(self, theta: Array, cells: Cells) -> Array:
        return self.expand(theta, cells)[0]

    def expand(self, theta: Array, cells: Cells) -> tuple[Array, Array]:
        e, a, b, alpha, beta, log_rn, log_rd = (theta[:, i, None] for i in range(7))
        n_opt, n_opt_slope = _optimal_size(theta, cells)
        n_eff, by_unique, by_rn = _effective(cells.params, n_opt, log_rn)
        d_eff, _, by_rd = _effective(cells.data, cells.unique, log_rd)
        value, p0, p1, p2 = _mixture(e, a - alpha * n_eff, b - beta * d_eff)
        slope = -(alpha * p1 * by_unique)[:, None] * n_opt_slope  # log N' through N_opt
        slope[:, 0] = p0
        slope[:, 1] += p1
        slope[:, 2] += p2
        slope[:, 3] -= p1 * n_eff
        slope[:, 4] -= p2 * d_eff
        slope[:, 5] = -alpha * p1 * by_rn
        slope[:, 6] = -beta * p2 * by_rd
        return value, slope


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


def _optimal_size(theta: Array, cells: Cells) -> tuple[Array, Array]:
    """h = log N_opt(U) = (log alpha + a - log beta - b + beta log U) / alpha [m, n], and its
    gradient [m, P, n].
    """
    alpha, beta = (np.maximum(theta[:, i, None], _ALPHA_MIN) for i in (3, 4))
    level = np.log(alpha / beta) + theta[:, 1, None] - theta[:, 2, None]
    h = (level + beta * cells.unique) / alpha
    slope = np.zeros((*theta.shape, len(cells.unique)))
    slope[:, 1], slope[:, 2] = 1 / alpha, -1 / alpha
    slope[:, 3], slope[:, 4] = (1 / alpha - h) / alpha, (cells.unique - 1 / beta) / alpha
    return h, slope


def _effective(log_x: Array, log_unique: Array, log_r: Array) -> tuple[Array, Array, Array]:
    """Log of the effective amount x' = U + U r (1 - exp(-(x/U - 1)/r)) of x, of which only U =
    exp(log_unique) is new, and its derivatives by log U and log r. All are [m, n].
    """
    r = np.exp(np.clip(log_r, *LOG_R))
    q = np.exp(np.clip(log_x - log_unique, 0.0, 50.0))
    decay = np.exp(-(q - 1) / r)
    grown = r * (1 - decay)
    value = np.minimum(log_x, log_unique) + np.log1p(grown)
    by_unique = 1 - q * decay / (1 + grown)  # 0 where q = 1
    return value, by_unique, (grown - decay * (q - 1)) / (1 + grown)


def loss_unit(family: str | None, tokenizer: str | None = None) -> str:
    """The unit of the loss of a family's cells, or of those of a tokenizer of images."""
    if family == "language":
        return "bits a byte"
    return "nats" if tokenizer is None else f"nats given tokenizers/{tokenizer}"
