"""Environments that are slow to make, or in their first step."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from mesocosm.envs import make
from mesocosm.envs.config import RealityConfig
from mesocosm.envs.guard import Timed
from mesocosm.envs.make import facts_of
from mesocosm.errors import UsageError

MODULE = """
import gymnasium, numpy as np
from gymnasium.spaces import Box, Discrete

class Simulator(gymnasium.Env):
    started = 0
    action_space = Discrete(3)

    def __init__(self, size=2):
        type(self).started += 1
        self.observation_space = Box(-1, 1, (size,), np.float32)
"""


@pytest.fixture
def simulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A user's module, and a cache folder for this test."""
    monkeypatch.setattr(make, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "slow_simulator.py").write_text(MODULE)
    import slow_simulator  # type: ignore[import-not-found]

    slow_simulator.Simulator.started = 0
    return slow_simulator.Simulator


def test_a_slow_environment_is_made_once_for_its_spaces(
    simulator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RealityConfig(env="slow_simulator:Simulator", horizon=7)
    first = facts_of(config)
    facts_of(config)
    assert simulator.started == 2, "quick ones are made anew"
    monkeypatch.setattr(make, "SLOW_S", 0.0)
    assert facts_of(config) == facts_of(config) == first and simulator.started == 3
    assert first.max_episode_steps == 7 and first.action_space == gymnasium.spaces.Discrete(3)
    wider = RealityConfig(env="slow_simulator:Simulator", kwargs={"size": 3})
    assert facts_of(wider).observation_space.shape == (3,) and simulator.started == 4
    monkeypatch.setattr(make, "_version", lambda kind: "another version")
    assert facts_of(config).version == "another version" and simulator.started == 5
    with pytest.raises(UsageError, match=r"reality.task names 'goal'"):
        facts_of(RealityConfig(env="slow_simulator:Simulator", horizon=7, task=["goal"]))


class Napping(gymnasium.Env):
    """Its steps take the times of a list."""

    observation_space = action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, *seconds: float):
        self.seconds = list(seconds)

    def step(self, action: Any) -> Any:
        time.sleep(self.seconds.pop(0))
        return np.zeros(1, np.float32), 0.0, False, False, {}


def test_the_first_step_has_a_limit_of_its_own() -> None:
    config = RealityConfig(env="x", step_timeout_s=0.2, first_timeout_s=30.0)
    env = Timed(Napping(0.4, 0.0, 60.0), config)
    env.step(np.zeros(1))
    env.step(np.zeros(1))
    with pytest.raises(TimeoutError, match=r"longer than reality.step_timeout_s=0.2"):
        env.step(np.zeros(1))
    hanging = Timed(Napping(60.0), RealityConfig(env="x", first_timeout_s=0.2))
    with pytest.raises(TimeoutError, match=r"longer than reality.first_timeout_s=0.2"):
        hanging.step(np.zeros(1))
