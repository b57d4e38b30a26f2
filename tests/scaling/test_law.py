"""law.json: writing, reading, predicting, and refusing other files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from laws import TRUTH, grid, loss, write

from mesocosm.errors import UsageError
from mesocosm.scaling import fit, report
from mesocosm.scaling.law import Flops, Law, optimal_of, theta_of
from mesocosm.scaling.table import CellTable


@pytest.fixture(scope="module")
def law(tmp_path_factory: pytest.TempPathFactory) -> Law:
    rows = grid(np.random.default_rng(0), 0.003, seeds=2)
    path = write(tmp_path_factory.mktemp("law") / "t.csv", rows)
    return fit.fit(CellTable.read(path), command="mesocosm fit t.csv")


def test_write_and_read(law: Law, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "law.json"
    law.write(path)
    assert Law.read(path) == law
    stored = json.loads(path.read_text())
    contract = {"form", "params", "interval", "interval_level", "optimal", "objective", "n_cells"}
    assert contract | {"held_out", "dropped", "warnings", "provenance"} <= set(stored)
    assert set(stored["params"]) == {"E", "A", "B", "alpha", "beta"}
    assert set(stored["optimal"]) == {"a", "b", "kN", "kD"} and stored["interval_level"] == 0.9
    assert set(stored["interval"]) == {*stored["params"], *stored["optimal"]}


@pytest.mark.integration
def test_a_law_of_images_names_its_tokenizer(law: Law, tmp_path: Path) -> None:
    """Another law is as before, so that the ids of its plans are."""
    rows = grid(np.random.default_rng(0), 0.003, seeds=2)
    table = CellTable.read(write(tmp_path / "t.csv", [row | {"tokenizer": "t0"} for row in rows]))
    assert fit.plan(table)["tokenizer"] == "t0"
    of_images = fit.fit(table)
    assert of_images.provenance.tokenizer == "t0" and of_images.params == law.params
    assert (law.unit, of_images.unit) == ("nats", "nats given tokenizers/t0")
    assert of_images.unit in str(report.renderables(of_images)[0].title)
    assert "tokenizer" not in law.model_dump(mode="json")["provenance"]
    of_images.write(tmp_path / "law.json")
    assert Law.read(tmp_path / "law.json") == of_images


def test_predictions_and_their_interval(law: Law) -> None:
    n, d = np.array([[3e4], [3e5]]), np.array([[3e4, 1e5, 5e5]])
    predicted, (low, high) = law.predict(n, d), law.predict_interval(n, d)
    assert predicted.shape == low.shape == (2, 3)
    truth = loss(*(x.reshape(-1) for x in np.broadcast_arrays(n, d))).reshape(2, 3)
    assert predicted == pytest.approx(truth, rel=0.004)
    assert (low <= predicted).all() and (predicted <= high).all()
    assert (high - low < 0.01 * predicted).all()
    with pytest.raises(UsageError, match="data must be above 0, got -1"):
        law.predict(1e4, -1)


@pytest.mark.parametrize(
    "repeats",
    [{}, {"r_n": 0.5, "r_d": 9.0}, {"r_n": 5.0, "r_d": 9.0}],
    ids=["fresh", "r_n=0.5", "r_n=5"],
)
@pytest.mark.parametrize(
    ("k", "p", "q"), [(6.0, 1.0, 1.0), (40.0, 0.9, 1.0), (295.0, 0.76, 1.0), (3.0, 1.1, 0.95)]
)
def test_no_size_is_better_than_the_optimum(
    k: float, p: float, q: float, repeats: dict[str, float]
) -> None:
    flops, truth = Flops(source="table", k=k, p=p, q=q, max_rel_residual=0.0), TRUTH | repeats
    form = "data_constrained" if repeats else "chinchilla"
    values = optimal_of(theta_of(form, truth), flops)
    a, b, k_n, k_d = (values[name].item() for name in ("a", "b", "kN", "kD"))
    for budget in (1e9, 1e12, 1e15):
        n, d = k_n * budget**a, k_d * budget**b
        assert k * n**p * d**q == pytest.approx(budget, rel=1e-9)
        other = n * np.geomspace(0.5, 2, 41)
        losses = loss(other, (budget / k / other**p) ** (1 / q), truth)
        assert np.argmin(losses) == 20
    if (p, q) == (1, 1):
        assert a == pytest.approx(TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"]))


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"form": "cubic"}'])
def test_files_without_a_law_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "law.json").write_text(text)
    with pytest.raises(UsageError, match=r"law\.json' is not a law: .*; mesocosm fit TABLE\.csv"):
        Law.read(tmp_path / "law.json")


def test_paths_that_cannot_be_read_or_written(law: Law, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        Law.read(tmp_path / "nonesuch.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="the law cannot be written"):
        law.write(tmp_path / "file" / "law.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="the law cannot be written"):
        law.write(tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("params", "A"), "params lacks A"),
        (("bootstrap", "draws", "E"), "draws lacks E"),
        (("range", "flops"), "range lacks flops"),
    ],
)
def test_a_law_that_lacks_a_part_is_refused(
    law: Law, path: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    plain = law.model_dump(mode="json")
    node = plain
    for key in path[:-1]:
        node = node[key]
    del node[path[-1]]
    (tmp_path / "law.json").write_text(json.dumps(plain))
    with pytest.raises(UsageError, match=f"is not a law.*{message}"):
        Law.read(tmp_path / "law.json")


@pytest.mark.integration
@pytest.mark.parametrize("spread", [1e-3, 1e-9, 0.0])
def test_a_flat_law_is_drawn(law: Law, spread: float, tmp_path: Path) -> None:
    params = {"E": 1.0, "A": spread, "B": spread, "alpha": 0.01, "beta": 0.01}
    table = CellTable.read(write(tmp_path / "flat.csv", grid(), ("seed", "trunk")))
    flat = law.model_copy(update={"params": params})
    assert report.draw(flat, table).startswith("<?xml")
