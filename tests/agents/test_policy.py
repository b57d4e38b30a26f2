"""An exported policy acts as RLlib's module and connectors do, on spaces of all kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate
from ray.rllib.core.columns import Columns
from ray.rllib.core.distribution.torch.torch_distribution import TorchSquashedGaussian
from ray.rllib.utils.spaces.space_utils import unsquash_action

from mesocosm.agents import rllib
from mesocosm.agents.env import AgentEnv
from mesocosm.agents.settings import Setup
from mesocosm.errors import ArtifactError, UsageError
from mesocosm.policies import heads
from mesocosm.policies.policy import Policy, RandomPolicy

SMALL = {"fcnet_hiddens": [16, 16]}


class Bandit(gym.Env[Any, Any]):
    """An environment with the given spaces and random observations."""

    def __init__(self, observation_space: gym.Space[Any], action_space: gym.Space[Any]):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        return self.observation_space.sample(), 0.0, False, False, {}


def batch_of(space: gym.Space[Any], count: int) -> Any:
    space.seed(1)
    return concatenate(
        space, [space.sample() for _ in range(count)], create_empty_array(space, count)
    )


def build(
    env: gym.Env[Any, Any], algo: str, folder: Path, model: dict[str, Any], **params: Any
) -> Any:
    def make(count: int) -> AgentEnv:
        return AgentEnv(gym.vector.SyncVectorEnv([lambda: env] * count))

    setup = Setup(algo, params, SMALL | model, 1, 128, 0, runners=0, gamma=0.99, seed=0)
    return rllib.build(setup, make, folder)


BOX = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([1.0, 5.0], np.float32))
FREE = spaces.Box(-np.inf, np.inf, (2,), np.float32)
DISCRETE = spaces.Discrete(3, start=-1)
OBSERVATION = spaces.Box(-3.0, 3.0, (4,), np.float64)
NESTED = spaces.Dict(
    {
        "b": spaces.Tuple((spaces.Discrete(3, start=5), spaces.MultiBinary(2))),
        "a": spaces.Box(0, 9, (2,), np.int64),
    }
)

CASES = [
    ("PPO", DISCRETE, {}, {}),
    (
        "PPO",
        BOX,
        {"vf_share_layers": False, "fcnet_activation": "relu", "fcnet_use_layernorm": True},
        {},
    ),
    (
        "PPO",
        FREE,
        {
            "free_log_std": True,
            "log_std_clip_param": 1.0,
            "head_fcnet_hiddens": [8],
            "head_fcnet_activation": "silu",
        },
        {},
    ),
    ("PPO", NESTED, {}, {}),
    ("IMPALA", DISCRETE, {}, {}),
    ("APPO", BOX, {}, {}),
    ("SAC", BOX, {}, {}),
    ("DQN", DISCRETE, {}, {"dueling": True}),
    ("DQN", DISCRETE, {}, {"dueling": False, "double_q": False}),
    ("DQN", DISCRETE, {}, {"dueling": True, "num_atoms": 7, "v_min": -1.0, "v_max": 3.0}),
]


@pytest.mark.parametrize(("algo", "action_space", "model", "params"), CASES)
def test_export_acts_as_rllib(
    ray_local: None,
    tmp_path: Path,
    algo: str,
    action_space: Any,
    model: dict[str, Any],
    params: dict[str, Any],
) -> None:
    algorithm = build(Bandit(OBSERVATION, action_space), algo, tmp_path / "rllib", model, **params)
    try:
        module = algorithm.get_module()
        with torch.no_grad():
            for parameter in (
                module.parameters()
            ):  # weights far from their small initial outputs, so that bounds are reached
                parameter.add_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.5
                )
        rllib.learner_of(algorithm).module["default_policy"].load_state_dict(
            module.state_dict(), strict=False
        )
        policy = rllib.export(algorithm, (OBSERVATION, action_space))
        policy.save(tmp_path)
        policy = Policy.load(tmp_path)

        observations = batch_of(OBSERVATION, 200)
        actions = policy.act(observations)
        with torch.no_grad():
            out = module.forward_inference({Columns.OBS: torch.from_numpy(observations).float()})
        if Columns.ACTIONS in out:
            reference = out[Columns.ACTIONS].numpy()
        else:
            distribution = module.get_inference_action_dist_cls().from_logits(
                out[Columns.ACTION_DIST_INPUTS]
            )
            reference = distribution.to_deterministic().sample()
            if isinstance(
                distribution, TorchSquashedGaussian
            ):  # RLlib's to_deterministic forgets the tanh that sample() applies
                reference = distribution._squash(reference)
            reference = reference.numpy()
        # RLlib's own rescaling and clipping, where the space is one that its connector knows
        known = isinstance(action_space, spaces.Box)
        expected = (
            np.stack([unsquash_action(action, action_space) for action in reference])
            if known
            else policy.map.to_raw(reference)
        )
        for action, other in zip(_flat(actions), _flat(expected), strict=True):
            assert len(np.unique(action)) > 1
            np.testing.assert_allclose(action, other, atol=1e-5)
        assert action_space.contains(policy.act_one(observations[0]))

        rng = np.random.default_rng(0)
        drawn = policy.act(batch_of(OBSERVATION, 1).repeat(4000, 0), explore=True, rng=rng)
        _same_draws(drawn, module, batch_of(OBSERVATION, 1), policy)
    finally:
        algorithm.stop()


def _flat(value: Any) -> list[np.ndarray]:
    if isinstance(value, dict):
        return [leaf for key in sorted(value) for leaf in _flat(value[key])]
    return (
        [leaf for item in value for leaf in _flat(item)]
        if isinstance(value, tuple)
        else [np.asarray(value)]
    )


def _same_draws(drawn: Any, module: Any, observation: Any, policy: Policy) -> None:
    """Exploring draws have the mean of RLlib's own exploration distribution."""
    if policy.algo == "DQN" or isinstance(drawn, dict):
        return
    with torch.no_grad():
        out = module.forward_inference(
            {Columns.OBS: torch.from_numpy(observation).float().repeat(4000, 1)}
        )
        torch.manual_seed(0)
        draws = (
            module.get_exploration_action_dist_cls()
            .from_logits(out[Columns.ACTION_DIST_INPUTS])
            .sample()
            .numpy()
        )
    reference = _flat(policy.map.to_raw(draws))[0].astype(np.float64)
    action = _flat(drawn)[0].astype(np.float64)
    spread = reference.std(0) / np.sqrt(4000) + 1e-9
    assert np.all(np.abs(action.mean(0) - reference.mean(0)) < 6 * spread)
    np.testing.assert_allclose(action.std(0), reference.std(0), rtol=0.1, atol=1e-6)


KINDS = [
    OBSERVATION,
    DISCRETE,
    spaces.MultiDiscrete([3, 4], start=[1, -2]),
    spaces.MultiBinary((2, 2)),
    spaces.Text(5),
    spaces.Dict(
        {
            "z": spaces.Discrete(3),
            "a": spaces.Box(0, 255, (2, 2), np.uint8),
            "t": spaces.Tuple((spaces.Text(3), FREE)),
        }
    ),
]


@pytest.mark.parametrize("space", KINDS, ids=lambda s: type(s).__name__)
def test_flatten_batch_is_gymnasiums_flatten(space: gym.Space[Any]) -> None:
    space.seed(0)
    values = [space.sample() for _ in range(7)]
    batch = concatenate(space, values, create_empty_array(space, 7))
    expected = np.stack(
        [np.asarray(spaces.utils.flatten(space, value), np.float32) for value in values]
    )
    np.testing.assert_array_equal(heads.flatten_batch(space, batch), expected)
    assert expected.shape[1] == heads.flat_size(space)


@pytest.mark.parametrize(
    "space",
    [
        DISCRETE,
        NESTED,
        BOX,
        spaces.MultiBinary(3),
        spaces.Dict({"x": BOX, "y": FREE}),
        spaces.Dict({"a.b": BOX, "a": spaces.Dict({"b": BOX})}),
    ],
    ids=str,
)
def test_head_actions_reach_every_raw_action(space: gym.Space[Any]) -> None:
    mapping = heads.ActionMap(space)
    mapping.head.seed(0)
    head = np.stack([mapping.head.sample() for _ in range(300)])
    raw = mapping.to_raw(head)
    assert all(space.contains(value) for value in iterate(batch_space(space, 300), raw))
    if mapping.counts is not None:
        for leaf, count in zip(
            np.concatenate([x.reshape(300, -1) for x in _flat(raw)], 1).T,
            sorted_counts(space),
            strict=True,
        ):
            assert len(np.unique(leaf)) == count


def sorted_counts(space: gym.Space[Any]) -> list[int]:
    return [10, 10, 3, 2, 2] if space == NESTED else list(heads.ActionMap(space).counts or [])


def test_spaces_that_no_agent_can_use() -> None:
    with pytest.raises(UsageError, match="mixes continuous with discrete"):
        heads.ActionMap(spaces.Dict({"x": BOX, "n": DISCRETE}))
    with pytest.raises(UsageError, match="text"):
        heads.ActionMap(spaces.Text(3))
    with pytest.raises(UsageError, match="cannot observe"):
        heads.flat_size(spaces.Sequence(DISCRETE))


def test_random_policy_fills_the_space() -> None:
    observations = {"x": np.zeros((50, 2)), "t": ("a",) * 50}
    policy = RandomPolicy(NESTED)
    actions = policy.act(observations, rng=np.random.default_rng(0))
    again = RandomPolicy(NESTED).act(observations, rng=np.random.default_rng(0))
    assert actions["b"][1].shape == (50, 2) and len(np.unique(actions["a"])) == 10
    np.testing.assert_array_equal(actions["a"], again["a"])


def test_a_folder_without_a_policy(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no policy"):
        Policy.load(tmp_path)


def test_torch_export_gives_the_networks_outputs(ray_local: None, tmp_path: Path) -> None:
    algorithm = build(Bandit(OBSERVATION, DISCRETE), "DQN", tmp_path / "rllib", {})
    try:
        policy = rllib.export(algorithm, (OBSERVATION, DISCRETE))
    finally:
        algorithm.stop()
    policy.export_torch(tmp_path / "policy.pt2")
    observations = batch_of(OBSERVATION, 5)
    outputs = torch.export.load(tmp_path / "policy.pt2").module()(
        torch.from_numpy(observations).float()
    )
    torch.testing.assert_close(outputs, policy.outputs(observations))
