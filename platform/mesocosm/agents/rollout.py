"""Returns of policies in a world: greedy imagined episodes without real steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesocosm.policies.heads import map_batch
from mesocosm.policies.images import encoder_of
from mesocosm.policies.policy import Acts, begin_episodes
from mesocosm.serve.world_env import WorldVectorEnv


def imagined_episodes(
    policies: Sequence[Acts],
    env: WorldVectorEnv,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Imagine one episode of each of P policies in each of its n = num_envs / P environments.

    Args:
        policies: Policies, which act greedily. Those of images have the world's tokenizer.
        env: The environments. It asks for disagreement only where its rewards need it, and is
            closed. Its penalty is part of the reward. An episode ends at
            its horizon, or where the world terminates or diverges.
        seed: Seed of the environments and policies; the result is a function of it.
        progress: Called with the number of steps.

    Returns:
        Undiscounted returns and lengths, each [P, n].
    """
    count = env.num_envs // len(policies)
    assert count * len(policies) == env.num_envs, (len(policies), env.num_envs)
    encoder = next(filter(None, map(encoder_of, policies)), None)
    if encoder is not None:
        env.keep_codes()
    rng = np.random.default_rng(seed)
    env.disagreement_every = 0
    total, running, steps = np.zeros(env.num_envs), np.ones(env.num_envs, np.bool_), 0
    lengths = np.zeros(env.num_envs, np.int64)
    actions: list[Any] = [None] * len(policies)
    for policy in policies:
        begin_episodes(policy, count, seed)
    try:
        observation, _ = env.reset(seed=seed)
        while running.any():
            for i, policy in enumerate(policies):
                rows = slice(i * count, (i + 1) * count)
                # A policy whose episodes are over repeats its last actions.
                if running[rows].any() or not steps:
                    rows_of_policy = map_batch(lambda leaf, rows=rows: leaf[rows], observation)
                    if encoder is not None and encoder_of(policy) is None:
                        rows_of_policy = encoder.frames(rows_of_policy)
                    actions[i] = policy.act(rows_of_policy, False, rng)
            batch = map_batch(_concatenate, *actions)
            observation, reward, terminated, truncated, _ = env.step(batch)
            total += np.where(running, reward, 0.0)
            lengths += running
            running &= ~(terminated | truncated)
            steps += 1
            if progress is not None:
                progress(steps)
    finally:
        env.close()
    return total.reshape(len(policies), count), lengths.reshape(len(policies), count)


def _concatenate(*leaves: Any) -> Any:
    if isinstance(leaves[0], tuple):
        return tuple(text for texts in leaves for text in texts)
    return np.concatenate(leaves)
