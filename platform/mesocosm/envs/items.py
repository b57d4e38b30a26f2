"""A small environment with a table and an action mask: tick the items that the goal names.

An episode shows some items, each of a kind and with a price, and a goal: a kind. Ticking an item
adds its price to the sum. Submitting ends the episode, with the reward 1 if exactly the items of
the goal's kind are ticked, else -1.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete

STEP = -0.02
"""The reward of a tick."""
TICK, SUBMIT = range(2)
"""The verbs of an action (verb, slot): ticks or unticks the slot's item; the slot of SUBMIT may be
that of any item.
"""


class Items(gymnasium.Env[Any, Any]):
    """The table `items` has `slots` places, of which at least half hold an item.

    Observation: goal (a kind), total (the sum of the ticked items' prices), items (kind, ticked,
    price, present), action_mask. Action: MultiDiscrete [2, slots]. Everything is a function of the
    reset seed and the actions.
    """

    def __init__(self, slots: int = 8, kinds: int = 4, steps: int = 20):
        self.slots, self.kinds, self.steps = slots, kinds, steps
        table = {
            "kind": MultiDiscrete([kinds] * slots),
            "present": MultiBinary(slots),
            "price": Box(0.0, 1.0, (slots,), np.float64),
            "ticked": MultiBinary(slots),
        }
        self.observation_space = Dict(
            {
                "action_mask": MultiBinary(2 * slots),
                "goal": Discrete(kinds),
                "items": Dict(table),
                "total": Box(0.0, float(slots), (), np.float64),
            }
        )
        self.action_space = MultiDiscrete([2, slots])

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        rng = self.np_random
        self._step, self._goal = 0, int(rng.integers(self.kinds))
        count = int(rng.integers((self.slots + 1) // 2, self.slots + 1))
        self._present = np.zeros(self.slots, np.int8)
        self._present[rng.permutation(self.slots)[:count]] = 1
        self._kind = rng.integers(self.kinds, size=self.slots) * self._present
        self._price = np.round(rng.random(self.slots), 2) * self._present
        self._ticked = np.zeros(self.slots, np.int8)
        return self._observation(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        verb, slot = (int(x) for x in action)
        self._step += 1
        late = self._step >= self.steps
        if verb == TICK:
            self._ticked[slot] ^= self._present[slot]
            return self._observation(), STEP, False, late, {}
        named = (self._kind == self._goal) & (self._present == 1)
        success = bool(np.array_equal(named, self._ticked == 1))
        return self._observation(), 1.0 if success else -1.0, True, late, {"success": success}

    def _observation(self) -> dict[str, Any]:
        table = {
            "kind": self._kind.copy(),
            "present": self._present.copy(),
            "price": self._price.copy(),
            "ticked": self._ticked.copy(),
        }
        return {
            "action_mask": np.tile(self._present, 2),
            "goal": np.int64(self._goal),
            "items": table,
            "total": np.array(float(self._price @ self._ticked)),
        }


def expert(observation: Any, rng: np.random.Generator) -> Any:
    """Ticks the items that the goal names, then submits. For behaviours of `collect`."""
    items = observation["items"]
    named = (items["kind"] == observation["goal"]) & (items["present"] == 1)
    wrong = np.flatnonzero(named != (items["ticked"] == 1))
    verb, slots = (TICK, wrong) if len(wrong) else (SUBMIT, np.flatnonzero(items["present"]))
    return np.array([verb, slots[0]])
