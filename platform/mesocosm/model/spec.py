"""What a world is made of, as the model sees it: slots of normalised numbers and of categories.
Imports torch only.

Numbers are normalised float32, categories int64. An observation, an action and a task are each a
`Parts`; how Gymnasium spaces become parts and back is `mesocosm.data.loading.codec`'s business.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextSpan:
    """Consecutive category slots that hold one text: category 0 ends (and pads) it, c > 0 is the
    c-th character.
    """

    start: int
    length: int
    min_length: int


@dataclass(frozen=True)
class PartSpec:
    """The slots of an observation, an action or a task: `numbers` first, then one slot a category."""

    numbers: int = 0
    bins: tuple[float, ...] = ()
    """The precision of each number, in normalised units: the width over which its density is
    integrated.
    """
    categories: tuple[int, ...] = ()
    """Cardinality of each category slot."""
    texts: tuple[TextSpan, ...] = ()
    grid: tuple[float | None, ...] = ()
    """Where an integer number has its zero, in normalised units: its values lie whole bins from
    there. None for a number that is no integer; empty where none is.
    """

    @property
    def slots(self) -> int:
        return self.numbers + len(self.categories)


@dataclass(frozen=True)
class Spec:
    """Everything the model must know of an environment."""

    observation: PartSpec
    action: PartSpec
    task: PartSpec = PartSpec()
    reward_values: tuple[float, ...] | None = None
    """Raw reward values where at most 64 are distinct (rewards are exact categories); None: rewards
    are regressed.
    """
    reward_mean: float = 0.0
    reward_scale: float = 1.0
    """Regressed rewards enter as (reward - reward_mean) / reward_scale."""
    reward_bin: float = 1e-3
    """Precision of a regressed reward, in units of `reward_scale`."""
    durations: bool = False
    duration_mean: float = 0.0
    duration_scale: float = 1.0
    duration_bin: float = 1e-3
    """As the reward's, for `info["duration"]`."""
    terminal_rate: float = 0.0
    """Share of training transitions that terminate."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def reward_size(self) -> float:
        """Root mean square of the data's rewards, raw units; 1 where all are 0."""
        constant = self.reward_values is not None and len(self.reward_values) == 1
        return math.hypot(self.reward_mean, 0.0 if constant else self.reward_scale) or 1.0

    @staticmethod
    def from_json(data: dict[str, Any]) -> Spec:
        def part(value: dict[str, Any]) -> PartSpec:
            texts = tuple(TextSpan(**t) for t in value["texts"])
            return PartSpec(
                value["numbers"],
                tuple(value["bins"]),
                tuple(value["categories"]),
                texts,
                tuple(value.get("grid", ())),
            )

        parts: dict[str, Any] = {
            name: part(data[name]) for name in ("observation", "action", "task")
        }
        values = data["reward_values"]
        rest: dict[str, Any] = {
            f.name: data[f.name]
            for f in fields(Spec)
            if f.name not in parts and f.name != "reward_values"
        }
        return Spec(**parts, reward_values=None if values is None else tuple(values), **rest)


@dataclass(frozen=True)
class Parts:
    """A batch of observations, actions or tasks: `numbers` [..., n] float32 normalised,
    `categories` [..., m] int64.
    """

    numbers: Tensor
    categories: Tensor

    def to(self, device: torch.device | str) -> Parts:
        return Parts(self.numbers.to(device), self.categories.to(device))

    def __getitem__(self, index: Any) -> Parts:
        """Index the leading (batch, step) dimensions."""
        return Parts(self.numbers[index], self.categories[index])

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
        """All zeros."""
        return Parts(
            torch.zeros(*shape, part.numbers, device=device),
            torch.zeros(*shape, len(part.categories), dtype=torch.int64, device=device),
        )


@dataclass(frozen=True)
class Windows:
    """B windows of up to W consecutive transitions of one episode each, and a side batch of rare
    events.

    Row t of `observation` is o_t, t = 0..W; transition t is (o_t, action_t) -> (o_{t+1}, reward_t,
    terminated_t, duration_t).
    """

    observation: Parts
    """[B, W+1, ...]"""
    action: Parts
    """[B, W, ...]"""
    task: Parts
    """[B, ...]"""
    reward: Tensor
    """[B, W] float32, normalised as Spec says; with `reward_values`, the index of the value as a
    float.
    """
    terminated: Tensor
    """[B, W] float32 in {0, 1}"""
    duration: Tensor
    """[B, W] float32 normalised; zeros without durations"""
    mask: Tensor
    """[B, W] bool: the transition is there (windows at an episode's end are shorter)"""
    start: Tensor
    """[B] bool: row 0 is the episode's first observation"""
    episode: Tensor
    """[B] int64: a hash of the episode, from which members draw their bootstrap masks"""
    events: Events | None = None
    seen: Parts | None = None
    """[B, W, ...]: o_t with noise, for all that reads it, where training corrupts its history;
    None: as it was. o_{t+1} stays true, so the change to it leads from the noisy o_t.
    """

    def to(self, device: torch.device | str) -> Windows:
        moved = {
            f.name: getattr(self, f.name).to(device)
            for f in fields(self)
            if getattr(self, f.name) is not None
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class Events:
    """E single transitions, terminals oversampled to about a third, for the termination network."""

    observation: Parts
    """[E, ...]"""
    action: Parts
    """[E, ...]"""
    next_observation: Parts
    """[E, ...]"""
    task: Parts
    """[E, ...]"""
    terminated: Tensor
    """[E] float32"""
    weight: Tensor
    """[E] float32 importance weights back to the data's own rate; they average about 1"""
    episode: Tensor
    """[E] int64 episode hashes"""

    def to(self, device: torch.device | str) -> Events:
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})
