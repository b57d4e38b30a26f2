"""Is the world faithful: losses by part, reward and termination a step ahead, and the open-loop
table, on validation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from mesocosm.data.format.dataset import Dataset, Split
from mesocosm.data.loading.loader import Loader
from mesocosm.evaluate.metrics import stats
from mesocosm.evaluate.metrics.open_loop import (
    HORIZONS,
    ROWS,
    Array,
    Log,
    OpenLoop,
    Progress,
    begin_at,
    codec_of,
    open_loop,
    silent,
)
from mesocosm.model import rng
from mesocosm.model.base import Base
from mesocosm.model.world import World

ONE_STEP_TRANSITIONS = 4096
"""Transitions of validation that reward and termination are judged on, at most."""
ENDED, AHEAD = 256, 50
"""Terminated episodes at most, and steps before their end."""


@dataclass(frozen=True)
class OneStep:
    """Reward and termination after one imagined step from true states; what the agent is told, so
    from the sampled o_{t+1}.

    Intervals are 90% bootstrap over episodes, None where a figure is, or where there are fewer than
    two episodes.
    """

    transitions: int
    terminals: int
    expected_terminals: float
    """Sum of the probabilities of termination: near `terminals` where the world is calibrated"""
    precision: float | None
    """Of `p_terminated > 1/2`, p the members' mean; None where none was predicted"""
    recall: float | None
    """None where nothing terminated"""
    recall_interval: stats.Interval | None
    auc: float | None
    """Of p_terminated, terminal transitions against the others; None where there is only one kind
    """
    auc_interval: stats.Interval | None
    reward_accuracy: float | None
    """Share of rewards drawn exactly right; None where rewards are regressed"""
    reward_accuracy_interval: stats.Interval | None
    reward_r2: float | None
    """Of the mean over members' draws; None where the true rewards are constant"""
    reward_r2_interval: stats.Interval | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class TimeToEnd:
    """When imagined episodes end, against when the logged ones did: logged actions played in the
    world from `ahead` steps before a terminal.

    With the world's chances of termination on the way, the expected number of steps until its end,
    at most one more than were logged (the restricted mean survival time), less the logged number.
    """

    episodes: int
    ahead: float
    """Steps before the terminal, on average"""
    bias: float | None
    """Mean of (imagined - logged) steps: below 0 where the world ends too early; at most 1"""
    error: float | None
    """Mean absolute error, in steps"""
    error_interval: stats.Interval | None
    missed: float | None
    """Mean chance of going on after the terminal"""
    note: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Fidelity:
    losses: dict[str, float]
    """Validation nats a transition by part, and their "total" """
    loss_intervals: dict[str, stats.Interval | None]
    one_step: OneStep
    time_to_end: TimeToEnd
    open_loop: OpenLoop

    def to_json(self) -> dict[str, Any]:
        return {
            "losses": self.losses,
            "loss_intervals": self.loss_intervals,
            "one_step": self.one_step.to_json(),
            "time_to_end": self.time_to_end.to_json(),
            "open_loop": self.open_loop.to_json(),
        }


def fidelity(
    world: World,
    dataset: Dataset,
    *,
    horizons: Sequence[int | str] = HORIZONS,
    starts: int = 128,
    samples: int = 19,
    seed: int = 0,
    split: Split = "valid",
    linear: Base | None = None,
    progress: Progress = silent,
) -> Fidelity:
    """All of it. Falls back on the training split, with a note in each table, where validation
    holds fewer than two episodes.

    Raises UsageError where the dataset is of other spaces than the world. `linear`: see
    `open_loop`.
    """
    table = open_loop(
        world,
        dataset,
        horizons=horizons,
        starts=starts,
        samples=samples,
        seed=seed,
        split=split,
        linear=linear,
        progress=progress,
    )
    progress("losses and single steps")
    nats, intervals = losses(world, dataset, table.split)
    return Fidelity(
        nats,
        intervals,
        one_step(world, dataset, table.split, seed=seed, told=split != table.split),
        time_to_end(world, dataset, table.split, seed=seed),
        table,
    )


def losses(
    world: World, dataset: Dataset, split: Split = "valid", batch: int = 64
) -> tuple[dict[str, float], dict[str, stats.Interval | None]]:
    """(nats a transition by part, their intervals over episodes), each transition of the split
    once, in windows of the world's context.
    """
    loader = Loader(dataset, codec_of(world), split, max(world.config.context, 1), batch, seed=0)
    windows_of: list[Array] = []
    nats: dict[str, list[Array]] = {}
    transitions: list[Array] = []
    for windows in loader.eval_batches(batch):
        found = world.losses(windows.to(world.device))
        windows_of.append(windows.episode.numpy())
        transitions.append(windows.mask.sum(1).numpy())
        for name, value in found.by_window.items():
            nats.setdefault(name, []).append(value.cpu().double().numpy())
    group = np.unique(np.concatenate(windows_of), return_inverse=True)[1]
    counts = np.bincount(group, weights=np.concatenate(transitions))
    sums = {
        name: np.bincount(group, weights=np.concatenate(values)) for name, values in nats.items()
    }
    sums["total"] = np.sum(list(sums.values()), axis=0)
    figures = {name: stats.mean_of_groups(values, counts) for name, values in sums.items()}
    return {name: mean or 0.0 for name, (mean, _) in figures.items()}, {
        name: interval for name, (_, interval) in figures.items()
    }


def one_step(
    world: World, dataset: Dataset, split: Split = "valid", *, seed: int = 0, told: bool = False
) -> OneStep:
    """Every transition of the split (a uniform draw of ONE_STEP_TRANSITIONS, if there are more), by
    each member once.

    `told`: the notes say that validation was too small.
    """
    log = Log(dataset, codec_of(world), split)
    members, warmup = world.config.members, world.net.memory // 2
    episode, step = log.starts(1, ONE_STEP_TRANSITIONS, np.random.default_rng(seed))
    rewards, chances = np.zeros((len(episode), members)), np.zeros((len(episode), members))
    width = max(1, ROWS // members)
    for chunk in (
        np.arange(i, min(i + width, len(episode))) for i in range(0, len(episode), width)
    ):
        rows, member = np.repeat(chunk, members), np.tile(np.arange(members), len(chunk))
        drawn_by = torch.from_numpy(member).to(world.device)
        carry = begin_at(world, log, episode[rows], step[rows], drawn_by, warmup)
        keys = rng.keys(seed, torch.from_numpy(rows).to(world.device), drawn_by, 0)
        _, out = world.step(carry, log.action(episode[rows], step[rows]).to(world.device), keys)
        rewards[rows, member] = out.reward.cpu().double().numpy()
        chances[rows, member] = out.p_terminated.cpu().double().numpy()
    reward, terminated = log.outcome(episode, step)
    group = np.unique(episode, return_inverse=True)[1]
    return _judged(
        rewards,
        chances.mean(1),
        reward.astype(np.float64),
        terminated,
        group,
        world.spec.reward_values is not None,
        told,
    )


def _judged(
    rewards: Array,
    chance: Array,
    reward: Array,
    terminated: Array,
    group: Array,
    exact: bool,
    told: bool,
) -> OneStep:
    precision, recall = stats.precision_recall(terminated, chance > 0.5)
    hits = np.bincount(group, weights=terminated & (chance > 0.5))
    recalled = stats.mean_of_groups(hits, np.bincount(group, weights=terminated))[1]
    area, area_interval = stats.auc(terminated, chance, group)
    r2 = stats.r_squared(reward, rewards.mean(1))
    accuracy = accurate = None
    if exact:
        right = np.isclose(rewards, reward[:, None], rtol=1e-6, atol=1e-9).mean(1)
        accuracy, accurate = stats.mean_of_groups(
            np.bincount(group, weights=right), np.bincount(group)
        )
    notes = []
    if told:
        notes.append(
            "validation is too small: reward and termination are judged on the training split."
        )
    if recall is None:
        notes.append("no transition terminates here: recall is undefined.")
    elif precision is None:
        notes.append("no termination was predicted: precision is undefined.")
    if r2 is None:
        notes.append("the rewards are constant here: R² is undefined.")
    return OneStep(
        transitions=len(reward),
        terminals=int(terminated.sum()),
        expected_terminals=float(chance.sum()),
        precision=precision,
        recall=recall,
        recall_interval=recalled,
        auc=area,
        auc_interval=area_interval,
        reward_accuracy=accuracy,
        reward_accuracy_interval=accurate,
        reward_r2=r2,
        reward_r2_interval=None
        if r2 is None
        else stats.r_squared_interval(reward, rewards.mean(1), group),
        notes=tuple(notes),
    )


def time_to_end(
    world: World, dataset: Dataset, split: Split = "valid", *, seed: int = 0
) -> TimeToEnd:
    """Of at most ENDED terminated episodes of the split, from AHEAD steps before their end (or
    their first state), each member once.
    """
    log = Log(dataset, codec_of(world), split)
    last = (
        log.outcome(np.arange(len(log.lengths)), log.lengths - 1)[1]
        if len(log.lengths)
        else np.zeros(0, np.bool_)
    )
    chosen = np.flatnonzero(last)
    chosen = np.sort(np.random.default_rng(seed).permutation(chosen)[:ENDED])
    if not len(chosen):
        return TimeToEnd(
            0,
            0.0,
            None,
            None,
            None,
            None,
            "no episode terminates here: there is no end to be timed.",
        )
    ahead = np.minimum(AHEAD, log.lengths[chosen])
    members, count = world.config.members, len(chosen)
    rows, member = np.repeat(np.arange(count), members), np.tile(np.arange(members), count)
    device, episode, start = world.device, chosen[rows], (log.lengths[chosen] - ahead)[rows]
    drawn_by = torch.from_numpy(member).to(device)
    carry = begin_at(world, log, episode, start, drawn_by, world.net.memory // 2)
    going, expected = np.ones(len(rows)), np.zeros(len(rows))
    for t in range(int(ahead.max())):
        alive = t < ahead[rows]
        action = log.action(episode, np.minimum(start + t, log.lengths[episode] - 1)).to(device)
        carry, out = world.step(
            carry, action, rng.keys(seed, torch.from_numpy(rows).to(device), drawn_by, t)
        )
        expected += np.where(alive, going, 0.0)
        going = np.where(alive, going * (1.0 - out.p_terminated.cpu().double().numpy()), going)
    # The end falls on step t with the chance of going on until then; what goes on for longer ends
    # one step late at least.
    off = (expected + going - ahead[rows]).reshape(count, members)
    late, errors = off.mean(1), np.abs(off).mean(1)
    return TimeToEnd(
        count,
        float(ahead.mean()),
        float(late.mean()),
        float(errors.mean()),
        stats.mean_interval(errors),
        float(going.mean()),
        None,
    )
