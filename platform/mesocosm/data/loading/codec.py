"""What turns an environment's values into a world's slots and back: fitted once on the training
split, then part of the world.

A codec belongs to a world. Numbers are normalised in float64 and cast to float32 last; nothing is
clipped. `Codec.id` is a fingerprint of everything in it. Means and scales are those of all the
datasets together; the precision, which the likelihood is counted in, is stated by the first of them
alone: worlds whose lists of datasets begin alike have comparable nats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mesocosm.config import fingerprint
from mesocosm.data.format.dataset import Dataset
from mesocosm.data.format.manifest import TaskOption
from mesocosm.data.format.space_json import space_from_json, space_to_json
from mesocosm.data.format.spaces import SpaceCodec, first_beyond_float32
from mesocosm.data.loading.normalize import Moments, Scaling
from mesocosm.errors import UsageError
from mesocosm.model.spec import Parts, PartSpec, Spec, TextSpan

Array = NDArray[Any]
SCHEMA = 1
REWARD_VALUES = 64
"""Rewards with at most so many distinct values are exact categories."""


class Codec:
    """Made by `Codec.fit` or `Codec.from_json`. All statistics are over whole observations, task
    keys included.
    """

    def __init__(
        self,
        observation: SpaceCodec,
        action: SpaceCodec,
        environment: Mapping[str, Any],
        options: Sequence[TaskOption],
        scalings: Mapping[str, Scaling],
        delta_scale: Array,
        spec_rest: Mapping[str, Any],
    ):
        self.environment = dict(environment)
        """`manifest.Environment` as JSON: id, version, kwargs, task, max_episode_steps, success"""
        self.options = list(options)
        self._observation, self._action = observation, action
        self._scalings = dict(scalings)
        self._all_delta_scale = delta_scale
        self._rest = dict(spec_rest)
        matched = [leaf for name in self.environment["task"] for leaf in observation.matching(name)]
        in_task = [any(leaf is other for other in matched) for leaf in observation.leaves]
        self._task_numbers, self._task_categories = _columns(observation, in_task, True)
        self._numbers, self._categories = _columns(observation, in_task, False)
        if not len(self._numbers) + len(self._categories):
            raise UsageError(
                f"reality.task {self.environment['task']} names every key of the observation; leave"
                " at least one to predict"
            )
        self._option_numbers = [i for i, option in enumerate(self.options) if option.values is None]
        self._option_categories = [
            i for i, option in enumerate(self.options) if option.values is not None
        ]
        self.delta_scale: tuple[float, ...] = tuple(
            (delta_scale / self._scalings["observation"].scale)[self._numbers].tolist()
        )
        """Standard deviation of the one-step change of each observation number, in normalised
        units.
        """
        self._predicted, self._seen = (
            self._scalings["observation"].only(columns)
            for columns in (self._numbers, self._task_numbers)
        )
        self.spec = self._spec(in_task)

    def _spec(self, in_task: Sequence[bool]) -> Spec:
        observation, action, options = (
            self._scalings[name] for name in ("observation", "action", "options")
        )
        cards = self._observation.cardinalities
        task = PartSpec(
            len(self._task_numbers) + len(self._option_numbers),
            observation.bins(self._task_numbers) + options.bins(),
            tuple(cards[i] for i in self._task_categories)
            + tuple(len(self.options[i].values or ()) for i in self._option_categories),
            _texts(self._observation, self._task_categories),
            self._grid(self._task_numbers) + (None,) * len(self._option_numbers),
        )
        return Spec(
            observation=PartSpec(
                len(self._numbers),
                observation.bins(self._numbers),
                tuple(cards[i] for i in self._categories),
                _texts(self._observation, self._categories),
                self._grid(self._numbers),
            ),
            action=PartSpec(
                self._action.numbers,
                action.bins(),
                self._action.cardinalities,
                tuple(self._action.texts),
            ),
            task=task,
            **{
                **self._rest,
                "reward_values": (
                    None
                    if self._rest["reward_values"] is None
                    else tuple(self._rest["reward_values"])
                ),
            },
        )

    def _grid(self, columns: Array) -> tuple[float | None, ...]:
        """Where 0 lies, for the integers among the observation's number `columns`."""
        scaling, integers = self._scalings["observation"], _integers(self._observation)
        return tuple(
            float(-scaling.mean[i] / scaling.scale[i]) if integers[i] else None for i in columns
        )

    # -- fit, save, load
    # -----------------------------------------------------------------------------------------

    @staticmethod
    def fit(dataset: Dataset) -> Codec:
        """Fit on the training split; the precision on the first dataset's part of it, the set of
        rewards on both splits (a reward that only validation holds is a category of its own, not
        one predicted for free).

        Raises UsageError where the training split is empty, a task key changes within an episode, a
        number is beyond float32, or a duration is negative.
        """
        observation, action = dataset.observation_codec, dataset.action_codec
        task = [leaf for name in dataset.environment.task for leaf in observation.matching(name)]
        columns = {
            "observation": observation.numbers,
            "action": action.numbers,
            "reward": 1,
            "duration": 1,
            "options": len(dataset.options),
        }
        moments, first = ({name: Moments(n) for name, n in columns.items()} for _ in range(2))
        change = Moments(observation.numbers)
        values: set[float] = set()
        terminals = transitions = 0
        for chunk in dataset.chunks("train"):
            data, there = chunk.arrays, ~chunk.last
            numbers, categories = data["obs_num"], data["obs_cat"]
            _check_range(dataset, numbers, observation.labels())
            _check_range(dataset, data["act_num"], action.labels())
            _check_range(dataset, data["reward"][:, None], ["reward"])
            if dataset.durations:
                _check_range(dataset, data["duration"][:, None], ["duration"])
            inside = there[:-1]
            delta = np.diff(numbers, axis=0)[inside]
            for leaf in task:
                moved = (delta[:, leaf.numbers] != 0).any() or (
                    np.diff(categories[:, leaf.categories].astype(np.int64), axis=0)[inside] != 0
                ).any()
                if moved:
                    raise UsageError(
                        f"reality.task names {leaf.name!r}, which changes within an episode; a task"
                        " is constant, so leave it in the observation"
                    )
            change.add(delta)
            stated = np.repeat(
                dataset.part[chunk.episodes] == 0, dataset.table["length"][chunk.episodes] + 1
            )
            for into, rows in ((moments, np.ones_like(stated)), (first, stated)):
                into["observation"].add(numbers[rows])
                into["action"].add(data["act_num"][rows & there])
                into["reward"].add(data["reward"][rows & there][:, None])
                if dataset.durations:
                    into["duration"].add(data["duration"][rows & there][:, None])
            _add_distinct(values, data["reward"][there])
            terminals += int(data["terminated"][there].sum())
            transitions += int(there.sum())
        if not transitions:
            raise UsageError(
                f"the training split of {', '.join(dataset.ids)} is empty; collect more episodes"
            )
        for chunk in dataset.chunks("valid"):
            _add_distinct(values, chunk.arrays["reward"][~chunk.last])
        train = dataset.episodes("train")
        moments["options"].add(dataset.option_numbers[train])
        first["options"].add(dataset.option_numbers[train[dataset.part[train] == 0]])
        as_numbers = np.array([option.values is None for option in dataset.options], bool)
        every = Scaling.of(moments["options"], first["options"])
        scalings = {
            "observation": Scaling.of(
                moments["observation"], first["observation"], _integers(observation)
            ),
            "action": Scaling.of(moments["action"], first["action"], _integers(action)),
            "options": every.only(as_numbers),
        }
        reward, duration = (
            Scaling.of(moments[name], first[name]) for name in ("reward", "duration")
        )
        rest = {
            "reward_values": sorted(values) if len(values) <= REWARD_VALUES else None,
            "reward_mean": float(reward.mean[0]),
            "reward_scale": float(reward.scale[0]),
            "reward_bin": reward.bins()[0],
            "durations": dataset.durations,
            "duration_mean": float(duration.mean[0]),
            "duration_scale": float(duration.scale[0]),
            "duration_bin": duration.bins()[0],
            "terminal_rate": terminals / transitions,
        }
        return Codec(
            observation,
            action,
            dataset.environment.model_dump(),
            dataset.options,
            scalings,
            change.std,
            rest,
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "environment": self.environment,
            "observation_space": space_to_json(self.observation_space),
            "action_space": space_to_json(self.action_space),
            "options": [option.model_dump() for option in self.options],
            "scalings": {name: scaling.to_json() for name, scaling in self._scalings.items()},
            "delta_scale": self._all_delta_scale.tolist(),
            "spec": self._rest,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Codec:
        """Raises UsageError where another version wrote it."""
        if data.get("schema") != SCHEMA:
            raise UsageError(
                f"the codec has schema {data.get('schema')!r} where this version reads {SCHEMA};"
                " pretrain the world again"
            )
        return Codec(
            SpaceCodec(space_from_json(data["observation_space"]), "observation"),
            SpaceCodec(space_from_json(data["action_space"]), "action"),
            data["environment"],
            [TaskOption(**option) for option in data["options"]],
            {name: Scaling.from_json(value) for name, value in data["scalings"].items()},
            np.array(data["delta_scale"], np.float64),
            data["spec"],
        )

    @cached_property
    def id(self) -> str:
        return fingerprint("codec", self.to_json())

    @property
    def observation_space(self) -> Any:
        return self._observation.space

    @property
    def action_space(self) -> Any:
        return self._action.space

    # -- values -> parts
    # -----------------------------------------------------------------------------------------

    def observation(self, batch: Any) -> Parts:
        """B observations in a vector environment's layout -> [B, ...], without the task keys."""
        return self.observation_parts(*self._observation.encode(batch))

    def observations_list(self, values: Sequence[Any]) -> Parts:
        """B raw observations -> [B, ...], without the task keys."""
        return self.observation_parts(*self._observation.encode_list(values))

    def task(self, batch: Any, options: Sequence[Mapping[str, Any]] | None = None) -> Parts:
        """The tasks of B observations (vector layout, of any step) and their B reset options (where
        the task has any) -> [B, ...].

        Raises UsageError for an option's value that was not in the data.
        """
        numbers, categories = self._observation.encode(batch)
        return self.task_parts(numbers, categories, self._encode_options(options, len(numbers)))

    def _encode_options(self, options: Sequence[Mapping[str, Any]] | None, size: int) -> Array:
        rows = np.zeros((size, len(self.options)))
        if self.options and (options is None or len(options) != size):
            raise UsageError(
                f"{size} reset options were expected, one an environment, with the keys"
                f" {[option.name for option in self.options]}; got {options!r}"
            )
        for column, option in enumerate(self.options):
            for row, given in enumerate(options or ()):
                if option.name not in given:
                    raise UsageError(
                        f"the reset option {option.name!r} is missing; give it, for it is part of"
                        " the task"
                    )
                value = given[option.name]
                if option.values is None:
                    rows[row, column] = float(value)
                elif value in option.values:
                    rows[row, column] = option.values.index(value)
                else:
                    raise UsageError(
                        f"the reset option {option.name}={value!r} was not in the data; use one of"
                        f" {option.values}"
                    )
        return rows

    def action(self, batch: Any) -> Parts:
        """B actions in a vector environment's layout -> [B, ...]."""
        return self.action_parts(*self._action.encode(batch))

    def action_labels(self) -> list[str]:
        """A name for each number of an action: `action.push[0]`."""
        return self._action.labels()

    # -- raw columns -> parts (the loader's way)
    # -----------------------------------------------------------------

    def observation_parts(self, numbers: Array, categories: Array) -> Parts:
        """Raw columns of whole observations, [..., n] float64 and [..., m] -> Parts [...]."""
        if len(self._task_numbers) or len(self._task_categories):
            numbers, categories = numbers[..., self._numbers], categories[..., self._categories]
        return Parts(
            self._predicted.normalise(numbers), torch.from_numpy(categories.astype(np.int64))
        )

    def task_parts(self, numbers: Array, categories: Array, options: Array) -> Parts:
        """Raw columns of whole observations, [B, n] and [B, m], and rows of `option_rows`, [B, k]
        -> Parts [B, ...].
        """
        if not (self.spec.task.numbers or self.spec.task.categories):
            return Parts.empty(self.spec.task, len(numbers))
        seen = self._seen.normalise(numbers[:, self._task_numbers])
        told = self._scalings["options"].normalise(options[:, self._option_numbers])
        chosen = torch.from_numpy(options[:, self._option_categories].astype(np.int64))
        return Parts(
            torch.cat([seen, told], 1),
            torch.cat(
                [torch.from_numpy(categories[:, self._task_categories].astype(np.int64)), chosen], 1
            ),
        )

    def action_parts(self, numbers: Array, categories: Array) -> Parts:
        """Raw columns of actions -> Parts."""
        return Parts(
            self._scalings["action"].normalise(numbers),
            torch.from_numpy(categories.astype(np.int64)),
        )

    def option_rows(self, options: Sequence[TaskOption], numbers: Array, values: Array) -> Array:
        """A dataset's reset options ([E, k] each) as this codec's, [E, k] float64: the number, or
        the category.

        Raises UsageError for a choice that this codec does not know.
        """
        if [(o.name, o.values is None) for o in options] != [
            (o.name, o.values is None) for o in self.options
        ]:
            raise UsageError(
                f"the data's reset options {[o.name for o in options]} are not the world's"
                f" {[o.name for o in self.options]}; use data of one task"
            )
        rows = numbers.astype(np.float64)
        for column, (theirs, ours) in enumerate(zip(options, self.options, strict=True)):
            if theirs.values is None or ours.values is None:
                continue
            position = {value: i for i, value in enumerate(ours.values)}
            unknown = [value for value in theirs.values if value not in position]
            if unknown:
                raise UsageError(
                    f"the reset option {ours.name}={unknown[0]!r} is not among the world's"
                    f" {ours.values}; pretrain on data that has it"
                )
            rows[:, column] = np.array([position[value] for value in theirs.values])[
                values[:, column]
            ]
        return rows

    def reward(self, raw: Array) -> Tensor:
        """Raw float64 [...] -> float32 [...]: the index of the (nearest) of `reward_values`, or
        normalised.
        """
        if self.spec.reward_values is None:
            return torch.from_numpy(
                ((raw - self.spec.reward_mean) / self.spec.reward_scale).astype(np.float32)
            )
        middles = (self._reward_values[1:] + self._reward_values[:-1]) / 2
        return torch.from_numpy(np.searchsorted(middles, raw).astype(np.float32))

    def duration(self, raw: Array) -> Tensor:
        """Seconds, float64 [...] -> normalised float32 [...]; zeros without durations."""
        if not self.spec.durations:
            return torch.zeros(raw.shape)
        return torch.from_numpy(
            ((raw - self.spec.duration_mean) / self.spec.duration_scale).astype(np.float32)
        )

    # -- parts -> values
    # -----------------------------------------------------------------------------------------

    def decode_observation(self, parts: Parts, task: Parts | None = None) -> Any:
        """Parts [B, ...] and their tasks -> B observations in a vector environment's layout. `task`
        may be None where no observation key is in it.
        """
        size = len(parts.numbers)
        raw = np.zeros((size, self._observation.numbers), np.float32)
        codes = np.zeros((size, self._observation.categories), np.int64)
        raw[:, self._numbers] = parts.numbers.detach().cpu().numpy()
        codes[:, self._categories] = parts.categories.cpu().numpy()
        if len(self._task_numbers) or len(self._task_categories):
            assert task is not None
            raw[:, self._task_numbers] = (
                task.numbers[:, : len(self._task_numbers)].detach().cpu().numpy()
            )
            codes[:, self._task_categories] = (
                task.categories[:, : len(self._task_categories)].cpu().numpy()
            )
        return self._observation.decode(
            self._scalings["observation"].raw(torch.from_numpy(raw)), codes
        )

    def decode_action(self, parts: Parts) -> Any:
        """Parts [B, ...] -> B actions in a vector environment's layout."""
        return self._action.decode(
            self._scalings["action"].raw(parts.numbers), parts.categories.cpu().numpy()
        )

    def task_options(self, task: Parts) -> list[dict[str, Any]]:
        """The B reset options that `task` holds; empty dicts where the task has none."""
        numbers = self._scalings["options"].raw(task.numbers[:, len(self._task_numbers) :])
        categories = task.categories[:, len(self._task_categories) :].tolist()
        found: list[dict[str, Any]] = []
        for row in range(len(numbers)):
            told: dict[str, Any] = {
                self.options[i].name: float(numbers[row, j])
                for j, i in enumerate(self._option_numbers)
            }
            told |= {
                self.options[i].name: (self.options[i].values or [])[categories[row][j]]
                for j, i in enumerate(self._option_categories)
            }
            found.append(told)
        return found

    def reward_raw(self, reward: Tensor) -> Tensor:
        """Float [...] as `Windows.reward` -> raw float64 [...]; exact where rewards are categories."""
        if self.spec.reward_values is None:
            return reward.double() * self.spec.reward_scale + self.spec.reward_mean
        return torch.tensor(self.spec.reward_values, dtype=torch.float64, device=reward.device)[
            reward.long()
        ]

    def duration_raw(self, duration: Tensor) -> Tensor:
        """Normalised float [...] -> seconds, float64 [...]."""
        return duration.double() * self.spec.duration_scale + self.spec.duration_mean

    @cached_property
    def _reward_values(self) -> Array:
        assert self.spec.reward_values is not None
        return np.array(self.spec.reward_values)


def _check_range(dataset: Dataset, values: Array, names: Sequence[str]) -> None:
    """Raise UsageError, naming the column, where `values` [B, n] has a number beyond float32 or a
    negative duration.
    """
    beyond = first_beyond_float32(values)
    fix = f"make the dataset again (datasets {', '.join(dataset.ids)})"
    if beyond is not None:
        raise UsageError(
            f"{names[beyond[1]]} holds {values[beyond]:g}, and a world computes in float32; rescale"
            f" it and {fix}"
        )
    if list(names) == ["duration"] and (values < 0).any():
        raise UsageError(
            f"duration holds {np.nanmin(values):g}, which is negative; give seconds and {fix}"
        )


def _add_distinct(values: set[float], rewards: Array) -> None:
    """Add the distinct rewards, as long as they are few enough to be categories."""
    if len(values) <= REWARD_VALUES:
        values.update(np.unique(rewards)[: REWARD_VALUES + 1].tolist())


def _columns(codec: SpaceCodec, in_task: Sequence[bool], wanted: bool) -> tuple[Array, Array]:
    """The number and category columns of the leaves that are (or are not) in the task."""
    leaves = [leaf for leaf, inside in zip(codec.leaves, in_task, strict=True) if inside == wanted]
    numbers = [i for leaf in leaves for i in range(leaf.numbers.start, leaf.numbers.stop)]
    categories = [i for leaf in leaves for i in range(leaf.categories.start, leaf.categories.stop)]
    return np.array(numbers, np.int64), np.array(categories, np.int64)


def _texts(codec: SpaceCodec, columns: Array) -> tuple[TextSpan, ...]:
    """The texts among `columns`, counted within them."""
    where = {int(column): position for position, column in enumerate(columns)}
    return tuple(
        TextSpan(where[text.start], text.length, text.min_length)
        for text in codec.texts
        if text.start in where
    )


def _integers(codec: SpaceCodec) -> Array:
    return np.array(
        [
            not leaf.is_float
            for leaf in codec.leaves
            for _ in range(leaf.numbers.stop - leaf.numbers.start)
        ],
        bool,
    )
