"""Episodes in groups: by behaviour, outcome, success, dataset or task."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesocosm.data.curation.table import Step
from mesocosm.data.format.manifest import OUTCOMES
from mesocosm.errors import UsageError, nearest

Array = NDArray[Any]
BLOCK = 4096
KINDS = ["behaviour", "outcome", "success", "dataset"]


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
    number of the task with more than `bins` values is cut into as many ranges.

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
    """By one part of the task: a reset option, or the value of a key in the first observation."""
    dataset = step.dataset
    for i, option in enumerate(dataset.options):
        if option.name == name:
            if option.values is None:
                return _ranges(name, dataset.option_numbers[episodes, i], bins)
            return Groups(name, list(map(str, option.values)), dataset.option_values[episodes, i])
    parts: list[Groups] = []
    for leaf in dataset.observation_codec.matching(name):
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
