"""A pretraining that is stopped or killed, or has two workers, ends as an undisturbed one does."""

from __future__ import annotations

import json
import logging.handlers
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import SHORT_RUN
from pytest import approx

from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.loader import Loader
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.model.world import World
from mesocosm.store.artifacts import Storage
from mesocosm.train import prepare, worker
from mesocosm.train import pretrain as driver

from .stopping import after_put, stop_after

pytestmark = pytest.mark.usefixtures("ray_local")
Make = Callable[..., Any]


@pytest.mark.slow
def test_a_killed_worker_costs_no_digit(
    whole: Any, tmp_path: Path, cart_root: Make, pretrain: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL in step 6, after the checkpoint of step 4: every step's loss is that of the
    undisturbed run, also those trained twice. The driver logs no traceback of Ray Train.
    """
    logged = logging.handlers.BufferingHandler(1000)
    monkeypatch.setattr(logging.getLogger("ray.train"), "handlers", [logged])
    marker = tmp_path / "killed"

    def kill_once(feed: Any) -> None:
        if not marker.exists():
            feed.flush()
            marker.touch()
            time.sleep(8.0)  # the controller polls its workers for step 4's checkpoint
            os.kill(os.getpid(), signal.SIGKILL)

    after_put(6, kill_once, monkeypatch)
    killed = pretrain(cart_root(tmp_path), *SHORT_RUN)
    assert marker.exists() and whole.has_weights_of(killed)
    assert logged.buffer == []
    assert killed.losses == {
        step: values * (2 if step in (5, 6) else 1) for step, values in whole.losses.items()
    }


@pytest.mark.slow
def test_two_workers_agree_with_one(
    whole: Any, tmp_path: Path, cart_root: Make, pretrain: Make
) -> None:
    options = ("train.workers=2", "train.accumulate=2", "train.peak_flops=1e9")
    two = pretrain(cart_root(tmp_path), *SHORT_RUN, *options)
    last = two.line(12)
    flops = two.artifact.meta["counts"]["flops"] / 12 / (8 * 8) * last["positions_per_s"]
    assert last["mfu"] == approx(flops / 1e9 / 2), "of the declared peak of each worker"
    assert two.artifact.id == whole.artifact.id and two.has_losses_of(whole, abs=1e-4)


@pytest.mark.slow
def test_a_killed_second_rank_costs_no_digit_of_sharded_training(
    tmp_path: Path, cart_root: Make, pretrain: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker, sharded = tmp_path / "killed", (*SHORT_RUN, "train.workers=2", "train.zero_stage=2")
    whole = pretrain(cart_root(tmp_path / "whole"), *sharded)

    def killed_once(config: dict[str, Any]) -> None:
        import ray.train

        from mesocosm.train import driver_channel
        from mesocosm.train.schedule import Watch

        driver_channel.FLUSH_SECONDS = 0.0  # rank 0 dies with its group: it reports every step
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
    assert whole.has_weights_of(killed)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resume_at_another_world_size(
    whole: Any, tmp_path: Path, cart_root: Make, pretrain: Make, stage: int
) -> None:
    """Two workers train five steps under each ZeRO stage, and one worker the rest."""
    root, other = cart_root(tmp_path), (stage + 1) % 4
    with pytest.MonkeyPatch.context() as patch:
        stop_after(5, patch)
        with pytest.raises(MesocosmError, match="run the same command again"):
            pretrain(root, *SHORT_RUN, "train.workers=2", f"train.zero_stage={stage}")
    message = rf"train\.zero_stage must be {stage} to resume from step 5, got {other}"
    with pytest.raises(UsageError, match=message):
        pretrain(root, *SHORT_RUN, f"train.zero_stage={other}")
    resumed = pretrain(root, *SHORT_RUN, f"train.zero_stage={stage}")
    assert "resuming from step 5 of 12" in resumed.log and min(resumed.losses) == 6
    files = list(Path(root).glob("runs/pretrain/*/metrics.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    assert losses == approx({step: loss for step, (loss,) in whole.losses.items()}, abs=1e-4)
    one, other = (World.load(result.artifact.path).net.state_dict() for result in (whole, resumed))
    torch.testing.assert_close(dict(other), dict(one), atol=1e-4, rtol=1e-4)


OVERFIT = ("model.family=ensemble", "model.members=4", "model.size=30k", "train.steps=400")
OVERFIT += ("train.lr=2e-2",)


def _overfitting() -> Callable[[dict[str, Any]], None]:
    """A training loop in which 120 transitions are overfitted early, and more so by .02 nats a
    step, since few held-out windows are noisy. A worker cannot import this file, so the loop is
    nested: it is sent by value.
    """

    def overfitting(config: dict[str, Any]) -> None:
        from mesocosm.train.rank_trainer import RankTrainer

        judge = RankTrainer.held_out_loss

        def judge_worse(self: RankTrainer, widening: float) -> tuple[float, float] | None:
            judged = judge(self, widening)
            steps: int = self.engine.global_steps
            return None if judged is None else (judged[0] + 0.02 * steps, judged[1])

        RankTrainer.held_out_loss = judge_worse  # type: ignore[method-assign]
        worker.train_loop(config)

    return overfitting


@pytest.fixture(scope="module")
def overfitted(
    tmp_path_factory: pytest.TempPathFactory, cart_root: Make, pretrain: Make, ray_local: None
) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "train_loop", _overfitting())
        return pretrain(cart_root(tmp_path_factory.mktemp("overfitted"), 120), *OVERFIT)


def test_held_out_episodes_choose_the_weights_and_end_training(overfitted: Any) -> None:
    meta, world = overfitted.artifact.meta, World.load(overfitted.artifact.path)
    judged = {r["step"]: r["held_out/loss"] for r in overfitted.lines if "held_out/loss" in r}
    step, ended = meta["metrics"]["chosen_step"], meta["counts"]["steps"]
    assert step == min(judged, key=judged.__getitem__) < ended == max(judged) < 400
    assert f"kept the weights of step {step:.0f}" in overfitted.log
    assert (world.base.widening != 1).all()
    world.base.widening.fill_(1.0)  # as they were when they were validated
    dataset = prepare.open_datasets(Storage(str(overfitted.artifact.path.parents[1])), ["cart"])
    loader = Loader(dataset, Codec.from_json(world.codec), "valid", 8, 8, 0)
    losses = [world.losses(windows) for windows in loader.eval_batches()]
    count = sum(float(part.transitions) for part in losses)
    nats = sum(float(part.nats["dynamics"]) for part in losses) / count
    assert nats == approx(meta["metrics"]["valid/dynamics"], rel=1e-4)


@pytest.mark.slow
def test_a_run_that_is_stopped_after_the_chosen_step_has_its_weights(
    overfitted: Any,
    tmp_path: Path,
    cart_root: Make,
    pretrain: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = cart_root(tmp_path, 120)
    last = int(overfitted.artifact.meta["metrics"]["chosen_step"]) + 5
    with monkeypatch.context() as patch:
        stop_after(last, patch, _overfitting())
        with pytest.raises(MesocosmError, match="ended before step 400"):
            pretrain(root, *OVERFIT)
    monkeypatch.setattr(driver, "train_loop", _overfitting())
    again = pretrain(root, *OVERFIT)
    assert f"resuming from step {last}" in again.log and overfitted.has_weights_of(again)
