"""Workers that hang or are lost at inconvenient moments."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mesocosm.data.collecting import ray_workers
from mesocosm.data.collecting.ray_workers import DEATHS, LostWorkers, run_on_ray
from mesocosm.data.collecting.workers import CollectTask, LaneRunner, split
from mesocosm.envs.config import RealityConfig
from mesocosm.envs.memory import SUPERVISOR, resident_bytes
from mesocosm.envs.segments import Attempt
from mesocosm.errors import MesocosmError
from mesocosm.policies.behaviours import BehaviourConfig
from mesocosm.store.artifacts import Storage

from .reality import SAMPLE_ENVS, a_task


class Attempts:
    """A report of attempts. The driver has much to do before the first one: it asks its workers
    after 2 s, and reads the answer after 4.
    """

    def __init__(self, naps: int = 0) -> None:
        self.attempts: list[Attempt] = []
        self.naps = naps

    def __call__(self, attempts: Sequence[Attempt], steps: int) -> None:
        self.attempts += attempts
        if not self.attempts and self.naps:
            self.naps -= 1
            time.sleep(2.0)

    def outcomes(self) -> list[tuple[int, int, bool]]:
        return [(a.index, a.steps, a.length is None) for a in self.attempts]


def check_ledger(task: CollectTask, steps: int) -> None:
    totals = task.open_ledger().totals()
    assert totals.steps == steps and totals.unconfirmed == ()


@pytest.mark.slow
def test_a_step_that_comes_back_too_late_costs_its_episode(
    root: str, user_module: None, ray_local: None
) -> None:
    """The meter is frozen, and the step returns before the driver has read so."""
    task, report = a_task(root, {1: "hang"}, nap=3.1), Attempts(naps=2)
    run_on_ray(task, split(30, 1), 1, report)
    assert report.outcomes() == [(0, 10, False), (1, 3, True), (2, 10, False), (3, 7, False)]
    reason = "episode 1: a step took longer than reality.step_timeout_s=0.3"
    assert report.attempts[1].reason == reason
    check_ledger(task, 30)


@pytest.mark.slow
def test_a_close_that_hangs_costs_nothing(
    root: str, user_module: None, ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_workers, "SILENCE_S", 0.5)
    task, report = a_task(root, {0: "crash"}, closing=3600.0), Attempts()
    run_on_ray(task, split(20, 1), 1, report)
    assert report.outcomes() == [(0, 3, True), (1, 10, False), (2, 7, False)]
    check_ledger(task, 20)


@pytest.mark.slow
def test_a_process_that_dies_while_it_makes_the_environment_ends_the_job(
    root: str, user_module: None, ray_local: None
) -> None:
    reality = RealityConfig(env="ownenvs:Stillborn", kwargs={"survivor": os.getpid()})
    behaviours = [BehaviourConfig()]
    task = CollectTask(reality, behaviours, 0, root, "x", "d", "r", str(SAMPLE_ENVS))
    message = rf"died {DEATHS} times while it made the environment.*ownenvs:Stillborn"
    with pytest.raises(MesocosmError, match=message):
        run_on_ray(task, split(20, 1), 1, lambda attempts, steps: None)


@pytest.mark.slow
def test_a_worker_that_leaks_is_replaced_between_episodes(
    root: str, user_module: None, ray_local: None, tmp_path: Path
) -> None:
    log, report = tmp_path / "pids", Attempts()
    kwargs = {"log": str(log)}
    reality = RealityConfig(env="ownenvs:Leaky", kwargs=kwargs, horizon=10, memory_gb=0.9)
    behaviours = [BehaviourConfig()]
    task = CollectTask(reality, behaviours, 0, root, "x", "d", "r", str(SAMPLE_ENVS))
    run_on_ray(task, [replace(lane, careful=True) for lane in split(100, 1)], 1, report)
    assert report.outcomes() == [(k, 10, False) for k in range(10)]
    pids = log.read_text().split()
    assert 2 <= len(set(pids)) < len(pids) == 10
    check_ledger(task, 100)


HOLDS = "x = bytearray(b'1' * (100 << 20)); print(flush=True); input()"
"""A process of 100 MiB that ends with its standard input."""


@contextmanager
def piped(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose standard input and output are pipes; it is killed at the end."""
    pipe: Any = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as process:
        yield process
        process.kill()


def test_the_memory_of_a_process_is_that_of_its_children_too() -> None:
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLDS!r}])"
    with piped(sys.executable, "-c", code) as parent:
        parent.stdout.readline()  # type: ignore[union-attr]
        assert resident_bytes(parent.pid) > 100 << 20
    assert resident_bytes(2**30) == 0


def test_the_memory_of_a_browser_is_its_owners() -> None:
    """The supervisor leaves the process tree of its owner."""
    with piped(sys.executable, "-c", "input()") as owner:
        assert resident_bytes(owner.pid) < 100 << 20
        supervise = [sys.executable, "-I", "-S", SUPERVISOR, str(owner.pid)]
        with piped(
            *supervise,
            sys.executable,
            "-c",
            HOLDS.replace("input()", "import time; time.sleep(60)"),
        ) as supervisor:
            supervisor.wait(60)
            supervisor.stdout.readline()  # type: ignore[union-attr]
            assert resident_bytes(owner.pid) > 100 << 20
            supervisor.stdin.close()  # type: ignore[union-attr]
            assert supervisor.stdout.read() == b""  # type: ignore[union-attr]
        assert resident_bytes(owner.pid) < 100 << 20


def test_an_episode_that_is_written_while_its_worker_is_given_up_is_not_dropped(
    root: str, user_module: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A silent worker writes its episode after the driver has read storage."""
    task = a_task(root, {})
    (lane,) = split(10, 1)
    lane.careful = True
    lost, runner = LostWorkers(task), LaneRunner(task)
    runner.begin(0, 10)
    read = lost._segments.attempts

    def write_after_reading(*args: Any) -> list[Attempt]:
        attempts = read(*args)
        if not Storage(root).list("runs/episodes/d"):
            runner.advance(lane)
        return attempts

    monkeypatch.setattr(lost._segments, "attempts", write_after_reading)
    lost._tries[0] = (0, DEATHS)
    (attempt,) = lost.account(lane, "the environment's process did not answer", died=False)
    assert attempt.reason is None and attempt.steps == 10
    runner.end()
    check_ledger(task, 10)
