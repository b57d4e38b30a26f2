"""Sweeps of worlds of images: their cells, tables and laws are of one tokenizer."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from coin_grid import cells, coin_games
from scaling.test_plan import CHINCHILLA, law_of
from train.test_image_world import stored

from mesocosm import config
from mesocosm.data.tokens.reading import Tokenizers
from mesocosm.datasets.dataset import Dataset
from mesocosm.errors import UsageError
from mesocosm.jobs import plan as planning
from mesocosm.jobs.sweep import JOB
from mesocosm.runs import tracking
from mesocosm.scaling.cells import write_table
from mesocosm.scaling.plan import PlanRequest, answer
from mesocosm.scaling.plan_config import PlanConfig
from mesocosm.scaling.sweep_config import SweepConfig
from mesocosm.scaling.table import CellTable
from mesocosm.scaling.trunk import TrunkWork, TrunkWorker
from mesocosm.store.artifacts import Storage
from mesocosm.train.config import PretrainConfig
from mesocosm.train.pretrain import JOB as PRETRAIN

LARGER = ("grid.sizes=[10k,30k]", "grid.data=[40]")
Make = Callable[..., SweepConfig]
SMALL = ("model.members=1", "model.context=4", "model.group=5", "model.base=false")
SMALL += ("model.head_steps=2", "grid.sizes=[10k]", "grid.data=[40,80]", "train.batch=4")
SMALL += ("train.warmup=1", "train.precision=fp32", "train.validate_windows=8")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CoinGrid's dataset `d0`, its tokenizer `cells`, and the same tokenizer as `copied`."""
    folder = tmp_path_factory.mktemp("coins")
    games: Dataset = coin_games(folder / "games")
    dictionary = cells(games)
    stored(folder, games, dictionary)
    copied = Tokenizers(("observation",), (dictionary,))
    Storage(str(folder)).make("tokenizers", "copied", {}, copied.save)
    return folder


@pytest.fixture
def sweep_of_images(root: Path) -> Make:
    keys = (f"storage.root={root}", "data.datasets=[d0]", "data.tokenizer=cells", *SMALL)
    return lambda *overrides: config.load(SweepConfig, overrides=(*keys, *overrides))


@pytest.mark.integration
def test_the_tokenizer_is_part_of_each_id(sweep_of_images: Make, root: Path) -> None:
    """Also where two tokenizers are equal: a cell's world names one of them."""
    storage = Storage(str(root))
    plans = [
        JOB.resolve(sweep_of_images(f"data.tokenizer={ref}"), storage)
        for ref in ("cells", "tokenizers/cells", "cel", "copied")
    ]
    assert len({plan.id for plan in plans[:3]}) == 1 and plans[3].id != plans[0].id
    first, *same, other = ({cell.id for cell in plan.grid.cells} for plan in plans)
    assert same == [first, first] and not first & other
    assert plans[2].inputs == {"datasets": ["d0"], "tokenizers": ["cells"]}
    assert plans[2].facts["data"] == {"tokenizer": "cells"}
    assert JOB.summary(plans[3])["tokenizer"] == "tokenizers/copied"


@pytest.mark.integration
@pytest.mark.parametrize("keys", [(), ("grid.data=[]", "grid.flops=[3e9,6e9]", "model.group=1")])
def test_cells_of_images_are_counted_as_pretraining_counts_them(
    keys: tuple[str, ...], sweep_of_images: Make, root: Path
) -> None:
    sweep = sweep_of_images(*keys, "grid.unique=[30]")
    for cell in JOB.resolve(sweep, Storage(str(root))).grid.cells:
        options = sweep.training(cell.steps, cell.warmup, cell.decay, "fp32")
        counted = PRETRAIN.plan(sweep.pretraining(cell.size, cell.seed, 30, options))
        expected = {"params": cell.params, "total_params": cell.total_params, "flops": cell.flops}
        expected |= {"transitions": cell.data, "unique": cell.unique, "steps": cell.steps}
        assert {name: counted[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (("data.tokenizer=null", "model.group=1"), r"image .*, sweep and loop .*data\.tokenizer"),
        (("data.tokenizer=missing",), "no artifact tokenizers/missing"),
        (("model.family=ensemble",), "family must be sequence with data.tokenizer, got ensemble"),
        (("data.datasets=[other]",), "is for the images .* fit another one"),
        (("data.datasets=[other]", "data.tokenizer=null"), "model.group must be left out"),
    ],
)
def test_wrong_sweeps_of_images_are_refused(
    keys: tuple[str, ...], words: str, sweep_of_images: Make
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        JOB.plan(sweep_of_images(*keys))
    assert "\n" not in str(caught.value)


@pytest.mark.integration
def test_a_plan_reads_images_by_the_tokenizer_of_the_law(root: Path, tmp_path: Path) -> None:
    law, file = law_of(CHINCHILLA), tmp_path / "law.json"
    model = {"family": "sequence", "size": "10k", "members": 1, "context": 4, "group": 5}
    law.provenance.swept = {"model": model, "train": {"batch": 4, "warmup": 1}}

    def request(*keys: str, tokenizer: str | None = "cells") -> PlanRequest:
        law.provenance.tokenizer = tokenizer
        law.write(file)
        words = [f"law={file}", f"storage.root={root}", "flops=3e10", *keys]
        return planning.resolve(config.load(PlanConfig, overrides=words), Storage(str(root)))

    planned = request("data.datasets=[d0]")
    answered = answer(planned)
    text = planning.pretrain_yaml(planned, answered)
    (tmp_path / "plan.yaml").write_text(text)
    assert "nats given tokenizers/cells." in text and answered["flops_counted"]
    job = config.load(PretrainConfig, [tmp_path / "plan.yaml"], [f"storage.root={root}"])
    assert job.data.tokenizer == "cells" and job.model.group == 5
    assert PRETRAIN.plan(job)["params"] == answered["plan"]["params"]
    without_data = request("data.tokenizer=tokenizers/cells")
    text = planning.pretrain_yaml(without_data, answer(without_data))
    assert "tokenizer: cells" in text, "also where the datasets are not known yet"
    for ref, of_law, message in (
        ("copied", "cells", "data.tokenizer must be cells, as in the law, got copied"),
        ("cells", None, "data.tokenizer must be null, as in the law, got cells"),
    ):
        with pytest.raises(UsageError, match=message):
            request("data.datasets=[d0]", f"data.tokenizer={ref}", tokenizer=of_law)


def test_a_trunk_of_images_is_trained_on_the_stored_codes(
    one_rank: None,
    sweep_of_images: Make,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    grid = JOB.resolve(sweep_of_images("grid.unique=[100]"), Storage(str(root))).grid
    (trunk,) = grid.trunks(grid.cells)
    worker = TrunkWorker(TrunkWork.of(str(root), grid, [trunk], gpu=False, force=False))
    records = [outcome.record for outcome in worker.train(trunk.id)]
    write_table([record for record in records if record is not None], tmp_path / "table.csv")
    with open(tmp_path / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["tokenizer"] for row in rows] == ["cells", "cells"]
    for row in rows:
        parts = (float(row[part]) for part in ("dynamics", "reward", "termination", "task"))
        assert float(row["loss"]) == pytest.approx(sum(parts))
        assert 0 < float(row["dynamics"]) < 25 * math.log(16), "nats of 25 codes"
    table = CellTable.read(tmp_path / "table.csv")
    assert table.tokenizer == "cells" and table.unique is not None
    assert table.unique.tolist() == [100, 100]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_a_sweep_of_images_makes_a_table_and_worlds_of_its_tokenizer(
    sweep_of_images: Make, root: Path
) -> None:
    """The whole job: a trunk and a large cell, which is a pretrain job."""
    sweep = sweep_of_images("concurrent=1", "large=20000", "workers=1", *LARGER)
    with tracking.start("sweep", sweep, quiet=True) as run:
        artifact = JOB.run(sweep, run)
    assert artifact.meta["inputs"] == {"datasets": ["d0"], "tokenizers": ["cells"]}
    assert CellTable.read(artifact.path / "table.csv").tokenizer == "cells"
    storage = Storage(str(root))
    (world,) = storage.list("worlds")
    assert storage.artifact("worlds", world).meta["inputs"] == artifact.meta["inputs"]
