"""A page as a table of elements with their relation to a goal, and the mask of actions on it.

A goal is a list of fields, such as ("username", "ada"). A table never holds their letters: it says
which element shows, holds or names which field, so that what is learned of one goal is true of all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces

SLOTS = 24
"""N: elements of a page, in the order of the document; further ones are left out."""
FIELDS = 7
"""F: fields of a goal."""
VERBS = 1 + FIELDS
"""Click, or type field k in place of the element's content."""
TAGS = (
    "button",
    "text",
    "password",
    "checkbox",
    "radio",
    "textarea",
    "select",
    "a",
    "label",
    "span",
    "div",
    "li",
    "p",
    "heading",
    "other",
)
"""Kinds of elements. An input's kind is its type."""
KINDS = {"submit": "button", "select-one": "select"} | {f"h{k}": "heading" for k in range(1, 7)}
"""Kinds by tag or type, where it is not its name."""
TYPABLE = ("text", "password", "textarea", "select")
FLAGS = ("focused", "checked", "touched", "filled")
"""Touched: clicked in this episode. Filled: has a value that is not empty."""
ALIASES = {"delete": "trash", "important": "star", "phone number": "phone"}
"""Words of goals, and the words that pages use for them."""
COMMANDS = ("task", "button")
"""Fields that name a command of the page, in capitals or not; other texts are compared exactly."""
SIZE = 160.0
"""The unit of boxes, in pixels: the width of a MiniWoB page."""

Fields = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Element:
    """A visible element as `reader.js` gives it."""

    tag: str
    name: str
    """Its text, label or placeholder."""
    hints: str
    """Its id and classes."""
    value: str
    checked: bool
    focused: bool
    touched: bool
    box: list[float]
    """Left, top, width and height, in pixels."""

    @property
    def kind(self) -> str:
        kind = KINDS.get(self.tag, self.tag)
        return kind if kind in TAGS else "other"


def table_space() -> spaces.Dict:
    """The space of `elements`: its leaves have a leading dimension of N slots."""
    return spaces.Dict(
        {
            "present": spaces.MultiBinary(SLOTS),
            "tag": spaces.MultiDiscrete([len(TAGS)] * SLOTS),
            "flags": spaces.MultiBinary([SLOTS, len(FLAGS)]),
            "says": spaces.MultiBinary([SLOTS, FIELDS + 1]),
            "holds": spaces.MultiBinary([SLOTS, FIELDS]),
            "box": spaces.Box(-8.0, 8.0, (SLOTS, 4), np.float32),
        }
    )


def observe(elements: Sequence[Element], fields: Fields, goal: str) -> dict[str, Any]:
    """The table of a page.

    Args:
        elements: The visible elements; those after the first N are left out.
        fields: The F fields of the goal, by name; the value of an empty place is empty.
        goal: The goal as a sentence.

    Returns:
        Arrays in `table_space`. `says[i, k]` is 1 where the text or a name of element i equals
        field k, `says[i, F]` where its text is a part of the goal, and `holds[i, k]` where its
        value equals field k. Empty slots are zero.
    """
    table: dict[str, Any] = {
        name: np.zeros(space.shape, space.dtype) for name, space in table_space().items()
    }
    for i, element in enumerate(elements[:SLOTS]):
        table["present"][i] = 1
        table["tag"][i] = TAGS.index(element.kind)
        flags = (element.focused, element.checked, element.touched, bool(element.value))
        table["flags"][i] = flags
        for k, (field, value) in enumerate(fields):
            table["says"][i, k] = bool(value) and _says(element, field, value)
            table["holds"][i, k] = bool(value) and element.value == value
        name = element.name.lower()
        table["says"][i, FIELDS] = len(name) > 1 and name in goal.lower()
        table["box"][i] = np.clip(np.asarray(element.box) / SIZE, -8.0, 8.0)
    return table


def mask(table: dict[str, Any], fields: Fields) -> np.ndarray[Any, Any]:
    """The actions that do something, as int8 [V * N], row-major over verb x slot: clicks on all
    elements, and field k typed into those that take text.
    """
    allowed = np.zeros((VERBS, SLOTS), np.int8)
    allowed[0] = table["present"]
    typable = np.isin(table["tag"], [TAGS.index(kind) for kind in TYPABLE])
    for k, (_, value) in enumerate(fields):
        allowed[1 + k] = table["present"] * typable * bool(value)
    return allowed.ravel()


def _says(element: Element, field: str, value: str) -> bool:
    """True if an element's text is a value, or one of its ids and classes names it."""
    word = ALIASES.get(value.lower(), value.lower())
    hints = element.hints.lower()
    if word in (*hints.split(), *re.split(r"[\s_-]+", hints)):
        return True
    return element.name == value or (field in COMMANDS and element.name.lower() == word)
