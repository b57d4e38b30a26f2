"""An environment of text observations and text actions, and behaviours that act in it."""

from __future__ import annotations

import string
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Dict, Discrete, Text

WORDS = Text(2000, min_length=0, charset=string.printable + "äöüß€日本語🙂")
COMMANDS = ("look", "take the key", "öffne die Tür 🙂", "")


class Talk(gymnasium.Env):
    """The third opened door ends the episode. `answer` is an additional text of every answer."""

    observation_space = Dict(scene=WORDS, doors=Discrete(4))
    action_space = Text(40, min_length=0, charset=string.ascii_letters + " öü🙂")

    def __init__(self, answer: str = ""):
        self.answer = answer

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.doors = 0
        return self._observation("You stand in a hall.\nThere is a door."), {}

    def step(self, action: Any):
        opened = action.startswith("öffne")
        self.doors += opened
        text = f"Die Tür geht auf ({self.doors}). 日本語" if opened else f"You {action}."
        return self._observation(text), float(opened), self.doors == 3, False, {}

    def _observation(self, text: str):
        return {"scene": text + self.answer, "doors": self.doors}


def talker(observation: Any, rng: np.random.Generator) -> str:
    return COMMANDS[int(rng.integers(len(COMMANDS)))]


def shouter(observation: Any, rng: np.random.Generator) -> str:
    return "OPEN!"


def candidates_in_a_room(first_text: str, text: str) -> list[str]:
    return ["look", "take mug", "go to table"]
