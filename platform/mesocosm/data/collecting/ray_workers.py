"""Lanes on Ray: actors that run them, watched from the driver. A worker that is lost costs the
steps it had not stored, and no episode: another worker tries the same episodes again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from mesocosm.data.collecting.workers import Lane, LaneRunner, Plan, Report
from mesocosm.envs.segments import Attempt
from mesocosm.errors import MesocosmError
from mesocosm.policies.behaviours import label

START_TIMEOUT_S = 300.0
"""For a worker to get its CPU, start, import and make the environment."""
SILENCE_S = 30.0
"""Beyond the step's time limit, for a worker to answer at all: an environment that holds the
interpreter lock cannot.
"""
DEATHS = 3
"""Workers that one episode may kill before it is dropped: a worker may also be killed by something
else.
"""
SILENCES = 2
"""Workers that may fall silent in one episode before it is dropped."""


class Worker:
    """A Ray actor at work on a lane, and what is known of its health."""

    def __init__(self, plan: Plan):
        import ray

        self._ray, self._plan = ray, plan
        remote: Any = ray.remote
        self._class = remote(num_cpus=1, max_restarts=0, concurrency_groups={"watch": 1})(
            LaneRunner
        )
        self._actor: Any = None
        self.lane: Lane | None = None
        self.future: Any = None
        self.doing = ""
        self.since = 0.0
        self.deaths = 0
        """Of its processes, one after the other, before their environment was made."""
        self._before = self._seen = 0
        self._pulse: Any = None
        self._pulse_since = 0.0

    def begin(self, lane: Lane) -> None:
        if self._actor is None:
            self._actor = self._class.remote(self._plan)
        self.lane, self._before, self._seen = lane, lane.used, 0
        self._do("begin", self._actor.begin.remote(lane.index, lane.left))

    def advance(self) -> None:
        assert self.lane is not None
        self._do("advance", self._actor.advance.remote(self.lane))

    def end(self) -> None:
        self._do("end", self._actor.end.remote())

    def _do(self, doing: str, future: Any) -> None:
        self.doing, self.future, self.since, self._pulse = doing, future, time.monotonic(), None

    @property
    def under_way(self) -> int:
        """Steps that are not in storage yet, at the last pulse."""
        return (
            max(0, self._before + self._seen - self.lane.used)
            if self.lane is not None and self.doing == "advance"
            else 0
        )

    def result(self) -> Any:
        """The finished call's value. Raises what the worker raised; RayActorError if it died."""
        try:
            return self._ray.get(self.future)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, MesocosmError):
                raise error.cause from None
            raise

    def trouble(self, timeout_s: float) -> tuple[str, list[Attempt] | None] | None:
        """Why the worker must be given up, and what it has stored if it still answers; None while
        all is well.

        Raises MesocosmError if the worker does not get to begin.
        """
        now = time.monotonic()
        if self.doing == "end":  # what was used is in storage before the environment is closed
            return (
                ("the environment's close hung", None)
                if now - self.since > timeout_s + SILENCE_S
                else None
            )
        if self.doing != "advance":
            if now - self.since > START_TIMEOUT_S:
                raise MesocosmError(
                    f"a worker was not ready to collect in {START_TIMEOUT_S:g} s; lower workers to"
                    " the free CPUs, or see why reality.env starts so late"
                )
            return None
        if self._pulse is None:
            self._pulse, self._pulse_since = (
                self._actor.pulse.options(concurrency_group="watch").remote(timeout_s),
                now,
            )
            return None
        if self._ray.wait([self._pulse], timeout=0)[0]:
            pulse, self._pulse = self._pulse, None
            try:
                self._seen, attempts = self._ray.get(pulse)
            except self._ray.exceptions.RayActorError:
                return None  # its own call will say so
            return None if attempts is None else ("a step hung", attempts)
        if now - self._pulse_since > timeout_s + SILENCE_S:
            return (
                f"the environment's process did not answer for {now - self._pulse_since:.0f} s",
                None,
            )
        return None

    @property
    def alive(self) -> bool:
        return self._actor is not None

    def kill(self) -> None:
        if self._actor is not None:
            self._ray.kill(self._actor)
        self._actor = self.future = self._pulse = None

    def halt(self) -> Any:
        return (
            None
            if self._actor is None
            else self._actor.halt.options(concurrency_group="watch").remote()
        )


class Losses:
    """What workers that were lost have cost: which episode is tried again, and which is dropped."""

    def __init__(self, plan: Plan):
        self._plan, self._ledger, self._segments = plan, plan.open_ledger(), plan.segments()
        self._tries: dict[int, tuple[int, int]] = {}
        """By lane: the episode that was lost last, and how often."""

    def account(self, lane: Lane, reason: str, died: bool) -> list[Attempt]:
        """The lane's attempts that are in storage and not recorded: those that the worker wrote
        before it was lost, or a dropped one where this episode has cost too many workers.

        How many steps a lost worker took is not known. They are unconfirmed in the ledger, and no
        part of the lane's share: so the dataset does not depend on how a worker was lost.
        """
        attempts = self._segments.attempts(lane.index, lane.tried, self._ledger)
        k, tries = self._tries.get(lane.index, (lane.k, 0))
        tries = tries + 1 if k == lane.k and not attempts else 1
        self._tries[lane.index] = (lane.k, tries)
        was_careful, lane.careful = lane.careful, True
        if attempts or not was_careful or tries < (DEATHS if died else SILENCES):
            return attempts
        which = self._plan.behaviours[self._plan.behaviour(lane.k)]
        dropped = Attempt(lane.k, label(which), 0, f"episode {lane.k}: {reason}, {tries} times")
        if self._segments.write(lane.index, lane.tried, [dropped], [], self._ledger.id, None):
            return [dropped]
        # The worker wrote it after all, before it ended.
        return self._segments.attempts(lane.index, lane.tried, self._ledger)


def run_on_ray(plan: Plan, lanes: Sequence[Lane], workers: int, report: Report) -> None:
    """All lanes on `workers` Ray actors of one CPU each.

    What may hang is the environment: its step and reset for `reality.step_timeout_s`, its close for
    SILENCE_S more (its data is in storage by then). A behaviour that hangs is the caller's own
    code: nothing ends it but the caller.
    """
    import ray

    losses, segments = Losses(plan), plan.segments()
    waiting = deque(lane for lane in lanes if lane.left)
    team = [Worker(plan) for _ in range(min(workers, len(waiting)))]
    timeout_s = plan.reality.step_timeout_s

    def record(lane: Lane, attempts: Sequence[Attempt]) -> None:
        lane.record(attempts)
        report(
            attempts, sum(each.used for each in lanes) + sum(worker.under_way for worker in team)
        )
        lane.check(segments, attempts[-1].reason if attempts else None)

    def lost(worker: Worker, reason: str, died: bool) -> None:
        """The worker is gone: a new one goes on after what is in storage."""
        worker.kill()
        assert worker.lane is not None
        if worker.doing == "advance":
            record(worker.lane, losses.account(worker.lane, reason, died))
        elif worker.doing == "begin":
            worker.deaths += 1
            if worker.deaths >= DEATHS:
                raise MesocosmError(
                    f"the process of a worker died {DEATHS} times while it made the environment;"
                    f" correct reality.env={plan.reality.env!r}, or give each of workers={workers}"
                    " more memory"
                )
        proceed(worker, fresh=False)

    def proceed(worker: Worker, *, fresh: bool) -> None:
        """The next call of a worker whose last one is done; `fresh`: its environment is good for
        the next episode.
        """
        assert worker.lane is not None
        if worker.lane.left and fresh:
            worker.advance()
        elif worker.doing != "end" and worker.alive:
            worker.end()
        elif worker.lane.left:
            worker.begin(worker.lane)
        elif waiting:
            worker.begin(waiting.popleft())
        else:
            worker.kill()

    try:
        for worker in team:
            worker.begin(waiting.popleft())
        while busy := [worker for worker in team if worker.future is not None]:
            ready, _ = ray.wait(
                [worker.future for worker in busy], num_returns=1, timeout=min(0.5, timeout_s / 4)
            )
            for worker in busy:
                assert worker.lane is not None
                if worker.future in ready:
                    try:
                        value = worker.result()
                    except ray.exceptions.RayActorError:
                        lost(worker, "the environment's process died", died=True)
                        continue
                    fresh = worker.doing == "begin"
                    worker.deaths = 0
                    if worker.doing == "advance":
                        fresh = value is not None
                        if value is None:  # another process has written this lane
                            value = segments.attempts(
                                worker.lane.index, worker.lane.tried, plan.open_ledger()
                            )
                        record(worker.lane, value)
                        fresh = fresh and not worker.lane.failed
                    proceed(worker, fresh=fresh)
                elif trouble := worker.trouble(timeout_s):
                    reason, attempts = trouble
                    if attempts is None:
                        lost(worker, reason, died=False)
                    else:  # its step hangs: what it had, and that this episode is dropped, is in storage
                        worker.kill()
                        record(worker.lane, attempts)
                        proceed(worker, fresh=False)
            report([], sum(lane.used for lane in lanes) + sum(worker.under_way for worker in team))
    finally:
        halts = [halt for worker in team if (halt := worker.halt()) is not None]
        if halts:
            ray.wait(halts, num_returns=len(halts), timeout=10)
        for worker in team:
            worker.kill()
