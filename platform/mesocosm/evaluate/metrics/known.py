"""Known parts of a world against the networks that they replace, on held-out transitions."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mesocosm.data.loading.loader import Loader
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.split import Split, split_to_measure
from mesocosm.evaluate.metrics.log import codec_of
from mesocosm.model.heads import head_inputs
from mesocosm.model.net import unroll
from mesocosm.model.world import World

BATCH, BATCHES = 64, 64
"""Windows of a batch, and batches at most."""


@dataclass(frozen=True)
class RewardErrors:
    """Errors of a known reward and of the learned one's mean, from the true (o, a, o')."""

    function: str
    size: float
    """Root mean square of the rewards."""
    known: float
    """Root mean square error."""
    learned: float


@dataclass(frozen=True)
class TerminationErrors:
    """Recall and precision of a known termination, and of the learned one at p > 1/2, from the true
    (o, a, o').

    The recall is None without terminals, the precision without predicted ones.
    """

    function: str
    terminals: int
    known_recall: float | None
    known_precision: float | None
    learned_recall: float | None
    learned_precision: float | None


@dataclass(frozen=True)
class KnownParts:
    """None for a part that is learned."""

    transitions: int
    split: Split
    reward: RewardErrors | None
    terminated: TerminationErrors | None


def known_parts(world: World, dataset: Dataset) -> KnownParts | None:
    """Compare the known parts of a world with the learned ones; None where it has none.

    Args:
        world: The world.
        dataset: Its validation split is used, or the training split where that is empty.
    """
    known = world.known
    if known is None:
        return None
    split = split_to_measure(len(dataset.episodes("valid")), 1)
    loader = Loader(dataset, codec_of(world), split, world.config.context, BATCH, seed=0)
    columns: list[NDArray[np.float64]] = []
    for windows in itertools.islice(loader.eval_batches(), BATCHES):
        windows = windows.to(world.device)
        with torch.no_grad():
            transition, outcome = unroll(windows)
            features = world.net.context(transition)
            features = None if features is None else features.flatten(0, 1)
            inputs = head_inputs(transition, outcome.observation)
            reward = world.net.reward.expected(world.base.reward(inputs), features).mean(0)
            logit = world.net.termination.logit(world.base.termination(inputs), features)
            p = torch.sigmoid(logit).mean(0)
            known_reward, known_end = known.outcomes(
                transition.flatten(), outcome.observation.flatten()
            )
        true = _raw_rewards(world, windows.reward.flatten())
        values = (
            true,
            true if known_reward is None else known_reward,
            reward,
            windows.terminated.flatten(),
            p if known_end is None else known_end,
            p > 0.5,
        )
        mask = windows.mask.flatten()
        columns.append(torch.stack([x[mask].double() for x in values]).cpu().numpy())
    true, known_r, learned_r, ended, known_e, learned_e = np.concatenate(columns, 1)
    rewards = terminations = None
    if known.reward is not None:
        errors = (_rms(x) for x in (true, known_r - true, learned_r - true))
        rewards = RewardErrors(known.reward.name, *errors)
    if known.terminated is not None:
        rates = (*_rates(ended > 0.5, known_e > 0.5), *_rates(ended > 0.5, learned_e > 0.5))
        terminations = TerminationErrors(known.terminated.name, int(ended.sum()), *rates)
    return KnownParts(len(true), split, rewards, terminations)


def _raw_rewards(world: World, reward: torch.Tensor) -> torch.Tensor:
    """Rewards of windows in raw units."""
    spec = world.spec
    if spec.reward_values is None:
        return spec.reward_mean + spec.reward_scale * reward
    return torch.tensor(spec.reward_values, device=reward.device)[reward.long()]


def _rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(values**2)))


def _rates(
    truth: NDArray[np.bool_], predicted: NDArray[np.bool_]
) -> tuple[float | None, float | None]:
    """(recall, precision)"""
    hits = float((truth & predicted).sum())
    recall = hits / float(truth.sum()) if truth.any() else None
    return recall, hits / float(predicted.sum()) if predicted.any() else None
