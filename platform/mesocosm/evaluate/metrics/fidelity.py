"""Fidelity on held-out data: losses by part, reward and termination a step ahead, and open-loop
errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mesocosm.data.loading.loader import Loader
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.split import Split
from mesocosm.evaluate.config import HORIZONS
from mesocosm.evaluate.metrics import stats
from mesocosm.evaluate.metrics.log import Array, Log, codec_of, play, single_steps
from mesocosm.evaluate.metrics.open_loop import OpenLoop, Progress, open_loop
from mesocosm.model.base import Base
from mesocosm.model.world import World

ONE_STEP_TRANSITIONS = 4096
"""Transitions that judge reward and termination, at most."""
ENDED, AHEAD = 256, 50
"""Terminated episodes at most, and steps before their end."""


@dataclass(frozen=True)
class OneStep:
    """Reward and termination after one imagined step from true states, as the agent receives them:
    from the sampled o_{t+1}.

    Intervals are 90% bootstrap over episodes; None where the value is, or below two episodes.
    """

    transitions: int
    terminals: int
    expected_terminals: float
    """Sum of the probabilities of termination: near `terminals` where the world is calibrated"""
    precision: float | None
    """Precision of `p_terminated > 1/2`, p the members' mean; None where none was predicted"""
    recall: float | None
    """None if nothing terminated"""
    recall_interval: stats.Interval | None
    auc: float | None
    """AUC of p_terminated, terminal transitions against the others; None for one kind only"""
    auc_interval: stats.Interval | None
    reward_accuracy: float | None
    """Share of rewards drawn exactly right; None where rewards are regressed"""
    reward_accuracy_interval: stats.Interval | None
    reward_r2: float | None
    """R2 of the mean over members' draws; None where the true rewards are constant"""
    reward_r2_interval: stats.Interval | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class TimeToEnd:
    """When imagined episodes end, against the logged ones: logged actions played in the world from
    `ahead` steps before a terminal.

    The world's probabilities of termination give the expected number of steps until its end, at
    most one more than were logged (the restricted mean survival time).
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


@dataclass(frozen=True)
class Fidelity:
    """All of it."""

    losses: dict[str, float]
    """Validation nats a transition by part, and their "total" """
    loss_intervals: dict[str, stats.Interval | None]
    one_step: OneStep
    time_to_end: TimeToEnd
    open_loop: OpenLoop


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
    progress: Progress = lambda text: None,
) -> Fidelity:
    """All of it; arguments as of `open_loop`, which says when it falls back on the training split.

    Raises UsageError where the dataset is of other spaces than the world.
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
    single = one_step(world, dataset, table.split, seed=seed, fallback=split != table.split)
    ends = time_to_end(world, dataset, table.split, seed=seed)
    return Fidelity(nats, intervals, single, ends, table)


def losses(
    world: World, dataset: Dataset, split: Split = "valid", batch: int = 64
) -> tuple[dict[str, float], dict[str, stats.Interval | None]]:
    """(nats a transition by part, their intervals over episodes), each transition of the split
    once, in windows of the world's context.
    """
    loader = Loader(dataset, codec_of(world), split, max(world.config.context, 1), batch, seed=0)
    columns: dict[str, list[Array]] = {}
    for windows in loader.eval_batches(batch):
        nats_by_part = world.losses(windows.to(world.device)).by_window
        values = {"episode": windows.episode, "transitions": windows.mask.sum(1), **nats_by_part}
        for name, value in values.items():
            columns.setdefault(name, []).append(value.cpu().double().numpy())
    nats = {name: np.concatenate(column) for name, column in columns.items()}
    group = np.unique(nats.pop("episode"), return_inverse=True)[1]
    transitions = nats.pop("transitions")
    nats["total"] = np.sum(list(nats.values()), axis=0)
    means = {name: stats.grouped_mean(v, group, weights=transitions) for name, v in nats.items()}
    intervals = {name: interval for name, (_, interval) in means.items()}
    return {name: mean or 0.0 for name, (mean, _) in means.items()}, intervals


def one_step(
    world: World, dataset: Dataset, split: Split = "valid", *, seed: int = 0, fallback: bool = False
) -> OneStep:
    """Measure every transition of the split, or a draw of ONE_STEP_TRANSITIONS, once with each
    member.

    With `fallback`, the notes say that validation was too small.
    """
    log = Log(dataset, codec_of(world), split)
    members = world.config.members
    episode, step = log.starts(1, ONE_STEP_TRANSITIONS, np.random.default_rng(seed))
    rewards, probability = np.zeros((2, len(episode), members))
    for rows, out in single_steps(world, log, (episode, step), seed):
        rewards[rows] = out.reward.cpu().double().numpy().reshape(-1, members)
        probability[rows] = out.p_terminated.cpu().double().numpy().reshape(-1, members)
    reward, terminated = log.outcome(episode, step)
    group = np.unique(episode, return_inverse=True)[1]
    expected = probability.mean(1)
    predicted = expected > 0.5
    hits = terminated & predicted
    recall, recall_interval = stats.grouped_mean(hits, group, weights=terminated)
    auc, auc_interval = stats.auc(terminated, expected, group)
    r2, r2_interval = stats.r_squared(reward, rewards.mean(1), group)
    accuracy: tuple[float | None, stats.Interval | None] = (None, None)
    if world.spec.reward_values is not None:
        truth = reward.astype(np.float64)[:, None]
        right = np.isclose(rewards, truth, rtol=1e-6, atol=1e-9).mean(1)
        accuracy = stats.grouped_mean(right, group)
    notes = []
    if fallback:
        small = "validation is too small"
        notes.append(f"{small}: reward and termination are judged on the training split.")
    if recall is None:
        notes.append("no transition terminates here: recall is undefined.")
    elif not predicted.any():
        notes.append("no termination was predicted: precision is undefined.")
    if r2 is None:
        notes.append("the rewards are constant here: R² is undefined.")
    if world.spec.reward_far is not None:
        notes.append(_rare(world.spec.reward_far, reward.astype(np.float64), rewards))
    return OneStep(
        transitions=len(reward),
        terminals=int(terminated.sum()),
        expected_terminals=float(expected.sum()),
        precision=float(hits.sum() / predicted.sum()) if predicted.any() else None,
        recall=recall,
        recall_interval=recall_interval,
        auc=auc,
        auc_interval=auc_interval,
        reward_accuracy=accuracy[0],
        reward_accuracy_interval=accuracy[1],
        reward_r2=r2,
        reward_r2_interval=r2_interval,
        notes=tuple(notes),
    )


def _rare(far: tuple[float, float], reward: Array, drawn: Array) -> str:
    """The note of the page on rare large rewards.

    Args:
        far: `Spec.reward_far`.
        reward: [N] the true ones, raw.
        drawn: [N, K] those of the members.
    """
    middle, distance = far
    true, predicted = (np.abs(x - middle) > distance for x in (reward, drawn))
    rest = np.abs(drawn[~true] - reward[~true, None]).mean() if (~true).any() else float("nan")
    recall = f"{predicted[true].mean():.0%}" if true.any() else "none to judge"
    return (
        f"rare large rewards (more than {distance:.4g} from {middle:.4g}) have a density of their"
        f" own: {true.sum()} of {len(true)} here; drawn where they are due:"
        f" {recall}, elsewhere: {predicted[~true].mean():.2%}; mean error of the other rewards:"
        f" {rest:.3g}."
    )


def time_to_end(
    world: World, dataset: Dataset, split: Split = "valid", *, seed: int = 0
) -> TimeToEnd:
    """Predict the time to the end of at most ENDED terminated episodes of the split, from AHEAD
    steps before their end (or their first state), once with each member.
    """
    log = Log(dataset, codec_of(world), split)
    every = np.arange(len(log.lengths))
    ended = every[log.outcome(every, log.lengths - 1)[1]] if len(every) else every
    episode = np.sort(np.random.default_rng(seed).permutation(ended)[:ENDED])
    if not len(episode):
        note = "no episode terminates here: there is no end to be timed."
        return TimeToEnd(0, 0.0, None, None, None, None, note)
    members, warmup = world.config.members, world.net.memory // 2
    ahead = np.minimum(AHEAD, log.lengths[episode])
    start, rows = (episode, log.lengths[episode] - ahead), np.arange(len(episode))
    steps = int(ahead.max())
    outputs = play(world, log, start, rows, members, steps=steps, seed=seed, warmup=warmup)
    going, expected = np.ones((len(rows), members)), np.zeros((len(rows), members))
    for t, out in enumerate(outputs):
        alive = (t < ahead)[:, None]
        ends = out.p_terminated.cpu().double().numpy().reshape(-1, members)
        expected += np.where(alive, going, 0.0)
        going = np.where(alive, going * (1.0 - ends), going)
    # The end is at step t with the probability of continuing until then. Episodes that continue for
    # longer end at least one step late.
    late = expected + going - ahead[:, None]
    errors = np.abs(late).mean(1)
    return TimeToEnd(
        episodes=len(episode),
        ahead=float(ahead.mean()),
        bias=float(late.mean()),
        error=float(errors.mean()),
        error_interval=stats.mean_interval(errors),
        missed=float(going.mean()),
        note=None,
    )
