"""The actions of behaviours of every kind."""

from __future__ import annotations

from typing import Any

import gymnasium

from mesocosm.envs.episode import Act
from mesocosm.policies import behaviours
from mesocosm.policies.behaviours import BehaviourConfig, CheckedActions
from mesocosm.store.artifacts import Storage


def build_act(
    behaviour: BehaviourConfig,
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    storage: Storage,
) -> Act:
    """The `Act` of a checked behaviour of any kind.

    Raises:
        UsageError: The policy is missing, has other spaces, or cannot plan.
    """
    if behaviour.kind != "planner":
        return behaviours.build(behaviour, observation_space, action_space, storage)
    from mesocosm.data.planners import planner_policy  # imports torch: only where a planner acts

    assert behaviour.policy is not None
    policy = planner_policy(storage, behaviour.policy, observation_space, action_space)
    return CheckedActions(policy, action_space, behaviours.label(behaviour))
