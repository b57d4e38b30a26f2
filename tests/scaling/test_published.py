"""Fits of published data give the published values. Skipped without the data."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from laws import write

from mesocosm.scaling import fit, isoflop
from mesocosm.scaling.estimate import OUTLIER, best_fit, form_of, starts_of
from mesocosm.scaling.forms import FORMS
from mesocosm.scaling.law import params_of
from mesocosm.scaling.table import CellTable

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "scaling"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="no published data beside the repository")


def rows_of(name: str) -> list[dict[str, str]]:
    with (DATA / name).open() as file:
        return list(csv.DictReader(file))


def gadre(tmp_path: Path) -> CellTable:
    """Gadre et al.'s 34 runs on C4, N with embeddings."""
    runs = [row for row in rows_of("gadre104_losses.csv") if row["train_set"] == "c4_original"]
    return CellTable.read(
        write(
            tmp_path / "c4.csv",
            [
                {"params": row["params"], "data": row["tokens"], "loss": row["loss_c4_val"]}
                for row in runs
            ],
        )
    )


def test_gadre_on_c4(tmp_path: Path) -> None:
    table = gadre(tmp_path)
    law = fit.fit(table)
    assert law.form == "chinchilla" and law.n_cells == 34
    assert law.params["alpha"] == pytest.approx(0.253, abs=0.001) and law.params[
        "beta"
    ] == pytest.approx(0.262, abs=0.001)
    assert law.params["E"] == pytest.approx(1.62, abs=0.005)
    assert law.held_out is not None and law.held_out.beats_baselines
    assert law.held_out.min_flops >= 4 * law.held_out.max_fitted_flops
    assert {row.code for row in law.warnings} >= {"flops_6nd", "outliers", "wide_interval"}


def test_gadre_small_runs_predict_the_1_4b_runs(tmp_path: Path) -> None:
    """The paper's .7% is of another form and choice of runs. This form reaches it at 20 tokens a
    parameter, without outliers.
    """
    table = gadre(tmp_path)
    form = form_of(table)
    small, large = (
        table.take(table.params < 5e8),
        table.take((table.params > 1e9) & (table.params < 2e9)),
    )
    whole = best_fit(small, form)
    error = whole.predict(large) / large.loss - 1
    assert np.abs(error).max() < 0.022
    clean = small.take(whole.deviations() < OUTLIER)
    assert len(small) - len(clean) <= 3
    error = best_fit(clean, form).predict(large) / large.loss - 1
    assert abs(error[np.argmin(large.data)]) < 0.007 and np.abs(error).max() < 0.02


def test_datablations_refitted(tmp_path: Path) -> None:
    """293 runs with seeds. The published E, A and B are of another loss, so that only the order of
    half-lives and exponents must agree.
    """
    runs = [row for row in rows_of("datablations_losses.csv") if row["variant"] in ("main", "seed")]
    columns = {
        "params": "params",
        "data": "tokens",
        "loss": "val_loss",
        "unique": "unique_tokens",
        "seed": "seed",
    }
    table = CellTable.read(
        write(
            tmp_path / "runs.csv", [{name: row[of] for name, of in columns.items()} for row in runs]
        )
    )
    form = form_of(table)
    assert form.name == "data_constrained" and len(table) == 293
    best = best_fit(table, form, starts_of(form)[::3])
    params = {name: value.item() for name, value in params_of(form.name, best.theta).items()}
    assert params["alpha"] == pytest.approx(0.35, abs=0.05) and params["beta"] == pytest.approx(
        0.35, abs=0.1
    )
    assert 1.5 < params["E"] < 2.2 and 1 < params["r_n"] < 20 and params["r_d"] > 8
    assert np.median(np.abs(best.residual)) < 0.025
    law = fit.fit(table)
    assert {"approaches_disagree", "wide_interval"} <= {note.code for note in law.warnings}
    plain = best_fit(table, FORMS["chinchilla"])
    assert best.objective < 0.8 * plain.objective, "repeats are worth less than fresh data"


PUBLISHED = rows_of("porian_published_fits.csv") if DATA.is_dir() else []
KEY = ("file", "dataset", "hparams", "warmup", "decay", "param_count", "val")


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: "-".join(row[name] for name in KEY))
def test_porian_exponents(row: dict[str, str]) -> None:
    """All 15 are within .01 of the published value and inside its interval."""
    pairs = [
        p
        for p in rows_of("porian_optimal_pairs.csv")
        if p["n_star"] and all(p[name] == row[name] for name in KEY)
    ]
    flops, n_star = (np.log([float(p[name]) for p in pairs]) for name in ("flops", "n_star"))
    a = isoflop.power_law(flops, n_star[None])[0][0]
    assert a == pytest.approx(float(row["a"]), abs=0.01)
    assert float(row["a_lo"]) <= a <= float(row["a_hi"])
