"""Batches of rows, read anywhere, joined in order into episodes.

Two passes over the same batches: the first finds what is wrong and what the values are, the second
encodes. Both join alike, so that they agree on what an episode is; what they hold is one open
episode, and the name of each episode that was.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mesocosm.config import RayConfig
from mesocosm.data.format.spaces import SpaceCodec
from mesocosm.data.ingest.edges import Edge, Key, Run, Summary, begins, follow
from mesocosm.data.ingest.inference import Stat
from mesocosm.data.ingest.layout import RowError
from mesocosm.data.ingest.readers import Piece, read
from mesocosm.data.ingest.rows import OUTSIDE, Block, Layout
from mesocosm.data.ingest.schema import Schema
from mesocosm.errors import UsageError

Array = NDArray[Any]


@dataclass(frozen=True)
class Work:
    """What is done with a piece, anywhere."""

    schema: Schema
    per_file: bool
    codecs: tuple[SpaceCodec, SpaceCodec] | None = None
    """None: only looked at"""

    def __call__(self, piece: Piece) -> Iterator[Batch | Failure]:
        done, skip = 0, piece.skip

        def name(key: Key) -> Key:
            return f"{key} of file {piece.source + 1}" if self.per_file else key

        try:
            for table in read(piece, self.schema.columns()):
                table, skip = table.slice(skip), max(skip - table.num_rows, 0)
                if not table.num_rows:
                    continue
                table = self.schema.ours(table)
                if self.schema.whole_file:
                    table = table.append_column(
                        "episode", pa.array(np.zeros(table.num_rows, np.int64))
                    )
                try:
                    block = Block(table, self.schema.layout, name)
                except RowError as error:
                    raise RowError(done + error.row, error.text) from error
                arrays = None if self.codecs is None else block.encode(self.codecs)
                yield Batch(
                    piece.source,
                    (piece.number, piece.skip + done),
                    block.summary(),
                    block.known(),
                    arrays,
                )
                done += table.num_rows
        except RowError as error:
            yield Failure(piece.source, done, error.row, error.text)
        except UsageError as error:
            yield Failure(piece.source, done, None, str(error))


@dataclass
class Batch:
    source: int
    at: tuple[int, int]
    """(number of its piece, row in it where it begins)"""
    summary: Summary
    known: list[dict[str, Any]]
    """Of each run: behaviour, task, seed, success"""
    arrays: dict[str, Array] | None


@dataclass
class Failure:
    """What is wrong with a whole file, found at a row of a piece."""

    source: int
    done: int
    row: int | None
    text: str


def stream(
    work: Work, pieces: Sequence[Piece], workers: int, ray_config: RayConfig
) -> Iterator[Batch | Failure]:
    """The batches of all pieces, in order, whoever reads them: this process (`workers` 0), or so
    many tasks of Ray Data at a time, which run no further ahead than its memory allows.
    """
    if not workers:
        for piece in pieces:
            yield from work(piece)
        return
    import logging

    import ray
    import ray.data  # sets up its own logging, so it comes before the level

    from mesocosm.cluster import ray_session

    ray_session.ensure(ray_config)
    ray_session.preflight(cpus=workers, what=f"workers={workers}")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1 << 25
    shared = ray.put((work, list(pieces)))

    def run(rows: dict[str, Array]) -> Iterator[dict[str, Array]]:
        done, every = ray.get(shared)
        for number in rows["id"]:
            for result in done(every[number]):
                yield {"result": _bytes(pickle.dumps(result, protocol=5))}

    with ray.data.DataContext.current(context):
        data = ray.data.range(len(pieces), override_num_blocks=len(pieces))
        results = data.map_batches(
            run,
            batch_size=1,
            batch_format="numpy",
            compute=ray.data.TaskPoolStrategy(size=min(workers, len(pieces))),
        )
        for row in results.iter_rows():
            yield pickle.loads(
                row["result"]
            )  # of `run` above, in this very job: nothing that was read from a file


def _bytes(data: bytes) -> Array:
    out = np.empty(1, object)
    out[0] = data
    return out


# -- joining
# -----------------------------------------------------------------------------------------------------------


@dataclass
class Closed:
    """An episode, all of whose rows were seen."""

    key: Key
    number: int
    """How many came before"""
    rows: int
    length: int
    """Transitions"""
    outcome: str
    known: dict[str, Any]
    problem: tuple[str, str] | None
    """(reason, the sentence with file and row)"""
    led_nowhere: bool
    """Its last row has an action and nothing says what that led to"""
    first: tuple[Any, ...]
    """Its first observation"""
    acted_in: tuple[Any, ...] | None = None
    """The observation of its last action"""
    led_to: tuple[Any, ...] | None = None
    """What its last action led to, where the logs say it"""
    rewarded: bool = False
    """A reward other than 0 comes before its last action"""
    last_rewarded: bool = False
    parts: list[dict[str, Array]] = field(default_factory=list)


@dataclass
class Tally:
    """What was found, for counts and spaces."""

    stats: dict[str, Stat] = field(default_factory=dict)
    rows: Counter[int] = field(default_factory=Counter)
    """By source"""
    episodes: int = 0
    transitions: int = 0
    longest: int = 0
    """Transitions of an episode"""
    outcomes: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    """Episodes, by reason"""
    left_out_rows: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """The first of each reason, with file and row"""
    last_actions: int = 0
    """Left out, for they led nowhere"""
    empty: int = 0
    behaviours: Counter[str] = field(default_factory=Counter)
    rewarded: int = 0
    """Episodes with a reward other than 0"""
    led: int = 0
    """Episodes of which the logs say what the last action led to"""
    repeated: int = 0
    """Of these, those in which it is the observation that came before the action"""
    pairs: int = 0
    """Of these, those that another episode follows"""
    restarted: int = 0
    """Of these, those in which it is the first observation of the episode that follows"""
    succeeded: int = 0
    """Episodes that are terminated and succeeded"""
    done: int = 0
    """Episodes that end as terminated and without success"""
    done_rows: tuple[int, int] = (0, 0)
    """The fewest and the most rows of them"""

    def count_end(
        self, episode: Closed, terminated: bool, previous: tuple[Any, ...] | None
    ) -> None:
        """Count how an episode ends. `previous`: what the last action of the episode before it led
        to.
        """
        self.rewarded += episode.rewarded or (episode.last_rewarded and not episode.led_nowhere)
        if episode.led_to is not None and episode.acted_in is not None:
            self.led += 1
            self.repeated += episode.led_to == episode.acted_in
        if previous is not None:
            self.pairs += 1
            self.restarted += previous == episode.first
        self.succeeded += (
            episode.length > 0
            and episode.outcome == "terminated"
            and bool(episode.known["success"])
        )
        if terminated and not episode.known["success"]:
            fewest, most = self.done_rows if self.done else (episode.rows, episode.rows)
            self.done_rows = min(fewest, episode.rows), max(most, episode.rows)
            self.done += 1


class Joiner:
    """Takes the batches in order, gives each episode when it is over.

    Raises UsageError, naming file and row, at the first thing that is wrong; with `drop`, only
    where it is wrong with a file as a whole. A value outside its space always drops its episode:
    `reality.bounds` says what else is to be done with it.
    """

    def __init__(
        self,
        names: Sequence[str],
        layout: Layout,
        drop: bool,
        before: Sequence[Key] = (),
        number: int = 0,
    ):
        """`before`: the names of the episodes that another joiner had, and `number` how many those
        were.
        """
        self._names, self._layout, self._drop = names, layout, drop
        self.seen: dict[Key, None] = dict.fromkeys(before)
        """Names of all episodes that have begun, in that order"""
        self.next = (0, 0)
        """(number of a piece, row in it): where the row after the last closed episode stands"""
        self._open: Closed | None = None
        self._last: Edge | None = None
        self._final, self._outcome = False, "unfinished"
        self._previous: tuple[Any, ...] | None = None
        """What the last action of the last closed episode led to"""
        self._counted: Counter[int] = Counter()
        self._at: tuple[int, int | None] | None = None
        self.number = number
        """How many episodes have begun"""
        self.tally = Tally()

    def add(self, batch: Batch | Failure) -> Iterator[Closed]:
        if isinstance(batch, Failure):
            self._fail(batch)
            return
        summary, source = batch.summary, batch.source
        offset = self._counted[source]
        for name, stat in summary.stats.items():
            self.tally.stats[name] = self.tally.stats.get(name, Stat()).merged(stat)
        for run, known in zip(summary.runs, batch.known, strict=True):
            problem = (
                None
                if run.problem is None
                else (
                    run.problem.reason,
                    (
                        f"{self._names[source]!r} row {offset + run.problem.row + 1}:"
                        f" {run.problem.text}"
                    ),
                )
            )
            goes_on = self._open is not None and self._open.key == run.key
            if goes_on:
                problem = self._joined(summary, source, offset) or problem
                if (
                    self._layout.marks_success
                    and self._open is not None
                    and known["success"] is not None
                ):
                    self._open.known["success"] = bool(
                        self._open.known["success"] or known["success"]
                    )
            else:
                self.next = batch.at[0], batch.at[1] + run.start
                yield from self.close()
                problem = self._begun(run, summary, source, offset) or problem
                self._open = Closed(
                    run.key, self.number, 0, 0, "unfinished", known, None, False, run.first
                )
                self.number += 1
            self._extend(run, batch, problem)
        if summary.rows:
            self._last = summary.last
            self._at = (source, offset + summary.rows)
        self._counted[source] += summary.rows
        self.tally.rows[source] += summary.rows

    def _fail(self, failure: Failure) -> None:
        name = self._names[failure.source]
        if failure.row is None:
            raise UsageError(failure.text)
        raise UsageError(
            f"{name!r} row {self._counted[failure.source] - failure.done + failure.row + 1}:"
            f" {failure.text}"
        )

    def _joined(self, summary: Summary, source: int, offset: int) -> tuple[str, str] | None:
        """The first row of a batch that goes on with the open episode."""
        assert self._last is not None and summary.first is not None and self._at is not None
        found = follow(self._last, summary.first)
        if found is None:
            return None
        theirs, reason, text = found
        where = (source, offset + 1) if theirs else self._at
        return reason, f"{self._names[where[0]]!r} row {where[1]}: {text}"

    def _begun(
        self, run: Run, summary: Summary, source: int, offset: int
    ) -> tuple[str, str] | None:
        where = f"{self._names[source]!r} row {offset + run.start + 1}: "
        if run.key in self.seen:
            fix = (
                "the rows of an episode must follow each other; sort them by episode and step, or"
                " where files number their own episodes say per_file=true"
            )
            return (
                "episode comes again",
                f"{where}episode {run.key!r} comes again after another one; {fix}",
            )
        self.seen[run.key] = None
        if (
            run.start == 0
            and summary.first is not None
            and (found := begins(run.key, summary.first.step, self._layout.first_step)) is not None
        ):
            return found[0], where + found[1]
        return None

    def _extend(self, run: Run, batch: Batch, problem: tuple[str, str] | None) -> None:
        episode = self._open
        assert episode is not None
        if problem is not None and not self._drop and problem[0] != OUTSIDE:
            raise UsageError(problem[1])
        episode.problem = episode.problem or problem
        episode.rows += run.rows
        episode.led_to = run.led_to
        if run.acted_in is not None:
            episode.acted_in = run.acted_in
            episode.rewarded |= episode.last_rewarded or run.rewarded
            episode.last_rewarded = run.last_rewarded
        if not (
            run.final and run.rows == 1
        ):  # a final observation alone says nothing of how the episode ended
            self._outcome = run.outcome
        self._final = run.final
        if episode.problem is not None:
            episode.parts.clear()
        elif batch.arrays is not None:
            episode.parts.append(
                {
                    name: array[run.start : run.start + run.rows]
                    for name, array in batch.arrays.items()
                }
            )

    def close(self) -> Iterator[Closed]:
        """The episode that is open, now that no row of it can follow."""
        episode, self._open = self._open, None
        if episode is None:
            return
        episode.led_nowhere = not self._final and not self._layout.following
        episode.length = episode.rows - 1 if self._final or episode.led_nowhere else episode.rows
        episode.outcome = "unfinished" if episode.led_nowhere else self._outcome
        terminated, previous = self._outcome == "terminated", self._previous
        self._outcome, self._final, self._previous = "unfinished", False, None
        tally = self.tally
        if episode.problem is not None:
            tally.left_out[episode.problem[0]] += 1
            tally.left_out_rows[episode.problem[0]] += episode.rows
            tally.examples.setdefault(*episode.problem)
            return
        self._previous = episode.led_to
        tally.count_end(episode, terminated, previous)
        tally.last_actions += episode.led_nowhere
        if episode.length:
            tally.episodes += 1
            tally.transitions += episode.length
            tally.longest = max(tally.longest, episode.length)
            tally.outcomes[episode.outcome] += 1
            tally.behaviours[episode.known["behaviour"]] += 1
        else:
            tally.empty += 1
        yield episode
