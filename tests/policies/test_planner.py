"""Plans in a world of known dynamics, their state, and what cannot be planned."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector.utils import batch_space, iterate
from serve.worlds import BOX, DICT, TWO, bits, untrained

from mesocosm.data.loading.codec import Codec
from mesocosm.errors import UsageError
from mesocosm.model.world import World
from mesocosm.policies.plan_state import PlanSize, PlanState
from mesocosm.policies.planner import Planner, _basis
from mesocosm.policies.planner_policy import PlannerPolicy
from mesocosm.policies.policy import RandomPolicy

from .known import CHOICE, PUSH, agent, earned, line

actions = pytest.mark.parametrize("action", [PUSH, CHOICE], ids=["push", "choice"])


def plans(action: Any, **options: Any) -> PlannerPolicy:
    policy = PlannerPolicy(Planner(*line(action), **options))
    policy.reset(1, seed=1)
    return policy


@actions
def test_a_planner_beats_chance_and_the_agent_that_it_plans_with(action: Any) -> None:
    """The line is best at 0, two units away: 4 pushes. An idle agent earns -4 a step."""
    random, rng = RandomPolicy(action), np.random.default_rng(0)
    chance = np.mean([earned(lambda o: random.act(o, True, rng), 2.0) for _ in range(20)])
    best = -(1.5**2 + 1.0 + 0.5**2)
    alone = earned(plans(action).act, 2.0)
    assert best + 1e-3 > alone > best - 1.5 > chance
    known = agent(action)
    idle = earned(known[0].act, 2.0)
    assert earned(plans(action, agent=known).act, 2.0) > best - 1.5 > idle


def test_the_agents_value_counts_at_the_end_of_a_plan() -> None:
    """A value that grows with o outweighs the rewards of the plan, which falls at o = 0."""
    size = PlanSize(2, 24, 2, 4)
    near, far = (plans(PUSH, agent=agent(PUSH, value), size=size) for value in (0.0, 50.0))
    still = np.zeros((1, 1), np.float32)
    assert abs(near.act(still)[0, 0]) < 0.3
    assert far.act(still)[0, 0] > 0.6


def test_the_agents_proposals_are_candidates() -> None:
    """With one iteration of plans that hardly differ from chance, an agent that knows the way."""
    policy, value = agent()
    with torch.no_grad():
        policy.network.trunk[0].bias[0] = -20.0  # always pushes by -1
    planner = Planner(*line(), agent=(policy, value), size=PlanSize(5, 2, 1, 1))
    act = PlannerPolicy(planner)
    assert act.act(np.array([[9.0]], np.float32))[0, 0] == -1.0


def test_noise_along_a_plan_is_standard_and_coloured() -> None:
    for horizon in (1, 2, 5, 10):
        basis = _basis(horizon)
        torch.testing.assert_close(basis.square().sum(0), torch.ones(horizon))
    covariance = basis.T @ basis
    assert covariance[0, 1] > 0.6 > covariance[0, 4]


WIDE = spaces.Dict(
    {
        "speed": spaces.Box(np.array([-3.0, 0.0]), np.array([1.0, np.inf]), dtype=np.float64),
        "gear": spaces.MultiDiscrete([2, 5]),
        "flag": spaces.MultiBinary(2),
        "count": spaces.Box(0, 9, (1,), np.int64),
    }
)


@pytest.mark.integration
@pytest.mark.parametrize("family", ["ensemble", "sequence"])
@pytest.mark.parametrize(
    ("observation", "action"), [(BOX, PUSH), (DICT, TWO), (BOX, WIDE)], ids=["box", "dict", "wide"]
)
def test_actions_lie_in_the_space_and_repeat_to_the_bit(
    family: str, observation: Any, action: Any
) -> None:
    world = untrained(observation, action, family)
    codec = Codec.from_json(world.codec)
    small = PlanSize(2, 4, 2)
    observation.seed(0)
    seen = [codec.decode_observation(*map_zeros(world, 3, step)) for step in range(7)]

    def played(seed: int, moved: bool = False) -> list[Any]:
        policy = PlannerPolicy(Planner(world, codec, size=small))
        policy.reset(3, seed)
        taken = []
        for step, batch in enumerate(seen):
            if step == 2:
                policy.restart(np.array([False, True, False]))
            if moved and step == 5:
                policy = PlannerPolicy(Planner(world, codec, size=small)).restored(policy.state())
            taken.append(policy.act(batch))
        return taken

    first = played(0)  # the window of a sequence world has 6 steps
    rows = spaces_of(action, first)
    assert all(action.contains(row) for row in rows)
    assert bits(first) == bits(played(0)) == bits(played(0, moved=True))
    assert bits(first) != bits(played(1))


def map_zeros(world: World, batch: int, step: int) -> Any:
    """Start states of a world, other ones at each step."""
    task, observation = world.sample_start(torch.arange(batch) + 100 * step)
    return observation, task


def spaces_of(space: Any, batches: list[Any]) -> list[Any]:
    return [row for batch in batches for row in iterate(batch_space(space, 3), batch)]


def test_an_episode_that_begins_has_no_earlier_plans() -> None:
    planner = Planner(*line())
    state = planner.begin(2, 0)
    context = PlannerPolicy(planner)
    context.reset(2, 0)
    still = np.zeros((2, 1), np.float32)
    context.act(still)
    state = PlanState.from_numpy(context._state.to_numpy())  # type: ignore[union-attr]
    assert state.planned.all() and state.step == 1
    mask = torch.tensor([True, False])
    assert state.restarted(mask).planned.tolist() == [False, True]


def test_what_cannot_be_planned_is_refused() -> None:
    text = untrained(BOX, spaces.Text(5))
    with pytest.raises(UsageError, match="actions hold text"):
        Planner(text, Codec.from_json(text.codec))
    world, codec = line(CHOICE)
    with pytest.raises(UsageError, match="agent must have the world's action space Discrete"):
        Planner(world, codec, agent(PUSH))
    policy = PlannerPolicy(Planner(world, codec))
    with pytest.raises(UsageError, match="num_envs must be >= 1, got 0"):
        policy.reset(0)
    with pytest.raises(UsageError, match=r"seed must be in \[0, 2\^62\), got -1"):
        policy.reset(1, -1)
    policy.reset(2)
    with pytest.raises(UsageError, match="those of 2 environments, got 1"):
        policy.act(np.zeros((1, 1), np.float32))
