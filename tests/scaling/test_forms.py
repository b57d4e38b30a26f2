"""Both forms: their values, and gradients against differences."""

from __future__ import annotations

import numpy as np
import pytest
from laws import cells_of
from pytest import approx

from mesocosm.scaling.forms import FORMS, Cells
from mesocosm.scaling.law import params_of, theta_of

THETA = np.array([[0.5, 4.0, 5.0, 0.35, 0.4, 1.0, 2.0], [0.1, 6.0, 5.0, 0.5, 0.4, 1.6, 0.5]])
PLAIN, REPEATS = FORMS["chinchilla"], FORMS["data_constrained"]


@pytest.fixture
def cells() -> Cells:
    rng = np.random.default_rng(0)
    params, data = np.log(10.0) * rng.uniform(4, 7, (2, 24))
    return Cells(params, data, np.minimum(data, data - rng.uniform(-0.5, 3, 24)))


@pytest.mark.parametrize("name", FORMS)
def test_gradients_match_differences(name: str, cells: Cells) -> None:
    form = FORMS[name]
    theta = THETA[:, : len(form.params)]
    value, slope = form.expand(theta, cells)
    steps = 1e-5 * np.eye(theta.shape[1])
    up, down = (
        np.stack([form.log_loss(theta + sign * step, cells) for step in steps], 1)
        for sign in (1, -1)
    )
    assert slope == approx((up - down) / 2e-5, abs=1e-7)
    assert value == approx(form.log_loss(theta, cells), abs=1e-14)


def test_both_forms_are_equal_without_repeats(cells: Cells) -> None:
    n, d = cells.params - 8, cells.data
    plain = PLAIN.log_loss(THETA[:, :5], Cells(n, d, d))
    assert REPEATS.log_loss(THETA, Cells(n, d, d)) == approx(plain, abs=1e-14)
    repeated = REPEATS.log_loss(THETA, Cells(n, d, d - 2.0))
    less = PLAIN.log_loss(THETA[:, :5], Cells(n, d - 2.0, d))
    assert (plain < repeated).all() and (repeated < less).all()


def test_the_published_evaluation_of_the_data_constrained_form() -> None:
    """Muennighoff et al.'s constants at N = 6.34e9, D = 242e9, U = 25e9, as evaluated by their
    code.
    """
    params = {"E": np.exp(0.6254804), "A": np.exp(6.255414), "B": np.exp(7.3049974)}
    params |= {"alpha": 0.3526596, "beta": 0.3526596, "r_n": 5.309743, "r_d": 15.387756}
    theta = theta_of("data_constrained", params)
    value = np.exp(REPEATS.log_loss(theta, cells_of(6.34e9, 242e9, 25e9)))
    assert value.item() == approx(2.2256440889984477, rel=1e-14)
    back = params_of("data_constrained", theta)
    assert {name: value.item() for name, value in back.items()} == approx(params)


def test_a_term_can_be_zero() -> None:
    theta = theta_of("chinchilla", {"E": 0.0, "A": 2.0, "B": 3.0, "alpha": 0.5, "beta": 0.5})
    assert params_of("chinchilla", theta)["E"] == 0.0
    assert np.exp(PLAIN.log_loss(theta, cells_of(4.0, 9.0))).item() == approx(2.0, rel=1e-14)
