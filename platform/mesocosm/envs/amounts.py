"""Amounts of reality: what is reserved, used and spent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from mesocosm.envs.config import BudgetConfig, PriceConfig

PURPOSES = ("collect", "baseline", "select", "judge", "play")
BUDGETED = ("collect", "select", "play")
"""The purposes that `reality.budget` bounds together."""


@dataclass(frozen=True)
class Amount:
    """A use of reality."""

    steps: int = 0
    resets: int = 0
    seconds: float = 0.0
    """Measured inside step and reset."""
    duration: float = 0.0
    """Seconds of `info["duration"]`, which `reality.price.per_second` prices."""
    longest: float = 0.0
    """The longest duration of a single step or reset."""
    text_bytes: int = 0
    """UTF-8 bytes of the texts that were observed and acted."""

    def __add__(self, other: Amount) -> Amount:
        return Amount(
            self.steps + other.steps,
            self.resets + other.resets,
            self.seconds + other.seconds,
            self.duration + other.duration,
            max(self.longest, other.longest),
            self.text_bytes + other.text_bytes,
        )

    def rounded(self) -> Amount:
        """The duration rounded to microseconds, as in the journal."""
        times = {key: round(getattr(self, key), 6) for key in ("seconds", "duration", "longest")}
        return replace(self, **times)


NOTHING = Amount()


@dataclass(frozen=True)
class Reservation:
    """Permission for `steps` real steps and `resets` resets of `duration` seconds in all.

    `number` is that of its record.
    """

    number: int
    purpose: str
    steps: int
    resets: int
    holder: str = ""
    duration: float = 0.0


@dataclass(frozen=True)
class Usage:
    """The used part of a reservation; the fields are those of `Amount`."""

    reservation: Reservation
    steps: int
    resets: int = 0
    seconds: float = 0.0
    duration: float = 0.0
    longest: float = 0.0
    text_bytes: int = 0

    @property
    def amount(self) -> Amount:
        return Amount(**{key: getattr(self, key) for key in Amount.__dataclass_fields__})

    @staticmethod
    def of(reservation: Reservation, amount: Amount) -> Usage:
        return Usage(reservation, **vars(amount))


def price_of(price: PriceConfig, amount: Amount) -> float:
    """The price of an amount."""
    return price.of(amount.steps, amount.resets, amount.duration)


def time_price(price: PriceConfig, calls: int) -> str:
    """The price of the time of `calls` steps and resets as text, which a dry run appends to the
    price of their number. Empty if time has no price.
    """
    if not price.per_second:
        return ""
    text = f" and {price.per_second:g} a second"
    if price.longest_s is not None:
        most = price.of(0, 0, calls * price.longest_s)
        text += f" of at most {price.longest_s:g} a step: up to {most:g} {price.currency} more"
    return text


def held_by(reservations: Iterable[Reservation], *purposes: str) -> Amount:
    """The sum of the reservations of some purposes."""
    held = [r for r in reservations if r.purpose in purposes]
    steps, resets = sum(r.steps for r in held), sum(r.resets for r in held)
    return Amount(steps, resets, duration=sum(r.duration for r in held))


@dataclass(frozen=True)
class PurposeTotals:
    """The total of one purpose. Steps, resets, duration and price include the unconfirmed part."""

    steps: int = 0
    resets: int = 0
    seconds: float = 0.0
    duration: float = 0.0
    text_bytes: int = 0
    price: float = 0.0
    unconfirmed_steps: int = 0
    unconfirmed_resets: int = 0
    unconfirmed_duration: float = 0.0
    unconfirmed_price: float = 0.0


@dataclass(frozen=True)
class LedgerTotals:
    ledger: str
    currency: str
    purposes: dict[str, PurposeTotals]
    """The amounts by purpose, for each of PURPOSES."""
    unconfirmed: tuple[Reservation, ...]
    """Open reservations, of crashed processes or of live ones."""
    spent: int
    """Steps of the BUDGETED purposes, the unconfirmed included."""
    remaining: int | None
    """Steps left in the budget of the BUDGETED purposes; None without a budget."""
    spent_money: float
    """The price of the BUDGETED purposes, the unconfirmed included."""
    remaining_money: float | None
    """Money left in the budget of the BUDGETED purposes; None without a budget of money."""

    @staticmethod
    def of(
        ledger: str,
        price: PriceConfig,
        budget: BudgetConfig,
        confirmed: Mapping[str, Amount],
        held: tuple[Reservation, ...],
    ) -> LedgerTotals:
        """The totals of the `confirmed` amounts of each purpose and of the open reservations."""
        purposes = {}
        for purpose, amount in confirmed.items():
            waiting = held_by(held, purpose)
            purposes[purpose] = PurposeTotals(
                amount.steps + waiting.steps,
                amount.resets + waiting.resets,
                amount.seconds,
                amount.duration + waiting.duration,
                amount.text_bytes,
                price_of(price, amount) + price_of(price, waiting),
                unconfirmed_steps=waiting.steps,
                unconfirmed_resets=waiting.resets,
                unconfirmed_duration=waiting.duration,
                unconfirmed_price=price_of(price, waiting),
            )
        steps = sum(purposes[p].steps for p in BUDGETED)
        money = sum(purposes[p].price for p in BUDGETED)
        return LedgerTotals(
            ledger,
            price.currency,
            purposes,
            held,
            steps,
            None if budget.steps is None else max(0, budget.steps - steps),
            money,
            None if budget.money is None else max(0.0, budget.money - money),
        )

    @property
    def steps(self) -> int:
        """Real steps of all purposes."""
        return sum(p.steps for p in self.purposes.values())

    @property
    def price(self) -> float:
        return sum(p.price for p in self.purposes.values())

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "steps": self.steps, "price": self.price}
