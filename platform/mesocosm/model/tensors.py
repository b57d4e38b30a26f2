"""Batches of tensors in a model's slots, which `model/spec.py` describes."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from mesocosm.model.spec import PartSpec


@dataclass(frozen=True)
class Parts:
    """A batch of observations, actions or tasks."""

    numbers: Tensor  # [..., n] float32 normalised
    categories: Tensor  # [..., m] int64

    def to(self, device: torch.device | str) -> Parts:
        return Parts(self.numbers.to(device), self.categories.to(device))

    def __getitem__(self, index: Any) -> Parts:
        """Index the leading (batch, step) dimensions."""
        return Parts(self.numbers[index], self.categories[index])

    def clone(self) -> Parts:
        return Parts(self.numbers.clone(), self.categories.clone())

    def flatten(self) -> Parts:
        """Join the leading dimensions into one."""
        return Parts(self.numbers.flatten(0, -2), self.categories.flatten(0, -2))

    def repeat(self, steps: int) -> Parts:
        """[B, ...] -> [B, steps, ...]: every row at each step, without a copy."""
        return Parts(
            self.numbers.unsqueeze(1).expand(-1, steps, -1),
            self.categories.unsqueeze(1).expand(-1, steps, -1),
        )

    def roll(self, steps: int) -> Parts:
        """[B, W, ...]: the step dimension shifted, around its end."""
        return Parts(self.numbers.roll(steps, 1), self.categories.roll(steps, 1))

    def where(self, mask: Tensor, other: Parts) -> Parts:
        """Self where `mask` [...] is true, `other` elsewhere."""
        keep = mask.unsqueeze(-1)
        return Parts(
            torch.where(keep, self.numbers, other.numbers),
            torch.where(keep, self.categories, other.categories),
        )

    @property
    def device(self) -> torch.device:
        return self.numbers.device

    @staticmethod
    def empty(part: PartSpec, *shape: int, device: torch.device | str = "cpu") -> Parts:
        """All zeros, of the leading dimensions `shape`."""
        return Parts(
            torch.zeros(*shape, part.numbers, device=device),
            torch.zeros(*shape, len(part.categories), dtype=torch.int64, device=device),
        )


@dataclass(frozen=True)
class Transition:
    """The inputs of transitions of any leading shape [...]."""

    observation: Parts
    action: Parts
    task: Parts

    def flatten(self) -> Transition:
        """Join the leading dimensions into one."""
        parts = (self.observation, self.action, self.task)
        return Transition(*(part.flatten() for part in parts))


@dataclass(frozen=True)
class Outcome:
    """The results of transitions of the same leading shape [...]."""

    observation: Parts  # o_{t+1}
    duration: Tensor  # [...] float32 normalised; ignored without `Spec.durations`


@dataclass(frozen=True)
class Windows:
    """B windows of up to W consecutive transitions of one episode each, and a batch of rare events.

    Row t of `observation` is o_t, t = 0..W; transition t is (o_t, action_t) -> (o_{t+1}, reward_t,
    terminated_t, duration_t).
    """

    observation: Parts  # [B, W+1, ...]
    action: Parts  # [B, W, ...]
    task: Parts  # [B, ...]
    reward: Tensor
    """[B, W] float32, normalised as in Spec; with `reward_values`, the index of the value."""
    terminated: Tensor  # [B, W] float32 in {0, 1}
    duration: Tensor  # [B, W] float32 normalised; zeros without durations
    mask: Tensor  # [B, W] bool: the transition is valid (windows at an episode's end are shorter)
    start: Tensor  # [B] bool: row 0 is the episode's first observation
    episode: Tensor
    """[B] int64: a hash of the episode, from which members draw their bootstrap masks"""
    events: Events | None = None
    seen: Parts | None = None
    """[B, W, ...]: o_t with noise, which every reader of o_t sees instead; o_{t+1} stays true"""

    def to(self, device: torch.device | str) -> Windows:
        return replace(self, **_moved(self, device))


@dataclass(frozen=True)
class Events:
    """E single transitions, about a third of them terminal, for the termination network."""

    observation: Parts  # [E, ...]
    action: Parts  # [E, ...]
    next_observation: Parts  # [E, ...]
    task: Parts  # [E, ...]
    terminated: Tensor  # [E] float32
    weight: Tensor
    """[E] float32: importance weights back to the data's own rate, about 1 on average"""
    episode: Tensor  # [E] int64 episode hashes

    def to(self, device: torch.device | str) -> Events:
        return replace(self, **_moved(self, device))


def _moved(batch: Windows | Events, device: torch.device | str) -> dict[str, Any]:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value.to(device) for name, value in values.items() if value is not None}
