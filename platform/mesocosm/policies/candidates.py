"""Candidate commands: how an agent acts in texts. It chooses among the commands that make sense.

The candidates of a step are a function `candidates(first_text, text)` of the episode's first and
latest text, so that a learned world lists them as reality does; or reality lists them itself, in
`info["admissible_commands"]`. A network sees them as padded token ids [K, L] with a mask, in one
flat row with the ids of the texts (`CandidateShape`), and chooses a number below K.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from mesocosm import user_code
from mesocosm.datasets.texts import shown, text_problem
from mesocosm.errors import UsageError

INFOS = "infos"
"""The value of the key `candidates` for commands that reality lists."""
COMMANDS = "admissible_commands"
"""The info that lists them."""
PREFIX = "candidates"
"""Prefix of the names of candidate functions. A policy names its function, so this keeps a
downloaded policy from running any other function.
"""
FEATURES = 9
"""Numbers that describe a candidate in relation to the texts, see `_features`."""
RECENT = 4
"""The number of last commands that count as recent."""
_WORD = re.compile(r"\w+")
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_STOP = frozenset(("a", "an", "and", "in", "is", "of", "on", "the", "to", "with", "you", "your"))

Function = Callable[[str, str], Sequence[str]]
"""(first text, latest text) -> candidates"""


@dataclass(frozen=True)
class CandidateShape:
    """The layout of a row: numbers of token ids of each part, then the candidates' features and
    their mask. Ids are hashes of words and of pairs of words, from 1 to `buckets`; 0 pads.
    """

    candidates: int = 32
    """K, the most candidates of a step; more are left out."""
    words: int = 24
    """L, the ids of a candidate."""
    start: int = 96
    """Ids of the episode's first text."""
    goal: int = 32
    """Ids of the sentence of the first text that has the word "task", or else its last one."""
    text: int = 160
    """Ids of the latest text."""
    ending: int = 24
    """Ids of the last sentence of the latest text."""
    history: int = 96
    """Ids of the commands so far, the latest first."""
    buckets: int = 4096

    @property
    def parts(self) -> dict[str, int]:
        """The ids of the texts by part, in the order of a row."""
        names = ("start", "goal", "text", "ending", "history")
        return {name: getattr(self, name) for name in names}

    @property
    def ids(self) -> int:
        """The ids of a row, which come first."""
        return sum(self.parts.values()) + self.candidates * self.words

    @property
    def width(self) -> int:
        """The numbers of a row."""
        return self.ids + self.candidates * (FEATURES + 1)

    def to_json(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class CandidateSource:
    """The source of an agent's candidates."""

    name: str
    """`infos`, or `module:function`."""
    function: Function | None
    """The loaded function, or None if the name is `infos`."""

    @property
    def identity(self) -> list[str]:
        """The facts that decide the candidates: the name, and a hash of the function's code."""
        return [self.name, "" if self.function is None else user_code.source_hash(self.function)]


@dataclass(frozen=True)
class Candidates:
    """How an agent lists and sees its commands."""

    source: CandidateSource
    shape: CandidateShape


def load_source(name: str, key: str = "candidates") -> CandidateSource:
    """The source of the config value `name`.

    Args:
        name: `infos`, or `module:function`.
        key: The config key, for the UsageError.

    Raises:
        UsageError: There is no such function, or its name does not begin with `candidates`.
    """
    if name == INFOS:
        return CandidateSource(name, None)
    setting = f"{key}={name!r}"
    if ":" not in name:
        raise UsageError(f"{key} must be {INFOS} or module:function, got {name!r}")
    if not user_code.split_name(name, setting)[1].startswith(PREFIX):
        raise UsageError(
            f"{setting}: the function's name must begin with {PREFIX!r}; rename it, so that a"
            " policy from elsewhere can name no other function"
        )
    return CandidateSource(name, user_code.load_function(name, setting))


def check_spaces(observation: gym.Space[Any], action: gym.Space[Any], key: str) -> None:
    """Raise UsageError unless both spaces are texts; `key` is the config key that needs them."""
    for name, space in (("observation", observation), ("action", action)):
        if not isinstance(space, spaces.Text):
            raise UsageError(
                f"{key} must be null unless observations and actions are texts, got the {name}"
                f" space {space}; leave it out"
            )


class CandidateEpisodes:
    """The candidates of B environments that step together, and their memory of the episode."""

    def __init__(
        self,
        source: CandidateSource,
        shape: CandidateShape,
        action_space: spaces.Text,
        num_envs: int,
    ):
        """Begin before the first texts.

        Args:
            source: Lists the candidates.
            shape: The layout of the rows.
            action_space: Candidates outside of it are left out.
            num_envs: B.
        """
        self.source, self.shape, self.action_space = source, shape, action_space
        self._first: list[str | None] = [None] * num_envs
        self._history: list[list[str]] = [[] for _ in range(num_envs)]
        self.commands: list[list[str]] = [[] for _ in range(num_envs)]
        """The candidates after the latest texts, at least one in each environment."""

    def __len__(self) -> int:
        return len(self._first)

    def restart(self, mask: NDArray[np.bool_]) -> None:
        """New episodes for the environments of `mask` [B]: their next text is a first one."""
        for row in np.flatnonzero(mask).tolist():
            self._first[row], self._history[row] = None, []

    def observe(
        self, texts: Sequence[str], listed: Sequence[Any] | None = None
    ) -> NDArray[np.float32]:
        """Read the next texts.

        Args:
            texts: [B] observations.
            listed: [B] lists of commands, for a source `infos`; None in an environment keeps its
                candidates, as after a step that failed.

        Returns:
            [B, shape.width] rows for the network.

        Raises:
            UsageError: The source is `infos`, and reality lists no commands.
        """
        rows = np.zeros((len(texts), self.shape.width), np.float32)
        for row, text in enumerate(texts):
            if self._first[row] is None:
                self._first[row] = text
            first = self._first[row] or ""
            if self.source.function is not None:
                listing = self.source.function(first, text)
            else:
                listing = _of_infos(listed, row, self.commands[row])
            self.commands[row] = self._usable(listing)
            self._write(rows[row], row, text)
        return rows

    def take(self, chosen: NDArray[Any]) -> tuple[str, ...]:
        """The commands of B chosen numbers, which become part of the history.

        Raises:
            UsageError: A number does not belong to a candidate.
        """
        numbers = np.asarray(chosen).reshape(-1).tolist()
        for commands, number in zip(self.commands, numbers, strict=True):
            if not 0 <= number < len(commands):
                raise UsageError(
                    f"an action must be the number of one of the {len(commands)} candidates, got"
                    f" {number}; they are {commands}"
                )
        pairs = zip(self.commands, numbers, strict=True)
        taken = tuple(commands[number] for commands, number in pairs)
        for history, command in zip(self._history, taken, strict=True):
            history.append(command)
        return taken

    def number_of(self, row: int, command: str) -> int:
        """The number of a command among the candidates of an environment.

        Raises:
            UsageError: It is not a candidate.
        """
        if command not in self.commands[row]:
            raise UsageError(
                f"an action must be one of the candidates {self.commands[row]}, got"
                f" {shown(command)}; choose one of them, or correct candidates={self.source.name}"
            )
        return self.commands[row].index(command)

    def note(self, row: int, command: str) -> None:
        """Add any command to the history of an environment."""
        self._history[row].append(command)

    def state(self) -> dict[str, Any]:
        """The memory, for `restore`."""
        return {"first": self._first, "history": self._history, "commands": self.commands}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state`."""
        self._first, self.commands = list(state["first"]), [list(x) for x in state["commands"]]
        self._history = [list(history) for history in state["history"]]

    def _usable(self, listing: Sequence[str]) -> list[str]:
        """The distinct candidates that are valid actions, at most K. Without any, one arbitrary
        action: an imagined text may allow no command.
        """
        actions = [c for c in dict.fromkeys(listing) if text_problem(self.action_space, c) is None]
        if not actions:
            character = min(self.action_space.character_set)
            return [character * max(1, self.action_space.min_length)]
        return actions[: self.shape.candidates]

    def _write(self, out: NDArray[np.float32], row: int, text: str) -> None:
        """Write the row of an environment into zeros."""
        shape, first, history = self.shape, self._first[row] or "", self._history[row]
        goal, ending = _goal(first), _sentences(text)[-1]
        parts = {
            "start": _ids(first, shape.buckets),
            "goal": _ids(goal, shape.buckets),
            "text": _ids(text, shape.buckets),
            "ending": _ids(ending, shape.buckets),
            "history": [i for command in history[::-1] for i in _ids(command, shape.buckets)],
        }
        at = 0
        for name, length in shape.parts.items():
            ids = parts[name][:length]
            out[at : at + len(ids)] = ids
            at += length
        commands, most = self.commands[row], shape.candidates
        features = at + most * shape.words
        for i, command in enumerate(commands):
            ids = _ids(command, shape.buckets)[: shape.words]
            start = at + i * shape.words
            out[start : start + len(ids)] = ids
            start = features + i * FEATURES
            out[start : start + FEATURES] = _features(command, goal, text, ending, history)
        mask = features + most * FEATURES
        out[mask : mask + len(commands)] = 1.0


def _of_infos(listed: Sequence[Any] | None, row: int, before: Sequence[str]) -> Sequence[str]:
    listing = None if listed is None else listed[row]
    if listing is not None:
        return [str(command) for command in listing]
    if not before:
        raise UsageError(
            f"candidates=infos needs info[{COMMANDS!r}], which this environment does not give; set"
            " candidates=module:function"
        )
    return before


@lru_cache(maxsize=4096)
def _words(text: str) -> frozenset[str]:
    return frozenset(_WORD.findall(text.lower())) - _STOP


@lru_cache(maxsize=4096)
def _ids(text: str, buckets: int) -> list[int]:
    """Ids of the words of a text and of its pairs of neighbours, in the order of the text."""
    words = _WORD.findall(text.lower())
    grams = [gram for i, word in enumerate(words) for gram in (word, " ".join(words[i : i + 2]))]
    return [1 + zlib.crc32(gram.encode()) % buckets for gram in dict.fromkeys(grams)]


@lru_cache(maxsize=4096)
def _sentences(text: str) -> list[str]:
    return [part for part in _SENTENCE.split(text) if part.strip()] or [""]


@lru_cache(maxsize=4096)
def _goal(first: str) -> str:
    tasks = [part for part in _sentences(first) if "task" in part.lower()]
    return (tasks or _sentences(first))[-1]


def _features(
    command: str, goal: str, text: str, ending: str, history: Sequence[str]
) -> tuple[float, ...]:
    """Shares of a command's words in the texts, and how often it was given before."""
    words, goals, last = _words(command), _words(goal), _words(ending)
    size = max(1, len(words))
    common, held = len(words & goals), len(goals & last) / 3
    return (
        common / size,
        common / 3,
        len(words & _words(text)) / size,
        len(words & last) / size,
        held,
        held * common / size,
        min(history.count(command), 3) / 3,
        float(command in history[-1:]),
        float(command in history[-RECENT:]),
    )
