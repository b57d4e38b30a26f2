"""No policy takes an action that the mask of its observation forbids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from agents.test_policy import built
from gymnasium import spaces
from gymnasium.vector.utils import iterate
from serve.worlds import untrained

from mesocosm.agents import learner_access, rllib, settings
from mesocosm.agents.config import AgentConfig
from mesocosm.agents.masked_module import MaskedPPOModule
from mesocosm.data.loading.codec import Codec
from mesocosm.datasets.masks import MASK, action_at, mask_of, mask_size, place_of
from mesocosm.envs.config import RealityConfig
from mesocosm.envs.items import Items, expert
from mesocosm.envs.make import make_env
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.evaluate.policy_set import Noisy
from mesocosm.policies.behaviours import NoisyActions, RandomActions
from mesocosm.policies.heads import ActionMap, flat_size, flatten_batch, mask_columns, stack
from mesocosm.policies.plan_state import PlanSize
from mesocosm.policies.planner import Planner
from mesocosm.policies.planner_policy import PlannerPolicy
from mesocosm.policies.policy import Layout, Policy, RandomPolicy
from mesocosm.policies.value import ValueFunction

ITEMS = Items(slots=5)
SPACES = ITEMS.observation_space, ITEMS.action_space
ENV = "mesocosm.envs.items:Items"


def observations(count: int, seed: int = 0) -> Any:
    """First observations, whose masks differ."""
    return stack(SPACES[0], [ITEMS.reset(seed=seed + i)[0] for i in range(count)])


def allowed(batch: Any, actions: Any) -> bool:
    rows = iterate(spaces.MultiDiscrete([[2, 5]] * len(actions)), actions)
    places = [place_of(SPACES[1], action) for action in rows]
    return bool(batch[MASK][np.arange(len(places)), places].all())


def policy(seed: int = 0) -> Policy:
    torch.manual_seed(seed)
    layers = [{"kind": "linear", "in": flat_size(SPACES[0]), "out": 10}]
    made = Policy("PPO", *SPACES, Layout("categorical", layers))
    with torch.no_grad():
        made.network.trunk[0].weight.normal_(std=3.0)
    return made


def test_actions_are_numbered_in_row_major_order() -> None:
    for space in (spaces.MultiDiscrete([2, 3]), spaces.Discrete(4, start=2)):
        size = mask_size(spaces.Dict({MASK: spaces.MultiBinary(space_size(space))}), space)
        assert size == space_size(space)
        actions = [action_at(space, i) for i in range(size)]
        assert all(space.contains(action) for action in actions)
        assert [place_of(space, action) for action in actions] == list(range(size))
        head = ActionMap(space, masked=True)
        batch = stack(space, actions)
        assert head.to_head(batch).tolist() == list(range(size))
        np.testing.assert_array_equal(head.to_raw(np.arange(size)), batch)
    assert np.array_equal(action_at(spaces.MultiDiscrete([2, 3]), 4), [1, 1])


def space_size(space: Any) -> int:
    return int(np.prod(space.nvec)) if isinstance(space, spaces.MultiDiscrete) else int(space.n)


@pytest.mark.parametrize("mask", [spaces.MultiBinary(3), spaces.Box(0, 1, (10,), np.int8)])
def test_a_mask_of_another_kind_is_refused(mask: Any) -> None:
    with pytest.raises(UsageError, match=r"action_mask must be MultiBinary\(10\)"):
        mask_size(spaces.Dict({MASK: mask}), SPACES[1])
    with pytest.raises(UsageError, match="needs Discrete or MultiDiscrete"):
        mask_size(spaces.Dict({MASK: mask}), spaces.Box(-1, 1))


def test_the_columns_of_the_mask_in_flat_observations() -> None:
    batch, columns = observations(4), mask_columns(SPACES[0])
    assert columns is not None
    flat = flatten_batch(SPACES[0], batch)
    np.testing.assert_array_equal(flat[:, slice(*columns)], batch[MASK])
    assert mask_columns(spaces.Box(-1, 1)) is None


def test_an_empty_mask_allows_everything() -> None:
    assert mask_of({MASK: np.zeros((2, 3))}).all()  # type: ignore[union-attr]
    assert mask_of({MASK: np.array([0, 1])}).tolist() == [False, True]  # type: ignore[union-attr]


@pytest.mark.parametrize("explore", [False, True])
def test_policies_choose_what_is_possible(explore: bool) -> None:
    batch, rng = observations(40), np.random.default_rng(0)
    for each in (policy(), RandomPolicy(SPACES[1]), Noisy(policy(), SPACES[1], 0.7)):
        actions = each.act(batch, explore, rng)
        assert allowed(batch, actions)
    assert len(np.unique(RandomPolicy(SPACES[1]).act(batch, True, rng), axis=0)) > 5
    one = Noisy(policy(), SPACES[1], 1.0)
    for k in range(20):
        observation = ITEMS.reset(seed=k)[0]
        assert observation[MASK][place_of(SPACES[1], one.act_one(observation, rng=rng))]


def test_behaviours_choose_what_is_possible() -> None:
    rng = np.random.default_rng(0)
    noisy = NoisyActions(expert, SPACES[1], 0.8)
    for act in (RandomActions(SPACES[1]), noisy):
        act.start(0, rng)
        for k in range(30):
            observation = ITEMS.reset(seed=k)[0]
            assert observation[MASK][place_of(SPACES[1], act(observation, rng))]


def test_reality_refuses_what_the_mask_forbids() -> None:
    env = make_env(RealityConfig(env=ENV, kwargs={"slots": 5}))
    observation, _ = env.reset(seed=3)
    forbidden = action_at(SPACES[1], int(np.flatnonzero(observation[MASK] == 0)[0]))
    with pytest.raises(MesocosmError, match=r"observation\.action_mask allows"):
        env.step(forbidden)
    env.step(expert(observation, np.random.default_rng(0)))


class Stuck(Items):
    def _observation(self) -> dict[str, Any]:
        observation = super()._observation()
        return observation | {MASK: np.zeros_like(observation[MASK])}


def test_an_observation_without_any_action_is_an_error_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mesocosm.envs.items.Items", Stuck)
    env = make_env(RealityConfig(env=ENV))
    with pytest.raises(ValueError, match="allows no action"):
        env.reset(seed=0)


@pytest.mark.parametrize("family", ["ensemble", "sequence"])
@pytest.mark.parametrize("with_agent", [False, True], ids=["alone", "agent"])
def test_a_planner_chooses_what_is_possible(family: str, with_agent: bool) -> None:
    world = untrained(*SPACES, family, members=2)
    codec = Codec.from_json(world.codec)
    assert codec.mask is not None and codec.mask.stop - codec.mask.start == 10
    agent = None
    if with_agent:
        network = torch.nn.Sequential(torch.nn.Linear(flat_size(SPACES[0]), 1))
        agent = policy(), ValueFunction("state", [network], 0.9)
    planner = PlannerPolicy(Planner(world, codec, agent, PlanSize(3, 6, 2, 3 * with_agent)))
    planner.reset(4, seed=1)
    for step in range(3):
        batch = observations(4, seed=10 * step)
        assert allowed(batch, planner.act(batch))


def test_ppo_samples_and_exports_masked_logits(ray_local: None, tmp_path: Path) -> None:
    with built(Items(slots=5), "PPO", tmp_path) as algorithm:
        rllib.train(algorithm)
        made: Any = rllib.export(algorithm, learner_access.module_of(algorithm), SPACES)
        batch = observations(30)
        assert allowed(batch, made.act(batch, True, np.random.default_rng(0)))
        module = algorithm.env_runner.module
        flat = torch.from_numpy(flatten_batch(SPACES[0], batch))
        with torch.no_grad():
            logits = module.forward_inference({"obs": flat})["action_dist_inputs"]
        torch.testing.assert_close(made.network(flat), logits)
        made.save(tmp_path)
        again = Policy.load(tmp_path)
        torch.testing.assert_close(again.network(flat), logits)


def test_ppo_without_a_table_masks_its_logits_too() -> None:
    flat = spaces.Dict({name: SPACES[0][name] for name in (MASK, "goal", "total")})
    module: Any = rllib.check_agent(settings.imagined(AgentConfig()), (flat, SPACES[1]))
    assert isinstance(module, MaskedPPOModule)
    batch = observations(6)
    rows = {"obs": torch.from_numpy(flatten_batch(flat, {name: batch[name] for name in flat}))}
    for outputs in (module.forward_inference(rows), module.forward_train(rows)):
        logits = outputs["action_dist_inputs"]
        assert torch.equal(logits < -1e8, torch.from_numpy(batch[MASK] == 0))


@pytest.mark.parametrize("algo", ["DQN", "APPO"])
def test_other_algorithms_are_refused(algo: str) -> None:
    with pytest.raises(UsageError, match="algo must be PPO, or SAC in a world"):
        rllib.check_agent(settings.imagined(AgentConfig(algo=algo)), SPACES)


def test_sac_learns_from_what_is_possible() -> None:
    head = ActionMap(SPACES[1], True).head
    setup = settings.imagined(AgentConfig(algo="SAC"), actions=head)
    module: Any = rllib.check_agent(setup, SPACES)
    batch = observations(20)
    flat = torch.from_numpy(flatten_batch(SPACES[0], batch))
    possible = torch.from_numpy(batch[MASK] == 1)
    probabilities = module.logits(flat).softmax(-1)
    assert not probabilities[~possible].any() and (probabilities[possible] > 0).all()
    share = module.entropy_share(flat)
    assert 0.5 < float(share) < 1.0


def test_ids_and_actions_without_a_mask_stay() -> None:
    plain = spaces.Dict({"x": spaces.Discrete(2)})
    assert mask_size(plain, SPACES[1]) is None
    assert ActionMap(SPACES[1]).head == spaces.MultiDiscrete([2, 5])
    assert mask_of({"x": 1}) is None and mask_of(np.zeros(2)) is None
