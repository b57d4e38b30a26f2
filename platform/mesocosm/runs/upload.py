"""A run's folder, sent to a remote root while the run goes on: what was said outlives its process,
its node and its cluster.

A job that was submitted to a cluster (`MESOCOSM_JOB` is its id) also sends what its driver prints,
and is told to stop by a file beside that.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from mesocosm.errors import StorageError
from mesocosm.store.artifacts import Storage

EVERY = 10.0
"""Seconds between shipments."""
SMALL = 8 << 20
"""Bytes; a file of n times as many is sent every n + 1st time: the whole of it is sent, for S3
cannot append.
"""


ASKED = 2.0
"""Seconds between looks at whether the job is to stop."""
STOP, DRIVER_LOG = "stop", "driver.log"
JOB = "MESOCOSM_JOB"
"""The environment variable of a submitted job's driver."""


class Shipper:
    """Calls `beat` every `EVERY` seconds, and on a remote root sends what changed of `folder` to
    `prefix`. A storage that is away is tried again the next time; a run never waits for it but at
    its end, once.
    """

    def __init__(self, storage: Storage, folder: Path, prefix: str, beat: Callable[[], None]):
        self._storage, self._folder, self._prefix, self._beat = storage, folder, prefix, beat
        self._submitted = folder.name == os.environ.get(JOB)
        self._sent: dict[str, tuple[int, float]] = {}
        """By name: bytes and when."""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="shipper", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Send the last of it. Raises what storage raises."""
        self._closing.set()
        self._thread.join()
        self._heard()
        for path in self._files():
            self._send(path)

    def _work(self) -> None:
        shipped = time.monotonic()
        while not self._closing.wait(min(ASKED, EVERY)):
            if self._submitted:
                with contextlib.suppress(Exception):
                    self._stop_if_asked()
            if time.monotonic() - shipped < EVERY:
                continue
            shipped = time.monotonic()
            with contextlib.suppress(OSError, StorageError):
                self._beat()
                self._heard()
            for path in self._files():
                with contextlib.suppress(Exception):
                    self._send_if_due(path)

    def _stop_if_asked(self) -> None:
        """As Ctrl-C would: every job ends well by that."""
        name = f"{self._prefix}/{STOP}"
        if self._storage.read(name) is not None:
            self._storage.remove(name)
            os.kill(os.getpid(), signal.SIGINT)  # SIGTERM is Ray's own in its drivers: it aborts

    def _heard(self) -> None:
        """What the driver printed, from the file that Ray made its standard output."""
        if self._submitted:
            with contextlib.suppress(OSError):
                said, kept = Path(os.path.realpath("/proc/self/fd/1")), self._folder / DRIVER_LOG
                if not kept.exists() or kept.stat().st_size != said.stat().st_size:
                    shutil.copyfile(said, kept)

    def _files(self) -> list[Path]:
        return (
            [
                path
                for path in sorted(self._folder.iterdir())
                if path.is_file() and path.suffix != ".tmp"
            ]
            if self._storage.remote
            else []
        )

    def _send_if_due(self, path: Path) -> None:
        bytes, when = self._sent.get(path.name, (-1, 0.0))
        now = path.stat().st_size
        changed = now != bytes or path.suffix == ".json"
        if changed and time.monotonic() - when >= EVERY * (now // SMALL):
            self._send(path)

    def _send(self, path: Path) -> None:
        data = path.read_bytes()
        self._storage.write(f"{self._prefix}/{path.name}", data)
        self._sent[path.name] = (len(data), time.monotonic())
