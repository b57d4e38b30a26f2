"""Neighbouring rows of an episode: what each must fit of the other, and what a batch says of its
episodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mesocosm.data.ingest.inference import Stat

Key = int | str
"""The name of an episode."""


@dataclass(frozen=True)
class Problem:
    row: int
    """Within the batch"""
    reason: str
    """One of a few, for counts"""
    text: str


@dataclass(frozen=True)
class Edge:
    """A row, as its neighbours see it."""

    key: Key
    step: int | None
    """None where the row does not say its step"""
    final: bool
    """It has an observation and no action: what the last action of its episode led to"""
    ended: bool
    """terminated or truncated"""
    constant: tuple[Any, ...]
    """behaviour, task, seed, success"""
    observation: tuple[Any, ...] | None
    """None where something is wrong with the row: then it is not compared"""
    following: tuple[Any, ...] | None
    timed: bool | None
    """It has a duration; None where it has no action or the table has no durations"""


@dataclass
class Run:
    """Rows of one episode that follow each other in a batch."""

    key: Key
    start: int
    rows: int
    problem: Problem | None
    final: bool
    outcome: str
    """Of its last row that has an action"""
    first: tuple[Any, ...]
    """The observation of its first row"""
    acted_in: tuple[Any, ...] | None
    """The observation of its last row with an action; None where it has no such row"""
    led_to: tuple[Any, ...] | None
    """What that action led to, or the observation of a last row without an action; None where
    nothing says it
    """
    rewarded: bool
    """A reward other than 0 comes before its last action"""
    last_rewarded: bool
    """Its last action has a reward other than 0"""


@dataclass
class Summary:
    rows: int
    runs: list[Run]
    first: Edge | None
    last: Edge | None
    stats: dict[str, Stat]
    """By leaf, of the rows without a problem"""


CONSTANT = ("behaviour", "task", "seed", "success")


def follow(a: Edge, b: Edge) -> tuple[bool, str, str] | None:
    """What is wrong with row `b` right after row `a` of the same episode: (it is b's fault, reason,
    text).
    """
    if a.step is None or b.step is None:
        return None
    if b.step == a.step:
        return True, "duplicate step", f"step {b.step} of episode {b.key!r} comes twice"
    if b.step < a.step:
        return (
            True,
            "steps out of order",
            (
                f"step {b.step} of episode {b.key!r} comes after its step {a.step}; sort the rows"
                " by episode and step"
            ),
        )
    if b.step > a.step + 1:
        return (
            True,
            "gap in steps",
            f"episode {b.key!r} goes from step {a.step} to step {b.step}; give every step",
        )
    if a.final:
        return (
            False,
            "missing value",
            (
                f"action is missing at step {a.step} of episode {a.key!r}, which goes on; only its"
                " last row may have none"
            ),
        )
    if a.ended and not b.final:
        return (
            True,
            "rows after the end",
            (
                f"episode {b.key!r} has ended at step {a.step} (terminated or truncated) and goes"
                " on; begin a new episode"
            ),
        )
    for name, before, after in zip(CONSTANT, a.constant, b.constant, strict=True):
        if before != after:
            return (
                True,
                f"{name} changes",
                (
                    f"{name} of episode {b.key!r} changes from {before!r} to {after!r} at step"
                    f" {b.step}; it must be constant"
                ),
            )
    if a.timed is not None and b.timed is not None and a.timed != b.timed:
        step = a.step if b.timed else b.step
        text = (
            f"duration is missing at step {step} of episode {b.key!r}; give it at every step of an"
            " episode or at none"
        )
        return not b.timed, "missing value", text
    if a.following is not None and b.observation is not None and a.following != b.observation:
        if a.following == a.observation:
            text = (
                f"next_observation at step {a.step} of episode {a.key!r} repeats the observation of"
                f" that step, and is not the observation of step {b.step}; log what the action led"
                " to, or leave next_observation out"
            )
            return False, "next_observation contradicts", text
        said = (
            f"next_observation at step {a.step} of episode {a.key!r} is not the observation of step"
            f" {b.step}; correct one of them"
        )
        return False, "next_observation contradicts", said
    return None


def begins(key: Key, step: int | None, first_step: int) -> tuple[str, str] | None:
    """What is wrong with a row as the first of an episode: (reason, text)."""
    if isinstance(key, int) and key < 0:
        return (
            "negative episode",
            f"episode {key} is negative; number episodes from 0, or name them by strings",
        )
    if step is not None and step != first_step:
        return (
            "start is missing",
            (
                f"episode {key!r} begins at step {step} where {first_step} was expected; give every"
                " step, sorted by episode and step"
            ),
        )
    return None
