"""Leases: one process at a time makes an artifact, and a dead one's lease is taken over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from factories import wait_until

from mesocosm.config import JobConfig, StorageConfig
from mesocosm.errors import MesocosmError, StorageError
from mesocosm.runs import tracking
from mesocosm.store import lease
from mesocosm.store.artifacts import Storage
from mesocosm.store.lease import Claim, Held, Owner, hold, this_process

pytestmark = pytest.mark.integration

HOLDER = """
import sys, time
from mesocosm.store.lease import hold
from mesocosm.store.artifacts import Storage
with hold(Storage(sys.argv[1]), "worlds/abc", "pretrain", print):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def holder(root: str, *before: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lease until the end of the block, or until it is killed."""
    command = [*before, sys.executable, "-c", HOLDER, root]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def leases(root: str) -> list[str]:
    return Storage(root).list("leases")


def take(root: Storage | str, say: Callable[[str], None] = print) -> AbstractContextManager[None]:
    """Hold the lease of worlds/abc."""
    return hold(Storage(root) if isinstance(root, str) else root, "worlds/abc", "x", say)


def test_the_second_process_gets_an_error_that_names_the_holder(root: str) -> None:
    with holder(root) as process:
        name = rf"worlds/abc is being made by `mesocosm pretrain` \(process {process.pid} on host "
        message = name + r".*last heartbeat \d+ s ago\); wait for it with --wait"
        with pytest.raises(Held, match=message), take(root):
            pass
        with hold(Storage(root), "worlds/abcd", "pretrain", print):  # another artifact
            assert len(leases(root)) == 2


def test_a_killed_holder_is_followed_at_once(root: str) -> None:
    with holder(root):
        pass
    with take(root):
        assert leases(root) == ["worlds.abc.00000001.json"]
    assert leases(root) == []


def test_a_lease_is_waited_for(root: str) -> None:
    messages, taken = list[str](), threading.Event()

    def wait() -> None:
        with hold(Storage(root), "worlds/abc", "pretrain", messages.append, wait=True):
            taken.set()

    thread = threading.Thread(target=wait)
    with holder(root):
        thread.start()
        wait_until(lambda: bool(messages))
        assert "waiting for it" in messages[0] and not taken.is_set()
    thread.join(60)
    assert taken.is_set() and len(messages) == 1


def test_of_many_that_follow_a_dead_holder_one_gets_it(root: str) -> None:
    with holder(root):
        pass
    inside, done = threading.Lock(), list[bool]()

    def work() -> None:
        with hold(Storage(root), "worlds/abc", "pretrain", lambda text: None, wait=True):
            assert inside.acquire(blocking=False), "two holders at once"
            time.sleep(0.02)
            inside.release()
        done.append(True)

    with ThreadPoolExecutor(6) as pool:
        for _ in range(6):
            pool.submit(work)
    assert len(done) == 6 and leases(root) == []


def lease_on_another_host(root: str, silent_s: float) -> Claim:
    """A lease of a process on another host."""
    other = Owner("gpu-7", "another-boot/4026531836", os.getpid(), 1)
    record = Claim(other, "pretrain", time.time() - 9999, 5, time.time() - silent_s)
    Storage(root).write("leases/worlds.abc.00000000.json", record.to_json())
    return record


def test_a_holder_on_another_host_is_judged_by_its_heartbeat(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 1.0)
    monkeypatch.setattr(lease, "POLL_S", 0.05)
    lease_on_another_host(root, silent_s=5.0)
    with pytest.raises(Held, match="on host gpu-7"), take(root):
        pass
    messages = list[str]()
    lease_on_another_host(root, silent_s=3600.0)
    with take(root, messages.append):
        assert "watching its heartbeat" in messages[0]
    # Its clock is an hour behind, but its heart beats.
    record, stop = lease_on_another_host(root, silent_s=3600.0), threading.Event()

    def beat() -> None:
        now = record
        while not stop.wait(0.1):
            now = replace(now, beat=now.beat + 1)
            Storage(root).write("leases/worlds.abc.00000000.json", now.to_json())

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(Held), take(root):
            pass
    finally:
        stop.set()
        thread.join()


def test_a_heartbeat_counts_up_and_a_takeover_ends_the_job(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    messages = list[str]()
    path = Path(root) / "leases" / "worlds.abc.00000000.json"
    with pytest.raises(KeyboardInterrupt), take(root, messages.append):
        wait_until(lambda: json.loads(path.read_text())["beat"] > 2)
        path.unlink()
        wait_until(lambda: False)
    assert messages == ["another process has taken over worlds/abc; this one stops"]


class Paused(Storage):
    """Waits after a look into the folder of leases, and before creating one."""

    def __init__(self, root: str):
        super().__init__(root)
        self.looked, self.judge, self.judged, self.go = (threading.Event() for _ in range(4))

    def list(self, path: str) -> list[str]:
        names = super().list(path)
        self.looked.set()
        assert self.judge.wait(60)
        return names

    def create(self, path: str, data: bytes) -> bool:
        self.judged.set()
        assert self.go.wait(60)
        return super().create(path, data)


def test_a_number_that_is_used_again_does_not_make_two_holders(root: str) -> None:
    """A process lists a lease, which is released and taken anew before its own claim."""
    slow, errors = Paused(root), list[Exception]()

    def claim() -> None:
        try:
            with take(slow):
                pass
        except Held as error:
            errors.append(error)

    thread = threading.Thread(target=claim)
    with take(root):
        thread.start()
        assert slow.looked.wait(60)
    slow.judge.set()
    assert slow.judged.wait(60)
    with take(root):
        slow.go.set()
        thread.join(60)
        assert len(errors) == 1 and leases(root) == ["worlds.abc.00000000.json"]


RACER = """
import os, sys, time
from mesocosm.store import lease
from mesocosm.store.lease import Held, hold
from mesocosm.store.artifacts import Storage
lease.POLL_S = 0.002
root, inside, end, held = sys.argv[1], sys.argv[1] + "/inside", time.monotonic() + 4, 0
while time.monotonic() < end:
    try:
        with hold(Storage(root), "worlds/abc", "x", print, wait=True):
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
            os.unlink(inside)
            held += 1
    except Held:
        pass
print(held)
"""


@pytest.mark.slow
def test_many_short_holders_are_never_two_at_once(root: str) -> None:
    Storage(root).write("leases/other", b"")
    command = [sys.executable, "-c", RACER, root]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    racers = [subprocess.Popen(command, **pipes) for _ in range(5)]  # type: ignore[call-overload]
    for racer in racers:
        out, err = racer.communicate(timeout=300)
        assert racer.returncode == 0 and out.split()[-1:] != ["0"], err
    assert leases(root) == ["other"]


class Doubting(Storage):
    """A store that gets each creation twice, as from a client that lost the first answer."""

    def create(self, path: str, data: bytes) -> bool:
        super().create(path, data)
        return super().create(path, data)


def test_a_claim_that_was_sent_twice_is_recognised(root: str) -> None:
    with take(Doubting(root)):
        assert len(leases(root)) == 1
    assert leases(root) == []


class Away(Storage):
    def remove(self, path: str) -> None:
        raise StorageError("S3 does not answer")


def test_storage_that_is_away_at_the_end_hides_neither_result_nor_error(root: str) -> None:
    messages = list[str]()
    with take(Away(root), messages.append):
        pass
    assert len(messages) == 1 and "does not answer" in messages[0]
    Storage(root).remove("leases")
    with pytest.raises(KeyError), take(Away(root), messages.append):
        raise KeyError("the job's own error")


class SlowBeat(Storage):
    """Writes a heartbeat slowly."""

    def __init__(self, root: str):
        super().__init__(root)
        self.begun, self.go = threading.Event(), threading.Event()

    def write(self, path: str, data: bytes) -> None:
        self.begun.set()
        assert self.go.wait(60)
        super().write(path, data)


def test_a_beat_under_way_does_not_bring_a_released_lease_back(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.01)
    storage = SlowBeat(root)
    with take(storage):
        assert storage.begun.wait(60)
        threading.Timer(0.2, storage.go.set).start()
    assert leases(root) == [] and "lease" not in [thread.name for thread in threading.enumerate()]


def test_a_lost_lease_is_not_released_for_its_new_holder(root: str) -> None:
    lost = take(root)
    lost.__enter__()
    Storage(root).remove("leases")
    with take(root):
        lost.__exit__(None, None, None)
        assert leases(root) == ["worlds.abc.00000000.json"]


def test_a_torn_lease_is_taken_over(root: str) -> None:
    Storage(root).write("leases/worlds.abc.00000000.json", b"{")
    with take(root):
        pass


def test_a_pid_that_was_used_again_is_another_process() -> None:
    me = this_process()
    assert me.alive() is True and me.started > 0
    assert replace(me, started=me.started - 1).alive() is False
    assert replace(me, machine="elsewhere").alive() is None


def test_a_process_that_ended_is_gone_and_a_zombie_too() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.DEVNULL)
    owner = replace(this_process(), pid=process.pid, started=0)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie
    assert owner.alive() is False
    process.wait()
    assert owner.alive() is False


HIDDEN = """
mount -t proc -o hidepid={how} proc /proc || exit 7
sleep 600 &
read -r stat < /proc/$!/stat
started=$(echo "$stat" | cut -d' ' -f22)
exec setpriv --reuid 65534 --regid 65534 --clear-groups {python} -c "
from dataclasses import replace
from mesocosm.store.lease import Owner, this_process
me = this_process()
hidden, gone = replace(me, pid=$!, started=$started), replace(me, pid=999999, started=1)
print(me.alive(), hidden.alive(), gone.alive())
"
"""


@pytest.mark.parametrize("how", ["1", "2"])
def test_a_hidden_process_is_not_taken_to_be_gone(how: str) -> None:
    """As on shared hosts, where users do not see each other's processes."""
    script = HIDDEN.format(how=how, python=sys.executable)
    namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
    command = [*namespaces, "sh", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if "failed" in done.stderr or "permitted" in done.stderr or done.returncode == 7:
        pytest.skip(f"this machine cannot hide processes: {done.stderr}")
    assert done.stdout.split() == ["True", "None", "False"], done.stderr


def test_a_pid_of_another_namespace_is_not_looked_up_here(root: str) -> None:
    """As two containers of one host see each other."""
    with holder(root, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc"):
        record = Claim.parse(Storage(root).read("leases/worlds.abc.00000000.json") or b"")
        assert record is not None and record.owner.pid < 100 and record.owner.alive() is None


def test_a_run_on_another_host_is_not_marked_failed(root: str) -> None:
    config = JobConfig(storage=StorageConfig(root))
    with tracking.start("collect", config, id="a", quiet=True) as run:
        path = run.folder / "status.json"
        status = json.loads(path.read_text())
        other = Owner("gpu-7", "another-boot/1", 2**22 + 1, 1)
        for silent, state in ((30.0, "running"), (tracking.SILENT_S + 1, "failed")):
            changed = {"owner": asdict(other), "updated": time.time() - silent}
            with run._lock:
                path.write_text(json.dumps(status | changed))
                tracking.replay_pending(config)
                assert json.loads(path.read_text())["state"] == state


def test_a_run_that_ends_while_it_is_judged_is_not_marked_failed(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = JobConfig(storage=StorageConfig(root))
    with tracking.start("collect", config, id="a", quiet=True) as run:
        alive, path = tracking._alive, run.folder / "status.json"

        def ends(status: dict[str, object]) -> bool:
            """The process writes its last status and is gone, after its status was read."""
            assert alive(status)
            path.write_text(json.dumps(status | {"state": "done"}))
            return False

        monkeypatch.setattr(tracking, "_alive", ends)
        tracking.replay_pending(config)
        assert json.loads(path.read_text())["state"] == "done"


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
