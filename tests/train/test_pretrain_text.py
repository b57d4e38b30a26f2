"""Pretraining a text world as a user does: Ray Train, DeepSpeed and storage are the real ones."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest import approx

pytest.importorskip("tokenizers")

from mesocosm.config import load as load_config
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.jobs import collect
from mesocosm.jobs.pretrain import JOB, PretrainConfig
from mesocosm.model import rng
from mesocosm.model.language.world import TextWorld
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Storage
from mesocosm.train import prepare, worker
from mesocosm.train import pretrain as driver

from .conftest import Pretrained

pytestmark = pytest.mark.usefixtures("ray_local")
TINY = ("model.family=language", "model.size=10k", "model.members=1", "model.context=768")
TINY += ("model.vocabulary=300", "train.batch=2", "train.steps=6", "train.checkpoint_every=2")
EXPERT = "mesocosm.envs.text.chores_policies:ChoresExpert"
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A root with 300 steps of easy household tasks, and the dataset's id."""
    root = tmp_path_factory.mktemp("chores")
    keys = (f"storage.root={root}", "reality.env=mesocosm.envs.text:ChoresEasy-v0", "steps=300")
    noisy = f'behaviours=[{{kind: noisy, noise: 0.2, function: "{EXPERT}"}}]'
    config = load_config(collect.CollectConfig, overrides=(*keys, "workers=0", noisy))
    with tracking.start("collect", config, quiet=True) as run:
        return root, collect.JOB.run(config, run).id


def pretrain(root: Path, dataset: str, *overrides: str) -> Pretrained:
    keys = (f"storage.root={root}", f"data.datasets=[{dataset}]", *TINY, *overrides)
    config = load_config(PretrainConfig, overrides=keys)
    with tracking.start("pretrain", config, quiet=True) as run:
        return Pretrained(JOB.run(config, run), run.folder)


@pytest.fixture(scope="module")
def whole(logged: tuple[Path, str]) -> Pretrained:
    """One worker, never disturbed."""
    return pretrain(*logged)


def test_a_text_world_trains_and_plays(whole: Pretrained) -> None:
    losses = [values[0] for values in whole.losses.values()]
    assert len(losses) == 6 and losses[-1] < losses[0]
    first, last = whole.lines[0], whole.line(6)
    parts = ("dynamics", "reward", "termination", "task")
    assert first["train/loss"] == approx(sum(first[f"train/{part}"] for part in parts))
    assert first["train/tokens"] > first["train/transitions"] > 0
    bits = last["valid/bits_per_byte"]
    assert 0 < bits < 8 and last["tokens_per_s"] > 0
    meta = whole.artifact.meta
    assert meta["metrics"]["valid/bits_per_byte"] == bits
    assert meta["counts"]["params"] > 9000 and meta["counts"]["epochs"] > 0
    assert meta["checks"]["termination"].startswith(("passed", "failed", "not applicable"))
    assert 0 <= meta["metrics"]["reward_recall"] <= 1
    world = TextWorld.load(whole.artifact.path)
    assert world.disagreement_scale not in (0.0, 1.0) and not world.tasks
    member, keys = torch.zeros(2, dtype=torch.int64), rng.keys(0, torch.arange(2), 0, 0)
    carry = world.begin(["", ""], ["You see a mug.", "A plate."], member)
    _, step = world.step(carry, ["take mug", "look"], keys)
    assert len(step.observation) == 2 and torch.isfinite(step.reward).all()


def test_the_same_command_finds_the_world(whole: Pretrained, logged: tuple[Path, str]) -> None:
    again = pretrain(*logged, "train.zero_stage=1")
    assert again.artifact.id == whole.artifact.id and "found worlds/" in again.log
    assert Storage(str(logged[0])).list("runs/checkpoints") == []


@pytest.mark.slow
def test_a_stopped_training_resumes_with_the_same_digits(
    whole: Pretrained, logged: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, dataset = tmp_path / "root", logged[1]
    shutil.copytree(logged[0] / "datasets", root / "datasets")

    def stopped(config: dict[str, Any]) -> None:
        from mesocosm.train.driver_channel import Feed

        put = Feed.put

        def put_and_stop(self: Feed, record: dict[str, Any]) -> None:
            put(self, record)
            if record.get("step") == 3:
                self.stop("a test")
                self.flush()

        Feed.put = put_and_stop  # type: ignore[method-assign]
        worker.train_loop(config)

    with monkeypatch.context() as patch:
        patch.setattr(driver, "train_loop", stopped)
        with pytest.raises(MesocosmError, match="ended before step 6; run the same command again"):
            pretrain(root, dataset)
    again = pretrain(root, dataset)
    assert "resuming from step 3 of 6" in again.log and min(again.losses) == 4
    assert again.losses == {step: whole.losses[step] for step in (4, 5, 6)}
    for name in ("model.safetensors", "heads.safetensors", "tokenizer.json", "world.json"):
        assert (again.artifact.path / name).read_bytes() == (
            whole.artifact.path / name
        ).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        (("train.workers=2",), 1e-4),
        (("train.precision=bf16",), 0.05),
        (("train.workers=2", "train.zero_stage=1"), 1e-4),
        (("train.workers=2", "train.zero_stage=2"), 1e-4),
        (("train.activation_checkpointing=true",), 1e-5),
        (("train.dropout=0.01",), 0.05),
    ],
)
def test_other_ways_to_compute_the_same(
    whole: Pretrained, logged: tuple[Path, str], options: tuple[str, ...], tolerance: float
) -> None:
    other = pretrain(*logged, *options, "force=true")
    for step, (loss,) in whole.losses.items():
        assert other.losses[step][0] == approx(loss, rel=tolerance)


@pytest.mark.slow
def test_adapters_on_a_pretrained_world(whole: Pretrained, logged: tuple[Path, str]) -> None:
    """The folder of a world is a checkpoint: its backbone stays as it is, members are adapters."""
    source = whole.artifact.path
    keys = (f"model.pretrained={source}", "model.members=2", "model.adapter.rank=2")
    tuned = pretrain(*logged, *keys)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tuned.artifact.path / name).read_bytes() == (source / name).read_bytes()
    world = TextWorld.load(tuned.artifact.path)
    assert world.net.members == 2 and any("_adapter." in name for name in world.net.heads())
    assert tuned.line(1)["train/dynamics"] < whole.line(1)["train/dynamics"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.context=64", r"model\.context must be >= \d+ tokens.* got 64"),
        ("model.vocabulary=200", r"model\.vocabulary must be >= 259"),
        ("model.members=2", r"model\.adapter\.rank must be >= 1 with model\.members=2"),
        ("model.adapter.rank=-1", r"model\.adapter\.rank must be >= 0, got -1"),
        ("model.family=sequence", r"model\.vocabulary must be left out with model\.family=seq"),
        ("train.zero_stage=3", r"train\.zero_stage must be 0, 1 or 2"),
        ("data.block=1", r"data\.block must be left out with model\.family=language"),
        ("train.corrupt_history=1", r"train\.corrupt_history must be left out"),
        ("train.dropout=1", r"train\.dropout must be >= 0 and < 1, got 1"),
        ("model.pretrained=/no/folder train.dropout=0.1", r"train\.dropout must be 0 with .*no/f"),
        ("known.reward=a:b", r"known\.reward must be left out"),
        ("model.pretrained=/no/folder.gguf", "model.pretrained must be a file that exists"),
    ],
)
def test_keys_that_a_text_world_does_not_read(
    logged: tuple[Path, str], override: str, message: str
) -> None:
    root, dataset = logged
    keys = (f"storage.root={root}", f"data.datasets=[{dataset}]", *TINY, *override.split())
    with pytest.raises(UsageError, match=message):
        config = load_config(PretrainConfig, overrides=keys)
        JOB.summary(JOB.resolve(config, Storage(str(root))))


def test_the_summary_counts_tokens_and_transitions(logged: tuple[Path, str]) -> None:
    root, dataset = logged
    keys = (f"storage.root={root}", f"data.datasets=[{dataset}]", *TINY)
    config = load_config(PretrainConfig, overrides=keys)
    plan = JOB.resolve(config, Storage(str(root)))
    summary = JOB.summary(plan)
    assert summary["unique"] == plan.dataset.count("train") and summary["flops"] > 0
    loader = plan.loader(prepare.fit_codec(plan.dataset, config.model))
    seen = sum(int(loader.batch(step).steps.sum()) for step in range(5))  # type: ignore[union-attr]
    assert loader.transitions_seen(5) == seen
    epoch = math.ceil(loader.windows_per_epoch / 2)
    assert loader.transitions_seen(epoch) >= loader.transitions_per_epoch
