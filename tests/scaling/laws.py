"""Synthetic tables with known truth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mesocosm.scaling.forms import FORMS, Cells
from mesocosm.scaling.law import theta_of

TRUTH = {"E": 0.3, "A": 60.0, "B": 8.0, "alpha": 0.5, "beta": 0.4}
SIZES = tuple(np.geomspace(1e4, 3e6, 7))
DATA = tuple(np.geomspace(1e4, 1e6, 6))


def loss(
    params: ArrayLike,
    data: ArrayLike,
    truth: dict[str, float] = TRUTH,
    unique: ArrayLike | None = None,
) -> np.ndarray:
    form = "data_constrained" if "r_d" in truth else "chinchilla"
    n, d, u = (
        np.log(np.asarray(x, dtype=float))
        for x in (params, data, data if unique is None else unique)
    )
    return np.exp(FORMS[form].log_loss(theta_of(form, truth), Cells(n, d, u)))[0]


def grid(
    rng: np.random.Generator | None = None,
    noise: float = 0.0,
    *,
    truth: dict[str, float] = TRUTH,
    sizes: Sequence[float] = SIZES,
    data: Sequence[float] = DATA,
    seeds: int = 1,
    trunk_noise: float = 0.0,
) -> list[dict[str, Any]]:
    """Rows of N x D x seeds; noise is relative, `trunk_noise` shared by one size and seed."""
    rows = []
    for i, n in enumerate(sizes):
        for seed in range(seeds):
            shared = trunk_noise * rng.normal() if rng is not None else 0.0
            for d in data:
                own = noise * rng.normal() if rng is not None else 0.0
                rows.append(
                    {
                        "params": n,
                        "data": d,
                        "loss": float(loss([n], [d], truth)[0] * np.exp(own + shared)),
                        "seed": seed,
                        "trunk": f"{i}-{seed}",
                    }
                )
    return rows


def budgets(
    flops: Iterable[float], per_budget: int = 7, truth: dict[str, float] = TRUTH
) -> list[dict[str, Any]]:
    """IsoFLOP rows, 6 N D = C, of sizes a factor 1.5 apart around the optimum."""
    a, b = (truth[x] / (truth["alpha"] + truth["beta"]) for x in ("beta", "alpha"))
    g = (truth["alpha"] * truth["A"] / (truth["beta"] * truth["B"])) ** (
        1 / (truth["alpha"] + truth["beta"])
    )
    assert abs(a + b - 1) < 1e-12
    rows = []
    for c in flops:
        for n in g * (c / 6) ** a * 1.5 ** np.arange(-(per_budget // 2), per_budget // 2 + 1):
            rows.append(
                {
                    "params": n,
                    "data": c / 6 / n,
                    "loss": float(loss([n], [c / 6 / n], truth)[0]),
                    "flops": c,
                }
            )
    return rows


def write(path: Path, rows: list[dict[str, Any]], without: Sequence[str] = ()) -> Path:
    columns = [name for name in rows[0] if name not in without]
    path.write_text(
        ",".join(columns)
        + "\n"
        + "".join(",".join(str(row[name]) for name in columns) + "\n" for row in rows)
    )
    return path
