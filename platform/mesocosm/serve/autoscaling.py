"""Ray Serve's autoscaling for replicas whose requests come over lines, which Serve does not count.

Each replica measures its ongoing requests. The policy gives Serve the number of replicas at which
each has `target_ongoing_requests`; Serve applies its own delays, factors and bounds.
"""

from __future__ import annotations

import threading
import time
from typing import Any

METRIC = "line_requests"
"""Name of the replicas' metric"""


class OngoingRequests:
    """The mean number of requests in work or waiting. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._area = 0.0
        """Integral of the count since `_since`, up to `_updated`; request seconds"""
        self._since = self._updated = time.monotonic()

    def __enter__(self) -> None:
        self._add(1)

    def __exit__(self, *_: Any) -> None:
        self._add(-1)

    def _add(self, change: int) -> None:
        with self._lock:
            now = time.monotonic()
            self._area += self._count * (now - self._updated)
            self._count, self._updated = self._count + change, now

    def mean(self) -> float:
        """The mean since the last call."""
        self._add(0)
        with self._lock:
            seconds, area = self._updated - self._since, self._area
            self._since, self._area = self._updated, 0.0
            return area / seconds if seconds > 0 else float(self._count)


def desired_replicas(context: Any) -> tuple[float, dict[str, Any]]:
    """The policy: `context` is Ray Serve's AutoscalingContext.

    Returns:
        The desired number of replicas, and an empty state.
    """
    measured = (context.aggregated_metrics or {}).get(METRIC, {})
    if not measured:  # the replicas have just started
        return context.target_num_replicas, {}
    ongoing = context.total_num_requests + sum(measured.values())
    return ongoing / context.config.target_ongoing_requests, {}
