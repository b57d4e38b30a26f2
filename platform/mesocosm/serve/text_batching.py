"""Batches the steps of many clients' sessions in one text world. There is no waiting time: a batch
is what came while the last one was computed.

Bits do not depend on the batch, so equal action sequences in equal sessions give equal worlds.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from mesocosm.model.language.cache import KeyCache
from mesocosm.model.language.session import TextCarry, TextStep
from mesocosm.model.language.world import TextWorld

MOST = 256
"""Environments of a batch, beyond which the others wait for the next one."""
T = TypeVar("T")


@dataclass
class _Job:
    """One session's step."""

    carry: TextCarry
    action: Sequence[str]
    keys: Tensor
    disagreement: bool
    result: tuple[TextCarry, TextStep] | None = None
    error: Exception | None = None

    @property
    def finished(self) -> bool:
        return self.result is not None or self.error is not None


class TextEngine:
    """Steps of a text world for several threads: one thread steps all that wait, together."""

    def __init__(self, world: TextWorld):
        """The world is referred to weakly: its sessions keep it, and engines are found by it."""
        self._world = weakref.ref(world)
        self.steps = self.batches = 0
        """Environments that were stepped, and batches of them."""
        self._waiting: list[_Job] = []
        self._lock, self._running = threading.Lock(), threading.Lock()

    @property
    def world(self) -> TextWorld:
        """The world, which a session keeps in memory."""
        world = self._world()
        assert world is not None, "a session keeps its world"
        return world

    def alone(self, function: Callable[[], T]) -> T:
        """Call a function while nothing else uses the world."""
        with self._running:
            return function()

    def step(
        self, carry: TextCarry, action: Sequence[str], keys: Tensor, *, disagreement: bool
    ) -> tuple[TextCarry, TextStep]:
        """`TextWorld.step`, in a batch with others. Raises UsageError before anything changes."""
        self.world.require_room(carry, action)
        job = _Job(carry, action, keys, disagreement)
        with self._lock:
            self._waiting.append(job)
        while not job.finished:
            with self._running:
                if not job.finished:
                    self._step(self._taken())
        if job.error is not None:
            raise job.error
        assert job.result is not None
        return job.result

    def _taken(self) -> list[_Job]:
        """The jobs of the next batch, in the order in which they came."""
        with self._lock:
            taken, rows = 1, len(self._waiting[0].action)
            alike = isinstance(self._waiting[0].carry.cache, KeyCache)
            for job in self._waiting[1:]:
                rows += len(job.action)
                if rows > MOST or not alike:
                    break
                taken += 1
            jobs, self._waiting = self._waiting[:taken], self._waiting[taken:]
        return jobs

    def _step(self, jobs: list[_Job]) -> None:
        try:
            whole = jobs[0].carry
            if len(jobs) > 1:
                whole = TextCarry.joined([job.carry for job in jobs])
            whole, step = self.world.step(
                whole,
                [text for job in jobs for text in job.action],
                torch.cat([job.keys for job in jobs]),
                disagreement=any(job.disagreement for job in jobs),
            )
            self.batches, self.steps = self.batches + 1, self.steps + len(step.observation)
            start = 0
            for job in jobs:
                stop = start + len(job.action)
                carry = whole if len(jobs) == 1 else whole.part(start, stop)
                job.result, start = (carry, step.part(start, stop)), stop
        except Exception as error:
            for job in jobs:
                job.error = error
