"""From trained weights to a world: the scale of its disagreement, and the check that its episodes
end where those of the data do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.loader import Loader
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.split import Split
from mesocosm.model import widening
from mesocosm.model.base import Base
from mesocosm.model.config import ModelConfig
from mesocosm.model.families import build
from mesocosm.model.heads import head_inputs
from mesocosm.model.net import apply_base, unroll
from mesocosm.model.tensors import Transition, Windows
from mesocosm.model.world import World
from mesocosm.train.rank_trainer import training_episodes

CHECK_WINDOWS = 4096
WIDEN_WINDOWS = 1024
"""The most windows of a split, spread evenly, that choose the factors of the densities."""
EXCEEDED = 0.1
"""Fraction of held-out transitions whose disagreement is above 1."""
FEW = 100
"""Fewest held-out transitions to measure disagreement on. With fewer it is measured on the training
split, on which members that train on different episodes also differ, though less.
"""
BATCH = 128
LEAST = 0.1
"""A world fails with a recall or a precision below this, if there are ENOUGH terminals."""
ENOUGH = 10


def load_trained(weights: Path, base: Base, codec: Codec, config: ModelConfig) -> World:
    """The world with the float32 `weights` file."""
    net = build(codec.spec, config)
    net.load_state_dict(load_file(weights))
    return World(net, base, codec.to_json())


@dataclass(frozen=True)
class TerminationCheck:
    """Recall and precision of the world's terminations (p > 0.5) on real transitions."""

    terminals: int
    hits: int  # terminals that the world predicts
    false_alarms: float
    """Other transitions that it calls terminal, in units of `terminals`: oversampled ones are
    weighted back to the data's own rate.
    """
    measured_on: str

    @property
    def recall(self) -> float | None:
        return self.hits / self.terminals if self.terminals else None

    @property
    def precision(self) -> float | None:
        alarms = self.hits + self.false_alarms
        return self.hits / alarms if alarms else None

    @property
    def verdict(self) -> str:
        """`passed`, `not applicable: ...` or `failed: ...`"""
        if not self.terminals:
            return "not applicable: no episode of the data terminates"
        advice = "collect more episodes that end, or raise model.head_steps"
        sample = f"{self.terminals} terminal transitions ({self.measured_on})"
        if not self.hits:
            return f"failed: of {sample} the world ends none, so its episodes never end; {advice}"
        for name, value, consequence in (
            ("recall", self.recall, "the world ends almost none of its episodes"),
            ("precision", self.precision, "the world ends almost anywhere"),
        ):
            if self.terminals >= ENOUGH and value is not None and value < LEAST:
                low = f"{name} {value:.2g} on {sample} is below {LEAST:g}"
                return f"failed: {low}: {consequence}; {advice}"
        return "passed"


def _loader(
    world: World, dataset: Dataset, codec: Codec, split: Split, block: int | None = None
) -> Loader:
    return Loader(dataset, codec, split, world.config.context, BATCH, seed=0, block=block)


def _windows(world: World, dataset: Dataset, codec: Codec, split: Split) -> Iterator[Windows]:
    loader = _loader(world, dataset, codec, split)
    return itertools.islice(loader.eval_batches(), CHECK_WINDOWS // BATCH)


def widen(world: World, dataset: Dataset, codec: Codec, block: int | None) -> None:
    """Set `world.base.widening` by the validation split and the episodes that members leave out;
    `block` is that of the training's data.
    """
    world.net.trains_on(training_episodes(dataset, world.config.members))
    splits: tuple[Split, ...] = ("valid", "train")
    batches = (
        (windows, split == "valid")
        for split in splits
        if len(dataset.episodes(split))
        for windows in _loader(world, dataset, codec, split, block).eval_batches(most=WIDEN_WINDOWS)
    )
    widening.fit(world.net, world.base, batches)


@torch.inference_mode()
def calibrate(world: World, dataset: Dataset, codec: Codec) -> None:
    """Set `world.disagreement_scale`, so that the disagreement of a fraction EXCEEDED of held-out
    transitions, from true states, is above 1. The scale is 1 if members never differ.
    """
    spreads: list[Tensor] = []
    splits: tuple[Split, ...] = ("valid", "train")
    for split in splits:
        if sum(map(len, spreads)) >= FEW or not len(dataset.episodes(split)):
            continue
        spreads = []
        for windows in _windows(world, dataset, codec, split):
            transition, outcome = unroll(windows)
            features, base = world.net.context(transition), apply_base(world.base, windows)
            spread = world.net.disagreement(features, transition, outcome, base)
            spreads.append(spread[windows.mask])
    scale = float(torch.quantile(torch.cat(spreads).double(), 1 - EXCEEDED))
    world.disagreement_scale = scale if scale > 0 else 1.0


@torch.inference_mode()
def check_termination(world: World, dataset: Dataset, codec: Codec, seed: int) -> TerminationCheck:
    """Check on the validation split, or on training transitions if that holds no terminal."""
    counted, measured_on = torch.zeros(3, dtype=torch.float64), "validation"
    head = world.net.termination
    if len(dataset.episodes("valid")):
        for windows in _windows(world, dataset, codec, "valid"):
            t, outcome = unroll(windows)
            features = world.net.context(t)
            inputs = head_inputs(t, outcome.observation)
            flat = None if features is None else features.flatten(0, 1)
            logit = head.logit(world.base.termination(inputs), flat)
            mask = windows.mask.flatten().double()
            counted += _count(logit, windows.terminated.flatten(), mask)
    if counted[0] == 0:
        context = world.config.context
        loader = Loader(dataset, codec, "train", context, 1, seed, events=3 * BATCH)
        e = loader.batch(0).events
        assert e is not None
        transition = Transition(e.observation, e.action, e.task)
        logit = head.logit(world.base.termination(head_inputs(transition, e.next_observation)))
        counted, measured_on = _count(logit, e.terminated, e.weight.double()), "training"
    terminals, hits, false_alarms = counted.tolist()
    return TerminationCheck(round(terminals), round(hits), false_alarms, measured_on)


def _count(logit: Tensor, terminated: Tensor, weight: Tensor) -> Tensor:
    """Logits [K, N], weights [N] float64 (0: padding) -> (terminals, hits, false_alarms)."""
    predicted, terminal = torch.sigmoid(logit).mean(0) > 0.5, (terminated > 0.5) & (weight > 0)
    false = (weight * (predicted & ~(terminated > 0.5))).sum()
    unit = weight[terminal].mean() if terminal.any() else 1.0
    return torch.stack([terminal.sum(), (predicted & terminal).sum(), false / unit])
