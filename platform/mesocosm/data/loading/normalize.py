"""Columns of numbers -> normalised numbers and back, and the statistics they are normalised by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mesocosm.data.loading.groups import number_groups
from mesocosm.datasets.dataset import Chunk, Dataset
from mesocosm.datasets.leaf import first_beyond_float32
from mesocosm.datasets.spaces import SpaceCodec
from mesocosm.errors import UsageError

Array = NDArray[Any]
CONSTANT = 1e-8
"""A column whose deviation is at most this share of its mean's magnitude is constant: scale 1."""
CONSTANT_PRECISION = 1e-4
LOG_SPAN = 100.0
"""Positive durations whose longest is at least this many times the shortest are learned by their
logarithm: a density of their seconds has one width for those of 1 ms and of 1 s.
"""
SHORTEST_S = 1e-9
"""A shorter duration counts as this where the logarithm is learned."""
REWARD_VALUES = 64
"""Rewards with at most this many distinct values are exact categories."""
RARE, FAR = 0.05, 50.0
"""Rewards farther from the median than FAR times their spread (1.48 MAD) are rare large ones, if
they are at most this share: a lost plasma's -1,000 among rewards of .1. The ends of heavy tails
also count as rare large ones.
"""
LEAST_SPREAD = 1e-3
"""The least spread of rare rewards, as a share of their mean's size"""
AT_ONCE = 1 << 15
"""Numbers normalised at once. They stay in a core's cache between the two operations."""


@dataclass(frozen=True)
class Scaling:
    """Per-column statistics in raw units, [n] float64; normalised = (raw - mean) / scale."""

    mean: Array
    scale: Array
    precision: Array

    def normalise(self, raw: Array) -> Tensor:
        """[..., n] raw -> float32."""
        out = np.empty(raw.size, np.float32)
        if raw.size:
            mean, scale = self._repeated
            values, between = raw.reshape(-1), np.empty(min(len(mean), raw.size))
            for start in range(0, len(values), len(mean)):
                some = values[start : start + len(mean)]
                result = np.subtract(some, mean[: len(some)], out=between[: len(some)])
                out[start : start + len(some)] = np.divide(result, scale[: len(some)], out=result)
        return torch.from_numpy(out.reshape(raw.shape))

    @cached_property
    def _repeated(self) -> tuple[Array, Array]:
        """Mean and scale repeated for AT_ONCE numbers: one long row takes a third of the time of
        many short ones.
        """
        rows = max(1, AT_ONCE // len(self.mean))
        return np.tile(self.mean, rows), np.tile(self.scale, rows)

    def only(self, columns: Array) -> Scaling:
        """The scaling of some columns."""
        return Scaling(self.mean[columns], self.scale[columns], self.precision[columns])

    def raw(self, normalised: Tensor) -> Array:
        """[..., n] float32 -> float64 raw."""
        return normalised.detach().cpu().numpy().astype(np.float64) * self.scale + self.mean

    def bins(self) -> tuple[float, ...]:
        """The precision in normalised units."""
        return tuple((self.precision / self.scale).tolist())

    def zero(self) -> list[float]:
        """A raw 0 in normalised units."""
        zeros: list[float] = (-self.mean / self.scale).tolist()
        return zeros

    def to_json(self) -> dict[str, list[float]]:
        return {name: getattr(self, name).tolist() for name in ("mean", "scale", "precision")}

    @staticmethod
    def from_json(data: Mapping[str, list[float]]) -> Scaling:
        return Scaling(**{name: np.array(values, np.float64) for name, values in data.items()})

    @staticmethod
    def of(moments: Moments, first: Moments, integers: Array | None = None) -> Scaling:
        """The scaling of columns with these moments.

        Args:
            moments: of all datasets.
            first: of the first dataset. The precision of a float is 10**floor(log10(1e-4 std)) with
                its std (that of all, where the column is constant in the first).
            integers: [n] bool, the columns of integers, whose precision is 1.
        """
        scale = np.where(moments.constant, 1.0, moments.std)
        stated = np.where(first.constant, scale, first.std)
        precision = np.where(
            moments.constant, CONSTANT_PRECISION, 10.0 ** np.floor(np.log10(1e-4 * stated))
        )
        if integers is not None:
            precision = np.where(integers, 1.0, precision)
        return Scaling(moments.mean, scale, precision)


class Moments:
    """Mean and standard deviation of columns, chunk by chunk (Chan, Golub and LeVeque 1979)."""

    def __init__(self, columns: int):
        self.count: int | Array = 0
        """Rows; [n] where columns have different numbers of them"""
        self.mean = np.zeros(columns)
        self.squares = np.zeros(columns)
        """Sums of squared differences from the mean."""

    def add(self, values: Array) -> None:
        """Add [rows, columns]."""
        if len(values):
            mean = values.mean(0)
            self.merge(len(values), mean, ((values - mean) ** 2).sum(0))

    def merge(self, count: int | Array, mean: Array, squares: Array) -> None:
        """Add the moments of other rows."""
        total = self.count + count
        shift = mean - self.mean
        self.squares += squares + shift**2 * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total

    def pool(self, groups: Array) -> None:
        """Give the columns of each group [p, N] the moments of all its columns together; each has
        as many rows as the others.
        """
        for group in groups:
            mean = self.mean[group].mean()
            apart = self.count * (self.mean[group] - mean) ** 2
            self.squares[group] = (self.squares[group] + apart).mean()
            self.mean[group] = mean

    @property
    def std(self) -> Array:
        return np.sqrt(self.squares / np.maximum(self.count, 1))

    @property
    def constant(self) -> Array:
        return self.std <= CONSTANT * np.abs(self.mean)


def statistics(dataset: Dataset) -> tuple[dict[str, Scaling], Array, dict[str, Any]]:
    """The statistics of the training split, for `Codec.fit`: the scalings of observation, action
    and reset options; the deviation of the change of each observation number; and the fields of
    `Spec` that describe rewards, durations and terminals.
    """
    observation, action = dataset.observation_codec, dataset.action_codec
    labels = {"observation": observation.labels(), "action": action.labels(), "reward": ["reward"]}
    log_durations = dataset.durations and _span(dataset) >= LOG_SPAN
    if dataset.durations:
        labels["duration"] = ["duration"]
    every = {name: Moments(len(columns)) for name, columns in labels.items()}
    first = {name: Moments(len(columns)) for name, columns in labels.items()}
    change = Moments(observation.numbers)
    rewards: set[float] = set()
    all_rewards: list[tuple[Array, Array]] = []
    terminals = transitions = 0
    for chunk in dataset.chunks("train"):
        data, steps = chunk.arrays, ~chunk.last
        _check_task(dataset, chunk)
        change.add(np.diff(data["obs_num"], axis=0)[steps[:-1]])
        rows = dataset.table["length"][chunk.episodes] + 1
        in_first = np.repeat(dataset.part[chunk.episodes] == 0, rows)
        columns = {"observation": data["obs_num"], "action": data["act_num"][steps]}
        columns |= {name: data[name][steps, None] for name in ("reward", "duration")}
        for name, names in labels.items():
            _check_range(dataset, columns[name], names)
            if name == "duration" and log_durations:
                columns[name] = np.log(columns[name])
            every[name].add(columns[name])
            chosen = in_first if name == "observation" else in_first[steps]
            first[name].add(columns[name][chosen])
        _add_distinct(rewards, data["reward"][steps])
        all_rewards.append((data["reward"][steps], in_first[steps]))
        terminals += int(data["terminated"][steps].sum())
        transitions += int(steps.sum())
    if not transitions:
        raise UsageError(
            f"the training split of {', '.join(dataset.ids)} is empty; collect more episodes"
        )
    for chunk in dataset.chunks("valid"):
        _add_distinct(rewards, chunk.arrays["reward"][~chunk.last])
    rare = None
    if len(rewards) > REWARD_VALUES:
        raw, in_first = (np.concatenate(column) for column in zip(*all_rewards, strict=True))
        rare, *far = rare_rewards(raw)
        if rare.any():
            for moments, rows in ((every, ~rare), (first, ~rare & in_first)):
                moments["reward"] = Moments(1)
                moments["reward"].add(raw[rows, None])
    train = dataset.episodes("train")
    for moments, episodes in ((every, train), (first, train[dataset.part[train] == 0])):
        moments.setdefault("duration", Moments(1))
        moments["options"] = Moments(len(dataset.options))
        moments["options"].add(dataset.option_numbers[episodes])
    groups = number_groups(observation, action)
    for moments in (every, first):
        moments["observation"].pool(groups)
    integers = {"observation": integer_columns(observation), "action": integer_columns(action)}
    scalings = {name: Scaling.of(every[name], first[name], integers.get(name)) for name in every}
    spec: dict[str, Any] = {
        "reward_values": sorted(rewards) if len(rewards) <= REWARD_VALUES else None,
        **_scalar("reward", scalings.pop("reward")),
        "durations": dataset.durations,
        **_scalar("duration", scalings.pop("duration")),
        "terminal_rate": terminals / transitions,
    }
    if log_durations:
        spec["duration_log"] = True
    if rare is not None and rare.any():
        large = (raw[rare] - spec["reward_mean"]) / spec["reward_scale"]
        spread = max(float(large.std()), LEAST_SPREAD * abs(float(large.mean())))
        spec["reward_rare"] = [float(rare.mean()), float(large.mean()), spread]
        spec["reward_far"] = far
    is_number = np.array([option.values is None for option in dataset.options], bool)
    scalings["options"] = scalings["options"].only(is_number)
    return scalings, change.std, spec


def _span(dataset: Dataset) -> float:
    """The longest training duration over the shortest; 0 where one is not positive."""
    low, high = np.inf, 0.0
    for chunk in dataset.chunks("train"):
        durations = chunk.arrays["duration"][~chunk.last]
        low, high = min(low, durations.min(initial=low)), max(high, durations.max(initial=high))
    return float(high / low) if low > 0 else 0.0


def mean_duration(dataset: Dataset) -> float | None:
    """The mean of `info["duration"]`, in seconds, over the training transitions; None where not all
    datasets have durations.
    """
    total, count = 0.0, 0
    for chunk in dataset.chunks("train") if dataset.durations else ():
        durations = chunk.arrays["duration"][~chunk.last]
        total, count = total + float(durations.sum()), count + len(durations)
    return total / count if count else None


def rare_rewards(raw: Array) -> tuple[Array, float, float]:
    """Find the rare large ones of rewards [N]. Nothing is clipped: they have a density of their own
    (`heads.RewardHead`), and the scale of the others excludes them.

    Returns:
        [N] bool, and the middle and the distance from it beyond which a reward is rare, if any is.
    """
    middle = float(np.median(raw))
    apart = np.abs(raw - middle)
    distance = FAR * 1.4826 * float(np.median(apart))
    rare: Array = apart > distance
    if distance == 0 or rare.mean() > RARE:
        rare = np.zeros(len(raw), bool)
    return rare, middle, distance


def _scalar(name: str, scaling: Scaling) -> dict[str, float]:
    mean, scale, (precision,) = scaling.mean.item(), scaling.scale.item(), scaling.bins()
    return {f"{name}_mean": mean, f"{name}_scale": scale, f"{name}_bin": precision}


def integer_columns(codec: SpaceCodec) -> Array:
    """[n] bool: the numbers that are integers."""
    return np.array([leaf.dtype.kind != "f" for leaf in codec.leaves for _ in leaf.labels()], bool)


def _check_task(dataset: Dataset, chunk: Chunk) -> None:
    steps = ~chunk.last[:-1]
    for name in dataset.environment.task:
        for leaf in dataset.observation_codec.matching(name):
            for array, columns in (("obs_num", leaf.numbers), ("obs_cat", leaf.categories)):
                values = chunk.arrays[array][:, columns]
                if (values[1:] != values[:-1])[steps].any():
                    raise UsageError(
                        f"reality.task names {leaf.name!r}, which changes within an episode; a task"
                        " is constant, so leave it in the observation"
                    )


def _check_range(dataset: Dataset, values: Array, names: Sequence[str]) -> None:
    fix = f"make the dataset again (datasets {', '.join(dataset.ids)})"
    if (place := first_beyond_float32(values)) is not None:
        raise UsageError(
            f"{names[place[1]]} holds {values[place]:g}, and a world computes in float32; rescale"
            f" it and {fix}"
        )
    if names == ["duration"] and (values < 0).any():
        raise UsageError(
            f"duration holds {np.nanmin(values):g}, which is negative; give seconds and {fix}"
        )


def _add_distinct(values: set[float], rewards: Array) -> None:
    """Add the distinct rewards, as long as they are few enough to be categories."""
    if len(values) <= REWARD_VALUES:
        values.update(np.unique(rewards)[: REWARD_VALUES + 1].tolist())
