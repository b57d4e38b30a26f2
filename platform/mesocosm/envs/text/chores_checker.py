"""Replay of an imagined episode of `chores` under the true rules.

Objects that a text shows for the first time are taken over, if the true task distribution could
have put them there; the others are left out, and the step disagrees. Everything else must follow
from the rules and from what was shown before.
After a step that disagrees, the replay continues in the true state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import asdict

from mesocosm.envs.text.checks import EpisodeCheck, ImaginedStep, StepCheck
from mesocosm.envs.text.household import EASY, FULL, HEATERS, REWARDS, Household, appliances
from mesocosm.envs.text.household_text import parse_start, parse_view

FORM = "form"
"""The field that differs where a text has the right fields and another wording."""
CONTENTS = "contents"


def check_episode(
    first_text: str, steps: Iterable[ImaginedStep], *, easy: bool = False
) -> EpisodeCheck:
    """Check an imagined episode of `chores`.

    Args:
        first_text: The imagined observation of the reset.
        steps: The imagined steps, in order.
        easy: Check by the rules of `ChoresEasy-v0`.
    """
    checker = ChoresChecker(first_text, easy=easy)
    checks = tuple(checker.step(step) for step in steps)
    return EpisodeCheck(checker.start_problems, checks)


class ChoresChecker:
    """Checks one imagined episode step by step.

    Args:
        first_text: The imagined observation of the reset.
        easy: Check by the rules of `ChoresEasy-v0`.
    """

    def __init__(self, first_text: str, *, easy: bool = False):
        self.variant = EASY if easy else FULL
        start = parse_start(first_text)
        self.household = Household(
            room=start.room,
            places=list(dict.fromkeys(start.places)),
            kind=start.kind or "plain",
            goal=start.goal,
            destination=start.destination,
            contents={place: [] for place in start.places},
        )
        self.start_problems: tuple[str, ...] = tuple(self._start_problems(first_text))
        """Why the true task distribution cannot give the first text; empty if it can."""
        self._seen: set[str] = set()
        """Objects that a text has shown."""
        self._ended = False
        self._before = _fields(first_text)

    def step(self, imagined: ImaginedStep) -> StepCheck:
        """Check the next step. After a true end, the reward must be 0."""
        household = self.household
        place = _looked_into(household, imagined.action)
        lacking = False
        if place is not None:
            contents = self._possible(place, parse_view(imagined.observation).contents or ())
            household.contents[place] = contents
            self._seen |= set(contents)
            lacking = self._lacks_objects(place)
        outcome = household.apply(imagined.action)
        reward, ended = (0.0, True) if self._ended else (outcome.reward, outcome.terminated)
        self._ended = ended
        expected, shown = _fields(outcome.text), _fields(imagined.observation)
        differing = {name for name in expected if expected[name] != shown[name]}
        if not differing and imagined.observation != outcome.text:
            differing.add(FORM)
        if lacking:
            differing.add(CONTENTS)
        changed = [name for name in expected if expected[name] != self._before[name]]
        self._before = expected
        return StepCheck(
            revealed=outcome.revealed,
            agrees=not differing,
            expected=outcome.text,
            changed=tuple(changed),
            differing=tuple(sorted(differing)),
            reward=reward,
            reward_agrees=_nearest(imagined.reward) == reward,
            terminated=ended,
            termination_agrees=imagined.terminated == ended,
        )

    def _possible(self, place: str, shown: Iterable[str]) -> list[str]:
        """The objects among those shown that the place can hold at its first look."""
        house, (_, most) = self.household, self.variant.n_objects
        possible: list[str] = []
        for name in shown:
            others = {*self._seen, house.goal, *possible} - {name}
            rules = {
                "it is an object of this family": self._is_object(name),
                "it is nowhere else": name not in self._seen and name not in possible,
                "it is the only one of its kind": _noun(name) not in map(_noun, others),
                "the task is not solved": (name, place) != (house.goal, house.destination),
                "there are not too many objects": len(others) < most,
            }
            if all(rules.values()):
                possible.append(name)
        return possible

    def _lacks_objects(self, place: str) -> bool:
        """True if objects must be in this place, because no other place can still hold them."""
        house, (least, _) = self.household, self.variant.n_objects
        hidden = {p for p in house.places if p not in (*house.shown, *HEATERS, place)}
        lost = house.goal not in self._seen and not hidden - {house.destination}
        return lost or (not hidden and len(self._seen) < least)

    def _is_object(self, name: str) -> bool:
        color, _, noun = name.rpartition(" ")
        return noun in self.variant.objects and color in self.variant.colors

    def _start_problems(self, text: str) -> list[str]:
        house, variant, start = self.household, self.variant, parse_start(text)
        known, places = (*variant.surfaces, *variant.containers), start.places
        least, most = variant.n_places
        required = appliances(house.kind, variant) if house.kind in variant.kinds[1:] else []
        rules = {
            "the wording is not that of a first text": house.first_text() == text,
            "the room is unknown": start.room in variant.rooms,
            "a place is unknown": set(places) <= set(known),
            "a place is listed twice": len(set(places)) == len(places),
            f"there must be {least} to {most} places": least <= len(places) <= most,
            "the kind of task is unknown": start.kind in variant.kinds,
            "the object of the task is unknown": self._is_object(start.goal),
            "the destination is not among the places": start.destination in places,
            "no place can treat the object": not required
            or any(p in places and p != start.destination for p in required),
        }
        return [problem for problem, holds in rules.items() if not holds]


def _looked_into(household: Household, action: str) -> str | None:
    """The place whose contents the action reveals."""
    trial = deepcopy(household)
    return trial.at if trial.apply(action).revealed else None


def _fields(text: str) -> dict[str, object]:
    return asdict(parse_view(text))


def _nearest(reward: float) -> float | None:
    """The nearest true reward; None if there is none."""
    return min(REWARDS, key=lambda r: abs(r - reward)) if math.isfinite(reward) else None


def _noun(name: str) -> str:
    return name.rpartition(" ")[2]
