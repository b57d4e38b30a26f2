"""The training loop that every rank of a pretraining runs, from the datasets to the float32
weights.
"""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mesocosm.data.loading.codec import Codec
from mesocosm.errors import MesocosmError
from mesocosm.model.base import Base
from mesocosm.model.config import ModelConfig
from mesocosm.store.artifacts import Storage
from mesocosm.train import checkpoint, engine, prepare
from mesocosm.train.checkpoint import TrainingProgress
from mesocosm.train.config import DataConfig, TrainConfig
from mesocosm.train.driver_channel import Feed
from mesocosm.train.engine import Rank
from mesocosm.train.rank_trainer import Diverged
from mesocosm.train.schedule import Judgement, Watch, due, judged_steps, lr_factor, overtrained
from mesocosm.train.text_rank_trainer import trainer_of

RATES_EVERY = 10
"""Steps between measurements of throughput."""
FLOPS = "flops.json"
"""FLOPs of a step, in the training's folder once the base is there."""


@dataclass(frozen=True)
class TrainWork:
    """The message of the driver to every rank: plain data."""

    id: str  # the world's id
    root: str
    data: DataConfig  # `datasets` are whole ids
    model: ModelConfig
    train: TrainConfig  # `precision` is resolved
    steps: int
    seed: int


def train_loop(config: dict[str, Any]) -> None:
    """Train, or resume from the last checkpoint. Failures that another attempt would meet again are
    reported through the feed.
    """
    work: TrainWork = config["work"]
    storage = Storage(work.root)
    feed = Feed(storage, checkpoint.folder_of(work.id))
    if feed.stopped:
        return
    try:
        _train(work, storage, feed)
    except MesocosmError as error:
        feed.fail(str(error))
        raise


def _train(work: TrainWork, storage: Storage, feed: Feed) -> None:
    import ray.train
    import ray.train.torch

    options, folder = work.train, checkpoint.folder_of(work.id)
    context, device = ray.train.get_context(), ray.train.torch.get_device()
    rank = Rank(
        context.get_world_rank(), context.get_local_rank(), context.get_world_size(), device
    )
    if device.type == "cpu":
        torch.set_num_threads(1)

    data = work.data
    dataset = prepare.open_datasets(storage, data.datasets, data.cache_gib, data.tokenizer)
    codec = prepare.fitted_codec(storage, folder, dataset, work.model)
    dataset = prepare.narrowed(dataset, work.data.unique, work.seed)
    base = None
    if isinstance(codec, Codec):
        base = partial(_wait_for_base, work, storage, codec, feed)
    resumed = ray.train.get_checkpoint()
    with resumed.as_directory() if resumed else nullcontext() as local:
        training, stored = trainer_of(codec).start(
            dataset,
            codec,
            work.model,
            options,
            work.seed,
            rank,
            base,
            data=work.data,
            resume_from=Path(local) if local else None,
        )
    stage, precision = engine.stage(options), options.precision
    progress = stored or TrainingProgress(0, work.steps, rank.world_size, stage, precision)
    saved = progress.step
    chosen, training.chosen = training.chosen, None
    watch = training.watch = Watch(progress.best, progress.high)
    flops = int(json.loads(storage.read(f"{folder}/{FLOPS}") or b"0"))
    peak = options.peak_flops or measured_peak(device, precision)
    rates = Throughput(flops, options.batch * work.model.context, peak * rank.world_size)

    judged_after = judged_steps(work.steps, options.warmup)
    while progress.step < progress.steps:
        began, step = time.perf_counter(), progress.step + 1
        done = step == work.steps
        factor = lr_factor(step, work.steps, options.warmup, options.decay)
        try:
            losses = training.step(step, factor, last=done, stop=feed.stop_requested)
        except Diverged as problem:
            if rank.rank == 0:
                feed.fail(_divergence(str(problem), saved, options))
            return
        if losses is None:  # stop, and keep the trained weights
            if progress.step > saved:
                _report(
                    checkpoint.save_running(training.engine, progress, rank.rank, chosen), progress
                )
            return
        seconds = time.perf_counter() - began
        rates.add(losses["transitions"], seconds, losses.get("tokens", 0.0))
        seconds += progress.seconds
        progress = replace(progress, step=step, best=watch.best, high=watch.high, seconds=seconds)

        record = {"step": step} | {f"train/{name}": value for name, value in losses.items()}
        record["lr"] = training.lr
        if step % RATES_EVERY == 0 or done:
            record |= rates.read()
        judged = step in judged_after
        held_out = training.held_out_loss(progress.widening) if judged else None
        if held_out is not None:
            loss, widening = held_out
            progress = replace(progress, widening=widening)
            record |= {"held_out/loss": loss, "held_out/widening": widening}
            now = Judgement(step, loss, losses["loss"] - losses["task"])
            if progress.chosen is None or loss < progress.chosen.held_out:
                progress = replace(progress, chosen=now)
                chosen = engine.weights(training.engine, rank)
            elif overtrained(now, progress.chosen):
                progress, done = replace(progress, steps=step), True
        if training.valid is not None and (judged or step % options.validate_every == 0 or done):
            nats = training.validate()
            record |= nats
            progress.validations.append({"step": step, **nats})
        if rank.rank == 0:
            feed.put(record)

        if done:
            rates.read()
            progress = replace(progress, measured=rates.overall())
            if progress.chosen is None:  # without held-out data, the last weights
                chosen = engine.weights(training.engine, rank)
            part = checkpoint.save_final(chosen, progress, rank.rank)
        elif due(step, saved, options.checkpoint_every, watch.high):
            part = checkpoint.save_running(training.engine, progress, rank.rank, chosen)
        else:
            continue
        feed.flush()
        _report(part, progress)
        saved = step


def _wait_for_base(work: TrainWork, storage: Storage, codec: Codec, feed: Feed) -> Base:
    """The base, which the driver fits while this group starts."""
    path = f"{checkpoint.folder_of(work.id)}/{prepare.BASE}"
    while (base := prepare.read_base(storage, path, codec.spec, work.model)) is None:
        if feed.stopped:
            raise MesocosmError("stopped while waiting for the base")
        time.sleep(0.1)
    return base


def _report(folder: Path, progress: TrainingProgress) -> None:
    """Hand this rank's part of a checkpoint to Ray Train; a barrier for all ranks."""
    import ray.train

    part = ray.train.Checkpoint.from_directory(str(folder))
    metrics = {"step": progress.step}
    ray.train.report(metrics, checkpoint=part, delete_local_checkpoint_after_upload=True)


def _divergence(problem: str, saved: int, options: TrainConfig) -> str:
    state = f"the checkpoint of step {saved} is kept" if saved else "there is no checkpoint yet"
    return f"training stopped: {problem}; {state}; lower train.lr={options.lr:g} or check the data"


class Throughput:
    """Throughput, since the last `read` and over all steps that were read."""

    def __init__(self, flops: float, positions: int, peak: float):
        """`flops` and `positions` (B * W, padding counted) of a step of the whole group, and the
        group's peak FLOP/s.
        """
        self.flops, self.positions, self.peak = flops, positions, peak
        # steps, transitions, seconds, tokens
        self._recent, self._all = np.zeros(4), np.zeros(4)

    def add(self, transitions: float, seconds: float, tokens: float = 0.0) -> None:
        """Count a step that trained on this many valid transitions and tokens, over all ranks."""
        self._recent += (1, transitions, seconds, tokens)

    def read(self) -> dict[str, float]:
        """`transitions_per_s` (valid ones), `positions_per_s`, `mfu` (fraction of the peak), and
        `tokens_per_s` of texts.
        """
        rates = self._rates(*self._recent.tolist())
        self._all += self._recent
        self._recent = np.zeros(4)
        return rates

    def overall(self) -> dict[str, float]:
        return self._rates(*self._all.tolist())

    def _rates(
        self, steps: float, transitions: float, seconds: float, tokens: float
    ) -> dict[str, float]:
        seconds = max(seconds, 1e-9)
        rates = {
            "transitions_per_s": transitions / seconds,
            "positions_per_s": steps * self.positions / seconds,
            "mfu": steps * self.flops / seconds / self.peak,
        }
        return rates | ({"tokens_per_s": tokens / seconds} if tokens else {})


def measured_peak(device: torch.device, precision: str) -> float:
    """FLOP/s of the best of several large matrix products on `device` in training's precision."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    cuda = device.type == "cuda"
    size, repeats = (8192, 10) if cuda else (512, 5)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(repeats):
        if cuda:
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        a @ b
        if cuda:
            torch.cuda.synchronize(device)
        best = max(best, 2 * size**3 / max(time.perf_counter() - began, 1e-9))
    return best
