"""A fit ends where held-out data say so, and keeps the best weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mesocosm.model.fitting import ALONE, EVERY, StoppedFit, fit, of_part


def run(held_out_optimum: float | None, most: int) -> tuple[Tensor, StoppedFit]:
    """Fit a weight to 10 from 0, by about 0.01 a step; held-out data prefer another value."""
    weight = torch.zeros(1, requires_grad=True)

    def held_out() -> Tensor:
        assert held_out_optimum is not None
        return (weight - held_out_optimum).square().sum()

    result = fit(
        torch.optim.Adam([weight], lr=0.01),
        lambda step: (weight - 10).square().sum(),
        None if held_out_optimum is None else held_out,
        most,
    )
    return weight.detach(), result


def test_held_out_data_stop_a_fit_and_the_best_weights_are_kept() -> None:
    weight, result = run(held_out_optimum=3.0, most=5000)
    assert weight == pytest.approx(3.0, abs=0.3)
    assert result.loss == pytest.approx(float((weight - 3).square()), rel=1e-5)
    assert 250 < result.steps < 450 and result.steps % EVERY == 0


@pytest.mark.integration
def test_a_fit_lasts_while_held_out_data_gain() -> None:
    assert run(held_out_optimum=10.0, most=120)[1].steps == 120
    weight, result = run(held_out_optimum=10.0, most=5000)
    assert weight == pytest.approx(10.0, abs=0.1) and result.steps > 900


def test_without_held_out_data_the_number_of_steps_is_fixed() -> None:
    for most in (20, 5000):
        weight, result = run(None, most)
        assert result.steps == min(most, ALONE) and math.isnan(result.loss)
        assert weight > 0.05


def test_same_input_same_bits() -> None:
    first, second = (run(held_out_optimum=3.0, most=5000) for _ in range(2))
    assert torch.equal(first[0], second[0]) and first[1] == second[1]


def test_long_fits_say_how_far_they_are() -> None:
    weight, reports = torch.zeros(1, requires_grad=True), list[str]()
    optimizer = torch.optim.Adam([weight], lr=0.01)
    fit(optimizer, lambda step: weight.square().sum(), None, 120, of_part(reports.append, "reward"))
    assert reports == ["reward, step 50 of at most 120", "reward, step 100 of at most 120"]
