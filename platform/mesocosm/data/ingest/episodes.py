"""Batches of rows, read in any process, joined in order into episodes.

An import makes two passes over the same batches: the first checks and counts, the second encodes.
Both join rows in the same way, so they agree on what an episode is. They hold one open episode, and
the name of every episode.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from mesocosm.data.ingest.frames import FrameDecoder
from mesocosm.data.ingest.readers import LogPiece
from mesocosm.data.ingest.report import ImportTally
from mesocosm.data.ingest.rows import OUTSIDE, Batch, Codecs, Key, Problem, Rows, begins, read_batch
from mesocosm.data.ingest.schema import Schema
from mesocosm.data.ingest.sources import read
from mesocosm.data.ingest.values import Array, RowError, Stat
from mesocosm.errors import UsageError

CONSTANT = ("behaviour", "task", "seed", "success")


@dataclass(frozen=True)
class Fault:
    """A fault of a whole file, found while a piece was read."""

    source: int
    row: int | None
    """Its position after the last batch of the file. None if the message names the file."""
    text: str


def read_batches(
    piece: LogPiece, schema: Schema, codecs: Codecs | None = None
) -> Iterator[Batch | Fault]:
    """The batches of a piece of a file, in any process, up to a fault of the file.

    Args:
        codecs: None checks the values and does not encode them.
    """
    skip, begin = piece.skip, 0
    decoder = FrameDecoder()
    try:
        for table in read(piece, list(schema.renames)):
            skipped = min(skip, table.num_rows)
            skip, begin, table = skip - skipped, begin + skipped, table.slice(skipped)
            if not table.num_rows:
                continue
            try:
                yield read_batch(schema.select(table), schema, codecs, piece, begin, decoder)
            except RowError as error:
                raise RowError(begin + error.row, error.text) from error
            begin += table.num_rows
    except RowError as error:
        yield Fault(piece.source, error.row - begin, error.text)
    except UsageError as error:
        yield Fault(piece.source, None, str(error))
    finally:
        decoder.close()


@dataclass
class LoggedEpisode:
    """An episode without a fault, all of whose rows were read."""

    key: Key
    number: int
    """The number of episodes before it, with those that were left out."""
    rows: Rows
    length: int
    """Transitions."""
    outcome: str
    success: bool | None


@dataclass
class Joiner:
    """Takes the batches in order, and gives each episode when it is complete.

    Raises UsageError at the first fault, naming file and row; with `drop`, only at a fault of a
    whole file. A value outside its space always drops its episode: `reality.bounds` decides.
    """

    names: Sequence[str]
    """The names of the files."""
    schema: Schema
    drop: bool
    left_out: frozenset[int] = frozenset()
    """The numbers of the episodes that the first pass left out: the second does not decode."""
    seen: dict[Key, None] = field(default_factory=dict)
    """The names of all episodes that have begun, in that order."""
    number: int = 0
    """The number of episodes that have begun."""
    next: tuple[int, int] = (0, 0)
    """(number of the piece, row in it) that the open episode begins at."""
    tally: ImportTally = field(default_factory=ImportTally)
    _key: Key = 0
    """The open episode."""
    _parts: list[Rows] = field(default_factory=list)
    """Its rows. Only the last ones if it is faulty."""
    _rows: int = 0
    _problem: Problem | None = None
    _led_to: list[Array] | None = None
    """The observation that the last action of the episode before led to, if the logs tell."""
    _last_place: str = ""

    def add(self, batch: Batch | Fault) -> Iterator[LoggedEpisode]:
        """The episodes that end in a batch."""
        file, before = self.names[batch.source], self.tally.rows[batch.source]
        if isinstance(batch, Fault):
            at = "" if batch.row is None else f"{file!r} row {before + batch.row + 1}: "
            raise UsageError(f"{at}{batch.text}")
        for name, stat in batch.stats.items():
            self.tally.stats[name] = self.tally.stats.get(name, Stat()).merged(stat)
        rows, keys = batch.rows, batch.rows["key"]
        self.tally.rows[batch.source] += len(keys)
        goes_on = bool(self._parts) and self._key == keys[0]
        problems, block = dict(batch.problems), rows
        if goes_on:  # the row before the batch is row -1
            block = _join([_cut(self._parts[-1], -1, None), rows])
        for row, problem in _neighbour_faults(block, self.schema.marks_success):
            problems.setdefault(row - goes_on, problem)
        starts = np.flatnonzero(begins(keys)).tolist()
        first: dict[int, Problem] = {}
        for row in sorted(problems):
            reason, text = problems[row]
            at = f"{file!r} row {before + row + 1}" if row >= 0 else self._last_place
            first.setdefault(max(bisect_right(starts, row) - 1, 0), (reason, f"{at}: {text}"))
        for run, (start, end) in enumerate(itertools.pairwise([*starts, len(keys)])):
            fault = first.get(run)
            if start or not goes_on:
                self.next = batch.piece, batch.begin + start
                yield from self.close()
                at = f"{file!r} row {before + start + 1}"
                step = None if rows["unnumbered"][start] else int(rows["step"][start])
                fault = self._begin(keys[start], step, at) or fault
            if fault is not None and not self.drop and fault[0] != OUTSIDE:
                raise UsageError(fault[1])
            self._problem = self._problem or fault
            self._parts.append(_cut(rows, start, end))
            if self._problem is not None:
                del self._parts[:-1]
            self._rows += end - start
        self._last_place = f"{file!r} row {before + len(keys)}"

    def _begin(self, key: Key, step: int | None, at: str) -> Problem | None:
        """Open an episode at its first row. Returns the fault of that row."""
        again, first_step = key in self.seen, self.schema.first_step
        self.seen[key] = None
        self._key, self._rows, self._problem = key, 0, None
        self.number += 1
        if again:
            return "episode comes again", (
                f"{at}: episode {key!r} comes again after another one; sort the rows by episode and"
                " step, or set per_file=true where each file numbers its own episodes"
            )
        if isinstance(key, int) and key < 0:
            return "negative episode", (
                f"{at}: episode {key} is negative; number episodes from 0, or name them by strings"
            )
        if step is not None and step != first_step:
            return "start is missing", (
                f"{at}: episode {key!r} begins at step {step}, expected {first_step}; give every"
                " step, sorted by episode and step"
            )
        return None

    def close(self) -> Iterator[LoggedEpisode]:
        """The open episode, once no row of it can follow."""
        parts, self._parts = self._parts, []
        tally, before, self._led_to = self.tally, self._led_to, None
        if not parts:
            return
        if self._problem is not None:
            reason, text = self._problem
            tally.left_out[reason] += 1
            tally.left_out_rows[reason] += self._rows
            tally.left_out_numbers.add(self.number - 1)
            tally.examples.setdefault(reason, text)
            return
        if self.number - 1 in self.left_out:
            return
        rows, count = _join(parts), self._rows
        final = bool(rows["final"][-1])
        last = count - 1 - final
        led_nowhere = not final and not self.schema.next_observation
        length = count - (final or led_nowhere)
        terminated, truncated = bool(rows["terminated"][last]), bool(rows["truncated"][last])
        outcome = "terminated" if terminated else "truncated" if truncated else "unfinished"
        success = rows["success"][0]
        if self.schema.marks_success:
            marks = [bool(mark) for mark in rows["success"] if mark is not None]
            success = any(marks) if marks else None

        tally.rewarded += bool((rows["reward"][:length] != 0).any())
        if not led_nowhere:
            self._led_to = _observation(rows, count - 1, "obs" if final else "next")
        if self._led_to is not None and last >= 0:
            tally.led += 1
            tally.repeated += _equal(self._led_to, _observation(rows, last))
        if before is not None:
            tally.pairs += 1
            tally.restarted += _equal(before, _observation(rows, 0))
        if terminated and not success:
            fewest, most = tally.done_rows if tally.done else (count, count)
            tally.done_rows = min(fewest, count), max(most, count)
            tally.done += 1
        if led_nowhere:
            outcome = "unfinished"
            tally.last_actions += 1
        if length:
            tally.episodes += 1
            tally.transitions += length
            tally.longest = max(tally.longest, length)
            tally.outcomes[outcome] += 1
            tally.behaviours[rows["behaviour"][0]] += 1
            tally.succeeded += outcome == "terminated" and bool(success)
        else:
            tally.empty += 1
        yield LoggedEpisode(self._key, self.number - 1, rows, length, outcome, success)


def _cut(rows: Rows, start: int, end: int | None) -> Rows:
    return {name: array[start:end] for name, array in rows.items()}


def _join(parts: Sequence[Rows]) -> Rows:
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _observation(rows: Rows, row: int, part: str = "obs") -> list[Array]:
    return [array[row] for name, array in rows.items() if name.startswith(f"{part}_")]


def _equal(a: Sequence[Array], b: Sequence[Array]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def _differ(a: Array, b: Array) -> Array:
    return (a != b).reshape(len(a), math.prod(a.shape[1:])).any(1)


def _neighbour_faults(rows: Rows, marks_success: bool) -> list[tuple[int, Problem]]:
    """The first fault between each row `a` and the row `b` after it: (row to blame, problem)."""
    a, b = _cut(rows, 0, -1), _cut(rows, 1, None)
    faults: list[tuple[int, Problem]] = []
    unchecked = (a["key"] == b["key"]) & ~a["unnumbered"] & ~b["unnumbered"]

    def check(mask: Array, blamed: int, reason: str, text: str) -> None:
        """Blame row a (`blamed` is 0) or row b (1) where `mask` is true."""
        for i in np.flatnonzero(mask & unchecked).tolist():
            old, new = ({name: side[name][i] for name in CONSTANT} for side in (a, b))
            steps = {"a": a["step"][i], "b": b["step"][i]}
            message = text.format(**steps, k=a["key"][i], old=old, new=new)
            faults.append((i + blamed, (reason, message)))
        np.logical_and(unchecked, ~mask, out=unchecked)

    step = b["step"] - a["step"]
    check(step == 0, 1, "duplicate step", "step {b} of episode {k!r} comes twice")
    text = "step {b} of episode {k!r} comes after its step {a}; sort the rows by episode and step"
    check(step < 0, 1, "steps out of order", text)
    text = "episode {k!r} goes from step {a} to step {b}; give every step"
    check(step > 1, 1, "gap in steps", text)
    text = "action is missing at step {a} of episode {k!r}, which continues; give every action but"
    check(a["final"], 0, "missing value", f"{text} that of the last row")
    text = "episode {k!r} has ended at step {a} (terminated or truncated) but continues; begin a"
    ended = a["terminated"] | a["truncated"]
    check(ended & ~b["final"], 1, "rows after the end", f"{text} new episode")
    for name in CONSTANT:
        if name != "success" or not marks_success:
            text = f"from {{old[{name}]!r}} to {{new[{name}]!r}} at step {{b}}; it must be constant"
            text = f"{name} of episode {{k!r}} changes {text}"
            check(a[name] != b[name], 1, f"{name} changes", text)
    right = ~(a["wrong"] | b["wrong"])
    acted = right & ~a["final"] & ~b["final"]
    timed_a, timed_b = ~np.isnan(a["duration"]), ~np.isnan(b["duration"])
    text = "of episode {k!r}; give it at every step of an episode or at none"
    for mask, blamed, at in ((~timed_a & timed_b, 0, "{a}"), (timed_a & ~timed_b, 1, "{b}")):
        check(acted & mask, blamed, "missing value", f"duration is missing at step {at} {text}")
    contradicts, moves = np.zeros((2, len(step)), bool)
    # The first pass has compared frames.
    for name in [n for n in rows if n.startswith("next_") and not n.startswith("next_image")]:
        observation = name.replace("next", "obs", 1)
        contradicts |= _differ(a[name], b[observation])
        moves |= _differ(a[name], a[observation])
    contradicts &= right & ~a["final"]
    at, reason = "next_observation at step {a} of episode {k!r}", "next_observation contradicts"
    text = (
        f"{at} repeats the observation of that step, and is not the observation of step {{b}}; log"
        " what the action led to, or leave next_observation out"
    )
    check(contradicts & ~moves, 0, reason, text)
    text = f"{at} is not the observation of step {{b}}; correct one of them"
    check(contradicts, 0, reason, text)
    return faults
