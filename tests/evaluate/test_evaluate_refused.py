"""Evaluations that are refused before a real step, with one sentence that names the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mesocosm.config import load
from mesocosm.data.loading.codec import Codec
from mesocosm.envs.config import DrawnOption, RealityConfig
from mesocosm.errors import UsageError
from mesocosm.evaluate.config import EvaluateConfig, reality_of
from mesocosm.jobs.evaluate import JOB
from mesocosm.policies.behaviours import BehaviourConfig

from .lab import Lab

RANDOM = BehaviourConfig(kind="random")


def test_an_unknown_horizon_is_refused_before_a_real_step(lab: Lab) -> None:
    lab.copy_world("alone", [])
    cfg = lab.config(world="alone", agent="a0", datasets=["walks"])
    before = lab.storage.list("ledgers")
    for ask in (JOB.plan, lab.evaluate):
        with pytest.raises(UsageError, match=r"reality\.horizon must be set for worlds/alone"):
            ask(cfg)
    assert lab.storage.list("ledgers") == before
    cfg.reality.horizon = 12
    assert JOB.plan(cfg)["judged real steps"] == "at most 60"


def test_a_task_that_the_world_has_not_seen_is_refused_before_a_real_step(lab: Lab) -> None:
    options = {"options": [{"name": "colour", "values": ["blue", "red"]}]}
    lab.copy_world("tasks", ["walks"], lambda codec: codec.update(options))
    cfg = lab.config(world="tasks", agent="a0")
    cfg.reality.task = ["colour"]
    cfg.reality.task_options = {"colour": DrawnOption(choices=["red", "green"])}
    with pytest.raises(UsageError, match="choices holds 'green', which the world has not seen"):
        JOB.plan(cfg)
    cfg.reality.task_options = {"colour": DrawnOption(choices=["red"])}
    assert JOB.plan(cfg)["judged episodes"] == 5


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
        ({"policies": [RANDOM], "policy_episodes": 1}, "policy_episodes must be >= 2, got 1"),
        (
            {"policies": [RANDOM]},
            "0 policies whose data the world was not trained on cannot be compared: that takes 3",
        ),
        (
            {"agent": "a0", "reality": RealityConfig(env="CartPole-v1")},
            "reality.env='CartPole-v1' has the observation space Box.*, and worlds/w0 Box",
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
            r"policies\[0\].kind must be .* got 'traned'; did you mean 'trained'",
        ),
        ({"horizons": [0]}, "horizons must be >= 1, got"),
        ({"horizons": [], "full": False}, "horizons must not be"),
    ],
)
def test_wrong_use_is_one_sentence_before_anything_starts(
    lab: Lab, wrong: dict[str, Any], message: str
) -> None:
    def stored() -> list[list[str]]:
        return [lab.storage.list(kind) for kind in ("ledgers", "evaluations")]

    before = stored()
    with pytest.raises(UsageError, match=message) as caught:
        lab.evaluate(lab.config(**wrong))
    assert "\n" not in str(caught.value)
    assert stored() == before


def test_a_world_runs_no_program_that_its_user_did_not_name(lab: Lab, tmp_path: Path) -> None:
    program = {"id": "subprocess:check_call", "kwargs": {"args": ["touch", str(tmp_path / "ran")]}}
    lab.copy_world("strange", ["walks"], lambda codec: codec["environment"].update(program))
    message = r"reality.env must be set: .*'subprocess:check_call' is a program"
    with pytest.raises(UsageError, match=message):
        lab.evaluate(lab.config(world="strange", agent="a0", reality=RealityConfig()))
    assert not (tmp_path / "ran").exists()
    alone = lab.evaluate(lab.config(world="strange", reality=RealityConfig()))
    assert alone.kind == "evaluations", "the world alone makes no environment"


def test_the_environment_of_a_world_may_have_an_earlier_module_name(lab: Lab) -> None:
    path = lab.storage.artifact("worlds", "w0").path
    codec = Codec.from_json(json.loads((path / "codec.json").read_text()))
    codec.environment["id"] = "mesocosm.reality.domains:reacher"
    assert reality_of(RealityConfig(), codec.environment).env == "mesocosm.reality.domains:reacher"


def test_the_config_is_read_from_the_command_line() -> None:
    overrides = ["world=worlds/ab", "horizons=[1,2]", "reality.price.per_step=0.1"]
    cfg = load(EvaluateConfig, overrides=overrides)
    assert cfg.horizons == [1, 2] and cfg.reality.price.per_step == 0.1
