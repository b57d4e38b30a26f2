"""`make bench-fit`: the vectorised solver of `mesocosm fit` against scipy's L-BFGS-B, start by
start, in one run on one thread.

    python benchmarks/bench_fit.py [--starts N] [--numeric N]

The same table (40 cells of a law with noise), the same starts, the same objective (sum of Huber
losses of log residuals, in units of delta), the same tolerances (FTOL, GTOL of
mesocosm.scaling.solve). Starts are drawn evenly from the ranges of Hoffmann et al.'s grid, so that
all are different. Times are of the process's CPU, the vectorised solver's and scipy's in turns. The
solver first brings a start's E, A and B to the losses' level, and starts that meet are merged;
`levelled` gives scipy the levelled starts. A start counts as equal or lower where the solver ends
at most 1e-6 (relative) above scipy. Results lie in benchmarks/results/bench_fit.json with commit
and command.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from scipy.optimize import minimize

from mesocosm.scaling.forms import FORMS, Cells
from mesocosm.scaling.solve import DELTA, GTOL, _Problem, solve

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "bench_fit.json"
FORM = FORMS["chinchilla"]
GOALS = {"analytic": 30.0, "numeric": 100.0}
# e, a, b, alpha, beta: from, to, as in Hoffmann et al.'s grid; an exponent of 0 is a start of fewer
# parameters
LOW, HIGH = np.array([-1.0, 0.0, 0.0, 0.05, 0.05]), np.array([1.0, 25.0, 25.0, 2.0, 2.0])


def table() -> tuple[Cells, np.ndarray]:
    """8 sizes x 5 data sizes of Chinchilla's law, 1% noise."""
    rng = np.random.default_rng(0)
    n, d = (
        x.reshape(-1)
        for x in np.meshgrid(np.geomspace(1e7, 7e9, 8), np.geomspace(5e8, 5e11, 5), indexing="ij")
    )
    loss = 1.69 + 406.4 / n**0.34 + 410.7 / d**0.28
    return Cells(np.log(n), np.log(d), np.log(d)), np.log(loss) + 0.01 * rng.normal(size=len(n))


class Reference:
    """The objective for one start, as one would write it for scipy: [P] -> value, or value and
    gradient.
    """

    def __init__(self, cells: Cells, log_loss: np.ndarray) -> None:
        self.x, self.z, self.y = cells.params, cells.data, log_loss

    def value(self, theta: np.ndarray) -> float:
        return float(self._parts(theta)[0])

    def both(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        value, residual, total, p0, p1, p2 = self._parts(theta)
        pull = -np.minimum(np.maximum(residual / DELTA, -1.0), 1.0) / total
        of_n, of_d = pull * p1, pull * p2
        return float(value), np.array(
            [pull @ p0, of_n.sum(), of_d.sum(), -(of_n @ self.x), -(of_d @ self.z)]
        )

    def _parts(self, theta: np.ndarray) -> tuple[Any, ...]:
        e, a, b, alpha, beta = theta
        s, t = a - alpha * self.x, b - beta * self.z
        top = np.maximum(np.maximum(s, t), e)
        p0, p1, p2 = np.exp(e - top), np.exp(s - top), np.exp(t - top)
        total = p0 + p1 + p2
        residual = self.y - top - np.log(total)
        size = np.abs(residual)
        near = np.minimum(size, DELTA)
        return (near * (size - near / 2)).sum() / DELTA, residual, total, p0, p1, p2


def scipys(
    function: Callable[[np.ndarray], Any], starts: np.ndarray, gradient: bool
) -> tuple[float, np.ndarray]:
    """(CPU seconds a start, objectives)."""
    began = time.process_time()
    options = {"ftol": 1e-10, "gtol": GTOL, "maxiter": 15_000, "maxfun": 1_000_000}
    ends = [
        minimize(function, start, jac=gradient, method="L-BFGS-B", options=options).fun
        for start in starts
    ]
    return (time.process_time() - began) / len(starts), np.array(ends)


def ours(cells: Cells, log_loss: np.ndarray, starts: np.ndarray) -> tuple[float, np.ndarray]:
    began = time.process_time()
    solution = solve(FORM, cells, log_loss, np.ones((1, len(log_loss))), starts)
    return (time.process_time() - began) / len(starts), solution.objective[0] / DELTA


def commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--starts", type=int, default=1000)
    parser.add_argument(
        "--numeric", type=int, default=200, help="of them, for the numeric gradient"
    )
    options = parser.parse_args()
    cells, log_loss = table()
    starts = np.random.default_rng(1).uniform(LOW, HIGH, (options.starts, 5))
    reference = Reference(cells, log_loss)
    weights = np.ones((len(starts), len(log_loss)))
    level = _Problem(FORM, cells, log_loss, weights, ()).levelled(starts, weights)
    ours(cells, log_loss, starts[:50])
    half = options.starts // 2
    times, ends = [], []
    rows: dict[str, Any] = {}
    for name, function, gradient, begins in (
        ("analytic", reference.both, True, starts[:half]),
        ("numeric", reference.value, False, starts[: options.numeric]),
        ("analytic, levelled", reference.both, True, level[:half]),
        ("numeric, levelled", reference.value, False, level[: options.numeric]),
    ):
        seconds, end = ours(cells, log_loss, starts)
        times.append(seconds)
        ends.append(end)
        scipy_ms, scipy_objectives = scipys(function, begins, gradient)
        mine = end[: len(scipy_objectives)]
        rows[name] = {
            "scipy_ms_a_start": 1e3 * scipy_ms,
            "starts": len(scipy_objectives),
            "best": {
                "ours": float(mine.min() * DELTA),
                "scipy": float(scipy_objectives.min() * DELTA),
            },
            "ours_equal_or_lower": float((mine <= scipy_objectives * (1 + 1e-6)).mean()),
            "at_the_best": {
                "ours": float((mine <= mine.min() * (1 + 1e-6)).mean()),
                "scipy": float((scipy_objectives <= mine.min() * (1 + 1e-6)).mean()),
            },
        }
    each = float(np.median(times))
    for row in rows.values():
        row["times_faster"] = row["scipy_ms_a_start"] / (1e3 * each)
    result = {
        "ours_ms_a_start": 1e3 * each,
        "starts": options.starts,
        "cells": len(log_loss),
        "against": rows,
        "goals": GOALS,
    }
    result |= {"commit": commit(), "command": " ".join(["python", *sys.argv])}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    spread = f"median of {len(times)}, {min(times) * 1e3:.3f} to {max(times) * 1e3:.3f}"
    print(
        f"vectorised: {1e3 * each:.3f} ms a start ({options.starts} starts, {len(log_loss)} cells;"
        f" {spread})"
    )
    for name, row in rows.items():
        share = f"equal or lower from {row['ours_equal_or_lower']:.1%} of {row['starts']} starts"
        best = (
            f"at the best: ours {row['at_the_best']['ours']:.1%}, scipy"
            f" {row['at_the_best']['scipy']:.1%}"
        )
        print(
            f"  {row['times_faster']:6.1f} times faster than scipy, {name}"
            f" ({row['scipy_ms_a_start']:.1f} ms): {share}; {best}"
        )
    lower = all(
        row["best"]["ours"] <= row["best"]["scipy"] * (1 + 1e-9)
        and row["ours_equal_or_lower"] >= 0.999
        for row in rows.values()
    )
    met = lower and all(rows[name]["times_faster"] >= goal for name, goal in GOALS.items())
    print("goals met" if met else "goals missed")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
