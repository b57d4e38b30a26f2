"""Episodes in groups: by who acted, how they ended, where they are from, or what their task was."""

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


@dataclass(frozen=True)
class Groups:
    by: str
    labels: list[str]
    codes: Array
    """[n] positions in `labels` of the episodes asked for"""

    @staticmethod
    def of(step: Step, episodes: Array, by: str, bins: int) -> Groups:
        """`bins`: into how many ranges of equal width a number is cut that has more values. Raises
        UsageError naming what there is to group by.
        """
        if bins < 1:
            raise UsageError(f"bins={bins} is no number of ranges; give at least 1")
        dataset, table = step.dataset, step.table
        task = dataset.environment.task
        if by == "behaviour":
            names = [
                np.array([b.name for b in m.behaviours])[
                    dataset.table["behaviour"][dataset.part == i]
                ]
                for i, m in enumerate(dataset.manifests)
            ]
            found, codes = np.unique(np.concatenate(names)[episodes], return_inverse=True)
            return Groups(by, [str(label) for label in found], codes.reshape(-1))
        if by == "outcome":
            return Groups(by, list(OUTCOMES), table.outcome()[episodes].astype(np.int64))
        if by == "success":
            return Groups(by, ["unknown", "failure", "success"], table.success()[episodes] + 1)
        if by == "dataset":
            return Groups(by, dataset.ids, dataset.part[episodes])
        if by != "task" and by not in task:
            there = [
                "behaviour",
                "outcome",
                "success",
                "dataset",
                *(["task", *task] if task else []),
            ]
            fix = nearest(by, there) or f"; there are {', '.join(there)}"
            raise UsageError(f"by={by!r} is nothing that these episodes are told apart by{fix}")
        if not task:
            raise UsageError(
                "by='task': the environment of these datasets has no task (reality.task is empty);"
                " group by something else"
            )
        parts = [_part(step, episodes, name, bins) for name in (task if by == "task" else [by])]
        distinct, codes = np.unique(
            np.stack([part.codes for part in parts], 1), axis=0, return_inverse=True
        )
        told = len(parts) > 1
        labels = [
            ", ".join(
                part.say(int(code)) if told else part.labels[code]
                for part, code in zip(parts, row, strict=True)
            )
            for row in distinct
        ]
        return Groups(by, labels, codes.reshape(-1))

    def say(self, number: int) -> str:
        return f"{self.by} {self.labels[number]}"

    def present(self) -> list[int]:
        return [int(number) for number in np.unique(self.codes)]

    def named(self, labels: Sequence[str], where: str) -> set[int]:
        """Raises UsageError where one is no group."""
        for label in labels:
            if label not in self.labels:
                fix = (
                    nearest(label, self.labels)
                    or f"; there are {', '.join(map(repr, self.labels[:12]))}"
                )
                raise UsageError(
                    f"{where} names {label!r}, which is no {self.by} of these episodes{fix}"
                )
        return {self.labels.index(label) for label in labels}


def _part(step: Step, episodes: Array, name: str, bins: int) -> Groups:
    """By one part of the task: a reset option, or what a key of the first observation holds."""
    dataset = step.dataset
    for i, option in enumerate(dataset.options):
        if option.name == name:
            if option.values is None:
                return _ranges(name, dataset.option_numbers[episodes, i], bins)
            return Groups(
                name, [str(value) for value in option.values], dataset.option_values[episodes, i]
            )
    columns: list[Array] = []
    labels: list[list[str]] = []
    for leaf in dataset.observation_codec.matching(name):
        for j in range(leaf.numbers.start, leaf.numbers.stop):
            found = _ranges(name, _first(step, episodes, "obs_num", j), bins)
            columns.append(found.codes)
            labels.append(found.labels)
        for j, at in enumerate(range(leaf.categories.start, leaf.categories.stop)):
            values = _first(step, episodes, "obs_cat", at).astype(np.int64)
            columns.append(values)
            begin = 0 if leaf.start is None else int(leaf.start[j])
            labels.append([str(value + begin) for value in range(leaf.cardinalities[j])])
    distinct, codes = np.unique(np.stack(columns, 1), axis=0, return_inverse=True)
    return Groups(
        name,
        [
            " ".join(label[code] for label, code in zip(labels, row, strict=True))
            for row in distinct
        ],
        codes.reshape(-1),
    )


def _first(step: Step, episodes: Array, name: str, column: int) -> Array:
    """[n] of the episodes' first rows"""
    table = step.dataset.table
    blocks = [episodes[start : start + BLOCK] for start in range(0, len(episodes), BLOCK)]
    return np.concatenate(
        [
            step.dataset.gather(name, table["shard"][some], table["first_row"][some])[:, column]
            for some in blocks
        ]
    )


def _ranges(name: str, values: Array, bins: int) -> Groups:
    """Each value for itself where there are at most `bins`, else ranges of equal width from the
    least to the greatest.
    """
    distinct, codes = np.unique(values, return_inverse=True)
    if len(distinct) <= bins:
        return Groups(name, [f"{value:g}" for value in distinct], codes.reshape(-1))
    edges = np.linspace(distinct[0], distinct[-1], bins + 1)
    return Groups(
        name,
        [f"{low:g}..{high:g}" for low, high in itertools.pairwise(edges)],
        np.searchsorted(edges[1:-1], values, "right"),
    )
