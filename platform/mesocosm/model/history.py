"""The client's copy of its session's history: the bounded list of steps in the world's carry.

A step costs one append. The arrays are built only when a replica needs them.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from mesocosm.model.carry import Context
from mesocosm.model.spec import PartSpec
from mesocosm.model.tensors import Parts


class History:
    """Follows `World.begin`, `step` and `reset` of a world with `memory` columns (0 for none)."""

    def __init__(self, memory: int):
        self.memory = memory
        self.clock = 0

    def begin(self, task: Parts, observation: Parts, action: PartSpec) -> None:
        """Like `World.begin`, with task and observation [B, ...]."""
        batch = len(observation.numbers)
        self.clock = 0
        self._no_action = Parts.empty(action, batch)
        self._steps: list[tuple[Parts, Parts]] = []
        """(observation, action) [B, ...] of the current window's columns"""
        self._start_column = np.zeros(batch, np.int64)
        self._task, self._observation = task, observation

    def step(
        self, action: Parts, observation: Parts, task: Parts, restarted: NDArray[np.bool_]
    ) -> None:
        """Like `World.step`, then like `World.reset` where `restarted` [B]."""
        if self.memory:
            if len(self._steps) == self.memory:
                dropped = self.memory - self.memory // 2
                del self._steps[:dropped]
                self._start_column = np.maximum(self._start_column - dropped, 0)
            self._steps.append((self._observation, action))
            self._start_column = np.where(restarted, len(self._steps), self._start_column)
        self.clock += 1
        self._task, self._observation = task, observation

    def context(self, member: NDArray[np.int64]) -> Context:
        """The input of `World.restore`; `member` [B] imagines the current episodes."""
        return Context(
            self.clock,
            past_observation=_columns([step[0] for step in self._steps], self._observation),
            past_action=_columns([step[1] for step in self._steps], self._no_action),
            start_column=torch.from_numpy(self._start_column),
            observation=self._observation,
            task=self._task,
            member=torch.from_numpy(member),
        )

    def restore(self, context: Context, action: PartSpec) -> None:
        """Continue from a `context` of this history."""
        self.begin(context.task, context.observation, action)
        self.clock, self._start_column = context.clock, context.start_column.numpy()
        columns = range(context.past_observation.numbers.shape[1])
        self._steps = [
            (context.past_observation[:, column], context.past_action[:, column])
            for column in columns
        ]


def _columns(steps: list[Parts], like: Parts) -> Parts:
    """Stack C steps [B, ...] to [B, C, ...]; C may be 0."""
    if not steps:
        return like.repeat(0)
    numbers = torch.stack([step.numbers for step in steps], 1)
    return Parts(numbers, torch.stack([step.categories for step in steps], 1))
