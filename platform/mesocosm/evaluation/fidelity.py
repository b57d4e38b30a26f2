"""Is the world faithful: losses by part, reward and termination a step ahead, and the open-loop table, on validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from mesocosm.data.dataset import Dataset, Split
from mesocosm.data.loader import Loader
from mesocosm.evaluation import stats
from mesocosm.evaluation.open_loop import HORIZONS, ROWS, Array, Log, OpenLoop, begin_at, codec_of, open_loop
from mesocosm.model import rng
from mesocosm.model.world import World

ONE_STEP_TRANSITIONS = 4096
"""Transitions of validation that reward and termination are judged on, at most."""


@dataclass(frozen=True)
class OneStep:
    """Reward and termination after one imagined step from true states; what the agent is told, so from the sampled o_{t+1}."""

    transitions: int
    terminals: int
    expected_terminals: float
    """Sum of the probabilities of termination: near `terminals` where the world is calibrated"""
    precision: float | None
    """Of `p_terminated > 1/2`, p the members' mean; None where none was predicted"""
    recall: float | None
    """None where nothing terminated"""
    reward_accuracy: float | None
    """Share of rewards drawn exactly right; None where rewards are regressed"""
    reward_r2: float | None
    """Of the mean over members' draws; None where the true rewards are constant"""
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Fidelity:
    losses: dict[str, float]
    """Validation nats a transition by part, and their "total" """
    one_step: OneStep
    open_loop: OpenLoop

    def to_json(self) -> dict[str, Any]:
        return {"losses": self.losses, "one_step": self.one_step.to_json(), "open_loop": self.open_loop.to_json()}


def fidelity(world: World, dataset: Dataset, *, horizons: Sequence[int | str] = HORIZONS, starts: int = 128, samples: int = 8, seed: int = 0) -> Fidelity:
    """All of it. Falls back on the training split, with a note in each table, where validation holds fewer than two episodes.

    Raises UsageError where the dataset is of other spaces than the world.
    """
    table = open_loop(world, dataset, horizons=horizons, starts=starts, samples=samples, seed=seed)
    return Fidelity(losses(world, dataset, table.split), one_step(world, dataset, table.split, seed=seed), table)


def losses(world: World, dataset: Dataset, split: Split = "valid", batch: int = 64) -> dict[str, float]:
    """Nats a transition by part over the whole split, each transition once, in windows of the world's context."""
    loader = Loader(dataset, codec_of(world), split, max(world.config.context, 1), batch, seed=0)
    sums: dict[str, float] = {}
    transitions = 0.0
    for windows in loader.eval_batches(batch):
        found = world.losses(windows.to(world.device))
        transitions += float(found.transitions)
        for name, value in found.nats.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    parts = {name: value / max(transitions, 1.0) for name, value in sums.items()}
    return parts | {"total": sum(parts.values())}


def one_step(world: World, dataset: Dataset, split: Split = "valid", *, seed: int = 0) -> OneStep:
    """Every transition of the split (a uniform draw of ONE_STEP_TRANSITIONS, if there are more), by each member once."""
    log = Log(dataset, codec_of(world), split)
    members, warmup = world.config.members, world.net.memory // 2
    episode, step = log.starts(1, ONE_STEP_TRANSITIONS, np.random.default_rng(seed))
    rewards, chances = np.zeros((len(episode), members)), np.zeros((len(episode), members))
    width = max(1, ROWS // members)
    for chunk in (np.arange(i, min(i + width, len(episode))) for i in range(0, len(episode), width)):
        rows, member = np.repeat(chunk, members), np.tile(np.arange(members), len(chunk))
        drawn_by = torch.from_numpy(member).to(world.device)
        carry = begin_at(world, log, episode[rows], step[rows], drawn_by, warmup)
        keys = rng.keys(seed, torch.from_numpy(rows).to(world.device), drawn_by, 0)
        _, out = world.step(carry, log.action(episode[rows], step[rows]).to(world.device), keys)
        rewards[rows, member] = out.reward.cpu().double().numpy()
        chances[rows, member] = out.p_terminated.cpu().double().numpy()
    reward, terminated = log.outcome(episode, step)
    return _judged(rewards, chances.mean(1), reward.astype(np.float64), terminated, world.spec.reward_values is not None, log.split)


def _judged(rewards: Array, chance: Array, reward: Array, terminated: Array, exact: bool, split: Split) -> OneStep:
    precision, recall = stats.precision_recall(terminated, chance > 0.5)
    r2 = stats.r_squared(reward, rewards.mean(1))
    accuracy = None
    if exact:
        accuracy = float(np.isclose(rewards, reward[:, None], rtol=1e-6, atol=1e-9).mean())
    notes = []
    if split == "train":
        notes.append("validation is too small: reward and termination are judged on the training split.")
    if recall is None:
        notes.append("no transition terminates here: recall is undefined.")
    elif precision is None:
        notes.append("no termination was predicted: precision is undefined.")
    if r2 is None:
        notes.append("the rewards are constant here: R² is undefined.")
    return OneStep(len(reward), int(terminated.sum()), float(chance.sum()), precision, recall, accuracy, r2, tuple(notes))
