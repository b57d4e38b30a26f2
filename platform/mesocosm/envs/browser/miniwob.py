"""MiniWoB++'s pages (https://miniwob.farama.org) in Chromium.

The wheel `miniwob` has the pages and reads their goals; its own environments are not used: they
measure time and return no page at the end.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gymnasium.error import DependencyNotInstalled

from mesocosm.envs.browser.chromium import Chromium
from mesocosm.envs.browser.pages import PageEnv
from mesocosm.envs.browser.table import Fields
from mesocosm.errors import UsageError, nearest

PAGES = (
    "login-user",
    "enter-text",
    "enter-password",
    "click-checkboxes",
    "click-option",
    "choose-list",
    "click-tab-2",
    "click-collapsible-2-nodelay",
    "email-inbox-noscroll",
    "phone-book",
)
"""Pages that have an expert (experts.py)."""
NAMES = ("username", "password", "target", "button", "by", "task", "to", "message", "name")
"""Names of the fields of their goals."""
PREPARE = """
core.EPISODE_MAX_TIME = 1e9;
if (window.jQuery) jQuery.fx.off = true;
core.setDataMode("train");
Math.seedrandom(String(arguments[0]));
core.startEpisodeReal();
return core.getUtterance();
"""
"""Starts an episode. As delivered, pages time out after 10 to 30 s and take time from rewards, so
that the load of a machine decides; and jQuery's animations make an observation depend on time.
"""
OUTCOME = "return WOB_DONE_GLOBAL ? WOB_RAW_REWARD_GLOBAL : null"


class MiniWoB(PageEnv):
    """MiniWoB++'s pages: a goal in words, and a page on which to reach it.

    The reward is the page's own at the end, in [-1, 1], less `step_cost` a step.

    Args:
        pages: Names of pages of MiniWoB++ 1.1.
        step_cost: The cost of a step.

    Raises:
        UsageError: There is no such page.
        DependencyNotInstalled: The wheel or a program is missing.
    """

    ignored = "#query, #sync-task-cover, #reward-display, #click-canvas"

    def __init__(self, pages: Sequence[str] = PAGES, step_cost: float = 0.02):
        fields = _fields()
        self._folder = Path(fields.__file__).parent / "html" / "miniwob"
        self._extractors = fields.FIELD_EXTRACTORS
        known = [path.stem for path in sorted(self._folder.glob("*.html"))]
        for page in pages:
            if page not in known or page not in self._extractors:
                raise UsageError(
                    f"reality.kwargs.pages must name pages of MiniWoB++, got"
                    f" {page!r}{nearest(page, known)}"
                )
        if not pages:
            raise UsageError("reality.kwargs.pages must name at least one page, got []")
        super().__init__(pages, NAMES, step_cost)

    @classmethod
    def program_versions(cls) -> list[str]:
        """The versions of the browser and of the pages."""
        _fields()
        return [*super().program_versions(), f"miniwob {importlib.metadata.version('miniwob')}"]

    def begin(self, browser: Chromium, page: str, seed: int) -> tuple[str, Fields]:
        """Load the page anew, so that nothing of an episode before is in it, and start."""
        browser.open((self._folder / f"{page}.html").as_uri())
        result = browser.run(PREPARE, seed)
        goal, fields = result, None
        if isinstance(result, dict):
            goal, fields = result["utterance"], list(result["fields"].items())
        if fields is None:
            fields = self._extractors[page](goal)
        return goal, [(name.rstrip(" 0123456789"), value) for name, value in fields]

    def outcome(self, browser: Chromium) -> float | None:
        """The page's own reward, without its share of the time."""
        reward: float | None = browser.run(OUTCOME)
        return reward


def _fields() -> Any:
    """The module of the wheel that reads goals. Raises DependencyNotInstalled without the wheel."""
    try:
        from miniwob import fields
    except ImportError as error:
        fix = "run `make browser`, or pip install --no-deps miniwob==1.1.0"
        raise DependencyNotInstalled(f"miniwob is missing; {fix}") from error
    return fields
