"""From the last checkpoint to the world artifact: the scale of its disagreement, and the check that
its episodes end where reality's do.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from mesocosm.data.format.dataset import Dataset, Split
from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.loader import Loader
from mesocosm.model.base import Base
from mesocosm.model.config import ModelConfig
from mesocosm.model.families import build
from mesocosm.model.heads import head_inputs
from mesocosm.model.net import apply_base, unroll
from mesocosm.model.world import World

CHECK_WINDOWS = 4096
EXCEEDED = 0.1
"""Share of held-out transitions whose disagreement is above 1."""
FEW = 100
"""Held-out transitions below which the training split's are taken: members that train on different
episodes differ there too, if less.
"""
BATCH = 128
LEAST = 0.1
"""Recall and precision below this fail a world, where there are ENOUGH terminals to tell."""
ENOUGH = 10


def world_of(weights: Path, base: Base, codec: Codec, config: ModelConfig) -> World:
    """The world of the float32 `weights` file."""
    net = build(codec.spec, config)
    net.load_state_dict(load_file(weights))
    return World(net, base, codec.to_json())


@dataclass(frozen=True)
class TerminationCheck:
    """Terminals among real transitions that the world calls terminal (p > 0.5), and the other way
    round.
    """

    terminals: int
    found: int
    false: float
    """Other transitions that it calls terminal, in units of `terminals`: oversampled ones are
    weighted back to the data's own rate.
    """
    measured_on: str

    @property
    def recall(self) -> float | None:
        return self.found / self.terminals if self.terminals else None

    @property
    def precision(self) -> float | None:
        return self.found / (self.found + self.false) if self.found + self.false else None

    @property
    def verdict(self) -> str:
        """`passed`, `not applicable: ...` or `failed: ...`"""
        if not self.terminals:
            return "not applicable: no episode of the data terminates"
        if not self.found:
            missed = (
                f"of {self.terminals} terminal transitions ({self.measured_on}) the world ends"
                " none, so its episodes never end"
            )
            return f"failed: {missed}; train longer or with more train.events"
        if self.terminals >= ENOUGH:
            for name, value, said in (
                ("recall", self.recall, "ends almost none of its episodes"),
                ("precision", self.precision, "ends almost anywhere"),
            ):
                if value is not None and value < LEAST:
                    found = (
                        f"{name} {value:.2g} on {self.terminals} terminal transitions"
                        f" ({self.measured_on}) is below {LEAST:g}: the world {said}"
                    )
                    return f"failed: {found}; train longer or with more train.events"
        return "passed"


@torch.inference_mode()
def calibrate(world: World, dataset: Dataset, codec: Codec, seed: int) -> None:
    """Set `world.disagreement_scale`: what a share EXCEEDED of held-out transitions exceed, from
    true states; 1 where members never differ.
    """
    found: list[Tensor] = []
    splits: tuple[Split, ...] = ("valid", "train")
    for split in splits:
        if sum(map(len, found)) >= FEW or not len(dataset.episodes(split)):
            continue
        found = []
        loader = Loader(dataset, codec, split, world.config.context, BATCH, seed)
        for windows in itertools.islice(loader.eval_batches(), CHECK_WINDOWS // BATCH):
            transition, outcome = unroll(windows)
            spread = world.net.disagreement(
                world.net.context(transition), transition, outcome, apply_base(world.base, windows)
            )
            found.append(spread[windows.mask])
    scale = float(torch.quantile(torch.cat(found).double(), 1 - EXCEEDED))
    world.disagreement_scale = scale if scale > 0 else 1.0


def check_termination(world: World, dataset: Dataset, codec: Codec, seed: int) -> TerminationCheck:
    """On the validation split; on training transitions where that holds no terminal."""
    counted = torch.zeros(3, dtype=torch.float64)
    with torch.inference_mode():
        if len(dataset.episodes("valid")):
            loader = Loader(dataset, codec, "valid", world.config.context, BATCH, seed)
            for windows in itertools.islice(loader.eval_batches(), CHECK_WINDOWS // BATCH):
                transition, outcome = unroll(windows)
                features = world.net.context(transition)
                parts = head_inputs(
                    transition.observation, transition.action, transition.task, outcome.observation
                )
                logit = world.net.termination.logit(
                    parts, None if features is None else features.flatten(0, 1)
                )
                counted += _count(
                    logit, windows.terminated.flatten(), windows.mask.flatten().double()
                )
        measured_on = "validation"
        if counted[0] == 0:
            events = (
                Loader(dataset, codec, "train", world.config.context, 1, seed, events=3 * BATCH)
                .batch(0)
                .events
            )
            assert events is not None
            logit = world.net.termination.logit(
                head_inputs(events.observation, events.action, events.task, events.next_observation)
            )
            counted = _count(logit, events.terminated, events.weight.double())
            measured_on = "training"
    terminals, found, false = counted.tolist()
    return TerminationCheck(round(terminals), round(found), false, measured_on)


def _count(logit: Tensor, terminated: Tensor, weight: Tensor) -> Tensor:
    """logit [K, N], weight [N] float64 (0: not there) -> (terminals, found, false), [3] float64."""
    called, there, terminal = torch.sigmoid(logit).mean(0) > 0.5, weight > 0, terminated > 0.5
    true = terminal & there
    of_a_terminal = weight[true].mean() if true.any() else 1.0
    return torch.stack(
        [true.sum(), (called & true).sum(), (weight * (called & ~terminal)).sum() / of_a_terminal]
    )
