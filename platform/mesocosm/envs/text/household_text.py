"""The fields of the texts of `chores`, and the commands that make sense after them.

Everything here reads texts alone, also imagined ones that break the grammar, so that the same
functions serve reality and a learned world.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mesocosm.envs.text.household import CONTAINERS, DONE, TREATMENTS, preposition

_PLACES = re.compile(r"Around you are (.*?)\. You carry")
_TASK = re.compile(r"Your task is to put the (?:(clean|hot|cool) )?(.+?) (?:in|on) the (\w+)\.")
_ROOM = re.compile(r"You are in the middle of an? (.+?)\.")
_AT = re.compile(r"You are at the (\w+)\.")
_LID = re.compile(r"The \w+ is (open|closed)\.")
_SEEN = re.compile(r"(?:In|On) the \w+ you see (.*?)\. You carry")
_HANDS = re.compile(r"You carry (?:nothing|an? (.+?)(?: \((\w+)\))?)\.")


@dataclass(frozen=True)
class StartFields:
    """The fields of a first text; "" or () where it does not say."""

    room: str
    places: tuple[str, ...]
    kind: str
    """"plain", or the state that the object must have at the end."""
    goal: str
    destination: str


@dataclass(frozen=True)
class ViewFields:
    """The fields of a later text; "" or () where it does not say."""

    event: str
    """The first sentence."""
    place: str
    lid: str
    """"open", "closed" or ""."""
    contents: tuple[str, ...] | None
    """None where no contents are listed."""
    carried: str
    state: str
    """The state of the carried object."""
    done: bool


def parse_start(text: str) -> StartFields:
    """The fields of a first text."""
    room, places, task = _ROOM.search(text), _PLACES.search(text), _TASK.search(text)
    return StartFields(
        room=room[1] if room else "",
        places=_names(places[1]) if places else (),
        kind=(task[1] or "plain") if task else "",
        goal=task[2] if task else "",
        destination=task[3] if task else "",
    )


def parse_view(text: str) -> ViewFields:
    """The fields of a later text, or those of a first text that it shares with one."""
    at, lid, seen, hands = (pattern.search(text) for pattern in (_AT, _LID, _SEEN, _HANDS))
    return ViewFields(
        event=text.partition(". ")[0],
        place=at[1] if at else "",
        lid=lid[1] if lid else "",
        contents=_names(seen[1]) if seen else None,
        carried=(hands[1] or "") if hands else "",
        state=(hands[2] or "") if hands else "",
        done=DONE in text,
    )


def candidates(first_text: str, text: str) -> list[str]:
    """The commands that make sense after `text`, from texts alone.

    On texts of reality these are exactly the commands that are possible, and there is at least one.

    Args:
        first_text: The observation of the reset, which lists the places.
        text: The latest observation; the first one itself at the start.
    """
    view = parse_view(text)
    place, held = view.place, view.carried
    commands = [f"go to {other}" for other in parse_start(first_text).places if other != place]
    if not place:
        return commands
    if view.lid == "closed":
        commands.append(f"open {place}")
    elif place in CONTAINERS:
        commands.append(f"close {place}")
    if view.lid != "closed":
        if held:
            commands.append(f"put {held} {preposition(place)} {place}")
        else:
            commands += [f"take {name} from {place}" for name in view.contents or ()]
    if held:
        treatments = TREATMENTS.items()
        commands += [f"{v} {held} with {place}" for v, (_, where) in treatments if place in where]
    return commands


def _names(text: str) -> tuple[str, ...]:
    """The names of a list in a text."""
    if text == "nothing":
        return ()
    return tuple(re.sub(r"^an? ", "", name) for name in text.split(", "))
