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
from mesocosm.train import checkpoint, prepare, training, worker
from mesocosm.train import pretrain as driver
from mesocosm.train.schedule import FACTOR, MARGIN, lr_factor

pytestmark = pytest.mark.usefixtures("ray_local")
SHORT = ("train.steps=12", "train.checkpoint_every=4", "train.validate_every=6")
STEPS, NAMES = range(1, 13), ("counts", "metrics", "checks")
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cart_root: Make, pretrain: Make) -> Any:
    """One worker, never disturbed."""
    return pretrain(cart_root(tmp_path_factory.mktemp("whole")), *SHORT)


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


def test_known_parts_are_of_the_world_and_change_no_weight(whole: Any, pretrain: Make) -> None:
    root, module = str(whole.artifact.path.parent.parent), "mesocosm.envs.known"
    ended = f"{module}:cartpole_terminated"
    result = pretrain(root, *SHORT, f"known.terminated={ended}")
    meta, world = result.artifact.meta, World.load(result.artifact.path)
    assert result.artifact.id != whole.artifact.id and same_weights(result, whole)
    assert meta["config"]["known"]["terminated"]["function"] == ended
    assert "known" not in whole.artifact.meta["config"]
    assert meta["checks"]["termination"] == f"not applicable: {ended} is known"
    learned = whole.artifact.meta["metrics"]["termination_recall"]
    assert meta["metrics"]["termination_recall"] == learned
    assert world.known is not None and world.known.reward is None
    with pytest.raises(UsageError, match=r"known.terminated='.*:never' must agree with the data"):
        pretrain(root, *SHORT, f"known.terminated={module}:never")
    assert Storage(root).list("runs/checkpoints") == []


def test_run_again_reuses_the_world_and_leaves_nothing(whole: Any, pretrain: Make) -> None:
    root = str(whole.artifact.path.parent.parent)
    again = pretrain(root, *SHORT, "train.zero_stage=1", "train.checkpoint_every=6")
    assert again.artifact.id == whole.artifact.id and "found worlds/" in again.log
    assert Storage(root).list("runs/checkpoints") == []


def same_weights(a: Any, b: Any) -> bool:
    """Whether two worlds have the same weights to the last bit."""
    one, other = ((x.artifact.path / "model.safetensors").read_bytes() for x in (a, b))
    return bool(one == other)


def agree(result: Any, whole: Any, **tolerance: float) -> bool:
    """Whether each step's last loss is that of the undisturbed run."""
    return bool(
        {step: values[-1] for step, values in result.losses.items()}
        == approx({step: whole.losses[step][0] for step in result.losses}, **tolerance)
    )


def _after_put(step: int, action: Callable[[Any], None], patch: pytest.MonkeyPatch) -> None:
    """Call `action(feed)` in the worker after it reports `step`."""

    def changed(config: dict[str, Any]) -> None:
        from mesocosm.train.feed import Feed

        put = Feed.put

        def put_and_act(self: Feed, record: dict[str, Any]) -> None:
            put(self, record)
            if record.get("step") == step:
                action(self)

        Feed.put = put_and_act  # type: ignore[method-assign]
        worker.train_loop(config)

    patch.setattr(driver, "train_loop", changed)


def _stop_after(step: int, patch: pytest.MonkeyPatch) -> None:
    """Stop as a driver that is interrupted does."""

    def stop(feed: Any) -> None:
        feed.stop("a test")
        feed.flush()

    _after_put(step, stop, patch)


@pytest.mark.slow
def test_a_killed_worker_costs_no_digit(
    whole: Any, tmp_path: Path, cart_root: Make, pretrain: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL in step 6, after the checkpoint of step 4: every step's loss is that of the
    undisturbed run, also those trained twice.
    """
    marker = tmp_path / "killed"

    def kill_once(feed: Any) -> None:
        if not marker.exists():
            feed.flush()
            marker.touch()
            time.sleep(8.0)  # the controller polls its workers for step 4's checkpoint
            os.kill(os.getpid(), signal.SIGKILL)

    _after_put(6, kill_once, monkeypatch)
    killed = pretrain(cart_root(tmp_path), *SHORT)
    assert marker.exists() and same_weights(whole, killed)
    assert killed.losses == {
        step: values * (2 if step in (5, 6) else 1) for step, values in whole.losses.items()
    }


def test_a_stopped_training_saves_a_checkpoint(
    whole: Any, tmp_path: Path, cart_root: Make, pretrain: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in step 6, two steps after a checkpoint: the next run resumes from step 6, and ends
    with the undisturbed run's weights.
    """
    root = cart_root(tmp_path)
    with monkeypatch.context() as patch:
        _stop_after(6, patch)
        with pytest.raises(MesocosmError, match="ended before step 12; run the same command again"):
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
    last = two.line(12)
    flops = two.artifact.meta["counts"]["flops"] / 12 / (8 * 8) * last["positions_per_s"]
    assert last["mfu"] == approx(flops / 1e9 / 2), "of the declared peak of each worker"
    assert two.artifact.id == whole.artifact.id and agree(two, whole, abs=1e-4)


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
    assert last[1].step == good < len(losses), "no checkpoint while the loss was high"


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
        windows = training.corrupted(batch, world.base, amount, 0, 0)
        losses = fresh(windows, apply_base(world.base, windows))
        first[amount] = float(sum(losses.nats.values()) / losses.transitions)
    assert result.losses[1][0] == approx(first[5.0], abs=1e-3)
    assert abs(first[5.0] - first[0.0]) > 0.1


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
    root, other = cart_root(tmp_path), (stage + 1) % 4
    with pytest.MonkeyPatch.context() as patch:
        _stop_after(5, patch)
        with pytest.raises(MesocosmError, match="run the same command again"):
            pretrain(root, *SHORT, "train.workers=2", f"train.zero_stage={stage}")
    message = rf"train\.zero_stage must be {stage} to resume from step 5, got {other}"
    with pytest.raises(UsageError, match=message):
        pretrain(root, *SHORT, f"train.zero_stage={other}")
    resumed = pretrain(root, *SHORT, f"train.zero_stage={stage}")
    assert "resuming from step 5 of 12" in resumed.log and min(resumed.losses) == 6
    files = list(Path(root).glob("runs/pretrain/*/metrics.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    assert losses == approx({step: loss for step, (loss,) in whole.losses.items()}, abs=1e-4)
    one, other = (World.load(result.artifact.path).net.state_dict() for result in (whole, resumed))
    torch.testing.assert_close(dict(other), dict(one), atol=1e-4, rtol=1e-4)


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
    assert agree(pretrain(cart_root(tmp_path), *SHORT, *options), whole, rel=tolerance)


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


OVERFIT = ("model.family=ensemble", "model.members=4", "model.size=30k", "train.steps=400")
OVERFIT += ("train.lr=2e-2",)


def test_held_out_episodes_choose_the_weights_and_end_training(
    tmp_path: Path, cart_root: Make, pretrain: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """120 transitions are overfitted early. A run that is stopped after the chosen step and resumed
    still has its weights.
    """
    roots = [cart_root(tmp_path / name, 120) for name in ("whole", "stopped")]
    result = pretrain(roots[0], *OVERFIT)
    meta, world = result.artifact.meta, World.load(result.artifact.path)
    judged = {r["step"]: r["held_out/loss"] for r in result.lines if "held_out/loss" in r}
    step, ended = meta["metrics"]["chosen_step"], meta["counts"]["steps"]
    assert step == min(judged, key=judged.__getitem__) < ended == max(judged) < 400
    assert f"kept the weights of step {step:.0f}" in result.log
    assert (world.base.widening != 1).all()
    world.base.widening.fill_(1.0)  # as they were when they were validated
    dataset = prepare.open_datasets(Storage(roots[0]), ["cart"])
    loader = Loader(dataset, Codec.from_json(world.codec), "valid", 8, 8, 0)
    losses = [world.losses(windows) for windows in loader.eval_batches()]
    count = sum(float(part.transitions) for part in losses)
    nats = sum(float(part.nats["dynamics"]) for part in losses) / count
    assert nats == approx(meta["metrics"]["valid/dynamics"], rel=1e-4)

    with monkeypatch.context() as patch:
        _stop_after(int(step) + 5, patch)
        with pytest.raises(MesocosmError, match="ended before step 400"):
            pretrain(roots[1], *OVERFIT)
    again = pretrain(roots[1], *OVERFIT)
    assert f"resuming from step {step + 5:.0f}" in again.log and same_weights(result, again)
