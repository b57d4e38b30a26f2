"""`chores`: household tasks in text, with hidden contents and unlimited tasks by seed.

env = gymnasium.make("mesocosm.envs.text:Chores-v0")
text, info = env.reset(seed=0)
text, reward, terminated, truncated, info = env.step(info["admissible_commands"][0])
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterable
from typing import Any

import gymnasium
from gymnasium.spaces import Text

from mesocosm.envs.text.checks import EpisodeCheck, ImaginedStep
from mesocosm.envs.text.chores_checker import check_episode
from mesocosm.envs.text.household import EASY, FULL, Household, draw
from mesocosm.envs.text.household_text import candidates

CHARACTERS = string.ascii_letters + " .,:()'"
LONGEST_TEXT, LONGEST_COMMAND = 300, 60
"""Lengths in characters, of the spaces. Texts of reality have at most 240."""


class Chores(gymnasium.Env[str, str]):
    """Find an object, treat it where the task says so, and put it in its place.

    The first text tells the places and the task; each later text tells the current place, what is
    seen there and what is carried. What lies in a place is unknown until one is there and it is
    open. An impossible command changes nothing. The return is 1 if the task is done.

    `info` has `admissible_commands`, a list of texts, and after a step `valid` (the command was
    possible), `revealed` (the text shows contents that no earlier text showed) and `success`.

    Args:
        easy: Draw from fewer places, objects and words, without colors and without heating.
    """

    metadata = {"render_modes": []}
    observation_space = Text(LONGEST_TEXT, charset=CHARACTERS)
    action_space = Text(LONGEST_COMMAND, charset=CHARACTERS)
    candidates = staticmethod(candidates)

    def __init__(self, easy: bool = False):
        self.variant = EASY if easy else FULL
        self._household: Household | None = None
        self._first_text = ""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        rng = random.Random(int(self.np_random.integers(2**62)))
        self._household = draw(rng, self.variant)
        self._first_text = text = self._household.first_text()
        return text, {"admissible_commands": candidates(text, text)}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        assert self._household is not None, "call reset before step"
        outcome = self._household.apply(action)
        info = {
            "admissible_commands": candidates(self._first_text, outcome.text),
            "valid": outcome.valid,
            "revealed": outcome.revealed,
            "success": outcome.terminated,
        }
        return outcome.text, outcome.reward, outcome.terminated, False, info

    def check_episode(self, first_text: str, steps: Iterable[ImaginedStep]) -> EpisodeCheck:
        """Check an imagined episode of this family (`chores_checker.check_episode`).

        Args:
            first_text: The imagined observation of the reset.
            steps: The imagined steps, in order.
        """
        return check_episode(first_text, steps, easy=self.variant is EASY)
