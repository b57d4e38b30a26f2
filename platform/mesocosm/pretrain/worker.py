"""The worker loop: what every rank of a pretraining group runs, from the datasets to the float32 weights, as one story."""

from __future__ import annotations

import itertools
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mesocosm.data.codec import Codec
from mesocosm.data.loader import Loader
from mesocosm.errors import MesocosmError
from mesocosm.model import mup, rng
from mesocosm.model.base import Base
from mesocosm.model.config import ModelConfig
from mesocosm.model.net import Losses, apply_base, build
from mesocosm.model.spec import Parts, Windows
from mesocosm.pretrain import checkpoint, engine, prepare
from mesocosm.pretrain.checkpoint import Progress
from mesocosm.pretrain.config import TrainConfig
from mesocosm.pretrain.engine import Rank
from mesocosm.pretrain.feed import Feed
from mesocosm.pretrain.metrics import Meter, Sums, measured_peak
from mesocosm.pretrain.schedule import Watch, due, lr_factor
from mesocosm.storage import Storage

RATES_EVERY = 10
"""Steps between measurements of throughput."""
NOISE = -2
"""Salt of the noise on corrupted histories."""


@dataclass(frozen=True)
class Work:
    """What the driver hands to every rank: plain data."""

    id: str
    """Of the world that is made."""
    root: str
    datasets: list[str]
    model: ModelConfig
    train: TrainConfig
    """`precision` resolved."""
    steps: int
    seed: int


def train_loop(config: dict[str, Any]) -> None:
    """Train, or go on from the last checkpoint. What another attempt would meet again is told through the feed."""
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
    own = Rank(context.get_world_rank(), context.get_local_rank(), context.get_world_size(), ray.train.torch.get_device())
    if own.device.type == "cpu":
        torch.set_num_threads(1)

    dataset = prepare.open_datasets(storage, work.datasets)
    codec = prepare.fitted_codec(storage, checkpoint.folder_of(work.id), dataset)
    events = prepare.events_of(codec.spec, options)
    loader = Loader(dataset, codec, "train", work.model.context, options.batch, work.seed, events)
    valid = Loader(dataset, codec, "valid", work.model.context, options.batch, work.seed) if len(dataset.episodes("valid")) else None

    torch.manual_seed(work.seed)
    net = build(codec.spec, work.model)
    mup.init_(net, work.seed)
    net.checkpoint_activations = options.activation_checkpointing
    net.trains_on(torch.from_numpy(dataset.table["hash"][dataset.episodes("train")].astype(np.int64)))
    resumed = ray.train.get_checkpoint()
    with resumed.as_directory() if resumed else nullcontext() as kept:
        running, rates, before = engine.start(net, options, own, Path(kept) if kept else None, work.id)
    progress = before or Progress(0, work.steps, own.world_size, engine.stage(options), options.precision)
    saved = progress.step

    base = _base(work, storage, codec, feed).to(own.device)
    watch = Watch(progress.best, progress.high)
    flops = prepare.read_flops(storage, checkpoint.folder_of(work.id))
    meter = Meter(flops, options.batch * work.model.context, options.peak_flops or measured_peak(own.device, options.precision), own.world_size)
    micro, shares = own.world_size * options.accumulate, range(own.rank * options.accumulate, (own.rank + 1) * options.accumulate)

    while progress.step < work.steps:
        step = progress.step + 1
        meter.begin()
        factor = lr_factor(step, work.steps, options.warmup, options.decay)
        for group, rate in zip(running.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        sums = Sums()
        for share in shares:
            first = progress.step * options.batch + share * (options.batch // micro)
            windows = corrupted(loader.batch(progress.step, share, micro), base, options.corrupt_history, work.seed, first).to(own.device)
            losses: Losses = running(windows, apply_base(base, windows))
            running.backward(losses.objective)
            sums.add(losses, 1 / micro)
            if share != shares[-1]:
                running.step()
        told = sums.reduced(own.device, stop=feed.told_to_stop)
        if told.pop("stop"):
            return
        trouble = watch.check(step, last=step == work.steps, loss=told["loss"], objective=told["objective"])
        if trouble is None:
            told["gradient_norm"] = engine.step(running)
            trouble = watch.check(step, gradient_norm=told["gradient_norm"])
        if trouble is not None:
            if own.rank == 0:
                feed.fail(_stopped(trouble, saved, options))
            return
        meter.end(told["transitions"])

        progress = replace(progress, step=step, best=watch.best, high=watch.high, seconds=progress.seconds + meter.last)
        done = step == work.steps
        record = {"step": step, **{f"train/{name}": value for name, value in told.items()}, "lr": running.optimizer.param_groups[rates.index(options.lr)]["lr"]}
        if step % RATES_EVERY == 0 or done:
            record |= meter.read()
        if valid is not None and (step % options.validate_every == 0 or done):
            measured = validate(running, base, valid, options, own)
            record |= measured
            progress = replace(progress, validations=[*progress.validations, {"step": step, **measured}])
        if own.rank == 0:
            feed.put(record)
        if done or due(step, saved, options.checkpoint_every, watch.high):
            if done:
                progress = replace(progress, measured=meter.overall())
            full = engine.weights(running, own) if done else None
            folder = checkpoint.save_final(full, progress, own.rank) if done else checkpoint.save_running(running, progress, own.rank)
            feed.flush()
            made = ray.train.Checkpoint.from_directory(str(folder))
            ray.train.report({"step": step}, checkpoint=made, delete_local_checkpoint_after_upload=True)
            saved = step


def validate(running: Any, base: Base, loader: Loader, options: TrainConfig, own: Rank) -> dict[str, float]:
    """Nats a transition by part on the validation split's first `validate_windows` windows, the ranks sharing every batch."""
    running.eval()
    sums = Sums()
    batches = -(-options.validate_windows // options.batch)
    with torch.no_grad():
        for windows in itertools.islice(loader.eval_batches(options.batch, own.rank, own.world_size), batches):
            here = windows.to(own.device)
            sums.add(running(here, apply_base(base, here)))
    running.train()
    told = sums.reduced(own.device)
    return {f"valid/{name}": value for name, value in told.items() if name not in ("stop", "objective", "transitions")}


def corrupted(windows: Windows, base: Base, amount: float, seed: int, first: int) -> Windows:
    """Windows whose o_t carry noise of `amount` times the base's one-step error as standard deviation, wherever they are read (`net.unroll`);
    o_{t+1} is true and an episode's own start is exact. The noise is a function of the sample's global number (`first` is that of row 0),
    whatever the number of workers."""
    if amount == 0:
        return windows
    seen = windows.observation[:, :-1]
    size, steps, numbers = seen.numbers.shape
    keys = rng.keys(seed, first + torch.arange(size).unsqueeze(1), torch.arange(steps), NOISE)
    uniform = rng.uniform(keys.unsqueeze(-1), torch.arange(numbers) + rng.OBSERVATION)
    noise = torch.special.ndtri(uniform) * (amount * base.residual_scale.cpu())
    noise[:, 0][windows.start] = 0.0
    return replace(windows, seen=Parts(seen.numbers + noise, seen.categories))


def _base(work: Work, storage: Storage, codec: Codec, feed: Feed) -> Base:
    """The base that the driver fits while this group starts."""
    while (base := prepare.read_base(storage, checkpoint.folder_of(work.id), codec.spec, work.model)) is None:
        if feed.stopped:
            raise MesocosmError("stopped while waiting for the base")
        time.sleep(0.1)
    return base


def _stopped(trouble: str, saved: int, options: TrainConfig) -> str:
    where = f"the checkpoint of step {saved} is kept" if saved else "no checkpoint had been made yet"
    return f"training stopped: {trouble}; {where}; lower train.lr={options.lr:g} or look at the data"
