"""The worker loop: what every rank of a pretraining group runs, from the datasets to the float32
weights, as one story.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mesocosm.data.loading.codec import Codec
from mesocosm.errors import MesocosmError
from mesocosm.model.base import Base
from mesocosm.model.config import ModelConfig
from mesocosm.store.artifacts import Storage
from mesocosm.train import checkpoint, engine, prepare
from mesocosm.train.checkpoint import Progress
from mesocosm.train.config import DataConfig, TrainConfig
from mesocosm.train.engine import Rank
from mesocosm.train.feed import Feed
from mesocosm.train.metrics import Meter, measured_peak
from mesocosm.train.schedule import Watch, due, lr_factor
from mesocosm.train.training import Diverged, Training

RATES_EVERY = 10
"""Steps between measurements of throughput."""


@dataclass(frozen=True)
class Work:
    """What the driver hands to every rank: plain data."""

    id: str
    """Of the world that is made."""
    root: str
    data: DataConfig
    """`datasets` are whole ids."""
    model: ModelConfig
    train: TrainConfig
    """`precision` resolved."""
    steps: int
    seed: int


def train_loop(config: dict[str, Any]) -> None:
    """Train, or go on from the last checkpoint. What another attempt would meet again is told
    through the feed.
    """
    work: Work = config["work"]
    storage = Storage(work.root)
    feed = Feed(storage, checkpoint.folder_of(work.id))
    if feed.stopped:
        return
    try:
        _train(work, storage, feed)
    except MesocosmError as error:
        feed.fail(str(error))
        raise


def _train(work: Work, storage: Storage, feed: Feed) -> None:
    import ray.train
    import ray.train.torch

    options, context = work.train, ray.train.get_context()
    own = Rank(
        context.get_world_rank(),
        context.get_local_rank(),
        context.get_world_size(),
        ray.train.torch.get_device(),
    )
    if own.device.type == "cpu":
        torch.set_num_threads(1)

    dataset = prepare.open_datasets(storage, work.data.datasets, work.data.cache_gib)
    codec = prepare.fitted_codec(storage, checkpoint.folder_of(work.id), dataset)
    dataset = prepare.narrowed(dataset, work.data.unique, work.seed)
    resumed = ray.train.get_checkpoint()
    with resumed.as_directory() if resumed else nullcontext() as kept:
        training, before = Training.start(
            dataset,
            codec,
            work.model,
            options,
            work.seed,
            own,
            partial(_base, work, storage, codec, feed),
            kept=Path(kept) if kept else None,
            id=work.id,
            data=work.data,
        )
    progress = before or Progress(
        0, work.steps, own.world_size, engine.stage(options), options.precision
    )
    saved = progress.step

    watch = training.watch = Watch(progress.best, progress.high)
    flops = prepare.read_flops(storage, checkpoint.folder_of(work.id))
    meter = Meter(
        flops,
        options.batch * work.model.context,
        options.peak_flops or measured_peak(own.device, options.precision),
        own.world_size,
    )

    while progress.step < work.steps:
        step = progress.step + 1
        done = step == work.steps
        meter.begin()
        try:
            told = training.step(
                step,
                lr_factor(step, work.steps, options.warmup, options.decay),
                last=done,
                stop=feed.told_to_stop,
            )
        except Diverged as trouble:
            if own.rank == 0:
                feed.fail(_stopped(str(trouble), saved, options))
            return
        if told is None:  # to stop: what was trained is kept
            if progress.step > saved:
                _report(checkpoint.save_running(training.engine, progress, own.rank), progress.step)
            return
        meter.end(told["transitions"])

        progress = replace(
            progress,
            step=step,
            best=watch.best,
            high=watch.high,
            seconds=progress.seconds + meter.last,
        )
        record = {
            "step": step,
            **{f"train/{name}": value for name, value in told.items()},
            "lr": training.lr,
        }
        if step % RATES_EVERY == 0 or done:
            record |= meter.read()
        if training.valid is not None and (step % options.validate_every == 0 or done):
            measured = training.validate()
            record |= measured
            progress = replace(
                progress, validations=[*progress.validations, {"step": step, **measured}]
            )
        if own.rank == 0:
            feed.put(record)
        if done or due(step, saved, options.checkpoint_every, watch.high):
            if done:
                progress = replace(progress, measured=meter.overall())
            full = engine.weights(training.engine, own) if done else None
            folder = (
                checkpoint.save_final(full, progress, own.rank)
                if done
                else checkpoint.save_running(training.engine, progress, own.rank)
            )
            feed.flush()
            _report(folder, step)
            saved = step


def _report(folder: Path, step: int) -> None:
    """Hand this rank's part of a checkpoint to Ray Train; every rank comes by here."""
    import ray.train

    made = ray.train.Checkpoint.from_directory(str(folder))
    ray.train.report({"step": step}, checkpoint=made, delete_local_checkpoint_after_upload=True)


def _base(work: Work, storage: Storage, codec: Codec, feed: Feed) -> Base:
    """The base that the driver fits while this group starts."""
    while (
        base := prepare.read_base(storage, checkpoint.folder_of(work.id), codec.spec, work.model)
    ) is None:
        if feed.stopped:
            raise MesocosmError("stopped while waiting for the base")
        time.sleep(0.1)
    return base


def _stopped(trouble: str, saved: int, options: TrainConfig) -> str:
    where = (
        f"the checkpoint of step {saved} is kept" if saved else "no checkpoint had been made yet"
    )
    return (
        f"training stopped: {trouble}; {where}; lower train.lr={options.lr:g} or look at the data"
    )
