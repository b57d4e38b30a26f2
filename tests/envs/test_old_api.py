"""Environments of gym's old API, and those whose close() raises: one sentence, and no step lost."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mesocosm.cli.main import main
from mesocosm.envs.config import RealityConfig
from mesocosm.envs.metered import make_metered_vector
from mesocosm.errors import MesocosmError

MODULE = """
import gymnasium, numpy as np

class Five(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), 0.0, False, False, {}

class Four(Five):
    def step(self, action):
        return np.zeros(2, np.float32), 0.0, False, {}

class NoPair(Five):
    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32)

class NoSeed(Five):
    def reset(self):
        return np.zeros(2, np.float32)

class CloseRaises(Five):
    def close(self):
        raise RuntimeError("close fails")

class Exits(Five):
    def step(self, action):
        raise SystemExit(0)

gymnasium.register("FourOld-v0", Four, max_episode_steps=10)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "oldenvs.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def collect(env: str, *overrides: str) -> int:
    settings = ["steps=10", "lanes=1", "workers=0", "storage.root=root"]
    return main(["collect", f"reality.env=oldenvs:{env}", *settings, *overrides])


STEP = "step() must give 5 values (observation, reward, terminated, truncated, info), got 4"


@pytest.mark.parametrize(
    ("env", "words", "message"),
    [
        ("Four", [], STEP),
        ("Four", ["reality.horizon=5"], STEP),
        ("FourOld-v0", [], STEP),
        ("NoPair", [], "reset() must give 2 values (observation, info), got ndarray"),
        ("NoSeed", [], "reset() must take the keyword arguments seed and options"),
    ],
)
def test_collecting_of_the_old_api_is_one_sentence(
    env: str, words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert collect(env, *words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and "oldenvs:" in line
    (status,) = folder.glob("root/runs/collect/*/status.json")
    assert json.loads(status.read_text())["state"] == "failed"


def test_training_on_reality_of_the_old_api_is_the_same_sentence(folder: Path) -> None:
    env = make_metered_vector(RealityConfig(env="oldenvs:Four"), "root", "ledger", "baseline", 1)
    env.reset(seed=0)
    with pytest.raises(MesocosmError) as error:
        env.step(np.zeros(1, np.int64))
    assert STEP in str(error.value)
    env.close()


def test_a_close_that_raises_loses_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert collect("CloseRaises") == 0
    assert [line for line in capsys.readouterr().err.splitlines() if "close fails" in line] == [
        "mesocosm: warning: close() of the environment oldenvs:CloseRaises raised RuntimeError:"
        " close fails; nothing is lost, correct it"
    ]
    assert len(list(folder.glob("root/datasets/*/COMMIT.json"))) == 1


def test_an_environment_that_exits_does_not_end_the_process(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert collect("Exits") == 1
    assert "the environment's step 1 raised SystemExit" in capsys.readouterr().err.splitlines()[-1]
