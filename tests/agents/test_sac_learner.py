"""SAC on columns: the replay buffer, the losses, and what an export keeps."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from gymnasium import spaces
from ray import cloudpickle
from ray.rllib.algorithms.sac import SACConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

from mesocosm.agents import mbpo
from mesocosm.agents.config import AgentConfig
from mesocosm.agents.export import critic
from mesocosm.agents.mbpo import BranchEnv, Schedule, WorldSAC, configure
from mesocosm.agents.replay import Columns, Replay, mixed
from mesocosm.agents.sac_learner import Critics, unnormalized
from mesocosm.policies.heads import ActionMap

OBSERVATIONS = spaces.Box(-np.inf, np.inf, (2,), np.float32)


def rows(first: int, count: int) -> Columns:
    """Transitions whose columns all hold their own number."""
    number = torch.arange(first, first + count, dtype=torch.float32)
    wide = number.unsqueeze(1).repeat(1, 2)
    return Columns(wide, wide[:, :1], number, wide + 1, number)


def held(replay: Replay) -> list[int]:
    return sorted(int(x) for x in replay.observations[:, 0])


def test_a_replay_buffer_holds_the_last_transitions() -> None:
    replay, added = Replay(10), 0
    for count in (3, 4, 5, 1, 25, 7):
        replay.add(rows(added, count))
        added += count
        assert held(replay) == list(range(max(0, added - 10), added))
    batch = replay.sample(500)
    assert torch.equal(batch.observation[:, 0], batch.reward)
    assert torch.equal(batch.following[:, 1], batch.reward + 1)
    assert len(batch.reward.unique()) == 10


@pytest.mark.parametrize("count", [4, 10, 13])
def test_a_restored_replay_buffer_goes_on_alike(count: int) -> None:
    replay, other = Replay(10), Replay(10)
    replay.add(rows(0, count))
    other.restore(replay.state())
    for each in (replay, other):
        each.add(rows(100, 3))
    assert held(replay) == held(other)
    torch.manual_seed(0)
    batch = replay.sample(50)
    torch.manual_seed(0)
    assert torch.equal(batch.reward, other.sample(50).reward)


def test_a_checkpoint_holds_no_empty_rows() -> None:
    replay = Replay(100_000)
    replay.add(rows(0, 10))
    assert len(pickle.dumps(replay.state())) < 5000


def test_batches_mix_real_and_imagined_transitions() -> None:
    real, imagined, empty = Replay(10), Replay(10), Replay(10)
    real.add(rows(0, 10))
    imagined.add(rows(100, 10))
    assert int((mixed(real, imagined, 0.25, 40).reward < 100).sum()) == 10
    assert (mixed(real, imagined, 0.0, 40).reward >= 100).all()
    assert (mixed(real, empty, 0.1, 40).reward < 100).all()
    assert (mixed(empty, imagined, 0.9, 40).reward >= 100).all()


def learner(actions: Any) -> Any:
    torch.manual_seed(0)
    config = SACConfig()
    config.environment(observation_space=OBSERVATIONS, action_space=actions)
    config.learners(num_learners=0)
    config.rl_module(
        model_config=DefaultModelConfig(fcnet_hiddens=[32, 32], fcnet_activation="relu")
    )
    rates = dict.fromkeys(("actor_lr", "critic_lr", "alpha_lr"), 3e-3)
    config.training(train_batch_size_per_learner=64, initial_alpha=0.02, **rates)
    configure(config)
    return config.build_learner(spaces={DEFAULT_MODULE_ID: (OBSERVATIONS, actions)})


def far_from_zero(count: int) -> torch.Tensor:
    """Observations that a network learns from only if they are normalized."""
    return torch.randn(count, 2) * torch.tensor([0.3, 50.0]) + torch.tensor([0.0, 1000.0])


@pytest.mark.integration
def test_continuous_actions_are_learned() -> None:
    """The best action is the first number of the observation; episodes last one step."""
    sac, replay = learner(spaces.Box(-1.0, 1.0, (1,), np.float32)), Replay(2000)
    observation, action = far_from_zero(2000), torch.rand(2000, 1) * 2 - 1
    reward = -(action[:, 0] - observation[:, 0]).square()
    replay.add(Columns(observation, action, reward, observation, torch.zeros(2000)))
    sac.normalize_by(replay.observations)
    metrics = sac.update_many(replay.sample, 600)
    assert set(metrics) == {"qf_loss", "qf_mean", "policy_loss", "alpha_value"}
    assert metrics["alpha_value"] != pytest.approx(0.02)
    target = sac.module[DEFAULT_MODULE_ID].target_critics.parameters()
    assert all(p.grad_fn is None for p in target), "an autograd graph grows with the updates"
    test = far_from_zero(200)
    module = sac.module[DEFAULT_MODULE_ID]
    mean = torch.tanh(module.logits(test).detach()[:, 0])
    assert (mean - test[:, 0]).abs().mean() < 0.1
    first = module.pi_encoder.net.mlp[0]
    folded = unnormalized(first, module)
    expected = first((test - module.mean) / module.scale)
    assert torch.allclose(test @ folded["weight"].T + folded["bias"], expected, atol=1e-3)


@pytest.mark.integration
def test_discrete_actions_are_learned_over_two_steps() -> None:
    """Only the first action decides the reward of the second step: Q must bootstrap."""
    sac, replay = learner(spaces.Discrete(3)), Replay(3000)
    first = torch.cat((torch.randn(1500, 1), torch.full((1500, 1), 0.0)), 1)
    action = torch.randint(3, (1500,))
    best = (first[:, 0] > 0).long()
    second = torch.stack(((action == best).float(), torch.ones(1500)), 1)
    zero = torch.zeros(1500)
    replay.add(Columns(first, action, zero, second, torch.full((1500,), 0.9)))
    replay.add(Columns(second, torch.randint(3, (1500,)), second[:, 0], second, zero))
    sac.update_many(replay.sample, 600)
    test = torch.cat((torch.randn(300, 1), torch.zeros(300, 1)), 1)
    chosen = sac.module[DEFAULT_MODULE_ID].logits(test).argmax(1)
    assert (chosen == (test[:, 0] > 0).long()).float().mean() > 0.95


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(4, start=-1),
        spaces.MultiDiscrete([3, 2]),
        spaces.MultiBinary(3),
        spaces.Box(np.array([-2.0, 0.0]), np.array([2.0, 5.0]), dtype=np.float64),
        spaces.Box(-np.inf, np.inf, (2,), np.float32),
        spaces.Dict({"a": spaces.Box(-1, 3, (2, 2)), "b": spaces.Box(0, 1, (1,))}),
    ],
)
def test_logged_actions_become_head_actions(space: Any) -> None:
    space.seed(0)
    actions = ActionMap(space)
    batch = actions.to_raw(
        np.stack([actions.head.sample() for _ in range(5)])
        if not isinstance(actions.head, spaces.Discrete)
        else np.array([actions.head.sample() for _ in range(5)])
    )
    head = actions.to_head(batch)
    assert all(row in actions.head for row in head)
    again = actions.to_raw(head)
    flat = [batch, again] if not isinstance(batch, dict) else [*batch.values(), *again.values()]
    for x, y in zip(flat[: len(flat) // 2], flat[len(flat) // 2 :], strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


class Unstable:
    """Two environments; the second is truncated at each step, because it diverges or because the
    members disagree. The first has a negative duration.
    """

    def __init__(self, diverges: bool):
        self.diverges = diverges

    horizon, num_envs = None, 2
    single_observation_space, single_action_space = OBSERVATIONS, spaces.Discrete(3)

    def close(self) -> None:
        pass

    def reset(self, seed: int) -> Any:
        return np.zeros((2, 2), np.float32), {}

    def step(self, action: Any) -> Any:
        no, second = np.zeros(2, np.bool_), np.array([False, True])
        last = {"disagreement": np.array([0.0, 3.0]), "diverged": second & self.diverges}
        last["duration"] = np.array([0.0, 2.0])
        infos = {"disagreement": np.array([1.0, 0.0]), "diverged": no, "final_info": last}
        infos["duration"] = np.array([-4.0, 0.0])
        infos["final_obs"] = np.array([None, np.full(2, 7.0, np.float32)], object)
        return np.zeros((2, 2), np.float32), np.ones(2), no, second, infos


def test_branches_report_divergence_and_never_multiply_values() -> None:
    env = BranchEnv(cast(Any, Unstable(diverges=True)), 0.9)
    module: Any = SimpleNamespace(discrete=True, logits=lambda observation: torch.zeros(2, 3))
    columns = env.imagine(module, 3, seed=0)
    assert columns.discount.tolist() == [1.0, 1.0, 1.0], "only the first environment's steps"
    statistics = env.statistics()
    assert (statistics.steps, statistics.diverged, statistics.disagreement) == (6, 3, 12.0)
    assert statistics.mean_disagreement() == {"disagreement": 2.0}


def test_a_branch_cut_by_disagreement_keeps_its_last_value() -> None:
    env = BranchEnv(cast(Any, Unstable(diverges=False)), 0.9)
    module: Any = SimpleNamespace(discrete=True, logits=lambda observation: torch.zeros(2, 3))
    columns = env.imagine(module, 1, seed=0)
    assert columns.following.tolist() == [[0.0, 0.0], [7.0, 7.0]], "and not the next start"
    assert columns.discount.tolist() == pytest.approx([1.0, 0.81])
    assert env.statistics().diverged == 0


def test_runners_do_not_receive_the_real_transitions() -> None:
    real = Replay(100_000)
    real.add(rows(0, 100_000))
    sizes: list[int] = []

    def foreach_env_runner(function: Any) -> list[Any]:
        sizes.append(len(cloudpickle.dumps(function)))
        return []

    algorithm: Any = SimpleNamespace(
        schedule=Schedule(branch=5, branches=2, updates=1, real_share=0.1, real=real),
        env_runner_group=SimpleNamespace(
            sync_weights=lambda **_: None, foreach_env_runner=foreach_env_runner
        ),
        learner_group=SimpleNamespace(_learner=SimpleNamespace(update_many=lambda *_: {})),
        metrics=SimpleNamespace(),
    )
    WorldSAC.training_step(algorithm)
    assert len(sizes) == 2 and max(sizes) < 10_000


@pytest.mark.parametrize(("objective", "share"), [("return", 0.1), ("disagreement", 0.0)])
def test_an_adversary_learns_no_logged_rewards(
    objective: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Replay(10)
    real.add(rows(0, 10))
    monkeypatch.setattr(mbpo, "logged", lambda data, gamma: real)
    algorithm: Any = WorldSAC.__new__(WorldSAC)
    algorithm.learner_group = SimpleNamespace(
        _learner=SimpleNamespace(normalize_by=lambda observations: None)
    )
    monkeypatch.setattr(mbpo, "_transitions", lambda data: [10])
    data: Any = SimpleNamespace(ids=["d"])
    mbpo.prepare(algorithm, AgentConfig(algo="SAC", objective=objective), data)
    assert algorithm.schedule.real_share == share


def test_values_do_not_grow_away_from_the_data() -> None:
    """Those of plain MLPs are a thousand times as large for inputs a thousand times as far."""
    far = torch.randn(50, 3) * 1e3
    critics = Critics(3, [32, 32], 1, "relu")
    assert torch.allclose(critics(far), critics(far * 1e3), atol=1e-2)


@pytest.mark.parametrize("actions", [spaces.Box(-1, 1, (2,), np.float32), spaces.Discrete(3)])
def test_an_exported_critic_is_that_of_the_learner(actions: Any) -> None:
    made = learner(actions)
    made.normalize_by(torch.randn(50, 2) * 3 + 5)
    module = made.module[DEFAULT_MODULE_ID]
    with torch.no_grad():
        for scale in (*module.critics.gains, *module.critics.shifts):
            scale.normal_()
    observations = torch.randn(7, 2) * 3 + 5
    inputs, action = observations, None
    if isinstance(actions, spaces.Box):
        action = torch.rand(7, 2) * 2 - 1
        inputs = torch.cat((observations, action), -1)
    expected = module.values(observations, action, target=False)
    exported = torch.stack([critic(module, i)(inputs) for i in range(2)])
    torch.testing.assert_close(exported.view_as(expected), expected, atol=1e-5, rtol=1e-5)
