"""Wrappers that shield learners from environments that crash, hang or return NaN."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import gymnasium
import numpy as np

from mesocosm.envs.api import Env, close, take_reset, take_step
from mesocosm.envs.config import RealityConfig, timeout
from mesocosm.envs.episode import all_finite
from mesocosm.envs.make import draw_options, make_env
from mesocosm.errors import MesocosmError

MAX_FAILURES = 5
"""Consecutive failures, without a finished episode between them, after which it counts as broken"""


class Timed(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Raises TimeoutError when a step or reset takes too long.

    It works in the main thread only, and between two Python instructions: a hang inside a C library
    is not ended.
    """

    def __init__(self, env: Env, config: RealityConfig):
        super().__init__(env)
        self._config, self._first = config, True

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        with _time_limit(*timeout(self._config, self._first)):
            return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        with _time_limit(*timeout(self._config, self._first)):
            result = self.env.step(action)
        self._first = False
        return result


class GuardedEnv(gymnasium.Env[Any, Any]):
    """The environment of `config`, with its reset options drawn, for agents that train in reality.

    A step that fails truncates its episode at the last observation, without reward. A new
    environment replaces the failed one, and `dropped` lists the reasons. Raises MesocosmError after
    MAX_FAILURES in a row.
    """

    def __init__(self, config: RealityConfig):
        self._config = config
        self._options = np.random.default_rng()
        self.dropped: list[str] = []
        self._failures = 0
        self._make()
        self.observation_space = self.env.observation_space
        self.action_space = self.env.action_space
        self.metadata = self.env.metadata

    def _make(self) -> None:
        self.env = Timed(make_env(self._config), self._config)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self._options = np.random.default_rng(seed)
        options = draw_options(self._config, self._options) | (options or {}) or None
        while True:
            reset = partial(take_reset, self.env, seed=seed, options=options)
            if (result := self._attempt("reset", reset)) is not None:
                return result
            seed = None  # the same seed might fail again

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        result = self._attempt("step", partial(take_step, self.env, action))
        if result is None:
            return self._last, 0.0, False, True, {}
        if result[2] or result[3]:
            self._failures = 0
        return result

    def _attempt(self, name: str, call: Callable[[], Any]) -> Any:
        """The result of a step or reset. None if it failed; a new environment is then made."""
        try:
            result = call()
            *values, info = result
            if all_finite((*values, info.get("duration", 0.0))):
                self._last = deepcopy(result[0])
                return result
            reason = f"the {name} gave NaN or infinity"
        except MesocosmError:
            raise
        except (Exception, SystemExit) as error:
            reason = f"the {name} raised {type(error).__name__}: {error}"
        self.dropped.append(" ".join(reason.split()))
        self._failures += 1
        if self._failures >= MAX_FAILURES:
            raise MesocosmError(
                f"reality.env={self._config.env!r} failed {self._failures} times in a row"
                f" ({self.dropped[-1]}); correct it"
            )
        close(self.env)
        self._make()
        return None

    def close(self) -> None:
        close(self.env)


@contextmanager
def _time_limit(key: str, timeout_s: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: Any) -> None:
        raise TimeoutError(f"took longer than {key}={timeout_s:g}")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
