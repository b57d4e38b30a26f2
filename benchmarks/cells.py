"""Cells of benchmarks: an interruption after some seconds of wall time."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from mesocosm import signals


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Raise KeyboardInterrupt, as Ctrl-C does, when the seconds have passed in the block."""
    # A thread: the alarm signal belongs to the guard of real steps.
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    with signals.end_like_interrupt():
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
