"""IsoFLOP parabolas on tables with a known optimum, or with none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from laws import TRUTH, budgets, grid, write

from mesocosm.errors import UsageError
from mesocosm.scaling import isoflop
from mesocosm.scaling.estimate import resample
from mesocosm.scaling.table import CellTable

FLOPS = (1e11, 4e11, 1.6e12, 6.4e12)
A = TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"])


def approach(path: Path) -> tuple[isoflop.IsoFlop | None, dict[str, str]]:
    table = CellTable.read(path)
    return isoflop.approach(table, *resample(table, 0))


def test_the_exponent_of_known_budgets_is_found(tmp_path: Path) -> None:
    estimate, notes = approach(write(tmp_path / "t.csv", budgets(FLOPS)))
    assert estimate is not None and estimate.source == "budgets" and not notes
    assert estimate.a == pytest.approx(A, abs=0.005) and estimate.a + estimate.b == pytest.approx(
        1, abs=0.005
    )
    assert estimate.interval["a"][0] <= estimate.a <= estimate.interval["a"][1]
    assert [entry.n_sizes for entry in estimate.budgets] == [7] * 4


def test_a_grid_is_interpolated_to_common_budgets(tmp_path: Path) -> None:
    sizes, data = np.geomspace(1e4, 3e6, 9) * 1.07 ** np.arange(9), np.geomspace(1e3, 1e6, 9)
    estimate, _ = approach(
        write(
            tmp_path / "t.csv",
            grid(sizes=tuple(sizes), data=tuple(data)),
            without=("seed", "trunk"),
        )
    )
    assert estimate is not None and estimate.source == "interpolated"
    assert estimate.a == pytest.approx(A, abs=0.05) and len(estimate.budgets) >= 4


def test_budgets_of_a_grid_that_have_no_minimum_are_counted(tmp_path: Path) -> None:
    estimate, notes = approach(
        write(tmp_path / "t.csv", grid(sizes=tuple(np.geomspace(1e4, 1e6, 7))))
    )
    assert (
        estimate is not None
        and list(notes) == ["isoflop_refused"]
        and estimate.a == pytest.approx(A, abs=0.05)
    )
    assert "9 of 17 IsoFLOP budgets" in notes["isoflop_refused"]


def test_a_concave_budget_is_refused_and_the_others_stand(tmp_path: Path) -> None:
    rows = budgets(FLOPS)
    for row in rows:
        if row["flops"] == FLOPS[1]:
            row["loss"] = 2 - row["loss"]
    estimate, notes = approach(write(tmp_path / "t.csv", rows))
    assert (
        estimate is not None and sum(entry.refused is not None for entry in estimate.budgets) == 1
    )
    assert "at 4e+11 FLOPs the losses of 7 sizes are concave" in notes["isoflop_refused"]


@pytest.mark.parametrize(
    ("bend", "message"),
    [(True, "concave"), (False, r"the minimum would be at params=.*, outside the trained params")],
)
def test_budgets_without_any_optimum_are_refused(bend: bool, message: str, tmp_path: Path) -> None:
    rows = budgets(FLOPS)
    if bend:
        for row in rows:
            row["loss"] = 2 - row["loss"]
    else:
        optimum = {
            c: min((row for row in rows if row["flops"] == c), key=lambda row: row["loss"])[
                "params"
            ]
            for c in FLOPS
        }
        rows = [row for row in budgets(FLOPS, 9) if row["params"] < 0.8 * optimum[row["flops"]]]
    with pytest.raises(
        UsageError, match=f"none of its 4 IsoFLOP budgets has an optimum: .*{message}.*train sizes"
    ):
        approach(write(tmp_path / "t.csv", rows))


def test_a_least_loss_at_an_edge_is_no_minimum(tmp_path: Path) -> None:
    """The vertex of the parabola may still lie between the sizes."""
    rows = budgets(FLOPS)
    first = [row for row in rows if row["flops"] == FLOPS[0]]
    first[0]["loss"] = min(row["loss"] for row in first) - 1e-4
    estimate, notes = approach(write(tmp_path / "t.csv", rows))
    assert (
        estimate is not None
        and estimate.budgets[0].N_opt is None
        and estimate.a == pytest.approx(A, abs=0.02)
    )
    assert "the loss is least at an end of the" in notes["isoflop_refused"]


def test_a_parabola_needs_four_sizes(tmp_path: Path) -> None:
    estimate, notes = approach(write(tmp_path / "t.csv", budgets(FLOPS, 3)))
    assert estimate is None and list(notes) == ["no_isoflop"]


def test_a_power_law_needs_two_points() -> None:
    log_c, log_n = np.log([1e9, 1e10]), np.log([[1e3, 1e4], [1e3, np.nan]])
    a, level = isoflop.power_law(log_c, log_n)
    assert a[0] == pytest.approx(1) and level[0] == pytest.approx(1e-6)
    assert np.isnan(a[1]) and np.isnan(level[1])
