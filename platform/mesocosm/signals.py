"""The signals that end a job: SIGTERM and SIGHUP end it exactly as Ctrl-C does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

ENDING = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def end_like_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP act as Ctrl-C while the block runs. Repeated ones are ignored.

    `timeout` sends SIGTERM twice, to its child and to its process group, and the second must not
    cut the clean-up short.
    """
    ending = False

    def interrupt(number: int, frame: Any) -> None:
        nonlocal ending
        if ending:
            return
        ending = True
        on_interrupt = signal.getsignal(signal.SIGINT)
        if not callable(on_interrupt):  # a script's background processes ignore Ctrl-C
            raise KeyboardInterrupt
        on_interrupt(signal.SIGINT, frame)

    with _handled(ENDING, interrupt):
        try:
            yield
        finally:
            ending = True


@contextmanager
def held_back() -> Iterator[list[int]]:
    """Hold SIGINT, SIGTERM and SIGHUP back while the block runs. A second Ctrl-C raises
    KeyboardInterrupt at once.

    Yields:
        The list of the signals that arrived: the caller decides what they do.
    """
    held: list[int] = []

    def hold(number: int, frame: Any) -> None:
        if number == signal.SIGINT and number in held:
            raise KeyboardInterrupt
        held.append(number)

    with _handled((signal.SIGINT, *ENDING), hold):
        yield held


@contextmanager
def delayed() -> Iterator[None]:
    """Let a signal that ends the job act after the block. A second Ctrl-C acts at once."""
    held: list[int] = []
    try:
        with held_back() as held:
            yield
    finally:
        for number in held[:1]:
            signal.raise_signal(number)


@contextmanager
def _handled(
    numbers: tuple[signal.Signals, ...], handler: Callable[[int, Any], None]
) -> Iterator[None]:
    """Handle signals while the block runs. A signal that is ignored (`nohup`) stays ignored.

    Outside of the main thread, which alone may set handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    for number, former in before.items():
        if former is not signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, former in before.items():
            # None if the handler was set by C code.
            signal.signal(number, signal.SIG_DFL if former is None else former)
