"""SIGTERM and SIGHUP end a job as Ctrl-C does: the run is marked stopped, and Ray and its session
folder are gone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mesocosm.cli.main import main

pytestmark = pytest.mark.integration

ENVIRONMENT = """
import time
from pathlib import Path
import gymnasium, numpy as np

class Slow(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        Path("stepping").touch()
        time.sleep(0.01)
        return np.zeros(1, np.float32), 0.0, False, False, {}
"""

LAUNCHERS = {
    "alone": [],
    "timeout": ["timeout", "100000"],
    "child of PID 1": [
        "unshare",
        "--pid",
        "--fork",
        "--mount-proc",
        "sh",
        "-c",
        '"$@" & wait $!',
        "sh",
    ],
    "PID 1": ["unshare", "--pid", "--fork", "--mount-proc"],
}


class Collection:
    """`mesocosm collect` of a slow environment, started by `launcher` in a folder of its own."""

    def __init__(self, folder: Path, launcher: str, workers: int):
        self.folder, self.root, self.mark = folder, folder / "root", uuid.uuid4().hex
        self.temporary = Path(tempfile.mkdtemp(prefix="ms-", dir="/tmp"))
        (folder / "slow.py").write_text(ENVIRONMENT)
        command = [
            sys.executable,
            "-m",
            "mesocosm.cli.main",
            "collect",
            "reality.env=slow:Slow",
            "steps=1000000",
            "lanes=1",
            f"workers={workers}",
        ]
        self.process = subprocess.Popen(
            [*LAUNCHERS[launcher], *command, f"storage.root={self.root}"],
            cwd=folder,
            env={name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
            | {"TMPDIR": str(self.temporary), "MARK": self.mark},
            start_new_session=True,
            preexec_fn=lambda: signal.signal(
                signal.SIGINT, signal.SIG_IGN
            ),  # as in the background of a script
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def driver(self) -> int:
        """The process that runs the command line."""
        return next(
            pid
            for pid in self.alive()
            if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[1:4]
            == [b"-m", b"mesocosm.cli.main", b"collect"]
        )

    def alive(self) -> list[int]:
        """The job's processes, without those that wait to be reaped."""
        pids = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if (
                    self.mark.encode() in path.read_bytes()
                    and (path.parent / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
                ):
                    pids.append(int(path.parent.name))
        return pids

    def wait(self, condition: Callable[[], Any], seconds: float = 250.0) -> None:
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, f"waited in vain; {self.process.poll()=}"
            time.sleep(0.05)

    def sessions(self) -> list[Path]:
        return list(self.temporary.glob("mesocosm-ray-*"))

    def ends_well(self) -> None:
        """The command says that it was interrupted, and leaves nothing behind."""
        _, message = self.process.communicate(timeout=250)
        assert "mesocosm: interrupted; run the same command again to continue" in message
        assert "Traceback" not in message and "SIGTERM" not in message, message
        self.wait(lambda: not self.alive())
        assert self.sessions() == []
        states = [
            json.loads(path.read_text())["state"]
            for path in self.root.glob("runs/collect/*/status.json")
        ]
        assert states == ["stopped"]


@pytest.fixture
def collection(tmp_path: Path) -> Iterator[Callable[..., Collection]]:
    started: list[Collection] = []

    def start(launcher: str = "alone", workers: int = 1) -> Collection:
        if (
            launcher.endswith("PID 1")
            and subprocess.run([*LAUNCHERS["PID 1"], "true"], capture_output=True).returncode
        ):
            pytest.skip("a PID namespace needs root")
        started.append(Collection(tmp_path, launcher, workers))
        return started[-1]

    yield start
    for job in started:
        for pid in job.alive():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        job.process.wait(60)
        subprocess.run(["rm", "-rf", str(job.temporary)], check=True)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)]
)
def test_a_signal_ends_a_job_without_ray(
    number: signal.Signals, collection: Callable[..., Collection]
) -> None:
    job = collection(workers=0)
    job.wait((job.folder / "stepping").exists)
    os.kill(job.driver, number)
    job.ends_well()
    assert job.process.returncode == 130


@pytest.mark.slow
def test_timeout_ends_a_job_on_ray(collection: Callable[..., Collection]) -> None:
    """`timeout` signals its child, and then the whole process group: the child twice, and what it
    started.
    """
    job = collection("timeout")
    job.wait((job.folder / "stepping").exists)
    os.kill(job.process.pid, signal.SIGTERM)  # as when its time is up
    job.ends_well()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["child of PID 1", "PID 1"])
def test_sigterm_ends_a_job_in_a_container(
    launcher: str, collection: Callable[..., Collection]
) -> None:
    job = collection(launcher)
    job.wait((job.folder / "stepping").exists)
    os.kill(job.driver, signal.SIGTERM)
    job.ends_well()
    assert job.process.returncode == 130


@pytest.mark.slow
def test_sigterm_while_ray_starts(collection: Callable[..., Collection]) -> None:
    job = collection()
    job.wait(job.sessions)
    os.kill(job.driver, signal.SIGTERM)
    job.ends_well()
    assert job.process.returncode == 130 and not (job.folder / "stepping").exists()


@pytest.mark.slow
def test_the_session_folder_of_a_killed_job_is_garbage(
    collection: Callable[..., Collection],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = collection()
    monkeypatch.setattr(tempfile, "tempdir", str(job.temporary))

    def listed(*options: str) -> list[tuple[str, str]]:
        assert (
            main(
                [
                    "storage",
                    "gc",
                    f"storage.root={job.root}",
                    "--older-than",
                    "0",
                    "--json",
                    *options,
                ]
            )
            == 0
        )
        return [
            (row["what"], row["path"])
            for row in json.loads(capsys.readouterr().out)["remains"]
            if row["what"] == "Ray session"
        ]

    job.wait((job.folder / "stepping").exists)
    assert listed("--dry-run") == []
    os.kill(job.driver, signal.SIGKILL)
    job.wait(lambda: not job.alive())
    assert listed("--dry-run") == [("Ray session", str(job.sessions()[0]))]
    listed("--yes")
    assert job.sessions() == []
