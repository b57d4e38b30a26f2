"""Lane l of L collects the episodes l, l + L, l + 2L, ... until its share of the steps is used.

An episode is a function of (config, seed, k) (`envs.episode`), so any number of workers collects
the same episodes. A lane writes its episodes to storage as they end, and a killed collection
continues after them.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from mesocosm import signals
from mesocosm.data.collecting.acts import build_act
from mesocosm.datasets.episode import Episode
from mesocosm.datasets.spaces import SpaceCodec
from mesocosm.datasets.writer import encode_episode
from mesocosm.envs.amounts import Amount, Usage
from mesocosm.envs.api import close
from mesocosm.envs.config import RealityConfig, timeout
from mesocosm.envs.episode import Act, EpisodeCut, EpisodeError, run_episode
from mesocosm.envs.guard import MAX_FAILURES
from mesocosm.envs.ledger import Ledger
from mesocosm.envs.make import make_env
from mesocosm.envs.memory import resident_bytes
from mesocosm.envs.meter import OVERHEAD, Meter
from mesocosm.envs.metered import MeteredEnv
from mesocosm.envs.segments import Attempt, Rows, Segments
from mesocosm.errors import MesocosmError
from mesocosm.policies.behaviours import BehaviourConfig, choose, label, narrowed
from mesocosm.store.artifacts import Storage

SEGMENT_S = 0.1
"""Seconds of finished episodes that are written together, and that a crash makes a lane pay again.

Longer where storage is so slow that writing would take more than OVERHEAD of the time.
"""
BLOCK = 1024
"""Most steps that a lane reserves ahead."""


@dataclass(frozen=True)
class CollectTask:
    """A worker's settings, as plain values."""

    reality: RealityConfig
    behaviours: list[BehaviourConfig]
    seed: int
    root: str
    ledger: str
    dataset: str
    """The id of the dataset, which names the folder of the segments."""
    run: str
    """A unique name. Lanes reserve steps under `<run>/lane<l>`."""
    imports: str
    """A folder that becomes importable, for the user's environments and functions."""

    def open_ledger(self) -> Ledger:
        return Ledger(Storage(self.root), self.ledger, self.reality.budget, self.reality.price)

    def segments(self) -> Segments:
        return Segments(Storage(self.root), self.dataset)

    def behaviour(self, k: int) -> int:
        """The position in `behaviours` of the one that acts in episode k."""
        return choose(self.behaviours, self.seed, k)


@dataclass
class Lane:
    """The progress of one lane."""

    index: int
    lanes: int
    share: int
    """Steps that it may take."""
    used: int = 0
    tried: int = 0
    failed: list[int] = field(default_factory=list)
    """The last attempts, while they fail in a row."""
    refused: bool = False
    """The ledger has no more steps for it."""
    careful: bool = False
    """True if each episode is a segment of its own, as after the loss of a worker: the segments
    then show which episode kills it.
    """

    @property
    def k(self) -> int:
        """The next episode."""
        return self.index + self.lanes * self.tried

    @property
    def left(self) -> int:
        return 0 if self.refused else self.share - self.used

    def record(self, attempts: Iterable[Attempt]) -> None:
        """Count attempts that are in storage."""
        for attempt in attempts:
            assert attempt.index == self.k and attempt.steps <= self.share - self.used
            self.failed = [] if attempt.reason is None else [*self.failed, self.tried]
            self.used += attempt.steps
            self.tried += 1
            self.refused = attempt.spent is not None

    def check(self, segments: Segments, reason: str | None) -> None:
        """Raise MesocosmError after MAX_FAILURES failures in a row, for the next run to retry."""
        if len(self.failed) >= MAX_FAILURES:
            segments.forget(self.index, self.failed)
            raise MesocosmError(
                f"{len(self.failed)} episodes in a row failed ({reason}); no dataset was written,"
                " and the steps stay spent: correct reality.env"
            )


def split(steps: int, lanes: int) -> list[Lane]:
    """Lanes whose shares add up to `steps`."""
    return [Lane(index, lanes, steps // lanes + (index < steps % lanes)) for index in range(lanes)]


class LaneRunner:
    """Runs the episodes of one lane at a time.

    It is also the body of a Ray actor, where a second thread calls `pulse` and `halt`.
    """

    def __init__(self, plan: CollectTask):
        if plan.imports not in sys.path:
            sys.path.append(plan.imports)
        self.plan = plan
        self._storage = Storage(plan.root)
        self._segments = plan.segments()
        self._ledger = plan.open_ledger()
        self._env: MeteredEnv | None = None
        self._codecs: tuple[SpaceCodec, SpaceCodec] | None = None
        self._acts: dict[int, Act] = {}
        self._lane = Lane(0, 1, 0)
        self._pending: list[tuple[Attempt, Rows | None]] = []
        """Finished attempts that are not in storage yet."""
        self._written: list[Attempt] | None = []
        """Attempts that this `advance` has stored. None if another process wrote this lane."""
        self._over = True
        """True if this `advance` may write nothing more."""
        self._began = 0
        """The meter's steps at the start of the current episode."""
        self._write_s = 0.0
        """Seconds that writing the last segment took."""
        self._lock = threading.RLock()

    def begin(self, lane: int, steps: int) -> None:
        """Make a new environment for a lane that may take `steps` more steps."""
        self.end()
        env = make_env(self.plan.reality)
        if self._codecs is None:
            observation = SpaceCodec(env.observation_space, "observation")
            self._codecs = observation, SpaceCodec(env.action_space, "action")
        holder = f"{self.plan.run}/lane{lane}"
        self._env = MeteredEnv(
            env,
            Meter(self._ledger, "collect", block=BLOCK, limit=steps, holder=holder, deferred=True),
        )

    def advance(self, lane: Lane) -> list[Attempt] | None:
        """Run the lane's next episodes for a segment, write it, and confirm its steps.

        A failure of the environment, or a value outside its spaces, is an attempt without an
        episode, and the last of the call: call `begin` again after it.

        Returns:
            The stored attempts, or None if another process wrote this lane: read it then.
        """
        assert self._env is not None, "begin comes first"
        since = time.monotonic()
        with self._lock:
            self._lane = lane = replace(lane, failed=[])
            self._pending, self._written, self._over = [], [], False
        try:
            while lane.left and not self._over:
                attempt, rows = self._try(self._env, lane.k, lane.left)
                with self._lock:
                    if self._over:  # `pulse` ended it while the environment hung
                        break
                    if attempt.reason is None:
                        self._add(attempt, rows)
                    else:
                        self._fail(attempt)
                segment_s = max(SEGMENT_S, self._write_s / OVERHEAD)
                if lane.careful or attempt.reason or time.monotonic() - since > segment_s:
                    break
            began = time.monotonic()
            self._write()
            self._write_s = time.monotonic() - began
        finally:
            with suppress(Exception):  # an error that is already raised is the one to report
                self._write()
            self._over = True
        return self._written

    def _add(self, attempt: Attempt, rows: Rows | None) -> None:
        self._lane.record([attempt])
        if attempt.spent is None or attempt.steps:
            self._pending.append((attempt, rows))
            return
        self._write()  # the ledger refused this attempt's reset: it is not stored
        if self._written is not None:
            self._written.append(attempt)

    def _fail(self, attempt: Attempt) -> None:
        """Write a failed attempt as a segment by itself, so that it alone can be tried again."""
        self._write()
        self._add(attempt, None)
        self._write()
        self._over = True

    def _write(self) -> None:
        """Store the pending attempts, then confirm their steps. Only the first thread does."""
        with signals.delayed(), self._lock:
            env, pending = self._env, self._pending
            if self._over or self._written is None or not pending or env is None:
                return
            attempts = [attempt for attempt, _ in pending]
            rows = [row for _, row in pending if row is not None]
            lane = self._lane.index
            first = (attempts[0].index - lane) // self._lane.lanes

            def record(usage: Usage, beyond: Amount) -> bool:
                return self._segments.write(
                    lane, first, attempts, rows, self._ledger.id, usage, beyond
                )

            steps = sum(attempt.steps for attempt in attempts)
            if env.meter.settle(steps, len(attempts), record):
                self._written += attempts
            else:
                self._written, self._over = None, True
            self._pending = []

    def _try(self, env: MeteredEnv, k: int, max_steps: int) -> tuple[Attempt, Rows | None]:
        plan, which = self.plan, self.plan.behaviour(k)
        assert self._codecs is not None
        behaviour = plan.behaviours[which]
        name = label(behaviour)
        if which not in self._acts:
            self._acts[which] = build_act(
                behaviour, env.observation_space, env.action_space, self._storage
            )
        self._began, spent = env.meter.steps, None
        try:
            episode: Episode | None = run_episode(
                env,
                self._acts[which],
                k=k,
                seed=plan.seed,
                behaviour=name,
                max_steps=max_steps,
                config=narrowed(plan.reality, behaviour),
            )
        except EpisodeCut as cut:
            episode, spent = cut.episode, str(cut)
        except EpisodeError as error:
            reason = self._hung(k) if env.meter.stopped else str(error)
            return Attempt(k, name, env.meter.steps - self._began, reason), None
        steps = env.meter.steps - self._began
        if episode is None:
            return Attempt(k, name, steps, spent=spent), None
        try:
            return Attempt.of(episode, steps, spent), encode_episode(episode, *self._codecs)
        except MesocosmError as error:
            return Attempt(k, name, steps, str(error), spent), None

    def memory(self) -> int:
        """Bytes that this process and its children use."""
        return resident_bytes(os.getpid())

    def end(self) -> None:
        """Close the environment. Steps that led to no episode stay reserved."""
        env, self._env = self._env, None
        if env is not None:
            env.meter.close()
            close(env.env)

    def pulse(self) -> tuple[int, bool, list[Attempt] | None]:
        """Check whether a step hangs. If so, drop its episode and begin no further episode.

        Returns:
            (steps taken since `begin`, whether none of them has returned yet, the attempts that
            this `advance` has stored if it hung).
        """
        env = self._env
        if env is None:
            return 0, True, None
        _, timeout_s = timeout(self.plan.reality, env.meter.first)
        if not self._over and env.meter.stop(timeout_s):
            with self._lock:
                if not self._over:
                    k = self._lane.k
                    name = label(self.plan.behaviours[self.plan.behaviour(k)])
                    self._fail(Attempt(k, name, env.meter.steps - self._began, self._hung(k)))
                return env.meter.steps, env.meter.first, self._written
        return env.meter.steps, env.meter.first, None

    def _hung(self, k: int) -> str:
        assert self._env is not None
        key, timeout_s = timeout(self.plan.reality, self._env.meter.first)
        return f"episode {k}: a step took longer than {key}={timeout_s:g}"

    def halt(self) -> None:
        """Let no further step begin, and write the finished episodes."""
        with self._lock:
            if self._env is not None:
                self._env.meter.stop()
                self._write()
                self._over = True
                self._env.meter.close()


Report = Callable[[Sequence[Attempt], int], None]
"""Called with the newly stored attempts, and all real steps: stored by any run, or in progress."""


def run_here(plan: CollectTask, lanes: Sequence[Lane], report: Report) -> None:
    """Run all lanes in this process.

    A step or close that hangs is never ended: `reality.step_timeout_s` needs workers.
    """
    runner, segments = LaneRunner(plan), plan.segments()
    try:
        for lane in lanes:
            fresh = False
            while lane.left:
                if not fresh:
                    runner.begin(lane.index, lane.left)
                attempts = runner.advance(lane)
                fresh = attempts is not None
                if attempts is None:
                    attempts = segments.attempts(lane.index, lane.tried, plan.open_ledger())
                lane.record(attempts)
                fresh = fresh and not lane.failed
                report(attempts, sum(each.used for each in lanes))
                lane.check(segments, attempts[-1].reason if attempts else None)
            runner.end()
    finally:
        runner.end()
