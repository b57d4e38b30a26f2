"""Fits of tables with a known law: estimates, refusals, warnings, held-out cells, the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from laws import DATA, SIZES, TRUTH, Rows, budgets, grid, loss, write
from pytest import approx

from mesocosm.cli.main import main
from mesocosm.errors import UsageError
from mesocosm.scaling import fit, isoflop
from mesocosm.scaling.estimate import best_fit, draws, form_of, resample, starts_of
from mesocosm.scaling.law import Flops, IsoFlop, Law, Optimal, optimal_of, params_of, quantiles
from mesocosm.scaling.table import CellTable

UNGROUPED = ("seed", "trunk")
Fitted = Callable[..., Law]


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., CellTable]:
    def read(rows: Rows, without: tuple[str, ...] = UNGROUPED) -> CellTable:
        return CellTable.read(write(tmp_path / "t.csv", rows, without))

    return read


@pytest.fixture
def fitted(table: Callable[..., CellTable]) -> Fitted:
    def of(rows: Rows, without: tuple[str, ...] = UNGROUPED, **options: Any) -> Law:
        return fit.fit(table(rows, without), **options)

    return of


def codes(law: Law) -> set[str]:
    return {note.code for note in law.warnings}


def sentence(law: Law, code: str) -> str:
    return next(note.sentence for note in law.warnings if note.code == code)


def noisy(noise: float = 0.004, seed: int = 0, **options: Any) -> Rows:
    return grid(np.random.default_rng(seed), noise, **options)


@pytest.mark.integration
def test_intervals_contain_the_truth(fitted: Fitted) -> None:
    law = fitted(noisy(seeds=2), without=())
    assert law.bootstrap.by == "trunk" and law.bootstrap.groups == 14 and law.n_cells == 84
    for name, value in TRUTH.items():
        low, high = law.interval[name]
        assert low <= law.params[name] <= high and low - 0.1 * value < value < high + 0.1 * value
    assert law.optimal.a == approx(0.4 / 0.9, abs=0.02)
    assert law.optimal.a + law.optimal.b == approx(1)
    correlation = law.correlation["E,alpha"]
    assert correlation is not None and correlation > 0.2, "a larger E leaves less to fall, faster"
    held = law.held_out
    assert held is not None and held.beats_baselines and held.mean_rel_error < 0.01
    assert held.min_flops >= 4 * held.max_fitted_flops
    assert held.baselines["power_law"].mean_rel_error > 5 * held.mean_rel_error
    assert not codes(law) & {"outliers", "e_touches_zero", "baseline_not_beaten", "wide_interval"}


@pytest.mark.integration
def test_a_fit_is_deterministic_and_seeded(fitted: Fitted, golden: Any) -> None:
    law, again, other = fitted(noisy()), fitted(noisy()), fitted(noisy(), seed=1)
    assert law == again and other.params == law.params and other.interval != law.interval
    digits = {f"law {name}": value for name, value in law.params.items()}
    digits["law intervals"] = golden.of_numbers(law.model_dump(mode="json")["interval"])
    golden.check("sweep", digits)


LINE = [
    {"params": n, "data": 20 * n, "loss": loss(n, 20 * n)[0]} for n in np.geomspace(1e4, 1e6, 8)
]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (grid(sizes=SIZES[:3], data=DATA[:3])[:5], "has 5 distinct cells for the 5 parameters"),
        (grid(sizes=SIZES[:1], data=np.geomspace(1e3, 1e6, 9)), r"has 1 distinct params \(10000\)"),
        (grid(sizes=SIZES[:2]), "has 2 distinct params"),
        (grid(data=DATA[:1]), r"has 1 distinct data \(10000\)"),
        (LINE, "data is a power of params in every cell"),
        ([row | {"loss": 1 / row["loss"]} for row in grid()], "loss does not fall with"),
    ],
)
def test_tables_that_determine_no_law_are_refused(rows: Rows, message: str, fitted: Fitted) -> None:
    with pytest.raises(UsageError, match=rf"t\.csv.*{message}"):
        fitted(rows)


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (1, r"has 1 distinct data \(10000\)"),
        (2, r"has 2 distinct data \(10000, 25118\.9\).* at least 3"),
    ],
)
def test_data_that_differ_by_a_batch_count_as_one_size(
    count: int, message: str, fitted: Fitted
) -> None:
    """The D of a sweep's seeds differ by some transitions."""
    rows = noisy(data=DATA[:count], seeds=4)
    rows = [row | {"data": row["data"] * (1 + 0.0005 * row["seed"])} for row in rows]
    with pytest.raises(UsageError, match=message):
        fitted(rows, without=())


@pytest.mark.integration
def test_outliers_warn_and_are_dropped_on_request(fitted: Fitted) -> None:
    rows = noisy()
    for at in (4, 30):
        rows[at]["loss"] *= 1.3
    law, clean = fitted(rows), fitted(rows, drop_outliers=True)
    for text in ("line 6 ", "line 32 ", "--drop-outliers"):
        assert text in sentence(law, "outliers")
    assert not law.dropped and "outliers_dropped" in codes(clean)
    assert [row.line for row in clean.dropped] == [6, 32] and clean.n_cells == law.n_cells - 2
    assert clean.dropped[0].loss == approx(1.3 * clean.dropped[0].predicted, rel=0.02)
    assert clean.objective < law.objective


@pytest.mark.integration
def test_an_interval_of_e_at_zero_adds_a_fit_without_e(fitted: Fitted) -> None:
    law = fitted(noisy(0.02, truth=TRUTH | {"E": 0.0}))
    zero = law.without_E
    assert "e_touches_zero" in codes(law) and zero is not None and zero.params["E"] == 0
    assert zero.params["alpha"] == approx(0.5, abs=0.03)
    assert zero.params["beta"] == approx(0.4, abs=0.03)
    assert zero.objective >= law.objective * (1 - 1e-9) and set(zero.interval) == set(law.interval)


@pytest.mark.integration
def test_approaches_that_disagree_warn(fitted: Fitted) -> None:
    """Most cells follow one law, the budgets another."""
    rng = np.random.default_rng(0)
    sizes, data = SIZES * rng.uniform(0.9, 1.1, 7), DATA * rng.uniform(0.6, 1.6, 6)
    rows = []
    for row in noisy(sizes=tuple(sizes), data=tuple(data), seeds=2):
        n, d, flops = row["params"], row["data"], 6 * row["params"] * row["data"]
        n *= 1 + 1e-3 * row["seed"]
        rows.append({"params": n, "data": d, "loss": row["loss"], "flops": flops})
    truth = {"E": 0.3, "A": 20.0, "B": 40.0, "alpha": 0.35, "beta": 0.6}
    law = fitted([*rows, *budgets((1e11, 4e11, 1.6e12, 6.4e12), truth=truth)], without=())
    assert law.isoflop is not None and law.isoflop.a > 0.55 and "approaches_disagree" in codes(law)
    assert law.optimal.a == approx(0.44, abs=0.03)


@pytest.mark.integration
def test_an_estimate_outside_the_other_interval_warns(fitted: Fitted) -> None:
    """On this coarse grid the parabolas are off by .035, and the intervals overlap."""
    law = fitted(noisy(seeds=2), without=())
    assert law.isoflop is not None
    inside, around = law.interval["a"], law.isoflop.interval["a"]
    assert around[0] < inside[1] and not inside[0] <= law.isoflop.a <= inside[1]
    for value in (law.optimal.a, law.isoflop.a):
        assert f"a={value:.3f}" in sentence(law, "approaches_disagree")


NEAR, WIDE = {"a": (0.45, 0.55), "b": (0.45, 0.55)}, {"a": (0.35, 0.6), "b": (0.4, 0.55)}
EVEN = {"a": 0.5, "b": 0.5, "kN": 1.0, "kD": 1.0}
AROUND = {"a": (0.44, 0.6), "b": (0.4, 0.56)}
INSIDE = {"a": (0.51, 0.53), "b": (0.47, 0.49)}


@pytest.mark.parametrize(
    ("interval", "a", "second", "code"),
    [
        (NEAR, 0.52, AROUND, None),
        (NEAR, None, AROUND, None),
        # Each estimate must lie inside the other's interval: here only one of the two does.
        (NEAR, 0.52, INSIDE, "approaches_disagree"),
        (NEAR, 0.56, AROUND, "approaches_disagree"),
        (WIDE, 0.5, NEAR, "wide_interval"),
        (NEAR, 0.5, WIDE, "wide_interval"),
    ],
)
def test_agreement_of_the_approaches(
    interval: Any, a: float | None, second: Any, code: str | None
) -> None:
    values = EVEN | {"a": a, "b": 1 - (a or 0)}
    parabolas = None
    if a is not None:
        parabolas = IsoFlop(source="budgets", interval=second, budgets=[], **values)
    notes = isoflop.agreement(Optimal(**EVEN), interval, parabolas)
    assert list(notes) == ([code] if code else [])
    if code == "wide_interval":
        by = "the form" if interval is WIDE else "IsoFLOP parabolas"
        assert f"a=0.500 (0.35 to 0.6) by {by}." in notes[code] and "b=" not in notes[code]


@pytest.mark.integration
def test_flops_that_are_not_6nd_move_the_optimum(fitted: Fitted) -> None:
    law = fitted([row | {"flops": 40 * row["params"] ** 0.9 * row["data"]} for row in noisy()])
    assert law.flops.source == "table" and "flops_not_6nd" in codes(law)
    assert (law.flops.k, law.flops.p, law.flops.q) == approx((40, 0.9, 1.0))
    assert law.optimal.a == approx(0.4 / (0.9 * 0.4 + 0.5), abs=0.02)
    same = fitted([row | {"flops": 6 * row["params"] * row["data"]} for row in noisy()])
    assert same.flops.source == "6ND" and "flops_6nd" not in codes(same)


@pytest.mark.integration
def test_the_form_depends_on_repeated_data(fitted: Fitted) -> None:
    truth, rng, rows = TRUTH | {"r_n": 5.0, "r_d": 12.0}, np.random.default_rng(0), []
    for n in np.geomspace(1e4, 3e6, 5):
        for u in (3e4, 3e5):
            for d in (u, 4 * u, 16 * u, 64 * u):
                value = loss(n, d, truth, u).item() * np.exp(0.002 * rng.normal())
                rows.append({"params": n, "data": d, "unique": u, "loss": value})
    law = fitted(rows)
    assert law.form == "data_constrained" and law.params["r_d"] == approx(12, rel=0.3)
    assert law.predict(1e5, 1e6, 1e5) > law.predict(1e5, 1e6) > law.predict(1e5, 1e7, 1e5) * 0.5
    plain = fitted([row | {"unique": row["data"]} for row in noisy()])
    assert plain.form == "chinchilla" and "no_repeats" in codes(plain)
    assert plain.params == fitted(noisy()).params


@pytest.mark.integration
def test_a_narrow_table_holds_nothing_out(fitted: Fitted) -> None:
    law = fitted(noisy(sizes=SIZES[:3], data=tuple(np.geomspace(1e4, 2e4, 4))))
    assert law.held_out is None and "no_held_out" in codes(law)


@pytest.mark.integration
def test_the_second_fit_does_not_see_the_largest_cells(fitted: Fitted) -> None:
    """Larger losses of the largest cells do not move its predictions."""
    rows = noisy()
    held = fitted(rows).held_out
    assert held is not None
    for row in rows:
        if 6 * row["params"] * row["data"] >= held.min_flops * 0.99:
            row["loss"] *= 1.1
    other = fitted(rows).held_out
    assert other is not None and other.mean_rel_error == approx(1 - 1 / 1.1, abs=0.01)


def test_held_out_cells_are_never_dropped(fitted: Fitted, table: Any) -> None:
    rows = noisy(0.002)
    split = fit.split_held_out(table(rows), form_of(table(rows)))
    assert split is not None
    for i in np.flatnonzero(split[1]):
        rows[i]["loss"] *= 1.12
    law = fitted(rows, drop_outliers=True)
    assert law.dropped and law.held_out is not None and law.held_out.n_cells == split[1].sum()
    assert law.held_out.mean_rel_error > 0.08


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "without", "least"),
    [
        ({"noise": 0.01}, UNGROUPED, 0.80),
        ({"noise": 0.005, "seeds": 3, "trunk_noise": 0.005}, (), 0.78),
    ],
    ids=["cells", "trunks"],
)
def test_intervals_cover_at_the_stated_rate(
    options: dict[str, Any], without: tuple[str, ...], least: float, table: Any
) -> None:
    """Of 100 tables 90 are expected, with a standard deviation of 3."""
    flops = Flops(source="6ND", k=6, p=1, q=1, max_rel_residual=0)
    truth = TRUTH | {"a": TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"])}
    hits = dict.fromkeys(truth, 0)
    for number in range(100):
        cells = table(grid(np.random.default_rng([11, number]), **options), without)
        form = form_of(cells)
        whole = best_fit(cells, form, starts_of(form)[5:6])
        counts, groups = resample(cells, number)
        thetas, _ = draws(cells, form, counts[:, groups], whole.theta)
        values = params_of(form.name, thetas) | optimal_of(thetas, flops)
        for name, value in truth.items():
            low, high = quantiles(values[name])
            hits[name] += low <= value <= high
    assert all(100 * least <= count <= 99 for count in hits.values()), hits


@pytest.mark.integration
def test_the_command_writes_a_law_and_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, out = write(tmp_path / "t.csv", noisy(), UNGROUPED), tmp_path / "law.json"
    command = ["fit", str(table), "--out", str(out)]
    assert main([*command, "--dry-run"]) == 0
    assert "chinchilla" in capsys.readouterr().out and not out.exists()
    assert main(command) == 0
    shown = capsys.readouterr().out
    for text in ("alpha", "90% interval", "N_opt", "a power law without E", "flops_6nd"):
        assert text in shown
    assert "the last size's constant" in shown
    law = Law.read(out)
    assert law.provenance.command == f"mesocosm {' '.join(command)}" and law.provenance.rows == 42
    assert (tmp_path / "law.svg").read_text().startswith("<?xml")
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == law.model_dump(mode="json")


def test_wrong_use_is_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = str(write(tmp_path / "t.csv", noisy(), UNGROUPED))
    assert main(["fit", table, "seed=1"]) == 2
    assert "seed=1" in capsys.readouterr().err
    assert main(["fit", "--help"]) == 0
    assert "mesocosm fit table.csv --out law.json" in capsys.readouterr().out
    assert main(["fit", table, "--out", str(tmp_path / "law.svg")]) == 2
    assert "--out must not be an .svg file" in capsys.readouterr().err
    assert not (tmp_path / "law.svg").exists()


@pytest.mark.parametrize("side", [4, 5])
def test_small_clean_tables_have_no_outliers(side: int, table: Any) -> None:
    sizes, data = np.geomspace(1e4, 3e6, side), np.geomspace(1e4, 1e6, side)
    for seed in range(6):
        cells = table(noisy(0.01, seed, sizes=sizes, data=data))
        assert not len(best_fit(cells, form_of(cells)).outliers()), seed


@pytest.mark.integration
def test_cells_of_a_single_trunk_are_resampled(fitted: Fitted) -> None:
    law = fitted([row | {"trunk": "one"} for row in noisy()], ("seed",))
    assert law.bootstrap.by == "cell" and "few_trunks" in codes(law)
    assert law.interval["alpha"][1] > law.interval["alpha"][0]
