"""The client's copy of its session's texts, from which any replica continues."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesocosm.model.language.session import Texts


@dataclass(frozen=True)
class WholeContext:
    """A `TextContext` with all steps of the present episodes, for a wire without pickle."""

    clock: int
    task: Texts
    start: Texts
    steps: list[list[tuple[str, str]]]
    member: NDArray[np.int64]

    def to_numpy(self) -> dict[str, Any]:
        """The fields of a message."""
        return {
            "clock": np.asarray(self.clock, dtype=np.int64),
            "task.texts": list(self.task),
            "start.texts": list(self.start),
            "steps": [[list(step) for step in row] for row in self.steps],
            "member": self.member,
        }


class TextHistory:
    """Follows `TextWorld.begin`, `step` and `reset`, see `history.History`."""

    clock = 0

    def begin(self, task: Texts, observation: Texts, action: Any = None) -> None:
        """Like `TextWorld.begin`. `action` is not used."""
        self.clock = 0
        self._task, self._start = task, observation
        self._steps: list[list[tuple[str, str]]] = [[] for _ in observation]

    def step(
        self, action: Sequence[str], observation: Texts, task: Texts, restarted: NDArray[np.bool_]
    ) -> None:
        """Like `TextWorld.step`, then like `TextWorld.reset` where `restarted` [B]."""
        starts = list(self._start)
        for row, (text, seen) in enumerate(zip(action, observation, strict=True)):
            if restarted[row]:
                starts[row], self._steps[row] = seen, []
            else:
                self._steps[row].append((text, seen))
        self.clock += 1
        self._task, self._start = task, Texts(starts)

    def context(self, member: NDArray[np.int64]) -> WholeContext:
        """The input of a `restore`; `member` [B] imagines the current episodes."""
        return WholeContext(self.clock, self._task, self._start, self._steps, member)
