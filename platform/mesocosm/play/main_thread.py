"""Work of a server's threads, done by the main thread.

The time limit of a real step works only there, and simulators, browsers and databases often want
all calls from one thread.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from mesocosm.errors import MesocosmError

T = TypeVar("T")
POLL_S = 1.0
"""Seconds between two checks that the server is alive."""


class MainThread:
    """Runs the functions that other threads `call`, one at a time, in the thread of `run`."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._closed = False

    def call(self, function: Callable[[], T]) -> T:
        """The result of `function`, from any other thread.

        Raises:
            MesocosmError: The program is ending. Errors of the function are raised too.
        """
        future: Future[T] = Future()
        if self._closed:
            raise MesocosmError("the program is ending; start mesocosm play again")
        self._work.put((function, future))
        return future.result()

    def run(self, alive: Callable[[], bool]) -> None:
        """Work until `alive()` is false, or a signal raises an exception."""
        try:
            while alive():
                try:
                    function, future = self._work.get(timeout=POLL_S)
                except queue.Empty:
                    continue
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)
                except BaseException:
                    future.set_exception(MesocosmError("the program is ending"))
                    raise
        finally:
            self._closed = True
            while not self._work.empty():
                self._work.get()[1].set_exception(MesocosmError("the program is ending"))
