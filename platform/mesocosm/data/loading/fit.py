"""The statistics of a codec."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesocosm.data.format.dataset import Chunk, Dataset
from mesocosm.data.format.spaces import SpaceCodec, first_beyond_float32
from mesocosm.data.loading.normalize import Moments, Scaling
from mesocosm.errors import UsageError

Array = NDArray[Any]
REWARD_VALUES = 64
"""Rewards with at most this many distinct values are exact categories."""


def statistics(dataset: Dataset) -> tuple[dict[str, Scaling], Array, dict[str, Any]]:
    """The statistics of the training split, for `Codec.fit`.

    Returns:
        The scalings of observation, action and reset options; the standard deviation of the change
        of each observation number; the fields of a `Spec` that describe rewards, durations and
        terminals.

    Raises:
        UsageError: as `Codec.fit`.
    """
    observation, action = dataset.observation_codec, dataset.action_codec
    labels = {"observation": observation.labels(), "action": action.labels(), "reward": ["reward"]}
    if dataset.durations:
        labels["duration"] = ["duration"]
    every = {name: Moments(len(columns)) for name, columns in labels.items()}
    first = {name: Moments(len(columns)) for name, columns in labels.items()}
    change = Moments(observation.numbers)
    rewards: set[float] = set()
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
            every[name].add(columns[name])
            chosen = in_first if name == "observation" else in_first[steps]
            first[name].add(columns[name][chosen])
        _add_distinct(rewards, data["reward"][steps])
        terminals += int(data["terminated"][steps].sum())
        transitions += int(steps.sum())
    if not transitions:
        raise UsageError(
            f"the training split of {', '.join(dataset.ids)} is empty; collect more episodes"
        )
    for chunk in dataset.chunks("valid"):
        _add_distinct(rewards, chunk.arrays["reward"][~chunk.last])
    train = dataset.episodes("train")
    for moments, episodes in ((every, train), (first, train[dataset.part[train] == 0])):
        moments.setdefault("duration", Moments(1))
        moments["options"] = Moments(len(dataset.options))
        moments["options"].add(dataset.option_numbers[episodes])
    integers = {"observation": integer_columns(observation), "action": integer_columns(action)}
    scalings = {name: Scaling.of(every[name], first[name], integers.get(name)) for name in every}
    spec: dict[str, Any] = {
        "reward_values": sorted(rewards) if len(rewards) <= REWARD_VALUES else None,
        **_scalar("reward", scalings.pop("reward")),
        "durations": dataset.durations,
        **_scalar("duration", scalings.pop("duration")),
        "terminal_rate": terminals / transitions,
    }
    is_number = np.array([option.values is None for option in dataset.options], bool)
    scalings["options"] = scalings["options"].only(is_number)
    return scalings, change.std, spec


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
