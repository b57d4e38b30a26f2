"""Pages in a browser as an environment: the part that every task on pages has in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from mesocosm.envs.browser.chromium import Chromium, programs
from mesocosm.envs.browser.table import (
    FIELDS,
    SLOTS,
    VERBS,
    Element,
    Fields,
    mask,
    observe,
    table_space,
)

READER = Path(__file__).with_name("reader.js").read_text()
TOUCH = """
const node = window.mesocosm.nodes[arguments[0]];
window.mesocosm.touched.add(node);
return node;
"""
CLICK_S, KEY_S = 1.0, 0.1
"""Declared seconds of a click, and of a typed character: the same on every machine."""

Observation = dict[str, Any]


class PageEnv(gymnasium.Env[Observation, Any]):
    """A task on a page: one of `pages` in each episode.

    Observations: {page, goal [F], elements: a table of N slots (table.py), action_mask}. The page
    and the goal (the names of its fields) stay the same in an episode: they are its task. Actions:
    [verb, slot]: click (0), or type field k in place of the content (1 + k), where the mask allows
    it. A reset draws the places of the fields among F. `info` has the goal as a sentence at the
    reset, and at each step `duration` in seconds and `success`. A subclass defines `begin` and
    `outcome`.

    Args:
        pages: Names of the pages; a reset draws one, or takes `options["page"]`.
        names: Names of fields that goals may have; others count as "other".
        step_cost: The cost of a step, which is subtracted from its reward.

    Raises:
        UsageError, DependencyNotInstalled: The browser cannot run (`chromium.programs`).
    """

    metadata = {"render_modes": []}
    ignored = ""
    """A selector of elements that are no part of the task."""

    def __init__(self, pages: Sequence[str], names: Sequence[str], step_cost: float = 0.0):
        programs()
        self.pages, self.names, self.step_cost = list(pages), list(names), step_cost
        self.observation_space = spaces.Dict(
            {
                "page": spaces.Discrete(len(self.pages)),
                "goal": spaces.MultiDiscrete([len(self.names) + 2] * FIELDS),
                "elements": table_space(),
                "action_mask": spaces.MultiBinary(VERBS * SLOTS),
            }
        )
        self.action_space = spaces.MultiDiscrete([VERBS, SLOTS])
        self.browser: Chromium | None = None
        self.page, self.goal = "", ""
        self.fields: list[tuple[str, str]] = []

    @classmethod
    def program_versions(cls) -> list[str]:
        """The versions of programs that are a part of the environment's version."""
        return [f"browser {programs().version}"]

    @abstractmethod
    def begin(self, browser: Chromium, page: str, seed: int) -> tuple[str, Fields]:
        """Open a page and start an episode, which the seed determines.

        Returns:
            The goal as a sentence, and its fields.
        """

    @abstractmethod
    def outcome(self, browser: Chromium) -> float | None:
        """The reward of the episode if it has ended, else None."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        drawn = self.pages[int(self.np_random.integers(len(self.pages)))]
        self.page = (options or {}).get("page", drawn)
        if self.page not in self.pages:
            raise ValueError(f"the page must be one of {self.pages}, got {self.page!r}")
        if self.browser is None or self.browser.closed:
            self.browser = Chromium()
        seed = int(self.np_random.integers(2**31))
        self.goal, fields = self.begin(self.browser, self.page, seed)
        self.fields = [("", "")] * FIELDS
        places = self.np_random.permutation(FIELDS)  # no fixed script types the right fields
        for place, field in zip(places, fields, strict=False):
            self.fields[place] = field
        return self._observe(), {"goal": self.goal}

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        verb, slot = int(action[0]), int(action[1])
        assert self.browser is not None, "reset comes first"
        duration = CLICK_S
        if self._observation["action_mask"][verb * SLOTS + slot]:
            node = self.browser.run(TOUCH, slot)
            if verb == 0:
                self.browser.click(node)
            else:
                text = self.fields[verb - 1][1]
                self.browser.type(node, text)
                duration += KEY_S * len(text)
        reward = self.outcome(self.browser)
        info = {"duration": duration, "success": reward is not None and reward > 0}
        return self._observe(), (reward or 0.0) - self.step_cost, reward is not None, False, info

    def _observe(self) -> Observation:
        assert self.browser is not None
        nodes = self.browser.run(READER, self.ignored, SLOTS)
        elements = observe([Element(**node) for node in nodes], self.fields, self.goal)
        goal = np.zeros(FIELDS, np.int64)
        for k, (name, value) in enumerate(self.fields):
            if value:
                goal[k] = 1 + (self.names.index(name) if name in self.names else len(self.names))
        self._observation: Observation = {
            "page": np.int64(self.pages.index(self.page)),
            "goal": goal,
            "elements": elements,
            "action_mask": mask(elements, self.fields),
        }
        return self._observation

    def close(self) -> None:
        """Kill the browser."""
        if self.browser is not None:
            self.browser.close()
            self.browser = None
