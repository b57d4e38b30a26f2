"""What a policy earns in a world: greedy imagined episodes, no real step."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mesocosm.agents.policy import Acts
from mesocosm.serving.client import WorldVectorEnv


def imagined_returns(policy: Acts, env: WorldVectorEnv, seed: int) -> NDArray[np.float64]:
    """Undiscounted returns [num_envs] of one whole episode in each environment, acting greedily; a function of (policy, world, starts, seed).

    `env` is closed. A penalty of its own is part of the reward; an episode ends at its horizon, or where the world terminates or diverges.
    """
    rng = np.random.default_rng(seed)
    total, going = np.zeros(env.num_envs), np.ones(env.num_envs, np.bool_)
    try:
        observation, _ = env.reset(seed=seed)
        while going.any():
            observation, reward, terminated, truncated, _ = env.step(policy.act(observation, False, rng))
            total += np.where(going, reward, 0.0)
            going &= ~(terminated | truncated)
    finally:
        env.close()
    return total
