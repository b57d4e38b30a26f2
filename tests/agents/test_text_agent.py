"""Agents that act in a text world, with real RLlib."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("tokenizers")

from serve.test_text_world import TEXT, WORDS, text_world

from mesocosm.agents.config import AgentConfig
from mesocosm.agents.env import AgentEnv
from mesocosm.agents.rollout import imagined_episodes
from mesocosm.config import load
from mesocosm.errors import UsageError
from mesocosm.jobs import train_agent
from mesocosm.policies.candidates import Candidates, CandidateShape, load_source
from mesocosm.policies.scorer import CandidatePolicy
from mesocosm.policies.stored import load_policy
from mesocosm.runs import tracking
from mesocosm.serve.world_env import WorldVectorEnv
from mesocosm.store.artifacts import Storage

FUNCTION = "talk:candidates_in_a_room"
SHAPE = CandidateShape(candidates=4)
TINY = "backend=local iterations=2 num_envs=4 rollout=6 horizon=5 snapshots=1 max_candidates=4"


@pytest.fixture
def user_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """`talk` is importable."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "sample_envs"))


@pytest.fixture
def root_with_world(root: str) -> str:
    Storage(root).make("worlds", "w0", {"inputs": {"datasets": []}}, text_world().save)
    return root


def configured(root: str, *words: str) -> AgentConfig:
    keys = [f"storage.root={root}", "tracking.uri=none", "world=w0", *TINY.split(), *words]
    return load(AgentConfig, [], keys)


def run_agent(root: str, *words: str) -> Any:
    config = configured(root, "force=true", *words)
    with tracking.start("train-agent", config, quiet=True) as run:
        return train_agent.JOB.run(config, run)


@pytest.mark.integration
def test_an_imagined_environment_continues_with_the_same_bits(user_module: None) -> None:
    candidates = Candidates(load_source(FUNCTION), SHAPE)
    world = text_world()

    def play(env: AgentEnv, steps: range) -> list[Any]:
        lines = []
        for step in steps:
            rows, rewards, *_ = env.step(np.array([step, step + 1]) % 3)
            lines.append((rows.tolist(), rewards.tolist()))
        return lines

    whole, first, second = (
        AgentEnv(WorldVectorEnv(2, world, horizon=4), candidates) for _ in range(3)
    )
    whole.reset(seed=5)
    expected = play(whole, range(11))
    first.reset(seed=5)
    before = play(first, range(6))
    second.restore(first.state())
    assert before + play(second, range(6, 11)) == expected


def test_a_policy_plays_in_a_world_of_texts(user_module: None) -> None:
    torch.manual_seed(0)
    policy = CandidatePolicy("PPO", TEXT, TEXT, load_source(FUNCTION), SHAPE)
    env = WorldVectorEnv(6, text_world(), horizon=4)
    returns, lengths = imagined_episodes([policy, policy.noisy(1.0)], env, seed=1)
    again = imagined_episodes(
        [policy, policy.noisy(1.0)], WorldVectorEnv(6, text_world(), horizon=4), 1
    )
    assert lengths.max() <= 4 and np.isfinite(returns).all()
    np.testing.assert_array_equal(returns, again[0])


def test_what_a_world_does_not_list_is_refused(root_with_world: str, user_module: None) -> None:
    with pytest.raises(UsageError, match=r"must be module:function in a world, .* got 'infos'"):
        run_agent(root_with_world, "candidates=infos")
    with pytest.raises(UsageError, match=r"algo must be PPO in worlds/w0, got SAC"):
        run_agent(root_with_world, "algo=SAC")
    with pytest.raises(UsageError, match="got candidates=null; set candidates=infos or"):
        run_agent(root_with_world)


@pytest.mark.parametrize(
    ("figures", "passes"),
    [
        ({"pearson": 0.95, "regret": 0.01, "policies": 15, "firm": 1.0}, True),
        ({"pearson": 0.95, "regret": 0.01, "policies": 15, "firm": 0.0}, False),
        ({"pearson": 0.95, "regret": 0.01, "policies": 14, "firm": 1.0}, False),
        ({"pearson": 0.85, "regret": 0.01, "policies": 20, "firm": 1.0}, False),
        ({"pearson": 0.95, "regret": 0.06, "policies": 20, "firm": 1.0}, False),
        ({"policies": 20}, False),
    ],
)
def test_agents_train_in_a_text_world_that_has_passed(
    root_with_world: str, user_module: None, figures: dict[str, float], passes: bool
) -> None:
    storage, config = (
        Storage(root_with_world),
        configured(root_with_world, f"candidates={FUNCTION}"),
    )
    meta = {"figures": {f"policy_value/{name}": value for name, value in figures.items()}}
    for id, world in (("e0", "other"), ("e1", "w0")):
        good = {"pearson": 1.0, "regret": 0.0, "policies": 20, "firm": 1.0}
        other = {"figures": {f"policy_value/{name}": value for name, value in good.items()}}
        about = {"inputs": {"worlds": [world]}} | (meta if world == "w0" else other)
        storage.make("evaluations", id, about, lambda folder: None)
    if passes:
        assert train_agent.JOB.resolve(config, storage).world.id == "w0"
    else:
        with pytest.raises(UsageError, match=r"worlds/w0 must have an evaluation .* --force"):
            train_agent.JOB.resolve(config, storage)
        forced = train_agent.JOB.resolve(replace(config, force=True), storage)
        storage.make("agents", forced.id, {}, lambda folder: None)
        assert train_agent.JOB.resolve(config, storage).id == forced.id, "it is found"


@pytest.mark.integration
def test_ppo_trains_in_a_world_of_texts(
    ray_local: None, root_with_world: str, user_module: None
) -> None:
    agent = run_agent(root_with_world, f"candidates={FUNCTION}")
    policy = load_policy(agent.path)
    assert isinstance(policy, CandidatePolicy) and policy.act_one("you see a mug.") in WORDS
    assert {"greedy_return", "kept_iteration"} <= agent.meta["metrics"].keys()
    snapshot = load_policy(agent.path / "snapshots" / "0")
    pairs = zip(policy.network.parameters(), snapshot.network.parameters(), strict=True)
    assert agent.meta["metrics"]["kept_iteration"] == 0 or any(
        not torch.equal(a, b) for a, b in pairs
    )
    again = run_agent(root_with_world, f"candidates={FUNCTION}", f"init={agent.id}")
    assert again.id != agent.id and again.meta["inputs"]["agents"] == [agent.id]
