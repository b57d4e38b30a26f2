"""Agents that act in texts: the candidates of a step, the rows of the network, and its policy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Text
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from mesocosm.agents.config import AgentConfig, BaselineConfig
from mesocosm.agents.env import AgentEnv, head_spaces
from mesocosm.agents.rllib import check
from mesocosm.config import identity, load
from mesocosm.data.collecting.config import CollectConfig
from mesocosm.envs.config import RealityConfig
from mesocosm.envs.ledger import Ledger
from mesocosm.envs.make import facts_of, make_env
from mesocosm.errors import UsageError
from mesocosm.evaluate import policy_set
from mesocosm.evaluate.judge import judge, policy_identity
from mesocosm.jobs.collect import JOB as COLLECT
from mesocosm.policies import behaviours
from mesocosm.policies.behaviours import BehaviourConfig
from mesocosm.policies.candidates import (
    FEATURES,
    CandidateEpisodes,
    Candidates,
    CandidateShape,
    load_source,
)
from mesocosm.policies.scorer import CandidatePolicy, CandidateScorer
from mesocosm.policies.stored import load_policy
from mesocosm.store.artifacts import Storage

EASY = RealityConfig(env="mesocosm.envs.text:ChoresEasy-v0", success="info.success")
FUNCTION = "mesocosm.envs.text.household_text:candidates"
SHAPE = CandidateShape(candidates=8)
WORDS = Text(400, charset="abcdefghijklmnopqrstuvwxyzYA .,0")


def actions() -> Any:
    return facts_of(EASY).action_space


def episodes(name: str = FUNCTION, num_envs: int = 1) -> CandidateEpisodes:
    return CandidateEpisodes(load_source(name), SHAPE, actions(), num_envs)


def policy(name: str = FUNCTION) -> CandidatePolicy:
    torch.manual_seed(0)
    made = CandidatePolicy("PPO", *facts_of(EASY).spaces, load_source(name), SHAPE)
    made.network = CandidateScorer(SHAPE)
    return made


def parts(rows: np.ndarray) -> tuple[Any, Any, Any, Any]:
    """(ids of the texts, ids of the candidates [B, K, L], their features, the mask)"""
    texts = sum(SHAPE.parts.values())
    most, words = SHAPE.candidates, SHAPE.words
    edges = np.cumsum([texts, most * words, most * FEATURES])
    ids, commands, features, mask = np.split(rows, edges, axis=1)
    return (ids, commands.reshape(-1, most, words), features.reshape(-1, most, FEATURES), mask)


def test_a_row_has_padded_ids_of_each_candidate_and_a_mask() -> None:
    memory, env = episodes(), make_env(EASY)
    text, info = env.reset(seed=0)
    rows = memory.observe([text])
    assert rows.shape == (1, SHAPE.width) and rows.dtype == np.float32
    ids, commands, features, mask = parts(rows)
    count = len(info["admissible_commands"])
    assert memory.commands[0] == info["admissible_commands"]
    np.testing.assert_array_equal(mask[0], [1.0] * count + [0.0] * (SHAPE.candidates - count))
    assert (commands[0, :count, 0] > 0).all() and not commands[0, count:].any()
    assert not features[0, count:].any()
    assert 0 < (ids > 0).mean() < 1 and ids.max() <= SHAPE.buckets
    command = memory.take(np.array([1]))[0]
    assert command == info["admissible_commands"][1]
    history = slice(ids.shape[1] - SHAPE.history, ids.shape[1])
    assert not ids[0, history].any()
    later = parts(memory.observe([env.step(command)[0]]))[0]
    assert later[0, history].any(), "the commands so far are read"
    memory.restart(np.array([True]))
    np.testing.assert_array_equal(memory.observe([text]), rows)


def test_a_function_and_the_infos_of_reality_list_the_same() -> None:
    by_text, by_info, env = episodes(), episodes("infos"), make_env(EASY)
    text, info = env.reset(seed=3)
    for _ in range(6):
        listed = np.array([None], object)
        listed[0] = info["admissible_commands"]
        np.testing.assert_array_equal(by_text.observe([text]), by_info.observe([text], listed))
        command = by_text.take(np.array([0]))[0]
        assert by_info.take(np.array([0]))[0] == command
        text, *_, info = env.step(command)
    with pytest.raises(UsageError, match=r"candidates=infos needs info\['admissible_commands'\]"):
        episodes("infos").observe([text])


def test_an_action_that_is_no_candidate_is_refused() -> None:
    memory, env = episodes(), make_env(EASY)
    memory.observe([env.reset(seed=0)[0]])
    count = len(memory.commands[0])
    for number in (count, -1):
        with pytest.raises(UsageError, match=rf"one of the {count} candidates, got {number}"):
            memory.take(np.array([number]))
    with pytest.raises(UsageError, match=r"must be one of the candidates .* got 'dance'"):
        memory.number_of(0, "dance")
    assert memory.number_of(0, memory.commands[0][1]) == 1


def test_a_text_that_shows_nothing_to_do_still_gives_an_action() -> None:
    memory = episodes()
    memory.observe(["Nonsense."])
    assert len(memory.commands[0]) == 1 and actions().contains(memory.take(np.array([0]))[0])


def test_candidates_beyond_the_most_and_outside_the_space_are_left_out() -> None:
    source = load_source("infos")
    memory = CandidateEpisodes(source, SHAPE, WORDS, 1)
    listed = [["x" * 500, "ä", *(f"go to {word}" for word in "abcdefghijkl"), "go to a"]]
    memory.observe(["A text."], listed)
    assert memory.commands[0] == [f"go to {word}" for word in "abcdefgh"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text", "candidates must be infos or module:function, got 'text'"),
        ("os:system", "must begin with 'candidates'"),
        ("mesocosm.envs.text.household_text:candidates_of", "has no function 'candidates_of'"),
        ("no_such_module:candidates", "no module 'no_such_module'"),
    ],
)
def test_a_source_that_cannot_be_used_is_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_source(name)


def test_settings_that_do_not_fit_candidates_are_refused() -> None:
    with pytest.raises(UsageError, match="algo must be PPO with candidates, got 'SAC'"):
        check(AgentConfig(algo="SAC", candidates=FUNCTION))
    with pytest.raises(UsageError, match="max_candidates must be >= 2, got 1"):
        check(BaselineConfig(candidates=FUNCTION, max_candidates=1))
    with pytest.raises(UsageError, match=r"model must be \{\} with candidates"):
        check(AgentConfig(candidates=FUNCTION, model={"fcnet_hiddens": [8]}))
    with pytest.raises(UsageError, match="got candidates=null; set candidates=infos or"):
        head_spaces((WORDS, WORDS), None)
    box = Box(0, 1, (2,), np.float32)
    with pytest.raises(UsageError, match=r"candidates must be null unless .* observation space"):
        head_spaces((box, WORDS), Candidates(load_source("infos"), SHAPE))


def test_agents_without_candidates_keep_their_ids() -> None:
    for config in (AgentConfig, BaselineConfig):
        assert not {"candidates", "max_candidates"} & identity(config()).keys()
        assert identity(config(candidates=FUNCTION))["candidates"] == FUNCTION


def test_rows_act_as_they_would_alone() -> None:
    together, alone = policy(), [policy() for _ in range(5)]
    envs = [make_env(EASY) for _ in alone]
    texts = tuple(env.reset(seed=seed)[0] for seed, env in enumerate(envs))
    together.reset(5)
    for _ in range(6):
        commands = together.act(texts)
        assert commands == tuple(p.act_one(t) for p, t in zip(alone, texts, strict=True))
        texts = tuple(env.step(c)[0] for env, c in zip(envs, commands, strict=True))
    firsts = tuple(env.reset(seed=9)[0] for env in envs[:2])
    together.restart([True, True, False, False, False])
    assert together.act((*firsts, *texts[2:]))[:2] == (policy().act_one(firsts[0]),) * 2


def test_a_saved_policy_acts_alike(tmp_path: Path) -> None:
    made = policy()
    made.save(tmp_path)
    loaded = load_policy(tmp_path)
    assert isinstance(loaded, CandidatePolicy) and loaded.source.name == FUNCTION
    texts = tuple(make_env(EASY).reset(seed=seed)[0] for seed in range(20))
    assert loaded.act(texts) == made.act(texts)
    rng = np.random.default_rng
    assert loaded.act(texts, True, rng(0)) == made.act(texts, True, rng(0)) != made.act(texts)
    assert policy_identity(loaded) == policy_identity(made) != policy_identity(made.noisy(0.5))
    others = (policy("infos"), policy())
    others[1].shape = replace(SHAPE, words=12)
    for other in others:
        other.network = loaded.network
        assert policy_identity(other) != policy_identity(loaded), "the weights alone are the same"


def test_noise_draws_candidates() -> None:
    noisy = policy().noisy(1.0)
    text, info = make_env(EASY).reset(seed=1)
    texts, rng = (text,) * 60, np.random.default_rng(0)
    assert set(noisy.act(texts, rng=rng)) == set(info["admissible_commands"])
    assert len(set(policy().act(texts))) == 1
    assert noisy.random_action(text, rng) in info["admissible_commands"]


def test_it_is_judged_collects_and_is_graded(root: str) -> None:
    storage = Storage(root)
    names = {"aa01": FUNCTION, "aa02": "infos"}
    for name, source in names.items():
        storage.make("agents", name, {"inputs": {}, "config": {}}, policy(source).save)
    returns = []
    for name in names:
        loaded = load_policy(storage.artifact("agents", name).path)
        for again in range(2):
            ledger = Ledger(storage, f"{name}{again}")
            returns.append(judge(loaded, EASY, ledger, episodes=3, seed=0).returns)
    assert len(set(returns)) == 1, "candidates of the text, of infos, and judged again"
    spaces = facts_of(EASY).spaces
    for kind in ("trained", "noisy"):
        config = BehaviourConfig(kind, policy="agents/aa02", noise=0.5)
        act = behaviours.build(config, *spaces, storage)
        rng = np.random.default_rng(0)
        text, info = make_env(EASY).reset(seed=0)
        act.start(0, rng)  # type: ignore[attr-defined]
        act.read_info(info)  # type: ignore[attr-defined]
        assert act(text, rng) in info["admissible_commands"]
    named = policy_set.named(BehaviourConfig("noisy", policy="agents/aa01"), storage, *spaces)
    assert isinstance(named.policy, CandidatePolicy) and named.policy.noise == 0.1
    (agent,) = policy_set.snapshots(storage.artifact("agents", "aa01"), storage)
    assert isinstance(policy_set.graded(agent.policy, spaces[1], 0.3).policy, CandidatePolicy)


def test_candidates_of_other_code_collect_another_dataset(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "my_commands.py"
    file.write_text("def candidates(first, text):\n    return ['look']\n")
    storage = Storage(root)
    made = policy("my_commands:candidates")
    storage.make("agents", "cc01", {"inputs": {}, "config": {}}, made.save)
    words = ["reality.env=mesocosm.envs.text:ChoresEasy-v0", "steps=10", f"storage.root={root}"]
    words.append("behaviours=[{kind: trained, policy: cc01}]")
    ids = []
    for commands in ("['look']", "['look', 'go to table']"):
        file.write_text(f"def candidates(first, text):\n    return {commands}\n")
        ids.append(COLLECT.resolve(load(CollectConfig, [], words), storage).id)
    assert ids[0] != ids[1]


def test_the_environment_of_rllib_forgets_where_episodes_end() -> None:
    mode = AutoresetMode.NEXT_STEP
    vector = SyncVectorEnv([lambda: make_env(EASY)] * 3, autoreset_mode=mode)
    env = AgentEnv(vector, Candidates(load_source("infos"), SHAPE))
    assert env.single_action_space == gymnasium.spaces.Discrete(SHAPE.candidates)
    rows, _ = env.reset(seed=0)
    assert env.observation_space.contains(rows) and rows.shape == (3, SHAPE.width)
    history = sum(SHAPE.parts.values()) - SHAPE.history
    for step in range(42):
        rows, _, terminated, truncated, _ = env.step(np.zeros(3, np.int64))
        begun = step % 21 == 20
        assert rows[:, history].astype(bool).tolist() == [not begun] * 3
        assert not terminated.any() and truncated.all() == (step % 21 == 19)
    assert env.statistics().lengths == [20] * 6
