"""An exported policy acts as RLlib's module and connectors do, on spaces of all kinds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
from safetensors.torch import load_file

from mesocosm.agents import export, learner_access, rllib
from mesocosm.agents.env import AgentEnv
from mesocosm.agents.export import save_agent
from mesocosm.agents.settings import Setup
from mesocosm.errors import ArtifactError, UsageError
from mesocosm.policies import heads
from mesocosm.policies.policy import TRAINING_STATE, Policy, RandomPolicy
from mesocosm.policies.value import ValueFunction


class Bandit(gym.Env[Any, Any]):
    """An environment with the given spaces and random observations."""

    def __init__(self, observation_space: gym.Space[Any], action_space: gym.Space[Any]):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), action
        return self.observation_space.sample(), 0.0, False, False, {}


def batch_of(space: gym.Space[Any], count: int) -> Any:
    space.seed(1)
    values = [space.sample() for _ in range(count)]
    return concatenate(space, values, create_empty_array(space, count))


@contextmanager
def built(env: gym.Env[Any, Any], algo: str, folder: Path, **model: Any) -> Iterator[Any]:
    """An algorithm on one environment. `model` may have "params"."""
    params, model = model.pop("params", {}), {"fcnet_hiddens": [16, 16], **model}
    spaces = env.observation_space, env.action_space
    setup = Setup(algo, params, model, 1, 128, 0, runners=0, gamma=0.99, seed=0, spaces=spaces)
    algorithm = rllib.build(
        setup, lambda count: AgentEnv(gym.vector.SyncVectorEnv([lambda: env] * count)), folder
    )
    try:
        yield algorithm
    finally:
        algorithm.stop()


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

NORMED = {"vf_share_layers": False, "fcnet_activation": "relu", "fcnet_use_layernorm": True}
HEADED = {"free_log_std": True, "log_std_clip_param": 1.0}
HEADED |= {"head_fcnet_hiddens": [8], "head_fcnet_activation": "silu"}
ATOMS = {"dueling": True, "num_atoms": 7, "v_min": -1.0, "v_max": 3.0}


@pytest.mark.parametrize(
    ("algo", "action_space", "model"),
    [
        ("PPO", DISCRETE, {}),
        ("PPO", BOX, NORMED),
        ("PPO", FREE, HEADED),
        ("PPO", NESTED, {}),
        ("IMPALA", DISCRETE, {}),
        ("APPO", BOX, {}),
        ("SAC", BOX, {}),
        ("DQN", DISCRETE, {"params": {"dueling": True}}),
        ("DQN", DISCRETE, {"params": {"dueling": False, "double_q": False}}),
        ("DQN", DISCRETE, {"params": ATOMS}),
    ],
)
def test_export_acts_as_rllib(
    ray_local: None, tmp_path: Path, algo: str, action_space: Any, model: dict[str, Any]
) -> None:
    env = Bandit(OBSERVATION, action_space)
    with built(env, algo, tmp_path / "rllib", **model) as algorithm, torch.no_grad():
        module = algorithm.get_module()
        for parameter in module.parameters():  # far from their small initial outputs, to the bounds
            seed = torch.Generator().manual_seed(3)
            parameter.add_(torch.randn(parameter.shape, generator=seed) * 0.5)
        learner_module = learner_access.learner_of(algorithm).module["default_policy"]
        learner_module.load_state_dict(module.state_dict(), strict=False)
        made = rllib.export(
            algorithm, learner_access.module_of(algorithm), (OBSERVATION, action_space)
        )
        made.save(tmp_path)
        policy = Policy.load(tmp_path)

        observations = batch_of(OBSERVATION, 200)
        actions = policy.act(observations)
        out = module.forward_inference({Columns.OBS: torch.from_numpy(observations).float()})
        reference = out.get(Columns.ACTIONS)
        if reference is None:
            kind = module.get_inference_action_dist_cls()
            distribution = kind.from_logits(out[Columns.ACTION_DIST_INPUTS])
            reference = distribution.to_deterministic().sample()
            if isinstance(distribution, TorchSquashedGaussian):
                # RLlib's to_deterministic forgets the tanh that sample() applies
                reference = distribution._squash(reference)
        expected = policy.map.to_raw(reference.numpy())
        if isinstance(action_space, spaces.Box):  # which RLlib's connector rescales and clips
            expected = np.stack([unsquash_action(a, action_space) for a in reference.numpy()])
        for action, other in zip(_flat(actions), _flat(expected), strict=True):
            assert len(np.unique(action)) > 1
            np.testing.assert_allclose(action, other, atol=1e-5)
        assert action_space.contains(policy.act_one(observations[0]))
        _same_draws(module, policy)


@pytest.mark.parametrize(
    ("algo", "action_space", "model"),
    [
        ("PPO", DISCRETE, {"vf_share_layers": True}),
        ("PPO", BOX, NORMED),
        ("DQN", DISCRETE, {"params": {"dueling": True}}),
    ],
)
def test_an_exported_value_is_that_of_rllib(
    ray_local: None, tmp_path: Path, algo: str, action_space: Any, model: dict[str, Any]
) -> None:
    env = Bandit(OBSERVATION, action_space)
    with built(env, algo, tmp_path / "rllib", **model) as algorithm, torch.no_grad():
        save_agent(algorithm, (OBSERVATION, action_space), tmp_path)
        policy, value = Policy.load(tmp_path), ValueFunction.load(tmp_path)
        observations = torch.from_numpy(batch_of(OBSERVATION, 20)).float()
        module = learner_access.learner_of(algorithm).module["default_policy"]
        if algo == "DQN":
            expected = module.compute_q_values({Columns.OBS: observations})["qf_preds"].amax(-1)
        else:
            expected = module.compute_values({Columns.OBS: observations})
        torch.testing.assert_close(value(policy, observations), expected, atol=1e-5, rtol=1e-5)
        assert value.gamma == 0.99 and len(expected.unique()) > 1


def test_an_agent_without_a_value_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"value\.json.*train the agent again, with --force"):
        ValueFunction.load(tmp_path)


def _flat(value: Any) -> list[np.ndarray]:
    if isinstance(value, dict):
        value = tuple(value[key] for key in sorted(value))
    parts = [_flat(item) for item in value] if isinstance(value, tuple) else [[np.asarray(value)]]
    return [leaf for part in parts for leaf in part]


def _same_draws(module: Any, policy: Policy) -> None:
    """Exploring draws have the moments of RLlib's exploration distribution."""
    observations = batch_of(OBSERVATION, 1).repeat(4000, 0)
    drawn = policy.act(observations, explore=True, rng=np.random.default_rng(0))
    if policy.algo == "DQN" or isinstance(drawn, dict):
        return
    out = module.forward_inference({Columns.OBS: torch.from_numpy(observations).float()})
    kind = module.get_exploration_action_dist_cls()
    torch.manual_seed(0)
    draws = kind.from_logits(out[Columns.ACTION_DIST_INPUTS]).sample().numpy()
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
    batch = batch_of(space, 7)
    values = iterate(batch_space(space, 7), batch)
    rows = [np.asarray(spaces.utils.flatten(space, value), np.float32) for value in values]
    np.testing.assert_array_equal(heads.flatten_batch(space, batch), np.stack(rows))
    assert rows[0].shape == (heads.flat_size(space),)


@pytest.mark.parametrize(
    ("space", "counts"),
    [
        (DISCRETE, [3]),
        (NESTED, [10, 10, 3, 2, 2]),
        (BOX, None),
        (spaces.MultiBinary(3), [2, 2, 2]),
        (spaces.Dict({"x": BOX, "y": FREE}), None),
        (spaces.Dict({"a.b": BOX, "a": spaces.Dict({"b": BOX})}), None),
    ],
    ids=str,
)
def test_head_actions_reach_every_raw_action(
    space: gym.Space[Any], counts: list[int] | None
) -> None:
    mapping = heads.ActionMap(space)
    raw = mapping.to_raw(batch_of(mapping.head, 300))
    assert all(space.contains(value) for value in iterate(batch_space(space, 300), raw))
    assert (mapping.counts is None) == (counts is None)
    if counts is not None:
        columns = np.concatenate([leaf.reshape(300, -1) for leaf in _flat(raw)], 1).T
        assert [len(np.unique(column)) for column in columns] == counts


def test_spaces_that_no_agent_can_use() -> None:
    mixed = spaces.Dict({"x": BOX, "n": DISCRETE})
    for space, message in ((mixed, "mixes continuous with discrete"), (spaces.Text(3), "text")):
        with pytest.raises(UsageError, match=message):
            heads.ActionMap(space)
    with pytest.raises(UsageError, match="cannot observe"):
        heads.flat_size(spaces.Sequence(DISCRETE))


def test_random_policy_fills_the_space() -> None:
    observations = {"x": np.zeros((50, 2)), "t": ("a",) * 50}
    policy = RandomPolicy(NESTED)
    actions = policy.act(observations, rng=np.random.default_rng(0))
    again = RandomPolicy(NESTED).act(observations, rng=np.random.default_rng(0))
    assert actions["b"][1].shape == (50, 2) and len(np.unique(actions["a"])) == 10
    np.testing.assert_array_equal(actions["a"], again["a"])


def test_an_agent_is_saved_from_one_copy_of_its_module(
    ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Remote learners send it whole each time."""
    with built(Bandit(OBSERVATION, DISCRETE), "PPO", tmp_path / "rllib") as algorithm:
        module, asked = learner_access.module_of(algorithm), []
        monkeypatch.setattr(export, "module_of", lambda each: asked.append(each) or module)
        for place in (learner_access, rllib):
            monkeypatch.setattr(place, "on_learners", None)
        export.save_agent(algorithm, (OBSERVATION, DISCRETE), tmp_path / "agent")
        expected = learner_access.weights_of(learner_access.learner_of(algorithm))
    assert asked == [algorithm]
    saved = load_file(tmp_path / "agent" / TRAINING_STATE)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())


def test_a_folder_without_a_policy(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no policy"):
        Policy.load(tmp_path)


def test_torch_export_gives_the_networks_outputs(ray_local: None, tmp_path: Path) -> None:
    with built(Bandit(OBSERVATION, DISCRETE), "DQN", tmp_path / "rllib") as algorithm:
        policy = rllib.export(
            algorithm, learner_access.module_of(algorithm), (OBSERVATION, DISCRETE)
        )
    policy.export_torch(tmp_path / "policy.pt2")
    observations = batch_of(OBSERVATION, 5)
    network = torch.export.load(tmp_path / "policy.pt2").module()
    outputs = network(torch.from_numpy(observations).float())
    torch.testing.assert_close(outputs, policy.outputs(observations))
