"""Metered environments: every real step and reset passes a `Meter`, which has reserved it in the
ledger before.
"""

from __future__ import annotations

import atexit
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
from mesocosm.envs.episode import EpisodeError
from mesocosm.envs.guard import GuardedEnv
from mesocosm.envs.ledger import Ledger, Reservation, Usage
from mesocosm.errors import BudgetSpent, StorageError
from mesocosm.store.artifacts import Storage

RESETS_A_BLOCK = 8
"""Resets reserved with a block of steps. They have no bound; a crash over-counts at most these."""
BLOCK_S, OVERHEAD = 0.1, 0.1
"""A deferred meter reserves about BLOCK_S seconds of steps ahead, which a crash over-counts; more
where storage is so slow that reserving would take more than OVERHEAD of the time.
"""
FIRST_BLOCK, GROWTH = 4, 4
"""A deferred meter's first block, and the largest ratio of a block to the one before it."""


class Meter:
    """Reserves blocks of steps before use, counts what is used, and confirms it.

    Another thread may watch it and stop it.

    Args:
        block: Steps per reservation: what a crash over-counts at most.
        limit: Steps that this meter may use in all; it never reserves more.
        holder: Who reserves, for the ledger's records.
        deferred: Only `settle` confirms, once the transitions are in storage. The one reservation
            grows while steps are taken, by about `BLOCK_S` seconds of steps at a time.
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
        self.ledger, self.purpose, self.holder = ledger, purpose, holder
        self.block, self.limit, self.deferred = block, limit, deferred
        self._grown = (0, 0, time.monotonic())
        """The last block's size, `steps` when it was reserved, and when."""
        self._cost_s = 0.0
        """The time that reserving it took."""
        self._unconfirmed = False
        """True if `settle` has recorded usage that is not confirmed: the record names the
        reservation, and whoever reads it confirms.
        """
        self.steps = 0
        """Steps used by this meter so far."""
        self._held: Reservation | None = None
        self._used = (0, 0, 0.0)
        """(steps, resets, seconds) used of the reservation."""
        self._busy_since: float | None = None
        self.stopped = False
        """Set by another thread: a call under way fails when it returns, and none begins."""
        self._lock = threading.Lock()

    @contextmanager
    def use(self, *, steps: int = 0, resets: int = 0) -> Iterator[None]:
        """Meter a real step or reset in the block. It counts even if it raises: it may have
        happened.

        Raises:
            BudgetSpent: It is not paid for. The block does not run.
            EpisodeError: The meter was stopped, before or meanwhile.
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
        """Reserve a block where the reservation does not cover the next steps and resets.

        A deferred meter exchanges its reservation for a larger one, in one record: the used part
        stays reserved. Otherwise the same record confirms the used part.
        """
        held, used = self._held, self._used
        if held is not None and used[0] + steps <= held.steps and used[1] + resets <= held.resets:
            return
        need = max(steps, 1)
        left = None if self.limit is None else self.limit - self.steps
        if left is not None and left < need:
            raise BudgetSpent(
                f"this environment's limit of {self.limit} real steps for {self.purpose} is spent"
            )
        block = max(need, self._ahead() if self.deferred else self.block)
        block = block if left is None else min(block, left)
        used_steps, used_resets = used[:2] if self.deferred else (0, 0)
        usage = Usage(held, 0) if held is not None and self.deferred else self._usage()
        began = time.monotonic()
        try:
            with signals.delayed():
                self._held = self.ledger.reserve(
                    self.purpose,
                    used_steps + block,
                    used_resets + max(RESETS_A_BLOCK, resets),
                    least=used_steps + need,
                    holder=self.holder,
                    confirming=usage,
                )
                # Before a signal: `close` would confirm what was used once more.
                if not self.deferred:
                    self._used = (0, 0, 0.0)
        except BudgetSpent:
            if not self.deferred:
                self._release()
            raise
        now = time.monotonic()
        self._cost_s, self._grown = now - began, (block, self.steps, now)

    def _ahead(self) -> int:
        """Steps that a deferred meter reserves ahead."""
        last, before, since = self._grown
        if not last:
            return FIRST_BLOCK
        elapsed = time.monotonic() - since
        pace = (self.steps - before) / elapsed if elapsed > 0 else float(self.block)
        return min(self.block, GROWTH * last, round(pace * max(BLOCK_S, self._cost_s / OVERHEAD)))

    def settle(
        self, steps: int, resets: int, record: Callable[[Usage, tuple[int, int]], bool]
    ) -> bool:
        """Confirm `steps` and `resets` of those used, after `record` has stored their transitions.

        For the thread that steps, or another one once the meter is stopped.

        Args:
            record: Called with the usage to confirm and the (steps, resets) used beyond it, which
                stay reserved. If it returns False or raises, nothing is confirmed and everything
                used stays reserved.
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
            usage, beyond = Usage(held, 0), used[:2]
        self._unconfirmed = recorded
        rest = self.ledger.confirm(usage, keep=beyond)
        with self._lock:
            self._held = rest
            self._used = (0, 0, 0.0) if rest is None else (*beyond, 0.0)
            self._unconfirmed = False
        return recorded

    def _usage(self) -> Usage | None:
        return None if self._held is None else Usage(self._held, *self._used)

    def _release(self) -> None:
        """Confirm what was used; the rest of the reservation returns to the budget."""
        if (usage := self._usage()) is not None:
            self.ledger.confirm(usage)
        self._held, self._used = None, (0, 0, 0.0)

    def close(self) -> None:
        """Confirm what was used and return the rest. The meter may be used again afterwards.

        A stopped meter confirms its usage when it was stopped, in case the thread that stopped it
        does not. A deferred meter keeps everything used reserved.
        """
        if self.deferred:
            with signals.delayed():
                if not self._unconfirmed:
                    self.settle(0, 0, lambda usage, beyond: True)
            return
        with self._lock:
            self._release()

    def busy_s(self) -> float:
        """Seconds since the step or reset under way began; 0 if none is."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def stop(self, hung_s: float | None = None) -> Usage | None:
        """Stop the meter, from another thread; with `hung_s` only if a step has been under way for
        longer.

        No step can begin afterwards. If the hanging step returns, it raises EpisodeError, and
        `close` confirms the same usage: the first confirmation counts.

        Returns:
            The usage of the reservation, with the step under way, for the caller to confirm; None
            where no step hangs or nothing is reserved.
        """
        with self._lock:
            if hung_s is not None and self.busy_s() <= hung_s:
                return None
            if not self.stopped:
                self._used = (*self._used[:2], self._used[2] + self.busy_s())
                self.stopped = True
            return self._usage()


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
    had ended and is only reset. Either all step or none: BudgetSpent is raised when fewer steps are
    left than would step.
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
        """Why episodes were truncated: a member crashed, hung or gave NaN."""
        members: Any = self.env.unwrapped
        return [reason for member in members.envs for reason in member.unwrapped.dropped]

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
