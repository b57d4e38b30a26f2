"""What rank 0 tells the driver while it trains, and the one word that goes the other way: stop.

Through the root's own storage, so that it works from any node, needs no process of its own, and
what a dead driver did not read the next one does. `ray.train.report` is no such channel: every
report is a barrier that waits for a poll.
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
        self.told_to_stop = False
        """As of the last flush."""

    # -- the worker's side
    # ---------------------------------------------------------------------------------------

    def put(self, record: dict[str, Any]) -> None:
        self._lines.append(json.dumps(record))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._flushed = time.monotonic()
        if self._lines:
            self._storage.write(
                f"{self._folder}/feed/{time.time_ns():020d}.json", "\n".join(self._lines).encode()
            )
            self._lines = []
        self.told_to_stop = self.stopped

    @property
    def stopped(self) -> bool:
        return self._storage.read(f"{self._folder}/stop") is not None

    def fail(self, sentence: str) -> None:
        """Training cannot go on, for a reason that another attempt would meet again."""
        self.put({"failed": sentence})
        self.flush()
        self.stop(sentence)

    # -- the driver's side
    # ---------------------------------------------------------------------------------------

    def take(self) -> list[dict[str, Any]]:
        """The records since the last call, in order."""
        records = []
        for name in self._storage.list(f"{self._folder}/feed"):
            data = self._storage.read(f"{self._folder}/feed/{name}")
            if data is not None:
                records += [json.loads(line) for line in data.splitlines()]
                self._storage.remove(f"{self._folder}/feed/{name}")
        return records

    def stop(self, reason: str) -> None:
        self._storage.write(f"{self._folder}/stop", reason.encode())

    def clear(self) -> None:
        """Begin anew: forget the word to stop and failures that nobody read; other records are kept
        to be read.
        """
        self._storage.remove(f"{self._folder}/stop")
        for record in self.take():
            if "failed" not in record:
                self.put(record)
        self.flush()
