"""The meter: it reserves real steps and resets in the ledger before they happen, and confirms them
afterwards. The environments of `metered` pass it.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from mesocosm import signals
from mesocosm.envs.amounts import NOTHING, Amount, Reservation, Usage
from mesocosm.envs.episode import EpisodeError
from mesocosm.envs.ledger import Ledger
from mesocosm.errors import BudgetSpent, UsageError

RESETS_A_BLOCK = 8
"""Resets reserved with a block of steps. They have no bound; a crash over-counts at most these."""
BLOCK_S, OVERHEAD = 0.1, 0.1
"""A deferred meter reserves about BLOCK_S seconds of steps ahead, which a crash over-counts; more
where storage is so slow that reserving would take more than OVERHEAD of the time.
"""
ROUNDING = 1e-6
"""Relative slack of a reservation's duration, which the journal rounds."""
FIRST_BLOCK, GROWTH = 4, 4
"""A deferred meter's first block, and the largest ratio of a block to the one before it."""


@dataclass
class Report:
    """The report of a step or reset, of one or several environments."""

    missing: int
    """Steps and resets without a duration."""
    lacks: bool = False
    """A step that did not fail had no duration."""
    duration: float = 0.0
    longest: float = 0.0
    text_bytes: int = 0

    def step(self, info: Mapping[str, Any]) -> None:
        """Read the info of one step."""
        self.lacks |= "duration" not in info
        self._read(info.get("duration", math.nan))

    def reset(self, info: Mapping[str, Any]) -> None:
        """Read the info of one reset. Without a duration it takes no time."""
        self._read(info.get("duration", 0.0))

    def _read(self, duration: Any) -> None:
        """Read a duration. It counts as missing unless it is finite and >= 0. The caller then drops
        the episode.
        """
        try:
            value = float(duration)
        except (TypeError, ValueError):
            return
        if 0 <= value < math.inf:
            self.missing -= 1
            self.duration += value
            self.longest = max(self.longest, value)


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
        """True if `settle` has recorded usage that is not confirmed. The record names the
        reservation, and its reader confirms the usage.
        """
        self.total = NOTHING
        """All that was used through this meter so far."""
        self._held: Reservation | None = None
        self._used = NOTHING
        """The used part of the reservation."""
        self._busy_since: float | None = None
        self._calls = 0
        """Steps and resets under way."""
        self.first = True
        """True until the first step returns."""
        self.stopped = False
        """Set by another thread. A call under way fails when it returns, and no further call
        begins.
        """
        self._lock = threading.Lock()

    @contextmanager
    def use(self, *, steps: int = 0, resets: int = 0) -> Iterator[Report]:
        """Meter a real step or reset in the block. It counts even if it raises: it may have
        happened.

        Yields:
            The report of the call, which the block fills.

        Raises:
            BudgetSpent: It is not paid for. The block does not run.
            EpisodeError: The meter was stopped, before or meanwhile.
            UsageError: A step has no duration where time has a price.
        """
        report = Report(missing=steps + resets)
        with self._lock:
            self._check_running()
            self._ensure(steps, resets)
            self._count(Amount(steps, resets))
            self._calls = steps + resets
            self._busy_since = began = time.monotonic()
        try:
            yield report
            self.first = self.first and not steps
        finally:
            with self._lock:
                self._busy_since = None
                if not self.stopped:
                    self._count(self._taken(time.monotonic() - began, report))
        self._check_running()
        if report.lacks and self.ledger.price.per_second:
            raise UsageError(
                "reality.price.per_second needs info['duration'], in seconds, at every step; the"
                " environment gave none: report it, or price by reality.price.per_step"
            )

    @property
    def _dear_resets(self) -> bool:
        """A reset reserved ahead would keep money from other meters."""
        price = self.ledger.price
        return self.ledger.budget.money is not None and price.of(0, 1, 1.0) > 0

    @property
    def steps(self) -> int:
        """Steps used by this meter so far."""
        return self.total.steps

    def _count(self, amount: Amount) -> None:
        self._used += amount
        self.total += amount

    def _taken(self, seconds: float, report: Report) -> Amount:
        """The time of a call. A step without a duration (it failed, or hangs) is charged the
        longest duration, or where that is unknown the time it took, if time has a price.
        """
        duration, longest = report.duration, report.longest
        if report.missing and self.ledger.price.per_second:
            each = self.ledger.longest(max(self._used.longest, longest))
            duration += report.missing * each if each else seconds
        return Amount(
            seconds=seconds, duration=duration, longest=longest, text_bytes=report.text_bytes
        )

    def _check_running(self) -> None:
        if self.stopped:
            raise EpisodeError("this meter was stopped: its environment had hung")

    def _ensure(self, steps: int, resets: int) -> None:
        """Reserve a block where the reservation does not cover the next steps and resets.

        A deferred meter exchanges its reservation for a larger one, in one record: the used part
        stays reserved. Otherwise the same record confirms the used part.
        """
        held, used = self._held, self._used
        if held is not None:
            longest = self.ledger.longest(used.longest) * (1 - ROUNDING)
            timely = used.duration + longest * (steps + resets) <= held.duration or not longest
            if timely and used.steps + steps <= held.steps and used.resets + resets <= held.resets:
                return
        need = max(steps, 1)
        left = None if self.limit is None else self.limit - self.steps
        if left is not None and left < need:
            raise BudgetSpent(
                f"this environment's limit of {self.limit} real steps for {self.purpose} is spent"
            )
        block = max(need, self._ahead() if self.deferred else self.block)
        block = block if left is None else min(block, left)
        usage = Usage(held, 0) if held is not None and self.deferred else self._usage()
        began = time.monotonic()
        try:
            with signals.delayed():
                self._held = self.ledger.reserve(
                    self.purpose,
                    block,
                    resets if self._dear_resets else max(RESETS_A_BLOCK, resets),
                    least=need,
                    least_resets=resets,
                    used=used if self.deferred else Amount(longest=used.longest),
                    holder=self.holder,
                    confirming=usage,
                )
                # Before a signal can arrive: `close` would confirm the same usage again.
                if not self.deferred:
                    self._used = NOTHING
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

    def settle(self, steps: int, resets: int, record: Callable[[Usage, Amount], bool]) -> bool:
        """Confirm `steps` and `resets` of those used, after `record` has stored their transitions.

        All seconds, durations and texts are confirmed with them.

        For the thread that steps, or another one once the meter is stopped.

        Args:
            record: Called with the usage to confirm and the amount used beyond it, which stays
                reserved. If it returns False or raises, nothing is confirmed and everything used
                stays reserved.
        """
        assert self.deferred
        with self._lock:
            if self._held is None:
                return True
            held, used = self._held, self._used
        beyond = Amount(used.steps - steps, used.resets - resets)
        assert beyond.steps >= 0 and beyond.resets >= 0, (used, steps, resets)
        usage = Usage.of(held, replace(used, steps=steps, resets=resets))
        recorded = record(usage, beyond)
        if not recorded:
            usage, beyond = Usage(held, 0), used
        self._unconfirmed = recorded
        rest = self.ledger.confirm(usage, keep=beyond)
        with self._lock:
            self._held = rest
            self._used = NOTHING if rest is None else beyond
            self._unconfirmed = False
        return recorded

    def _usage(self) -> Usage | None:
        return None if self._held is None else Usage.of(self._held, self._used)

    def _release(self) -> None:
        """Confirm what was used; the rest of the reservation returns to the budget."""
        if (usage := self._usage()) is not None:
            self.ledger.confirm(usage)
        self._held, self._used = None, NOTHING

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
                calls = 0 if self._busy_since is None else self._calls
                self._count(self._taken(self.busy_s(), Report(missing=calls)))
                self.stopped = True
            return self._usage()
