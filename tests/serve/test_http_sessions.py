"""Limits of the sessions on the HTTP server: which are evicted, and when the server is full."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from mesocosm.serve.http_sessions import Pool, PoolFull


class Value:
    def __init__(self, key: str, closed: list[str]):
        self.key, self.closed = key, closed

    def close(self) -> None:
        self.closed.append(self.key)


def pool_of_two(idle_s: float) -> tuple[Pool[Any], list[str]]:
    """A pool with the slots a and b, and the keys of the values that it closes."""
    pool: Pool[Any] = Pool(2, 10, idle_s)
    closed: list[str] = []
    for key in ("a", "b"):
        pool.put(key).value = Value(key, closed)
    return pool, closed


def test_in_use_stays() -> None:
    """If all are in use, a new one is refused, by count and by weight, and nothing changes."""
    pool, closed = pool_of_two(300.0)
    message = r"2 of 2 sessions with 2 of 10 environments are in use; .* or try again in 300 s"
    with pytest.raises(PoolFull, match=message):
        pool.put("c")
    pool.count = 3
    with pytest.raises(PoolFull):
        pool.put("c", 9)
    assert pool.put("c", 8).value is None
    assert not closed and all(pool.get(key) is not None for key in "abc")


def test_unused_is_evicted() -> None:
    """The least recently used is evicted, and no more than the new one needs."""
    pool, closed = pool_of_two(0.05)
    time.sleep(0.1)
    pool.get("a")
    pool.put("c")
    assert closed == ["b"] and pool.get("b") is None


def test_ended_makes_room() -> None:
    pool, closed = pool_of_two(300.0)
    assert pool.pop("a") and not pool.pop("a")
    pool.put("c")
    assert closed == ["a"]


def test_a_hundred_at_once() -> None:
    """Of 100 threads at once, as many as there is room for get a slot."""
    pool: Pool[Any] = Pool(64, 1000, 300.0)
    refused: list[int] = []
    start = threading.Barrier(100)

    def ask(number: int) -> None:
        start.wait()
        try:
            pool.put(str(number))
        except PoolFull:
            refused.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 36
    assert [number for number in range(100) if pool.get(str(number)) is None] == sorted(refused)
