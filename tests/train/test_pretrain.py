"""Pretraining as a user runs it: Ray Train, DeepSpeed, storage and MLflow are the real ones."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.loader import Loader
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.model import rng
from mesocosm.model.families import build
from mesocosm.model.mup import init_
from mesocosm.model.net import apply_base
from mesocosm.model.world import World
from mesocosm.store.artifacts import Storage
from mesocosm.train import checkpoint, prepare, training, worker
from mesocosm.train import pretrain as driver
from mesocosm.train.schedule import FACTOR, MARGIN, lr_factor

pytestmark = pytest.mark.usefixtures("ray_local")
SHORT = ("train.steps=12", "train.checkpoint_every=4", "train.validate_every=6")
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cart_root: Make, pretrain: Make) -> Any:
    """One worker, never disturbed."""
    return pretrain(cart_root(tmp_path_factory.mktemp("whole")), *SHORT)


def test_losses_fall(whole: Any, golden: Any) -> None:
    losses = [values[0] for values in whole.losses.values()]
    assert list(whole.losses) == list(range(1, 13)) and all(
        len(values) == 1 for values in whole.losses.values()
    )
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    family = whole.artifact.meta["config"]["model"]["family"]
    golden.check("pretrain", {f"{family} {step}": losses[step - 1] for step in (1, 6, 12)})


def test_the_metrics_of_a_run(whole: Any) -> None:
    first, last = whole.lines[0], next(line for line in whole.lines if line["step"] == 12)
    for part in ("dynamics", "reward", "termination", "task"):
        assert math.isfinite(first[f"train/{part}"]) and math.isfinite(last[f"valid/{part}"])
    assert first["train/loss"] == pytest.approx(
        sum(first[f"train/{part}"] for part in ("dynamics", "reward", "termination", "task"))
    )
    assert 0 < last["mfu"] < 1 and last["positions_per_s"] >= last["transitions_per_s"] > 0
    assert first["train/gradient_norm"] > 0


def test_the_optimiser_has_the_rate_of_its_step(whole: Any) -> None:
    rates = [line["lr"] for line in whole.lines if "lr" in line]
    assert (
        rates == pytest.approx([3e-3 * lr_factor(step, 12, 0.05, 0.4) for step in range(1, 13)])
        and len(set(rates)) > 4
    )


def test_the_world_loads_and_steps(whole: Any) -> None:
    world = World.load(whole.artifact.path)
    codec = Codec.from_json(world.codec)
    keys = rng.keys(0, torch.arange(5), 0, 0)
    task, observation = world.sample_start(keys)
    carry = world.begin(task, observation, torch.zeros(5, dtype=torch.int64))
    carry, out = world.step(carry, codec.action(np.ones(5, np.int64)), keys)
    assert out.observation.numbers.shape == (5, 4) and torch.isfinite(out.observation.numbers).all()
    assert all(parameter.dtype == torch.float32 for parameter in world.net.parameters())


def test_the_artifact_has_its_provenance(whole: Any) -> None:
    meta = whole.artifact.meta
    assert meta["inputs"] == {"datasets": ["cart"]} and meta["job"] == "pretrain"
    assert (
        meta["config"]["train"]["precision"] == "fp32" and "workers" not in meta["config"]["train"]
    )
    assert meta["counts"]["steps"] == 12 and meta["counts"]["params"] > 1000
    assert meta["counts"]["epochs"] == pytest.approx(
        meta["counts"]["data"] / meta["counts"]["unique"]
    )
    assert meta["metrics"]["valid/loss"] > 0 and "termination" in meta["checks"]
    assert meta["checks"]["actions"] == "passed" and meta["evidence"]["high_rate"] == 1.0


def test_a_world_that_never_ends_fails_its_own_check(whole: Any) -> None:
    """Twelve steps teach no termination, and the job says so."""
    assert whole.artifact.meta["metrics"]["termination_recall"] == 0.0
    assert whole.artifact.meta["checks"]["termination"].startswith("failed: of ")
    assert "warning: termination check failed" in whole.log


def test_run_again_finds_it_and_nothing_is_left_behind(whole: Any, pretrain: Make) -> None:
    root = str(whole.artifact.path.parent.parent)
    again = pretrain(root, *SHORT, "train.zero_stage=1", "train.checkpoint_every=6")
    assert again.artifact.id == whole.artifact.id and "found worlds/" in again.log
    assert Storage(root).list("runs/checkpoints") == []


def same_weights(a: Any, b: Any) -> bool:
    """Whether two worlds have the same weights to the last bit."""
    one, other = ((x.artifact.path / "model.safetensors").read_bytes() for x in (a, b))
    return bool(one == other)


def _until(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop after `step`, as a driver that is interrupted does."""

    def interrupted(config: dict[str, Any]) -> None:
        from mesocosm.train.feed import Feed

        put = Feed.put

        def put_and_stop(self: Feed, record: dict[str, Any]) -> None:
            put(self, record)
            if record.get("step") == step:
                self.stop("a test")
                self.flush()

        Feed.put = put_and_stop  # type: ignore[method-assign]
        worker.train_loop(config)

    monkeypatch.setattr(driver, "train_loop", interrupted)


@pytest.mark.slow
def test_a_killed_worker_costs_no_digit(
    whole: Any, tmp_path: Path, cart_root: Make, pretrain: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL in step 6, after the checkpoint of step 4: every step's loss is that of the
    undisturbed run, also those trained twice.
    """
    marker = tmp_path / "killed"

    def killed_once(config: dict[str, Any]) -> None:
        from mesocosm.train.feed import Feed

        put = Feed.put

        def put_and_die(self: Feed, record: dict[str, Any]) -> None:
            put(self, record)
            if record.get("step") == 6 and not marker.exists():
                self.flush()
                marker.touch()
                # The controller polls its workers, and hears of step 4's checkpoint.
                time.sleep(8.0)
                os.kill(os.getpid(), signal.SIGKILL)

        Feed.put = put_and_die  # type: ignore[method-assign]
        worker.train_loop(config)

    monkeypatch.setattr(driver, "train_loop", killed_once)
    killed = pretrain(cart_root(tmp_path), *SHORT)
    assert marker.exists()
    assert killed.losses == {
        step: values * (2 if step in (5, 6) else 1) for step, values in whole.losses.items()
    }
    assert same_weights(whole, killed)


def test_a_stopped_training_saves_a_checkpoint(
    whole: Any, tmp_path: Path, cart_root: Make, pretrain: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in step 6, two steps after a checkpoint: the next run resumes from step 6, and ends
    with the undisturbed run's weights.
    """
    root = cart_root(tmp_path)
    with monkeypatch.context() as patch:
        _until(6, patch)
        with pytest.raises(
            MesocosmError, match="ended before step 12; run the same command again to resume"
        ):
            pretrain(root, *SHORT)
    again = pretrain(root, *SHORT)
    assert "resuming from step 6 of 12" in again.log and min(again.losses) == 7
    assert same_weights(whole, again)


@pytest.mark.slow
def test_two_workers_agree_with_one(
    whole: Any, tmp_path: Path, cart_root: Make, pretrain: Make
) -> None:
    options = ("train.workers=2", "train.accumulate=2", "train.peak_flops=1e9")
    two = pretrain(cart_root(tmp_path), *SHORT, *options)
    last = next(line for line in two.lines if line["step"] == 12)
    flops = two.artifact.meta["counts"]["flops"] / 12 / (8 * 8) * last["positions_per_s"]
    assert last["mfu"] == pytest.approx(flops / 1e9 / 2), "of the declared peak of each worker"
    assert two.artifact.id == whole.artifact.id
    for step, (loss,) in whole.losses.items():
        assert two.losses[step][0] == pytest.approx(loss, abs=1e-4)


@pytest.mark.slow
def test_a_diverging_loss_stops_the_run_and_names_the_step(
    tmp_path: Path, cart_root: Make, pretrain: Make
) -> None:
    root = cart_root(tmp_path)
    overrides = (
        "train.lr=10",
        "train.steps=30",
        "train.checkpoint_every=1",
        "train.warmup=0.5",
        "train.decay=0",
    )
    with pytest.raises(
        MesocosmError,
        match=(
            r"training stopped: the .* is (nan|inf) at step \d+; the checkpoint of step \d+ is"
            r" kept; lower train.lr=10"
        ),
    ):
        pretrain(root, *overrides)
    (id,) = Storage(root).list("runs/checkpoints")
    last = checkpoint.latest(Storage(root), id)
    assert last is not None and last[1].step >= 1 and Storage(root).list("worlds") == []
    lines = [
        json.loads(line)
        for line in next(Path(root).glob("runs/pretrain/*/metrics.jsonl")).read_text().splitlines()
    ]
    losses = [line["train/loss"] for line in lines]
    good = [
        step for step, loss in enumerate(losses, 1) if loss <= FACTOR * min(losses[:step]) + MARGIN
    ]
    assert last[1].step == good[-1] < len(losses), (
        "no checkpoint was made while the loss was exploding"
    )


def test_more_workers_than_the_cluster_has(tmp_path: Path, cart_root: Make, pretrain: Make) -> None:
    with pytest.raises(UsageError, match=r"train\.workers=8 asks for 8 CPUs and the cluster has 4"):
        pretrain(cart_root(tmp_path), "train.batch=16", "train.events=16", "train.workers=8")


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
    try:
        with pytest.raises(
            MesocosmError,
            match=(
                r"train\.workers=1 of pretraining were not to be started in 2 attempts: the cluster"
                r" has .*the same command again"
            ),
        ):
            pretrain(cart_root(tmp_path), *SHORT)
    finally:
        ray.kill(holder)


def test_corrupted_histories_of_a_single_episode_train_every_member(
    tmp_path: Path, cart_root: Make, pretrain: Make, golden: Any
) -> None:
    """The first loss is that of the noisy windows, and a member that would keep no episode keeps
    all.
    """
    root = cart_root(tmp_path, 1)
    dataset = prepare.open_datasets(Storage(root), ["cart"])
    members = next(
        k
        for k in range(2, 99)
        if rng.left_out(torch.from_numpy(dataset.table["hash"].astype(np.int64)), k).any()
    )
    result = pretrain(
        root,
        "train.steps=2",
        f"model.members={members}",
        "model.family=ensemble",
        "train.corrupt_history=5",
    )
    golden.check(
        "pretrain", {f"ensemble, corrupted {step}": result.losses[step][0] for step in (1, 2)}
    )
    world = World.load(result.artifact.path)
    fresh = build(world.spec, world.config)
    init_(fresh, 0)
    for name in ("last.weight", "termination.head.mlp.last.weight"):
        assert (
            (world.net.get_parameter(name) != fresh.get_parameter(name)).flatten(1).any(1).all()
        ), name
    batch = Loader(dataset, Codec.from_json(world.codec), "train", 8, 8, 0).batch(0)
    first = {}
    for amount in (0.0, 5.0):
        windows = training.corrupted(batch, world.base, amount, 0, 0)
        losses = fresh(windows, apply_base(world.base, windows))
        first[amount] = float(sum(losses.nats.values()) / losses.transitions)
    assert (
        result.losses[1][0] == pytest.approx(first[5.0], abs=1e-3)
        and abs(first[5.0] - first[0.0]) > 0.1
    )


@pytest.mark.slow
def test_a_killed_second_rank_costs_no_digit_of_sharded_training(
    tmp_path: Path, cart_root: Make, pretrain: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker, sharded = tmp_path / "killed", (*SHORT, "train.workers=2", "train.zero_stage=2")
    whole = pretrain(cart_root(tmp_path / "whole"), *sharded)

    def killed_once(config: dict[str, Any]) -> None:
        import ray.train

        from mesocosm.train import feed
        from mesocosm.train.schedule import Watch

        feed.FLUSH_SECONDS = 0.0  # rank 0 dies with its group: it reports every step
        check = Watch.check

        def check_and_die(self: Watch, step: int, **values: Any) -> str | None:
            if step == 7 and ray.train.get_context().get_world_rank() == 1 and not marker.exists():
                marker.touch()
                time.sleep(8.0)
                os.kill(os.getpid(), signal.SIGKILL)
            return check(self, step, **values)

        Watch.check = check_and_die  # type: ignore[assignment]
        worker.train_loop(config)

    monkeypatch.setattr(driver, "train_loop", killed_once)
    killed = pretrain(cart_root(tmp_path / "killed-root"), *sharded)
    assert marker.exists()
    assert killed.losses == {
        step: values * (2 if step in (5, 6) else 1) for step, values in whole.losses.items()
    }
    assert same_weights(whole, killed)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resume_at_another_world_size(
    whole: Any, tmp_path: Path, cart_root: Make, pretrain: Make, stage: int
) -> None:
    """Two workers train five steps under each ZeRO stage, and one worker the rest."""
    root = cart_root(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        _until(5, patch)
        with pytest.raises(MesocosmError, match="run the same command again"):
            pretrain(root, *SHORT, "train.workers=2", f"train.zero_stage={stage}")
    with pytest.raises(
        UsageError,
        match=rf"train\.zero_stage must be {stage} to resume from step 5, got {(stage + 1) % 4}",
    ):
        pretrain(root, *SHORT, f"train.zero_stage={(stage + 1) % 4}")
    resumed = pretrain(root, *SHORT, f"train.zero_stage={stage}")
    assert "resuming from step 5 of 12" in resumed.log and min(resumed.losses) == 6
    files = list(Path(root).glob("runs/pretrain/*/metrics.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    for step, (loss,) in whole.losses.items():
        assert losses[step] == pytest.approx(loss, abs=1e-4)
    one, other = (World.load(result.artifact.path).net.state_dict() for result in (whole, resumed))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("train.precision=bf16",),
        ("train.precision=bf16", "train.zero_stage=3"),
        ("train.activation_checkpointing=true",),
    ],
)
def test_other_ways_to_compute_the_same(
    whole: Any, tmp_path: Path, cart_root: Make, pretrain: Make, options: tuple[str, ...]
) -> None:
    other = pretrain(cart_root(tmp_path), *SHORT, *options)
    tolerance = 0.05 if "train.precision=bf16" in options else 1e-5
    for step, (loss,) in whole.losses.items():
        assert other.losses[step][0] == pytest.approx(loss, rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sequence", "ensemble"])
def test_termination_is_learned(
    tmp_path: Path, cart_root: Make, pretrain: Make, family: str
) -> None:
    result = pretrain(
        cart_root(tmp_path, 2500),
        f"model.family={family}",
        "train.steps=600",
        "train.batch=16",
        "train.events=48",
    )
    assert result.artifact.meta["checks"] == {"termination": "passed", "actions": "passed"}
    assert (
        result.artifact.meta["metrics"]["termination_recall"] >= 0.6
        and result.artifact.meta["metrics"]["termination_precision"] > 0.6
    )
