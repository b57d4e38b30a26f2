"""Disagreement on request: it changes no trajectory, and is asked for at known steps only."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mesocosm.agents.env import AgentEnv
from mesocosm.errors import UsageError
from mesocosm.policies.policy import Policy
from mesocosm.serve.protocol import pack, unpack
from mesocosm.serve.session import Sessions
from mesocosm.serve.world_env import WorldVectorEnv

from .worlds import DICT, bits, rollout, untrained

families = pytest.mark.parametrize("family", ["ensemble", "sequence"])
modes = pytest.mark.parametrize("mode", ["NextStep", "SameStep"])


def split(infos: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(infos of disagreement, the others)"""
    others = {name: value for name, value in infos.items() if "disagreement" not in name}
    if "final_info" in infos:
        _, others["final_info"] = split(infos["final_info"])
    return {name: value for name, value in infos.items() if "disagreement" in name}, others


def clocks(steps: list[Any]) -> list[int]:
    """The steps with a disagreement."""
    return [clock for clock, step in enumerate(steps) if "disagreement" in step[4]]


@pytest.mark.integration
@families
@modes
def test_a_trajectory_does_not_depend_on_it(family: str, mode: str) -> None:
    world = untrained(DICT, family=family, terminal=0.1)
    options: dict[str, Any] = {"horizon": 9, "autoreset_mode": mode}
    reference = rollout(WorldVectorEnv(3, world, **options), 32)[1:]
    for every in (0, 4):
        steps = rollout(WorldVectorEnv(3, world, disagreement_every=every, **options), 32)[1:]
        for asked, silent in zip(reference, steps, strict=True):
            (of_asked, others), (of_silent, rest) = split(asked[4]), split(silent[4])
            assert bits([*asked[:4], others]) == bits([*silent[:4], rest])
            assert not of_silent or bits(of_silent) == bits(of_asked)
        assert [clock // 4 for clock in clocks(steps)] == list(range(8 if every else 0))
    assert clocks(reference) == list(range(32)), "by default every step has it"


def test_the_asked_steps_are_spread_and_depend_on_the_seed() -> None:
    env = WorldVectorEnv(2, untrained(), disagreement_every=5)
    asked = [clocks(rollout(env, 40, seed)[1:]) for seed in (0, 0, 1)]
    assert asked[0] == asked[1] != asked[2]
    assert len({clock % 5 for clock in asked[0]}) > 2


@pytest.mark.parametrize(
    "need", [{"penalty": 0.5}, {"max_disagreement": 1.0}, {"adversary": True}], ids=str
)
def test_rewards_and_limits_that_need_it_always_ask(need: dict[str, Any]) -> None:
    world = untrained()
    plain, silent = (WorldVectorEnv(2, world, disagreement_every=n, **need) for n in (1, 0))
    assert bits(rollout(plain, 12)) == bits(rollout(silent, 12))
    assert clocks(rollout(silent, 12)[1:]) == list(range(12))


def test_members_are_not_asked_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    world, asked = untrained(), []
    disagreement = world.net.disagreement

    def count(*arguments: Any) -> Any:
        asked.append(1)
        return disagreement(*arguments)

    monkeypatch.setattr(world.net, "disagreement", count)
    rollout(WorldVectorEnv(2, world, disagreement_every=0), 8)
    assert not asked
    rollout(WorldVectorEnv(2, world, disagreement_every=4), 8)
    assert len(asked) == 2


def test_a_wrong_interval() -> None:
    with pytest.raises(UsageError, match=r"disagreement_every must be >= 0, got -1"):
        WorldVectorEnv(2, untrained(), disagreement_every=-1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"disagreement": None}, "disagreement must be true or false, got nothing"),
        ({"disagreement": 1}, "disagreement must be true or false, got 1"),
        (
            {"disagreement": False, "max_disagreement": 2.0},
            "disagreement must be true with a max_disagreement, got False",
        ),
    ],
)
def test_wrong_requests(change: dict[str, Any], message: str) -> None:
    env, requests = WorldVectorEnv(2, untrained()), []
    sessions = env._connection
    assert isinstance(sessions, Sessions)
    call = sessions.call

    def tamper(request: dict[str, Any]) -> Any:
        requests.append(request)
        return call(request | change if request["op"] == "step" else request)

    sessions.call = tamper  # type: ignore[method-assign]
    with pytest.raises(UsageError, match=message):
        rollout(env, 1)
    assert requests[-1]["disagreement"] is True


def test_a_message_of_another_version() -> None:
    old = b"MSC1" + pack({"op": "end"})[4:]
    with pytest.raises(ValueError, match=r"version b'MSC2', got b'MSC1'; use the same version"):
        unpack(old)


def test_the_mean_counts_the_asked_steps_only() -> None:
    """A metric of sampled steps is their mean, never diluted with steps that did not ask."""
    world = untrained(terminal=0.1)

    def statistics(every: int) -> Any:
        env = AgentEnv(WorldVectorEnv(4, world, horizon=9, disagreement_every=every))
        rollout(env, 32)
        return env.statistics()

    full, some, none = (statistics(every) for every in (1, 4, 0))
    assert full.steps == full.measured == some.steps == none.steps
    assert (full.returns, full.diverged) == (some.returns, some.diverged)
    assert 0 < some.measured < full.measured / 2
    means = [each.mean_disagreement()["disagreement"] for each in (full, some)]
    assert means[1] == pytest.approx(means[0], rel=0.5)
    assert none.mean_disagreement() == {}


def test_imagined_episodes_ask_only_where_rewards_need_it() -> None:
    from mesocosm.agents.rollout import imagined_episodes

    world = untrained(terminal=0.1)

    class Zero(Policy):
        def __init__(self) -> None: ...

        def act(self, observation: Any, explore: bool, rng: Any) -> Any:
            return np.zeros(len(observation), np.int64)

    envs = [WorldVectorEnv(4, world, horizon=9, penalty=penalty) for penalty in (0.0, 0.5)]
    returns = [imagined_episodes([Zero()], env, 0)[0] for env in envs]
    assert (returns[1] < returns[0]).all()
