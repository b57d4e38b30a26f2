"""A user's own environments, which misbehave on demand. The tests run in this folder, as a user
would.
"""

from __future__ import annotations

import os
import time
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, Text


class Line(gymnasium.Env):
    """A walk on a line that ends beyond 1. `trouble` maps a reset seed (as text) to what happens at
    that episode's third step.
    """

    observation_space = Box(-np.inf, np.inf, (2,), np.float32)
    action_space = Box(-1.0, 1.0, (1,), np.float32)

    def __init__(
        self,
        trouble: dict[str, str] | None = None,
        stretch: float = 0.2,
        nap: float = 3600.0,
        closing: float = 0.0,
    ):
        self.trouble, self.stretch, self.nap, self.closing = trouble or {}, stretch, nap, closing
        self.t = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.mishap = self.trouble.get(str(seed))
        if self.mishap == "reset":
            raise RuntimeError("the arm is jammed")
        self.t, self.x = 0, float(self.np_random.uniform(-0.5, 0.5))
        self.buffer = np.array([self.x, 0.0], np.float32)
        return self.buffer, {}

    def step(self, action: Any):
        self.t += 1
        self.x += self.stretch * float(action[0])
        self.buffer[:] = self.x, self.t  # the same array each time
        if self.t == 3 and self.mishap:
            match self.mishap:
                case "crash":
                    raise RuntimeError("the arm fell off")
                case "hang":
                    time.sleep(self.nap)
                case "die":
                    os._exit(11)
                case "nan":
                    self.buffer[0] = np.nan
                case "reward":
                    return self.buffer, float("inf"), False, False, {}
        return self.buffer, -abs(self.x), abs(self.x) > 1, False, {}

    def close(self):
        if self.t:
            time.sleep(self.closing)


class Counted(Line):
    """Takes STEP_S seconds a step, and appends a byte a step to the file that STEPS_FILE names:
    what reality was really asked.
    """

    def __init__(self, **more: Any):
        super().__init__(**more)
        self.pace = float(os.environ["STEP_S"])
        self.file = os.open(os.environ["STEPS_FILE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def step(self, action: Any):
        os.write(self.file, b".")
        time.sleep(self.pace)
        return super().step(action)

    def close(self):
        os.close(self.file)


class Stillborn(Line):
    """Ends every process that makes it, but one: as where memory is short in workers alone."""

    def __init__(self, survivor: int):
        if os.getpid() != survivor:
            os._exit(11)
        super().__init__()


class Odd(Line):
    """Gives what is not of its space from an episode's third step on: `trouble` names the key, or
    `list` for a NaN in a list.
    """

    observation_space = Dict(
        {
            "at": Box(-np.inf, np.inf, (2,), np.float64),
            "count": Box(0, 2**62, (), np.int64),
            "mode": Discrete(3),
            "word": Text(3, charset="ab"),
        }
    )

    def _observe(self) -> Any:
        right = {
            "at": np.array([self.x, self.t]),
            "count": np.int64(self.t),
            "mode": np.int64(self.t % 3),
            "word": "ab"[: 1 + self.t % 2],
        }
        wrong = {
            "at": np.zeros(3),
            "count": np.int64(2**60),
            "mode": np.int64(7),
            "word": "z",
            "list": [self.x, float("nan")],
        }
        return (
            right
            if self.t < 3 or not self.mishap
            else right | {"at" if self.mishap == "list" else self.mishap: wrong[self.mishap]}
        )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        _, info = super().reset(seed=seed)
        return self._observe(), info

    def step(self, action: Any):
        _, reward, terminated, truncated, info = super().step(action)
        return self._observe(), reward, terminated, truncated, info


class Clips(Line):
    """Clips the action it is given in place."""

    def step(self, action: Any):
        np.clip(action, -0.1, 0.1, out=action)
        return super().step(action)


class Reach(Line):
    """A Dict observation with a goal, an info with durations and success."""

    observation_space = Dict(
        {"state": Box(-np.inf, np.inf, (2,), np.float32), "goal": Box(-1, 1, (1,), np.float32)}
    )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        state, info = super().reset(seed=seed)
        self.goal = np.array([self.np_random.uniform(-1, 1)], np.float32)
        return {"state": state, "goal": self.goal}, info

    def step(self, action: Any):
        state, reward, terminated, truncated, _ = super().step(action)
        near = abs(self.x - float(self.goal[0])) < 0.1
        return (
            {"state": state, "goal": self.goal},
            reward,
            terminated or near,
            truncated,
            {"duration": 0.25 * self.t, "reached": near},
        )


class Leaky(Line):
    """Each episode takes 200 MiB and never gives them back; `log` gets the process's id."""

    held: list = []

    def __init__(self, log: str = ""):
        super().__init__(stretch=0.0)
        self.log = log

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        self.held.append(bytearray(os.urandom(1) * (200 << 20)))
        with open(self.log, "a") as file:
            print(os.getpid(), file=file)
        return super().reset(seed=seed)


class Windy(Line):
    """Takes the reset options wind (a float) and side (a choice)."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        observation, info = super().reset(seed=seed)
        self.options = options
        return observation, info

    def step(self, action: Any):
        assert self.options is not None
        self.x += self.options["wind"] * (1 if self.options["side"] == "east" else -1)
        return super().step(action)


class Aimed(Reach):
    """Takes the reset option goal, and observes it, `off` beside it."""

    def __init__(self, off: float = 0.0):
        super().__init__()
        self.off = off

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        observation, info = super().reset(seed=seed)
        assert options is not None
        self.goal = np.array([options["goal"] + self.off], np.float32)
        return observation | {"goal": self.goal}, info


def make_line(**kwargs: Any) -> gymnasium.Env:
    return gymnasium.wrappers.TimeLimit(Line(**kwargs), 7)


def not_an_env() -> int:
    return 3


def push_left(observation: Any, rng: np.random.Generator) -> Any:
    return np.array([-0.5])


def too_far(observation: Any, rng: np.random.Generator) -> Any:
    return np.array([7.0])


def broken(observation: Any, rng: np.random.Generator) -> Any:
    raise KeyError("no such joint")


def chat(observation: str, rng: np.random.Generator) -> str:
    """Commands of an environment of texts, one of which ends its connection."""
    return str(rng.choice(["hi there", "go", "crash"], p=[0.5, 0.4, 0.1]))


def always_one(observation: Any, rng: np.random.Generator) -> Any:
    return 1


class Beside:
    """Stands still, and says when an episode begins: what another job does meanwhile."""

    def __init__(self) -> None:
        self.meanwhile = lambda k: None

    def start(self, k: int, rng: np.random.Generator) -> None:
        self.meanwhile(k)

    def __call__(self, observation: Any, rng: np.random.Generator) -> Any:
        return np.zeros(1)


beside = Beside()
FAIL = 0


def sometimes(observation: Any, rng: np.random.Generator) -> Any:
    """Raises at the ninth step of the FAIL-th episode from now; never while FAIL is 0."""
    global FAIL
    if FAIL and observation[1] == 8:
        FAIL -= 1
        if not FAIL:
            raise ValueError("the script has a bug")
    return np.zeros(1)


gymnasium.register("OwnLine-v0", entry_point=Line, max_episode_steps=30)
