"""The gain of an agent's training, in the world and in reality, over pairs of episodes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mesocosm.datasets.episode import Episode
from mesocosm.envs.ledger import Ledger
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.evaluate.gain import Gain, gain, sentence
from mesocosm.evaluate.judge import JudgeResult
from mesocosm.jobs.evaluate import JOB

from . import worlds
from .lab import Lab, policy, summary_of
from .test_report import parsed


def judged(returns: dict[int, float]) -> JudgeResult:
    """Episodes of one step by number."""
    zero, act = np.zeros(2), [np.zeros(2)]
    about: dict[str, Any] = {
        "seed": 0,
        "behaviour": "policy",
        "observations": [zero, zero],
        "actions": act,
    }
    episodes = [
        Episode(index=k, rewards=np.array([each]), outcome="truncated", **about)
        for k, each in returns.items()
    ]
    return JudgeResult(tuple(episodes), len(episodes), ())


def test_episodes_are_paired_by_their_numbers() -> None:
    agent, start = judged({0: 3.0, 1: 9.0, 3: 4.0}), judged({0: 1.0, 2: 50.0, 3: 2.0})
    result = gain("agents/a@0", (agent, start), (np.array([5.0, 9.0]), np.array([1.0, 2.0])))
    assert (result.real.mean, result.real.pairs, result.real.start) == (2.0, 2, 1.5)
    assert result.real.interval == (2.0, 2.0), "the differences of both pairs are equal"
    assert (result.world.mean, result.world.pairs) == (5.5, 2)
    assert result.world.interval == (4.0, 7.0) and not result.unconfirmed


def test_pairs_remove_what_starts_have_in_common() -> None:
    """Starts differ by 100, and the agent is better by about 1 in each."""
    rng = np.random.default_rng(0)
    common, better = rng.normal(0, 100, 30), 1 + rng.normal(0, 0.1, 30)
    agent, start = (dict(enumerate(x.tolist())) for x in (common + better, common))
    result = gain("s", (judged(agent), judged(start)), (better, 0 * better))
    assert result.real.interval is not None
    assert 0.9 < result.real.interval[0] < result.real.interval[1] < 1.1


def test_a_gain_that_reality_does_not_show_is_named() -> None:
    world = np.array([1.0, 1.2, 0.9, 1.1]), np.zeros(4)
    real = judged({0: 1.0, 1: 0.0, 2: 1.0}), judged({0: 0.0, 1: 2.0, 2: 1.0})
    result = gain("agents/c", real, world)
    assert result.unconfirmed and result.world.low > 0 >= result.real.low
    text = sentence(result.to_json())
    assert text.startswith("over agents/c, with which its training began, it gains +1.05 (")
    assert text.endswith("3 pairs of real episodes do not show that gain")
    assert "do not show" not in sentence(_reversed(result).to_json())


def _reversed(result: Gain) -> Gain:
    return Gain(result.start, result.real, result.world)


def test_no_pair_is_an_error() -> None:
    none = np.zeros(1), np.zeros(1)
    with pytest.raises(MesocosmError, match="raise episodes"):
        gain("s", (judged({0: 1.0}), judged({1: 1.0})), none)


def test_the_report_shows_the_gain_and_its_real_steps_are_counted(lab: Lab) -> None:
    add_agent(lab, "trained", {"inputs": {}, "config": {"iterations": 4}}, snapshot="0")
    cfg = lab.config(horizon=12, agent="trained", gain=True, episodes=4, imagined=6, seed=5)
    assert JOB.plan(cfg)["judged episodes"] == 8, "the start plays the same episodes"
    artifact = lab.evaluate(cfg)
    suite = summary_of(artifact)["suite"]
    gained = suite["agent"]["gain"]
    assert gained["start"] == "agents/trained@0"
    assert (gained["real"]["pairs"], gained["world"]["pairs"]) == (4, 6)
    real = gained["real"]["mean"] + gained["real"]["start"]
    assert real == pytest.approx(suite["agent"]["real"])
    assert Ledger(lab.storage, artifact.id).totals().purposes["judge"].resets == 8
    text = " ".join(parsed((artifact.path / "report.html").read_text()).texts)
    assert "Gain of the agent" in text and "over agents/trained@0, with which" in text
    assert lab.figures["gain/real"] == gained["real"]["mean"]
    without = JOB.resolve(lab.config(horizon=12, agent="trained", episodes=4, seed=5), lab.storage)
    assert without.id != artifact.id


def test_training_that_began_with_an_agent_gains_over_it(lab: Lab) -> None:
    """Where that agent was kept, the gain is 0 in both."""
    meta = {"inputs": {"agents": ["a0"]}, "config": {"iterations": 4}}
    add_agent(lab, "kept", meta, seed=0)
    cfg = lab.config(horizon=12, agent="kept", gain=True, episodes=2, imagined=2)
    gained = summary_of(lab.evaluate(cfg))["suite"]["agent"]["gain"]
    assert gained["start"] == "agents/a0"
    assert gained["real"]["mean"] == gained["world"]["mean"] == 0.0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "gain must be false without an agent"),
        ({"agent": "a0"}, "gain must be false for agents/a0, which holds no snapshot of its"),
        ({"agent": "new"}, "gain must be false for agents/new, which holds no snapshot of its"),
        ({"agent": "kept2", "judge_steps": 100}, "judge_steps must be >= 120"),
    ],
)
def test_a_gain_that_cannot_be_measured_is_refused(
    lab: Lab, keys: dict[str, Any], message: str
) -> None:
    rival = {"inputs": {"agents": ["a0"]}, "config": {"iterations": 4, "rival": True}}
    for name, meta in (("new", rival), ("kept2", {"inputs": {"agents": ["a0"]}, "config": {}})):
        if lab.storage.find("agents", name) is None:
            add_agent(lab, name, meta)
    with pytest.raises(UsageError, match=message):
        JOB.plan(lab.config(horizon=12, gain=True, **keys))


def add_agent(
    lab: Lab, name: str, meta: dict[str, Any], *, seed: int = 2, snapshot: str | None = None
) -> None:
    """Store an agent, with a snapshot that acts otherwise."""

    def save(to: Path) -> None:
        policy(worlds.ACTIONS, seed=seed).save(to)
        if snapshot is not None:
            shutil.rmtree(to / "snapshots", ignore_errors=True)
            (to / "snapshots" / snapshot).mkdir(parents=True)
            policy(worlds.ACTIONS, seed=1).save(to / "snapshots" / snapshot)

    lab.storage.make("agents", name, meta, save)
