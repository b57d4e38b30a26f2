"""The ledger: the cost of reality by purpose, exact for any number of processes and any crash.

An append-only journal `ROOT/ledgers/ID/NNNNNNNN.json`. A record reserves real steps and resets
*before* they happen, confirms an earlier reservation with what was used, or does both. Record n is
created exclusively, by a process that has read records 0..n-1 and found budget left in them, so the
records are one agreed sequence and the budget holds without a lock or a server. A reservation that
was never confirmed (its process died, or is still at work) counts as spent in full and is listed
apart: never over budget, and exact without a crash. It is under-counted only where time has a price
and a process dies in the first step of a ledger without `longest_s`.

How long a step takes, and so its price by the second, is known only afterwards. A reservation holds
the longest duration for each of its steps and resets: `reality.price.longest_s`, or else the
longest that the ledger has seen. A budget of money is never passed while no step takes longer than
that; a longer one counts in full. Before anything was seen, one step is granted at a time.

Each record names its predecessor's nonce, so a record that was deleted or replaced is detected.
Every SNAPSHOT_EVERY records `snapshots/NNNNNNNN.json` holds the state before record N: opening a
ledger reads the newest snapshot and the records after it.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from mesocosm.envs.amounts import (
    BUDGETED,
    NOTHING,
    PURPOSES,
    Amount,
    LedgerTotals,
    Reservation,
    Usage,
    held_by,
    price_of,
)
from mesocosm.envs.config import ROUNDING, BudgetConfig, PriceConfig
from mesocosm.errors import ArtifactError, BudgetSpent, StorageError, UsageError
from mesocosm.store.artifacts import Storage

SNAPSHOT_EVERY = 64
"""Records between two snapshots: opening a ledger reads one snapshot and at most this many."""
RECORD = re.compile(r"(\d{8})\.json")


class Ledger:
    """One open ledger. Threads may share it; other processes open their own by the same id.

    The budget and the prices are not part of the journal: a later run may raise a budget.

    Args:
        budget: Bounds the purposes BUDGETED together.
        bounds: Bounds of single purposes, e.g. `{"baseline": 20000}`.
    """

    def __init__(
        self,
        storage: Storage,
        ledger_id: str,
        budget: BudgetConfig | None = None,
        price: PriceConfig | None = None,
        bounds: Mapping[str, int] | None = None,
    ):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", ledger_id):
            rule = "must consist of letters, digits, '.', '_' and '-'"
            raise UsageError(f"a ledger's name {rule}, got {ledger_id!r}")
        self.storage, self.id = storage, ledger_id
        self.budget, self.price = budget or BudgetConfig(), price or PriceConfig()
        self.bounds = dict(bounds or {})
        assert set(self.bounds) <= set(PURPOSES), self.bounds
        # Re-entrant: the garbage collector may close a forgotten environment while we append.
        self._lock = threading.RLock()
        self._next = 0
        self._nonce = ""
        """Nonce of record `_next - 1`."""
        self._opened = False
        self._open: dict[int, Reservation] = {}
        self._confirmed = dict.fromkeys(PURPOSES, Amount())

    def reserve(
        self,
        purpose: str,
        steps: int,
        resets: int = 0,
        *,
        least: int = 1,
        least_resets: int = 0,
        used: Amount = NOTHING,
        holder: str = "",
        confirming: Usage | None = None,
    ) -> Reservation:
        """Reserve up to `steps` (at least 1) real steps, durably, before they are taken.

        Grants what the budget leaves when that is less than `steps` but at least `least`, and then
        only `least_resets` of the resets.

        Args:
            used: An amount that was used before and stays reserved, in addition.
            confirming: Confirms an earlier reservation in the same record.

        Raises:
            BudgetSpent: Fewer than `least` steps are left. Nothing is reserved or confirmed.
        """
        assert purpose in PURPOSES and steps >= least >= 1, (purpose, steps, least)
        assert resets >= least_resets >= 0, (resets, least_resets)
        with self._lock:
            while True:
                self._catch_up()
                # Judge by the records before this one: a re-entrant call may read more meanwhile.
                number = self._next
                left = self._remaining(purpose, confirming)
                granted = steps if left is None else min(steps, left - used.steps)
                if granted < least:
                    raise BudgetSpent(self._refusal(purpose, steps, max(granted, 0)))
                more, longest = resets, self.longest(used.longest)
                if purpose in BUDGETED and self.budget.money is not None:
                    money = self.budget.money - self._money_spent(confirming)
                    money -= price_of(self.price, used)
                    least_amount = Amount(least, least_resets)
                    granted, more = self._affordable(money, longest, granted, resets, least_amount)
                    if granted < least:
                        raise BudgetSpent(self._money_refusal(purpose, money))
                total = used + Amount(granted, more, duration=longest * (granted + more))
                reserved = Reservation(
                    number, purpose, total.steps, total.resets, holder, total.duration
                )
                if self._append(number, reserved, confirming):
                    return self._open[number]

    def longest(self, seen: float = 0.0) -> float:
        """Seconds to reserve for a step or reset: `reality.price.longest_s`, or else the longest
        that the ledger or the caller has `seen`. 0 where time has no price.
        """
        if not self.price.per_second:
            return 0.0
        confirmed = max(amount.longest for amount in self._confirmed.values())
        return self.price.longest_s or max(confirmed, seen)

    def _affordable(
        self, money: float, longest: float, steps: int, resets: int, least: Amount
    ) -> tuple[int, int]:
        """The (steps, resets) that `money` pays for: all, or fewer steps and the least resets."""
        price, slack = self.price, ROUNDING * (self.budget.money or 0.0)
        if price.per_second and not longest:
            steps, resets = least.steps, least.resets  # no duration was seen yet
        if price.of(steps, resets, longest * (steps + resets)) <= money + slack:
            return steps, resets
        rest = money + slack - price.of(0, least.resets, longest * least.resets)
        each = price.of(1, 0, longest)
        if not each:  # only resets have a price
            return (steps if rest >= 0 else 0), least.resets
        return min(steps, math.floor(rest / each)), least.resets

    def confirm(self, usage: Usage, *, keep: Amount = NOTHING) -> Reservation | None:
        """Confirm what was used of a reservation; the rest returns to the budget.

        Of two confirmations of one reservation the first counts.

        Args:
            keep: A part of the rest that stays reserved: it was used, and its transitions are not
                recorded yet.

        Returns:
            The new reservation of `keep`; None without one.
        """
        held = usage.reservation
        with self._lock:
            self._catch_up()
            while held.number in self._open:
                number, rest = self._next, None
                if keep.steps or keep.resets:
                    amount = keep.steps, keep.resets, held.holder, keep.duration
                    rest = Reservation(number, held.purpose, *amount)
                if self._append(number, rest, usage):
                    return self._open.get(number)
                self._catch_up()
        return None

    def totals(self) -> LedgerTotals:
        """Everything spent so far, by everyone."""
        with self._lock:
            self._catch_up()
            held = tuple(self._open.values())
            return LedgerTotals.of(self.id, self.price, self.budget, self._confirmed, held)

    def remaining(self, purpose: str) -> int | None:
        """Steps left to a purpose under every bound that applies to it; None if none does."""
        with self._lock:
            self._catch_up()
            return self._remaining(purpose, None)

    def _path(self, number: int, folder: str = "") -> str:
        return f"ledgers/{self.id}/{folder}{number:08d}.json"

    def _catch_up(self) -> None:
        """Read the records that others have appended since the last call."""
        opening = not self._opened
        if opening:
            self._open_journal()
        first = self._next
        while (raw := self.storage.read(self._path(number := self._next))) is not None:
            self._apply(number, self._parse(number, raw))
        if opening and self._next - first >= SNAPSHOT_EVERY:  # its writer died
            with suppress(StorageError):  # a reader's root may be read-only
                self._snapshot()

    def _open_journal(self) -> None:
        """Check that no record is missing, and restore the newest snapshot."""
        folder = f"ledgers/{self.id}"
        snapshots = _numbers(self.storage.list(f"{folder}/snapshots"))
        numbers = _numbers(self.storage.list(folder))
        end = max([*(n + 1 for n in numbers), *snapshots], default=0)
        for number in sorted(set(range(end)) - set(numbers)):
            # The listing may lack a record that was appended meanwhile.
            if self.storage.read(self._path(number)) is None:
                raise self._damaged(number, "missing")
        if snapshots:
            self._restore(snapshots[-1])
        self._opened = True

    def _snapshot(self) -> None:
        """Write the state before record `_next`. Any process writes the same bytes."""
        state = {
            "schema": 1,
            "nonce": self._nonce,
            "confirmed": {purpose: asdict(total) for purpose, total in self._confirmed.items()},
            "open": [asdict(r) for r in self._open.values()],
        }
        self.storage.write(self._path(self._next, "snapshots/"), json.dumps(state).encode())

    def _restore(self, number: int) -> None:
        path = self._path(number, "snapshots/")
        try:
            state = json.loads(self.storage.read(path) or b"")
            self._confirmed = {p: Amount(**state["confirmed"].get(p, {})) for p in PURPOSES}
            self._open = {r["number"]: Reservation(**r) for r in state["open"]}
            self._next, self._nonce = number, state["nonce"]
        except (ValueError, TypeError, KeyError) as error:
            raise ArtifactError(
                f"{path} in {self.storage.root!r} is damaged; remove this snapshot: the ledger's"
                " records suffice"
            ) from error

    def _parse(self, number: int, raw: bytes) -> dict[str, Any]:
        try:
            record: dict[str, Any] = json.loads(raw)
            if not {"reserve", "confirm", "nonce"} <= set(record):
                raise ValueError("not a record of a ledger")
        except (ValueError, TypeError) as error:
            raise self._damaged(number, "damaged") from error
        # Records of the first versions have no "previous".
        if number == self._next and record.get("previous", self._nonce) != self._nonce:
            raise self._damaged(number - 1, "replaced")
        return record

    def _damaged(self, number: int, how: str) -> ArtifactError:
        return ArtifactError(
            f"ledger {self.id!r} is damaged: record {self._path(number)} in {self.storage.root!r}"
            f" is {how}; restore it from a copy, or use another ledger"
        )

    def _append(self, number: int, reserve: Reservation | None, confirm: Usage | None) -> bool:
        """Create record `number`. Returns False where it exists."""
        record: dict[str, Any] = {
            "schema": 1,
            "nonce": uuid.uuid4().hex,
            "previous": self._nonce,
            "time": round(time.time(), 3),
            "reserve": None,
            "confirm": None,
        }
        if reserve is not None:
            record["reserve"] = {k: v for k, v in asdict(reserve).items() if k != "number"}
        if confirm is not None:
            held = confirm.reservation
            assert 0 <= confirm.steps <= held.steps and 0 <= confirm.resets <= held.resets, confirm
            record["confirm"] = {"of": held.number, **asdict(confirm.amount.rounded())}
        if not self.storage.create(self._path(number), json.dumps(record).encode()):
            # A remote store may refuse its client's own repetition of this request.
            raw = self.storage.read(self._path(number))
            if raw is None or self._parse(number, raw)["nonce"] != record["nonce"]:
                return False
        self._apply(number, record)
        if self._next == number + 1 and self._next % SNAPSHOT_EVERY == 0:
            with suppress(StorageError):  # the record counts; the next process writes the snapshot
                self._snapshot()
        return True

    def _apply(self, number: int, record: Mapping[str, Any]) -> None:
        if number != self._next:  # a re-entrant call has applied it already
            return
        self._next, self._nonce = number + 1, record["nonce"]
        confirm, reserve = record["confirm"], record["reserve"]
        if confirm is not None and (held := self._open.pop(confirm["of"], None)) is not None:
            amount = Amount(**{key: value for key, value in confirm.items() if key != "of"})
            self._confirmed[held.purpose] += amount
        if reserve is not None:
            self._open[number] = Reservation(number, **reserve)

    def _limits(self, purpose: str) -> list[tuple[str, tuple[str, ...], int]]:
        """(name of the bound, the purposes under it, steps)"""
        limits: list[tuple[str, tuple[str, ...], int]] = []
        if purpose in BUDGETED and self.budget.steps is not None:
            limits.append(("reality.budget.steps", BUDGETED, self.budget.steps))
        if purpose in self.bounds:
            limits.append((f"the bound of {purpose}", (purpose,), self.bounds[purpose]))
        return limits

    def _spent(self, purposes: tuple[str, ...], confirming: Usage | None = None) -> Amount:
        """All that was spent, the unconfirmed included, as if `confirming` were confirmed."""
        total = held_by(self._open.values(), *purposes)
        for purpose in purposes:
            total += self._confirmed[purpose]
        if confirming is not None:
            held = self._open.get(confirming.reservation.number)
            if held is not None and held.purpose in purposes:
                returned = Amount(-held.steps, -held.resets, duration=-held.duration)
                total += returned + confirming.amount
        return total

    def _money_spent(self, confirming: Usage | None) -> float:
        return price_of(self.price, self._spent(BUDGETED, confirming))

    def _remaining(self, purpose: str, confirming: Usage | None) -> int | None:
        limits = self._limits(purpose)
        left = (bound - self._spent(purposes, confirming).steps for _, purposes, bound in limits)
        return min(left, default=None)

    def _refusal(self, purpose: str, steps: int, left: int) -> str:
        limits = self._limits(purpose)
        name, purposes, bound = min(
            limits, key=lambda limit: limit[2] - self._spent(limit[1]).steps
        )
        spent = self._spent(purposes).steps
        unconfirmed = held_by(self._open.values(), *purposes).steps
        return (
            f"ledger {self.id!r}: {name}={bound} is spent ({spent} real steps by"
            f" {', '.join(purposes)}, {unconfirmed} of them unconfirmed; {steps} more requested"
            f" for {purpose}, {left} left); raise it or use another ledger"
        )

    def _money_refusal(self, purpose: str, left: float) -> str:
        spent, held = self._money_spent(None), held_by(self._open.values(), *BUDGETED)
        return (
            f"ledger {self.id!r}: reality.budget.money={self.budget.money:g} {self.price.currency}"
            f" is spent ({spent:.6g} by {', '.join(BUDGETED)}, {price_of(self.price, held):.6g}"
            f" of them unconfirmed; {max(left, 0.0):.6g} left for {purpose}, less than the next"
            " step may cost); raise it or use another ledger"
        )


def _numbers(names: list[str]) -> list[int]:
    """The record or snapshot numbers among a folder's names, ascending."""
    return sorted(int(match[1]) for name in names if (match := RECORD.fullmatch(name)))
