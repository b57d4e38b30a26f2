"""Room for sessions on the HTTP server: who goes, and when the server is full."""

from __future__ import annotations

import threading
import time

import pytest

from mesocosm.serve.http_sessions import Kept, NoRoom


def held(count: int, weight: int, idle_s: float, closed: list[str]) -> Kept[str]:
    kept: Kept[str] = Kept(count, weight, closed.append, idle_s)
    for key in ("a", "b"):
        kept.put(key).value = key
    return kept


def test_in_use_stays() -> None:
    """Where all are in use the new one is refused, by count and by weight, and nothing changes."""
    closed: list[str] = []
    kept = held(2, 10, 300.0, closed)
    sentence = r"2 of 2 sessions with 2 of 10 environments are in use; .* or try again in 300 s"
    with pytest.raises(NoRoom, match=sentence):
        kept.put("c")
    kept.count = 3
    with pytest.raises(NoRoom):
        kept.put("c", 9)
    assert kept.put("c", 8).value is None
    assert not closed and all(kept.get(key) is not None for key in "abc")


def test_unused_makes_room() -> None:
    """The least recently used goes, and no more of them than the new one needs."""
    closed: list[str] = []
    kept = held(2, 10, 0.05, closed)
    time.sleep(0.1)
    kept.get("a")
    kept.put("c")
    assert closed == ["b"] and kept.get("b") is None


def test_ended_makes_room() -> None:
    closed: list[str] = []
    kept = held(2, 10, 300.0, closed)
    assert kept.pop("a") and not kept.pop("a")
    kept.put("c")
    assert closed == ["a"]


def test_a_hundred_at_once() -> None:
    """Of 100 threads that ask at once, as many as there is room for get it."""
    kept: Kept[str] = Kept(64, 1000, lambda _: None, 300.0)
    refused: list[int] = []
    start = threading.Barrier(100)

    def ask(number: int) -> None:
        start.wait()
        try:
            kept.put(str(number))
        except NoRoom:
            refused.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(100)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(refused) == 36
    assert [number for number in range(100) if kept.get(str(number)) is None] == sorted(refused)
