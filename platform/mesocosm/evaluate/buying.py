"""Finds the real steps that would teach a world the most: candidates are imagined in the world and
scored, and a budget of steps is divided among them. docs/buying.md explains the score and compares
the shares.

The worth of an imagined transition is log(1 + disagreement) * log(1 + gap): exploration by
disagreement (Pathak et al. 2019, arXiv 1906.04161; Sekar et al. 2020, Plan2Explore, arXiv
2005.05960) times coverage, where `gap` is the distance to the nearest logged transition. A tenth of
held-out transitions exceed 1 of either. A candidate's worth is the mean over its steps.

A part of the budget is even over the candidates. The rest is bought in BLOCKS equal blocks, each
from the candidate whose steps reduce the worth of *all* candidates the most: greedy facility
location (Nemhauser, Wolsey and Fisher 1978; for choosing data: Wei, Iyer and Bilmes 2015), with the
sum of what is unknown as in Cohn (1994). Half of a candidate's imagined episodes stand for what
would be bought, and the other half is scored, so that none covers itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesocosm.data.analysis.neighbours import Features, gaps, own_gaps
from mesocosm.datasets.dataset import Dataset
from mesocosm.evaluate.metrics import stats
from mesocosm.model.tensors import Parts
from mesocosm.model.world import World
from mesocosm.policies.policy import Acts, begin_episodes
from mesocosm.serve.world_env import WorldVectorEnv

Array = NDArray[Any]
BLOCKS = 20
"""Blocks that the rest of the budget is bought in."""
QUERIES = 1024
"""Transitions of a candidate that are scored, at most."""
EXCEED = 0.9
"""Quantile of held-out gaps that is a gap of 1; pretraining calibrates disagreement so."""


@dataclass(frozen=True)
class Imagined:
    """n transitions of a candidate's imagined episodes, one episode each of E environments."""

    points: Array
    """[n, F] float32: `Features` of each"""
    disagreement: Array
    """[n] float64; infinite where the world diverged"""
    episode: Array
    """[n] int64: 0..E-1"""
    episodes: int

    @property
    def length(self) -> float:
        """Mean steps of an episode."""
        return len(self.points) / self.episodes


@dataclass(frozen=True)
class Score:
    """Scores of one candidate, before anything is bought."""

    worth: float
    interval: stats.Interval | None
    """90%, by bootstrap over imagined episodes"""
    disagreement: float
    """Median"""
    gap: float
    """Median"""


@dataclass(frozen=True)
class Bought:
    """Shares of a budget."""

    steps: list[int]
    """Steps of each candidate; they sum to the budget"""
    scores: list[Score]
    left: float
    """Worth of all candidates' steps after the purchase, as a share of the worth before it"""


def imagine(
    world: World,
    dataset: Dataset,
    features: Features,
    policy: Acts,
    starts: tuple[Parts, Parts],
    *,
    explore: bool,
    episodes: int,
    horizon: int,
    seed: int,
    progress: Callable[[int], None] = lambda steps: None,
) -> Imagined:
    """Whole episodes of `policy` in the world, cut after `horizon` steps.

    Args:
        world: The world.
        dataset: The world's data, whose columns `features` takes.
        features: Of the transitions.
        policy: The candidate's.
        starts: (task, observation) [N, ...], of which a hash chooses.
        explore: Whether `policy` explores.
        episodes: How many, side by side.
        horizon: Steps of an episode, at most.
        seed: Of policy and world.
        progress: Receives the steps done.
    """
    rng = np.random.default_rng(seed)
    begin_episodes(policy, episodes, seed)
    env = WorldVectorEnv(episodes, world, horizon=horizon, starts=starts)
    going, steps = np.ones(episodes, np.bool_), 0
    points, disagreement, rows = [], [], []
    try:
        observation, _ = env.reset(seed=seed)
        while going.any():
            options = _options(dataset, env.task_options)
            state = features.states(*dataset.observation_codec.encode(observation), *options)
            action = policy.act(observation, explore, rng)
            act = features.actions(*dataset.action_codec.encode(action))
            observation, _, terminated, truncated, infos = env.step(action)
            points.append(np.concatenate([state, act], 1)[going])
            apart = infos["disagreement"].astype(np.float64)
            disagreement.append(np.where(infos["diverged"], np.inf, apart)[going])
            rows.append(np.flatnonzero(going))
            going &= ~(terminated | truncated)
            steps += 1
            progress(steps)
    finally:
        env.close()
    joined = [np.concatenate(column) for column in (points, disagreement, rows)]
    return Imagined(joined[0], joined[1], joined[2], episodes)


def _options(dataset: Dataset, drawn: Sequence[dict[str, Any]]) -> tuple[Array, Array]:
    """The reset options of B environments as `Dataset.option_numbers` and `option_values`, [B, k]
    each.
    """
    shape = len(drawn), len(dataset.options)
    numbers, values = np.zeros(shape), np.zeros(shape, np.int64)
    for column, option in enumerate(dataset.options):
        chosen = [options[option.name] for options in drawn]
        if option.values is None:
            numbers[:, column] = chosen
        else:
            values[:, column] = [option.values.index(value) for value in chosen]
    return numbers, values


def gap_unit(
    features: Features, dataset: Dataset, logged: Array, episodes: Array, seed: int
) -> float:
    """The gap that a tenth of held-out transitions exceed; without any, the gap of the training
    split [N, F] to other `episodes` [N]. 1 where all are 0.
    """
    held_out = features.sample(dataset, "valid", seed=seed).values
    gap = gaps(logged, held_out) if len(held_out) else own_gaps(logged, episodes, seed=seed)
    gap = gap[np.isfinite(gap)]
    unit = float(np.quantile(gap, EXCEED)) if len(gap) else 0.0
    return unit if unit > 0 else 1.0


def buy(
    candidates: Sequence[Imagined],
    logged: Array,
    unit: float,
    steps: int,
    *,
    disagrees: bool,
    seed: int,
    even: float = 0.5,
) -> Bought:
    """Divide `steps` among the candidates, as the module's docstring explains.

    Args:
        candidates: At least one.
        logged: [N, F] training transitions.
        unit: `gap_unit`.
        steps: The budget.
        disagrees: False where the world has one member, so that coverage alone counts.
        seed: Of the draws.
        even: The share of `steps` that does not depend on what is unknown.
    """
    finite = [c.disagreement[np.isfinite(c.disagreement)] for c in candidates]
    most = max((float(values.max(initial=0.0)) for values in finite), default=0.0)
    rng = np.random.default_rng(seed)
    queries, weights, gap, pools, scores = [], [], [], [], []
    for candidate in candidates:
        scored = candidate.episode % 2 == 0
        pools.append(candidate.points[~scored])
        rows = np.sort(rng.permutation(np.flatnonzero(scored))[:QUERIES])
        disagreement = np.minimum(candidate.disagreement[rows], most)  # diverged: as much as any
        queries.append(candidate.points[rows])
        weights.append(np.log1p(disagreement) if disagrees else np.ones(len(rows)))
        gap.append(gaps(logged, queries[-1]) / unit)
        episodes = np.unique(candidate.episode[rows], return_inverse=True)[1]
        worth = weights[-1] * np.log1p(gap[-1])
        mean, interval = stats.grouped_mean(worth, episodes, seed=seed)
        assert mean is not None
        medians = float(np.median(disagreement)), float(np.median(gap[-1]))
        scores.append(Score(mean, interval, *medians))

    def unknown(gap: Sequence[Array]) -> float:
        """The mean worth of a step, summed over candidates."""
        return sum(float((w * np.log1p(g)).mean()) for w, g in zip(weights, gap, strict=True))

    def joined(number: int, points: int) -> list[Array]:
        """The gaps after `points` of a candidate's points have joined the logs. At most half of its
        imagined points join, because the budget may exceed the number of imagined steps.
        """
        pool = pools[number]
        order = rng.permutation(len(pool))  # also for no points: later draws do not depend on them
        if not points:
            return gap
        drawn = pool[order[: min(points, max(len(pool) // 2, 1))]]
        return [np.minimum(g, gaps(drawn, q) / unit) for g, q in zip(gap, queries, strict=True)]

    first, even_steps = unknown(gap), int(steps * even)
    shares = _split(even_steps, len(candidates))
    for number, share in enumerate(shares):
        gap = joined(number, share)
    for block in _split(steps - even_steps, min(BLOCKS, steps - even_steps)):
        after = [joined(number, block) for number in range(len(candidates))]
        best = int(np.argmin([unknown(some) for some in after]))
        gap = after[best]
        shares[best] += block
    return Bought(shares, scores, unknown(gap) / (first or 1.0))


def _split(total: int, parts: int) -> list[int]:
    return [total // parts + (i < total % parts) for i in range(parts)]


def weights(steps: Sequence[int], lengths: Sequence[float]) -> list[float]:
    """`BehaviourConfig.weight` (shares of episodes) for shares of steps: a behaviour of short
    episodes needs more of them. They sum to 1.
    """
    episodes = np.asarray(steps) / np.asarray(lengths)
    return [float(f"{share:.4g}") for share in episodes / episodes.sum()]
