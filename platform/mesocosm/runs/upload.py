"""Uploads a run's folder to a remote root while the run works. A job submitted to a cluster
(`MESOCOSM_JOB` is its id) also uploads its driver's output, and stops when a file `stop` appears.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mesocosm.errors import StorageError
from mesocosm.store.artifacts import Storage

EVERY = 10.0
"""Seconds between uploads."""
SMALL = 8 << 20
"""Bytes. S3 cannot append: a file of n times this size is uploaded every n + 1st time only."""
STOP_POLL_S = 2.0
STOP, DRIVER_LOG = "stop", "driver.log"
JOB = "MESOCOSM_JOB"
"""The environment variable of a submitted job's driver."""


class Uploader:
    """Calls `beat` every `EVERY` seconds, and on a remote root uploads the changes of `folder` to
    `prefix`. If storage is away, the next upload tries again.
    """

    def __init__(self, storage: Storage, folder: Path, prefix: str, beat: Callable[[], None]):
        self._storage, self._folder, self._prefix, self._beat = storage, folder, prefix, beat
        self._submitted = folder.name == os.environ.get(JOB)
        self._sent: dict[str, tuple[int, float]] = {}
        """The size in bytes and the time of the upload of each file, by name."""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="uploader", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Upload everything once more. Raises StorageError where storage is away."""
        self._closing.set()
        self._thread.join()
        self._copy_driver_log()
        for path in self._files():
            self._send(path)

    def _work(self) -> None:
        uploaded, request = time.monotonic(), f"{self._prefix}/{STOP}"
        while not self._closing.wait(min(STOP_POLL_S, EVERY)):
            if self._submitted:
                with suppress(Exception):
                    if self._storage.read(request) is not None:
                        self._storage.remove(request)
                        # Ray's own handler of SIGTERM aborts its drivers.
                        os.kill(os.getpid(), signal.SIGINT)
            if time.monotonic() - uploaded < EVERY:
                continue
            uploaded = time.monotonic()
            with suppress(OSError, StorageError):
                self._beat()
                self._copy_driver_log()
            for path in self._files():
                with suppress(Exception):
                    self._send_if_due(path)

    def _copy_driver_log(self) -> None:
        """Copy the driver's output from the file that Ray made its standard output."""
        if self._submitted:
            with suppress(OSError):
                output, copy = Path(os.path.realpath("/proc/self/fd/1")), self._folder / DRIVER_LOG
                if not copy.exists() or copy.stat().st_size != output.stat().st_size:
                    shutil.copyfile(output, copy)

    def _files(self) -> list[Path]:
        paths = sorted(self._folder.iterdir()) if self._storage.remote else []
        return [path for path in paths if path.is_file() and path.suffix != ".tmp"]

    def _send_if_due(self, path: Path) -> None:
        sent, when = self._sent.get(path.name, (-1, 0.0))
        size = path.stat().st_size
        changed = size != sent or path.suffix == ".json"
        if changed and time.monotonic() - when >= EVERY * (size // SMALL):
            self._send(path)

    def _send(self, path: Path) -> None:
        data = path.read_bytes()
        self._storage.write(f"{self._prefix}/{path.name}", data)
        self._sent[path.name] = (len(data), time.monotonic())
