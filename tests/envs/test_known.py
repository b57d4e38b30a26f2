"""The shipped known functions against real transitions."""

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

from mesocosm.envs import known
from mesocosm.envs.config import RealityConfig
from mesocosm.envs.make import make_env

TRANSITIONS = 600
Known = Callable[..., Tensor]


def transitions(name: str, seed: int = 0) -> tuple[Any, Any, Any, Any, Any]:
    """(o, a, o', rewards, terminated) of TRANSITIONS random steps, as
    known functions receive them.
    """
    env = make_env(RealityConfig(env=name))
    env.action_space.seed(seed)
    rows: list[tuple[Any, ...]] = []
    observation, ended = None, True
    while len(rows) < TRANSITIONS:
        if ended:
            observation, _ = env.reset(seed=seed + len(rows))
        action = env.action_space.sample()
        following, reward, terminated, truncated, _ = env.step(action)
        rows.append((observation, action, following, float(reward), terminated))
        observation, ended = following, terminated or truncated
    columns = list(zip(*rows, strict=True))
    rewards, ends = torch.tensor(columns[3], dtype=torch.float64), torch.tensor(columns[4])
    return *map(_batch, columns[:3]), rewards, ends


def _batch(values: Any) -> Any:
    if isinstance(values[0], dict):
        return {key: _batch([value[key] for value in values]) for key in values[0]}
    array = torch.from_numpy(np.stack(values))
    return array.double() if array.dtype.is_floating_point else array


@pytest.mark.parametrize(
    ("env", "reward"),
    [
        ("InvertedPendulum-v5", known.inverted_pendulum_reward),
        ("CartPole-v1", known.cartpole_reward),
        ("Reacher-v5", known.reacher_reward),
        ("mesocosm.envs.builtin:reacher", known.reacher_reward),
    ],
)
def test_a_shipped_reward_is_that_of_its_environment(env: str, reward: Known) -> None:
    *arguments, rewards, _ = transitions(env)
    torch.testing.assert_close(reward(*arguments), rewards, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("env", "terminated"),
    [
        ("InvertedPendulum-v5", known.inverted_pendulum_terminated),
        ("CartPole-v1", known.cartpole_terminated),
        ("Hopper-v5", known.hopper_terminated),
        ("Reacher-v5", known.never),
        ("HalfCheetah-v5", known.never),
    ],
)
def test_a_shipped_termination_is_that_of_its_environment(env: str, terminated: Known) -> None:
    *arguments, _, ends = transitions(env)
    assert torch.equal(terminated(*arguments), ends)
    assert ends.sum() >= 20 or terminated is known.never


def test_the_forward_reward_of_hopper_is_no_function_of_its_observations() -> None:
    """It is the mean velocity over a step of four frames, and the position is not observed."""
    observation, action, following, rewards, ends = transitions("Hopper-v5")
    healthy = (~known.hopper_terminated(observation, action, following)).double()
    guess = healthy + (observation[:, 5] + following[:, 5]) / 2 - 1e-3 * action.square().sum(-1)
    assert ends.any() and (guess - rewards).abs().max() > 0.01


def test_hopper_falls_at_its_limits() -> None:
    upright = torch.zeros(5, 11, dtype=torch.float64)
    upright[:, 0] = 1.25
    upright[1, 0], upright[2, 1], upright[3, 4], upright[4, 10] = 0.7, -0.2, 100.0, 9.9
    expected = [False, True, True, True, False]
    assert known.hopper_terminated(upright, torch.zeros(5, 3), upright).tolist() == expected
    assert gymnasium.spec("Hopper-v5").kwargs == {}
