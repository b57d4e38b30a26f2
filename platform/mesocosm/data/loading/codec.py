"""Converts between an environment's values and a world's slots. A codec is fitted once on the
training split and is then part of the world.

Numbers are normalised in float64 and cast to float32 last; nothing is clipped. `Codec.id` is a
fingerprint of everything in it. Means and scales are those of all the datasets together. The
precision, the unit of the likelihood, is that of the first dataset alone. So the nats of worlds
with the same first dataset are comparable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mesocosm.config import fingerprint
from mesocosm.data.loading.columns import LeafColumns, NumberColumns
from mesocosm.data.loading.groups import mask_span, table_span
from mesocosm.data.loading.normalize import SHORTEST_S, Scaling, integer_columns, statistics
from mesocosm.data.loading.raw import raw_leaves
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.manifest import ResetOption
from mesocosm.datasets.space_json import space_from_json, space_to_json
from mesocosm.datasets.spaces import SpaceCodec
from mesocosm.errors import UsageError
from mesocosm.model.known import Known, KnownFunction, RawSpace
from mesocosm.model.spec import PartSpec, Spec
from mesocosm.model.tensors import Parts
from mesocosm.model.tokenizer.kinds import tokenizer_from_json, tokenizer_to_json

Array = NDArray[Any]
SCHEMA = 1


class Codec:
    """Made by `Codec.fit` or `Codec.from_json`. All statistics are over whole observations, task
    keys included.
    """

    def __init__(
        self,
        observation: SpaceCodec,
        action: SpaceCodec,
        environment: Mapping[str, Any],
        options: Sequence[ResetOption],
        scalings: Mapping[str, Scaling],
        delta_scale: Array,
        rest: Mapping[str, Any],
    ):
        self.codes = False
        """True: `decode_observation` leaves images as codes [B, n] int64."""
        self.environment = dict(environment)
        """`manifest.Environment` as JSON: id, version, kwargs, task, max_episode_steps, success"""
        self.options = list(options)
        self._observation, self._action = observation, action
        self._scalings, self._rest = dict(scalings), dict(rest)
        self._delta_scale = delta_scale
        """[n] standard deviation of the one-step change of each number of the observation"""
        task = {leaf.path for key in environment["task"] for leaf in observation.matching(key)}
        self._task = LeafColumns([leaf for leaf in observation.leaves if leaf.path in task])
        self._body = LeafColumns([leaf for leaf in observation.leaves if leaf.path not in task])
        """The columns that are predicted."""
        self.mask = mask_span(observation, action, self._body.categories)
        """The categories of an observation that are the mask of the actions (`datasets.masks`);
        None without one."""
        if not len(self._body):
            raise UsageError(
                f"reality.task must leave at least one key of the observation to predict, got"
                f" {environment['task']}"
            )
        is_number = np.array([option.values is None for option in self.options], bool)
        self._option_numbers = np.flatnonzero(is_number).tolist()
        self._option_categories = np.flatnonzero(~is_number).tolist()
        scaling = self._scalings["observation"]
        self._body_scaling = scaling.only(self._body.numbers)
        self._task_scaling = scaling.only(self._task.numbers)
        self.spec = self._spec()

    def _spec(self) -> Spec:
        observation, action = self._observation, self._action
        of_options = len(self._option_numbers)
        sizes = tuple(len(self.options[i].values or ()) for i in self._option_categories)
        integers, zero = integer_columns(observation), self._scalings["observation"].zero()

        def part(columns: LeafColumns, scaling: Scaling) -> PartSpec:
            grid = tuple(zero[i] if integers[i] else None for i in columns.numbers.tolist())
            categories = tuple(observation.cardinalities[i] for i in columns.categories.tolist())
            texts = columns.texts(observation)
            images = columns.images(observation)
            bins = scaling.bins()
            return PartSpec(len(columns.numbers), bins, categories, texts, grid, images=images)

        table = table_span(observation, action, self._body.numbers, self._body.categories)
        task = part(self._task, self._task_scaling)
        rest, values = dict(self._rest), self._rest["reward_values"]
        rest["reward_values"] = None if values is None else tuple(values)
        rest |= {name: tuple(rest[name]) for name in ("reward_rare", "reward_far") if name in rest}
        return Spec(
            observation=replace(part(self._body, self._body_scaling), table=table),
            action=PartSpec(
                action.numbers,
                self._scalings["action"].bins(),
                action.cardinalities,
                tuple(action.texts),
            ),
            task=PartSpec(
                task.numbers + of_options,
                task.bins + self._scalings["options"].bins(),
                task.categories + sizes,
                task.texts,
                task.grid + (None,) * of_options,
                images=task.images,
            ),
            **rest,
        )

    # -- fit, save, load

    @staticmethod
    def fit(dataset: Dataset) -> Codec:
        """Fit on the training split; the set of rewards on both, so that a reward that only
        validation holds is a category too.

        Raises:
            UsageError: the training split is empty, a task key changes within an episode, a number
                is beyond float32, a duration is negative, or a text is too long for slots.
        """
        codecs = dataset.observation_codec, dataset.action_codec
        for codec in codecs:
            codec.check_slots()
        scalings, change, rest = statistics(dataset)
        environment = dataset.environment.model_dump()
        return Codec(*codecs, environment, dataset.options, scalings, change, rest)

    def to_json(self) -> dict[str, Any]:
        tokenizers = [tokenizer_to_json(one) for one in self._observation.tokenizers]
        return {
            "schema": SCHEMA,
            "environment": self.environment,
            "observation_space": space_to_json(self.observation_space),
            "action_space": space_to_json(self.action_space),
            "options": [option.model_dump() for option in self.options],
            "scalings": {name: scaling.to_json() for name, scaling in self._scalings.items()},
            "delta_scale": self._delta_scale.tolist(),
            "spec": self._rest,
            **({"tokenizers": tokenizers} if tokenizers else {}),
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
            SpaceCodec(
                space_from_json(data["observation_space"]),
                "observation",
                [tokenizer_from_json(one) for one in data.get("tokenizers", ())],
            ),
            SpaceCodec(space_from_json(data["action_space"]), "action"),
            data["environment"],
            [ResetOption(**option) for option in data["options"]],
            {name: Scaling.from_json(value) for name, value in data["scalings"].items()},
            np.array(data["delta_scale"], np.float64),
            data["spec"],
        )

    @cached_property
    def id(self) -> str:
        return fingerprint("codec", self.to_json())

    @property
    def observation_codec(self) -> SpaceCodec:
        """The columns of observations."""
        return self._observation

    @property
    def action_codec(self) -> SpaceCodec:
        """The columns of actions."""
        return self._action

    @property
    def observation_space(self) -> Any:
        return self._observation.space

    @property
    def action_space(self) -> Any:
        return self._action.space

    @property
    def number_columns(self) -> NumberColumns:
        """The number columns of flattened observations and actions, with their scalings."""
        scalings = self._scalings["observation"], self._scalings["action"]
        return NumberColumns(self._body.numbers, self._task.numbers, *scalings)

    # -- values -> parts

    def observation(self, batch: Any) -> Parts:
        """B observations in a vector environment's layout -> [B, ...], without the task keys."""
        return self.observation_parts(*self._observation.encode(batch))

    def task(self, batch: Any, options: Sequence[Mapping[str, Any]] | None = None) -> Parts:
        """The tasks [B, ...] of B observations (vector layout, of any step) and their B reset
        options, where the task has any.

        Raises:
            UsageError: an option is missing, or its value was not in the data.
        """
        numbers, categories = self._observation.encode(batch)
        rows = np.zeros((len(numbers), len(self.options)))
        if self.options and (options is None or len(options) != len(rows)):
            raise UsageError(
                f"the reset options {[option.name for option in self.options]} must be given for"
                f" each of {len(rows)} environments, got {options!r}"
            )
        for column, option in enumerate(self.options):
            for row, values in enumerate(options or ()):
                if option.name not in values:
                    raise UsageError(f"the task needs the reset option {option.name!r}; give it")
                value = values[option.name]
                rows[row, column] = value if option.values is None else _position(option, value)
        return self.task_parts(numbers, categories, rows)

    def action(self, batch: Any) -> Parts:
        """B actions in a vector environment's layout -> [B, ...]."""
        return self.action_parts(*self._action.encode(batch))

    def action_labels(self) -> list[str]:
        """A name for each number of an action: `action.push[0]`."""
        return self._action.labels()

    def action_bounds(self) -> tuple[Tensor, Tensor]:
        """(low, high) of each number of an action, [n] float32 normalised; infinite if it has no
        bound.
        """
        leaves = [leaf for leaf in self._action.leaves if leaf.numbers.stop > leaf.numbers.start]
        boxes: list[Any] = [leaf.space for leaf in leaves]
        low = np.concatenate([np.zeros(0), *(box.low.ravel() for box in boxes)])
        high = np.concatenate([np.zeros(0), *(box.high.ravel() for box in boxes)])
        scaling = self._scalings["action"]
        return scaling.normalise(low), scaling.normalise(high)

    # -- raw columns -> parts

    def observation_parts(self, numbers: Array, categories: Array) -> Parts:
        """Raw columns of whole observations, [..., n] float64 and [..., m] -> Parts [...]."""
        if len(self._task):
            numbers = numbers[..., self._body.numbers]
            categories = categories[..., self._body.categories]
        return Parts(self._body_scaling.normalise(numbers), _int64(categories))

    def task_parts(self, numbers: Array, categories: Array, options: Array) -> Parts:
        """Raw columns of whole observations, [B, n] and [B, m], and rows of `option_rows` [B, k] ->
        Parts [B, ...].
        """
        if not (self.spec.task.numbers or self.spec.task.categories):
            return Parts.empty(self.spec.task, len(numbers))
        of_keys = self._task_scaling.normalise(numbers[:, self._task.numbers])
        of_options = self._scalings["options"].normalise(options[:, self._option_numbers])
        choices = [categories[:, self._task.categories], options[:, self._option_categories]]
        return Parts(torch.cat([of_keys, of_options], 1), torch.cat([*map(_int64, choices)], 1))

    def action_parts(self, numbers: Array, categories: Array) -> Parts:
        """Raw columns of actions -> Parts."""
        return Parts(self._scalings["action"].normalise(numbers), _int64(categories))

    def option_rows(self, options: Sequence[ResetOption], numbers: Array, values: Array) -> Array:
        """A dataset's reset options ([E, k] each) as this codec's, [E, k] float64: the number, or
        the category. Raises UsageError where the options differ, or a value is not in this codec.
        """
        of_data, of_world = (
            {o.name: "number" if o.values is None else "choice" for o in some}
            for some in (options, self.options)
        )
        if list(of_data.items()) != list(of_world.items()):
            raise UsageError(
                f"the data's reset options must be those of the world, {of_world}, got {of_data}"
            )
        rows = numbers.astype(np.float64)
        for column, (option, ours) in enumerate(zip(options, self.options, strict=True)):
            if option.values is not None:
                positions = np.array([_position(ours, value) for value in option.values])
                rows[:, column] = positions[values[:, column]]
        return rows

    def reward(self, raw: Array) -> Tensor:
        """Raw float64 [...] -> float32 [...]: the index of the (nearest) of `reward_values`, or
        normalised.
        """
        spec = self.spec
        if spec.reward_values is None:
            return _float32((raw - spec.reward_mean) / spec.reward_scale)
        values = np.array(spec.reward_values)
        return _float32(np.searchsorted((values[1:] + values[:-1]) / 2, raw))

    def duration(self, raw: Array) -> Tensor:
        """Seconds, float64 [...] -> normalised float32 [...]; zeros without durations."""
        spec = self.spec
        if not spec.durations:
            return torch.zeros(raw.shape)
        if spec.duration_log:
            raw = np.log(np.maximum(raw, SHORTEST_S))
        return _float32((raw - spec.duration_mean) / spec.duration_scale)

    # -- parts -> values

    def decode_observation(self, parts: Parts, task: Parts | None = None) -> Any:
        """Parts [B, ...] and their tasks -> B observations in a vector environment's layout. `task`
        may be None where no observation key is in it.
        """
        size = len(parts.numbers)
        numbers = np.zeros((size, self._observation.numbers), np.float32)
        categories = np.zeros((size, self._observation.categories), np.int64)
        filled = [(parts, self._body)]
        if len(self._task):
            assert task is not None
            filled.append((task, self._task))
        for values, columns in filled:
            of_keys, codes = values.numbers.detach().cpu().numpy(), values.categories.cpu().numpy()
            numbers[:, columns.numbers] = of_keys[:, : len(columns.numbers)]
            categories[:, columns.categories] = codes[:, : len(columns.categories)]
        raw = self._scalings["observation"].raw(torch.from_numpy(numbers))
        return self._observation.decode(raw, categories, self.codes)

    def decode_action(self, parts: Parts) -> Any:
        """Parts [B, ...] -> B actions in a vector environment's layout."""
        raw = self._scalings["action"].raw(parts.numbers)
        return self._action.decode(raw, parts.categories.cpu().numpy())

    def known(self, reward: KnownFunction | None, terminated: KnownFunction | None) -> Known:
        """Known functions of this codec's parts. Raises UsageError where a space has texts."""
        scaling = self._scalings["observation"]
        observation = []
        for leaf in raw_leaves(self._observation, scaling.scale, scaling.mean):
            name = "numbers" if leaf.first is None else "categories"
            of_task = getattr(self._task, name)
            task = bool(np.isin(leaf.columns, of_task).all()) and len(of_task) > 0
            columns = np.searchsorted(of_task if task else getattr(self._body, name), leaf.columns)
            observation.append(replace(leaf, columns=tuple(columns.tolist()), task=task))
        scaling = self._scalings["action"]
        action = raw_leaves(self._action, scaling.scale, scaling.mean)
        return Known(RawSpace(observation), RawSpace(action), reward, terminated)

    def task_options(self, task: Parts) -> list[dict[str, Any]]:
        """The B reset options of `task`; empty dicts if it has none."""
        numbers = self._scalings["options"].raw(task.numbers[:, len(self._task.numbers) :])
        choices = task.categories[:, len(self._task.categories) :].tolist()
        rows: list[dict[str, Any]] = []
        for floats, codes in zip(numbers.tolist(), choices, strict=True):
            row = {
                self.options[i].name: x for i, x in zip(self._option_numbers, floats, strict=True)
            }
            for i, code in zip(self._option_categories, codes, strict=True):
                row[self.options[i].name] = (self.options[i].values or [])[code]
            rows.append(row)
        return rows


def _position(option: ResetOption, value: Any) -> int:
    if option.values is None or value not in option.values:
        raise UsageError(
            f"the reset option {option.name} must be in {option.values}, the values that the world"
            f" was trained on, got {value!r}"
        )
    return option.values.index(value)


def _float32(values: Array) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))


def _int64(values: Array) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))
