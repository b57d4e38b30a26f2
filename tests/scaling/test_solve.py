"""From every start and under every weighting, the solver ends as low as scipy's L-BFGS-B."""

from __future__ import annotations

import numpy as np
import pytest
from laws import TRUTH, cells_of, grid, loss
from scipy.optimize import minimize

from mesocosm.scaling.estimate import starts_of
from mesocosm.scaling.forms import FORMS, NOTHING, Cells
from mesocosm.scaling.law import params_of
from mesocosm.scaling.solve import DELTA, Solution, solve

FORM = FORMS["chinchilla"]


def table(noise: float, seed: int = 0, **options: object) -> tuple[Cells, np.ndarray]:
    rows = grid(np.random.default_rng(seed), noise, **options)  # type: ignore[arg-type]
    columns = ([row[name] for row in rows] for name in ("params", "data", "loss"))
    n, d, values = columns
    return cells_of(n, d), np.log(values)


def solved(cells: Cells, log_loss: np.ndarray, **options: object) -> Solution:
    starts = options.pop("starts", starts_of(FORM))
    weights = np.ones((1, len(log_loss)))
    return solve(FORM, cells, log_loss, weights, starts, **options)  # type: ignore[arg-type]


def best(solution: Solution) -> dict[str, float]:
    params = params_of(FORM.name, solution.best()[0])
    return {name: value.item() for name, value in params.items()}


def resamples(rng: np.random.Generator, cells: int, count: int) -> np.ndarray:
    return rng.multinomial(cells, np.full(cells, 1 / cells), size=count).astype(float)


def objective(theta: np.ndarray, cells: Cells, log_loss: np.ndarray, weight: np.ndarray) -> float:
    """The sum of Huber losses in units of delta."""
    size = np.abs(log_loss - FORM.log_loss(theta[None], cells)[0])
    each = np.where(size <= DELTA, size**2 / 2 / DELTA, size - DELTA / 2)
    return float((weight * each).sum())


def test_every_start_reaches_the_truth_without_noise() -> None:
    solution = solved(*table(0.0))
    params = params_of(FORM.name, solution.theta[0])
    for name, value in TRUTH.items():
        assert params[name] == pytest.approx(value, rel=1e-4)
    assert solution.converged.all()


@pytest.mark.integration
def test_no_start_ends_above_scipy() -> None:
    cells, log_loss = table(0.01)
    rng = np.random.default_rng(1)
    weights = np.stack([np.ones(len(log_loss)), resamples(rng, len(log_loss), 1)[0]])
    levels = [rng.uniform(*ends, 6) for ends in ((-2, 1), (2, 8), (0, 8))]
    starts = np.column_stack([*levels, rng.uniform(0.1, 1.5, (6, 2))])
    solution = solve(FORM, cells, log_loss, weights, starts)
    for row, weight in enumerate(weights):
        arguments = (cells, log_loss, weight)
        for start, value in zip(starts, solution.objective[row], strict=True):
            options = {"maxfun": 10_000}
            end = minimize(objective, start, arguments, method="L-BFGS-B", options=options)
            assert value <= end.fun * DELTA * (1 + 1e-9)
        thetas, values = solution.best()
        assert objective(thetas[row], *arguments) * DELTA == pytest.approx(values[row], rel=1e-9)


def test_a_problem_does_not_depend_on_its_neighbours() -> None:
    cells, log_loss = table(0.02, 2)
    weights = resamples(np.random.default_rng(3), len(log_loss), 40)
    starts = starts_of(FORM)[::5]
    together = solve(FORM, cells, log_loss, weights, starts)
    alone = solve(FORM, cells, log_loss, weights[7:8], starts)
    assert alone.best()[1] == pytest.approx(together.best()[1][7:8], rel=1e-9)


def test_a_fixed_coordinate_stays() -> None:
    starts = starts_of(FORM)
    starts[:, 0] = NOTHING
    params = best(solved(*table(0.0, truth=TRUTH | {"E": 0.0}), starts=starts, fixed=(0,)))
    assert params["E"] == 0.0 and params["alpha"] == pytest.approx(0.5, abs=1e-4)
    assert params["beta"] == pytest.approx(0.4, abs=1e-4)


def test_outliers_hardly_move_the_fit() -> None:
    cells, log_loss = table(0.0)
    log_loss[[3, 17]] += 0.5
    assert best(solved(cells, log_loss)) == pytest.approx(TRUTH, rel=0.01)


def test_repeated_data_shows_both_half_lives() -> None:
    truth, form = TRUTH | {"r_n": 5.0, "r_d": 12.0}, FORMS["data_constrained"]
    sizes, repeats = np.geomspace(1e4, 1e7, 8), (1, 3, 10, 30, 100)
    rows = np.array([(n, u * e, u) for n in sizes for u in (3e4, 3e5) for e in repeats])
    n, d, u = rows.T
    log_loss, weights = np.log(loss(n, d, truth, u)), np.ones((1, len(n)))
    solution = solve(form, cells_of(n, d, u), log_loss, weights, starts_of(form)[::7])
    params = params_of(form.name, solution.best()[0])
    assert {name: value.item() for name, value in params.items()} == pytest.approx(truth, rel=1e-3)
