"""The state of a vector of environments in a world, between steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mesocosm.model.groups import MemberGroups
from mesocosm.model.tensors import Parts


@dataclass(frozen=True)
class Context:
    """Everything that the future of a session depends on, except its keys: pure data, float32 and
    int64, on the CPU or the world's device.
    """

    clock: int  # steps of the session so far
    past_observation: Parts
    """[B, C, ...]: o_t of the steps in columns 0 .. C-1 of the window (C = 0 without history)"""
    past_action: Parts  # [B, C, ...]
    start_column: Tensor  # [B] int64: where each environment's present episode begins
    observation: Parts  # [B, ...] the present observation
    task: Parts  # [B, ...]
    member: Tensor  # [B] int64

    def to_numpy(self) -> dict[str, NDArray[Any]]:
        """Flat arrays for a wire without pickle."""
        arrays: dict[str, NDArray[Any]] = {"clock": np.asarray(self.clock, dtype=np.int64)}
        for field in fields(Context):
            value = getattr(self, field.name)
            if isinstance(value, Parts):
                arrays[f"{field.name}.numbers"] = value.numbers.cpu().numpy()
                arrays[f"{field.name}.categories"] = value.categories.cpu().numpy()
            elif isinstance(value, Tensor):
                arrays[field.name] = value.cpu().numpy()
        return arrays

    @staticmethod
    def from_numpy(arrays: Mapping[str, NDArray[Any]]) -> Context:
        """The inverse of `to_numpy`. Raises ValueError that names a missing or ill-typed array."""

        def tensor(name: str, dtype: type = np.int64) -> Tensor:
            actual = arrays[name].dtype if name in arrays else "no array"
            if actual != dtype:
                raise ValueError(f"context array {name!r} must be {np.dtype(dtype)}, got {actual}")
            return torch.from_numpy(np.array(arrays[name]))

        def parts(name: str) -> Parts:
            return Parts(tensor(f"{name}.numbers", np.float32), tensor(f"{name}.categories"))

        return Context(
            int(tensor("clock")),
            parts("past_observation"),
            parts("past_action"),
            tensor("start_column"),
            parts("observation"),
            parts("task"),
            tensor("member"),
        )


@dataclass(frozen=True)
class Carry(Context):
    """The state of B environments between steps: the past has W columns, of which `position` are
    written. `World.step` consumes it: the cache and the past are written in place.
    """

    groups: MemberGroups
    position: int  # the column that the next step writes; W: the cache is rebuilt first
    cache: Tensor | None

    @property
    def context(self) -> Context:
        """A copy that later steps do not change."""
        past = slice(0, self.position)
        return Context(
            self.clock,
            self.past_observation[:, past].clone(),
            self.past_action[:, past].clone(),
            self.start_column.clone(),
            self.observation.clone(),
            self.task.clone(),
            self.member.clone(),
        )


@dataclass(frozen=True)
class StepOut:
    """The result of a step for each of B environments."""

    observation: Parts  # [B, ...] o_{t+1}, normalised
    reward: Tensor  # [B] float32, raw units
    terminated: Tensor  # [B] bool, drawn with probability `p_terminated`
    p_terminated: Tensor  # [B] float32
    duration: Tensor  # [B] float32, raw units; zeros without durations
    disagreement: Tensor | None
    """[B] float32: the distance between the members' expectations (`net.spread`). A tenth of
    held-out transitions exceed 1. 0 for one member; None if it was not requested.
    """
    diverged: Tensor
    """[B] bool: the draw was not finite, as happens with unstable dynamics far from the data. The
    environment stays where it was, with no reward and not terminated; end its episode.
    """


@dataclass(frozen=True)
class Prediction:
    """The expected next step of B environments, differentiable."""

    numbers: Tensor  # [B, n] of o_{t+1}, normalised
    reward: Tensor  # [B] raw units, of that o_{t+1}
    p_terminated: Tensor  # [B] of that o_{t+1}; 0 or 1, without gradient, where it is known
    duration: Tensor  # [B] raw units, >= 0; zeros without durations
    disagreement: Tensor | None  # [B] as in `StepOut.disagreement`; None if it was not requested


def prefixed(prefix: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The same arrays under names that start with `prefix`."""
    return {f"{prefix}{name}": value for name, value in arrays.items()}


def grouped(arrays: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The arrays whose names start with `prefix`, named without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in arrays.items()
        if name.startswith(prefix)
    }
