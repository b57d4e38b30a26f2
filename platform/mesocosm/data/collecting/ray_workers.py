"""Lanes on Ray actors that the driver watches.

A lost worker costs the steps that it had not stored, and no episode: another one tries the same
episodes again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from mesocosm.data.collecting.workers import CollectTask, Lane, LaneRunner, Report
from mesocosm.envs.config import timeout
from mesocosm.envs.memory import GIB
from mesocosm.envs.segments import Attempt
from mesocosm.errors import MesocosmError
from mesocosm.policies.behaviours import label

START_TIMEOUT_S = 300.0
"""Time for a worker to get its CPU, start, import and make the environment."""
SILENCE_S = 30.0
"""Time beyond the step limit for a worker to answer: one that holds the interpreter lock cannot."""
DEATHS = 3
"""Workers that die in one episode before it is dropped: it need not have killed the first ones."""
SILENCES = 2
"""Workers that fall silent in one episode before it is dropped."""


class Worker:
    """A Ray actor that runs lanes, and its health."""

    def __init__(self, plan: CollectTask):
        import ray

        self._ray, self._plan = ray, plan
        options: dict[str, Any] = {"max_restarts": 0, "concurrency_groups": {"watch": 1}}
        limit = plan.reality.memory_gb
        self._memory = None if limit is None else int(limit * GIB)
        if self._memory is not None:
            options["memory"] = self._memory
        self.retiring = False
        """True if it uses too much memory. It is replaced once its environment is closed."""
        self._class: Any = ray.remote(num_cpus=1, **options)(LaneRunner)
        self._actor: Any = None
        self.lane = Lane(0, 1, 0)
        self.future: Any = None
        self.call = ""
        """The name of the call that is running: begin, advance or end."""
        self._since = 0.0
        self.deaths = 0
        """Processes that died in a row before their environment was made."""
        self._before = self._steps = 0
        self._first = True
        """True if no step of its environment had returned at the last pulse."""
        self._pulse: Any = None
        self._pulse_since = 0.0

    def begin(self, lane: Lane) -> None:
        if self._actor is None:
            self._actor = self._class.remote(self._plan)
        self.lane, self._before, self._steps, self._first = lane, lane.used, 0, True
        self._start("begin", self._actor.begin.remote(lane.index, lane.left))

    def advance(self) -> None:
        self._start("advance", self._actor.advance.remote(self.lane))

    def end(self) -> None:
        self._start("end", self._actor.end.remote())

    def _start(self, call: str, future: Any) -> None:
        self.call, self.future, self._since, self._pulse = call, future, time.monotonic(), None

    @property
    def unstored_steps(self) -> int:
        """Steps that were not in storage at the last pulse."""
        if self.call != "advance":
            return 0
        return max(0, self._before + self._steps - self.lane.used)

    def result(self) -> Any:
        """The finished call's value. Raises the worker's error; RayActorError if it died."""
        try:
            return self._ray.get(self.future)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, MesocosmError):
                raise error.cause from None
            raise

    def check(self) -> tuple[str, list[Attempt] | None] | None:
        """Check the health of a worker whose call is running.

        Returns:
            None, or (why the worker must be replaced, the attempts that it stored if it answers).

        Raises:
            MesocosmError: The worker does not start.
        """
        now, (_, timeout_s) = time.monotonic(), timeout(self._plan.reality, self._first)
        if self.call == "end":  # all steps are stored before the environment is closed
            hung = now - self._since > timeout_s + SILENCE_S
            return ("the environment's close hung", None) if hung else None
        if self.call == "begin":
            if now - self._since > START_TIMEOUT_S:
                raise MesocosmError(
                    f"a worker was not ready to collect in {START_TIMEOUT_S:g} s; lower workers to"
                    " the free CPUs, or find out why reality.env starts so late"
                )
            return None
        if self._pulse is None:
            watch = self._actor.pulse.options(concurrency_group="watch")
            self._pulse, self._pulse_since = watch.remote(), now
            return None
        if self._ray.wait([self._pulse], timeout=0)[0]:
            pulse, self._pulse = self._pulse, None
            try:
                self._steps, self._first, attempts = self._ray.get(pulse)
            except self._ray.exceptions.RayActorError:
                return None  # `result` raises it
            return None if attempts is None else ("a step hung", attempts)
        silent_s = now - self._pulse_since
        if silent_s > timeout_s + SILENCE_S:
            return f"the environment's process did not answer for {silent_s:.0f} s", None
        return None

    @property
    def alive(self) -> bool:
        return self._actor is not None

    def leaks(self) -> bool:
        """True if a worker without a running call uses more memory than it may."""
        if self._memory is None:
            return False
        try:
            used: int = self._ray.get(self._actor.memory.remote())
        except self._ray.exceptions.RayActorError:
            return False  # the next call notices
        return used > self._memory

    def kill(self) -> None:
        self.retiring = False
        if self._actor is not None:
            self._ray.kill(self._actor)
        self._actor = self.future = self._pulse = None

    def halt(self) -> Any:
        """Let the worker write its finished episodes. Returns the call's future."""
        return self._actor.halt.options(concurrency_group="watch").remote()


class LostWorkers:
    """Decides, after the loss of a worker, which episode is tried again and which is dropped."""

    def __init__(self, plan: CollectTask):
        self._plan, self._ledger, self._segments = plan, plan.open_ledger(), plan.segments()
        self._tries: dict[int, tuple[int, int]] = {}
        """The episode that was lost last, and how often, by lane."""

    def account(self, lane: Lane, reason: str, died: bool) -> list[Attempt]:
        """The stored attempts of the lane that are not recorded.

        They are those that the worker wrote before it was lost, or a dropped one where this episode
        has cost too many workers. How many steps a lost worker took is unknown. They are
        unconfirmed in the ledger and no part of the lane's share, so the dataset does not depend on
        how a worker was lost.
        """
        attempts = self._segments.attempts(lane.index, lane.tried, self._ledger)
        k, tries = self._tries.get(lane.index, (lane.k, 0))
        tries = tries + 1 if k == lane.k and not attempts else 1
        self._tries[lane.index] = (lane.k, tries)
        was_careful, lane.careful = lane.careful, True
        if attempts or not was_careful or tries < (DEATHS if died else SILENCES):
            return attempts
        name = label(self._plan.behaviours[self._plan.behaviour(lane.k)])
        dropped = Attempt(lane.k, name, 0, f"episode {lane.k}: {reason}, {tries} times")
        if self._segments.write(lane.index, lane.tried, [dropped], [], self._ledger.id, None):
            return [dropped]
        # The worker wrote it after all, before it ended.
        return self._segments.attempts(lane.index, lane.tried, self._ledger)


def run_on_ray(plan: CollectTask, lanes: Sequence[Lane], workers: int, report: Report) -> None:
    """Run all lanes on `workers` Ray actors of one CPU each.

    The environment may hang: its step and reset for `reality.step_timeout_s`, its close for
    SILENCE_S more (its data is in storage by then). A behaviour that hangs is the caller's code,
    and only the caller can end it.
    """
    import ray

    losses, segments = LostWorkers(plan), plan.segments()
    waiting = deque(lane for lane in lanes if lane.left)
    team = [Worker(plan) for _ in range(min(workers, len(waiting)))]
    timeout_s = plan.reality.step_timeout_s

    def report_steps(attempts: Sequence[Attempt]) -> None:
        stored = sum(lane.used for lane in lanes)
        report(attempts, stored + sum(worker.unstored_steps for worker in team))

    def record(lane: Lane, attempts: Sequence[Attempt]) -> None:
        lane.record(attempts)
        report_steps(attempts)
        lane.check(segments, attempts[-1].reason if attempts else None)

    def replace(worker: Worker, reason: str, died: bool) -> None:
        """Replace a lost worker by one that continues after the stored attempts."""
        worker.kill()
        if worker.call == "advance":
            record(worker.lane, losses.account(worker.lane, reason, died))
        elif worker.call == "begin":
            worker.deaths += 1
            if worker.deaths >= DEATHS:
                raise MesocosmError(
                    f"the process of a worker died {DEATHS} times while it made the environment;"
                    f" correct reality.env={plan.reality.env!r}, or give each of workers={workers}"
                    " more memory"
                )
        proceed(worker, usable=False)

    def finish(worker: Worker) -> None:
        """Take the result of a worker's call, and start the next call."""
        try:
            attempts = worker.result()
        except ray.exceptions.RayActorError:
            replace(worker, "the environment's process died", died=True)
            return
        lane, usable = worker.lane, worker.call == "begin"
        worker.deaths = 0
        if worker.call == "advance":
            written_here = attempts is not None
            if not written_here:  # another process wrote this lane
                attempts = segments.attempts(lane.index, lane.tried, plan.open_ledger())
            record(lane, attempts)
            usable = written_here and not lane.failed
            if usable and lane.left:
                worker.retiring = worker.leaks()
                usable = not worker.retiring
        elif worker.call == "end" and worker.retiring:
            worker.kill()
        proceed(worker, usable)

    def proceed(worker: Worker, usable: bool) -> None:
        """Start the next call. `usable`: the environment can run another episode."""
        if worker.lane.left and usable:
            worker.advance()
        elif worker.call != "end" and worker.alive:
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
            futures = [worker.future for worker in busy]
            ready, _ = ray.wait(futures, num_returns=1, timeout=min(0.5, timeout_s / 4))
            for worker in busy:
                if worker.future in ready:
                    finish(worker)
                elif trouble := worker.check():
                    reason, attempts = trouble
                    if attempts is None:
                        replace(worker, reason, died=False)
                    else:  # a step hangs: the attempts, and that its episode is dropped, are stored
                        worker.kill()
                        record(worker.lane, attempts)
                        proceed(worker, usable=False)
            report_steps([])
    finally:
        halts = [worker.halt() for worker in team if worker.alive]
        if halts:
            ray.wait(halts, num_returns=len(halts), timeout=10)
        for worker in team:
            worker.kill()
