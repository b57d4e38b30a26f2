"""A batch of rows of the documented schema, checked: each row by itself, and against the row before
it.

What is wrong with a row is a `Problem`, kept with the run of rows of its episode; nothing here
raises because of a value. A batch says of its first and last row what the next and the former batch
must fit (`Edge`), so that batches may be read in any process and joined in order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.types as is_
from gymnasium import spaces
from numpy.typing import NDArray

from mesocosm.data.format.bounds import FIX, outside
from mesocosm.data.format.spaces import EXACT, FLOAT32, SpaceCodec, first_beyond_float32
from mesocosm.data.ingest.edges import CONSTANT, Edge, Key, Problem, Run, Summary, begins, follow
from mesocosm.data.ingest.inference import Stat
from mesocosm.data.ingest.layout import Leaf, Values, take
from mesocosm.data.ingest.readers import PROBLEM
from mesocosm.data.ingest.scalars import optional, read_keys, read_steps, scalar, texts

Array = NDArray[Any]

REQUIRED = ("episode", "step", "observation", "action", "reward", "terminated", "truncated")
OPTIONAL = ("next_observation", "duration", "behaviour", "task", "seed", "success")
UNKNOWN_SEED = -1
"""`Episode.seed` where the table has no seed."""
IMPORTED = "imported"
"""Who acted, where the table does not say."""
FLOATS = "and a world computes in float32; rescale it"
OUTSIDE = "outside the space"
"""The reason that `reality.bounds` decides about."""


@dataclass(frozen=True)
class Layout:
    """Where in the table everything is."""

    observation: list[Leaf]
    action: list[Leaf]
    following: list[Leaf]
    """The leaves of next_observation, one for one those of `observation`; empty where the table has
    none
    """
    task: list[Leaf]
    present: frozenset[str]
    """Those of OPTIONAL that are there"""
    named: bool
    """Episodes are named by strings"""
    first_step: int
    """0 or 1: what the first episode begins at"""
    bounds: str = "drop"
    """`reality.bounds`"""
    marks_success: bool = False
    """Success is a flag of each step: an episode succeeds where any of its steps does"""


class Block:
    """One batch of rows as arrays, with what is wrong with each row. Raises UsageError where a
    column has no episode or step.
    """

    def __init__(
        self, table: pa.Table, layout: Layout, name: Callable[[Key], Key] = lambda key: key
    ):
        self.layout, self.rows = layout, table.num_rows
        self._bad: dict[int, tuple[str, Callable[[int], str]]] = {}
        self._wrong = np.zeros(self.rows, bool)
        keys, unnamed = read_keys(table, layout.named)
        self.keys = [name(key) for key in keys]
        self.steps, self.unnumbered = read_steps(table)
        self._mark_unusable(table, unnamed)
        self.observation = [self._leaf(table, leaf) for leaf in layout.observation]
        actions = [take(table, leaf) for leaf in layout.action]
        self.final = np.all([a.missing for a in actions], 0)
        acted = ~self.final
        self.action = [
            self._checked(leaf, values, acted)
            for leaf, values in zip(layout.action, actions, strict=True)
        ]
        self.reward = self._number(table, "reward", acted)
        self.duration, self.timed = self._durations(table, acted)
        self.terminated, self.truncated = (
            self._flag(table, "terminated", acted),
            self._flag(table, "truncated", acted),
        )
        self.following: list[Array] | None = None
        if layout.following:
            following = [take(table, leaf) for leaf in layout.following]
            self.following = [
                self._checked(leaf, values, acted)
                for leaf, values in zip(layout.following, following, strict=True)
            ]
        self.behaviours = texts(table, "behaviour", IMPORTED)
        self.tasks = self._options(table)
        self.seeds = [UNKNOWN_SEED if s is None else int(s) for s in optional(table, "seed", int)]
        self.successes = [None if s is None else bool(s) for s in optional(table, "success", int)]
        self._pairs()

    def _durations(self, table: pa.Table, acted: Array) -> tuple[Array | None, Array]:
        """(seconds, NaN where a row has none; which rows have one). An episode has one at every
        step or at none, which `follow` checks.
        """
        if "duration" not in self.layout.present:
            return None, np.zeros(self.rows, bool)
        timed = (
            acted & table.column("duration").is_valid().to_numpy()
            if "duration" in table.column_names
            else np.zeros(self.rows, bool)
        )
        seconds = self._number(table, "duration", timed)
        self._mark(
            timed & (seconds < 0),
            "wrong value",
            lambda row: (
                f"duration is {seconds[row]:g} {self._at(row)}, which is negative; give seconds"
            ),
        )
        return np.where(timed, seconds, np.nan), timed

    def _mark_unusable(self, table: pa.Table, unnamed: Array) -> None:
        """Rows of which the reader, or a missing episode or step, says that they cannot be used."""
        if PROBLEM in table.column_names:
            texts = table.column(PROBLEM).to_pylist()
            self._mark(
                np.array([text is not None for text in texts]),
                "unreadable episode",
                lambda row: str(texts[row]),
            )
        every = "every row must say which episode it is of"
        self._mark(
            unnamed,
            "missing value",
            lambda row: f"episode is missing in a row beside episode {self.keys[row]!r}; {every}",
        )
        self._mark(
            self.unnumbered,
            "missing value",
            lambda row: (
                f"step is missing in a row of episode {self.keys[row]!r}; every row must have a"
                " whole number"
            ),
        )

    # -- one row
    # -----------------------------------------------------------------------------------------------------

    def _mark(self, mask: Array, reason: str, text: Callable[[int], str]) -> None:
        """Only a row's first problem is kept."""
        mask = mask & ~self._wrong
        self._wrong |= mask
        for row in np.flatnonzero(mask):
            self._bad[int(row)] = (reason, text)

    def _at(self, row: int) -> str:
        return f"at step {self.steps[row]} of episode {self.keys[row]!r}"

    def _fault(self, text: str, row: int, end: str = "") -> str:
        return f"{text} {self._at(row)}{end}"

    def _leaf(self, table: pa.Table, leaf: Leaf) -> Array:
        return self._checked(leaf, take(table, leaf), np.ones(self.rows, bool))

    def _checked(self, leaf: Leaf, values: Values, there: Array) -> Array:
        array, name = values.array, leaf.name
        self._mark(
            values.missing & there,
            "missing value",
            lambda row: f"{name} is missing {self._at(row)}",
        )
        self._mark(
            values.misshapen & there,
            "wrong shape",
            lambda row: (
                f"{name} has not the shape {leaf.shape} {self._at(row)}, as it has in the first row"
                " or the space"
            ),
        )
        flat = array.reshape(self.rows, -1)
        if array.dtype.kind == "f":
            bad = there & ~np.isfinite(flat).all(1)
            self._mark(
                bad, "not finite", lambda row: f"{name} holds NaN or infinity {self._at(row)}"
            )
            self._mark(
                there & _beyond(flat),
                "too large",
                lambda row: f"{_labelled(leaf, flat[row])} {self._at(row)}, {FLOATS}",
            )
        elif array.dtype.kind in "iu":
            bad = there & ((flat > EXACT) | (flat < -EXACT)).any(1)
            self._mark(
                bad,
                "too large",
                lambda row: f"{name} holds an integer beyond 2**53 {self._at(row)}; rescale it",
            )
        if leaf.space is not None:
            good = there & ~self._wrong
            if (
                self.layout.bounds == "clip"
                and isinstance(leaf.space, spaces.Box)
                and array.dtype.kind in "fiu"
            ):
                array = np.where(
                    good.reshape(-1, *[1] * len(leaf.shape)),
                    np.clip(array, leaf.space.low, leaf.space.high),
                    array,
                )
            bad = np.zeros(self.rows, bool)
            bad[good] = outside(leaf.space, array[good], self.layout.bounds)
            self._mark(
                bad,
                OUTSIDE,
                lambda row: (
                    f"{name}={_shown(array[row])} {self._at(row)} is outside the environment's"
                    f" {leaf.space}; {FIX}"
                ),
            )
        return array

    def _number(self, table: pa.Table, column: str, there: Array) -> Array:
        values = take(table, scalar(table, column, "number"))
        self._mark(
            values.missing & there,
            "missing value",
            lambda row: f"{column} is missing {self._at(row)}",
        )
        array = values.array.astype(np.float64)
        self._mark(
            there & ~np.isfinite(array),
            "not finite",
            lambda row: f"{column} is {array[row]} {self._at(row)}",
        )
        self._mark(
            there & _beyond(array[:, None]),
            "too large",
            lambda row: f"{column} is {array[row]:g} {self._at(row)}, {FLOATS}",
        )
        return array

    def _flag(self, table: pa.Table, column: str, there: Array) -> Array:
        kind = (
            "bool"
            if column in table.column_names and is_.is_boolean(table.schema.field(column).type)
            else "number"
        )
        values = take(table, scalar(table, column, kind))
        self._mark(
            values.missing & there,
            "missing value",
            lambda row: f"{column} is missing {self._at(row)}",
        )
        other = there & (values.array != 0) & (values.array != 1)
        self._mark(
            other,
            "wrong value",
            lambda row: f"{column} is {values.array[row]} {self._at(row)}; give true or false",
        )
        return (values.array == 1) & there

    def _options(self, table: pa.Table) -> list[tuple[tuple[str, Any], ...]]:
        if not self.layout.task:
            return [()] * self.rows
        taken = [take(table, leaf) for leaf in self.layout.task]
        for leaf, values in zip(self.layout.task, taken, strict=True):
            name = leaf.name
            self._mark(values.missing, "missing value", partial(self._fault, f"{name} is missing"))
            if values.array.dtype.kind == "f":
                infinite = ~np.isfinite(values.array)
                self._mark(infinite, "not finite", partial(self._fault, f"{name} is not finite"))
                large = _beyond(values.array[:, None])
                text = partial(self._fault, f"{name} is too large", end=f", {FLOATS}")
                self._mark(large, "too large", text)
        names = [leaf.path[0] for leaf in self.layout.task]
        columns = [values.array.tolist() for values in taken]
        return [tuple(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]

    # -- neighbours
    # --------------------------------------------------------------------------------------------------

    def edge(self, row: int) -> Edge:
        following, wrong = None, bool(self._wrong[row])
        if self.following is not None and not self.final[row] and not wrong:
            following = self._seen(self.following, row)
        return Edge(
            key=self.keys[row],
            step=self._step(row),
            final=bool(self.final[row]),
            ended=bool(self.terminated[row] or self.truncated[row]),
            constant=(
                self.behaviours[row],
                dict(self.tasks[row]),
                self.seeds[row],
                None if self.layout.marks_success else self.successes[row],
            ),
            observation=None if wrong else self._seen(self.observation, row),
            following=following,
            timed=(
                None if self.final[row] or wrong or self.duration is None else bool(self.timed[row])
            ),
        )

    def _step(self, row: int) -> int | None:
        return None if self.unnumbered[row] else int(self.steps[row])

    def _seen(self, arrays: list[Array], row: int) -> tuple[Any, ...]:
        return tuple(_comparable(array[row]) for array in arrays)

    def _pairs(self) -> None:
        if self.rows < 2:
            return
        a, b = slice(None, -1), slice(1, None)
        odd = np.diff(self.steps) != 1
        odd |= self.final[a] | ((self.terminated | self.truncated)[a] & ~self.final[b])
        if self.duration is not None:
            odd |= (self.timed[a] != self.timed[b]) & ~(self.final[a] | self.final[b])
        for constant in (
            self.behaviours,
            self.tasks,
            self.seeds,
            [] if self.layout.marks_success else self.successes,
        ):
            if not constant:
                continue
            odd |= np.fromiter(
                (x != y for x, y in itertools.pairwise(constant)), bool, self.rows - 1
            )
        if self.following is not None:
            for now, then in zip(self.following, self.observation, strict=True):
                odd |= (
                    (now[a] != then[b]).reshape(self.rows - 1, -1).any(1)
                    & ~(self.final | self._wrong)[a]
                    & ~self._wrong[b]
                )
        for row in np.flatnonzero(odd):
            if (
                self.keys[row] == self.keys[row + 1]
                and (found := follow(self.edge(int(row)), self.edge(int(row) + 1))) is not None
            ):
                theirs, reason, text = found
                self._bad.setdefault(int(row) + theirs, (reason, lambda row, text=text: text))  # type: ignore[misc]
                self._wrong[int(row) + theirs] = True

    # -- what is told of the batch
    # -----------------------------------------------------------------------------------

    def runs(self) -> list[Run]:
        starts = (
            [0, *(i for i in range(1, self.rows) if self.keys[i] != self.keys[i - 1]), self.rows]
            if self.rows
            else []
        )
        bad = sorted(self._bad)
        found = []
        for start, end in itertools.pairwise(starts):
            at = next((row for row in bad[int(np.searchsorted(bad, start)) :] if row < end), None)
            problem = None if at is None else Problem(at, self._bad[at][0], self._bad[at][1](at))
            if (
                start
                and (wrong := begins(self.keys[start], self._step(start), self.layout.first_step))
                is not None
            ):
                problem = Problem(start, *wrong)
            found.append(self._run(start, end, problem))
        return found

    def _run(self, start: int, end: int, problem: Problem | None) -> Run:
        acted = start + np.flatnonzero(~self.final[start:end])
        last = int(acted[-1]) if len(acted) else start
        rewarded = self.reward[acted] != 0
        final, led_to = bool(self.final[end - 1]), None
        if final:
            led_to = self._seen(self.observation, end - 1)
        elif self.following is not None:
            led_to = self._seen(self.following, last)
        return Run(
            self.keys[start],
            start,
            end - start,
            problem,
            final,
            (
                "terminated"
                if self.terminated[last]
                else "truncated"
                if self.truncated[last]
                else "unfinished"
            ),
            self._seen(self.observation, start),
            self._seen(self.observation, last) if len(acted) else None,
            led_to,
            bool(rewarded[:-1].any()),
            bool(rewarded[-1:].any()),
        )

    def known(self) -> list[dict[str, Any]]:
        """Of each run, by its first row: what is constant in an episode. A success that is marked
        step by step is that of any of its rows.
        """
        starts = (
            [0, *(i for i in range(1, self.rows) if self.keys[i] != self.keys[i - 1])]
            if self.rows
            else []
        )
        successes = self.successes
        if self.layout.marks_success:
            ends = [*starts[1:], self.rows]
            successes = [None] * self.rows
            for start, end in zip(starts, ends, strict=True):
                marks = [mark for mark in self.successes[start:end] if mark is not None]
                successes[start] = any(marks) if marks else None
        constants: tuple[list[Any], ...] = (self.behaviours, self.tasks, self.seeds, successes)
        return [
            {
                name: dict(c[i]) if name == "task" else c[i]
                for name, c in zip(CONSTANT, constants, strict=True)
            }
            for i in starts
        ]

    def summary(self) -> Summary:
        stats = {}
        good = ~self._wrong
        for leaves, arrays, there in (
            (self.layout.observation, self.observation, good),
            (self.layout.action, self.action, good & ~self.final),
        ):
            for leaf, array in zip(leaves, arrays, strict=True):
                stats[leaf.name] = Stat.of(array[there])
        if self.following is not None:
            for leaf, array in zip(self.layout.observation, self.following, strict=True):
                stats[leaf.name] = stats[leaf.name].merged(Stat.of(array[good & ~self.final]))
        first, last = (self.edge(0), self.edge(self.rows - 1)) if self.rows else (None, None)
        return Summary(self.rows, self.runs(), first, last, stats)

    def encode(self, codecs: tuple[SpaceCodec, SpaceCodec]) -> dict[str, Array]:
        """`manifest.ARRAYS` of every row, and next_num, next_cat of every row where the table has
        next observations. Rows with a problem are zeros.
        """
        observation, action = codecs
        good = ~self._wrong
        out: dict[str, Array] = {}
        out["obs_num"], out["obs_cat"] = _encoded(observation, self.observation, good)
        out["act_num"], out["act_cat"] = _encoded(action, self.action, good & ~self.final)
        if self.following is not None:
            out["next_num"], out["next_cat"] = _encoded(
                observation, self.following, good & ~self.final
            )
        out["reward"], out["terminated"] = self.reward, self.terminated
        if self.duration is not None:
            out["duration"] = self.duration
        return out


def _encoded(codec: SpaceCodec, arrays: Sequence[Array], good: Array) -> tuple[Array, Array]:
    rows = len(good)
    numbers, categories = (
        np.zeros((rows, codec.numbers)),
        np.zeros((rows, codec.categories), np.int64),
    )
    if good.any():
        values = [
            _as(leaf.space, array[good]) for leaf, array in zip(codec.leaves, arrays, strict=True)
        ]
        numbers[good], categories[good] = codec.encode_leaves(values, int(good.sum()))
    widest = np.min_scalar_type(max(codec.cardinalities, default=1) - 1)
    return numbers, categories.astype(widest)


def _as(space: Any, array: Array) -> Any:
    """Values that were found to be of the space, in its kind: whole floats as integers."""
    if isinstance(space, spaces.Text):
        return list(array)
    return (
        array.astype(np.int64)
        if np.dtype(space.dtype).kind not in "f" and array.dtype.kind == "f"
        else array
    )


def _beyond(values: Array) -> Array:
    """[B, n] -> [B] bool: which rows hold a finite number that float32 cannot."""
    if first_beyond_float32(values) is None:
        return np.zeros(len(values), bool)
    return np.asarray((np.isfinite(values) & (np.abs(values) > FLOAT32)).any(1))


def _labelled(leaf: Leaf, row: Array) -> str:
    """Name the number of a row that is beyond float32: `observation[2] holds 1e+300`."""
    column = int(np.argmax(np.abs(row)))
    return f"{leaf.name}{f'[{column}]' if leaf.shape else ''} holds {row[column]:g}"


def _comparable(value: Any) -> Any:
    """Bytes that are equal where the values are: 1 and 1.0, 0.0 and -0.0."""
    return value if isinstance(value, str) else (np.asarray(value, np.float64) + 0.0).tobytes()


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(np.asarray(value).tolist())
