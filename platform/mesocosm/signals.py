"""The signals that end a job: SIGTERM and SIGHUP end it exactly as Ctrl-C does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ENDING = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def end_like_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP act as Ctrl-C while the block runs. Repeated ones are ignored.

    `timeout` sends SIGTERM twice, to its child and to its process group, and the second must not
    cut the clean-up short. A signal that is ignored (`nohup`) stays ignored. Outside of the main
    thread, which alone may set handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
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

    before = {number: signal.getsignal(number) for number in ENDING}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        ending = True
        _restore(before)


@contextmanager
def held_back() -> Iterator[list[int]]:
    """Hold SIGINT, SIGTERM and SIGHUP back while the block runs. A second Ctrl-C raises
    KeyboardInterrupt at once.

    Yields:
        The list of the signals that arrived: the caller decides what they do.
    """
    held: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield held
        return

    def hold(number: int, frame: Any) -> None:
        if number == signal.SIGINT and number in held:
            raise KeyboardInterrupt
        held.append(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *ENDING)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, hold)
    try:
        yield held
    finally:
        _restore(before)


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


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: set by C code
