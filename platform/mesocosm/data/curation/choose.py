"""Operations that choose among sound episodes: filters, balance, mix, failures put back, hold-out.

Balance and mix choose among the episodes to train on: validation stays as it is. Episodes are taken
whole, in an order drawn by the seed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesocosm.data.curation.table import TRAIN, Operation, Step
from mesocosm.datasets.manifest import OUTCOMES
from mesocosm.errors import UsageError, nearest

Array = NDArray[Any]
CHOICES = ("length", "return", "where", "balance", "mix")
"""Episodes that these drop may be put back: they are not broken."""
BALANCE, MIX, FAILURES, HOLD_OUT = range(0xC0, 0xC4)
"""Salts of the orders in which episodes are drawn."""
KINDS = ["behaviour", "outcome", "success", "dataset"]
"""The grouping keys that every dataset has."""
BLOCK = 4096


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
    """The most training transitions in all."""

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

    def check(self) -> None:
        if not self.share > 0:
            raise UsageError(f"share must be > 0, got {self.share}")

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
        retained = step.episodes(TRAIN)
        have = int(failed[retained].sum())
        need = max(0, math.ceil((self.share * len(retained) - have) / (1 - self.share) - 1e-9))
        choices = [event.operation for event in table.events if event.op in CHOICES]
        dropped = np.flatnonzero(
            ~table.retained & failed & (table.split == TRAIN) & np.isin(table.by, choices)
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
    """Share of the episodes. Drawn groups hold at most this share, but at least one is drawn."""
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


# -- groups of episodes


@dataclass(frozen=True)
class Groups:
    """The groups of some episodes."""

    by: str
    labels: list[str]
    codes: Array
    """[n] positions in `labels`"""

    def name(self, number: int) -> str:
        return f"{self.by} {self.labels[number]}"

    def present(self) -> list[int]:
        return [int(number) for number in np.unique(self.codes)]

    def named(self, labels: Sequence[str], parameter: str) -> set[int]:
        """The groups with these labels. Raises UsageError where there is no such group."""
        for label in labels:
            if label not in self.labels:
                few = f"; there are {', '.join(map(repr, self.labels[:12]))}"
                raise UsageError(
                    f"{parameter} names {label!r}, which is no {self.by} of these"
                    f" episodes{nearest(label, self.labels) or few}"
                )
        return {self.labels.index(label) for label in labels}


def groups(step: Step, episodes: Array, by: str, bins: int) -> Groups:
    """Group episodes [n] by behaviour, outcome, success, dataset, task, or a part of the task. A
    number of the task with more than `bins` values is cut into `bins` ranges.

    Raises:
        UsageError: `by` is none of these.
    """
    dataset, table = step.dataset, step.table
    task = dataset.environment.task
    if by == "behaviour":
        names = np.empty(len(dataset.table), object)
        for part, manifest in enumerate(dataset.manifests):
            here = dataset.part == part
            behaviours = np.array([behaviour.name for behaviour in manifest.behaviours], object)
            names[here] = behaviours[dataset.table["behaviour"][here]]
        labels, codes = np.unique(names[episodes], return_inverse=True)
        return Groups(by, labels.tolist(), codes)
    if by == "outcome":
        return Groups(by, list(OUTCOMES), table.outcome()[episodes].astype(np.int64))
    if by == "success":
        return Groups(by, ["unknown", "failure", "success"], table.success()[episodes] + 1)
    if by == "dataset":
        return Groups(by, dataset.ids, dataset.part[episodes])
    known = [*KINDS, *(["task", *task] if task else [])]
    if by not in known:
        message = f"by must be one of {', '.join(known)}, got {by!r}{nearest(by, known)}"
        raise UsageError(message + ("" if task else "; the environment has no task"))
    parts = [_part(step, episodes, name, bins) for name in (task if by == "task" else [by])]
    if len(parts) > 1:
        parts = [
            Groups(by, [part.name(i) for i in range(len(part.labels))], part.codes)
            for part in parts
        ]
    return _joined(by, parts, ", ")


def _joined(by: str, parts: Sequence[Groups], separator: str) -> Groups:
    """The combinations of groups."""
    every = np.stack([part.codes for part in parts], 1)
    distinct, codes = np.unique(every, axis=0, return_inverse=True)
    labels = [
        separator.join(part.labels[code] for part, code in zip(parts, row, strict=True))
        for row in distinct.tolist()
    ]
    return Groups(by, labels, codes.reshape(-1))


def _part(step: Step, episodes: Array, name: str, bins: int) -> Groups:
    """Group by one part of the task: a reset option, or the value of a key in the first
    observation.
    """
    dataset = step.dataset
    for i, option in enumerate(dataset.options):
        if option.name == name:
            if option.values is None:
                return _ranges(name, dataset.option_numbers[episodes, i], bins)
            return Groups(name, list(map(str, option.values)), dataset.option_values[episodes, i])
    parts: list[Groups] = []
    for leaf in dataset.observation_codec.matching(name):
        if leaf.image is not None:
            raise UsageError(f"{leaf.name} is an image, which has no groups; name another key")
        if leaf.text is not None:
            texts = _first(step, episodes, "obs_text", slice(leaf.text, leaf.text + 1))[:, 0]
            labels, codes = np.unique(texts.astype(str), return_inverse=True)
            parts.append(Groups(name, labels.tolist(), codes.reshape(-1)))
            continue
        numbers = _first(step, episodes, "obs_num", leaf.numbers)
        parts += [_ranges(name, column, bins) for column in numbers.T]
        start = np.zeros(len(leaf.cardinalities), int) if leaf.start is None else leaf.start
        codes = _first(step, episodes, "obs_cat", leaf.categories).astype(np.int64)
        for column, low, size in zip(codes.T, start.tolist(), leaf.cardinalities, strict=True):
            parts.append(Groups(name, [str(low + i) for i in range(size)], column))
    return _joined(name, parts, " ")


def _first(step: Step, episodes: Array, name: str, columns: slice) -> Array:
    """[n, columns] of the episodes' first rows."""
    table = step.dataset.table[episodes]
    blocks = [table[start : start + BLOCK] for start in range(0, len(table), BLOCK)]
    return np.concatenate(
        [step.dataset.gather(name, b["shard"], b["first_row"])[:, columns] for b in blocks]
    )


def _ranges(name: str, values: Array, bins: int) -> Groups:
    """One group a value where there are at most `bins`, else ranges of equal width."""
    distinct, codes = np.unique(values, return_inverse=True)
    if len(distinct) <= bins:
        return Groups(name, [f"{value:g}" for value in distinct], codes.reshape(-1))
    edges = np.linspace(distinct[0], distinct[-1], bins + 1)
    labels = [f"{low:g}..{high:g}" for low, high in itertools.pairwise(edges)]
    return Groups(name, labels, np.searchsorted(edges[1:-1], values, "right"))
