"""From every start and under every weighting, the solver ends as low as scipy's L-BFGS-B."""

from __future__ import annotations

import numpy as np
import pytest
from laws import TRUTH, grid
from scipy.optimize import minimize

from mesocosm.scaling.estimate import starts_of
from mesocosm.scaling.forms import FORMS, NOTHING, Cells
from mesocosm.scaling.law import params_of
from mesocosm.scaling.solve import DELTA, solve

FORM = FORMS["chinchilla"]


def table(noise: float, seed: int = 0, **options: object) -> tuple[Cells, np.ndarray]:
    rows = grid(np.random.default_rng(seed), noise, **options)  # type: ignore[arg-type]
    data = np.log([row["data"] for row in rows])
    return Cells(np.log([row["params"] for row in rows]), data, data), np.log(
        [row["loss"] for row in rows]
    )


def objective(theta: np.ndarray, cells: Cells, log_loss: np.ndarray, weight: np.ndarray) -> float:
    size = np.abs(log_loss - FORM.log_loss(theta[None], cells)[0])
    return float((weight * np.where(size <= DELTA, size**2 / 2, DELTA * (size - DELTA / 2))).sum())


def test_the_truth_is_found_without_noise_from_every_start() -> None:
    cells, log_loss = table(0.0)
    solution = solve(FORM, cells, log_loss, np.ones((1, len(log_loss))), starts_of(FORM))
    params = params_of("chinchilla", solution.theta[0])
    for name, value in TRUTH.items():
        assert params[name] == pytest.approx(value, rel=1e-4)
    assert solution.converged.all()


def test_no_start_ends_above_scipy() -> None:
    cells, log_loss = table(0.01)
    rng = np.random.default_rng(1)
    weights = np.stack(
        [
            np.ones(len(log_loss)),
            rng.multinomial(len(log_loss), np.full(len(log_loss), 1 / len(log_loss))).astype(float),
        ]
    )
    starts = np.column_stack(
        [
            rng.uniform(-2, 1, 6),
            rng.uniform(2, 8, 6),
            rng.uniform(0, 8, 6),
            rng.uniform(0.1, 1.5, (6, 2)),
        ]
    )
    solution = solve(FORM, cells, log_loss, weights, starts)
    for row, weight in enumerate(weights):
        for start, objective_ in zip(starts, solution.objective[row], strict=True):
            # in units of delta, as the solver has it: scipy's tolerance on the function is absolute
            # below 1
            reference = minimize(
                lambda t, w: objective(t, cells, log_loss, w) / DELTA,
                start,
                args=(weight,),
                method="L-BFGS-B",
                options={"maxfun": 10_000},
            )
            assert objective_ <= reference.fun * DELTA * (1 + 1e-9)
        best = solution.best()
        assert objective(best[0][row], cells, log_loss, weight) == pytest.approx(
            best[1][row], rel=1e-9
        )


def test_a_problem_does_not_depend_on_its_neighbours() -> None:
    cells, log_loss = table(0.02, 2)
    rng = np.random.default_rng(3)
    weights = rng.multinomial(
        len(log_loss), np.full(len(log_loss), 1 / len(log_loss)), size=40
    ).astype(float)
    starts = starts_of(FORM)[::5]
    together = solve(FORM, cells, log_loss, weights, starts)
    alone = solve(FORM, cells, log_loss, weights[7:8], starts)
    assert alone.best()[1] == pytest.approx(together.best()[1][7:8], rel=1e-9)


def test_a_fixed_coordinate_stays() -> None:
    cells, log_loss = table(0.0, truth=TRUTH | {"E": 0.0})
    starts = starts_of(FORM)
    starts[:, 0] = NOTHING
    solution = solve(FORM, cells, log_loss, np.ones((1, len(log_loss))), starts, fixed=(0,))
    best = params_of("chinchilla", solution.best()[0])
    assert best["E"] == 0.0
    assert best["alpha"].item() == pytest.approx(0.5, abs=1e-4) and best[
        "beta"
    ].item() == pytest.approx(0.4, abs=1e-4)


def test_outliers_hardly_move_the_fit() -> None:
    cells, log_loss = table(0.0)
    spoiled = log_loss.copy()
    spoiled[[3, 17]] += 0.5
    best = params_of(
        "chinchilla",
        solve(FORM, cells, spoiled, np.ones((1, len(log_loss))), starts_of(FORM)).best()[0],
    )
    for name, value in TRUTH.items():
        assert best[name].item() == pytest.approx(value, rel=0.01)


def test_repeated_data_shows_both_half_lives() -> None:
    truth = TRUTH | {"r_n": 5.0, "r_d": 12.0}
    rows = [
        (n, u * e, u)
        for n in np.geomspace(1e4, 1e7, 8)
        for u in (3e4, 3e5)
        for e in (1, 3, 10, 30, 100)
    ]
    n, d, u = (np.log(column) for column in np.array(rows).T)
    form = FORMS["data_constrained"]
    from laws import loss

    solution = solve(
        form,
        Cells(n, d, u),
        np.log(loss(np.exp(n), np.exp(d), truth, np.exp(u))),
        np.ones((1, len(n))),
        starts_of(form)[::7],
    )
    best = params_of(form.name, solution.best()[0])
    for name, value in truth.items():
        assert best[name].item() == pytest.approx(value, rel=1e-3)
