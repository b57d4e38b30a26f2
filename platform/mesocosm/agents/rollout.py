"""What policies earn in a world: greedy imagined episodes, no real step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesocosm.policies.policy import Acts
from mesocosm.serve.client import WorldVectorEnv


def imagined_returns(
    policies: Sequence[Acts],
    env: WorldVectorEnv,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> NDArray[np.float64]:
    """The returns of `imagined_episodes`."""
    return imagined_episodes(policies, env, seed, progress)[0]


def imagined_episodes(
    policies: Sequence[Acts],
    env: WorldVectorEnv,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(undiscounted returns, lengths), each [P, n], of one whole episode of each of P policies in
    each of its n = num_envs / P environments, acting greedily; a function of (policies, world,
    starts, seed). `progress` is told the steps done.

    `env` is closed. A penalty of its own is part of the reward; an episode ends at its horizon, or
    where the world terminates or diverges.
    """
    count = env.num_envs // len(policies)
    assert count * len(policies) == env.num_envs, (len(policies), env.num_envs)
    rng = np.random.default_rng(seed)
    total, going, steps = np.zeros(env.num_envs), np.ones(env.num_envs, np.bool_), 0
    lengths = np.zeros(env.num_envs, np.int64)
    idle: dict[int, Any] = {}
    try:
        observation, _ = env.reset(seed=seed)
        while going.any():
            actions = []
            for i, policy in enumerate(policies):
                own = slice(i * count, (i + 1) * count)
                if (
                    going[own].any() or i not in idle
                ):  # a policy whose episodes are over repeats itself
                    idle[i] = policy.act(_rows(observation, own), False, rng)
                actions.append(idle[i])
            observation, reward, terminated, truncated, _ = env.step(_joined(actions))
            total += np.where(going, reward, 0.0)
            lengths += going
            going &= ~(terminated | truncated)
            steps += 1
            if progress is not None:
                progress(steps)
    finally:
        env.close()
    return total.reshape(len(policies), count), lengths.reshape(len(policies), count)


def _rows(batch: Any, rows: slice) -> Any:
    """Some rows of values in Gymnasium's vector layout."""
    if isinstance(batch, dict):
        return {key: _rows(value, rows) for key, value in batch.items()}
    if isinstance(batch, tuple) and not (batch and isinstance(batch[0], str)):
        return tuple(_rows(value, rows) for value in batch)
    return batch[rows]


def _joined(batches: Sequence[Any]) -> Any:
    """Values in vector layout, one after the other."""
    first = batches[0]
    if isinstance(first, dict):
        return {key: _joined([batch[key] for batch in batches]) for key in first}
    if isinstance(first, tuple):
        if first and isinstance(first[0], str):
            return tuple(text for batch in batches for text in batch)
        return tuple(_joined(values) for values in zip(*batches, strict=True))
    return np.concatenate(batches)
