"""Environments that pay: every real step and reset goes through a `Meter`, which has reserved it in
the ledger before.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper

from mesocosm import signals
from mesocosm.envs.api import close
from mesocosm.envs.config import RealityConfig
from mesocosm.envs.guard import Sturdy
from mesocosm.envs.ledger import Ledger, Reservation, Usage
from mesocosm.envs.make import EpisodeError, TaskSampler
from mesocosm.errors import BudgetSpent, StorageError
from mesocosm.store.artifacts import Storage

RESETS_A_BLOCK = 8
"""Resets reserved with a block of steps. They have no bound of their own; a crash over-counts at
most so many.
"""
BLOCK_S, OVERHEAD = 0.1, 0.1
"""A deferred meter reserves about BLOCK_S seconds of steps ahead, which a crash over-counts; or
more, where storage is so slow that reserving would take more than this share of the time.
"""
FIRST_BLOCK, GROWTH = 4, 4
"""A deferred meter's first block, and by how much a block may exceed the one before it."""


class Meter:
    """Reserves blocks before use, counts what is used, confirms. Another thread may watch it and
    stop it.

    Args:
        block: steps a reservation: what a crash over-counts at most.
        limit: steps this meter may use in all; it never reserves beyond.
        holder: who reserves, as the ledger's records will say.
        deferred: nothing is confirmed but by `settle`, once what the steps bought is in storage.
        The one
            reservation grows while steps are taken, by about `BLOCK_S` seconds of steps at a time.
    """

    def __init__(
        self,
        ledger: Ledger,
        purpose: str,
        *,
        block: int = 64,
        limit: int | None = None,
        holder: str = "",
        deferred: bool = False,
    ):
        assert block >= 1, block
        self.ledger, self.purpose, self.block, self.limit, self.holder = (
            ledger,
            purpose,
            block,
            limit,
            holder,
        )
        self.deferred = deferred
        self._grown = (0, 0, time.monotonic())
        """The last block's size, `steps` when it was reserved, and when."""
        self._cost_s = 0.0
        """What reserving it took."""
        self._unconfirmed = False
        """`settle` has recorded what it could not confirm: the record names the reservation, and is
        there to confirm it.
        """
        self.steps = 0
        """Steps used by this meter so far."""
        self._held: Reservation | None = None
        self._used = (0, 0, 0.0)
        self._busy_since: float | None = None
        self.stopped = False
        """Frozen by another thread: whatever is under way fails when it comes back, and nothing
        further begins.
        """
        self._lock = threading.Lock()

    @contextmanager
    def use(self, *, steps: int = 0, resets: int = 0) -> Iterator[None]:
        """Around the real thing. Counted even if it raises: it may have happened. Raises
        BudgetSpent before it happens, EpisodeError where the meter was stopped before or meanwhile.
        """
        with self._lock:
            self._check_running()
            self._ensure(steps, resets)
            used = self._used
            self._used = (used[0] + steps, used[1] + resets, used[2])
            self.steps += steps
            self._busy_since = began = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._busy_since = None
                if not self.stopped:
                    self._used = (*self._used[:2], self._used[2] + time.monotonic() - began)
        self._check_running()

    def _check_running(self) -> None:
        if self.stopped:
            raise EpisodeError("this meter was stopped: its environment had hung")

    def _ensure(self, steps: int, resets: int) -> None:
        held = self._held
        if (
            held is not None
            and self._used[0] + steps <= held.steps
            and self._used[1] + resets <= held.resets
        ):
            return
        own = None if self.limit is None else self.limit - self.steps
        need = max(steps, 1)
        if own is not None and own < need:
            raise BudgetSpent(
                f"this environment's own limit of {self.limit} real steps is spent; it may take no"
                f" more for {self.purpose}"
            )
        wanted = max(self.block, need) if own is None else min(max(self.block, need), own)
        if self.deferred:
            with signals.delayed():
                self._grow(need, resets, own)
            return
        usage = self._usage()
        try:
            granted = self.ledger.reserve(
                self.purpose,
                wanted,
                max(RESETS_A_BLOCK, resets),
                holder=self.holder,
                confirming=usage,
            )
        except BudgetSpent:
            self._release(usage)
            raise
        self._held, self._used = granted, (0, 0, 0.0)
        if granted.steps < need:
            self._release(self._usage())
            raise BudgetSpent(
                f"ledger {self.ledger.id!r} leaves {granted.steps} real steps for {self.purpose},"
                f" fewer than the {need} that step together; use fewer environments, or raise the"
                " budget"
            )

    def _grow(self, need: int, resets: int, own: int | None) -> None:
        """Exchange the reservation for a larger one, in one record: what was used stays reserved."""
        last, before, since = self._grown
        elapsed = time.monotonic() - since
        pace = (self.steps - before) / elapsed if elapsed > 0 else float(self.block)
        wanted = round(pace * max(BLOCK_S, self._cost_s / OVERHEAD))
        block = (
            max(need, min(self.block, GROWTH * last, wanted)) if last else max(need, FIRST_BLOCK)
        )
        block = block if own is None else min(block, own)
        used_steps, used_resets, _ = self._used
        began = time.monotonic()
        self._held = self.ledger.reserve(
            self.purpose,
            used_steps + block,
            used_resets + max(RESETS_A_BLOCK, resets),
            least=used_steps + need,
            holder=self.holder,
            confirming=None if self._held is None else Usage(self._held, 0, 0, 0.0),
        )
        now = time.monotonic()
        self._cost_s, self._grown = now - began, (block, self.steps, now)

    def settle(
        self, steps: int, resets: int, record: Callable[[Usage, tuple[int, int]], bool]
    ) -> bool:
        """Confirm `steps` and `resets` of those used, after `record` has stored what they bought.

        `record` is given the usage to confirm and the (steps, resets) used beyond it, which stay
        reserved. Where it returns False, or raises, nothing is confirmed and all that was used
        stays reserved. For the thread that steps, or another one once the meter is stopped.
        """
        assert self.deferred
        with self._lock:
            if self._held is None:
                return True
            held, used = self._held, self._used
        usage, beyond = Usage(held, steps, resets, used[2]), (used[0] - steps, used[1] - resets)
        assert min(beyond) >= 0, (used, steps, resets)
        recorded = record(usage, beyond)
        if not recorded:
            usage, beyond = Usage(held, 0, 0, 0.0), used[:2]
        self._unconfirmed = recorded
        kept = self.ledger.confirm(held, usage.steps, usage.resets, usage.seconds, keep=beyond)
        with self._lock:
            self._held = kept
            self._used = (0, 0, 0.0) if kept is None else (*beyond, 0.0)
            self._unconfirmed = False
        return recorded

    def _usage(self) -> Usage | None:
        return None if self._held is None else Usage(self._held, *self._used)

    def _release(self, usage: Usage | None) -> None:
        if usage is not None:
            self.ledger.confirm(usage.reservation, usage.steps, usage.resets, usage.seconds)
        self._held, self._used = None, (0, 0, 0.0)

    def close(self) -> None:
        """Confirm what was used and give the rest back. The meter can go on afterwards, with a new
        reservation; a stopped one confirms what it was frozen at, in case the one who stopped it
        does not. A deferred meter keeps what was used reserved.
        """
        if self.deferred:
            with signals.delayed():
                if not self._unconfirmed:
                    self.settle(0, 0, lambda usage, beyond: True)
            return
        with self._lock:
            self._release(self._usage())

    def busy_s(self) -> float:
        """Seconds since the step or reset under way began; 0 if none is."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def stop_if_hung(self, timeout_s: float) -> Usage | None:
        """From another thread: if a step has been under way for longer than `timeout_s`, freeze the
        meter (no further step can begin) and return what was used of its reservation, the hanging
        step included, for the caller to confirm. A step that comes back after all raises
        EpisodeError, and `close` confirms the very same: the first confirmation holds.
        """
        with self._lock:
            return self._freeze() if self.busy_s() > timeout_s else None

    def stop(self) -> Usage | None:
        """As `stop_if_hung`, whatever is under way; None if nothing is reserved."""
        with self._lock:
            return self._freeze()

    def _freeze(self) -> Usage | None:
        if not self.stopped:
            self._used = (*self._used[:2], self._used[2] + self.busy_s())
            self.stopped = True
        return self._usage()


def _close_at_last(meter: Meter) -> None:
    """Close the meter of an environment that is gone, or at exit. Where storage fails, the error
    was reported by then, and what is not confirmed counts as spent. So it does where the garbage
    collector calls this in the thread of s3fs's event loop, which cannot wait for itself
    (NotImplementedError).
    """
    with suppress(StorageError, NotImplementedError):
        meter.close()


class MeteredEnv(gymnasium.Wrapper[Any, Any, Any, Any]):
    """One environment of reality. Raises BudgetSpent in place of a step or reset that is not paid
    for.
    """

    def __init__(
        self,
        env: gymnasium.Env[Any, Any],
        ledger: Ledger,
        purpose: str,
        block: int = 64,
        *,
        limit: int | None = None,
        holder: str = "",
        deferred: bool = False,
    ):
        super().__init__(env)
        self.meter = Meter(
            ledger, purpose, block=block, limit=limit, holder=holder, deferred=deferred
        )
        self._finalizer = weakref.finalize(self, _close_at_last, self.meter)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        with self.meter.use(resets=1):
            return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        with self.meter.use(steps=1):
            return self.env.step(action)

    def close(self) -> None:
        self.meter.close()
        close(self.env)


class MeteredVectorEnv(VectorWrapper):
    """A vector of environments of reality in NEXT_STEP autoreset mode, under one meter.

    A vector step counts one real step for each environment that steps, and one reset for each that
    had ended and is only reset by it. All step or none does: BudgetSpent is raised when fewer steps
    are left than would step.
    """

    def __init__(
        self,
        env: VectorEnv[Any, Any, Any],
        ledger: Ledger,
        purpose: str,
        block: int | None = None,
        *,
        limit: int | None = None,
        holder: str = "",
    ):
        super().__init__(env)
        assert env.metadata.get("autoreset_mode") == AutoresetMode.NEXT_STEP, env.metadata
        self.meter = Meter(
            ledger, purpose, block=block or 16 * env.num_envs, limit=limit, holder=holder
        )
        self._ended = np.zeros(env.num_envs, dtype=np.bool_)
        self._finalizer = weakref.finalize(self, _close_at_last, self.meter)

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        mask = (
            np.ones(self.num_envs, dtype=np.bool_)
            if options is None or "reset_mask" not in options
            else options["reset_mask"]
        )
        with self.meter.use(resets=int(mask.sum())):
            result = self.env.reset(seed=seed, options=options)
        self._ended = self._ended & ~mask
        return result

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        resets = int(self._ended.sum())
        with self.meter.use(steps=self.num_envs - resets, resets=resets):
            observation, reward, terminated, truncated, info = self.env.step(actions)
        self._ended = np.logical_or(terminated, truncated)
        return observation, reward, terminated, truncated, info

    @property
    def dropped(self) -> list[str]:
        """Why episodes were cut: a member crashed, hung or gave NaN."""
        members: Any = self.env.unwrapped
        return [
            reason for member in members.envs for reason in getattr(member.unwrapped, "dropped", [])
        ]

    def close(self, **kwargs: Any) -> None:
        self.meter.close()
        self.env.close(**kwargs)


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
    """`num_envs` environments of reality behind one meter, from plain picklable values: what an
    RLlib env runner needs.

    `bounds` and `config.budget` bind as in `Ledger`; `limit` bounds this vector alone. Call
    `close()` to confirm the last block. Raises UsageError as `make_env` does.
    """
    ledger = Ledger(Storage(root), ledger_id, config.budget, config.price, bounds)
    make = partial(_member, config)
    return MeteredVectorEnv(
        SyncVectorEnv([make] * num_envs, autoreset_mode=AutoresetMode.NEXT_STEP),
        ledger,
        purpose,
        limit=limit,
    )


def _member(config: RealityConfig) -> gymnasium.Env[Any, Any]:
    env = Sturdy(config)
    return TaskSampler(env, config) if config.task_options else env
