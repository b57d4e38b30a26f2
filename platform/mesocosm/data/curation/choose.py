"""Operations that choose among sound episodes: filters, balance, mix, failures put back, and what
is held out for validation.

What balances or mixes chooses among the episodes to train on: validation is left as it is. Episodes
are taken whole, in an order that the seed draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesocosm.data.curation.groups import Groups
from mesocosm.data.curation.table import TRAIN, Step
from mesocosm.errors import UsageError

Array = NDArray[Any]
CHOICES = ("length", "return", "where", "balance", "mix")
"""What these dropped may be put back: it was chosen against, not broken."""
BALANCE, MIX, FAILURES, HOLD_OUT = range(0xC0, 0xC4)
"""Salts of the orders in which episodes are drawn."""


@dataclass
class Between:
    """`min` and `max`, either of which may be left out."""

    min: float | None = None
    max: float | None = None

    def check(self) -> None:
        if self.min is None and self.max is None:
            raise UsageError("neither min nor max is given; give one of them at least")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise UsageError(f"min={self.min:g} is above max={self.max:g}; exchange them")

    def filter(self, step: Step, episodes: Array, values: Array, what: str) -> None:
        low = values < (-math.inf if self.min is None else self.min)
        high = values > (math.inf if self.max is None else self.max)
        step.drop(episodes[low], f"{what} below {self.min:g}" if self.min is not None else "")
        step.drop(episodes[high], f"{what} above {self.max:g}" if self.max is not None else "")


@dataclass
class Length(Between):
    """Episodes of `min` to `max` transitions."""

    def run(self, step: Step) -> None:
        episodes = step.episodes()
        self.filter(step, episodes, step.table.length[episodes], "length")


@dataclass
class Return(Between):
    """Episodes whose sum of rewards, as it was logged, is from `min` to `max`."""

    def run(self, step: Step) -> None:
        episodes = step.episodes()
        self.filter(step, episodes, step.dataset.table["total_reward"][episodes], "return")


@dataclass
class Where:
    """Episodes that have `by` (behaviour, outcome, success, dataset, task, or a part of the task)
    among `keep`, or not among `drop`.
    """

    by: str = ""
    keep: list[str] = field(default_factory=list)
    drop: list[str] = field(default_factory=list)
    bins: int = 5

    def check(self) -> None:
        if bool(self.keep) == bool(self.drop):
            raise UsageError("give either keep or drop, a list of values")

    def run(self, step: Step) -> None:
        episodes = step.episodes()
        groups = Groups.of(step, episodes, self.by, self.bins)
        named = groups.named(self.keep or self.drop, "keep" if self.keep else "drop")
        for number in groups.present():
            if (number in named) == bool(self.drop):
                step.drop(episodes[groups.codes == number], groups.say(number))


@dataclass
class Balance:
    """No group by `by` has more than `most` times the transitions to train on that the smallest
    has.
    """

    by: str = "behaviour"
    most: float = 1.0
    bins: int = 5

    def check(self) -> None:
        if not (math.isfinite(self.most) and self.most >= 1):
            raise UsageError(
                f"most={self.most} would leave a group less than the smallest has; give at least 1"
            )

    def run(self, step: Step) -> None:
        episodes = step.drawn(step.episodes(TRAIN), BALANCE)
        groups = Groups.of(step, episodes, self.by, self.bins)
        lengths = step.table.length[episodes]
        sizes = {number: int(lengths[groups.codes == number].sum()) for number in groups.present()}
        for number in sizes:
            here = groups.codes == number
            limit = math.floor(self.most * min(sizes.values()))
            over = _beyond(lengths[here], limit)
            step.drop(
                np.sort(episodes[here][over]),
                f"more of {groups.say(number)} than {self.most:g} times the smallest group's"
                f" {min(sizes.values())}",
            )


@dataclass
class Mix:
    """The datasets' transitions to train on stand as `weights`, in the order of data.datasets: as
    many as there can be without taking one twice.
    """

    weights: list[float] = field(default_factory=list)
    transitions: int | None = None
    """At most so many in all."""

    def check(self) -> None:
        if (
            not self.weights
            or not all(math.isfinite(w) and w >= 0 for w in self.weights)
            or not sum(self.weights)
        ):
            raise UsageError(
                f"weights={self.weights} mix nothing; give a number of at least 0 for each dataset,"
                " one of them above 0"
            )
        if self.transitions is not None and self.transitions < 1:
            raise UsageError(
                f"transitions={self.transitions} leaves nothing; give at least 1, or null"
            )

    def run(self, step: Step) -> None:
        ids = step.dataset.ids
        if len(self.weights) != len(ids):
            raise UsageError(
                f"weights={self.weights} are {len(self.weights)} for {len(ids)} datasets; give one"
                f" for each of data.datasets={ids}"
            )
        episodes = step.drawn(step.episodes(TRAIN), MIX)
        part, lengths = step.dataset.part[episodes], step.table.length[episodes]
        there = [int(lengths[part == i].sum()) for i in range(len(ids))]
        unit = min(
            have / weight for have, weight in zip(there, self.weights, strict=True) if weight
        )
        if self.transitions is not None:
            unit = min(unit, self.transitions / sum(self.weights))
        for i, weight in enumerate(self.weights):
            here = part == i
            limit = math.floor(weight * unit + 1e-6)
            over = _beyond(lengths[here], limit)
            step.drop(
                np.sort(episodes[here][over]),
                f"more of dataset {ids[i]} than the {limit} transitions of its weight {weight:g}",
            )


def _beyond(lengths: Array, limit: int) -> Array:
    """[n] bool: what comes after the first episodes of at most `limit` transitions together; the
    first is always kept where the limit is above 0.
    """
    over = np.cumsum(lengths) > limit
    if limit > 0 and len(over):
        over[0] = False
    return np.asarray(over)


@dataclass
class Failures:
    """At least `share` of the episodes to train on failed: those that earlier filters, balance or
    mix dropped are put back, as many as it takes. Failed is what `success` says, or with `below` a
    return less than that.
    """

    share: float = 0.1
    below: float | None = None

    def check(self) -> None:
        if not 0 < self.share < 1:
            raise UsageError(
                f"share={self.share} is no share of the episodes; give a number above 0 and below 1"
            )

    def run(self, step: Step) -> None:
        table = step.table
        success = step.dataset.table["success"]
        failed = (
            success == 0 if self.below is None else step.dataset.table["total_reward"] < self.below
        )
        if self.below is None and not (success >= 0).any():
            raise UsageError(
                "no episode says whether it succeeded; collect with reality.success, or give below,"
                " a return under which an episode has failed"
            )
        kept = step.episodes(TRAIN)
        have = int(failed[kept].sum())
        need = max(0, math.ceil((self.share * len(kept) - have) / (1 - self.share) - 1e-9))
        chosen_against = [0, *(event.operation for event in table.events if event.op in CHOICES)][
            1:
        ]
        there = np.flatnonzero(
            ~table.kept & failed & (table.split == TRAIN) & np.isin(table.by, chosen_against)
        )
        if need > len(there):
            raise UsageError(
                f"share={self.share} wants {have + need} failed episodes and there are {have}, with"
                f" {len(there)} to put back; lower it, collect failures, or drop successes by {{op:"
                " balance, by: success, most: ...}"
            )
        step.put_back(
            np.sort(step.drawn(there, FAILURES)[:need]), "failed, and dropped only by choice"
        )


@dataclass
class HoldOut:
    """What is for validation, instead of what the inputs say; nothing is dropped. `by`: random
    episodes; time, the last ones; or whole groups by behaviour, outcome, success, dataset, task or
    a part of the task: those named in `values`, or drawn ones.
    """

    by: str = "random"
    share: float = 0.1
    """Of the episodes; of groups that are drawn at most so many of the episodes, but one group at
    least.
    """
    values: list[str] = field(default_factory=list)
    bins: int = 5

    def check(self) -> None:
        if not 0 <= self.share < 1:
            raise UsageError(
                f"share={self.share} is no share of the episodes; give a number from 0 to below 1"
            )
        if self.values and self.by in ("random", "time"):
            raise UsageError(
                f"values={self.values} name no group where by={self.by!r}; leave them out, or hold"
                " out by task or behaviour"
            )

    def run(self, step: Step) -> None:
        episodes = step.episodes()
        count = min(math.ceil(self.share * len(episodes) - 1e-9), len(episodes) - 1)
        if self.by == "random":
            step.hold_out(step.drawn(episodes, HOLD_OUT)[:count])
        elif self.by == "time":
            order = np.lexsort((step.dataset.table["index"][episodes], step.dataset.part[episodes]))
            step.hold_out(episodes[order[len(order) - count :]])
        else:
            groups = Groups.of(step, episodes, self.by, self.bins)
            named = (
                groups.named(self.values, "values")
                if self.values
                else self._drawn(step, groups, episodes, count)
            )
            step.note("held out: " + ", ".join(groups.say(number) for number in sorted(named)))
            step.hold_out(episodes[np.isin(groups.codes, list(named))])

    def _drawn(self, step: Step, groups: Groups, episodes: Array, count: int) -> set[int]:
        """Whole groups, in the order in which their first drawn episode comes."""
        if not count:
            return set()
        order = groups.codes[np.searchsorted(episodes, step.drawn(episodes, HOLD_OUT))]
        chosen: set[int] = set()
        held = 0
        for number in dict.fromkeys(order.tolist()):
            size = int((groups.codes == number).sum())
            if len(chosen) < len(groups.present()) - 1 and (not chosen or held + size <= count):
                chosen.add(number)
                held += size
        if not chosen:
            raise UsageError(
                f"by={self.by!r} makes one group of all episodes, so none can be held out; hold out"
                " by something else"
            )
        return chosen
