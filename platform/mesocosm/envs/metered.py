"""Metered environments: every real step and reset passes a `Meter`, which has reserved it in the
ledger before.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper

from mesocosm.datasets.texts import utf8_bytes
from mesocosm.envs.api import close, take_reset, take_step
from mesocosm.envs.config import RealityConfig
from mesocosm.envs.guard import GuardedEnv
from mesocosm.envs.ledger import Ledger
from mesocosm.envs.meter import Meter
from mesocosm.errors import StorageError
from mesocosm.store.artifacts import Storage

_closing: set[threading.Thread] = set()
_exiting = False


def _close_at_last(meter: Meter) -> None:
    """Close the meter of an environment that was garbage-collected, or at exit.

    The garbage collector runs this in any thread: in that of s3fs's event loop, which cannot wait
    for itself, or in one that holds the ledger's lock. A thread of its own can wait for both.
    """
    if _exiting:
        _close(meter)
        return
    thread = threading.Thread(target=_close, args=(meter,), name="close-meter", daemon=True)
    _closing.add(thread)
    thread.start()


def _close(meter: Meter) -> None:
    """Close a meter. Where storage fails, its error was reported, and the usage counts as spent."""
    try:
        with suppress(StorageError):
            meter.close()
    finally:
        _closing.discard(threading.current_thread())


@atexit.register
def _wait_for_meters() -> None:
    global _exiting
    _exiting = True
    for thread in list(_closing):
        thread.join()


class MeteredEnv(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment of reality. Raises BudgetSpent before a step or reset that is not paid for."""

    def __init__(self, env: gymnasium.Env[Any, Any], meter: Meter):
        super().__init__(env)
        self.meter = meter
        self._finalizer = weakref.finalize(self, _close_at_last, meter)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        with self.meter.use(resets=1) as report:
            result = take_reset(self.env, seed=seed, options=options)
            report.reset(result[1])
            report.text_bytes = utf8_bytes(result[0])
        return result

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        with self.meter.use(steps=1) as report:
            result = take_step(self.env, action)
            report.step(result[4])
            report.text_bytes = utf8_bytes((action, result[0]))
        return result

    def close(self) -> None:
        self.meter.close()
        close(self.env)


class MeteredVectorEnv(VectorWrapper):
    """A vector of environments of reality in NEXT_STEP autoreset mode, under one meter.

    A vector step counts one real step for each environment that steps, and one reset for each that
    had ended and is only reset. Either all environments step or none: BudgetSpent is raised if too
    few steps are left for all.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], meter: Meter):
        super().__init__(env)
        assert env.metadata.get("autoreset_mode") == AutoresetMode.NEXT_STEP, env.metadata
        self.meter = meter
        self._ended = np.zeros(env.num_envs, dtype=np.bool_)
        self._finalizer = weakref.finalize(self, _close_at_last, meter)

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, dtype=np.bool_))
        with self.meter.use(resets=int(mask.sum())) as report:
            result = self.env.reset(seed=seed, options=options)
            for info in _infos(result[1], np.flatnonzero(mask)):
                report.reset(info)
            report.text_bytes = utf8_bytes(result[0])
        self._ended = self._ended & ~mask
        return result

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        resets = int(self._ended.sum())
        with self.meter.use(steps=self.num_envs - resets, resets=resets) as report:
            observation, reward, terminated, truncated, info = self.env.step(actions)
            for one, again, cut in zip(
                _infos(info, range(self.num_envs)), self._ended, truncated, strict=True
            ):
                if again:
                    report.reset(one)
                elif "duration" in one or not cut:  # a guarded step that failed has no duration
                    report.step(one)
            report.text_bytes = utf8_bytes((actions, observation))
        self._ended = np.logical_or(terminated, truncated)
        return observation, reward, terminated, truncated, info

    @property
    def dropped(self) -> list[str]:
        """Why episodes were truncated: a member crashed, hung or gave NaN."""
        members: Any = self.env.unwrapped
        return [reason for member in members.envs for reason in member.unwrapped.dropped]

    def close(self, **kwargs: Any) -> None:
        self.meter.close()
        self.env.close(**kwargs)


def _infos(infos: Mapping[str, Any], members: Iterable[int]) -> Iterator[dict[str, Any]]:
    """The durations in the infos of a vector environment, for some of its members."""
    durations, reported = infos.get("duration"), infos.get("_duration")
    for member in members:
        given = durations is not None and (reported is None or reported[member])
        yield {"duration": durations[member]} if given and durations is not None else {}


def make_metered_vector(
    config: RealityConfig,
    root: str,
    ledger_id: str,
    purpose: str,
    num_envs: int,
    bounds: Mapping[str, int] | None = None,
    *,
    limit: int | None = None,
) -> MeteredVectorEnv:
    """`num_envs` environments of reality behind one meter, from plain picklable values, as an RLlib
    env runner needs. Call `close()` to confirm the last block.

    Args:
        bounds: Bounds of the ledger, as is `config.budget`.
        limit: Bounds this vector alone.

    Raises UsageError as `make_env` does.
    """

    makers = [partial(GuardedEnv, config)] * num_envs
    vector = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.NEXT_STEP)
    ledger = Ledger(Storage(root), ledger_id, config.budget, config.price, bounds)
    return MeteredVectorEnv(vector, Meter(ledger, purpose, block=16 * num_envs, limit=limit))
