"""The state of a vector of environments in a text world, between steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mesocosm.model.language.cache import KeyCache
from mesocosm.model.language.stream import Marked, retained, start_tokens


class Texts(tuple[str, ...]):
    """B texts, where other families have `Parts`."""

    def to(self, device: torch.device | str) -> Texts:
        """Itself: texts are on no device."""
        return self

    def __getitem__(self, index: Any) -> Any:
        """The text at an integer, or the `Texts` at an array of them."""
        if isinstance(index, np.ndarray | Tensor | list):
            return Texts(tuple.__getitem__(self, int(i)) for i in index)
        return tuple.__getitem__(self, index)

    def where(self, mask: Tensor, other: Sequence[str]) -> Texts:
        """Self where `mask` [B] is true, `other` elsewhere."""
        rows = zip(mask.tolist(), self, other, strict=True)
        return Texts(one if chosen else two for chosen, one, two in rows)


@dataclass(frozen=True)
class TextContext:
    """Everything that the future of a session depends on, except its keys: the texts in each
    environment's window. `TextWorld.restore` continues from them with the same bits.
    """

    task: list[str]  # B
    start: list[str]
    """[B]: o_0, which always stays in the window."""
    steps: list[list[tuple[str, str]]]
    """[B][...]: the (action, observation) pairs in the window, of consecutive last steps"""
    member: Tensor  # [B] int64
    whole: bool = False
    """The steps are all of the episode, not those in the window."""


class EpisodeWindow:
    """The texts and tokens of one environment's window."""

    def __init__(self, tokenizer: Marked, task: str, start: str):
        self._tokenizer = tokenizer
        self.task, self.start = task, start
        self.steps: list[tuple[str, str]] = []
        self._lengths: list[int] = []
        self.tokens = start_tokens(tokenizer, task, start)
        self.start_length = len(self.tokens)
        """Tokens of the start, which stays when steps are dropped."""

    def action_tokens(self, action: str) -> list[int]:
        """The tokens of an action and its mark."""
        return [*self._tokenizer.encode(action), self._tokenizer.eoa]

    def observation_tokens(self, observation: str) -> list[int]:
        """The tokens of an observation and its mark."""
        return [*self._tokenizer.encode(observation), self._tokenizer.eoo]

    def add(self, action: str, observation: str) -> None:
        """Append a step. The tokens after an action that is already there are replaced."""
        step = [*self.action_tokens(action), *self.observation_tokens(observation)]
        del self.tokens[self.start_length + sum(self._lengths) :]
        self.tokens += step
        self.steps.append((action, observation))
        self._lengths.append(len(step))

    def replace_last(self, observation: str) -> int:
        """Put another observation in place of the last one.

        Returns:
            The number of tokens before it, which stay.
        """
        action, _ = self.steps.pop()
        del self.tokens[len(self.tokens) - self._lengths.pop() :]
        before = len(self.tokens) + len(self.action_tokens(action))
        self.add(action, observation)
        return before

    def room_for(self, length: int, window: int) -> bool:
        """Drop the older steps if `length` more tokens would not fit. True if they were dropped."""
        if len(self.tokens) + length <= window:
            return False
        count = retained(self.start_length, self._lengths, window)
        if self.start_length + sum(self._lengths[len(self._lengths) - count :]) + length > window:
            count = 0
        steps = self.steps[len(self.steps) - count :]
        self.steps, self._lengths = [], []
        del self.tokens[self.start_length :]
        for action, observation in steps:
            self.add(action, observation)
        return True

    def replay(self, steps: Sequence[tuple[str, str]], longest: int, window: int) -> None:
        """Append steps as a session does: older ones are dropped where an action and the longest
        observation would not fit.
        """
        for action, observation in steps:
            self.room_for(len(self.action_tokens(action)) + longest, window)
            self.add(action, observation)

    def copy(self) -> EpisodeWindow:
        """An independent copy."""
        other = EpisodeWindow(self._tokenizer, self.task, self.start)
        for action, observation in self.steps:
            other.add(action, observation)
        return other


@dataclass
class TextCarry:
    """B environments: `TextWorld.step` changes it in place."""

    windows: list[EpisodeWindow]
    member: Tensor  # [B] int64: the member that imagines each
    cache: KeyCache
    """B * K rows: member k of environment b has row b * K + k. Rows of members that do not imagine
    fall behind until their opinion is asked for."""

    @staticmethod
    def joined(carries: Sequence[TextCarry]) -> TextCarry:
        """All environments of several carries of one world, whose windows are shared."""
        windows = [window for carry in carries for window in carry.windows]
        members = torch.cat([carry.member for carry in carries])
        return TextCarry(windows, members, KeyCache.joined([carry.cache for carry in carries]))

    def part(self, start: int, stop: int) -> TextCarry:
        """The environments from `start` to `stop`, with a cache of their own."""
        members = self.cache.batch // len(self.windows)
        rows = torch.arange(start * members, stop * members, device=self.member.device)
        return TextCarry(self.windows[start:stop], self.member[start:stop], self.cache.select(rows))

    @property
    def context(self) -> TextContext:
        """A copy that later steps do not change."""
        return TextContext(
            [window.task for window in self.windows],
            [window.start for window in self.windows],
            [list(window.steps) for window in self.windows],
            self.member.clone(),
        )

    @property
    def observations(self) -> list[str]:
        """The present observation of each environment."""
        return [w.steps[-1][1] if w.steps else w.start for w in self.windows]

    @property
    def rows(self) -> Tensor:
        """[B] int64: the cache's row of each environment's imagining member."""
        members = self.cache.batch // len(self.windows)
        return torch.arange(len(self.windows), device=self.member.device) * members + self.member


@dataclass(frozen=True)
class TextStep:
    """The result of a step for each of B environments."""

    observation: list[str]  # o_{t+1}
    reward: Tensor  # [B] float32, raw units
    terminated: Tensor  # [B] bool, drawn with probability `p_terminated`
    p_terminated: Tensor  # [B] float32
    surprise: Tensor
    """[B] float32: the nats of the observation's least likely token, at temperature 1."""
    disagreement: Tensor | None
    """[B] float32: the standard deviation over members of log p(o_{t+1}) in nats a token; with one
    member the surprise. Divided by the world's scale. None if it was not requested."""
    cut: Tensor  # [B] bool: the text reached the longest of the data without an end
    tokens: Tensor  # [B] int64: generated tokens, the mark included

    def part(self, start: int, stop: int) -> TextStep:
        """The results of the environments from `start` to `stop`."""
        values: Any = {field.name: getattr(self, field.name) for field in fields(self)}
        rows: Any = {k: None if v is None else v[start:stop] for k, v in values.items()}
        return TextStep(**rows)


def ragged(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids [B, C], count [B]) int64 of token lists, filled up with zeros."""
    count = [len(sequence) for sequence in sequences]
    ids = torch.zeros(len(sequences), max([1, *count]), dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
    return ids.to(device), torch.tensor(count, dtype=torch.int64, device=device)
