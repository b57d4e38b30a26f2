"""The cells of a grid, counted exactly without training."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mesocosm import config
from mesocosm.cli.main import main
from mesocosm.cluster.spec import ClusterConfig, NodeGroup, read
from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.loader import Loader
from mesocosm.datasets.dataset import Dataset
from mesocosm.errors import UsageError
from mesocosm.jobs.sweep import JOB as SWEEP_JOB
from mesocosm.model import counts
from mesocosm.model.config import ModelConfig
from mesocosm.scaling.grid import Grid, lay_out
from mesocosm.scaling.sweep_config import SweepConfig
from mesocosm.store.artifacts import Storage
from mesocosm.train.prepare import step_flops
from mesocosm.train.pretrain import JOB as PRETRAIN

Sweep = Make = Callable[..., Any]
LOCAL = ClusterConfig([NodeGroup(cpus=2, gpus=0, flops_per_s=1e10, seconds_per_step=0.01)])


@pytest.fixture
def grid_of(sweep_of: Sweep, cart: Dataset) -> Callable[..., Grid]:
    return lambda *overrides: lay_out(sweep_of("unused", *overrides), cart, LOCAL)


PURE = "estimate fit forms isoflop law optimum plan plan_config plan_figure report solve table"
SWEEP = "cells grid progress_table sweep_config sweep_figure trunk"


@pytest.mark.integration
@pytest.mark.parametrize(
    ("modules", "absent"),
    [(PURE, ["torch", "ray", "deepspeed", "mlflow"]), (SWEEP, ["ray", "deepspeed", "mlflow"])],
    ids=["fit and plan", "sweep"],
)
def test_imports_are_light(modules: str, absent: list[str]) -> None:
    """Nothing that these modules import, directly or not, imports the heavy libraries."""
    imports = "; ".join(f"import mesocosm.scaling.{name}" for name in modules.split())
    loaded = f"print([m for m in {absent} if m in sys.modules])"
    command = [sys.executable, "-c", f"import sys, mesocosm.cli.fit; {imports}; {loaded}"]
    done = subprocess.run(command, check=True, timeout=600, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.integration
def test_cells_are_counted_exactly(grid_of: Make, sweep_of: Sweep, cart: Dataset) -> None:
    cells, codec = grid_of("grid.seeds=[0,1]").cells, Codec.fit(cart)
    assert len(cells) == len({cell.id for cell in cells}) == 8
    assert len({cell.trunk for cell in cells}) == 4
    options = sweep_of("unused").training(1, 0, 1, "fp32")
    models = {size: ModelConfig(size=size, members=1, context=8) for size in ("10k", "30k")}
    per_step = {size: step_flops(codec.spec, model, options) for size, model in models.items()}
    for cell in cells:
        sizes = counts.params(codec.spec, models[cell.size])
        assert (cell.params, cell.total_params) == (sizes.n, sizes.total)
        loader = Loader(cart, codec, "train", 8, 8, cell.seed)
        assert cell.data == sum(int(loader.batch(step).mask.sum()) for step in range(cell.steps))
        assert abs(cell.data - cell.target) < 2 * 8 * 8 and cell.unique == cart.count("train")
        assert cell.flops == cell.steps * per_step[cell.size]
    assert len({(cell.target, cell.steps) for cell in cells}) == 2, "whatever the size and seed"


def test_an_isoflop_budget_is_met_to_half_a_step(grid_of: Make) -> None:
    cells = grid_of("grid.data=[]", "grid.flops=[3e9,6e9]").cells
    for cell in cells:
        assert abs(cell.flops - cell.target) <= cell.flops / cell.steps / 2
    small, large = (next(cell for cell in cells if cell.size == size) for size in ("10k", "30k"))
    assert small.params < large.params and small.data > large.data


@pytest.mark.integration
def test_a_cell_id_hashes_what_decides_its_result(grid_of: Make, cart: Dataset) -> None:
    """A changed grid keeps its results, and two sweeps share them."""

    def ids(*overrides: str) -> set[str]:
        return {cell.id for cell in grid_of("grid.sizes=[10k]", *overrides).cells}

    first, unique = ids(), f"grid.unique=[{cart.count('train')}]"
    assert first < ids("grid.data=[200,300,600,900]", "grid.seeds=[0,3]")
    assert first == ids("concurrent=7", "large=5", "workers=4", unique)
    others = ["train.lr=0.001", "train.decay=0.5", "train.warmup=3", "grid.seeds=[1]"]
    others += ["model.context=4", "train.precision=bf16", "grid.unique=[200]"]
    for override in others:
        assert not first & ids(override), override


@pytest.mark.integration
def test_fresh_data_are_trained_once_for_all_u(grid_of: Make) -> None:
    """To a law a cell is (N, D, min(D, U)): two of them would be one with two losses."""
    data, unique = "grid.data=[150,250,600]", "grid.unique=[100,200,300]"
    cells = grid_of("grid.sizes=[10k]", data, unique).cells
    by_target: dict[float, list[int | None]] = {}
    for cell in cells:
        by_target.setdefault(cell.target, []).append(cell.unique_limit)
    all_unique = [100, 200, 300]
    assert by_target == {150: [100, 200], 250: all_unique, 600: all_unique}
    assert sorted({cell.unique for cell in cells}) == all_unique
    assert len({cell.trunk for cell in cells}) == 3


def test_trunks_save_shared_steps(grid_of: Make) -> None:
    grid = grid_of("grid.data=[300,600,1200]", "grid.sizes=[10k]")
    (trunk,) = grid.trunks(grid.cells)
    last = trunk.cells[-1]
    steps = sum(map(trunk.ran, range(3)))
    assert steps == last.fork + sum(cell.decay for cell in trunk.cells)
    assert steps < sum(cell.steps for cell in grid.cells)
    (rest,) = grid.trunks(grid.cells[1:])
    assert sum(map(rest.ran, range(2))) == last.fork + sum(cell.decay for cell in grid.cells[1:])


@pytest.mark.integration
def test_hours_end_with_the_last_trunk(grid_of: Make) -> None:
    grid = grid_of("grid.data=[300,600,1200]", "grid.sizes=[10k]", "grid.seeds=[0,1,2]")
    trunks = grid.trunks(grid.cells)
    ran = list(zip(trunks[0].cells, map(trunks[0].ran, range(3)), strict=True))
    of_one = sum(cell.flops / cell.steps * steps / 1e10 + steps * 0.01 for cell, steps in ran)
    for concurrent in (2, 32):  # the cluster has two slots
        limited = replace(grid, config=replace(grid.config, concurrent=concurrent))
        assert limited.hours(trunks) == pytest.approx(2 * of_one / 3600, rel=1e-6)
    seconds = sum(cell.flops / 1e10 + cell.steps * 0.01 for cell in grid.cells)
    alone = grid.trunks(grid.cells, alone=True)
    assert seconds / 2 <= grid.hours(alone) * 3600 < seconds * 0.6


@pytest.mark.integration
def test_large_cells_are_pretrain_jobs(
    grid_of: Make, sweep_of: Sweep, tmp_path: Path, cart_root: Make
) -> None:
    grid = grid_of("large=20000")
    assert {cell.size: cell.large for cell in grid.cells} == {"10k": False, "30k": True}
    assert {t.model.size: t.large for t in grid.trunks(grid.cells)} == {"10k": False, "30k": True}
    cell, config = grid.cells[-1], sweep_of(root := cart_root(tmp_path))
    for large, trunks in ((20_000, 1), (1, 0)):  # large cells take the CPUs that are free
        plan = SWEEP_JOB.resolve(replace(config, large=large), Storage(root))
        assert SWEEP_JOB.resources(plan) == {"concurrent=2": (trunks, 0)}
    options = config.training(cell.steps, cell.warmup, cell.decay, "fp32")
    summary = PRETRAIN.plan(config.pretraining(cell.size, cell.seed, 200, options))
    expected = {"params": cell.params, "steps": cell.steps, "unique": 200}
    assert {name: summary[name] for name in expected} == expected


def test_unique_data_are_nested_and_exact(cart: Dataset) -> None:
    all_lengths, total = cart.table["length"], cart.count("train")
    before: dict[int, int] = {}
    for u in (1, 57, 200, total):
        view = cart.unique(u, seed=3)
        lengths = {int(e): int(view.table["length"][e]) for e in view.episodes("train")}
        assert view.count("train") == u == sum(lengths.values())
        assert all(lengths[e] >= length for e, length in before.items()), "views are nested"
        cut = [e for e, length in lengths.items() if length < all_lengths[e]]
        assert len(cut) <= 1 and all(view.table["outcome"][e] == 2 for e in cut)
        assert np.array_equal(view.episodes("valid"), cart.episodes("valid"))
        assert view.count("valid") == cart.count("valid")
        before = lengths
    assert set(before) == set(cart.episodes("train")) and cart.count("train") == total
    assert set(cart.unique(200, 4).episodes("train")) != set(cart.unique(200, 3).episodes("train"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["grid.sizes=[10k,31k]"], "grid.sizes must be one of .* got '31k'.*did you mean '30k'"),
        (["grid.sizes=[]"], "grid.sizes"),
        (["grid.data=[]"], "neither grid.data nor grid.flops is set"),
        (["grid.flops=[1e9]"], r"grid.data=\[300, 600\] and grid.flops=.* are both set"),
        (["grid.data=[20,300]"], r"grid.data=20 is less than a batch, about \d+ transitions"),
        (["grid.data=[300,301]"], r"grid.data 300 and 301 are both \d+ steps"),
        (["grid.data=[300,300]"], "names 300 twice"),
        (["grid.data=[-5]"], "grid.data must .* above 0, got -5"),
        (["grid.data=[]", "grid.flops=[1000.0]"], "grid.flops=1000 is less than one step of 10k"),
        (["grid.unique=[100,5000]"], r"grid.unique must be <= the \d+ training .*, got 5000"),
        (["train.decay=0"], r"train.decay must be in \(0, 1\], got 0.0"),
        (["train.warmup=50"], r"300 is \d+ steps .* train.warmup=50 .* least \d+ \(\d+ steps\)"),
        (["train.decay=1"], "train.decay=1 leaves no step for train.warmup=1; give train.warmup=0"),
        (["grid.seeds=[99999999999]"], r"grid.seeds must be in \[0, 2\*\*32\), got"),
        (["grid.data=[9223372036854775807]"], "grid.data must be <= 1e\+15, got 9.22"),
        (["seed=3"], r"give grid.seeds=\[3\]"),
        (["model.size=1m"], r"give grid.sizes=\[1m\]"),
        (["model.head_steps=0"], "model.head_steps must be >= 1, got 0"),
        (["cluster=locale"], "cluster='locale'.*did you mean 'local'"),
        (["data.datasets=[carp]"], "carp.*did you mean 'cart'"),
        (["large=20000", "workers=3"], "train.batch must be a multiple of 3 .*got 8"),
    ],
)
def test_bad_configs_are_refused_before_anything_starts(
    overrides: list[str], message: str, sweep_of: Sweep, tmp_path: Path, cart_root: Sweep
) -> None:
    with pytest.raises(UsageError, match=message) as error:
        SWEEP_JOB.plan(sweep_of(cart_root(tmp_path, 300), *overrides))
    assert "\n" not in str(error.value)


def test_a_sweep_needs_a_validation_split(
    sweep_of: Sweep, tmp_path: Path, cart_root: Sweep
) -> None:
    with pytest.raises(UsageError, match=r"the valid split of cart is empty.*valid_fraction"):
        SWEEP_JOB.plan(sweep_of(cart_root(tmp_path, 300, valid_fraction=0.0)))


def test_a_sweep_has_no_key_for_steps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "train.steps=5"]) == 2
    assert "train.steps" in capsys.readouterr().err


@pytest.mark.integration
def test_a_dry_run_shows_cells_hours_and_price(
    sweep_of: Sweep, tmp_path: Path, cart_root: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    root = cart_root(tmp_path)
    (tmp_path / "clusters").mkdir()
    (tmp_path / "clusters" / "rented.yaml").write_text(
        "nodes: [{name: a, count: 3, cpus: 4, price_per_hour: 2, flops_per_s: 1.0e6,"
        " seconds_per_step: 0}]"
    )
    monkeypatch.chdir(tmp_path)
    before = sorted(str(path) for path in Path(root).rglob("*"))
    summary = SWEEP_JOB.plan(sweep_of(root, "cluster=rented"))
    rows, hours, price = summary["cells"], summary["hours"], float(summary["price"].split()[0])
    assert [row["state"] for row in rows] == ["to do"] * 4
    of_trunk: dict[str, float] = {}
    for row in rows:
        of_trunk[row["trunk"]] = of_trunk.get(row["trunk"], 0.0) + row["worker hours"]
    assert len(of_trunk) == 2 and max(of_trunk.values()) == pytest.approx(hours, rel=1e-3)
    assert price == pytest.approx(hours * 6, rel=1e-3)
    assert sum(row["price"] for row in rows) == pytest.approx(hours * 6, rel=1e-2)
    assert summary["steps"] < summary["steps without trunks"] == sum(row["steps"] for row in rows)
    arguments = ["sweep", f"storage.root={root}", "data.datasets=[cart]", "grid.sizes=[10k]"]
    arguments += ["grid.data=[20000]", "--dry-run"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "params" in out and "to do" in out and "hours without trunks" in out
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cells"][0]["size"] == "10k"
    assert sorted(str(path) for path in Path(root).rglob("*")) == before


def test_a_cluster_with_a_wrong_key_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clusters").mkdir()
    monkeypatch.chdir(tmp_path)
    for text, message in (
        ("nodes: [{prise_per_hour: 2}]", "prise_per_hour"),
        ("nodes: []", "nodes must name at least one group"),
        ("nodes: [{count: 0}]", "count must be >= 1, got 0"),
    ):
        (tmp_path / "clusters" / "mine.yaml").write_text(text)
        with pytest.raises(UsageError, match=message):
            read("mine")


def test_shipped_sweeps_are_large_enough_for_a_law() -> None:
    configs = Path(__file__).resolve().parents[2] / "configs" / "sweep"
    shipped = config.load(SweepConfig, [configs / "pendulum.yaml"], ["data.datasets=[x]"])
    shipped.validate()
    grid = shipped.grid
    assert len(grid.sizes) >= 6 and len(grid.data) >= 5 and len(grid.seeds) >= 2
