"""MiniGrid's tasks as pictures."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from mesocosm.envs.config import RealityConfig
from mesocosm.envs.make import make_env
from mesocosm.errors import UsageError

ENV = "mesocosm.envs.minigrid:MiniGrid"


def made(task: str = "DoorKey-5x5") -> Any:
    pytest.importorskip("minigrid")
    return make_env(RealityConfig(env=ENV, kwargs={"task": task}))


def play(env: Any, seed: int, noise: float) -> tuple[list[Any], float, bool]:
    """The frames, the return, and whether the goal was reached."""
    from mesocosm.envs.minigrid import unlock

    rng = np.random.default_rng(seed)
    frame, _ = env.reset(seed=seed)
    frames, total, ended = [frame], 0.0, False
    while not ended:
        action = rng.integers(7) if rng.random() < noise else unlock(frame, rng)
        frame, reward, terminated, truncated, _ = env.step(action)
        frames.append(frame)
        total, ended = total + reward, terminated or truncated
    return frames, total, terminated


@pytest.mark.integration
@pytest.mark.parametrize("task", ["DoorKey-5x5", "Empty-5x5", "DoorKey-8x8"])
def test_the_script_reaches_the_goal_by_the_pictures(task: str) -> None:
    env, lengths = made(task), []
    for seed in range(4):
        frames, total, terminated = play(env, seed, 0.0)
        assert terminated and total == 1.0
        assert all(frame in env.observation_space for frame in frames)
        lengths.append(len(frames))
    assert max(lengths) < 60
    again = [len(play(env, seed, 0.0)[0]) for seed in range(4)]
    assert again == lengths


def test_the_script_goes_on_after_random_actions() -> None:
    env = made()
    assert all(play(env, seed, 0.3)[2] for seed in range(6))


def test_a_picture_shows_all_of_the_state() -> None:
    """Except the step's number: the grid, the agent and what it carries."""
    from mesocosm.envs.minigrid import HEADINGS, read_rooms

    env, rng = made(), np.random.default_rng(0)
    inner = env.unwrapped._env
    seen = dict[bytes, tuple[Any, ...]]()
    for seed in range(8):
        frame, _ = env.reset(seed=seed)
        for _ in range(60):
            cells, agent, heading = read_rooms(frame)
            assert agent == tuple(int(i) for i in inner.agent_pos)
            assert HEADINGS[heading] == tuple(inner.dir_vec)
            assert ("key" in cells.values()) == (inner.carrying is None)
            state = (inner.grid.encode().tobytes(), agent, heading)
            assert seen.setdefault(frame.tobytes(), state) == state
            frame, _, terminated, truncated, _ = env.step(rng.integers(7))
            if terminated or truncated:
                break
    assert len(seen) > 30


def test_wrong_tasks_are_refused() -> None:
    pytest.importorskip("minigrid")
    for task, words in (
        ("DoorKey-5x", r"task must be a task of MiniGrid, got 'DoorKey-5x'.*DoorKey-5x5"),
        ("Fetch-5x5-N2", "task must have one mission, got 'Fetch-5x5-N2'"),
        ("Dynamic-Obstacles-5x5", "task must have MiniGrid's 7 actions, got 'Dynamic-Obstacles"),
    ):
        with pytest.raises(UsageError, match=words) as caught:
            make_env(RealityConfig(env=ENV, kwargs={"task": task}))
        assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "minigrid", None)
    with pytest.raises(UsageError, match=r"MiniGrid is missing; pip install 'mesocosm\[minigrid"):
        make_env(RealityConfig(env=ENV))
