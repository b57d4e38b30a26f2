"""Lanes: who collects which episode. Lane l of L runs the episodes l, l + L, l + 2L, ... until its own share of steps is used.

The lanes, not the workers, decide what is collected: an episode is a function of (config, seed, k) and a lane's share is
fixed, so any number of workers, or none, makes the same episodes. Each lane has an environment of its own.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mesocosm.data.behaviours import BehaviourConfig, build, choose, label, narrowed
from mesocosm.data.episode import Episode
from mesocosm.data.spaces import SpaceCodec
from mesocosm.data.writer import encode_episode
from mesocosm.errors import MesocosmError
from mesocosm.reality.api import close
from mesocosm.reality.config import RealityConfig
from mesocosm.reality.env import Act, EpisodeCut, EpisodeError, make_env, run_episode
from mesocosm.reality.ledger import Ledger, Usage
from mesocosm.reality.metered import MeteredEnv
from mesocosm.reality.sturdy import MAX_FAILURES
from mesocosm.storage import Storage

START_TIMEOUT_S = 300.0
"""For a worker to get its CPU, start, import and make the environment."""
SILENCE_S = 30.0
"""Beyond the step's time limit, for a worker to answer at all: an environment that holds the interpreter lock cannot."""


@dataclass(frozen=True)
class Plan:
    """What a worker must know, as plain values."""

    reality: RealityConfig
    behaviours: list[BehaviourConfig]
    seed: int
    root: str
    ledger: str
    run: str
    """What no other run is called: lanes reserve under `<run>/lane<l>`."""
    imports: str
    """A folder that is importable, for environments and functions of the user's own."""

    def holder(self, lane: int) -> str:
        return f"{self.run}/lane{lane}"

    def open_ledger(self) -> Ledger:
        return Ledger(Storage(self.root), self.ledger, self.reality.budget, self.reality.price)


@dataclass(frozen=True)
class Attempt:
    """One episode tried. `steps` were taken in reality."""

    index: int
    behaviour: str
    steps: int
    episode: Episode | None
    reason: str | None = None
    """Why it was dropped."""
    spent: str | None = None
    """The ledger's refusal that ended it, and its lane: `episode` is what there is of it, None if it had not begun."""


@dataclass
class Lane:
    index: int
    lanes: int
    share: int
    """Steps that it may take."""
    used: int = 0
    tried: int = 0
    failures: int = 0
    """Failed episodes in a row."""
    refused: bool = False
    """The ledger has no more steps for it."""

    @property
    def k(self) -> int:
        """The episode to try next."""
        return self.index + self.lanes * self.tried

    @property
    def left(self) -> int:
        return 0 if self.refused else self.share - self.used

    def record(self, attempt: Attempt) -> None:
        """Raises MesocosmError after MAX_FAILURES failures in a row."""
        assert attempt.index == self.k and attempt.steps <= self.left, (attempt, self)
        self.used += attempt.steps
        self.tried += 1
        self.refused = attempt.spent is not None
        self.failures = 0 if attempt.reason is None else self.failures + 1
        if self.failures >= MAX_FAILURES:
            raise MesocosmError(
                f"{self.failures} episodes in a row failed ({attempt.reason}); no dataset was written, and the steps stay spent: correct reality.env"
            )


def split(steps: int, lanes: int) -> list[Lane]:
    """`lanes` lanes that share `steps` exactly."""
    return [Lane(index, lanes, steps // lanes + (index < steps % lanes)) for index in range(lanes)]


class LaneRunner:
    """Runs lanes' episodes, one lane at a time. Also the body of a Ray actor, where a second thread calls `pulse` and `halt`."""

    def __init__(self, plan: Plan):
        if plan.imports not in sys.path:
            sys.path.append(plan.imports)
        self.plan = plan
        self._storage = Storage(plan.root)
        self._ledger = plan.open_ledger()
        self._env: MeteredEnv | None = None
        self._codecs: tuple[SpaceCodec, SpaceCodec] | None = None
        self._acts: dict[int, Act] = {}

    def begin(self, lane: int, steps: int) -> None:
        """A fresh environment for `lane`, which may take `steps` more steps."""
        self.end()
        env = make_env(self.plan.reality)
        if self._codecs is None:
            self._codecs = SpaceCodec(env.observation_space, "observation"), SpaceCodec(env.action_space, "action")
        self._env = MeteredEnv(env, self._ledger, "collect", limit=steps, holder=self.plan.holder(lane))

    def episode(self, k: int, max_steps: int) -> Attempt:
        """Try episode k. A failure of the environment, or a value that is not of its spaces, is an Attempt without an episode;
        then `begin` anew."""
        env, plan, codecs = self._env, self.plan, self._codecs
        assert env is not None and codecs is not None, "begin comes first"
        which = choose(plan.behaviours, plan.seed, k)
        name = label(plan.behaviours[which])
        if which not in self._acts:
            self._acts[which] = build(plan.behaviours[which], env.observation_space, env.action_space, self._storage)
        before, spent = env.meter.steps, None
        try:
            reality = narrowed(plan.reality, plan.behaviours[which])
            episode: Episode | None = run_episode(env, self._acts[which], k=k, seed=plan.seed, behaviour=name, max_steps=max_steps, config=reality)
        except EpisodeCut as cut:
            episode, spent = cut.episode, str(cut)
        except EpisodeError as error:
            reason = f"episode {k}: {_too_long(plan.reality.step_timeout_s)}" if env.meter.stopped else str(error)
            return Attempt(k, name, env.meter.steps - before, None, reason)
        try:
            if episode is not None:
                encode_episode(episode, *codecs)
        except MesocosmError as error:
            return Attempt(k, name, env.meter.steps - before, None, str(error), spent)
        return Attempt(k, name, env.meter.steps - before, episode, None, spent)

    def end(self) -> None:
        """Confirm what the lane used and close its environment."""
        env, self._env = self._env, None
        if env is not None:
            env.meter.close()
            close(env.env)

    def pulse(self, timeout_s: float) -> tuple[int, Usage | None]:
        """(steps taken in this lane, what was used of the reservation if a step has hung: then no further one can begin)"""
        env = self._env
        return (0, None) if env is None else (env.meter.steps, env.meter.stop_if_hung(timeout_s))

    def halt(self) -> None:
        """Let no further step begin, and confirm those taken."""
        env = self._env
        usage = None if env is None else env.meter.stop()
        if usage is not None:
            self._ledger.confirm(usage.reservation, usage.steps, usage.resets, usage.seconds)


def _too_long(timeout_s: float) -> str:
    return f"a step took longer than reality.step_timeout_s={timeout_s:g}"


Report = Callable[[Sequence[Attempt], int], None]
"""Called with the attempts so far and the real steps taken."""


def run_here(plan: Plan, lanes: Sequence[Lane], report: Report) -> list[Attempt]:
    """All lanes in this process, without Ray. Nothing can end a step or a close that hangs: `reality.step_timeout_s` needs workers."""
    runner, attempts = LaneRunner(plan), list[Attempt]()
    try:
        for lane in lanes:
            fresh = False
            while lane.left:
                if not fresh:
                    runner.begin(lane.index, lane.left)
                attempts.append(attempt := runner.episode(lane.k, lane.left))
                lane.record(attempt)
                fresh = attempt.reason is None
                report(attempts, sum(each.used for each in lanes))
            runner.end()
    finally:
        runner.end()
    return attempts


class Worker:
    """A Ray actor at work on a lane, and what is known of its health."""

    def __init__(self, plan: Plan):
        import ray

        self._ray, self._plan = ray, plan
        remote: Any = ray.remote
        self._class = remote(num_cpus=1, max_restarts=0, concurrency_groups={"watch": 1})(LaneRunner)
        self._actor: Any = None
        self.lane: Lane | None = None
        self.future: Any = None
        self.doing = ""
        self.since = 0.0
        self._before = self._seen = 0
        self._pulse: Any = None
        self._pulse_since = 0.0

    def begin(self, lane: Lane) -> None:
        if self._actor is None:
            self._actor = self._class.remote(self._plan)
        self.lane, self._before, self._seen = lane, lane.used, 0
        self._do("begin", self._actor.begin.remote(lane.index, lane.left))

    def episode(self) -> None:
        assert self.lane is not None
        self._do("episode", self._actor.episode.remote(self.lane.k, self.lane.left))

    def end(self) -> None:
        self._do("end", self._actor.end.remote())

    def _do(self, doing: str, future: Any) -> None:
        self.doing, self.future, self.since, self._pulse = doing, future, time.monotonic(), None

    @property
    def under_way(self) -> int:
        """Steps of the episode under way, at the last pulse."""
        return max(0, self._before + self._seen - self.lane.used) if self.lane is not None and self.doing == "episode" else 0

    def result(self) -> Any:
        """The finished call's value. Raises what the worker raised; RayActorError if it died."""
        try:
            return self._ray.get(self.future)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, MesocosmError):
                raise error.cause from None
            raise

    def hung(self, timeout_s: float) -> tuple[str, Usage | None] | None:
        """Why the worker must be given up, and its episode's exact use if it still answers; None while all is well.

        Raises MesocosmError if the worker does not get to begin.
        """
        now = time.monotonic()
        if self.doing == "end":  # what was used is confirmed before the environment is closed
            return ("the environment's close hung", None) if now - self.since > timeout_s + SILENCE_S else None
        if self.doing != "episode":
            if now - self.since > START_TIMEOUT_S:
                raise MesocosmError(
                    f"a worker was not ready to collect in {START_TIMEOUT_S:g} s; lower workers to the free CPUs, or see why reality.env starts so late"
                )
            return None
        if self._pulse is None:
            self._pulse, self._pulse_since = self._actor.pulse.options(concurrency_group="watch").remote(timeout_s), now
            return None
        if self._ray.wait([self._pulse], timeout=0)[0]:
            pulse, self._pulse = self._pulse, None
            try:
                self._seen, usage = self._ray.get(pulse)
            except self._ray.exceptions.RayActorError:
                return None  # its own call will say so
            return None if usage is None else (_too_long(timeout_s), usage)
        if now - self._pulse_since > timeout_s + SILENCE_S:
            return f"the environment's process did not answer for {now - self._pulse_since:.0f} s", None
        return None

    @property
    def alive(self) -> bool:
        return self._actor is not None

    def kill(self) -> None:
        if self._actor is not None:
            self._ray.kill(self._actor)
        self._actor = self.future = self._pulse = None

    def halt(self) -> Any:
        return None if self._actor is None else self._actor.halt.options(concurrency_group="watch").remote()


def run_on_ray(plan: Plan, lanes: Sequence[Lane], workers: int, report: Report) -> list[Attempt]:
    """All lanes on `workers` Ray actors of one CPU each. A worker that dies or hangs costs its episode and goes on with the next.

    What may hang is the environment: its step and reset for `reality.step_timeout_s`, its close for SILENCE_S more (its data is
    in by then, so nothing is lost). A behaviour that hangs is the caller's own code: nothing ends it but the caller.
    """
    import ray

    ledger, attempts = plan.open_ledger(), list[Attempt]()
    waiting = deque(lane for lane in lanes if lane.left)
    team = [Worker(plan) for _ in range(min(workers, len(waiting)))]
    timeout_s = plan.reality.step_timeout_s

    def lost(worker: Worker, reason: str) -> None:
        """The worker is gone: what its lane reserved is spent, its episode is dropped, a new worker goes on."""
        worker.kill()
        lane = worker.lane
        assert lane is not None
        if worker.doing != "end":
            k, steps = lane.k, ledger.spent_by(plan.holder(lane.index)) - lane.used
            attempts.append(Attempt(k, label(plan.behaviours[choose(plan.behaviours, plan.seed, k)]), steps, None, f"episode {k}: {reason}"))
            lane.record(attempts[-1])
        proceed(worker, fresh=False)

    def proceed(worker: Worker, *, fresh: bool) -> None:
        """The next call of a worker whose last one is done; `fresh`: its environment is good for the next episode."""
        assert worker.lane is not None
        if worker.lane.left and fresh:
            worker.episode()
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
            ready, _ = ray.wait([worker.future for worker in busy], num_returns=1, timeout=min(0.5, timeout_s / 4))
            for worker in busy:
                assert worker.lane is not None
                if worker.future in ready:
                    try:
                        value = worker.result()
                    except ray.exceptions.RayActorError:
                        lost(worker, "the environment's process died")
                        continue
                    if worker.doing == "episode":
                        attempts.append(value)
                        worker.lane.record(value)
                    proceed(worker, fresh=worker.doing == "begin" or (worker.doing == "episode" and value.reason is None))
                elif trouble := worker.hung(timeout_s):
                    reason, usage = trouble
                    if usage is not None:
                        ledger.confirm(usage.reservation, usage.steps, usage.resets, usage.seconds)
                    lost(worker, reason)
            report(attempts, sum(lane.used for lane in lanes) + sum(worker.under_way for worker in team))
    finally:
        halts = [halt for worker in team if (halt := worker.halt()) is not None]
        if halts:
            ray.wait(halts, num_returns=len(halts), timeout=10)
        for worker in team:
            worker.kill()
    return attempts
