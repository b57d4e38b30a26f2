"""The job `clone`: an agent that chooses as the best logged episodes did."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from safetensors.torch import load_file

from mesocosm.agents.choice import replace_policy
from mesocosm.agents.cloning import CloneConfig, logged_choices
from mesocosm.agents.config import AgentConfig
from mesocosm.agents.rllib import check_agent, check_init
from mesocosm.agents.settings import imagined
from mesocosm.config import load
from mesocosm.data.collecting.config import CollectConfig
from mesocosm.datasets.dataset import Dataset
from mesocosm.envs.config import RealityConfig
from mesocosm.envs.ledger import Ledger
from mesocosm.envs.make import facts_of
from mesocosm.errors import UsageError
from mesocosm.evaluate.judge import judge
from mesocosm.jobs.clone import JOB
from mesocosm.jobs.collect import JOB as COLLECT
from mesocosm.jobs.import_logs import JOB as IMPORT
from mesocosm.jobs.import_logs import ImportConfig
from mesocosm.policies.candidates import Candidates, CandidateShape, load_source
from mesocosm.policies.policy import TRAINING_STATE
from mesocosm.policies.scorer import CandidatePolicy
from mesocosm.policies.stored import load_policy
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Artifact, Storage

EASY = "mesocosm.envs.text:ChoresEasy-v0"
FUNCTION = "mesocosm.envs.text.household_text:candidates"
EXPERT = "{kind: noisy, noise: 0.3, function: 'mesocosm.envs.text.chores_policies:ChoresExpert'}"
RANDOM = "{kind: noisy, noise: 1.0, function: 'mesocosm.envs.text.chores_policies:ChoresExpert'}"


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """700 steps of an expert with noise, and of random commands."""
    root = tmp_path_factory.mktemp("clone")
    words = [f"reality.env={EASY}", "steps=700", f"behaviours=[{EXPERT}, {RANDOM}]", "workers=0"]
    config = load(CollectConfig, [], [f"storage.root={root}", *words])
    with tracking.start("collect", config, quiet=True) as run:
        return COLLECT.run(config, run)


def root_of(artifact: Artifact) -> str:
    return str(artifact.path.parent.parent)


def run_clone(logs: Artifact, *words: str) -> Artifact:
    where = [f"storage.root={root_of(logs)}", f"datasets=[{logs.id}]", "max_candidates=8"]
    config = load(CloneConfig, [], [*where, *words])
    with tracking.start("clone", config, quiet=True) as run:
        return JOB.run(config, run)


@pytest.mark.integration
def test_the_best_episodes_are_cloned_and_act(logs: Artifact, golden: Any) -> None:
    words = (f"candidates={FUNCTION}", "share=0.5", "steps=150")
    agent = run_clone(logs, *words)
    metrics = agent.meta["metrics"]
    golden.check("clone", {name: int(metrics[name]) for name in ("choices", "others")})
    assert metrics["accuracy"] > 0.55, "guessing gets a third"
    assert metrics["others"] > 0, "a tenth of random commands are no candidates"
    assert agent.meta["inputs"] == {"datasets": [logs.id]}
    policy = load_policy(agent.path)
    assert isinstance(policy, CandidatePolicy) and policy.algo == "clone"
    reality = RealityConfig(env=EASY)
    judged = judge(policy, reality, Ledger(Storage(root_of(logs)), "j"), episodes=10, seed=0)
    assert judged.mean > 0.25, "random commands earn .14"
    assert run_clone(logs, *words).id == agent.id


def test_ppo_in_a_world_starts_from_a_clone(logs: Artifact, golden: Any) -> None:
    agent = run_clone(logs, f"candidates={FUNCTION}", "steps=1")
    setup = imagined(AgentConfig(candidates=FUNCTION, max_candidates=8))
    module = check_agent(setup, facts_of(RealityConfig(env=EASY)).spaces)
    check_init(module, agent.path, agent.name)
    weights = load_file(agent.path / TRAINING_STATE)
    module.load_state_dict(weights)
    last = weights["scorer.score.2.weight"].tolist()
    golden.check("clone", {"last layer after one update": golden.of_numbers(last)})


@pytest.mark.integration
def test_a_clone_is_judged_in_the_logs_own_environment(
    logs: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    """One command; the same one finds the agent, and shows its table again."""
    words = (f"candidates={FUNCTION}", "share=0.5", "steps=20", "episodes=5")
    agent = run_clone(logs, *words)
    metrics, rows = agent.meta["metrics"], agent.meta["rows"]
    assert [row[0] for row in rows] == ["logs", "the best 0.5 of them", "agent, in reality"]
    assert [row[2] for row in rows[:2]] != ["", ""] and rows[2][2] == f"{metrics['return']:.2f}"
    assert " to " in rows[2][3] and 5 <= metrics["real_steps"] <= 100
    storage = Storage(root_of(logs))
    assert Ledger(storage, agent.id).totals().purposes["judge"].steps == metrics["real_steps"]
    assert not storage.list("runs/episodes")
    other = run_clone(logs, *words[:3], "reality.budget.steps=9", "episodes=5")
    assert other.id == agent.id, "the budget changes no result"
    plain = run_clone(logs, *words[:3])
    assert plain.id != agent.id and "return" not in plain.meta["metrics"]
    config = load(
        CloneConfig, [], [f"storage.root={root_of(logs)}", f"datasets=[{logs.id}]", *words]
    )
    summary = JOB.plan(config)
    assert summary["judged episodes"] == 5 and summary["judged real steps"] == "at most 100"
    with tracking.start("clone", replace(config, max_candidates=8)) as run:
        assert JOB.run(replace(config, max_candidates=8), run).id == agent.id
    assert "agent, in reality" in capsys.readouterr().err


def test_the_system_prompt_of_chats_is_no_option_of_the_environment(tmp_path: Path) -> None:
    """Logs of chats have it as a task, which reality need not draw."""
    env, lines = gymnasium.make(EASY), []
    for seed in range(4):
        text, info = env.reset(seed=seed)
        messages = [dict(role="system", content="Obey."), dict(role="user", content=text)]
        for _ in range(4):
            command = info["admissible_commands"][-1]
            text, reward, *_, info = env.step(command)
            messages.append(dict(role="assistant", content=command))
            messages.append(dict(role="user", content=text, reward=reward))
        lines.append(json.dumps(dict(messages=messages, truncated=True)) + "\n")
    (tmp_path / "chats.jsonl").write_text("".join(lines))
    keys = [f"paths=[{tmp_path}/chats.jsonl]", f"reality.env={EASY}", f"storage.root={tmp_path}"]
    config = load(ImportConfig, [], keys)
    with tracking.start("import", config, quiet=True) as run:
        logs = IMPORT.run(config, run)
    assert [option.name for option in Dataset([logs.path]).options] == ["system"]
    words = [f"storage.root={tmp_path}", f"datasets=[{logs.id}]", f"candidates={FUNCTION}"]
    plan = JOB.resolve(load(CloneConfig, [], [*words, "episodes=2"]), Storage(str(tmp_path)))
    assert plan.config.reality.env == EASY and plan.config.reality.task == []


def test_only_the_share_with_the_highest_returns_is_read(logs: Artifact) -> None:
    dataset = Dataset([logs.path])
    candidates = Candidates(load_source(FUNCTION), CandidateShape(candidates=8))
    best, whole = (logged_choices(dataset, candidates, "train", share) for share in (0.3, 1.0))
    numbers = dataset.episodes("train")
    assert whole.episodes == len(numbers) and best.episodes == -(-3 * len(numbers) // 10)
    assert 0 < len(best.rows) < len(whole.rows)
    assert whole.others + len(whole.rows) == int(dataset.table["length"][numbers].sum())
    assert int(whole.chosen.max()) < 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "candidates must be module:function with logs of texts, got None"),
        (["candidates=infos"], "got infos; logs hold no infos"),
        (["candidates=nowhere:candidates"], "no module 'nowhere'"),
        ([f"candidates={FUNCTION}", "share=0"], r"share must be in \(0, 1\], got 0"),
        ([f"candidates={FUNCTION}", "datasets=[]"], "datasets must name at least one dataset"),
        ([f"candidates={FUNCTION}", "episodes=1"], "episodes must be 0 or >= 2, got 1"),
        (
            [f"candidates={FUNCTION}", "reality.env=CartPole-v1"],
            "episodes must be >= 2 with reality, got 0",
        ),
        (
            [f"candidates={FUNCTION}", "episodes=2", "reality.env=CartPole-v1"],
            "observation_space must be that of reality.env='CartPole-v1'",
        ),
        (
            ["candidates=mesocosm.envs.text.company_text:candidates"],
            r"lists none of the .* actions of the best episodes",
        ),
    ],
)
def test_a_clone_that_cannot_be_made_is_refused(
    logs: Artifact, words: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run_clone(logs, *words)


LEAN = """
import numpy as np

def lean(observation, rng):
    return np.clip(np.array([8.0 * observation[1] + 1.5 * observation[3]]), -3, 3)
"""


@pytest.mark.integration
@pytest.mark.parametrize(
    ("env", "function", "horizon", "least"),
    [
        ("mesocosm.envs.items:Items", "mesocosm.envs.items:expert", 20, 0.7),
        ("InvertedPendulum-v5", LEAN, 60, 15),
    ],
)
def test_an_expert_in_a_table_and_one_in_numbers_are_cloned(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    env: str,
    function: str,
    horizon: int,
    least: float,
) -> None:
    """PPO in a world may start from the clone."""
    if function == LEAN:
        (tmp_path / "lean_expert.py").write_text(LEAN)
        monkeypatch.syspath_prepend(tmp_path)
        function = "lean_expert:lean"
    root = [f"storage.root={tmp_path}", f"reality.env={env}", f"reality.horizon={horizon}"]
    behaviour = f"behaviours=[{{kind: scripted, function: '{function}'}}]"
    collection = load(CollectConfig, [], [*root, "steps=600", behaviour, "workers=0"])
    with tracking.start("collect", collection, quiet=True) as run:
        logs = COLLECT.run(collection, run)
    words = [*root, f"datasets=[{logs.id}]", "share=1", "lr=3e-3", "steps=150", "episodes=8"]
    config = load(CloneConfig, [], words)
    with tracking.start("clone", config, quiet=True) as run:
        agent = JOB.run(config, run)
    metrics = agent.meta["metrics"]
    assert metrics["return"] > least and metrics["valid_loss"] < 2.0
    module = check_agent(
        replace(imagined(AgentConfig()), spaces=(spaces := facts_of(config.reality).spaces)), spaces
    )
    check_init(module, agent.path, agent.name)
    module.load_state_dict(load_file(agent.path / TRAINING_STATE))


def test_a_kept_clone_has_no_value_function_of_the_policy_it_replaces(tmp_path: Path) -> None:
    """A planner would value the ends of its plans by that of another policy."""
    trained, clone = tmp_path / "trained", tmp_path / "clone"
    for folder, names in ((trained, ("policy.json", "value.json")), (clone, ("policy.json",))):
        folder.mkdir()
        for name in names:
            (folder / name).write_text(folder.name)
    replace_policy(trained, clone)
    assert {path.name: path.read_text() for path in trained.iterdir()} == {"policy.json": "clone"}


def test_numbers_have_no_commands(cart_root: Any, tmp_path: Any) -> None:
    root = cart_root(tmp_path)
    words = [f"storage.root={root}", "datasets=[cart]", f"candidates={FUNCTION}"]
    config = load(CloneConfig, [], words)
    with pytest.raises(UsageError, match="unless observations and actions are texts"):
        JOB.resolve(config, Storage(root))
