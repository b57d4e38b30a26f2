"""Operations on what says nothing new, or nothing true: copies, near copies, stuck and saturated
sensors.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from mesocosm.data.curation.scan import Piece, Rows
from mesocosm.data.curation.table import TRAIN, Step
from mesocosm.data.format.dataset import Dataset
from mesocosm.data.format.manifest import ARRAYS
from mesocosm.errors import UsageError, nearest

Array = NDArray[Any]
POINTS = 16
"""Moments of an episode at which near copies are compared."""
SKETCH = 8
"""Numbers an episode that say which pairs may be near."""
BLOCK = 1024


@dataclass
class ExactDuplicates:
    """Of episodes that are the same bit for bit one is kept: a validation one where there is any,
    else the first.
    """

    def check(self) -> None: ...

    def run(self, step: Step) -> None:
        episodes = step.episodes()
        digest = step.measure(hashed, episodes)["digest"]
        keys = np.concatenate([digest, _tasks(step.dataset)[episodes, None].view(np.uint64)], 1)
        order = _priority(step, episodes)
        _, first, group = np.unique(keys[order], axis=0, return_index=True, return_inverse=True)
        leader = np.empty(len(order), np.int64)
        leader[order] = order[first[group.reshape(-1)]]
        copies = leader != np.arange(len(order))
        step.drop(episodes[copies], "the same as an episode that is kept", episodes[leader[copies]])


def hashed(dataset: Dataset, piece: Piece) -> dict[str, Array]:
    """digest [e, 2] uint64: of all that was seen, done and earned; BLAKE2b of 128 bits."""
    rows = Rows(dataset, piece)
    arrays = []
    for name in ARRAYS:
        array = rows[name]
        if not name.startswith("obs"):
            array[rows.last] = 0  # of an episode that was cut the next action stands there
        arrays.append(
            np.ascontiguousarray(array + 0.0 if array.dtype.kind == "f" else array)
        )  # -0.0 is 0.0
    out = np.empty((len(rows.lengths), 2), np.uint64)
    for i, (start, length) in enumerate(zip(rows.starts, rows.lengths, strict=True)):
        digest = hashlib.blake2b(digest_size=16)
        for array in arrays:
            digest.update(array[start : start + length + 1].tobytes())
        out[i] = np.frombuffer(digest.digest(), np.uint64)
    return {"digest": out}


@dataclass
class NearDuplicates:
    """Of episodes whose distance is at most `tolerance` one is kept, as of exact copies.

    Two episodes of the same task, whose lengths differ by at most the share `tolerance` of the
    longer, are compared at 16 moments, evenly spaced in each (first and last among them): in every
    number of observation, action and reward, in units of its standard deviation over the episodes
    that are left, and in every category, where a difference counts 1. The distance is the root of
    the mean square of these.
    """

    tolerance: float = 0.01

    def check(self) -> None:
        if not (math.isfinite(self.tolerance) and 0 <= self.tolerance < 1):
            raise UsageError(
                f"tolerance={self.tolerance} is no share of a standard deviation; give a number"
                " from 0 to below 1"
            )

    def run(self, step: Step) -> None:
        """A leader, the next in order that is left, is compared with those behind it whose sketches
        are near, and drops what is near itself. The sketch is an orthogonal projection, which makes
        no distance longer: no near pair is missed.
        """
        episodes = step.episodes()
        episodes = episodes[_priority(step, episodes)]
        lengths = step.table.length[episodes]
        scale = _scale(step.measure(moments, np.sort(episodes)))
        sketch = step.measure(partial(sketched, scale=scale), episodes)["sketch"]
        width = POINTS * (
            len(scale)
            + step.dataset.observation_codec.categories
            + step.dataset.action_codec.categories
        )
        reach = self.tolerance * math.sqrt(width) * (1 + 1e-6) + 1e-9
        tree = cKDTree(sketch)
        near = np.flatnonzero(tree.query_ball_point(sketch, reach, return_length=True) > 1)
        tasks = _tasks(step.dataset)[episodes]
        leader = np.arange(len(episodes))
        for one in near:
            if leader[one] != one:
                continue
            others = np.array(tree.query_ball_point(sketch[one], reach), np.int64)
            others = np.sort(others[(others > one) & (leader[others] == others)])
            longer = np.maximum(lengths[others], lengths[one])
            others = others[
                (tasks[others] == tasks[one])
                & (np.abs(lengths[others] - lengths[one]) <= self.tolerance * longer)
            ]
            for block in np.split(others, range(BLOCK, len(others), BLOCK)):
                if len(block):
                    far = _distance(step, episodes[one], episodes[block], scale, width)
                    leader[block[far <= self.tolerance]] = one
        copies = np.flatnonzero(leader != np.arange(len(episodes)))
        copies = copies[np.argsort(episodes[copies])]
        step.drop(
            episodes[copies],
            f"within {self.tolerance:g} of an episode that is kept",
            episodes[leader[copies]],
        )


def moments(dataset: Dataset, piece: Piece) -> dict[str, Array]:
    """Of the piece, for each number of observation, action and reward: count, mean and sum of
    squared differences from it, each [1, d].
    """
    rows = Rows(dataset, piece)
    parts = [rows["obs_num"], rows["act_num"][~rows.last], rows["reward"][~rows.last, None]]
    means = [part.mean(0) for part in parts]
    return {
        "count": np.concatenate([np.full(part.shape[1], float(len(part))) for part in parts])[None],
        "mean": np.concatenate(means)[None],
        "squares": np.concatenate(
            [((part - mean) ** 2).sum(0) for part, mean in zip(parts, means, strict=True)]
        )[None],
    }


def _scale(found: dict[str, Array]) -> Array:
    """[d] standard deviations, 1 where nothing varies; moments of pieces joined as in Chan, Golub
    and LeVeque (1979).
    """
    count, mean, squares = (found[name] for name in ("count", "mean", "squares"))
    total = count.sum(0)
    centre = (count * mean).sum(0) / total
    deviation = np.sqrt((squares + count * (mean - centre) ** 2).sum(0) / total)
    return np.where(deviation > 0, deviation, 1.0)


def sketched(dataset: Dataset, piece: Piece, scale: Array) -> dict[str, Array]:
    """sketch [e, SKETCH]. A category enters as a number in [0, 1) drawn by its value: two are never
    further apart than the 1 that they count.
    """
    numbers, categories = _vectors(dataset, piece, scale)
    spread = np.random.default_rng(1).random(257)
    values = np.concatenate([numbers, spread[categories % 257]], 1)
    basis, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((values.shape[1], SKETCH)))
    return {"sketch": values @ basis}


def _vectors(dataset: Dataset, piece: Piece, scale: Array) -> tuple[Array, Array]:
    """What is compared of each episode: (numbers [e, POINTS * d] in units of scale, categories [e,
    POINTS * m]).
    """
    moment = np.arange(POINTS)
    seen, acted = (
        (moment * last[:, None] + (POINTS - 1) // 2) // (POINTS - 1)
        for last in (piece.length, piece.length - 1)
    )

    def take(name: str, steps: Array) -> Array:
        return dataset.gather(name, piece.shards, piece.at(steps))

    numbers = (
        np.concatenate(
            [take("obs_num", seen), take("act_num", acted), take("reward", acted)[..., None]], -1
        )
        / scale
    )
    categories = np.concatenate(
        [take("obs_cat", seen).astype(np.int64), take("act_cat", acted).astype(np.int64)], -1
    )
    return numbers.reshape(len(numbers), -1), categories.reshape(len(categories), -1)


def _distance(step: Step, one: int, others: Array, scale: Array, width: int) -> Array:
    """[n]"""
    numbers, categories = _vectors(
        step.dataset, _piece(step, np.concatenate([[one], others])), scale
    )
    squares = ((numbers[1:] - numbers[0]) ** 2).sum(1) + (categories[1:] != categories[0]).sum(1)
    return np.asarray(np.sqrt(squares / width))


def _piece(step: Step, episodes: Array) -> Piece:
    table = step.dataset.table[episodes]
    return Piece(
        table["shard"].astype(np.int64),
        table["first_row"].astype(np.int64),
        step.table.length[episodes],
    )


def _tasks(dataset: Dataset) -> Array:
    """[E] int64: a number for each combination of reset options"""
    if not dataset.options:
        return np.zeros(len(dataset.table), np.int64)
    both = np.concatenate([dataset.option_numbers, dataset.option_values], 1)
    return np.unique(both, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _priority(step: Step, episodes: Array) -> Array:
    """Positions in `episodes`: validation first, for a copy to train on of what is held out is a
    leak.
    """
    return np.lexsort((episodes, step.table.split[episodes] == TRAIN))


# -- sensors
# -----------------------------------------------------------------------------------------------------------


@dataclass
class Stuck:
    """Episodes in which a number of the observation does not change for `steps` steps on end though
    it otherwise does: fewer than half of the episodes that are as long have it so. `keep`: none of
    the episode, or what was before.
    """

    steps: int = 20
    keep: str = "none"
    dimensions: list[str] = field(default_factory=list)
    """Only these (`observation[3]`), whether or not they otherwise change; empty: all that do."""

    def check(self) -> None:
        if self.steps < 1:
            raise UsageError(f"steps={self.steps} is no time to be stuck; give at least 1")
        if self.keep not in ("none", "before"):
            raise UsageError(
                f"keep={self.keep!r} is unknown; use 'none' or"
                f" 'before'{nearest(self.keep, ['none', 'before'])}"
            )

    def run(self, step: Step) -> None:
        names = step.dataset.observation_codec.labels()
        episodes = step.episodes()
        episodes = episodes[step.table.length[episodes] >= self.steps]
        if not names or not len(episodes):
            return
        bits = step.measure(partial(frozen, steps=self.steps), episodes)["bits"]
        columns = _columns(step, names, bits, self.dimensions, f"unchanged for {self.steps} steps")
        hit, worst = _worst(bits, columns)
        chosen = episodes[hit]
        if not len(chosen):
            return
        since = np.zeros(len(chosen), np.int64)
        if self.keep == "before":
            since = step.measure(partial(freezes, steps=self.steps, columns=columns), chosen)[
                "since"
            ]
        for column in columns:
            here = worst[hit] == column
            step.cut(
                chosen[here], since[here], f"{names[column]} does not change for {self.steps} steps"
            )


def frozen(dataset: Dataset, piece: Piece, steps: int) -> dict[str, Array]:
    """bits [e, n/8]: packed, whether each number of the observation is unchanged for `steps` steps
    on end somewhere.
    """
    rows = Rows(dataset, piece)
    return {
        "bits": np.packbits(
            np.logical_or.reduceat(_unchanged(rows, rows["obs_num"], steps), rows.starts), axis=1
        )
    }


def freezes(dataset: Dataset, piece: Piece, steps: int, columns: Array) -> dict[str, Array]:
    """since [e]: the step from which the first of `columns` is stuck; each episode has one."""
    rows = Rows(dataset, piece)
    found = np.flatnonzero(_unchanged(rows, rows["obs_num"][:, columns], steps).any(1))
    return {"since": found[np.searchsorted(found, rows.starts)] - steps - rows.starts}


def _unchanged(rows: Rows, values: Array, steps: int) -> Array:
    """[R, n] bool: the last `steps` steps, all of this episode, changed nothing."""
    same = np.zeros(values.shape, bool)
    same[1:] = values[1:] == values[:-1]
    same[rows.starts] = False
    counts = np.cumsum(same, axis=0, dtype=np.int32)
    found = np.zeros(values.shape, bool)
    found[steps:] = counts[steps:] - counts[:-steps] == steps
    return found


@dataclass
class Saturated:
    """Episodes in which a number of the observation stands at its largest or smallest value of all
    that are left, to the bit, in more than `share` of the observations, though it otherwise does
    not: fewer than half of the episodes have it so.
    """

    share: float = 0.2
    dimensions: list[str] = field(default_factory=list)
    """Only these (`observation[3]`), whether or not they otherwise are; empty: all that are not."""

    def check(self) -> None:
        if not 0 <= self.share < 1:
            raise UsageError(
                f"share={self.share} is no share of an episode; give a number from 0 to below 1"
            )

    def run(self, step: Step) -> None:
        names = step.dataset.observation_codec.labels()
        episodes = step.episodes()
        if not names:
            return
        found = step.measure(extremes, episodes)
        low, high = found["low"].min(0), found["high"].max(0)
        bits = step.measure(partial(clipped, low=low, high=high, share=self.share), episodes)[
            "bits"
        ]
        columns = _columns(step, names, bits, self.dimensions, "at its limits")
        hit, worst = _worst(bits, columns)
        for column in columns:
            reason = (
                f"{names[column]} is at {low[column]:g} or {high[column]:g}, its limits, in more"
                f" than {self.share:g} of the episode"
            )
            step.drop(episodes[hit & (worst == column)], reason)


def extremes(dataset: Dataset, piece: Piece) -> dict[str, Array]:
    """low, high [1, n] of the observations' numbers."""
    values = Rows(dataset, piece)["obs_num"]
    return {"low": values.min(0)[None], "high": values.max(0)[None]}


def clipped(
    dataset: Dataset, piece: Piece, low: Array, high: Array, share: float
) -> dict[str, Array]:
    """bits [e, n/8]: packed, whether each number is `low` or `high` in more than `share` of an
    episode's observations, and in two at least.
    """
    rows = Rows(dataset, piece)
    values = rows["obs_num"]
    counts = np.add.reduceat(((values == low) | (values == high)).astype(np.int64), rows.starts)
    return {
        "bits": np.packbits((counts > share * (rows.lengths[:, None] + 1)) & (counts > 1), axis=1)
    }


def _columns(
    step: Step, names: Sequence[str], bits: Array, given: Sequence[str], what: str
) -> Array:
    """The columns in which `bits` means that a sensor is broken; of the others a note is made."""
    for name in given:
        if name not in names:
            raise UsageError(
                f"dimensions names {name!r}, which is no number of the"
                f" observation{nearest(name, names) or '; there are ' + ', '.join(names[:8])}"
            )
    if given:
        return np.array([names.index(name) for name in given])
    counts = np.zeros(len(names), np.int64)
    for start in range(0, len(bits), BLOCK):
        counts += np.unpackbits(bits[start : start + BLOCK], axis=1, count=len(names)).sum(
            0, dtype=np.int64
        )
    usual = np.flatnonzero(2 * counts >= len(bits))
    for column in usual:
        step.note(
            f"{names[int(column)]} is {what} in {counts[column]} of {len(bits)} episodes: taken as"
            " its nature, not as a fault"
        )
    return np.setdiff1d(np.arange(len(names)), usual)


def _worst(bits: Array, columns: Array) -> tuple[Array, Array]:
    """[e] bool whether a bit of `columns` is set, and [e] the first that is."""
    hit, worst = np.zeros(len(bits), bool), np.zeros(len(bits), np.int64)
    for column in columns[::-1]:
        is_set = (bits[:, column // 8] >> (7 - column % 8)) & 1 == 1
        hit |= is_set
        worst[is_set] = column
    return hit, worst
