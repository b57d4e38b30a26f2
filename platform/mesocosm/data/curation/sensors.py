"""Operations on broken sensors: stuck and saturated ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesocosm.data.curation.scan import EpisodePiece, Rows
from mesocosm.data.curation.table import Operation, Step
from mesocosm.datasets.dataset import Dataset
from mesocosm.errors import UsageError, nearest

Array = NDArray[Any]


@dataclass
class Stuck(Operation):
    """Drop episodes in which a number of the observation does not change for `steps` consecutive
    steps though it otherwise does: in fewer than half of the episodes that are as long. `keep`:
    none of the episode, or the part before.
    """

    steps: int = 20
    keep: str = "none"
    dimensions: list[str] = field(default_factory=list)
    """The numbers to check (`observation[3]`), whether or not they otherwise change. Empty: all
    that otherwise change.
    """

    def check(self) -> None:
        if self.keep not in ("none", "before"):
            fix = nearest(self.keep, ["none", "before"])
            raise UsageError(f"keep must be 'none' or 'before', got {self.keep!r}{fix}")

    def run(self, step: Step) -> None:
        names = step.dataset.observation_codec.labels()
        _note_images(step)
        episodes = step.episodes()
        episodes = episodes[step.table.length[episodes] >= self.steps]
        if not names or not len(episodes):
            return
        flags = step.measure(partial(stuck, steps=self.steps), episodes)["stuck"]
        fault = f"unchanged for {self.steps} steps"
        columns = _columns(step, names, flags, self.dimensions, fault)
        since = np.zeros(len(episodes), np.int64)
        hit = flags[:, columns].any(1)
        if self.keep == "before" and hit.any():
            measure = partial(stuck_since, steps=self.steps, columns=columns)
            since[hit] = step.measure(measure, episodes[hit])["since"]
        for column, here in _by_first(flags, columns):
            reason = f"{names[column]} does not change for {self.steps} steps"
            step.cut(episodes[here], since[here], reason)


def stuck(dataset: Dataset, piece: EpisodePiece, steps: int) -> dict[str, Array]:
    """stuck [e, n] bool: a number of the observation is unchanged for `steps` consecutive steps."""
    rows = Rows(dataset, piece)
    unchanged = _unchanged(rows, rows["obs_num"], steps)
    return {"stuck": np.logical_or.reduceat(unchanged, rows.starts)}


def stuck_since(
    dataset: Dataset, piece: EpisodePiece, steps: int, columns: Array
) -> dict[str, Array]:
    """since [e]: the step from which the first of `columns` is stuck; each episode has one."""
    rows = Rows(dataset, piece)
    ends = np.flatnonzero(_unchanged(rows, rows["obs_num"][:, columns], steps).any(1))
    return {"since": ends[np.searchsorted(ends, rows.starts)] - steps - rows.starts}


def _unchanged(rows: Rows, values: Array, steps: int) -> Array:
    """[R, n] bool: the last `steps` steps, all of this episode, changed nothing."""
    same = np.zeros(values.shape, bool)
    same[1:] = values[1:] == values[:-1]
    same[rows.starts] = False
    counts = np.cumsum(same, axis=0, dtype=np.int32)
    unchanged = np.zeros(values.shape, bool)
    unchanged[steps:] = counts[steps:] - counts[:-steps] == steps
    return unchanged


@dataclass
class Saturated(Operation):
    """Drop episodes in which a number of the observation has its largest or smallest value of all
    kept episodes, to the bit, in more than `share` of the observations, though it otherwise does
    not: in fewer than half of the episodes.
    """

    share: float = 0.2
    dimensions: list[str] = field(default_factory=list)
    """The numbers to check (`observation[3]`), whether or not they are often at an extreme. Empty:
    all that otherwise are not.
    """

    def run(self, step: Step) -> None:
        names = step.dataset.observation_codec.labels()
        _note_images(step)
        episodes = step.episodes()
        if not names:
            return
        limits = step.measure(extremes, episodes)
        low, high = limits["low"].min(0), limits["high"].max(0)
        measure = partial(saturated, low=low, high=high, share=self.share)
        flags = step.measure(measure, episodes)["saturated"]
        columns = _columns(step, names, flags, self.dimensions, "at its limits")
        for column, here in _by_first(flags, columns):
            reason = (
                f"{names[column]} is at {low[column]:g} or {high[column]:g}, its limits, in more"
                f" than {self.share:g} of the episode"
            )
            step.drop(episodes[here], reason)


def extremes(dataset: Dataset, piece: EpisodePiece) -> dict[str, Array]:
    """low, high [1, n] of the observations' numbers."""
    values = Rows(dataset, piece)["obs_num"]
    return {"low": values.min(0)[None], "high": values.max(0)[None]}


def saturated(
    dataset: Dataset, piece: EpisodePiece, low: Array, high: Array, share: float
) -> dict[str, Array]:
    """saturated [e, n] bool: a number is `low` or `high` in more than `share` of an episode's
    observations, and in two at least.
    """
    rows = Rows(dataset, piece)
    values = rows["obs_num"]
    counts = np.add.reduceat(((values == low) | (values == high)).astype(np.int64), rows.starts)
    return {"saturated": (counts > share * (rows.lengths[:, None] + 1)) & (counts > 1)}


def _note_images(step: Step) -> None:
    for leaf in step.dataset.observation_codec.image_leaves:
        step.notes.append(f"{leaf.name} is an image, whose pixels are not examined")


def _columns(
    step: Step, names: Sequence[str], flags: Array, dimensions: Sequence[str], fault: str
) -> Array:
    """The columns in which a flag means a broken sensor; the others get a note."""
    for name in dimensions:
        if name not in names:
            fix = nearest(name, names) or f"; there are {', '.join(names[:8])}"
            raise UsageError(
                f"dimensions names {name!r}, which is no number of the observation{fix}"
            )
    if dimensions:
        return np.array([names.index(name) for name in dimensions])
    counts = flags.sum(0)
    usual = 2 * counts >= len(flags)
    for column in np.flatnonzero(usual).tolist():
        step.notes.append(
            f"{names[column]} is {fault} in {counts[column]} of {len(flags)} episodes: taken as its"
            " nature, not as a fault"
        )
    return np.flatnonzero(~usual)


def _by_first(flags: Array, columns: Array) -> Iterator[tuple[int, Array]]:
    """Each column, and [e] bool the episodes of which it is the first that is set."""
    left = np.ones(len(flags), bool)
    for column in columns.tolist():
        yield column, flags[:, column] & left
        left &= ~flags[:, column]
