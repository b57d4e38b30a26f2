"""The real environment of a played world: it takes the same actions, and each step is metered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mesocosm.envs.api import Env, close
from mesocosm.envs.config import RealityConfig
from mesocosm.envs.episode import all_finite
from mesocosm.envs.guard import Timed
from mesocosm.envs.ledger import Ledger
from mesocosm.envs.make import draw_options, make_env
from mesocosm.envs.meter import Meter
from mesocosm.envs.metered import MeteredEnv
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.pictures import address
from mesocosm.user_code import one_line

PURPOSE = "play"
"""The ledger's purpose of real steps that a person takes."""


@dataclass(frozen=True)
class RealMoment:
    """One moment of the real episode."""

    observation: Any
    reward: float | None
    total: float
    """The return so far."""
    terminated: bool
    truncated: bool
    picture: str | None
    """The rendered picture as a `data:` address; None if the environment renders nothing."""

    @property
    def over(self) -> bool:
        """True if the real episode has ended."""
        return self.terminated or self.truncated


@dataclass(frozen=True)
class Bill:
    """Real steps and resets of all playing in one ledger, and their price."""

    ledger: str
    steps: int
    resets: int
    price: float
    currency: str
    remaining: int | None
    """Steps that the budget leaves; None without a budget of steps."""
    remaining_money: float | None
    """Money that the budget leaves; None without a budget of money."""


class RealSide:
    """The real environment of a played world.

    A failure, the end of the budget or of the real episode ends its part of the episode, and `note`
    says why. The world continues alone.

    Args:
        config: The environment, its price and its budget.
        ledger: Counts every reset and step, with the purpose `play`.

    Raises:
        UsageError: The environment cannot be made.
    """

    def __init__(self, config: RealityConfig, ledger: Ledger):
        if config.bounds == "drop":  # a moment is real wherever it is
            config = replace(config, bounds="ignore")
        self.config, self.ledger = config, ledger
        self.note: str | None = None
        """The reason why reality is not stepped, as a sentence; None while it is."""
        self.picture_note: str | None = None
        """The reason why there is no picture, as a sentence."""
        self._env: MeteredEnv | None = self._make()
        self._total, self._stepped = 0.0, 0

    def _make(self) -> MeteredEnv:
        env = Timed(_make_rendering(self.config), self.config)
        return MeteredEnv(env, Meter(self.ledger, PURPOSE, block=1))

    def options(self, seed: int) -> dict[str, Any]:
        """The reset options of the episode of a seed."""
        return draw_options(self.config, np.random.default_rng(seed))

    def begin(self, seed: int, options: Mapping[str, Any]) -> RealMoment | None:
        """Reset the environment. None where that fails; `note` then says why."""
        self.note, self._total, self._stepped = None, 0.0, 0
        return self._attempt("reset", lambda env: self._reset(env, seed, options))

    def step(self, action: Any) -> RealMoment | None:
        """Step the environment. None where reality is not stepped any more; see `note`."""
        if self.note is not None:
            return None
        moment = self._attempt("step", lambda env: self._step(env, action))
        if moment is not None and moment.over:
            end = "terminated" if moment.terminated else "was truncated"
            self.note = f"the real episode {end} after step {self._stepped}"
        return moment

    def stop(self, note: str) -> None:
        """Leave the episode, for the reason `note`."""
        self.note = note

    def bill(self) -> Bill:
        """All that playing has cost in this ledger."""
        totals = self.ledger.totals()
        spent = totals.purposes[PURPOSE]
        return Bill(
            totals.ledger,
            spent.steps,
            spent.resets,
            spent.price,
            totals.currency,
            totals.remaining,
            totals.remaining_money,
        )

    def close(self) -> None:
        """Close the environment; its meter confirms what was used."""
        if self._env is not None:
            close(self._env)
            self._env = None

    def _reset(self, env: MeteredEnv, seed: int, options: Mapping[str, Any]) -> RealMoment:
        observation, _ = env.reset(seed=seed, options=dict(options) or None)
        return RealMoment(deepcopy(observation), None, 0.0, False, False, self._picture(env))

    def _step(self, env: MeteredEnv, action: Any) -> RealMoment:
        observation, reward, terminated, truncated, _ = env.step(action)
        self._stepped += 1
        self._total += float(reward)
        ends = bool(terminated), bool(truncated)
        picture = self._picture(env)
        return RealMoment(deepcopy(observation), float(reward), self._total, *ends, picture)

    def _attempt(self, name: str, call: Callable[[MeteredEnv], RealMoment]) -> RealMoment | None:
        """The moment of a call, or None and a `note`. A new environment replaces one that fails."""
        try:
            if self._env is None:
                self._env = self._make()
            try:
                moment = call(self._env)
            finally:
                self._env.meter.close()  # confirmed at once, so that the bill is exact
            if all_finite((moment.observation, moment.reward or 0.0)):
                return moment
            reason = f"the environment's {name} gave NaN or infinity"
        except MesocosmError as error:  # the budget is spent, or an action is forbidden
            self.note = str(error)
            return None
        except (Exception, SystemExit) as error:
            reason = f"the environment's {name} raised {type(error).__name__}: {one_line(error)}"
        self.note = f"{reason}; begin again for a new environment"
        with suppress(Exception):
            self.close()
        self._env = None
        return None

    def _picture(self, env: MeteredEnv) -> str | None:
        """The picture that the environment renders; None where it renders nothing."""
        if env.render_mode != "rgb_array" or self.picture_note is not None:
            return None
        try:
            return address(np.asarray(env.render()))
        except (Exception, SystemExit) as error:
            self.picture_note = f"No picture: rendering failed ({one_line(error)})"
            return None


def _make_rendering(config: RealityConfig) -> Env:
    """The environment, with `render_mode=rgb_array` where it has that mode. Raises UsageError where
    it cannot be made.
    """
    env = make_env(config)
    modes = env.metadata.get("render_modes") or []
    if "render_mode" in config.kwargs or "rgb_array" not in modes:
        return env
    try:
        kwargs = {**config.kwargs, "render_mode": "rgb_array"}
        rendering = make_env(replace(config, kwargs=kwargs))
    except UsageError:
        return env
    close(env)
    return rendering
