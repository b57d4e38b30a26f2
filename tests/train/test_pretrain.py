"""Pretraining as a user runs it: Ray Train, DeepSpeed, storage and MLflow are the real ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import SHORT_RUN
from pytest import approx

from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.loader import Loader
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.model import rng
from mesocosm.model.base import Base
from mesocosm.model.families import build
from mesocosm.model.mup import init_
from mesocosm.model.net import apply_base
from mesocosm.model.world import World
from mesocosm.store.artifacts import Storage
from mesocosm.train import checkpoint, prepare, rank_trainer
from mesocosm.train import pretrain as driver
from mesocosm.train.schedule import FACTOR, MARGIN, lr_factor

from .stopping import stop_after

pytestmark = pytest.mark.usefixtures("ray_local")
STEPS, NAMES = range(1, 13), ("counts", "metrics", "checks")
Make = Callable[..., Any]


def test_losses_fall(whole: Any, golden: Any) -> None:
    losses = [values[0] for values in whole.losses.values()]
    assert {step: len(values) for step, values in whole.losses.items()} == dict.fromkeys(STEPS, 1)
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    family = whole.artifact.meta["config"]["model"]["family"]
    golden.check("pretrain", {f"{family} {step}": losses[step - 1] for step in (1, 6, 12)})


def test_the_metrics_of_a_run(whole: Any) -> None:
    first, last = whole.lines[0], whole.line(12)
    parts = ("dynamics", "reward", "termination", "task")
    for part in parts:
        assert math.isfinite(first[f"train/{part}"]) and math.isfinite(last[f"valid/{part}"])
    assert first["train/loss"] == approx(sum(first[f"train/{part}"] for part in parts))
    assert 0 < last["mfu"] < 1 and last["positions_per_s"] >= last["transitions_per_s"] > 0
    assert first["train/gradient_norm"] > 0


def test_the_optimiser_has_the_rate_of_its_step(whole: Any) -> None:
    rates = [line["lr"] for line in whole.lines if "lr" in line]
    assert rates == approx([3e-3 * lr_factor(step, 12, 0.05, 0.4) for step in STEPS])
    assert len(set(rates)) > 4


def test_the_world_loads_and_steps(whole: Any) -> None:
    world = World.load(whole.artifact.path)
    codec, keys = Codec.from_json(world.codec), rng.keys(0, torch.arange(5), 0, 0)
    task, observation = world.sample_start(keys)
    carry = world.begin(task, observation, torch.zeros(5, dtype=torch.int64))
    carry, out = world.step(carry, codec.action(np.ones(5, np.int64)), keys)
    assert out.observation.numbers.shape == (5, 4) and torch.isfinite(out.observation.numbers).all()
    assert all(parameter.dtype == torch.float32 for parameter in world.net.parameters())


def test_the_artifact_has_its_provenance(whole: Any) -> None:
    """The termination network has steps of its own: it is learned in twelve steps of the world."""
    meta = whole.artifact.meta
    train, counts, metrics, checks = meta["config"]["train"], *map(meta.get, NAMES)
    assert meta["inputs"] == {"datasets": ["cart"]} and meta["job"] == "pretrain"
    assert train["precision"] == "fp32" and "workers" not in train
    assert counts["steps"] == 12 and counts["params"] > 1000
    assert counts["epochs"] == approx(counts["data"] / counts["unique"])
    assert metrics["valid/loss"] > 0 and metrics["termination_recall"] == 1.0
    assert checks["actions"] == "passed" and meta["evidence"]["high_rate"] == 1.0
    assert checks["termination"] == "passed"


@pytest.mark.slow
def test_known_parts_are_of_the_world_and_change_no_weight(whole: Any, pretrain: Make) -> None:
    root, module = str(whole.artifact.path.parent.parent), "mesocosm.envs.known"
    ended = f"{module}:cartpole_terminated"
    result = pretrain(root, *SHORT_RUN, f"known.terminated={ended}")
    meta, world = result.artifact.meta, World.load(result.artifact.path)
    assert result.artifact.id != whole.artifact.id and result.has_weights_of(whole)
    assert meta["config"]["known"]["terminated"]["function"] == ended
    assert "known" not in whole.artifact.meta["config"]
    assert meta["checks"]["termination"] == f"not applicable: {ended} is known"
    learned = whole.artifact.meta["metrics"]["termination_recall"]
    assert meta["metrics"]["termination_recall"] == learned
    assert world.known is not None and world.known.reward is None
    with pytest.raises(UsageError, match=r"known.terminated='.*:never' must agree with the data"):
        pretrain(root, *SHORT_RUN, f"known.terminated={module}:never")
    assert Storage(root).list("runs/checkpoints") == []


def test_run_again_reuses_the_world_and_leaves_nothing(whole: Any, pretrain: Make) -> None:
    root = str(whole.artifact.path.parent.parent)
    again = pretrain(root, *SHORT_RUN, "train.zero_stage=1", "train.checkpoint_every=6")
    assert again.artifact.id == whole.artifact.id and "found worlds/" in again.log
    assert Storage(root).list("runs/checkpoints") == []


def test_a_stopped_training_saves_a_checkpoint(
    whole: Any, tmp_path: Path, cart_root: Make, pretrain: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in step 6, two steps after a checkpoint: the next run resumes from step 6, and ends
    with the undisturbed run's weights.
    """
    root = cart_root(tmp_path)
    with monkeypatch.context() as patch:
        stop_after(6, patch)
        with pytest.raises(MesocosmError, match="ended before step 12; run the same command again"):
            pretrain(root, *SHORT_RUN)
    again = pretrain(root, *SHORT_RUN)
    assert "resuming from step 6 of 12" in again.log and min(again.losses) == 7
    assert whole.has_weights_of(again)


@pytest.mark.slow
def test_a_diverging_loss_stops_the_run_and_names_the_step(
    tmp_path: Path, cart_root: Make, pretrain: Make
) -> None:
    root = cart_root(tmp_path)
    storage, keys = Storage(root), ["train.lr=5", "train.steps=30", "train.checkpoint_every=1"]
    message = r"the .* is (nan|inf) at step \d+; the checkpoint of step \d+ is .* train.lr=5"
    with pytest.raises(MesocosmError, match=message):
        pretrain(root, *keys, "train.warmup=0.5", "train.decay=0")
    (id,) = storage.list("runs/checkpoints")
    last = checkpoint.latest(storage, id)
    assert last is not None and last[1].step >= 1 and storage.list("worlds") == []
    lines = next(Path(root).glob("runs/pretrain/*/metrics.jsonl")).read_text().splitlines()
    losses = [json.loads(line)["train/loss"] for line in lines]
    limits = np.minimum.accumulate(losses) * FACTOR + MARGIN
    good = 1 + int(np.flatnonzero(np.array(losses) <= limits)[-1])
    assert last[1].step == good, "no checkpoint while the loss was high"


def test_more_workers_than_the_cluster_has(tmp_path: Path, cart_root: Make, pretrain: Make) -> None:
    with pytest.raises(UsageError, match=r"train\.workers=8 asks for 8 CPUs and the cluster has 4"):
        pretrain(cart_root(tmp_path), "train.batch=16", "train.workers=8")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_workers_that_cannot_start_are_an_error(
    tmp_path: Path, cart_root: Make, pretrain: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if nodes had left after the preflight: another actor holds the CPUs."""
    import ray

    monkeypatch.setattr(driver, "STARTS", 1)
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "5")

    class Holder:
        def ready(self) -> bool:
            return True

    every = int(ray.cluster_resources()["CPU"])
    holder = ray.remote(num_cpus=every)(Holder).remote()
    assert ray.get(holder.ready.remote(), timeout=60), "earlier tests have released their CPUs"
    message = r"train\.workers=1 of pretraining were not to be started in 2 attempts: .*again"
    try:
        with pytest.raises(MesocosmError, match=message):
            pretrain(cart_root(tmp_path), *SHORT_RUN)
    finally:
        ray.kill(holder)


@pytest.mark.slow
def test_corrupted_histories_of_a_single_episode_train_every_member(
    tmp_path: Path, cart_root: Make, pretrain: Make, golden: Any
) -> None:
    """The first loss is that of the noisy windows, and a member that would keep no episode keeps
    all.
    """
    root = cart_root(tmp_path, 1)
    dataset = prepare.open_datasets(Storage(root), ["cart"])
    hashes = torch.from_numpy(dataset.table["hash"].astype(np.int64))
    members = next(k for k in range(2, 99) if rng.left_out(hashes, k).any())
    keys = (f"model.members={members}", "model.family=ensemble", "train.corrupt_history=5")
    result = pretrain(root, "train.steps=2", *keys)
    losses = {f"ensemble, corrupted {step}": result.losses[step][0] for step in (1, 2)}
    golden.check("pretrain", losses)
    world = World.load(result.artifact.path)
    fresh = build(world.spec, world.config)
    init_(fresh, 0)
    changed = world.net.get_parameter("last.weight") != fresh.get_parameter("last.weight")
    assert changed.flatten(1).any(1).all()
    first_base = Base(world.spec, world.config)
    init_(first_base.termination, 0)
    pairs = (base.termination.last.weight for base in (world.base, first_base))
    assert (next(pairs) != next(pairs)).flatten(1).any(1).all()
    batch = Loader(dataset, Codec.from_json(world.codec), "train", 8, 8, 0).batch(0)
    first = {}
    for amount in (0.0, 5.0):
        windows = rank_trainer.corrupted(batch, world.base, amount, 0, 0)
        losses = fresh(windows, apply_base(world.base, windows))
        first[amount] = float(sum(losses.nats.values()) / losses.transitions)
    assert result.losses[1][0] == approx(first[5.0], abs=1e-3)
    assert abs(first[5.0] - first[0.0]) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        (["train.precision=bf16"], 0.05),
        (["train.precision=bf16", "train.zero_stage=3"], 0.05),
        (["train.activation_checkpointing=true"], 1e-5),
    ],
)
def test_other_ways_to_compute_the_same(
    whole: Any,
    tmp_path: Path,
    cart_root: Make,
    pretrain: Make,
    options: list[str],
    tolerance: float,
) -> None:
    assert pretrain(cart_root(tmp_path), *SHORT_RUN, *options).has_losses_of(whole, rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sequence", "ensemble"])
def test_termination_is_learned(
    tmp_path: Path, cart_root: Make, pretrain: Make, family: str
) -> None:
    keys = (f"model.family={family}", "train.steps=600", "train.batch=16")
    meta = pretrain(cart_root(tmp_path, 2500), *keys).artifact.meta
    assert meta["checks"] == {"termination": "passed", "actions": "passed"}
    assert meta["metrics"]["termination_recall"] >= 0.6
    assert meta["metrics"]["termination_precision"] > 0.6
