"""What a job could refuse later is refused before its first real step, also in a dry run."""

from __future__ import annotations

import socket
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Discrete
from safetensors.torch import save_file

from mesocosm.agents import settings
from mesocosm.agents.config import AgentConfig
from mesocosm.agents.rllib import check_agent
from mesocosm.cli.main import main
from mesocosm.config import load
from mesocosm.datasets.dataset import Environment, write_dataset
from mesocosm.datasets.episode import Episode, Outcome
from mesocosm.envs.make import EnvFacts
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.evaluate.report.report import Stage
from mesocosm.evaluate.suite import TooFewPolicies
from mesocosm.jobs import loop_preflight
from mesocosm.jobs.loop import JOB, LoopConfig, LoopPlan, _Loop
from mesocosm.jobs.loop_preflight import Ready, stage_resources
from mesocosm.jobs.pretrain import JOB as PRETRAIN
from mesocosm.jobs.pretrain import PretrainConfig
from mesocosm.policies.policy import TRAINING_STATE, Layout, Policy
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Storage

CARTPOLE = gym.make("CartPole-v1")
TINY = ["rounds=2", "collect.steps=300", "explore.steps=100", "reality.env=CartPole-v1"]
ENVS = """
import gymnasium, numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Tuple

class Base(gymnasium.Env):
    observation_space = Box(-1.0, 1.0, (2,), np.float32)
    action_space = Discrete(2)

class Mixed(Base):
    action_space = Tuple((Discrete(3), Box(-1.0, 1.0, (1,), np.float32)))

class Several(Base):
    action_space = MultiDiscrete([3, 2])

class OnlyTask(Base):
    observation_space = Dict({"goal": Box(-1.0, 1.0, (2,), np.float32)})
"""


@pytest.fixture
def envs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current directory holds environments that register no time limit."""
    (tmp_path / "preflight_envs.py").write_text(ENVS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def loop(root: str, *overrides: str) -> LoopConfig:
    return load(LoopConfig, [], [f"storage.root={root}", *TINY, *overrides])


def refused(root: str, message: str, *overrides: str) -> None:
    """`loop` and its dry run exit with status 2, and nothing is stored."""
    with pytest.raises(UsageError, match=message) as caught:
        JOB.plan(loop(root, *overrides))
    assert "\n" not in str(caught.value)
    assert not Storage(root).list("ledgers")


def logs(root: str, name: str, outcome: Outcome = "truncated", **facts: Any) -> None:
    """Store a dataset of CartPole's spaces."""
    episodes = []
    for k in range(3):
        observations = [CARTPOLE.observation_space.sample() * 0 for _ in range(9)]
        actions = [np.int64(0)] * 8
        episodes.append(Episode(k, k, "random", observations, actions, np.ones(8), outcome))
    values: dict[str, Any] = {
        "environment": Environment(id="CartPole-v1", max_episode_steps=500),
        "observation_space": CARTPOLE.observation_space,
        "action_space": CARTPOLE.action_space,
        **facts,
    }
    fill = partial(write_dataset, episodes=episodes, id=name, seed=0, valid_fraction=0.3, **values)
    Storage(root).make("datasets", name, {}, lambda folder: fill(folder) and None)


# -- what the stages of a loop refuse -----------------------------------------------------------


@pytest.mark.parametrize("options", [["--dry-run"], []])
def test_the_loop_refuses_an_action_space_before_it_pays(
    options: list[str], root: str, envs: None, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [f"storage.root={root}", *TINY, "reality.env=preflight_envs:Mixed"]
    assert main(["loop", *options, *overrides]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "mixes continuous with discrete parts" in message and message.startswith("mesocosm: ag")
    assert not Path(root, "ledgers").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("agent.algo=SAC; reality.env=preflight_envs:Several", "agent: algo=SAC needs Discrete or"),
        ("agent.algo=DQN; reality.env=Pendulum-v1", "agent: algo=DQN needs Discrete actions"),
        (
            "reality.env=mesocosm.envs.text:ChoresEasy-v0; pretrain.model.family=language;"
            " pretrain.model.size=10k; pretrain.model.members=1",
            "pretrain.model.family must be ensemble or sequence in a loop, got language",
        ),
        ("agent.params={lr: fast}", "agent: RLlib's PPO refuses its settings"),
        ("agent.model={fcnet_hiddens: 64}", "agent: RLlib's PPO refuses its settings"),
        ("agent.init=nope", "no artifact agents/nope"),
        ("agent.datasets=[nope]", "agent: no artifact datasets/nope"),
        ("agent.max_disagreement=2; pretrain.model.members=1", r"agent\.max_disagreement needs"),
        ("evaluate.adversary=2; pretrain.model.members=1", r"evaluate\.adversary needs members"),
        ("evaluate.datasets=[nope]", "evaluate: no artifact datasets/nope"),
        ("evaluate.policies=[{kind: trained, policy: nope}]", "evaluate: no artifact agents/nope"),
        (
            "evaluate.policies=[{kind: random}]; agent.snapshots=0",
            "evaluate: at most 1 policies that did not collect the data",
        ),
        ("evaluate.judge_steps=10", "evaluate: judge_steps must be >= "),
        ("explore.behaviours=[{kind: trained, policy: nope}]", "explore: no artifact agents/nope"),
        ("pretrain.data.weights=[1]", "weights must have one entry per dataset, got 1 for the 2"),
        ("pretrain.data.datasets=[a]", r"pretrain\.data\.datasets must be empty in a loop"),
        ("pretrain.data.unique=280", "unique must be at most the 270 training transitions"),
        (
            "baselines=[{algo: DQN, steps: 5000}]; reality.env=Pendulum-v1",
            r"baselines\[0\]: algo=DQN needs Discrete",
        ),
        (
            "reality.env=preflight_envs:OnlyTask; reality.task=[goal]",
            "names every key of the observation",
        ),
        ("reality.success=return > x", r"reality\.success"),
        ("reality.known.reward=nowhere:f", "known.reward='nowhere:f': there is no module"),
        (
            "reality.known.terminated=mesocosm.envs.known:cartpole_reward",
            r"reality\.known\.terminated=.* must return a bool tensor \[8\]",
        ),
        ("pretrain.known.reward=a:b", r"pretrain\.known is set by the loop; set reality\.known"),
    ],
)
def test_a_later_stage_is_checked_first(
    overrides: str, message: str, root: str, envs: None
) -> None:
    refused(root, message, *overrides.split("; "))


@pytest.mark.integration
def test_given_data_must_be_what_later_rounds_add_to(root: str) -> None:
    logs(root, "same")
    logs(root, "untimed", environment=Environment(id="CartPole-v1"))
    logs(root, "other", environment=Environment(id="CartPole-v0", max_episode_steps=500))
    JOB.plan(loop(root, "datasets=[same]"))
    refused(
        root,
        "datasets/untimed is of an environment with max_episode_steps=None",
        "datasets=[untimed]",
    )
    refused(root, "differ in environment id", "datasets=[same,other]", "rounds=1")
    refused(root, "environment with id='CartPole-v0'", "datasets=[other]")
    JOB.plan(loop(root, "datasets=[other]", "rounds=1"))


def test_an_agent_that_collects_cannot_also_be_compared(root: str) -> None:
    layers = [{"kind": "linear", "in": 4, "out": 2}]
    spaces = CARTPOLE.observation_space, CARTPOLE.action_space
    policy = Policy("PPO", *spaces, Layout("categorical", layers))
    Storage(root).make("agents", "a0", {"inputs": {}}, policy.save)
    overrides = ["evaluate.policies=[{kind: trained, policy: a0}]", "evaluate.graded=3"]
    refused(
        root,
        "evaluate: policies: agents/a0 also collects",
        *overrides,
        "explore.behaviours=[{kind: noisy, policy: a0}]",
    )


def test_an_agent_to_begin_with_must_have_the_same_network(root: str) -> None:
    spaces = CARTPOLE.observation_space, CARTPOLE.action_space
    layers = [{"kind": "linear", "in": 4, "out": 2}]

    def fill(folder: Path) -> None:
        Policy("PPO", *spaces, Layout("categorical", layers)).save(folder)
        module = check_agent(settings.imagined(AgentConfig()), spaces)
        save_file(module.state_dict(), folder / TRAINING_STATE)

    Storage(root).make("agents", "a0", {"inputs": {}}, fill)
    JOB.plan(loop(root, "agent.init=a0"))
    wide = "agent.model={fcnet_hiddens: [128, 128]}"
    refused(root, "agent: init=agents/a0 is of another network", "agent.init=a0", wide)


@pytest.mark.integration
def test_a_port_that_is_taken_is_refused_unless_the_loop_is_finished(root: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused(root, f"serve.http={port} cannot be used", f"serve.http={port}")
        loop_preflight.preflight(
            loop(root, f"serve.http={port}"), Storage(root)
        )  # what finding a loop needs


# -- the horizon --------------------------------------------------------------------------------


@pytest.mark.integration
def test_a_loop_whose_horizon_is_not_known_warns_before_its_first_step(
    root: str, envs: None
) -> None:
    overrides = ["reality.env=preflight_envs:Base", "explore.behaviours=[{kind: random}]"]
    assert "set reality.horizon" in JOB.plan(loop(root, *overrides))["horizon"]
    assert JOB.plan(loop(root, *overrides, "reality.horizon=40"))["horizon"].startswith("40 steps")
    facts = JOB.plan(loop(root))
    assert facts["horizon"] == "500 steps: time limit of the environment"


@pytest.mark.integration
def test_a_loop_infers_its_horizon_from_given_logs(root: str, envs: None) -> None:
    facts = {
        "environment": Environment(id="preflight_envs:Base"),
        "observation_space": gym.spaces.Box(-1.0, 1.0, (2,), np.float32),
        "action_space": gym.spaces.Discrete(2),
    }
    episode = Episode(0, 0, "x", [np.zeros(2, np.float32)] * 9, [0] * 8, np.ones(8), "truncated")
    fill = partial(write_dataset, episodes=[episode], id="own", seed=0, valid_fraction=0, **facts)
    Storage(root).make("datasets", "own", {}, lambda folder: fill(folder) and None)
    cfg = loop(root, "reality.env=preflight_envs:Base", "datasets=[own]", "evaluate.episodes=5")
    facts = JOB.plan(cfg)
    assert facts["horizon"].startswith("8 steps: all 1 truncated")
    stages = {row["stage"]: row for row in facts["stages"]}
    assert stages["judge agents"]["real steps"] == 80
    nothing = ["rounds=1", "reality.budget.steps=0"]
    cfg = loop(root, "reality.env=preflight_envs:Base", "datasets=[own]", *nothing)
    assert "collect" not in {row["stage"] for row in JOB.plan(cfg)["stages"]}, "nor is it priced"


@pytest.mark.integration
def test_training_judging_and_baselines_of_a_loop_have_one_horizon(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And an agent is judged though too few policies can be compared: its round was paid for."""
    logs(root, "cut", "truncated")
    logs(root, "ends", "terminated")
    cfg = loop(root, "baselines=[{}]", "evaluate.graded=1")
    horizons: dict[str, Any] = {}

    def stage(self: _Loop, job: Any, config: Any, *unused: Any, **rest: Any) -> None:
        horizons[job.name] = config.horizon if job.name == "train-agent" else config.reality.horizon
        if job.name == "evaluate":
            horizons["graded"] = [*horizons.get("graded", []), config.graded]
            if config.graded:
                raise TooFewPolicies("2 policies cannot be compared")
        if job.name == "baseline":
            raise KeyboardInterrupt

    monkeypatch.setattr(_Loop, "_stage", stage)
    monkeypatch.setattr("mesocosm.evaluate.policy_set.collected", lambda *arguments: None)
    with tracking.start("loop", cfg, quiet=True) as run:
        cases = (("cut", False, None), ("ends", False, 1000), ("ends", True, None))
        for name, timed, horizon in cases:
            horizons.clear()
            dataset = run.storage.artifact("datasets", name)
            facts = EnvFacts(Discrete(2), Discrete(2), "version", 100 if timed else None)
            ready = Ready([dataset], facts, None)
            stages = _Loop(JOB, LoopPlan(config=cfg, inputs={}, facts={}, id="", ready=ready), run)
            stages.served = True
            stages.train_agent(0, dataset, None)
            stages.evaluate(0, dataset, dataset)
            with pytest.raises(KeyboardInterrupt):
                stages.baseline(0, cfg.baselines[0])
            expected = dict.fromkeys(("train-agent", "evaluate", "baseline"), horizon)
            assert horizons == expected | {"graded": [1, 0]}
    assert "policies are not compared" in (run.folder / "log.txt").read_text()


@pytest.mark.integration
def test_what_stops_a_deployment_after_real_steps_is_a_failure(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a wrong use: those steps were paid for."""

    def deploy(config: Any) -> None:
        raise UsageError("the world is gone")

    monkeypatch.setattr("mesocosm.jobs.loop.deploy", deploy)
    logs(root, "data", "truncated")
    cfg = loop(root)
    facts = EnvFacts(Discrete(2), Discrete(2), "version", 100)
    with tracking.start("loop", cfg, quiet=True) as run:
        ready = Ready([], facts, None)
        stages = _Loop(JOB, LoopPlan(config=cfg, inputs={}, facts={}, id="", ready=ready), run)
        dataset = run.storage.artifact("datasets", "data")
        with pytest.raises(UsageError, match=r"^the world is gone"):
            stages.train_agent(0, dataset, None)
        stages.stages.append(Stage("collect", 1.0, 1))
        with pytest.raises(MesocosmError, match=r"^train-agent: the world is gone") as error:
            stages.train_agent(0, dataset, None)
        assert not isinstance(error.value, UsageError)


def test_a_loop_states_what_each_stage_needs(root: str) -> None:
    cfg = loop(root, "serve.replicas=2", "serve.device=cuda", "agent.runners=3", "agent.learners=1")
    needs = stage_resources(cfg)
    assert needs["serve.replicas with agent.runners and agent.learners=6"] == (6, 2)
    assert needs["explore.workers=1"] == (1, 0)


def test_a_pretraining_needs_its_workers(root: str) -> None:
    logs(root, "data")
    config = load(PretrainConfig, [], [f"storage.root={root}", "data.datasets=[data]"])
    config.train.workers, config.train.gpus_per_worker = 4, 1.0
    assert PRETRAIN.resources(PRETRAIN.resolve(config, Storage(root))) == {
        "train.workers=4": (4, 4.0)
    }


def test_a_baseline_refuses_an_action_space_before_it_pays(
    root: str, envs: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for options in (["--dry-run"], []):
        arguments = [f"storage.root={root}", "reality.env=preflight_envs:Mixed"]
        assert main(["baseline", *options, *arguments]) == 2
        assert "mixes continuous with discrete parts" in capsys.readouterr().err
    assert not Path(root, "ledgers").exists()
