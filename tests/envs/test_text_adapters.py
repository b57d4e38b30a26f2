"""TextWorld and ScienceWorld behind the interface of text environments."""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from mesocosm.envs.config import RealityConfig
from mesocosm.envs.make import make_env
from mesocosm.errors import UsageError

MODULE = "mesocosm.envs.text.adapters"


def roll(env: Any, seed: int, steps: int) -> list[Any]:
    """Random admissible commands: their texts, rewards, ends and the next commands."""
    rng = random.Random(seed)
    text, info = env.reset(seed=seed)
    result = [(text, info)]
    for _ in range(steps):
        assert result[-1][0] in env.observation_space
        command = rng.choice(result[-1][-1]["admissible_commands"])
        assert command in env.action_space
        result.append((command, *env.step(command)))
        if result[-1][3]:
            break
    return result


@pytest.mark.parametrize(
    ("name", "package"), [("TextWorldGames", "textworld"), ("ScienceWorldTask", "scienceworld")]
)
def test_a_missing_package_is_named(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=r"not installed: .* pip install 'mesocosm\[text\]'"):
        make_env(RealityConfig(env=f"{MODULE}:{name}"))


def test_missing_java_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scienceworld")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match="needs Java"):
        make_env(RealityConfig(env=f"{MODULE}:ScienceWorldTask"))


@pytest.mark.slow
def test_textworld(tmp_path: Path) -> None:
    pytest.importorskip("textworld")
    kwargs = {"games": 1, "rooms": 2, "objects": 3, "quest": 2, "folder": str(tmp_path)}
    env = make_env(RealityConfig(env=f"{MODULE}:TextWorldGames", kwargs=kwargs, horizon=15))
    first = roll(env, 0, 10)
    assert first == roll(env, 0, 10) and len(first) > 2
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".z8"]
    env.close()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="ScienceWorld needs Java")
def test_scienceworld() -> None:
    pytest.importorskip("scienceworld")
    env = make_env(RealityConfig(env=f"{MODULE}:ScienceWorldTask", horizon=15))
    first = roll(env, 0, 5)
    assert first == roll(env, 0, 5) and len(first) > 2
    assert "Your task is to" in first[0][0]
    env.close()
