"""Planners of stored agents and worlds."""

from __future__ import annotations

from typing import Any

import gymnasium

from mesocosm.data.loading.codec import Codec
from mesocosm.errors import UsageError
from mesocosm.model.world import World
from mesocosm.policies.image_policy import ImagePolicy
from mesocosm.policies.plan_state import PlanSize
from mesocosm.policies.planner import Planner
from mesocosm.policies.planner_policy import PlannerPolicy
from mesocosm.policies.policy import Policy
from mesocosm.policies.stored import load_policy, policy_folder
from mesocosm.policies.value import ValueFunction
from mesocosm.store.artifacts import Storage


def load_agent(storage: Storage, ref: str) -> tuple[Policy, ValueFunction]:
    """The policy and value function of `agents/ID`, or of its snapshot `agents/ID@ITERATION`.

    Raises:
        UsageError: There is no such agent or snapshot, or it sees images.
        ArtifactError: It has no value function: a clone, or an agent of an earlier version.
    """
    folder = policy_folder(storage, ref)
    policy = load_policy(folder)
    if isinstance(policy, ImagePolicy):
        raise UsageError(
            f"a planner cannot use {ref}, which sees images: the value function reads several"
            " frames, and a plan ends in one; use kind trained"
        )
    return Policy.load(folder), ValueFunction.load(folder)


def load_planner(
    storage: Storage, agent: str | None, world: str | None = None, size: PlanSize | None = None
) -> Planner:
    """The planner of an agent in a world.

    Args:
        storage: The storage.
        agent: `agents/ID`, or `agents/ID@ITERATION`. None plans without an agent.
        world: `worlds/ID`. Defaults to the world in which the agent was trained.
        size: The effort of planning.

    Raises:
        UsageError: There is no such artifact, the agent was not trained in a world, or the world's
            actions cannot be planned.
        ArtifactError: The agent has no value function.
    """
    if world is None:
        assert agent is not None, "a planner needs an agent or a world"
        artifact = storage.artifact("agents", agent.partition("@")[0])
        worlds = artifact.meta.get("inputs", {}).get("worlds", [])
        if not worlds:
            raise UsageError(
                f"{artifact.name} names no world in which to plan: it was not trained in one; use"
                " an agent of train-agent"
            )
        world = worlds[0]
    loaded = World.load(storage.artifact("worlds", world).path)
    acting = None if agent is None else load_agent(storage, agent)
    return Planner(loaded, Codec.from_json(loaded.codec), acting, size)


def planner_policy(
    storage: Storage,
    ref: str,
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
) -> PlannerPolicy:
    """The planner of an agent in the world in which it was trained, for an environment.

    Raises:
        UsageError: As `load_planner`; the environment has other spaces; or the world's task is a
            reset option, which a behaviour does not see.
    """
    planner = load_planner(storage, ref)
    codec = planner.codec
    spaces = ("observation", observation_space), ("action", action_space)
    for (name, space), expected in zip(
        spaces, (codec.observation_space, codec.action_space), strict=True
    ):
        if space != expected:
            raise UsageError(
                f"policy {ref!r} plans in a world with the {name} space {expected}, reality.env has"
                f" {space}; use an agent of this environment"
            )
    if codec.options:
        names = [option.name for option in codec.options]
        raise UsageError(
            f"policy {ref!r}: the world's task has the reset options {names}, which a planner does"
            " not see; use kind trained"
        )
    return PlannerPolicy(planner)
