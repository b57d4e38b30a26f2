"""Both forms: their values, and derivatives against differences."""

from __future__ import annotations

import numpy as np
import pytest

from mesocosm.scaling.forms import FORMS, Cells
from mesocosm.scaling.law import params_of, theta_of

THETA = np.array([[0.5, 4.0, 5.0, 0.35, 0.4, 1.0, 2.0], [0.1, 6.0, 5.0, 0.5, 0.4, 1.6, 0.5]])


@pytest.fixture
def cells() -> Cells:
    rng = np.random.default_rng(0)
    params, data = np.log(10.0) * rng.uniform(4, 7, (2, 24))
    return Cells(params, data, np.minimum(data, data - rng.uniform(-0.5, 3, 24)))


@pytest.mark.parametrize("name", FORMS)
def test_derivatives_match_differences(name: str, cells: Cells) -> None:
    form = FORMS[name]
    theta = THETA[:, : len(form.params)]
    value, slope = form.expand(theta, cells)
    steps = 1e-5 * np.eye(theta.shape[1])
    differences = [
        (form.log_loss(theta + step, cells) - form.log_loss(theta - step, cells)) / 2e-5
        for step in steps
    ]
    assert slope == pytest.approx(np.stack(differences, 1), abs=1e-7)
    assert value == pytest.approx(form.log_loss(theta, cells), abs=1e-14)


def test_both_forms_are_equal_without_repeats(cells: Cells) -> None:
    fresh = Cells(cells.params - 8, cells.data, cells.data)
    chinchilla, constrained = (
        FORMS["chinchilla"].log_loss(THETA[:, :5], fresh),
        FORMS["data_constrained"].log_loss(THETA, fresh),
    )
    assert constrained == pytest.approx(chinchilla, abs=1e-14)
    repeated = Cells(fresh.params, fresh.data, fresh.data - 2.0)
    worse = FORMS["data_constrained"].log_loss(THETA, repeated)
    assert (worse > chinchilla).all() and (
        worse
        < FORMS["chinchilla"].log_loss(
            THETA[:, :5], Cells(fresh.params, fresh.data - 2.0, fresh.data)
        )
    ).all()


def test_the_published_evaluation_of_the_data_constrained_form() -> None:
    """Muennighoff et al.'s constants at N = 6.34e9, D = 242e9, U = 25e9, as their own code
    evaluates them.
    """
    params = {
        "E": np.exp(0.6254804),
        "A": np.exp(6.255414),
        "B": np.exp(7.3049974),
        "alpha": 0.3526596,
        "beta": 0.3526596,
        "r_n": 5.309743,
        "r_d": 15.387756,
    }
    theta = theta_of("data_constrained", params)
    value = np.exp(
        FORMS["data_constrained"].log_loss(
            theta, Cells(*(np.log([x]) for x in (6.34e9, 242e9, 25e9)))
        )
    )
    assert value.item() == pytest.approx(2.2256440889984477, rel=1e-14)
    back = params_of("data_constrained", theta)
    assert {name: value.item() for name, value in back.items()} == pytest.approx(params)


def test_a_term_can_be_zero() -> None:
    theta = theta_of("chinchilla", {"E": 0.0, "A": 2.0, "B": 3.0, "alpha": 0.5, "beta": 0.5})
    assert params_of("chinchilla", theta)["E"] == 0.0
    value = np.exp(
        FORMS["chinchilla"].log_loss(theta, Cells(*(np.log([x]) for x in (4.0, 9.0, 9.0))))
    )
    assert value.item() == pytest.approx(2.0, rel=1e-14)
