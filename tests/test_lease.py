"""Leases: one process at a time makes an artifact, and a dead one's lease is taken over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mesocosm import lease, tracking
from mesocosm.config import JobConfig, StorageConfig
from mesocosm.errors import MesocosmError
from mesocosm.lease import Held, Record, hold
from mesocosm.owner import Owner, this_process
from mesocosm.storage import Storage

HOLDER = """
import sys, time
from mesocosm.lease import hold
from mesocosm.storage import Storage
with hold(Storage(sys.argv[1]), "worlds/abc", "pretrain", print):
    print("held", flush=True)
    time.sleep(600)
"""


def holder(root: str, *before: str) -> subprocess.Popen[str]:
    command = [*before, sys.executable, "-c", HOLDER, root]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def leases(root: str) -> list[str]:
    return Storage(root).list("leases")


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_second_process_is_told_who_holds_it(root: str) -> None:
    process = holder(root)
    try:
        with (
            pytest.raises(
                Held,
                match=rf"worlds/abc is being made by `mesocosm pretrain` \(process {process.pid} on host "
                r".*last heartbeat \d+ s ago\); wait for it with --wait",
            ),
            hold(Storage(root), "worlds/abc", "pretrain", print),
        ):
            pass
        with hold(Storage(root), "worlds/abcd", "pretrain", print):  # another artifact
            assert len(leases(root)) == 2
    finally:
        process.kill()
        process.wait()


def test_a_killed_holder_is_followed_at_once(root: str) -> None:
    process = holder(root)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with hold(Storage(root), "worlds/abc", "pretrain", print):
        assert leases(root) == ["worlds.abc.00000001.json"]
    assert leases(root) == []


def test_a_lease_is_waited_for(root: str) -> None:
    process, heard, got = holder(root), list[str](), threading.Event()

    def wait() -> None:
        with hold(Storage(root), "worlds/abc", "pretrain", heard.append, wait=True):
            got.set()

    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: bool(heard))
    assert "waiting for it" in heard[0] and not got.is_set()
    process.terminate()
    process.wait()
    thread.join(60)
    assert got.is_set() and len(heard) == 1


def test_of_many_that_follow_a_dead_holder_one_gets_it(root: str) -> None:
    process = holder(root)
    process.kill()
    process.wait()
    inside, most, lock = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal inside, most
        with hold(Storage(root), "worlds/abc", "pretrain", lambda text: None, wait=True):
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.02)
            with lock:
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert most == 1 and leases(root) == []


def elsewhere(root: str, silent_s: float) -> Record:
    """A lease of a process on another host."""
    there = Owner("gpu-7", "another-boot/4026531836", os.getpid(), 1)
    record = Record(there, "pretrain", time.time() - 9999, 5, time.time() - silent_s)
    Storage(root).write("leases/worlds.abc.00000000.json", record.to_json())
    return record


def test_a_holder_on_another_host_is_judged_by_its_heartbeat(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.2)
    monkeypatch.setattr(lease, "POLL_S", 0.05)
    elsewhere(root, silent_s=5.0)
    with pytest.raises(Held, match="on host gpu-7"), hold(Storage(root), "worlds/abc", "x", print):
        pass
    heard = list[str]()
    record = elsewhere(root, silent_s=3600.0)
    with hold(Storage(root), "worlds/abc", "x", heard.append):
        assert "looking for" in heard[0]
    # Its clock is an hour behind, but its heart beats.
    record, stop = elsewhere(root, silent_s=3600.0), threading.Event()

    def beat() -> None:
        now = record
        while not stop.wait(0.1):
            now = replace(now, beat=now.beat + 1)
            Storage(root).write("leases/worlds.abc.00000000.json", now.to_json())

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(Held), hold(Storage(root), "worlds/abc", "x", print):
            pass
    finally:
        stop.set()
        thread.join()


def test_a_heartbeat_counts_up_and_notices_a_takeover(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    heard = list[str]()
    path = Path(root) / "leases" / "worlds.abc.00000000.json"
    with hold(Storage(root), "worlds/abc", "x", heard.append):
        until(lambda: json.loads(path.read_text())["beat"] > 2)
        path.unlink()
        until(lambda: bool(heard))
        assert "taken over" in heard[0]


def test_a_torn_lease_holds_nothing_up(root: str) -> None:
    Storage(root).write("leases/worlds.abc.00000000.json", b"{")
    with hold(Storage(root), "worlds/abc", "x", print):
        pass


def test_a_pid_that_was_used_again_is_another_process() -> None:
    me = this_process()
    assert me.alive() is True and me.started > 0
    assert replace(me, started=me.started - 1).alive() is False
    assert replace(me, machine="elsewhere").alive() is None


def test_a_pid_of_another_namespace_is_not_looked_up_here(root: str) -> None:
    """As two containers of one host see each other."""
    process = holder(root, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    try:
        record = Record.parse(Storage(root).read("leases/worlds.abc.00000000.json") or b"")
        assert record is not None and record.owner.pid < 100 and record.owner.alive() is None
    finally:
        process.kill()
        process.wait()


def test_a_run_on_another_host_is_not_marked_failed(root: str) -> None:
    config = JobConfig(storage=StorageConfig(root))
    with tracking.start("collect", config, id="a", quiet=True) as run:
        path = run.folder / "status.json"
        status = json.loads(path.read_text())
        there = Owner("gpu-7", "another-boot/1", 2**22 + 1, 1)
        for silent, state in ((30.0, "running"), (tracking.SILENT_S + 1, "failed")):
            changed = {"owner": asdict(there), "updated": time.time() - silent}
            with run._lock:
                path.write_text(json.dumps(status | changed))
                tracking.replay_pending(config)
                assert json.loads(path.read_text())["state"] == state


def test_errors_of_a_job_release_its_lease(root: str) -> None:
    config = JobConfig(storage=StorageConfig(root))
    with tracking.start("collect", config, quiet=True) as run:
        with pytest.raises(MesocosmError), run.making("datasets", "d", config) as artifact:
            assert artifact is None and len(leases(root)) == 1
            raise MesocosmError("broken")
        assert leases(root) == []
        run.storage.make("datasets", "d", {}, lambda folder: None)
        with run.making("datasets", "d", config) as artifact:
            assert artifact is not None and leases(root) == []
