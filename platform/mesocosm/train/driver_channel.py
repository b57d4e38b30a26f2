"""Records from rank 0 to the driver, and a request to stop in the other direction.

They are files in the root's storage, so a new driver can read the records of a dead one. Every
`ray.train.report` is a barrier that waits for a poll.
"""

from __future__ import annotations

import json
import time
from typing import Any

from mesocosm.store.artifacts import Storage

FLUSH_SECONDS = 0.5


class Feed:
    """`FOLDER/feed/<time>.json` holds lines of records, `FOLDER/stop` the reason to stop."""

    def __init__(self, storage: Storage, folder: str):
        self._storage, self._folder = storage, folder
        self._lines: list[str] = []
        self._flushed = 0.0
        self.stop_requested = False
        """True if a stop was requested by the last flush."""

    @property
    def stopped(self) -> bool:
        return self._storage.read(f"{self._folder}/stop") is not None

    def stop(self, reason: str) -> None:
        self._storage.write(f"{self._folder}/stop", reason.encode())

    # The worker's side.

    def put(self, record: dict[str, Any]) -> None:
        """Queue a record; it is written within FLUSH_SECONDS of the next `put`."""
        self._lines.append(json.dumps(record))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._flushed = time.monotonic()
        if self._lines:
            name = f"{self._folder}/feed/{time.time_ns():020d}.json"
            self._storage.write(name, "\n".join(self._lines).encode())
            self._lines = []
        self.stop_requested = self.stopped

    def fail(self, reason: str) -> None:
        """Report a failure that another attempt would meet again, and stop."""
        self.put({"failed": reason})
        self.flush()
        self.stop(reason)

    # The driver's side.

    def take(self) -> list[dict[str, Any]]:
        """The records since the last call, in order."""
        records = []
        for file in self._storage.list(f"{self._folder}/feed"):
            name = f"{self._folder}/feed/{file}"
            data = self._storage.read(name)
            if data is not None:
                records += [json.loads(line) for line in data.splitlines()]
                self._storage.remove(name)
        return records

    def clear(self) -> None:
        """Start again: drop the request to stop and unread failures; other records stay."""
        self._storage.remove(f"{self._folder}/stop")
        for record in self.take():
            if "failed" not in record:
                self.put(record)
        self.flush()
