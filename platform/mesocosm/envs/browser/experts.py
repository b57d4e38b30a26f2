"""A scripted expert of MiniWoB's pages, which reads the table of elements alone.

As a behaviour: `{kind: scripted, function: mesocosm.envs.browser.experts:page_expert}`; kind
`noisy` replaces a share of its actions by random ones that the mask allows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mesocosm.envs.browser.miniwob import NAMES
from mesocosm.envs.browser.table import FIELDS, FLAGS, TAGS, TYPABLE

Array = np.ndarray[Any, Any]
ROW = 0.13
"""Elements whose tops differ by less are in one row of a list, in units of the page's width."""
TYPED = ("username", "password", "target", "to", "message")
"""Fields that are typed, in the order of their inputs."""
CLICK = 0


def page_expert(observation: dict[str, Any], rng: np.random.Generator) -> Array:
    """The next action in any of `mesocosm.envs.browser.miniwob.PAGES`.

    It has no memory: flags of the table say which elements were clicked.

    Args:
        observation: An observation of `PageEnv`.
        rng: Not used.

    Returns:
        [verb, slot] int64.
    """
    view = _View(observation)
    for rule in (_fill, _tick, _message, _record, _target, _unopened):
        if (action := rule(view)) is not None:
            return np.array(action, np.int64)
    return np.array([CLICK, view.last("button")], np.int64)


class _View:
    """An observation with names for its parts."""

    def __init__(self, observation: dict[str, Any]):
        table = observation["elements"]
        self.says, self.holds = table["says"], table["holds"]
        self.left, self.top = table["box"][:, 0], table["box"][:, 1]
        self.flags = {name: table["flags"][:, i].astype(bool) for i, name in enumerate(FLAGS)}
        self._tags = np.where(table["present"], table["tag"], -1)
        names = ["", *NAMES, "other"]
        self.fields = [names[i] for i in observation["goal"]]

    def tagged(self, *tags: str) -> list[int]:
        """The slots of elements of these kinds."""
        return np.flatnonzero(np.isin(self._tags, [TAGS.index(tag) for tag in tags])).tolist()

    def last(self, tag: str) -> int:
        """The last slot of a kind; 0 where there is none."""
        return next(iter(self.tagged(tag)[::-1]), 0)

    def saying(self, field: str) -> list[int]:
        """The slots of elements that say the first field of a name."""
        if field not in self.fields:
            return []
        return np.flatnonzero(self.says[:, self.fields.index(field)]).tolist()


Action = tuple[int, int] | None


def _fill(view: _View) -> Action:
    """Type the next field into the input that does not hold it."""
    texts = [name for name in TYPED if name in view.fields]
    inputs = view.tagged(*(("textarea",) if "message" in texts else TYPABLE))
    if "to" in texts:
        inputs = view.tagged("text")
    for place, slot in enumerate(inputs if texts else []):
        field = view.fields.index(texts[min(place, len(texts) - 1)])
        if not view.holds[slot, field]:
            return 1 + field, slot
    return None


def _tick(view: _View) -> Action:
    """Click on the boxes whose state is wrong."""
    for slot in view.tagged("checkbox", "radio"):
        named = view.says[slot, :FIELDS].any()
        if named != view.flags["checked"][slot] and (named or slot in view.tagged("checkbox")):
            return CLICK, slot
    return None


def _message(view: _View) -> Action:
    """Open a sender's message, or click on the icon of the task in its row."""
    if "task" not in view.fields:
        return None
    icons = view.saying("task")
    if view.tagged("textarea"):  # the message is written: the icon of sending is the right one
        return CLICK, max(view.tagged("span"), default=0, key=lambda slot: float(view.left[slot]))
    for sender in view.saying("by"):
        for icon in icons:
            if abs(view.top[icon] - view.top[sender]) < ROW:
                return CLICK, icon
        if not icons:
            return CLICK, sender
    return (CLICK, icons[0]) if icons else None


def _record(view: _View) -> Action:
    """Click on the target of the card of a name, or turn to the next card."""
    if "name" not in view.fields:
        return None
    if view.saying("name") and view.saying("target"):
        return CLICK, view.saying("target")[0]
    return CLICK, view.last("a")


def _target(view: _View) -> Action:
    """Click on the element that says the target, if it is no box."""
    boxes = view.tagged("checkbox", "radio", *TYPABLE)
    links = [slot for slot in view.saying("target") if slot not in boxes]
    return (CLICK, links[0]) if links else None


def _unopened(view: _View) -> Action:
    """Click on the next tab or section that was not opened."""
    doors = view.tagged("a", "heading")
    fresh = [slot for slot in doors if not view.flags["touched"][slot]]
    fresh = [slot for slot in fresh if not view.flags["checked"][slot]]
    if "task" in view.fields or not fresh:
        return None
    return CLICK, fresh[0]
