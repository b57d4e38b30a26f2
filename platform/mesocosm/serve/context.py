"""The client's copy of what its session depends on: the same bounded list of steps that the world's
carry keeps.

A step costs the client one append. The arrays are put together only when a replica asks for them.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from mesocosm.model.spec import Parts, PartSpec
from mesocosm.model.world import Context


class Mirror:
    """Mirrors `World.begin`, `step` and `reset` for a world of `memory` columns (0: without
    history), without the world.
    """

    def __init__(self, memory: int):
        self.memory = memory
        self.clock = 0

    def begin(self, task: Parts, observation: Parts, action: PartSpec) -> None:
        """As `World.begin`; task and observation [B, ...]."""
        self.clock = 0
        self._no_action = Parts.empty(action, len(observation.numbers))
        self._steps: list[tuple[Parts, Parts]] = []
        """(observation, action) [B, ...] of the present window's columns"""
        self._start_column = np.zeros(len(observation.numbers), np.int64)
        self._task, self._observation = task, observation

    def step(
        self, action: Parts, observation: Parts, task: Parts, restarted: NDArray[np.bool_]
    ) -> None:
        """As `World.step` with `action`, then `World.reset` where `restarted` [B]; `observation`
        and `task` are what holds after both.
        """
        if self.memory:
            if len(self._steps) == self.memory:
                dropped = self.memory - self.memory // 2
                del self._steps[:dropped]
                self._start_column = np.maximum(self._start_column - dropped, 0)
            self._steps.append((self._observation, action))
            if restarted.any():
                self._start_column = np.where(restarted, len(self._steps), self._start_column)
        self.clock += 1
        self._task, self._observation = task, observation

    def context(self, member: NDArray[np.int64]) -> Context:
        """What `World.restore` takes; `member` [B] imagines the present episodes."""
        return Context(
            clock=self.clock,
            past_observation=_columns(
                [observation for observation, _ in self._steps], self._observation
            ),
            past_action=_columns([action for _, action in self._steps], self._no_action),
            start_column=torch.from_numpy(self._start_column),
            observation=self._observation,
            task=self._task,
            member=torch.from_numpy(member),
        )


def _columns(steps: list[Parts], like: Parts) -> Parts:
    """[B, C, ...] of C steps [B, ...]; C may be 0."""
    if not steps:
        return Parts(
            like.numbers.new_zeros(len(like.numbers), 0, like.numbers.shape[1]),
            like.categories.new_zeros(len(like.numbers), 0, like.categories.shape[1]),
        )
    return Parts(
        torch.stack([step.numbers for step in steps], 1),
        torch.stack([step.categories for step in steps], 1),
    )
