"""Operations that choose among sound episodes: filters, balance, mix, failures put back, hold-out.

Balance and mix choose among the episodes to train on: validation stays as it is. Episodes are taken
whole, in an order drawn by the seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesocosm.data.curation.groups import Groups, groups
from mesocosm.data.curation.table import TRAIN, Operation, Step
from mesocosm.errors import UsageError

Array = NDArray[Any]
CHOICES = ("length", "return", "where", "balance", "mix")
"""Episodes that these drop may be put back: they are not broken."""
BALANCE, MIX, FAILURES, HOLD_OUT = range(0xC0, 0xC4)
"""Salts of the orders in which episodes are drawn."""


@dataclass
class Between(Operation):
    """`min` and `max`, either of which may be left out."""

    min: float | None = None
    max: float | None = None

    def check(self) -> None:
        if self.min is None and self.max is None:
            raise UsageError("min or max must be a number, got neither")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise UsageError(f"min must be <= max={self.max:g}, got {self.min:g}")

    def filter(self, step: Step, episodes: Array, values: Array, name: str) -> None:
        if self.min is not None:
            step.drop(episodes[values < self.min], f"{name} below {self.min:g}")
        if self.max is not None:
            step.drop(episodes[values > self.max], f"{name} above {self.max:g}")


@dataclass
class Length(Between):
    """Keep episodes of `min` to `max` transitions."""

    def run(self, step: Step) -> None:
        episodes = step.episodes()
        self.filter(step, episodes, step.table.length[episodes], "length")


@dataclass
class Return(Between):
    """Keep episodes whose sum of logged rewards is `min` to `max`."""

    def run(self, step: Step) -> None:
        episodes = step.episodes()
        self.filter(step, episodes, step.dataset.table["total_reward"][episodes], "return")


@dataclass
class Where(Operation):
    """Keep episodes whose `by` (behaviour, outcome, success, dataset, task, or a part of the task)
    is in `keep`, or is not in `drop`.
    """

    by: str = ""
    keep: list[str] = field(default_factory=list)
    drop: list[str] = field(default_factory=list)
    bins: int = 5

    def check(self) -> None:
        if bool(self.keep) == bool(self.drop):
            raise UsageError("keep or drop must be a list of values, got both or neither")

    def run(self, step: Step) -> None:
        episodes = step.episodes()
        by = groups(step, episodes, self.by, self.bins)
        named = by.named(self.keep or self.drop, "keep" if self.keep else "drop")
        for number in by.present():
            if (number in named) == bool(self.drop):
                step.drop(episodes[by.codes == number], by.name(number))


@dataclass
class Balance(Operation):
    """Give no group by `by` more than `most` times the training transitions of the smallest."""

    by: str = "behaviour"
    most: float = 1.0
    bins: int = 5

    def run(self, step: Step) -> None:
        episodes = step.drawn(step.episodes(TRAIN), BALANCE)
        by = groups(step, episodes, self.by, self.bins)
        lengths = step.table.length[episodes]
        sizes = {number: int(lengths[by.codes == number].sum()) for number in by.present()}
        smallest = min(sizes.values(), default=0)
        for number in sizes:
            here = by.codes == number
            over = _beyond(lengths[here], math.floor(self.most * smallest))
            limit = f"{self.most:g} times the smallest group's {smallest}"
            step.drop(np.sort(episodes[here][over]), f"more of {by.name(number)} than {limit}")


@dataclass
class Mix(Operation):
    """Give the datasets' training transitions the shares `weights`, in the order of data.datasets:
    as many as possible without taking one twice.
    """

    weights: list[float] = field(default_factory=list)
    transitions: int | None = None
    """At most this many in all."""

    def check(self) -> None:
        sound = all(math.isfinite(weight) and weight >= 0 for weight in self.weights)
        if not sound or sum(self.weights) == 0:
            raise UsageError(
                f"weights must be numbers >= 0 for each dataset, one above 0, got {self.weights}"
            )

    def run(self, step: Step) -> None:
        ids = step.dataset.ids
        if len(self.weights) != len(ids):
            raise UsageError(
                f"weights must be one number for each of data.datasets={ids}, got {self.weights}"
            )
        episodes = step.drawn(step.episodes(TRAIN), MIX)
        part, lengths = step.dataset.part[episodes], step.table.length[episodes]
        sizes = np.bincount(part, lengths, len(ids)).tolist()
        unit = min(n / weight for n, weight in zip(sizes, self.weights, strict=True) if weight)
        if self.transitions is not None:
            unit = min(unit, self.transitions / sum(self.weights))
        for i, weight in enumerate(self.weights):
            here = part == i
            limit = math.floor(weight * unit + 1e-6)
            step.drop(
                np.sort(episodes[here][_beyond(lengths[here], limit)]),
                f"more of dataset {ids[i]} than the {limit} transitions of its weight {weight:g}",
            )


def _beyond(lengths: Array, limit: int) -> Array:
    """[n] bool: the episodes after the first ones of at most `limit` transitions together; the
    first is always kept where the limit is above 0.
    """
    over = np.cumsum(lengths) > limit
    over[:1] &= limit <= 0
    return np.asarray(over)


@dataclass
class Failures(Operation):
    """Put back failed episodes that filters, balance or mix dropped, until at least `share` of the
    episodes to train on failed. Failed is what `success` says, or with `below` a return less than
    that.
    """

    share: float = 0.1
    below: float | None = None

    def run(self, step: Step) -> None:
        table, success = step.table, step.dataset.table["success"]
        if self.below is not None:
            failed = step.dataset.table["total_reward"] < self.below
        elif (success >= 0).any():
            failed = success == 0
        else:
            raise UsageError(
                "below must be a return, as no episode says whether it succeeded; or collect with"
                " reality.success"
            )
        kept = step.episodes(TRAIN)
        have = int(failed[kept].sum())
        need = max(0, math.ceil((self.share * len(kept) - have) / (1 - self.share) - 1e-9))
        choices = [event.operation for event in table.events if event.op in CHOICES]
        dropped = np.flatnonzero(
            ~table.kept & failed & (table.split == TRAIN) & np.isin(table.by, choices)
        )
        if need > len(dropped):
            raise UsageError(
                f"share={self.share} needs {have + need} failed episodes, got {have} and"
                f" {len(dropped)} to put back; lower it, collect failures, or drop successes by"
                " {op: balance, by: success, most: ...}"
            )
        chosen = np.sort(step.drawn(dropped, FAILURES)[:need])
        step.put_back(chosen, "failed, and dropped only by choice")


@dataclass
class HoldOut(Operation):
    """Choose the episodes for validation, instead of the inputs' split; nothing is dropped. `by`:
    random episodes; time, the last ones; or whole groups by behaviour, outcome, success, dataset,
    task or a part of the task: those named in `values`, or drawn ones.
    """

    by: str = "random"
    share: float = 0.1
    """Of the episodes; drawn groups hold at most this share, but at least one group."""
    values: list[str] = field(default_factory=list)
    bins: int = 5

    def check(self) -> None:
        if self.values and self.by in ("random", "time"):
            raise UsageError(f"values must be empty where by={self.by!r}, got {self.values}")

    def run(self, step: Step) -> None:
        episodes = step.episodes()
        count = min(math.ceil(self.share * len(episodes) - 1e-9), len(episodes) - 1)
        if self.by == "random":
            step.hold_out(step.drawn(episodes, HOLD_OUT)[:count])
        elif self.by == "time":
            order = np.lexsort((step.dataset.table["index"][episodes], step.dataset.part[episodes]))
            step.hold_out(episodes[order[len(order) - count :]])
        else:
            by = groups(step, episodes, self.by, self.bins)
            chosen = by.named(self.values, "values")
            chosen = chosen or self._drawn(step, by, episodes, count)
            step.notes.append("held out: " + ", ".join(by.name(i) for i in sorted(chosen)))
            step.hold_out(episodes[np.isin(by.codes, list(chosen))])

    def _drawn(self, step: Step, by: Groups, episodes: Array, count: int) -> set[int]:
        """Whole groups, in the order in which their first drawn episode comes."""
        if not count:
            return set()
        order = by.codes[np.searchsorted(episodes, step.drawn(episodes, HOLD_OUT))]
        chosen: set[int] = set()
        held = 0
        for number in dict.fromkeys(order.tolist()):
            size = int((by.codes == number).sum())
            if len(chosen) < len(by.present()) - 1 and (not chosen or held + size <= count):
                chosen.add(number)
                held += size
        if not chosen:
            raise UsageError(
                f"by must make more than one group of the episodes, got one by {self.by!r}"
            )
        return chosen
