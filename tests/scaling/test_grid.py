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
from mesocosm.jobs.pretrain import JOB as PRETRAIN
from mesocosm.jobs.sweep import JOB as SWEEP_JOB
from mesocosm.model import counts
from mesocosm.model.config import ModelConfig
from mesocosm.scaling.grid import Grid, lay_out
from mesocosm.train.prepare import step_flops

Sweep = Callable[..., Any]
LOCAL = ClusterConfig([NodeGroup(cpus=2, gpus=0, flops_per_s=1e10, seconds_per_step=0.01)])


def grid_of(
    sweep_of: Sweep, cart: Dataset, *overrides: str, cluster: ClusterConfig = LOCAL
) -> Grid:
    return lay_out(sweep_of("unused", *overrides), cart, cluster)


PURE = "estimate fit forms isoflop law optimum plan plan_config plan_figure report solve table"
SWEEP = "cells grid progress_table sweep_config sweep_figure trunk"


@pytest.mark.parametrize(
    ("modules", "absent"),
    [(PURE, ["torch", "ray", "deepspeed", "mlflow"]), (SWEEP, ["ray", "deepspeed", "mlflow"])],
    ids=["fit and plan", "sweep"],
)
def test_imports_are_light(modules: str, absent: list[str]) -> None:
    """Nothing that these modules import, directly or not, imports the heavy libraries."""
    imports = "; ".join(f"import mesocosm.scaling.{name}" for name in modules.split())
    code = (
        f"import sys, mesocosm.cli.fit; {imports}; print([m for m in {absent} if m in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, timeout=120, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_cells_are_counted_exactly(sweep_of: Sweep, cart: Dataset) -> None:
    cells = grid_of(sweep_of, cart, "grid.seeds=[0,1]").cells
    assert len(cells) == len({cell.id for cell in cells}) == 8
    assert len({cell.trunk for cell in cells}) == 4
    codec = Codec.fit(cart)
    options = sweep_of("unused").training(1, 0, 1, "fp32")
    per_step = {
        size: step_flops(codec.spec, ModelConfig(size=size, members=1, context=8), options)
        for size in ("10k", "30k")
    }
    for cell in cells:
        model = ModelConfig(size=cell.size, members=1, context=8)
        sizes = counts.params(codec.spec, model)
        assert (cell.params, cell.total_params) == (sizes.n, sizes.total)
        loader = Loader(cart, codec, "train", 8, 8, cell.seed)
        assert cell.data == sum(int(loader.batch(step).mask.sum()) for step in range(cell.steps))
        assert abs(cell.data - cell.target) < 2 * 8 * 8 and cell.unique == cart.count("train")
        assert cell.flops == cell.steps * per_step[cell.size]
    assert len({(cell.target, cell.steps) for cell in cells}) == 2, (
        "a D is as many steps for every size and seed"
    )


def test_an_isoflop_budget_is_met_to_half_a_step(sweep_of: Sweep, cart: Dataset) -> None:
    cells = grid_of(sweep_of, cart, "grid.data=[]", "grid.flops=[3e9,6e9]").cells
    for cell in cells:
        assert abs(cell.flops - cell.target) <= cell.flops / cell.steps / 2
    small, large = (next(cell for cell in cells if cell.size == size) for size in ("10k", "30k"))
    assert small.params < large.params and small.data > large.data


def test_a_cell_id_hashes_what_decides_its_result(sweep_of: Sweep, cart: Dataset) -> None:
    """So a changed grid keeps its results, and two sweeps share them."""

    def changed(*overrides: str) -> set[str]:
        grid = grid_of(sweep_of, cart, "grid.sizes=[10k]", *overrides)
        return {cell.id for cell in grid.cells}

    ids = changed()

    assert ids < changed("grid.data=[200,300,600,900]", "grid.seeds=[0,3]")
    assert ids == changed(
        "concurrent=7", "large=5", "workers=4", f"grid.unique=[{cart.count('train')}]"
    )
    for other in (
        "train.lr=0.001",
        "train.decay=0.5",
        "train.warmup=3",
        "grid.seeds=[1]",
        "model.context=4",
        "train.precision=bf16",
        "grid.unique=[200]",
    ):
        assert not ids & changed(other), other


def test_fresh_data_are_trained_once_for_all_u(sweep_of: Sweep, cart: Dataset) -> None:
    """To a law a cell is (N, D, min(D, U)): two of them would be one with two losses."""
    cells = grid_of(
        sweep_of, cart, "grid.sizes=[10k]", "grid.data=[150,250,600]", "grid.unique=[100,200,300]"
    ).cells
    assert {(cell.target, cell.unique_limit) for cell in cells} == {
        (150, 100),
        (150, 200),
        (250, 100),
        (250, 200),
        (250, 300),
        (600, 100),
        (600, 200),
        (600, 300),
    }
    assert {cell.unique for cell in cells} == {100, 200, 300} and len(
        {cell.trunk for cell in cells}
    ) == 3


def test_trunks_save_shared_steps(sweep_of: Sweep, cart: Dataset) -> None:
    grid = grid_of(sweep_of, cart, "grid.data=[300,600,1200]", "grid.sizes=[10k]")
    (trunk,) = grid.trunks(grid.cells)
    last = trunk.cells[-1]
    steps = sum(map(trunk.ran, range(3)))
    assert steps == last.fork + sum(cell.decay for cell in trunk.cells)
    assert steps < sum(cell.steps for cell in grid.cells)
    (rest,) = grid.trunks(grid.cells[1:])
    assert sum(map(rest.ran, range(2))) == last.fork + sum(cell.decay for cell in grid.cells[1:])


def test_hours_end_with_the_last_trunk(sweep_of: Sweep, cart: Dataset) -> None:
    grid = grid_of(
        sweep_of, cart, "grid.data=[300,600,1200]", "grid.sizes=[10k]", "grid.seeds=[0,1,2]"
    )
    of_one = sum(
        cell.flops / cell.steps * ran / 1e10 + ran * 0.01
        for trunk in grid.trunks(grid.cells)[:1]
        for cell, ran in zip(trunk.cells, map(trunk.ran, range(3)), strict=True)
    )
    trunks = grid.trunks(grid.cells)
    for concurrent in (2, 32):  # the cluster has two slots
        limited = replace(grid, config=replace(grid.config, concurrent=concurrent))
        assert limited.hours(trunks) == pytest.approx(2 * of_one / 3600, rel=1e-6)
    seconds = sum(cell.flops / 1e10 + cell.steps * 0.01 for cell in grid.cells)
    alone = grid.trunks(grid.cells, alone=True)
    assert seconds / 2 <= grid.hours(alone) * 3600 < seconds * 0.6


def test_large_cells_are_pretrain_jobs(
    sweep_of: Sweep, cart: Dataset, tmp_path: Path, cart_root: Callable[..., str]
) -> None:
    grid = grid_of(sweep_of, cart, "large=20000")
    assert {cell.size: cell.large for cell in grid.cells} == {"10k": False, "30k": True}
    assert {t.model.size: t.large for t in grid.trunks(grid.cells)} == {"10k": False, "30k": True}
    cell = grid.cells[-1]
    config = sweep_of(cart_root(tmp_path))
    options = config.training(cell.steps, cell.warmup, cell.decay, "fp32")
    job = config.pretraining(cell.size, cell.seed, 200, options)
    summary = PRETRAIN.plan(job)
    assert (summary["params"], summary["steps"], summary["unique"]) == (
        cell.params,
        cell.steps,
        200,
    )


def test_unique_data_are_nested_and_exact(cart: Dataset) -> None:
    all_lengths = cart.table["length"]
    views = [cart.unique(u, seed=3) for u in (1, 57, 200, cart.count("train"))]
    before: dict[int, int] = {}
    for u, view in zip((1, 57, 200, cart.count("train")), views, strict=True):
        assert view.count("train") == u
        lengths = {int(e): int(view.table["length"][e]) for e in view.episodes("train")}
        assert all(lengths[e] >= length for e, length in before.items()), (
            "a smaller view lies within a larger"
        )
        cut = [e for e, length in lengths.items() if length < all_lengths[e]]
        assert len(cut) <= 1 and all(view.table["outcome"][e] == 2 for e in cut)
        assert np.array_equal(view.episodes("valid"), cart.episodes("valid")) and view.count(
            "valid"
        ) == cart.count("valid")
        before = lengths
    assert set(views[-1].episodes("train")) == set(cart.episodes("train"))
    assert set(cart.unique(200, 4).episodes("train")) != set(views[2].episodes("train"))
    assert cart.count("train") == views[-1].count("train"), "the dataset itself is as it was"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["grid.sizes=[10k,31k]"], "grid.sizes must be one of .* got '31k'.*did you mean '30k'"),
        (["grid.sizes=[]"], "grid.sizes"),
        (["grid.data=[]"], "neither grid.data nor grid.flops is set"),
        (
            ["grid.flops=[1e9]"],
            r"grid.data=\[300, 600\] and grid.flops=\[1000000000.0\] are both set",
        ),
        (["grid.data=[20,300]"], r"grid.data=20 is less than a batch, about \d+ transitions"),
        (["grid.data=[300,301]"], r"grid.data 300 and 301 are both \d+ steps"),
        (["grid.data=[300,300]"], "names 300 twice"),
        (["grid.data=[-5]"], "grid.data must .* above 0, got -5"),
        (["grid.data=[]", "grid.flops=[1000.0]"], "grid.flops=1000 is less than one step of 10k"),
        (
            ["grid.unique=[100,5000]"],
            r"grid.unique must be <= the \d+ training transitions of cart, got 5000",
        ),
        (["train.decay=0"], r"train.decay must be in \(0, 1\], got 0.0"),
        (
            ["train.warmup=50"],
            (
                r"grid.data=300 is \d+ steps of 10k, .* train.warmup=50 .*; use at"
                r" least \d+ \(\d+ steps\)"
            ),
        ),
        (["train.decay=1"], "train.decay=1 leaves no step for train.warmup=1; give train.warmup=0"),
        (["grid.seeds=[99999999999]"], r"grid.seeds must be in \[0, 2\*\*32\), got"),
        (["grid.data=[9223372036854775807]"], "grid.data must be <= 1e\+15, got 9.22"),
        (["seed=3"], r"give grid.seeds=\[3\]"),
        (["model.size=1m"], r"give grid.sizes=\[1m\]"),
        (["train.events=2"], "train.events must be .*got 2"),
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
    assert [row["state"] for row in summary["cells"]] == ["to do"] * 4
    of_trunk: dict[str, float] = {}
    for row in summary["cells"]:
        of_trunk[row["trunk"]] = of_trunk.get(row["trunk"], 0.0) + row["worker hours"]
    assert len(of_trunk) == 2 and max(of_trunk.values()) == pytest.approx(
        summary["hours"], rel=1e-3
    ), "a trunk a lane: the longer one's time"
    assert float(summary["price"].split()[0]) == pytest.approx(summary["hours"] * 6, rel=1e-3)
    assert sum(row["price"] for row in summary["cells"]) == pytest.approx(
        summary["hours"] * 6, rel=1e-2
    )
    assert (
        summary["steps"]
        < summary["steps without trunks"]
        == sum(row["steps"] for row in summary["cells"])
    )
    arguments = [
        "sweep",
        f"storage.root={root}",
        "data.datasets=[cart]",
        "grid.sizes=[10k]",
        "grid.data=[20000]",
        "--dry-run",
    ]
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
    from mesocosm.scaling.sweep_config import SweepConfig

    configs = Path(__file__).resolve().parents[2] / "configs" / "sweep"
    shipped = config.load(SweepConfig, [configs / "pendulum.yaml"], ["data.datasets=[x]"])
    shipped.validate()
    assert (
        len(shipped.grid.sizes) >= 6
        and len(shipped.grid.data) >= 5
        and len(shipped.grid.seeds) >= 2
    )
