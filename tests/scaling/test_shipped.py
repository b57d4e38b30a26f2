"""The published table gives the published law, which predicts its largest cells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mesocosm.scaling import fit
from mesocosm.scaling.law import Law
from mesocosm.scaling.table import CellTable

TABLES = Path(__file__).parents[2] / "docs" / "tables"


@pytest.mark.integration
def test_the_published_law_predicts_its_largest_cells() -> None:
    table, published = (
        CellTable.read(TABLES / "halfcheetah.csv"),
        Law.read(TABLES / "halfcheetah.json"),
    )
    assert len(np.unique(table.params)) >= 6 and table.params.max() >= 1e6 and len(table) == 60
    law = fit.fit(table)
    assert law.params == pytest.approx(
        published.params, rel=1e-4
    ) and law.optimal.a == pytest.approx(published.optimal.a, rel=1e-4)
    held = law.held_out
    assert held is not None and held.n_cells == 6 and held.min_flops >= 4 * held.max_fitted_flops
    assert (
        held.mean_rel_error < 0.007
        and held.max_rel_error < 0.02
        and held.beats_baselines
        and held.mean_error_of_span < 0.05
    )
