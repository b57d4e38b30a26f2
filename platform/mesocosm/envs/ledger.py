"""The ledger: the cost of reality by purpose, exact for any number of processes and any crash.

An append-only journal `ROOT/ledgers/ID/NNNNNNNN.json`. A record reserves real steps and resets
*before* they happen, confirms an earlier reservation with what was used, or does both. Record n is
created exclusively, by a process that has read records 0..n-1 and found budget left in them, so the
records are one agreed sequence and the budget holds without a lock or a server. A reservation that
was never confirmed (its process died, or is still at work) counts as spent in full and is listed
apart: never over budget, never under-counted, exact without a crash.

Each record names its predecessor's nonce, so a record that was deleted or replaced is detected.
Every SNAPSHOT_EVERY records `snapshots/NNNNNNNN.json` holds the state before record N: opening a
ledger reads the newest snapshot and the records after it.
"""

from __future__ import annotations

import json
import re
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from mesocosm.envs.config import BudgetConfig, PriceConfig
from mesocosm.errors import ArtifactError, BudgetSpent, StorageError, UsageError
from mesocosm.store.artifacts import Storage

PURPOSES = ("collect", "baseline", "select", "judge")
SNAPSHOT_EVERY = 64
"""Records between two snapshots: opening a ledger reads one snapshot and at most this many."""
RECORD = re.compile(r"(\d{8})\.json")
BUDGETED = ("collect", "select")
"""The purposes that `reality.budget.steps` bounds together."""


@dataclass(frozen=True)
class Reservation:
    """Permission for `steps` real steps and `resets` resets. `number` is that of its record."""

    number: int
    purpose: str
    steps: int
    resets: int
    holder: str = ""


@dataclass(frozen=True)
class Usage:
    """The used part of a reservation. `seconds` are those inside step and reset."""

    reservation: Reservation
    steps: int
    resets: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class PurposeTotals:
    """The total of one purpose. Steps, resets and price *include* the unconfirmed part."""

    steps: int = 0
    resets: int = 0
    seconds: float = 0.0
    price: float = 0.0
    unconfirmed_steps: int = 0
    unconfirmed_resets: int = 0
    unconfirmed_price: float = 0.0


@dataclass(frozen=True)
class LedgerTotals:
    ledger: str
    currency: str
    purposes: dict[str, PurposeTotals]
    """For each of PURPOSES."""
    unconfirmed: tuple[Reservation, ...]
    """Open reservations, of crashed processes or of live ones."""
    spent: int
    """Steps of collect and select, the unconfirmed included."""
    remaining: int | None
    """Steps that the budget leaves to collect and select; None without a budget."""

    @property
    def steps(self) -> int:
        """Real steps of all purposes."""
        return sum(p.steps for p in self.purposes.values())

    @property
    def price(self) -> float:
        return sum(p.price for p in self.purposes.values())

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "steps": self.steps, "price": self.price}


@dataclass
class _Sum:
    steps: int = 0
    resets: int = 0
    seconds: float = 0.0


class Ledger:
    """One open ledger. Threads may share it; other processes open their own by the same id.

    The budget and the prices are not part of the journal: a later run may raise a budget.

    Args:
        budget: Bounds collect and select together.
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
        self._confirmed = {purpose: _Sum() for purpose in PURPOSES}

    def reserve(
        self,
        purpose: str,
        steps: int,
        resets: int = 0,
        *,
        least: int = 1,
        holder: str = "",
        confirming: Usage | None = None,
    ) -> Reservation:
        """Reserve up to `steps` (at least 1) real steps, durably, before they are taken.

        Grants what the budget leaves when that is less than `steps` but at least `least`.
        `confirming` confirms an earlier reservation in the same record.

        Raises:
            BudgetSpent: Fewer than `least` steps are left. Nothing is reserved or confirmed.
        """
        assert purpose in PURPOSES and steps >= least >= 1 and resets >= 0, (purpose, steps, resets)
        with self._lock:
            while True:
                self._catch_up()
                # Judge by the records before this one: a re-entrant call may read more meanwhile.
                number = self._next
                left = self._remaining(purpose, confirming)
                granted = steps if left is None else min(steps, left)
                if granted < least:
                    raise BudgetSpent(self._refusal(purpose, steps, max(granted, 0)))
                reserved = Reservation(number, purpose, granted, resets, holder)
                if self._append(number, reserved, confirming):
                    return self._open[number]

    def confirm(self, usage: Usage, *, keep: tuple[int, int] = (0, 0)) -> Reservation | None:
        """Confirm what was used of a reservation; the rest returns to the budget.

        Of two confirmations of one reservation the first counts.

        Args:
            keep: (steps, resets) of the rest that stay reserved: they were used, and their
                transitions are not recorded yet.

        Returns:
            The new reservation of `keep`; None without one.
        """
        held = usage.reservation
        with self._lock:
            self._catch_up()
            while held.number in self._open:
                number, rest = self._next, None
                if any(keep):
                    rest = Reservation(number, held.purpose, *keep, held.holder)
                if self._append(number, rest, usage):
                    return self._open.get(number)
                self._catch_up()
        return None

    def totals(self) -> LedgerTotals:
        """Everything spent so far, by everyone."""
        with self._lock:
            self._catch_up()
            purposes = {}
            for purpose, confirmed in self._confirmed.items():
                waiting = [r for r in self._open.values() if r.purpose == purpose]
                steps, resets = sum(r.steps for r in waiting), sum(r.resets for r in waiting)
                price = self._cost(steps, resets)
                purposes[purpose] = PurposeTotals(
                    confirmed.steps + steps,
                    confirmed.resets + resets,
                    confirmed.seconds,
                    self._cost(confirmed.steps, confirmed.resets) + price,
                    unconfirmed_steps=steps,
                    unconfirmed_resets=resets,
                    unconfirmed_price=price,
                )
            spent = sum(purposes[p].steps for p in BUDGETED)
            left = None if self.budget.steps is None else max(0, self.budget.steps - spent)
            waiting_all = tuple(self._open.values())
            return LedgerTotals(self.id, self.price.currency, purposes, waiting_all, spent, left)

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
        if opening and self._next - first >= SNAPSHOT_EVERY:  # whoever should have written it died
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
            self._confirmed = {p: _Sum(**state["confirmed"][p]) for p in PURPOSES}
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
            record["confirm"] = {
                "of": held.number,
                "steps": confirm.steps,
                "resets": confirm.resets,
                "seconds": round(confirm.seconds, 6),
            }
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
            done = self._confirmed[held.purpose]
            done.steps += confirm["steps"]
            done.resets += confirm["resets"]
            done.seconds += confirm["seconds"]
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

    def _spent(self, purposes: tuple[str, ...], confirming: Usage | None = None) -> int:
        """Steps spent, the unconfirmed included, as if `confirming` were confirmed."""
        waiting = [r for r in self._open.values() if r.purpose in purposes]
        total = sum(self._confirmed[p].steps for p in purposes) + sum(r.steps for r in waiting)
        if confirming is not None and any(
            r.number == confirming.reservation.number for r in waiting
        ):
            total -= confirming.reservation.steps - confirming.steps
        return total

    def _remaining(self, purpose: str, confirming: Usage | None) -> int | None:
        limits = self._limits(purpose)
        left = (bound - self._spent(purposes, confirming) for _, purposes, bound in limits)
        return min(left, default=None)

    def _refusal(self, purpose: str, steps: int, left: int) -> str:
        limits = self._limits(purpose)
        name, purposes, bound = min(limits, key=lambda limit: limit[2] - self._spent(limit[1]))
        unconfirmed = sum(r.steps for r in self._open.values() if r.purpose in purposes)
        return (
            f"ledger {self.id!r}: {name}={bound} is spent ({self._spent(purposes)} real steps by"
            f" {' and '.join(purposes)}, {unconfirmed} of them unconfirmed; {steps} more requested"
            f" for {purpose}, {left} left); raise it or use another ledger"
        )

    def _cost(self, steps: int, resets: int) -> float:
        return steps * self.price.per_step + resets * self.price.per_reset


def _numbers(names: list[str]) -> list[int]:
    """The record or snapshot numbers among a folder's names, ascending."""
    return sorted(int(match[1]) for name in names if (match := RECORD.fullmatch(name)))
