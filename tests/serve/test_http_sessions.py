"""Limits of the sessions on the HTTP server: which are evicted, and when the server is full."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

import pytest

from mesocosm.serve.http_sessions import Pool, PoolFull


@dataclass
class Value:
    key: str
    closed: list[str] = field(default_factory=list)

    def close(self) -> None:
        self.closed.append(self.key)


def pool_of_two(idle_s: float, closed: list[str]) -> Pool[Value]:
    pool: Pool[Value] = Pool(2, 10, idle_s)
    for key in ("a", "b"):
        pool.put(key).value = Value(key, closed)
    return pool


def test_in_use_stays() -> None:
    """If all are in use, a new one is refused, by count and by weight, and nothing changes."""
    closed: list[str] = []
    pool = pool_of_two(300.0, closed)
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
    closed: list[str] = []
    pool = pool_of_two(0.05, closed)
    time.sleep(0.1)
    pool.get("a")
    pool.put("c")
    assert closed == ["b"] and pool.get("b") is None


def test_ended_makes_room() -> None:
    closed: list[str] = []
    pool = pool_of_two(300.0, closed)
    assert pool.pop("a") and not pool.pop("a")
    pool.put("c")
    assert closed == ["a"]


def test_a_hundred_at_once() -> None:
    """Of 100 threads at once, as many as there is room for get a slot."""
    pool: Pool[Value] = Pool(64, 1000, 300.0)
    refused: list[int] = []
    start = threading.Barrier(100)

    def ask(number: int) -> None:
        start.wait()
        try:
            pool.put(str(number))
        except PoolFull:
            refused.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(100)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(refused) == 36
    assert [number for number in range(100) if pool.get(str(number)) is None] == sorted(refused)
