"""Policies of `chores` that act on texts alone: experts, and wrong-headed ones.

As behaviours: `{kind: scripted, function: mesocosm.envs.text.chores_policies:ChoresExpert}`; kind
`noisy` replaces a share of the commands by random ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from mesocosm.datasets.texts import text_problem
from mesocosm.envs.text.chores import Chores
from mesocosm.envs.text.household import TREATMENTS, VERBS, preposition
from mesocosm.envs.text.household_text import (
    StartFields,
    ViewFields,
    candidates,
    parse_start,
    parse_view,
)

Choice = TypeVar("Choice")
FAILING = 0.1
"""The share of random commands that are likely impossible."""


class ChoresExpert:
    """Solves every task: looks into one place after the other, and goes back to none.

    An `EpisodeAct` (`mesocosm.envs.episode`): one object acts in one episode at a time. A text with
    a task begins one, also without `start`.
    """

    def __init__(self) -> None:
        self._begin("")

    def _begin(self, first_text: str) -> None:
        self._first_text, self._visited = first_text, set[str]()

    def start(self, k: int, rng: np.random.Generator) -> None:
        """Begin an episode: the next observation is its first text."""
        self._begin("")

    def __call__(self, observation: str, rng: np.random.Generator) -> str:
        """The command after an observation."""
        start, view, commands = self._read(observation)
        return _possible_text(self._choose(start, view, commands, rng)) if commands else "look"

    def random_action(self, observation: str, rng: np.random.Generator) -> str:
        """A random candidate, or with probability FAILING a command that is likely impossible."""
        start, view, commands = self._read(observation)
        if not commands or rng.random() < FAILING:
            return _possible_text(_impossible(start, view, rng))
        return _possible_text(drawn(commands, rng))

    def _read(self, observation: str) -> tuple[StartFields, ViewFields, list[str]]:
        if not self._first_text or parse_start(observation).goal:
            self._begin(observation)
        view = parse_view(observation)
        if view.place and view.lid != "closed":
            self._visited.add(view.place)
        commands = candidates(self._first_text, observation)
        return parse_start(self._first_text), view, commands

    def _choose(
        self, start: StartFields, view: ViewFields, commands: list[str], rng: np.random.Generator
    ) -> str:
        if view.carried == start.goal:
            return self._deliver(start, view)
        if view.place and view.lid == "closed":
            return f"open {view.place}"
        if view.carried:
            return _put(view) if view.place else drawn(commands, rng)
        if start.goal in (view.contents or ()):
            return f"take {start.goal} from {view.place}"
        return self._search(start, commands, rng)

    def _search(self, start: StartFields, commands: list[str], rng: np.random.Generator) -> str:
        left = [place for place in start.places if place not in self._visited]
        return f"go to {left[0]}" if left else drawn(commands, rng)

    def _deliver(self, start: StartFields, view: ViewFields) -> str:
        """The next command once the right object is carried."""
        place, treatment = view.place, self._treatment(start, view)
        if treatment is not None:
            verb, where = treatment
            return f"{verb} {view.carried} with {where}" if place == where else f"go to {where}"
        target = self._target(start)
        if place != target:
            return f"go to {target}"
        return f"open {place}" if view.lid == "closed" else _put(view)

    def _treatment(self, start: StartFields, view: ViewFields) -> tuple[str, str] | None:
        """The (verb, place) of the treatment that the object still lacks."""
        if start.kind == "plain" or view.state == start.kind:
            return None
        verb = VERBS[start.kind]
        places = [place for place in start.places if place in TREATMENTS[verb][1]]
        return (verb, places[0]) if places else None

    def _target(self, start: StartFields) -> str:
        return start.destination


class Untreated(ChoresExpert):
    """Brings the object without its treatment."""

    def _treatment(self, start: StartFields, view: ViewFields) -> tuple[str, str] | None:
        return None


class WrongPlace(ChoresExpert):
    """Brings the object to a place that the task does not name."""

    def _target(self, start: StartFields) -> str:
        others = [place for place in start.places if place != start.destination]
        return others[0] if others else start.destination


class NoSearch(ChoresExpert):
    """Wanders at random until the object is in sight."""

    def _search(self, start: StartFields, commands: list[str], rng: np.random.Generator) -> str:
        return drawn(commands, rng)


class AnyObject(ChoresExpert):
    """Brings whatever object it sees first."""

    def _read(self, observation: str) -> tuple[StartFields, ViewFields, list[str]]:
        start, view, commands = super()._read(observation)
        goal = view.carried or next(iter(view.contents or ()), start.goal)
        return (
            StartFields(start.room, start.places, "plain", goal, start.destination),
            view,
            commands,
        )


class FirstCommand(ChoresExpert):
    """Always takes the first candidate."""

    def _choose(
        self, start: StartFields, view: ViewFields, commands: list[str], rng: np.random.Generator
    ) -> str:
        return commands[0]


def drawn(values: Sequence[Choice], rng: np.random.Generator) -> Choice:
    """One of the values, uniformly."""
    return values[int(rng.integers(len(values)))]


def _possible_text(command: str) -> str:
    """The command, or "look" where it is no text of the action space: words of an imagined text may
    make one that is none.
    """
    return command if text_problem(Chores.action_space, command) is None else "look"


def _put(view: ViewFields) -> str:
    return f"put {view.carried} {preposition(view.place)} {view.place}"


def _impossible(start: StartFields, view: ViewFields, rng: np.random.Generator) -> str:
    """A command of words that the texts have, which is likely impossible."""
    thing = drawn([start.goal, *(view.contents or ()), *filter(None, [view.carried])], rng)
    place = drawn(start.places or ("shelf",), rng)
    patterns: list[Any] = [
        f"take {thing} from {place}",
        f"put {thing} {preposition(place)} {place}",
        f"open {place}",
        f"close {place}",
        *(f"{verb} {thing} with {place}" for verb in TREATMENTS),
        "look",
    ]
    return str(drawn(patterns, rng))
