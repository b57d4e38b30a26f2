"""IsoFLOP parabolas on tables with a known optimum, or with none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from laws import TRUTH, Rows, budgets, grid, write
from pytest import approx

from mesocosm.errors import UsageError
from mesocosm.scaling import isoflop
from mesocosm.scaling.estimate import resample
from mesocosm.scaling.table import CellTable

FLOPS = (1e11, 4e11, 1.6e12, 6.4e12)
A = TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"])


@pytest.fixture
def approach(tmp_path: Path) -> Callable[[Rows], Any]:
    def of(rows: Rows) -> tuple[isoflop.IsoFlop | None, dict[str, str]]:
        table = CellTable.read(write(tmp_path / "t.csv", rows, without=("seed", "trunk")))
        return isoflop.approach(table, *resample(table, 0))

    return of


def bent(rows: Rows, *flops: float) -> Rows:
    return [row | {"loss": 2 - row["loss"]} if row["flops"] in flops else row for row in rows]


def test_the_exponent_of_budgets(approach: Any) -> None:
    estimate, notes = approach(budgets(FLOPS))
    assert estimate.source == "budgets" and not notes
    assert estimate.a == approx(A, abs=0.005) and estimate.a + estimate.b == approx(1, abs=0.005)
    assert estimate.interval["a"][0] <= estimate.a <= estimate.interval["a"][1]
    assert [entry.n_sizes for entry in estimate.budgets] == [7] * 4


def test_a_grid_is_interpolated_to_common_budgets(approach: Any) -> None:
    sizes, data = np.geomspace(1e4, 3e6, 9) * 1.07 ** np.arange(9), np.geomspace(1e3, 1e6, 9)
    estimate, _ = approach(grid(sizes=tuple(sizes), data=tuple(data)))
    assert estimate.source == "interpolated" and len(estimate.budgets) >= 4
    assert estimate.a == approx(A, abs=0.05)


def test_budgets_of_a_grid_that_have_no_minimum_are_counted(approach: Any) -> None:
    estimate, notes = approach(grid(sizes=tuple(np.geomspace(1e4, 1e6, 7))))
    assert list(notes) == ["isoflop_refused"] and estimate.a == approx(A, abs=0.05)
    assert "9 of 17 IsoFLOP budgets" in notes["isoflop_refused"]


def test_a_concave_budget_is_refused_and_the_others_stand(approach: Any) -> None:
    estimate, notes = approach(bent(budgets(FLOPS), FLOPS[1]))
    assert sum(entry.refused is not None for entry in estimate.budgets) == 1
    assert "at 4e+11 FLOPs the losses of 7 sizes are concave" in notes["isoflop_refused"]


def below_the_optimum() -> Rows:
    optimum = {}
    for row in sorted(budgets(FLOPS), key=lambda row: -row["loss"]):
        optimum[row["flops"]] = row["params"]
    return [row for row in budgets(FLOPS, 9) if row["params"] < 0.8 * optimum[row["flops"]]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (bent(budgets(FLOPS), *FLOPS), "concave"),
        (below_the_optimum(), "minimum would be at params=.*, outside the trained params"),
    ],
    ids=["concave", "outside"],
)
def test_budgets_without_any_optimum_are_refused(rows: Rows, message: str, approach: Any) -> None:
    with pytest.raises(UsageError, match=f"none of its 4 IsoFLOP budgets .*{message}.*train sizes"):
        approach(rows)


def test_a_least_loss_at_an_edge_is_no_minimum(approach: Any) -> None:
    """The vertex of the parabola may still lie between the sizes."""
    rows = budgets(FLOPS)
    first = [row for row in rows if row["flops"] == FLOPS[0]]
    first[0]["loss"] = min(row["loss"] for row in first) - 1e-4
    estimate, notes = approach(rows)
    assert estimate.budgets[0].N_opt is None and estimate.a == approx(A, abs=0.02)
    assert "the loss is least at an end of the" in notes["isoflop_refused"]


def test_a_parabola_needs_four_sizes(approach: Any) -> None:
    estimate, notes = approach(budgets(FLOPS, 3))
    assert estimate is None and list(notes) == ["no_isoflop"]


def test_a_power_law_needs_two_points() -> None:
    log_c, log_n = np.log([1e9, 1e10]), np.log([[1e3, 1e4], [1e3, np.nan]])
    a, level = isoflop.power_law(log_c, log_n)
    assert a[0] == approx(1) and level[0] == approx(1e-6)
    assert np.isnan(a[1]) and np.isnan(level[1])
