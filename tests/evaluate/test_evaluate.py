"""The evaluate job on a real world, dataset and policy: an artifact with a report, made once, every
real step metered.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import gymnasium as gym
import numpy as np
import pytest
import torch

from mesocosm.agents.rollout import imagined_episodes
from mesocosm.config import StorageConfig, load
from mesocosm.data.loading.codec import Codec
from mesocosm.datasets.dataset import Dataset, Environment, write_dataset
from mesocosm.datasets.episode import Episode
from mesocosm.envs.config import DrawnOption, RealityConfig
from mesocosm.envs.ledger import Ledger
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.evaluate.config import EvaluateConfig, reality_of
from mesocosm.jobs.evaluate import JOB
from mesocosm.model import mup
from mesocosm.model.base import Base
from mesocosm.model.config import ModelConfig
from mesocosm.model.families import build
from mesocosm.model.world import World
from mesocosm.policies.behaviours import BehaviourConfig
from mesocosm.policies.policy import Layout, Policy
from mesocosm.runs import tracking
from mesocosm.serve.client import WorldVectorEnv
from mesocosm.store.artifacts import Storage
from mesocosm.train.prepare import transitions

from . import worlds
from .test_report import parsed


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("evaluate") / "root")


@pytest.fixture(scope="module")
def run(root: str) -> Iterator[tracking.Run]:
    with tracking.start("evaluate", EvaluateConfig(storage=StorageConfig(root)), quiet=True) as run:
        yield run


@pytest.fixture(scope="module")
def stored(root: str, tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A storage with a dataset of `Walk`, a world whose base knows the dynamics, and two policies,
    one of other spaces.
    """
    tmp_path = tmp_path_factory.mktemp("data")
    sys.modules["evaluated_module"] = worlds
    storage = Storage(root)
    data = worlds.collect(tmp_path / "walks", 20)
    storage.make(
        "datasets",
        "walks",
        {"inputs": {}, "dropped": [{"steps": 4}]},
        lambda folder: _copy(tmp_path / "walks", folder),
    )
    codec = Codec.fit(data)
    codec.environment |= {
        "id": "evaluated_module:Walk",
        "kwargs": {"limit": 12},
        "max_episode_steps": None,
    }
    config = ModelConfig(family="sequence", size="10k", members=2, base_steps=0, context=4)
    net = build(codec.spec, config)
    mup.init_(net, 0)
    world = World(
        net, Base.fit(codec.spec, config, transitions(data, codec), seed=0), codec.to_json()
    )
    storage.make("worlds", "w0", {"inputs": {"datasets": ["walks"]}}, world.save)
    for name, space in (("a0", worlds.ACTIONS), ("other", gym.spaces.Discrete(3))):
        storage.make(
            "agents", name, {"inputs": {}, "config": {"iterations": 4}}, partial(agent, space)
        )
    return storage


def agent(space: gym.Space[Any], folder: Path) -> None:
    """A policy, and a snapshot of its training that acts otherwise."""
    policy(space).save(folder)
    (folder / "snapshots" / "2").mkdir(parents=True)
    policy(space, seed=1).save(folder / "snapshots" / "2")


def slow(observation: Any, rng: Any) -> Any:
    """A scripted policy."""
    return np.array([0.1, 0.0])


def _copy(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        if path.is_file():
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(source)).write_bytes(path.read_bytes())


def policy(actions: gym.Space[Any], seed: int = 0) -> Policy:
    torch.manual_seed(seed)
    outputs = 3 if isinstance(actions, gym.spaces.Discrete) else 4
    head: Any = "categorical" if isinstance(actions, gym.spaces.Discrete) else "gaussian"
    return Policy(
        "PPO",
        worlds.OBSERVATIONS,
        actions,
        Layout(head, [{"kind": "linear", "in": 2, "out": outputs}]),
    )


def config(root: str, **kwargs: Any) -> EvaluateConfig:
    defaults: dict[str, Any] = {
        "world": "worlds/w0",
        "episodes": 5,
        "horizons": [1, 3],
        "starts": 16,
        "samples": 2,
        "storage": StorageConfig(root),
    }
    defaults["reality"] = RealityConfig(env="evaluated_module:Walk", kwargs={"limit": 12})
    return EvaluateConfig(**{**defaults, **kwargs})


def test_a_world_and_an_agent_are_evaluated_once(
    root: str, stored: Storage, run: tracking.Run
) -> None:
    cfg = config(root, agent="a0", target=1e9)
    cfg.reality.price.per_step = 0.5
    artifact = JOB.run(cfg, run)
    figures = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])
    summary = json.loads((artifact.path / "summary.json").read_text())
    assert artifact.meta["inputs"] == {"worlds": ["w0"], "agents": ["a0"], "datasets": ["walks"]}
    ledger = Ledger(stored, artifact.id).totals()
    judged = {row["purpose"]: row for row in summary["real_steps"]["purposes"]}["judge"]
    assert (
        judged["steps"] == ledger.purposes["judge"].steps == ledger.steps > 0
        and judged["price"] == judged["steps"] / 2
    )
    point = summary["curves"]["world"][0]["points"][0]
    assert len(point["returns"]) == 5 and point["mean"] == pytest.approx(
        np.mean(point["returns"])
    ) == pytest.approx(figures["return/mean"])
    assert (
        point["real_steps"] == Dataset([stored.artifact("datasets", "walks").path]).transitions + 4
    ), "dropped steps were spent, too"
    table = {row["horizon"]: row for row in summary["open_loop"][0]["table"]["rows"]}
    assert (
        set(table) == {"1", "3", "full"}
        and table["1"]["ratio"] < 0.1
        and figures["open_loop/1"] == table["1"]["ratio"]
    )
    assert len(summary["trajectories"][0]["episodes"]) == 3
    parsed((artifact.path / "report.html").read_text())
    assert JOB.run(cfg, run).id == artifact.id
    assert Ledger(stored, artifact.id).totals().steps == ledger.steps, (
        "what is finished takes no real step"
    )


def test_logs_of_one_deterministic_policy_are_named(
    root: str, stored: Storage, run: tracking.Run, tmp_path: Path
) -> None:
    """The world of such logs may ignore actions, and it promises more a step than they show."""
    episodes = []
    for k in range(30):
        walk = np.random.default_rng(k).normal(size=(11, 2)).cumsum(0)
        rewards = np.full(10, -50.0)
        episodes.append(
            Episode(k, k, "steady", list(walk), list(np.tanh(walk[:-1])), rewards, "truncated")
        )

    def write(folder: Path) -> None:
        spaces = {"observation_space": worlds.OBSERVATIONS, "action_space": worlds.ACTIONS}
        write_dataset(
            folder, episodes, id="steady", seed=0, environment=Environment(id="walk"), **spaces
        )

    def copy(folder: Path) -> None:
        _copy(stored.artifact("worlds", "w0").path, folder)
        (folder / "COMMIT.json").unlink()

    stored.make("datasets", "steady", {"inputs": {}}, write)
    stored.make("worlds", "blind", {"inputs": {"datasets": ["steady"]}}, copy)
    artifact = JOB.run(config(root, world="blind", datasets=["walks"], agent="a0"), run)
    summary = json.loads((artifact.path / "summary.json").read_text())["suite"]
    assert summary["verdicts"][5]["answer"] == "no"
    assert "action[0] (0.0% of its variance is free), action[1]" in summary["verdicts"][5]["text"]
    assert (
        "no 10 consecutive steps of the logs average more than -50"
        in summary["agent"]["unexplained"]
    )
    page = (artifact.path / "report.html").read_text()
    assert "a world that ignores it fits as well" in page and "The logs do not explain that" in page
    log = (run.folder / "log.txt").read_text()
    assert log.count("warning: in the logs the action follows") == 1
    assert log.count("warning: the agent's return") == 1


def test_policies_are_compared_and_every_real_step_of_it_is_stated(
    root: str, stored: Storage, run: tracking.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    behaviours = [
        BehaviourConfig(kind="random"),
        BehaviourConfig(kind="scripted", function=f"{__name__}:slow"),
    ]
    sys.modules.setdefault(__name__, sys.modules[slow.__module__])
    cfg = config(
        root,
        agent="a0",
        policies=behaviours,
        graded=3,
        policy_episodes=2,
        imagined=4,
        judge_steps=12 * (5 + 7 * 2),
        seed=3,
    )
    cfg.reality.success = "return >= 0"
    cfg.reality.env, cfg.reality.kwargs, cfg.reality.horizon = (
        "evaluated_module:Walk",
        {"limit": 12},
        12,
    )
    artifact = JOB.run(cfg, run)
    summary = json.loads((artifact.path / "summary.json").read_text())
    suite = summary["suite"]
    value = suite["policy_value"]
    names = [row["name"] for row in value["policies"]]
    assert names[:4] == ["random", f"scripted {__name__}:slow", "agent@2", "agent"] and [
        row["noise"] for row in value["policies"]
    ][4:6] == [2.0, 1.0]
    assert len(names) == 7 and [row["iteration"] for row in value["policies"]][2:4] == [2, 4]
    ledger = Ledger(stored, artifact.id).totals()
    assert (
        cfg.judge_steps >= ledger.purposes["judge"].steps == ledger.steps > value["real_steps"] > 0
    )
    for row in value["policies"]:
        assert (
            abs(row["gap"] - (row["world"]["mean"] - row["real"]["mean"])) < 1e-9
            and row["world"]["episodes"] == 4
        )
        assert 0 <= row["success"]["real"] <= 1 and 0 <= row["success"]["world"] <= 1
    assert [row["name"] for row in value["policies"] if not row["held_out"]] == ["random"], (
        "the walks are random"
    )
    assert value["ranking"]["policies"] == 6 and any(
        "random: this behaviour collected" in note for note in value["notes"]
    )
    away = [row["name"] for row in suite["off_policy"]["behaviours"]]
    assert set(away) >= {"random", "agent"} and len(set(away)) == len(away), "none twice"
    assert [row["name"] for row in suite["off_policy"]["behaviours"] if row["logged"]] == ["random"]
    assert set(suite["agent"]["success"]) == {"real", "world"}
    assert (
        suite["verdicts"][0]["question"] == "Trust it to rank policies?"
        and suite["verdicts"][0]["answer"] != "unknown"
    )
    html = (artifact.path / "report.html").read_text()
    texts = " ".join(parsed(html).texts)
    assert (
        all(v["text"] in texts for v in suite["verdicts"])
        and "Policy values" in texts
        and "Away from the data" in texts
    )
    assert html.index("<svg") < html.index("Returns in reality"), "plots first"
    figures = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert (
        figures["policy_value/error"] == value["ranking"]["error"]
        and figures["starts/validity"] == suite["starts"]["validity"]
    )
    assert value["policies"][3]["world"]["mean"] == suite["agent"]["world"], (
        "one value of the agent, and its episodes are bought once"
    )
    assert JOB.run(replace(cfg, judge_steps=None), run).id == artifact.id, (
        "a bound is not part of what is found"
    )
    assert Ledger(stored, artifact.id).totals().steps == ledger.steps
    monkeypatch.setattr(
        sys.modules[__name__], "slow", lambda observation, rng: np.array([5.0, 7.0])
    )
    with pytest.raises(MesocosmError, match="not in the action space"):
        JOB.run(replace(cfg, seed=4), run)


def break_off(cfg: EvaluateConfig, run: tracking.Run, number: int) -> None:
    """End an evaluation at the `number`-th step of `Walk` in reality, as a signal would."""
    steps, step = itertools.count(1), worlds.Walk.step

    def breaks(env: worlds.Walk, action: Any) -> Any:
        if next(steps) == number:
            raise KeyboardInterrupt
        return step(env, action)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worlds.Walk, "step", breaks)
        with pytest.raises(KeyboardInterrupt):
            JOB.run(cfg, run)


def test_what_interrupted_attempts_spent_counts(
    root: str, stored: Storage, run: tracking.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound is of all attempts. It is asked for the episodes that are not stored yet."""
    cfg = config(root, agent="a0", seed=7, judge_steps=60)
    cfg.reality.env, cfg.reality.kwargs, cfg.reality.horizon = (
        "evaluated_module:Walk",
        {"limit": 12},
        12,
    )
    cfg.reality.success = "return >= 0"
    before = set(stored.list("ledgers"))
    break_off(cfg, run, 20)
    (id,) = set(stored.list("ledgers")) - before
    totals = Ledger(stored, id).totals().purposes["judge"]
    assert (totals.steps, totals.unconfirmed_steps) == (20, 8), "the interrupted episode was paid"
    assert len(stored.files(f"runs/episodes/{id}")) == 1
    with pytest.raises(
        UsageError, match=r"judge_steps=60: .* spent 20, and this one may take 48; raise it to 68"
    ):
        JOB.run(cfg, run)
    assert Ledger(stored, id).totals().steps == 20
    cfg.judge_steps = 68
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            "mesocosm.evaluate.suite.task_distribution", Mock(side_effect=KeyboardInterrupt)
        )
        JOB.run(cfg, run)
    spent = Ledger(stored, id).totals().steps
    assert 20 < spent <= 68 and len(stored.files(f"runs/episodes/{id}")) == 5
    artifact = JOB.run(cfg, run)
    assert artifact.id == id and Ledger(stored, id).totals().steps == spent
    assert "goes on after 5 judged episodes" in (run.folder / "log.txt").read_text()
    assert stored.list(f"runs/episodes/{id}") == []
    success = json.loads((artifact.path / "summary.json").read_text())["suite"]["agent"]["success"]
    assert 0 <= success["real"] <= 1 and 0 <= success["world"] <= 1, "without a comparison, too"


def test_an_interrupted_evaluation_goes_on_and_gives_the_same_result(
    root: str, stored: Storage, run: tracking.Run, tmp_path: Path
) -> None:
    """It is interrupted while it judges the agent, and again while it compares policies."""
    _copy(Path(root), tmp_path / "root")
    other = Storage(str(tmp_path / "root"))
    kinds = [
        BehaviourConfig(kind="random"),
        BehaviourConfig(kind="scripted", function=f"{__name__}:slow"),
    ]
    sys.modules.setdefault(__name__, sys.modules[slow.__module__])

    def make(root: str) -> EvaluateConfig:
        cfg = config(
            root,
            agent="a0",
            policies=kinds,
            graded=1,
            policy_episodes=3,
            imagined=2,
            seed=5,
            episodes=2,
        )
        cfg.horizons, cfg.full, cfg.starts = [1], False, 8
        cfg.reality.env, cfg.reality.kwargs, cfg.reality.horizon = (
            "evaluated_module:Walk",
            {"limit": 12},
            12,
        )
        cfg.reality.success = "return >= 0"
        return cfg

    artifact = JOB.run(make(root), run)
    whole = Ledger(stored, artifact.id).totals().purposes["judge"]
    cfg, lost = make(other.root), 0
    with tracking.start("evaluate", cfg, quiet=True) as second:
        for number in (whole.steps // 10, whole.steps // 2):
            break_off(cfg, second, number)
            totals = Ledger(other, artifact.id).totals().purposes["judge"]
            assert lost < totals.unconfirmed_steps <= lost + 12, "the episode that it was at"
            lost = totals.unconfirmed_steps
        again = JOB.run(cfg, second)
    assert again.id == artifact.id
    totals = Ledger(other, artifact.id).totals().purposes["judge"]
    assert totals.steps - totals.unconfirmed_steps == whole.steps and whole.unconfirmed_steps == 0
    assert totals.unconfirmed_steps == lost
    summaries = [json.loads((made.path / "summary.json").read_text()) for made in (artifact, again)]
    judged = [
        {row["purpose"]: row for row in summary.pop("real_steps")["purposes"]}["judge"]
        for summary in summaries
    ]
    assert judged[1]["steps"] - judged[0]["steps"] == lost
    assert summaries[1] == summaries[0]
    assert other.list(f"runs/episodes/{artifact.id}") == []


def test_a_given_ledger_is_bounded_for_this_evaluation_alone(
    root: str, stored: Storage, run: tracking.Run
) -> None:
    cfg = config(root, agent="a0", seed=8, judge_steps=60, ledger="shared")
    cfg.reality.env, cfg.reality.kwargs, cfg.reality.horizon = (
        "evaluated_module:Walk",
        {"limit": 12},
        12,
    )
    Ledger(stored, "shared").reserve("judge", 1000)
    JOB.run(cfg, run)
    assert 1000 < Ledger(stored, "shared").totals().purposes["judge"].steps <= 1060


def test_the_horizon_of_a_self_truncating_environment_comes_from_the_logs(
    root: str, stored: Storage, run: tracking.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Walk` truncates itself and registers no limit; its logged episodes are truncated at 30."""
    cfg = config(root, agent="a0", episodes=2, imagined=4, seed=11)
    cfg.reality.kwargs = {"limit": 1000}  # the policy never ends an episode by itself
    facts = JOB.plan(cfg)
    assert facts["judged real steps"] == "at most 60" and facts["horizon"].startswith("30 steps")
    horizons = []

    def imagined(policies: Any, env: WorldVectorEnv, *rest: Any) -> Any:
        horizons.append(env.horizon)
        return imagined_episodes(policies, env, *rest)

    monkeypatch.setattr("mesocosm.evaluate.suite.imagined_episodes", imagined)
    artifact = JOB.run(cfg, run)
    summary = json.loads((artifact.path / "summary.json").read_text())
    judged = {row["purpose"]: row for row in summary["real_steps"]["purposes"]}["judge"]
    assert horizons == [30] and judged["steps"] <= 60
    log = (run.folder / "log.txt").read_text()
    assert "episodes end after 30 steps" in log and "of at most 30" in log


def test_an_unknown_horizon_is_asked_for_before_a_real_step(
    root: str, stored: Storage, run: tracking.Run
) -> None:
    def fill(folder: Path) -> None:
        _copy(stored.artifact("worlds", "w0").path, folder)
        (folder / "COMMIT.json").unlink()

    stored.make("worlds", "alone", {"inputs": {"datasets": []}}, fill)
    cfg = config(root, world="alone", agent="a0", datasets=["walks"])
    before = stored.list("ledgers")
    for ask in (JOB.plan, lambda cfg: JOB.run(cfg, run)):
        with pytest.raises(UsageError, match=r"reality\.horizon must be set for worlds/alone"):
            ask(cfg)
    assert stored.list("ledgers") == before
    cfg.reality.horizon = 12
    assert JOB.plan(cfg)["judged real steps"] == "at most 60"


def test_a_task_that_the_world_has_not_seen_is_refused_before_a_real_step(
    root: str, stored: Storage
) -> None:
    def fill(folder: Path) -> None:
        _copy(stored.artifact("worlds", "w0").path, folder)
        (folder / "COMMIT.json").unlink()
        codec = json.loads((folder / "codec.json").read_text())
        codec["options"] = [{"name": "colour", "values": ["blue", "red"]}]
        (folder / "codec.json").write_text(json.dumps(codec))

    stored.make("worlds", "tasks", {"inputs": {"datasets": ["walks"]}}, fill)
    cfg = config(root, world="tasks", agent="a0")
    cfg.reality.task = ["colour"]
    cfg.reality.task_options = {"colour": DrawnOption(choices=["red", "green"])}
    with pytest.raises(UsageError, match="choices holds 'green', which the world has not seen"):
        JOB.plan(cfg)
    cfg.reality.task_options = {"colour": DrawnOption(choices=["red"])}
    assert JOB.plan(cfg)["judged episodes"] == 5


def test_a_world_alone_takes_no_real_step(root: str, stored: Storage, run: tracking.Run) -> None:
    before = stored.list("ledgers")
    summary = json.loads((JOB.run(config(root, full=False), run).path / "summary.json").read_text())
    assert stored.list("ledgers") == before
    assert (
        summary["curves"] == {"world": [], "model_free": []}
        and summary["losses"][0]["parts"]["total"] > 0
    )
    assert summary["checks"][0]["transitions"] > 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"world": ""}, "world is not set"),
        ({"world": "nope"}, "no artifact worlds/nope"),
        ({"agent": "nope"}, "no artifact agents/nope"),
        ({"datasets": ["nope"]}, "no artifact datasets/nope"),
        ({"agent": "other"}, "action_space must be .*, got Discrete"),
        ({"samples": 0}, "samples must be >= 1, got 0"),
        (
            {"agent": "a0", "judge_steps": 59},
            "judge_steps must be >= 150, .* 5 episodes of at most 30 steps may take, got 59",
        ),
        ({"graded": 3}, "graded must be 0 without an agent, got 3"),
        ({"agent": "a0", "episodes": 1}, "^episodes must be >= 2, got 1"),
        (
            {"policies": [BehaviourConfig(kind="random")], "policy_episodes": 1},
            "policy_episodes must be >= 2, got 1",
        ),
        (
            {"policies": [BehaviourConfig(kind="random")]},
            "0 policies whose data the world was not trained on cannot be compared: that takes 3",
        ),
        (
            {"agent": "a0", "reality": RealityConfig(env="CartPole-v1")},
            "reality.env='CartPole-v1' has the observation space Box.* judge it in its own",
        ),
        (
            {"policies": [BehaviourConfig(kind="trained", policy="other")]},
            "action_space must be .*, got Discrete",
        ),
        (
            {"policies": [BehaviourConfig(kind="trained", policy="a0@7")]},
            "agents/a0 has no snapshot at iteration '7'; it has 2",
        ),
        (
            {"policies": [BehaviourConfig(kind="traned")]},
            r"policies\[0\].kind must be .*, got 'traned'; did you mean 'trained'",
        ),
        ({"horizons": [0]}, "horizons must be >= 1, got"),
        ({"horizons": [], "full": False}, "horizons must not be"),
    ],
)
def test_wrong_use_is_one_sentence_before_anything_starts(
    root: str, stored: Storage, run: tracking.Run, wrong: dict[str, Any], message: str
) -> None:
    before = stored.list("ledgers"), stored.list("evaluations")
    with pytest.raises(UsageError, match=message) as caught:
        JOB.run(config(root, **wrong), run)
    assert "\n" not in str(caught.value)
    assert (stored.list("ledgers"), stored.list("evaluations")) == before


def test_a_world_runs_no_program_that_its_user_did_not_name(
    root: str, stored: Storage, run: tracking.Run, tmp_path: Path
) -> None:
    def fill(folder: Path) -> None:
        _copy(stored.artifact("worlds", "w0").path, folder)
        (folder / "COMMIT.json").unlink()
        codec = json.loads((folder / "codec.json").read_text())
        codec["environment"] |= {
            "id": "subprocess:check_call",
            "kwargs": {"args": ["touch", str(tmp_path / "ran")]},
        }
        (folder / "codec.json").write_text(json.dumps(codec))

    stored.make("worlds", "strange", {"inputs": {"datasets": ["walks"]}}, fill)
    with pytest.raises(
        UsageError, match=r"reality.env must be set: .*'subprocess:check_call' is a program"
    ):
        JOB.run(config(root, world="strange", agent="a0", reality=RealityConfig()), run)
    assert not (tmp_path / "ran").exists()
    assert (
        JOB.run(config(root, world="strange", reality=RealityConfig()), run).kind == "evaluations"
    ), "the world alone makes no environment"


def test_the_environment_of_a_world_may_have_an_earlier_module_name(stored: Storage) -> None:
    path = stored.artifact("worlds", "w0").path
    codec = Codec.from_json(json.loads((path / "codec.json").read_text()))
    codec.environment["id"] = "mesocosm.reality.domains:reacher"
    assert reality_of(RealityConfig(), codec).env == "mesocosm.reality.domains:reacher"


def test_the_config_is_read_from_the_command_line() -> None:
    cfg = load(
        EvaluateConfig,
        overrides=["world=worlds/ab", "horizons=[1,2]", "reality.price.per_step=0.1"],
    )
    assert cfg.horizons == [1, 2] and cfg.reality.price.per_step == 0.1
