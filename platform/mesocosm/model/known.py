"""Known parts of a world: a user's functions of (o, a, o') in place of the learned reward and
termination.

A function receives torch tensors of a whole batch in the layout of the environment's spaces: a
tensor [B, *shape] for a Box, int64 [B, ...] for categories, a dict for a Dict and a tuple for a
Tuple. Floats are float64, so that thresholds fall as they do in the environment. It returns a
tensor [B]: of floats for the reward, of bools for the termination. It is pure, each row of its
result depends on the same row of its arguments, and it uses operators and torch functions, so that
gradients pass through it (`World.predict`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mesocosm import user_code
from mesocosm.errors import ArtifactError, UsageError
from mesocosm.model.layers import Constant
from mesocosm.model.tensors import Parts, Transition

Raw = Any
"""A batch in a space's layout: a Tensor, or dicts and tuples of these."""
REWARD, TERMINATED = "reward", "terminated"
_IMPORTED: dict[str, str] = {}
"""The hashes of modules when this process first imported a function from them."""


@dataclass(frozen=True)
class RawLeaf:
    """One Box, Discrete, MultiDiscrete or MultiBinary of a space, and its columns in `Parts`."""

    path: tuple[str | int, ...]
    shape: tuple[int, ...]
    columns: tuple[int, ...]
    """Columns of the numbers, or with `first` of the categories."""
    task: bool = False
    """True if the columns are those of the task rather than of the observation."""
    scale: tuple[float, ...] = ()
    mean: tuple[float, ...] = ()
    integers: bool = False
    first: tuple[int, ...] | None = None
    """The raw value of category 0 of each column."""

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> RawLeaf:
        """The inverse of `dataclasses.asdict`."""
        values: dict[str, Any] = {
            key: tuple(x) if isinstance(x, list) else x for key, x in data.items()
        }
        return RawLeaf(**values)


class RawSpace:
    """Normalised parts -> raw tensors in the layout of a space."""

    def __init__(self, leaves: Sequence[RawLeaf]):
        self.leaves = tuple(leaves)
        self._columns = [Constant(torch.tensor(leaf.columns, dtype=torch.int64)) for leaf in leaves]
        self._constants = [
            [Constant(torch.tensor(x, dtype=dtype)) for x, dtype in _constants(leaf)]
            for leaf in leaves
        ]

    def __call__(self, parts: Parts, task: Parts | None = None) -> Raw:
        """`parts` [B, ...], and the `task` of observations -> raw tensors [B, ...]."""
        values = []
        for leaf, columns, constants in zip(
            self.leaves, self._columns, self._constants, strict=True
        ):
            source = task if leaf.task and task is not None else parts
            x = source.numbers if leaf.first is None else source.categories
            x = x.index_select(-1, columns(x))
            if leaf.first is not None:
                x = x + constants[0](x)
            else:
                scale, mean = constants
                x = x.double() * scale(x) + mean(x)
                x = x.round().long() if leaf.integers else x
            values.append((leaf.path, x.unflatten(-1, leaf.shape) if leaf.shape else x.squeeze(-1)))
        return _nested(values)


def _constants(leaf: RawLeaf) -> list[tuple[Sequence[float], torch.dtype]]:
    if leaf.first is not None:
        return [(leaf.first, torch.int64)]
    return [(leaf.scale, torch.float64), (leaf.mean, torch.float64)]


def _nested(values: Sequence[tuple[tuple[str | int, ...], Tensor]]) -> Raw:
    """Tensors by their paths -> dicts (text keys) and tuples (numbered keys)."""
    if not values[0][0]:
        return values[0][1]
    groups: dict[str | int, list[tuple[tuple[str | int, ...], Tensor]]] = {}
    for (key, *rest), value in values:
        groups.setdefault(key, []).append((tuple(rest), value))
    children = {key: _nested(group) for key, group in groups.items()}
    return children if isinstance(next(iter(children)), str) else tuple(children.values())


@dataclass(frozen=True)
class KnownFunction:
    """A user's function and the hash of its module's file."""

    name: str
    """`module:function`"""
    source: str
    call: Callable[[Raw, Raw, Raw], Tensor]

    @staticmethod
    def load(name: str, key: str, source: str | None = None) -> KnownFunction:
        """Import a function.

        Args:
            name: `module:function`. The module's file defines the function.
            key: The config key, for messages.
            source: The hash that the module's file must have to be imported.

        Raises:
            UsageError: There is no such function.
            ArtifactError: The file has another hash, or changed after this process imported it.
        """
        setting = f"{key}={name!r}"
        module, _ = user_code.split_name(name, setting)
        path = user_code.module_path(module, setting)
        actual = user_code.bytes_hash(path.read_bytes())
        if source is not None and actual != source:
            raise ArtifactError(
                f"{setting} must come from a file of hash {source}, got {actual} ({path}); restore"
                " that file, or pretrain again"
            )
        if _IMPORTED.setdefault(module, actual) != actual:
            raise ArtifactError(
                f"{setting}: {path} changed while this process ran; start the process again"
            )
        function = user_code.load_function(name, setting)
        if user_code.source_hash(inspect.unwrap(function)) != actual:
            raise UsageError(
                f"{setting} must be a function that {path} itself defines; name the module that"
                " defines it"
            )
        return KnownFunction(name, actual, function)

    @property
    def identity(self) -> dict[str, str]:
        """A part of the world's id: another function, or file, is another world."""
        return {"function": self.name, "source": self.source}


@dataclass(frozen=True)
class Known:
    """The known functions of a world, and the layout of their arguments."""

    observation: RawSpace
    action: RawSpace
    reward: KnownFunction | None = None
    terminated: KnownFunction | None = None

    def outcomes(self, token: Transition, following: Parts) -> tuple[Tensor | None, Tensor | None]:
        """(rewards [B] float32, terminated [B] bool) of transitions [B]; None where not known."""
        arguments = (
            self.observation(token.observation, token.task),
            self.action(token.action),
            self.observation(following, token.task),
        )
        reward = terminated = None
        if self.reward is not None:
            reward = self.reward.call(*arguments).float()
        if self.terminated is not None:
            terminated = self.terminated.call(*arguments)
        return reward, terminated

    def to_json(self) -> dict[str, Any]:
        functions = {REWARD: self.reward, TERMINATED: self.terminated}
        spaces = {"observation": self.observation, "action": self.action}
        return {name: f.identity for name, f in functions.items() if f is not None} | {
            name: [asdict(leaf) for leaf in space.leaves] for name, space in spaces.items()
        }

    @staticmethod
    def from_json(data: Mapping[str, Any], world: str) -> Known:
        """Import the functions of the world named `world`.

        Raises:
            UsageError: A function cannot be imported.
            ArtifactError: Its file is not, byte for byte, that of the world's training: a world may
                come from a stranger, so it runs only code that its user already has.
        """
        observation, action = (
            RawSpace([RawLeaf.from_json(leaf) for leaf in data[name]])
            for name in ("observation", "action")
        )
        reward, terminated = (
            KnownFunction.load(
                data[part]["function"], f"world {world}: known.{part}", data[part]["source"]
            )
            if part in data
            else None
            for part in (REWARD, TERMINATED)
        )
        return Known(observation, action, reward, terminated)
