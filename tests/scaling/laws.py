"""Synthetic tables with known truth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mesocosm.scaling.forms import FORMS, Cells
from mesocosm.scaling.law import theta_of

TRUTH = {"E": 0.3, "A": 60.0, "B": 8.0, "alpha": 0.5, "beta": 0.4}
SIZES = tuple(np.geomspace(1e4, 3e6, 7))
DATA = tuple(np.geomspace(1e4, 1e6, 6))
Rows = list[dict[str, Any]]


def cells_of(params: ArrayLike, data: ArrayLike, unique: ArrayLike | None = None) -> Cells:
    columns = (params, data, data if unique is None else unique)
    return Cells(*(np.log(np.atleast_1d(np.asarray(x, dtype=float))) for x in columns))


def loss(
    params: ArrayLike,
    data: ArrayLike,
    truth: dict[str, float] = TRUTH,
    unique: ArrayLike | None = None,
) -> np.ndarray:
    form = "data_constrained" if "r_d" in truth else "chinchilla"
    cells = cells_of(params, data, unique)
    return np.exp(FORMS[form].log_loss(theta_of(form, truth), cells))[0]


def grid(
    rng: np.random.Generator | None = None,
    noise: float = 0.0,
    *,
    truth: dict[str, float] = TRUTH,
    sizes: Sequence[float] = SIZES,
    data: Sequence[float] = DATA,
    seeds: int = 1,
    trunk_noise: float = 0.0,
) -> Rows:
    """Rows of N x D x seeds; noise is relative, `trunk_noise` shared by one size and seed."""
    normal: Callable[[], float] = rng.normal if rng is not None else float
    rows = []
    for i, n in enumerate(sizes):
        for seed in range(seeds):
            shared = trunk_noise * normal()
            for d in data:
                value = loss(n, d, truth).item() * np.exp(noise * normal() + shared)
                row = {"params": n, "data": d, "loss": value, "seed": seed, "trunk": f"{i}-{seed}"}
                rows.append(row)
    return rows


def budgets(flops: Iterable[float], per_budget: int = 7, truth: dict[str, float] = TRUTH) -> Rows:
    """IsoFLOP rows, 6 N D = C, of sizes a factor 1.5 apart around the optimum."""
    alpha, beta = truth["alpha"], truth["beta"]
    g = (alpha * truth["A"] / (beta * truth["B"])) ** (1 / (alpha + beta))
    steps = 1.5 ** np.arange(-(per_budget // 2), per_budget // 2 + 1)
    rows = []
    for c in flops:
        for n in g * (c / 6) ** (beta / (alpha + beta)) * steps:
            d = c / 6 / n
            rows.append({"params": n, "data": d, "loss": loss(n, d, truth).item(), "flops": c})
    return rows


def write(path: Path, rows: Rows, without: Sequence[str] = ()) -> Path:
    columns = [name for name in rows[0] if name not in without]
    lines = [",".join(str(row[name]) for name in columns) for row in rows]
    path.write_text("\n".join([",".join(columns), *lines, ""]))
    return path
