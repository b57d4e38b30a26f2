"""Episodes as token streams, `<bos> task <eoa> o_0 <eoo> a_0 <eoa> o_1 <eoo> a_1 <eoa> ...`, cut to
a window and packed into rows. An episode without a task starts with `<bos> o_0 <eoo>`.

The task and o_0 are scored as "task", the later observations as "dynamics", each with its `<eoo>`.
Actions are read and not scored. The reward and the termination of a step are predicted from the
state at its observation's `<eoo>`.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mesocosm.errors import UsageError
from mesocosm.model.rng import member_mask, mix
from mesocosm.model.spec import Spec

READ, TASK, DYNAMICS = 0, 1, 2
"""The loss part that a token counts for; READ is none."""


class Marked(Protocol):
    """The part of a tokenizer that a stream uses."""

    bos: int
    eoo: int
    eoa: int

    def encode(self, text: str) -> Sequence[int]: ...


@dataclass(frozen=True)
class TextEpisode:
    """An episode of T steps, or its first T, as texts."""

    task: str  # empty without a task
    observations: Sequence[str]
    """[T+1], without the keys of the task"""
    actions: Sequence[str]  # [T]
    rewards: Sequence[float]  # [T], raw
    terminated: bool  # after the last step
    hash: int = 0
    """int64 of the episode, which decides the members that train on it"""
    number: int = 0
    """Its number in the dataset."""

    @property
    def ends(self) -> list[bool]:
        """[T], true only at a terminal step."""
        last = len(self.actions) - 1
        return [self.terminated and step == last for step in range(len(self.actions))]


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one episode that fit in a window: arrays [N]."""

    ids: NDArray[np.int64]
    part: NDArray[np.int64]  # READ, TASK or DYNAMICS
    mark: NDArray[np.bool_]  # the `<eoo>` of a scored text
    reward: NDArray[np.float32]
    """The reward at the mark of a step: normalised as in Spec, or the index of the value."""
    ended: NDArray[np.bool_]  # at the mark of a step that terminates
    bytes: NDArray[np.int64]
    """The bytes at a mark: the UTF-8 bytes of the text, and 1 for the mark."""
    episode: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def steps(self) -> int:
        """The transitions that it scores."""
        return int((self.mark & (self.part == DYNAMICS)).sum())


@dataclass(frozen=True)
class TokenRows:
    """B rows of T tokens, each of one or more segments and padding: tensors [B, T]."""

    ids: Tensor  # int64
    position: Tensor  # int64 within the segment
    segment: Tensor | None
    """int64, -1 for padding; None: every row is one segment, with padding behind it."""
    part: Tensor  # int64
    mark: Tensor  # bool
    reward: Tensor  # float32
    ended: Tensor  # bool
    bytes: Tensor  # int64
    member: Tensor  # int64: the member that reads each token
    tokens: Tensor  # int64 scalar: those that are no padding

    def to(self, device: torch.device | str) -> TokenRows:
        """The same rows on `device`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {k: v.to(device) for k, v in values.items() if v is not None}
        return replace(self, **moved)

    def read_by(self, member: int) -> TokenRows:
        """The same rows, read by one member."""
        return replace(self, member=torch.full_like(self.member, member))

    @property
    def steps(self) -> Tensor:
        """[B, T] bool: the marks of scored transitions."""
        return self.mark & (self.part == DYNAMICS)


def retained(start: int, steps: Sequence[int], window: int) -> int:
    """How many of the last `steps` (their lengths in tokens) stay when a window is full: as many
    whole ones as fill half of it together with the start, which always stays.
    """
    room, count = window // 2 - start, 0
    for length in reversed(steps):
        if length > room:
            break
        room -= length
        count += 1
    return count


def segments(episode: TextEpisode, tokenizer: Marked, spec: Spec, window: int) -> list[Segment]:
    """Cut an episode so that every step is scored once, after as many tokens as a world would have
    at that step (see `retained`).

    Args:
        episode: The texts, of any length.
        tokenizer: Its marks are used.
        spec: Its rewards are used.
        window: The most tokens of a segment.

    Raises:
        UsageError: The start and one step do not fit in the window.
    """
    start = start_tokens(tokenizer, episode.task, episode.observations[0])
    start_bytes = _size(episode.observations[0]) + (_size(episode.task) if episode.task else 0)
    texts = episode.observations[1:]
    codes = reward_codes(spec, np.asarray(episode.rewards, np.float64))
    steps = [
        ([*tokenizer.encode(action), tokenizer.eoa], [*tokenizer.encode(text), tokenizer.eoo])
        for action, text in zip(episode.actions, texts, strict=True)
    ]
    lengths = [len(action) + len(text) for action, text in steps]
    longest = len(start) + max(lengths, default=0)
    if longest > window:
        raise UsageError(
            f"model.context must be >= {longest} tokens to hold an episode's start and its longest"
            f" step, got {window}; raise it, or shorten the texts"
        )
    result, first, last = [], 0, len(steps) - 1
    while True:
        read = retained(len(start), lengths[:first], window) if first else 0
        used, end = len(start) + sum(lengths[first - read : first]), first
        while end < len(steps) and used + lengths[end] <= window:
            used += lengths[end]
            end += 1
        piece = _Piece(episode.hash)
        piece.text(start, TASK if first == 0 else READ, start_bytes)
        for index in range(first - read, end):
            action, text = steps[index]
            piece.read(action)
            if index < first:
                piece.read(text)
            else:
                ended = episode.terminated and index == last
                piece.text(text, DYNAMICS, _size(texts[index]), codes[index], ended)
        result.append(piece.segment())
        first = end
        if first >= len(steps):
            return result


def start_tokens(tokenizer: Marked, task: str, observation: str) -> list[int]:
    """`<bos> task <eoa> o_0 <eoo>`, or `<bos> o_0 <eoo>` if the task is empty."""
    first = [*tokenizer.encode(task), tokenizer.eoa] if task else []
    return [tokenizer.bos, *first, *tokenizer.encode(observation), tokenizer.eoo]


def reward_codes(spec: Spec, rewards: NDArray[np.float64]) -> NDArray[np.float32]:
    """Raw rewards [T] as `Segment.reward` holds them. Raises UsageError for a reward that is not
    among `spec.reward_values`.
    """
    if spec.reward_values is None:
        return ((rewards - spec.reward_mean) / spec.reward_scale).astype(np.float32)
    values = np.asarray(spec.reward_values, np.float64)
    index = np.abs(rewards[:, None] - values).argmin(1) if len(rewards) else np.zeros(0, np.int64)
    far = np.abs(values[index] - rewards) > 1e-6 * (1 + np.abs(rewards))
    if far.any():
        raise UsageError(
            f"a reward must be one of the training data's {len(values)} values, got"
            f" {float(rewards[far][0])}; the reward set was measured on other data"
        )
    return index.astype(np.float32)


def pack(lengths: Sequence[int], window: int) -> list[list[int]]:
    """The segments of each row, by first fit of the longest first: rows are nearly full, and equal
    lengths give equal rows.

    Args:
        lengths: Tokens of each segment, at most `window`.
        window: Tokens of a row.
    """
    rows: list[list[int]] = []
    space: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect.bisect_left(space, (lengths[index], -1))
        if place == len(space):
            rows.append([])
            free, row = window, len(rows) - 1
        else:
            free, row = space.pop(place)
        rows[row].append(index)
        bisect.insort(space, (free - lengths[index], row))
    return rows


def collate(
    rows: Sequence[Sequence[Segment]], window: int, *, members: int = 1, draw: int = 0
) -> TokenRows:
    """Rows of `window` tokens.

    Args:
        rows: The segments of each row, at most `window` tokens.
        window: T.
        members: K. Each segment is read by one of the members that train on its episode.
        draw: Chooses the member, with the episode: pass the epoch.
    """
    shape = (len(rows), window)
    integers = {
        name: np.zeros(shape, np.int64) for name in ("ids", "position", "part", "bytes", "member")
    }
    flags = {name: np.zeros(shape, np.bool_) for name in ("mark", "ended")}
    arrays = {**integers, **flags, "reward": np.zeros(shape, np.float32)}
    place = np.full(shape, -1, np.int64)
    for row, parts in enumerate(rows):
        at = 0
        for index, part in enumerate(parts):
            span = slice(at, at + len(part))
            for name in ("ids", "part", "mark", "reward", "ended", "bytes"):
                arrays[name][row, span] = getattr(part, name)
            arrays["position"][row, span] = np.arange(len(part))
            arrays["member"][row, span] = segment_member(part.episode, draw, members)
            place[row, span] = index
            at += len(part)
    single = all(len(parts) == 1 for parts in rows)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    count = torch.tensor(sum(len(part) for parts in rows for part in parts))
    return TokenRows(segment=None if single else torch.from_numpy(place), tokens=count, **tensors)


def segment_member(episode: int, draw: int, members: int) -> int:
    """The member that reads a segment of an episode in the epoch `draw`: one of those that train on
    the episode (`rng.member_mask`).
    """
    if members == 1:
        return 0
    hashed = torch.tensor([episode])
    candidates = member_mask(hashed, members)[:, 0].nonzero().squeeze(1)
    key = int(mix(mix(hashed) + draw)) >> 1
    return int(candidates[key % len(candidates)])


def _size(text: str) -> int:
    """The bytes of a text and its mark."""
    return len(text.encode()) + 1


class _Piece:
    """Collects the tokens of a segment."""

    def __init__(self, episode: int):
        self._episode = episode
        self._ids: list[int] = []
        self._texts: list[tuple[int, int, int, float, bool, int]] = []
        """(start, end, part, reward, ended, bytes) of each scored text"""

    def read(self, ids: Sequence[int]) -> None:
        self._ids += ids

    def text(
        self, ids: Sequence[int], part: int, size: int, reward: float = 0.0, ended: bool = False
    ) -> None:
        start = len(self._ids)
        self._ids += ids
        if part != READ:
            self._texts.append((start, len(self._ids), part, reward, ended, size))

    def segment(self) -> Segment:
        size = len(self._ids)
        part, bytes_ = np.zeros(size, np.int64), np.zeros(size, np.int64)
        mark, ends = np.zeros(size, np.bool_), np.zeros(size, np.bool_)
        rewards = np.zeros(size, np.float32)
        for start, end, kind, reward, ended, length in self._texts:
            part[start:end] = kind
            mark[end - 1], ends[end - 1] = True, ended
            rewards[end - 1], bytes_[end - 1] = reward, length
        # `<bos>` opens the window and is not predicted.
        part[0] = READ
        ids = np.asarray(self._ids, np.int64)
        return Segment(ids, part, mark, rewards, ends, bytes_, self._episode)
