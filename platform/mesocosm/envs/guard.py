"""Environments of reality that crash, hang or give NaN, made fit for a learner that knows nothing
of it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium

from mesocosm.envs.api import close, take_reset, take_step
from mesocosm.envs.config import RealityConfig
from mesocosm.envs.make import Env, all_finite, copied, make_env
from mesocosm.errors import MesocosmError

MAX_FAILURES = 5
"""So many failures in a row, with no episode finished between them: the environment is broken, not
unlucky.
"""


class Timed(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Raises TimeoutError in place of a step or reset that takes too long: in the main thread,
    between two Python instructions (a hang inside a C library is not ended).
    """

    def __init__(self, env: Env, timeout_s: float):
        super().__init__(env)
        self._timeout_s = timeout_s

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        with _time_limit(self._timeout_s):
            return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        with _time_limit(self._timeout_s):
            return self.env.step(action)


class Sturdy(gymnasium.Env[Any, Any]):
    """The environment that `config` names, whose failing step ends its episode: truncated, at the
    last observation, with no reward.

    A fresh environment takes the failed one's place, and `dropped` says why. Raises MesocosmError
    after MAX_FAILURES in a row.
    """

    def __init__(self, config: RealityConfig):
        self._config = config
        self.dropped: list[str] = []
        self._in_a_row = 0
        self._renew()
        self.observation_space, self.action_space = (
            self.env.observation_space,
            self.env.action_space,
        )
        self.metadata = self.env.metadata

    def _renew(self) -> None:
        self.env = Timed(make_env(self._config), self._config.step_timeout_s)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        while True:
            try:
                observation, info = take_reset(self.env, seed=seed, options=options)
                if all_finite(observation):
                    self._last = copied(observation)
                    return observation, info
                reason = "the reset's observation holds NaN or infinity"
            except MesocosmError:
                raise
            except (Exception, SystemExit) as error:
                reason = f"the reset raised {type(error).__name__}: {error}"
            self._failed(reason)
            seed = None  # the same seed might fail again

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        try:
            observation, reward, terminated, truncated, info = take_step(self.env, action)
            if all_finite((observation, reward, info.get("duration", 0.0))):
                self._last = copied(observation)
                self._in_a_row = 0 if terminated or truncated else self._in_a_row
                return observation, reward, terminated, truncated, info
            reason = "a step gave NaN or infinity"
        except MesocosmError:
            raise
        except (Exception, SystemExit) as error:
            reason = f"a step raised {type(error).__name__}: {error}"
        self._failed(reason)
        return self._last, 0.0, False, True, {}

    def _failed(self, reason: str) -> None:
        self.dropped.append(" ".join(reason.split()))
        self._in_a_row += 1
        if self._in_a_row >= MAX_FAILURES:
            raise MesocosmError(
                f"reality.env={self._config.env!r} failed {self._in_a_row} times in a row"
                f" ({self.dropped[-1]}); correct it"
            )
        close(self.env)
        self._renew()

    def close(self) -> None:
        close(self.env)


@contextmanager
def _time_limit(timeout_s: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: Any) -> None:
        raise TimeoutError(f"took longer than reality.step_timeout_s={timeout_s:g}")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
