"""The evaluate job on a real world, dataset and agent: an artifact with a report, made once, every
real step metered.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mesocosm.agents.rollout import imagined_episodes
from mesocosm.datasets.dataset import Dataset, Environment
from mesocosm.datasets.episode import Episode
from mesocosm.envs.ledger import Ledger
from mesocosm.errors import MesocosmError
from mesocosm.jobs.evaluate import JOB
from mesocosm.policies.behaviours import BehaviourConfig
from mesocosm.serve.world_env import WorldVectorEnv

from . import worlds
from .lab import SLOW, Lab, judge_row, summary_of
from .test_report import parsed


def test_a_world_and_an_agent_are_evaluated_once(lab: Lab) -> None:
    cfg = lab.config(agent="a0", target=1e9)
    cfg.reality.price.per_step = 0.5
    artifact = lab.evaluate(cfg)
    figures, summary = lab.figures, summary_of(artifact)
    assert artifact.meta["inputs"] == {"worlds": ["w0"], "agents": ["a0"], "datasets": ["walks"]}
    ledger, judged = Ledger(lab.storage, artifact.id).totals(), judge_row(summary)
    assert judged["steps"] == ledger.purposes["judge"].steps == ledger.steps > 0
    assert judged["price"] == judged["steps"] / 2
    point = summary["curves"]["world"][0]["points"][0]
    assert len(point["returns"]) == 5
    assert point["mean"] == pytest.approx(np.mean(point["returns"]))
    assert point["mean"] == pytest.approx(figures["return/mean"])
    logged = Dataset([lab.storage.artifact("datasets", "walks").path]).transitions
    assert point["real_steps"] == logged + 4, "dropped steps were spent, too"
    rows = {row["horizon"]: row for row in summary["open_loop"][0]["table"]["rows"]}
    assert set(rows) == {"1", "3", "full"} and rows["1"]["ratio"] < 0.1
    assert figures["open_loop/1"] == rows["1"]["ratio"]
    assert len(summary["trajectories"][0]["episodes"]) == 3
    parsed((artifact.path / "report.html").read_text())
    assert lab.evaluate(cfg).id == artifact.id
    again = Ledger(lab.storage, artifact.id).totals()
    assert again.steps == ledger.steps, "a finished evaluation takes no real step"


def test_logs_of_one_deterministic_policy_are_named(lab: Lab) -> None:
    """The world of such logs may ignore actions, and it promises more a step than they show."""
    episodes = []
    for k in range(30):
        walk = np.random.default_rng(k).normal(size=(11, 2)).cumsum(0)
        actions, rewards = list(np.tanh(walk[:-1])), np.full(10, -50.0)
        episodes.append(Episode(k, k, "steady", list(walk), actions, rewards, "truncated"))

    def write(folder: Path) -> None:
        folder.rmdir()
        worlds.dataset(folder, episodes, Environment(id="walk"), valid_fraction=0.1)

    lab.storage.make("datasets", "steady", {"inputs": {}}, write)
    lab.copy_world("blind", ["steady"])
    artifact = lab.evaluate(lab.config(world="blind", datasets=["walks"], agent="a0"))
    suite = summary_of(artifact)["suite"]
    verdict = suite["verdicts"][5]
    assert verdict["answer"] == "no"
    assert "action[0] (0.0% of its variance is free), action[1]" in verdict["text"]
    reason = "no 10 consecutive steps of the logs average more than -50"
    assert reason in suite["agent"]["unexplained"]
    page = (artifact.path / "report.html").read_text()
    assert "a world that ignores it fits as well" in page and "The logs do not explain that" in page
    assert lab.log.count("warning: in the logs the action follows") == 1
    assert lab.log.count("warning: the agent's return") == 1


def test_policies_are_compared_and_every_real_step_is_counted(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    most, scripted = 12 * (5 + 7 * 2), BehaviourConfig(kind="scripted", function=SLOW)
    compared = {"policies": [BehaviourConfig(kind="random"), scripted], "graded": 3}
    small = {"policy_episodes": 2, "imagined": 4, "judge_steps": most, "seed": 3}
    cfg = lab.config(horizon=12, success="return >= 0", agent="a0", **compared, **small)
    artifact = lab.evaluate(cfg)
    suite = summary_of(artifact)["suite"]
    value, away = suite["policy_value"], suite["off_policy"]["behaviours"]
    rows = value["policies"]
    names = [row["name"] for row in rows]
    assert names[:4] == ["random", f"scripted {SLOW}", "agent@2", "agent"] and len(names) == 7
    assert [row["noise"] for row in rows][4:6] == [2.0, 1.0]
    assert [row["iteration"] for row in rows][2:4] == [2, 4]
    ledger = Ledger(lab.storage, artifact.id).totals()
    assert most >= ledger.purposes["judge"].steps == ledger.steps > value["real_steps"] > 0
    for row in rows:
        assert row["gap"] == pytest.approx(row["world"]["mean"] - row["real"]["mean"], abs=1e-9)
        assert row["world"]["episodes"] == 4
        assert 0 <= row["success"]["real"] <= 1 and 0 <= row["success"]["world"] <= 1
    trained_on = [row["name"] for row in rows if not row["held_out"]]
    assert trained_on == ["random"], "the walks are random"
    assert value["ranking"]["policies"] == 6
    assert any("random: this behaviour collected" in note for note in value["notes"])
    behaviours = [row["name"] for row in away]
    assert set(behaviours) >= {"random", "agent"} and len(set(behaviours)) == len(behaviours)
    assert [row["name"] for row in away if row["logged"]] == ["random"]
    assert set(suite["agent"]["success"]) == {"real", "world"}
    first = suite["verdicts"][0]
    assert first["question"] == "Trust it to rank policies?" and first["answer"] != "unknown"
    html = (artifact.path / "report.html").read_text()
    text = " ".join(parsed(html).texts)
    for words in ("Policy values", "Away from the data", *(v["text"] for v in suite["verdicts"])):
        assert words in text
    assert html.index("<svg") < html.index("Returns in reality"), "plots first"
    assert lab.figures["policy_value/error"] == value["ranking"]["error"]
    assert lab.figures["starts/validity"] == suite["starts"]["validity"]
    assert rows[3]["world"]["mean"] == suite["agent"]["world"], "the agent has one value"
    unbounded = lab.evaluate(replace(cfg, judge_steps=None))
    assert unbounded.id == artifact.id, "a bound is not part of the id"
    assert Ledger(lab.storage, artifact.id).totals().steps == ledger.steps
    monkeypatch.setattr(worlds, "slow", lambda observation, rng: np.array([5.0, 7.0]))
    with pytest.raises(MesocosmError, match="not in the action space"):
        lab.evaluate(replace(cfg, seed=4))


def test_the_horizon_of_a_self_truncating_environment_comes_from_the_logs(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Walk` truncates itself and registers no limit; its logged episodes are truncated at 30."""
    cfg = lab.config(agent="a0", episodes=2, imagined=4, seed=11)
    cfg.reality.kwargs = {"limit": 1000}  # the policy never ends an episode by itself
    facts = JOB.plan(cfg)
    assert facts["judged real steps"] == "at most 60" and facts["horizon"].startswith("30 steps")
    horizons = []

    def imagined(policies: Any, env: WorldVectorEnv, *rest: Any) -> Any:
        horizons.append(env.horizon)
        return imagined_episodes(policies, env, *rest)

    monkeypatch.setattr("mesocosm.evaluate.suite.imagined_episodes", imagined)
    judged = judge_row(summary_of(lab.evaluate(cfg)))
    assert horizons == [30] and judged["steps"] <= 60
    assert "episodes end after 30 steps" in lab.log and "of at most 30" in lab.log


def test_a_world_alone_takes_no_real_step(lab: Lab) -> None:
    before = lab.storage.list("ledgers")
    summary = summary_of(lab.evaluate(lab.config(full=False)))
    assert lab.storage.list("ledgers") == before
    assert summary["curves"] == {"world": [], "model_free": []}
    assert summary["losses"][0]["parts"]["total"] > 0
    assert summary["checks"][0]["transitions"] > 0
