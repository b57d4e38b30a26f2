"""Episodes as texts, for families that read language.

A value becomes one text (`TextForm`): the text of its only Text leaf as it is, then, on a line of
its own, its other leaves as one JSON object; the whole value as JSON where it has no Text leaf, or
several. Floats are rounded to the precision that the data state (`normalize.Scaling.of`), which is
the unit of the likelihood of the other families too. Tuples become objects with the keys 0, 1, ...

    {"room": "a hall", "coins": 3}   ->   a hall
                                          {"coins": 3}
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from mesocosm.config import fingerprint
from mesocosm.data.loading.normalize import statistics
from mesocosm.datasets.bounds import outside
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.leaf import Leaf, Space
from mesocosm.datasets.manifest import ResetOption
from mesocosm.datasets.space_json import space_from_json, space_to_json
from mesocosm.datasets.spaces import SpaceCodec
from mesocosm.datasets.split import Split
from mesocosm.datasets.texts import shown
from mesocosm.errors import UsageError
from mesocosm.model.language.stream import TextEpisode
from mesocosm.model.spec import PartSpec, Spec

Array = NDArray[Any]
SCHEMA = 2


class TextForm:
    """The texts of some leaves of a space, there and back."""

    def __init__(self, leaves: Sequence[Leaf], decimals: Mapping[str, Sequence[int]]):
        """Choose the form.

        Args:
            leaves: The leaves that are written.
            decimals: By name of each leaf of numbers, the decimals of each of its numbers.
        """
        self.leaves = list(leaves)
        self._decimals = dict(decimals)
        texts = [leaf for leaf in leaves if isinstance(leaf.space, spaces.Text)]
        self._text = texts[0] if len(texts) == 1 else None
        self._rest = [leaf for leaf in leaves if leaf is not self._text]

    def write(self, value: Any) -> str:
        """The text of a raw value of the space."""
        lines = []
        if self._text is not None:
            lines.append(str(_at(value, self._text.path)))
        if self._rest:
            tree: Any = {}
            for leaf in self._rest:
                tree = _put(tree, leaf.path, self._plain(leaf, _at(value, leaf.path)))
            lines.append(json.dumps(tree, ensure_ascii=False))
        return "\n".join(lines)

    def read(self, text: str) -> dict[tuple[str | int, ...], Any]:
        """The raw value of each leaf, by path, of a text that `write` gave or a model generated.

        Raises:
            ValueError: The text has another form, or a value is outside its space.
        """
        values: dict[tuple[str | int, ...], Any] = {}
        rest = text
        if self._text is not None:
            head, newline, rest = text.rpartition("\n") if self._rest else (text, "", "")
            if self._rest and not newline:
                raise ValueError(f"the text must end in a line of JSON, got {shown(text)}")
            values[self._text.path] = head
        if self._rest:
            tree = _json(rest)
            for leaf in self._rest:
                values[leaf.path] = _raw(leaf, tree)
        return values

    def _plain(self, leaf: Leaf, value: Any) -> Any:
        if isinstance(leaf.space, spaces.Text):
            return str(value)
        array = np.asarray(value)
        if leaf.name not in self._decimals or leaf.dtype.kind != "f":
            return array.astype(np.int64).tolist()
        flat = zip(array.reshape(-1).tolist(), self._decimals[leaf.name], strict=True)
        # Adding 0.0 makes -0.0 a 0.0.
        rounded = [round(x, d) + 0.0 if d > 0 else int(round(x, d)) for x, d in flat]
        return np.array(rounded, object).reshape(array.shape).tolist()


class TextCodec:
    """An environment's values as texts, and back. Part of a world's artifact, as JSON."""

    def __init__(
        self,
        observation: Space,
        action: Space,
        environment: Mapping[str, Any],
        options: Sequence[ResetOption],
        decimals: Mapping[str, Sequence[int]],
        rest: Mapping[str, Any],
    ):
        self.environment = dict(environment)
        """`manifest.Environment` as JSON, as in `Codec`"""
        self._spaces, self.options, task_keys = (observation, action), options, environment["task"]
        self._decimals, self.rest = dict(decimals), dict(rest)
        """`rest`: the fields of `model.spec.Spec` that describe rewards, durations, terminals."""
        self._codec = SpaceCodec(observation, "observation")
        task = {leaf.path for key in task_keys for leaf in self._codec.matching(key)}
        inside = [leaf for leaf in self._codec.leaves if leaf.path in task]
        body = [leaf for leaf in self._codec.leaves if leaf.path not in task]
        if not body:
            raise UsageError(
                f"reality.task must leave at least one key of the observation to predict, got"
                f" {list(task_keys)}"
            )
        self.observation_form = TextForm(body, decimals)
        self.action_form = TextForm(SpaceCodec(action, "action").leaves, decimals)
        self._task_form = TextForm(inside, decimals)

    @property
    def spec(self) -> Spec:
        """The rewards and terminations; texts have no slots, and durations are not learned."""
        rest = {**self.rest, "durations": False}
        if rest["reward_values"] is not None:
            rest["reward_values"] = tuple(rest["reward_values"])
        return Spec(PartSpec(), PartSpec(), **rest)

    @cached_property
    def id(self) -> str:
        """A fingerprint of everything in it."""
        return fingerprint("texts", self.to_json())

    @staticmethod
    def fit(dataset: Dataset) -> TextCodec:
        """Fit the precision of numbers on the training split.

        Raises:
            UsageError: The split is empty, or a number is out of range.
        """
        scalings, _, rest = statistics(dataset)
        decimals: dict[str, list[int]] = {}
        for name, codec in (
            ("observation", dataset.observation_codec),
            ("action", dataset.action_codec),
        ):
            places = -np.rint(np.log10(scalings[name].precision)).astype(int)
            for leaf in codec.leaves:
                if leaf.numbers.stop > leaf.numbers.start:
                    decimals[leaf.name] = places[leaf.numbers].tolist()
        spaces, about = (dataset.observation_space, dataset.action_space), dataset.environment
        return TextCodec(*spaces, about.model_dump(), dataset.options, decimals, rest)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "observation_space": space_to_json(self._spaces[0]),
            "action_space": space_to_json(self._spaces[1]),
            "environment": self.environment,
            "options": [option.model_dump() for option in self.options],
            "decimals": self._decimals,
            "rest": self.rest,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> TextCodec:
        """Raises UsageError where another version wrote it."""
        if data.get("schema") != SCHEMA:
            raise UsageError(
                f"the codec of texts has schema {data.get('schema')!r} where this version reads"
                f" {SCHEMA}; pretrain the world again"
            )
        return TextCodec(
            space_from_json(data["observation_space"]),
            space_from_json(data["action_space"]),
            data["environment"],
            [ResetOption(**option) for option in data["options"]],
            data["decimals"],
            data["rest"],
        )

    @property
    def observation_space(self) -> Space:
        return self._spaces[0]

    @property
    def action_space(self) -> Space:
        return self._spaces[1]

    def observation(self, value: Any) -> str:
        """The text of a raw observation, without the keys of the task."""
        return self.observation_form.write(value)

    def action(self, value: Any) -> str:
        """The text of a raw action."""
        return self.action_form.write(value)

    def task(self, observation: Any, options: Mapping[str, Any]) -> str:
        """The text of a task: of its observation keys, and of its reset options.

        Args:
            observation: Any raw observation of the episode.
            options: The reset options of the episode, by name.
        """
        chosen = {option.name: options[option.name] for option in self.options}
        lines = [self._task_form.write(observation)] if self._task_form.leaves else []
        if len(chosen) == 1 and not lines and isinstance(only := next(iter(chosen.values())), str):
            return only
        if chosen:
            lines.append(json.dumps(chosen, ensure_ascii=False))
        return "\n".join(lines)

    def read_observation(self, text: str, base: Any) -> Any:
        """The raw observation of a text.

        Args:
            text: As `observation` gives it.
            base: A raw observation of the same episode, from which the keys of the task are taken.

        Raises:
            ValueError: The text has another form, or a value is outside its space.
        """
        values = self.observation_form.read(text)
        for leaf in self._task_form.leaves:
            values[leaf.path] = _at(base, leaf.path)
        return _nested(self._spaces[0], (), values)

    def read_task(self, text: str) -> tuple[dict[tuple[str | int, ...], Any], dict[str, Any]]:
        """The values of the task's observation keys, by path, and the reset options of a task's
        text. Raises ValueError as `read_observation`.
        """
        names = [option.name for option in self.options]
        if not names:
            return (self._task_form.read(text) if self._task_form.leaves else {}), {}
        form, _, last = text.rpartition("\n")
        values, alone = self.options[0].values, len(names) == 1 and not self._task_form.leaves
        if alone and values and isinstance(values[0], str):
            return {}, {names[0]: text}
        options = _json(last)
        if not isinstance(options, dict) or options.keys() != set(names):
            raise ValueError(f"the task must end in JSON of {names}, got {shown(last)}")
        for option in self.options:
            _check_option(option, options[option.name])
        return (self._task_form.read(form) if self._task_form.leaves else {}), options

    def read_with_task(self, text: str, task: str) -> Any:
        """The raw observation from its text and the text of its task. Raises ValueError as
        `read_observation`.
        """
        values = self.observation_form.read(text)
        if self._task_form.leaves:
            values |= self.read_task(task)[0]
        return _nested(self._spaces[0], (), values)

    def read_action(self, text: str) -> Any:
        """The raw action of a text. Raises ValueError as `read_observation`."""
        return _nested(self._spaces[1], (), self.action_form.read(text))


def text_episodes(
    dataset: Dataset, codec: TextCodec, split: Split | None = None
) -> Iterator[TextEpisode]:
    """The whole episodes of a split, in order, as texts.

    Args:
        dataset: One or several datasets of the spaces of `codec`.
        codec: Gives the precision of numbers.
        split: `train` or `valid`; None for both.

    Raises:
        UsageError: A key of the task changes within an episode.
    """
    for number in dataset.episodes(split).tolist():
        episode = dataset.episode(number)
        task = codec.task(episode.observations[0], episode.task)
        if any(codec.task(o, episode.task) != task for o in episode.observations[1:]):
            raise UsageError(
                f"reality.task names keys that change within episode {episode.index}; a task is"
                " constant, so leave them in the observation"
            )
        yield TextEpisode(
            task=task,
            observations=[codec.observation(value) for value in episode.observations],
            actions=[codec.action(value) for value in episode.actions],
            rewards=episode.rewards.tolist(),
            terminated=episode.outcome == "terminated",
            hash=int(dataset.table["hash"][number]),
            number=number,
        )


def _json(text: str) -> Any:
    """The value of JSON. Raises ValueError for other texts."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"the JSON is nested too deeply: {shown(text)}") from error


def _check_option(option: ResetOption, value: Any) -> None:
    """Raise ValueError unless `value` is allowed for a reset option: a finite number, one of its
    values, or any text if some of its values are texts.
    """
    if option.values is None:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise ValueError(f"{option.name} must be a number, got {value!r:.80}")
        return
    same = [each for each in option.values if type(each) is type(value)]
    if not same or (value not in same and not isinstance(value, str)):
        raise ValueError(f"{option.name} must be one of {option.values[:8]}, got {value!r:.80}")


def _at(value: Any, path: Sequence[str | int]) -> Any:
    for key in path:
        value = value[key]
    return value


def _put(tree: Any, path: Sequence[str | int], value: Any) -> Any:
    """The tree with a value at `path`; the value itself at the empty path."""
    if not path:
        return value
    tree[str(path[0])] = _put(tree.get(str(path[0]), {}), path[1:], value)
    return tree


def _raw(leaf: Leaf, tree: Any) -> Any:
    """The raw value of a leaf in a JSON tree. Raises ValueError."""
    for key in leaf.path:
        if not isinstance(tree, dict) or str(key) not in tree:
            raise ValueError(f"{leaf.name} is missing in {tree!r:.80}")
        tree = tree[str(key)]
    if isinstance(leaf.space, spaces.Text):
        if not isinstance(tree, str):
            raise ValueError(f"{leaf.name} must be a string, got {tree!r:.80}")
        return tree
    array = np.asarray(tree)  # ValueError where the lists have several lengths
    if array.shape != leaf.shape or array.dtype.kind not in "fiub":
        raise ValueError(f"{leaf.name} must have shape {leaf.shape}, got {tree!r:.80}")
    if outside(leaf.space, array[None], bounds="ignore")[0]:
        raise ValueError(f"{leaf.name} must be in {leaf.space}, got {tree!r:.80}")
    value = array.astype(leaf.dtype)
    return value if leaf.shape or isinstance(leaf.space, spaces.Box) else value[()]


def _nested(space: Space, path: tuple[str | int, ...], values: Mapping[Any, Any]) -> Any:
    if isinstance(space, spaces.Dict):
        return {k: _nested(child, (*path, k), values) for k, child in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        parts = enumerate(space.spaces)
        return tuple(_nested(child, (*path, i), values) for i, child in parts)
    return values[path]
