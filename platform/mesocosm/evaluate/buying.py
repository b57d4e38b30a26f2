"""Which real steps would tell a world the most: candidates imagined in it, scored, and a budget
shared out over them. Takes no real step.

A *candidate* is a behaviour that `collect` can run, with a part of the tasks where these are reset
options. It is imagined from the starts that reality was seen to have and those that the world
draws. What is not known of an imagined transition, its *worth*, is

    log(1 + disagreement) * log(1 + gap)

The first factor is the reward of exploration by disagreement (Pathak et al. 2019, arXiv 1906.04161;
Sekar et al. 2020, Plan2Explore, arXiv 2005.05960, with an ensemble as here), in the world's own
unit: 1 is what a tenth of held-out transitions exceed. The second is coverage: `gap` is the
distance to the nearest logged transition (`data/coverage.py`), in the same kind of unit, that a
tenth of held-out ones exceed; where the logs are dense another step is worth little, however much
members differ. A candidate's worth is the mean over its steps.

A part of the budget is even over the candidates: they say what the world will be asked, and on the
one task that was tried nothing did as well as to give each its share (docs/buying.md). The rest is
bought in BLOCKS equal blocks. Each goes to the candidate whose steps take the most off the worth of
*all* candidates, each of which counts alike, once what was bought before has joined the logs. So a
candidate gets steps for what it tells of the others too, and the more it has the less the next are
worth. That is greedy facility location, whose gains only diminish (Nemhauser, Wolsey and Fisher
1978; for choosing data: Wei, Iyer and Bilmes 2015), with disagreement for weights; what an
experiment takes off the sum of what is unknown, not where most is unknown, is also Cohn's (1994)
choice. Half of a candidate's imagined episodes stand for what would be bought, the other half are
what is scored: none covers itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesocosm.data.analysis.neighbours import Features, gaps, own_gaps
from mesocosm.data.format.dataset import Dataset
from mesocosm.evaluate.metrics import stats
from mesocosm.model.spec import Parts
from mesocosm.model.world import World
from mesocosm.policies.behaviours import BehaviourConfig
from mesocosm.policies.policy import Acts
from mesocosm.serve.client import WorldVectorEnv

Array = NDArray[Any]
BLOCKS = 20
"""The grain of that rest is a twentieth of it."""
QUERIES = 1024
"""Imagined transitions of a candidate that are scored, at most."""
EXCEED = 0.9
"""Quantile of held-out gaps that is a gap of 1, as `pretrain/export.py` has it for disagreement."""


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
    """Of one candidate, before anything is bought."""

    worth: float
    interval: stats.Interval | None
    """90%, by bootstrap over imagined episodes"""
    disagreement: float
    """Median"""
    gap: float
    """Median"""


@dataclass(frozen=True)
class Bought:
    steps: list[int]
    """Of each candidate; they sum to the budget"""
    scores: list[Score]
    left: float
    """Worth of all candidates' steps once all is bought, as a share of what it was before"""


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
    """Whole episodes of `policy` in the world, from `starts` (task, observation) [N, ...] by hash,
    cut after `horizon` steps.

    `dataset`: the world's own, whose columns `features` takes. `progress` is told the steps done.
    """
    rng = np.random.default_rng(seed)
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
            disagreement.append(
                np.where(infos["diverged"], np.inf, infos["disagreement"].astype(np.float64))[going]
            )
            rows.append(np.flatnonzero(going))
            going &= ~(terminated | truncated)
            steps += 1
            progress(steps)
    finally:
        env.close()
    return Imagined(
        np.concatenate(points), np.concatenate(disagreement), np.concatenate(rows), episodes
    )


def _options(dataset: Dataset, told: Sequence[dict[str, Any]]) -> tuple[Array, Array]:
    """The reset options of B environments as `Dataset.option_numbers` and `option_values` have
    them, [B, k] each.
    """
    numbers, values = (
        np.zeros((len(told), len(dataset.options))),
        np.zeros((len(told), len(dataset.options)), np.int64),
    )
    for column, option in enumerate(dataset.options):
        for row, options in enumerate(told):
            if option.values is None:
                numbers[row, column] = options[option.name]
            else:
                values[row, column] = option.values.index(options[option.name])
    return numbers, values


def gap_unit(
    features: Features, dataset: Dataset, logged: Array, episodes: Array, seed: int
) -> float:
    """The gap that a tenth of held-out transitions exceed; of the training split's to other
    episodes where nothing is held out. 1 where all are 0.

    logged: [N, F] of the training split, of `episodes` [N].
    """
    held = features.sample(dataset, "valid", seed=seed)
    found = gaps(logged, held.values) if len(held) else own_gaps(logged, episodes, seed=seed)
    found = found[np.isfinite(found)]
    unit = float(np.quantile(found, EXCEED)) if len(found) else 0.0
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
    """Share `steps` out over the candidates, as the module says.

    logged: [N, F] training transitions; unit: `gap_unit`; disagrees: False where the world has one
    member, so that coverage alone counts; even: the share of `steps` that does not depend on what
    is unknown.
    """
    most = max(
        (float(c.disagreement[np.isfinite(c.disagreement)].max(initial=0.0)) for c in candidates),
        default=0.0,
    )
    rng = np.random.default_rng(seed)
    queries, weights, gap, pools, scores = [], [], [], [], []
    for candidate in candidates:
        own = candidate.episode % 2 == 0
        pools.append(candidate.points[~own])
        rows = np.flatnonzero(own)
        rows = np.sort(rng.permutation(rows)[:QUERIES])
        disagreement = np.minimum(candidate.disagreement[rows], most)  # diverged: as much as any
        queries.append(candidate.points[rows])
        weights.append(np.log1p(disagreement) if disagrees else np.ones(len(rows)))
        gap.append(gaps(logged, queries[-1]) / unit)
        worth = weights[-1] * np.log1p(gap[-1])
        groups = np.unique(candidate.episode[rows], return_inverse=True)[1]
        mean, interval = stats.mean_of_groups(
            np.bincount(groups, weights=worth), np.bincount(groups), seed=seed
        )
        assert mean is not None
        scores.append(
            Score(mean, interval, float(np.median(disagreement)), float(np.median(gap[-1])))
        )
    first = _unknown(weights, gap).sum()

    def joined(number: int, points: int) -> list[Array]:
        """The gaps once so many of a candidate's points have joined the logs, or half of its own: a
        budget may be larger than what was imagined.
        """
        pool = pools[number]
        drawn = pool[rng.permutation(len(pool))[: min(points, max(len(pool) // 2, 1))]]
        return (
            [np.minimum(g, gaps(drawn, some) / unit) for g, some in zip(gap, queries, strict=True)]
            if points
            else gap
        )

    first_steps = int(steps * even)
    shares = np.array(_split(first_steps, len(candidates)))
    for number, share in enumerate(shares.tolist()):
        gap = joined(number, share)
    for block in _split(steps - first_steps, min(BLOCKS, steps - first_steps)):
        after = [joined(number, block) for number in range(len(candidates))]
        best = int(np.argmin([_unknown(weights, some).sum() for some in after]))
        gap = after[best]
        shares[best] += block
    return Bought(shares.tolist(), scores, float(_unknown(weights, gap).sum() / (first or 1.0)))


def _unknown(weights: Sequence[Array], gap: Sequence[Array]) -> Array:
    """[C] the mean worth of each candidate's steps."""
    return np.array([(w * np.log1p(g)).mean() for w, g in zip(weights, gap, strict=True)])


def _split(total: int, parts: int) -> list[int]:
    return [total // parts + (i < total % parts) for i in range(parts)]


def weights(steps: Sequence[int], lengths: Sequence[float]) -> list[float]:
    """`BehaviourConfig.weight` (shares of episodes) for shares of steps: a behaviour of short
    episodes needs more of them. They sum to 1.
    """
    episodes = np.asarray(steps) / np.asarray(lengths)
    return [float(f"{share:.4g}") for share in episodes / episodes.sum()]


def kept(behaviours: Sequence[BehaviourConfig], bought: Bought) -> list[int]:
    """Positions of the candidates that were bought from, most steps first."""
    return sorted(
        (i for i in range(len(behaviours)) if bought.steps[i]), key=lambda i: -bought.steps[i]
    )
