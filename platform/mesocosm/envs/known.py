"""Known rewards and terminations of Gymnasium's environments, as `known` of pretrain takes them.

Each is an exact function of (o, a, o') as torch tensors (`mesocosm.model.known`), for the default
arguments of its environment, and is tested against real transitions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mesocosm.envs.training import RUN_S, STOP


def never(observation: Tensor, action: Tensor, following: Tensor) -> Tensor:
    """Termination of an environment whose episodes end only by their time limit: Reacher-v5,
    HalfCheetah-v5 and the tasks of the DeepMind Control Suite.
    """
    return torch.zeros(len(action), dtype=torch.bool, device=action.device)


def inverted_pendulum_terminated(observation: Tensor, action: Tensor, following: Tensor) -> Tensor:
    """InvertedPendulum-v5: the pole leans by more than .2 rad."""
    return following[:, 1].abs() > 0.2


def inverted_pendulum_reward(observation: Tensor, action: Tensor, following: Tensor) -> Tensor:
    """InvertedPendulum-v5: 1 for each step that does not terminate."""
    return (~inverted_pendulum_terminated(observation, action, following)).double()


def cartpole_terminated(observation: Tensor, action: Tensor, following: Tensor) -> Tensor:
    """CartPole-v1: the cart is beyond 2.4 m, or the pole leans by more than 12 degrees."""
    return (following[:, 0].abs() > 2.4) | (following[:, 2].abs() > math.radians(12))


def cartpole_reward(observation: Tensor, action: Tensor, following: Tensor) -> Tensor:
    """CartPole-v1: 1 for every step."""
    return torch.ones_like(following[:, 0])


def reacher_reward(
    observation: Tensor | Mapping[str, Tensor],
    action: Tensor,
    following: Tensor | Mapping[str, Tensor],
) -> Tensor:
    """Reacher-v5 and `mesocosm.envs.builtin:reacher`: minus the fingertip's distance from the
    target in metres, minus the squared action.
    """
    arm = following["arm"] if isinstance(following, Mapping) else following
    return -torch.linalg.vector_norm(arm[:, -2:], dim=-1) - action.square().sum(-1)


def hopper_terminated(observation: Tensor, action: Tensor, following: Tensor) -> Tensor:
    """Hopper-v5: the torso is at most .7 m high or leans by at least .2 rad, or a number of the
    state is 100 or more. Velocities are observed up to 10, so one of 100 or more does not show.
    """
    high, upright = following[:, 0] > 0.7, following[:, 1].abs() < 0.2
    return ~(high & upright & (following[:, 1:].abs() < 100).all(-1))


def fetch_reward(
    observation: Mapping[str, Tensor], action: Tensor, following: Mapping[str, Tensor]
) -> Tensor:
    """FetchPush-v4 and FetchPickAndPlace-v4: -1 while the object is more than .05 m from its goal,
    else 0.
    """
    return -(fetch_dense_reward(observation, action, following) < -0.05).double()


def fetch_dense_reward(
    observation: Mapping[str, Tensor], action: Tensor, following: Mapping[str, Tensor]
) -> Tensor:
    """FetchPushDense-v4 and FetchPickAndPlaceDense-v4: minus the distance of the object from its
    goal, in metres.
    """
    distance = following["achieved_goal"] - following["desired_goal"]
    return -torch.linalg.vector_norm(distance, dim=-1)


def training_terminated(
    observation: Mapping[str, Tensor], action: Tensor, following: Mapping[str, Tensor]
) -> Tensor:
    """`mesocosm.envs.training:TrainingRun`: it was stopped, or its budget is spent."""
    return (action[:, 0] == STOP) | (following["now"][:, 5] <= 0)


def training_reward(
    observation: Mapping[str, Tensor], action: Tensor, following: Mapping[str, Tensor]
) -> Tensor:
    """`mesocosm.envs.training:TrainingRun`: 10 ln(error before / error now) of the best held-out
    accuracy, minus 2 for each second, which the latest run of `past` holds.
    """
    error, smaller = (1.005 - each["now"][:, 4].clamp(max=1.0) for each in (observation, following))
    seconds = 10.0 ** following["past"][:, 0, 6].clamp(max=2.0)
    seconds = torch.where(action[:, 0] == STOP, RUN_S, seconds)
    return 10.0 * (error / smaller).log() - 2.0 * seconds
