"""A batch of rows of the documented schema, checked: each row by itself, and against the row before it.

What is wrong with a row is a `Problem`, kept with the run of rows of its episode; nothing here raises because of a value. A batch says of its
first and last row what the next and the former batch must fit (`Edge`), so that batches may be read in any process and joined in order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.types as is_
from gymnasium import spaces
from numpy.typing import NDArray

from mesocosm.data.inference import Stat
from mesocosm.data.layout import Column, Leaf, RowError, Values, take
from mesocosm.data.spaces import EXACT, SpaceCodec

Array = NDArray[Any]
Key = int | str

REQUIRED = ("episode", "step", "observation", "action", "reward", "terminated", "truncated")
OPTIONAL = ("next_observation", "duration", "behaviour", "task", "seed", "success")
UNKNOWN_SEED = -1
"""`Episode.seed` where the table has no seed."""
IMPORTED = "imported"
"""Who acted, where the table does not say."""


@dataclass(frozen=True)
class Layout:
    """Where in the table everything is."""

    observation: list[Leaf]
    action: list[Leaf]
    following: list[Leaf]
    """The leaves of next_observation, one for one those of `observation`; empty where the table has none"""
    task: list[Leaf]
    present: frozenset[str]
    """Those of OPTIONAL that are there"""
    named: bool
    """Episodes are named by strings"""
    first_step: int
    """0 or 1: what the first episode begins at"""


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
    step: int
    final: bool
    """It has an observation and no action: what the last action of its episode led to"""
    ended: bool
    """terminated or truncated"""
    constant: tuple[Any, ...]
    """behaviour, task, seed, success"""
    observation: tuple[Any, ...] | None
    """None where something is wrong with the row: then it is not compared"""
    following: tuple[Any, ...] | None


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
    total: float
    """Of its rewards"""


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
    """What is wrong with row `b` right after row `a` of the same episode: (it is b's fault, reason, text)."""
    if b.step == a.step:
        return True, "duplicate step", f"step {b.step} of episode {b.key!r} comes twice"
    if b.step < a.step:
        return True, "steps out of order", f"step {b.step} of episode {b.key!r} comes after its step {a.step}; sort the rows by episode and step"
    if b.step > a.step + 1:
        return True, "gap in steps", f"episode {b.key!r} goes from step {a.step} to step {b.step}; give every step"
    if a.final:
        return False, "missing value", f"action is missing at step {a.step} of episode {a.key!r}, which goes on; only its last row may have none"
    if a.ended and not b.final:
        return True, "rows after the end", f"episode {b.key!r} has ended at step {a.step} (terminated or truncated) and goes on; begin a new episode"
    for name, before, after in zip(CONSTANT, a.constant, b.constant, strict=True):
        if before != after:
            return True, f"{name} changes", f"{name} of episode {b.key!r} changes from {before!r} to {after!r} at step {b.step}; it must be constant"
    if a.following is not None and b.observation is not None and a.following != b.observation:
        said = f"next_observation at step {a.step} of episode {a.key!r} is not the observation of step {b.step}; correct one of them"
        return False, "next_observation contradicts", said
    return None


def begins(key: Key, step: int, first_step: int) -> tuple[str, str] | None:
    """What is wrong with a row as the first of an episode: (reason, text)."""
    if isinstance(key, int) and key < 0:
        return "negative episode", f"episode {key} is negative; number episodes from 0, or name them by strings"
    if step != first_step:
        return "start is missing", f"episode {key!r} begins at step {step} where {first_step} was expected; give every step, sorted by episode and step"
    return None


class Block:
    """One batch of rows as arrays, with what is wrong with each row. Raises UsageError where a column has no episode or step."""

    def __init__(self, table: pa.Table, layout: Layout, name: Callable[[Key], Key] = lambda key: key):
        self.layout, self.rows = layout, table.num_rows
        self._bad: dict[int, tuple[str, Callable[[int], str]]] = {}
        self._wrong = np.zeros(self.rows, bool)
        self.keys = [name(key) for key in _keys(table, layout.named)]
        self.steps = _steps(table)
        self.observation = [self._leaf(table, leaf) for leaf in layout.observation]
        actions = [take(table, leaf) for leaf in layout.action]
        self.final = np.all([a.missing for a in actions], 0)
        acted = ~self.final
        self.action = [self._checked(leaf, values, acted) for leaf, values in zip(layout.action, actions, strict=True)]
        self.reward = self._number(table, "reward", acted)
        self.duration = self._number(table, "duration", acted) if "duration" in layout.present else None
        self.terminated, self.truncated = self._flag(table, "terminated", acted), self._flag(table, "truncated", acted)
        self.following: list[Array] | None = None
        if layout.following:
            following = [take(table, leaf) for leaf in layout.following]
            self.following = [self._checked(leaf, values, acted) for leaf, values in zip(layout.following, following, strict=True)]
        self.behaviours = _texts(table, "behaviour", IMPORTED)
        self.tasks = self._options(table)
        self.seeds = [UNKNOWN_SEED if s is None else int(s) for s in _optional(table, "seed", int)]
        self.successes = [None if s is None else bool(s) for s in _optional(table, "success", int)]
        self._pairs()

    # -- one row -----------------------------------------------------------------------------------------------------

    def _mark(self, mask: Array, reason: str, text: Callable[[int], str]) -> None:
        """Only a row's first problem is kept."""
        mask = mask & ~self._wrong
        self._wrong |= mask
        for row in np.flatnonzero(mask):
            self._bad[int(row)] = (reason, text)

    def _at(self, row: int) -> str:
        return f"at step {self.steps[row]} of episode {self.keys[row]!r}"

    def _leaf(self, table: pa.Table, leaf: Leaf) -> Array:
        return self._checked(leaf, take(table, leaf), np.ones(self.rows, bool))

    def _checked(self, leaf: Leaf, values: Values, there: Array) -> Array:
        array, name = values.array, leaf.name
        self._mark(values.missing & there, "missing value", lambda row: f"{name} is missing {self._at(row)}")
        self._mark(
            values.misshapen & there,
            "wrong shape",
            lambda row: f"{name} has not the shape {leaf.shape} {self._at(row)}, as it has in the first row or the space",
        )
        flat = array.reshape(self.rows, -1)
        if array.dtype.kind == "f":
            bad = there & ~np.isfinite(flat).all(1)
            self._mark(bad, "not finite", lambda row: f"{name} holds NaN or infinity {self._at(row)}")
        elif array.dtype.kind in "iu":
            bad = there & ((flat > EXACT) | (flat < -EXACT)).any(1)
            self._mark(bad, "too large", lambda row: f"{name} holds an integer beyond 2**53 {self._at(row)}; rescale it")
        if leaf.space is not None:
            good = there & ~self._wrong
            bad = np.zeros(self.rows, bool)
            bad[good] = _outside(leaf.space, array[good])
            self._mark(bad, "outside the space", lambda row: f"{name}={_shown(array[row])} {self._at(row)} is outside the environment's {leaf.space}")
        return array

    def _number(self, table: pa.Table, column: str, there: Array) -> Array:
        values = take(table, _scalar(table, column, "number"))
        self._mark(values.missing & there, "missing value", lambda row: f"{column} is missing {self._at(row)}")
        array = values.array.astype(np.float64)
        self._mark(there & ~np.isfinite(array), "not finite", lambda row: f"{column} is {array[row]} {self._at(row)}")
        return array

    def _flag(self, table: pa.Table, column: str, there: Array) -> Array:
        kind = "bool" if column in table.column_names and is_.is_boolean(table.schema.field(column).type) else "number"
        values = take(table, _scalar(table, column, kind))
        self._mark(values.missing & there, "missing value", lambda row: f"{column} is missing {self._at(row)}")
        other = there & (values.array != 0) & (values.array != 1)
        self._mark(other, "wrong value", lambda row: f"{column} is {values.array[row]} {self._at(row)}; give true or false")
        return (values.array == 1) & there

    def _options(self, table: pa.Table) -> list[tuple[tuple[str, Any], ...]]:
        if not self.layout.task:
            return [()] * self.rows
        taken = [take(table, leaf) for leaf in self.layout.task]
        for leaf, values in zip(self.layout.task, taken, strict=True):
            self._mark(values.missing, "missing value", lambda row, leaf=leaf: f"{leaf.name} is missing {self._at(row)}")  # type: ignore[misc]
            if values.array.dtype.kind == "f":
                self._mark(~np.isfinite(values.array), "not finite", lambda row, leaf=leaf: f"{leaf.name} is not finite {self._at(row)}")  # type: ignore[misc]
        names = [leaf.path[0] for leaf in self.layout.task]
        columns = [values.array.tolist() for values in taken]
        return [tuple(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]

    # -- neighbours --------------------------------------------------------------------------------------------------

    def edge(self, row: int) -> Edge:
        following, wrong = None, bool(self._wrong[row])
        if self.following is not None and not self.final[row] and not wrong:
            following = tuple(_comparable(array[row]) for array in self.following)
        return Edge(
            key=self.keys[row],
            step=int(self.steps[row]),
            final=bool(self.final[row]),
            ended=bool(self.terminated[row] or self.truncated[row]),
            constant=(self.behaviours[row], dict(self.tasks[row]), self.seeds[row], self.successes[row]),
            observation=None if wrong else tuple(_comparable(array[row]) for array in self.observation),
            following=following,
        )

    def _pairs(self) -> None:
        if self.rows < 2:
            return
        a, b = slice(None, -1), slice(1, None)
        odd = np.diff(self.steps) != 1
        odd |= self.final[a] | ((self.terminated | self.truncated)[a] & ~self.final[b])
        for constant in (self.behaviours, self.tasks, self.seeds, self.successes):
            odd |= np.fromiter((x != y for x, y in itertools.pairwise(constant)), bool, self.rows - 1)
        if self.following is not None:
            for now, then in zip(self.following, self.observation, strict=True):
                odd |= (now[a] != then[b]).reshape(self.rows - 1, -1).any(1) & ~(self.final | self._wrong)[a] & ~self._wrong[b]
        for row in np.flatnonzero(odd):
            if self.keys[row] == self.keys[row + 1] and (found := follow(self.edge(int(row)), self.edge(int(row) + 1))) is not None:
                theirs, reason, text = found
                self._bad.setdefault(int(row) + theirs, (reason, lambda row, text=text: text))  # type: ignore[misc]
                self._wrong[int(row) + theirs] = True

    # -- what is told of the batch -----------------------------------------------------------------------------------

    def runs(self) -> list[Run]:
        starts = [0, *(i for i in range(1, self.rows) if self.keys[i] != self.keys[i - 1]), self.rows] if self.rows else []
        bad = sorted(self._bad)
        found = []
        for start, end in itertools.pairwise(starts):
            at = next((row for row in bad[int(np.searchsorted(bad, start)) :] if row < end), None)
            problem = None if at is None else Problem(at, self._bad[at][0], self._bad[at][1](at))
            if start and (wrong := begins(self.keys[start], int(self.steps[start]), self.layout.first_step)) is not None:
                problem = Problem(start, *wrong)
            acted = np.flatnonzero(~self.final[start:end])
            last = start + int(acted[-1]) if len(acted) else start
            outcome = "terminated" if self.terminated[last] else "truncated" if self.truncated[last] else "unfinished"
            found.append(Run(self.keys[start], start, end - start, problem, bool(self.final[end - 1]), outcome, float(self.reward[start:end].sum())))
        return found

    def known(self) -> list[dict[str, Any]]:
        """Of each run, by its first row: what is constant in an episode."""
        starts = [0, *(i for i in range(1, self.rows) if self.keys[i] != self.keys[i - 1])] if self.rows else []
        constants: tuple[list[Any], ...] = (self.behaviours, self.tasks, self.seeds, self.successes)
        return [{name: dict(c[i]) if name == "task" else c[i] for name, c in zip(CONSTANT, constants, strict=True)} for i in starts]

    def summary(self) -> Summary:
        stats = {}
        good = ~self._wrong
        for leaves, arrays, there in ((self.layout.observation, self.observation, good), (self.layout.action, self.action, good & ~self.final)):
            for leaf, array in zip(leaves, arrays, strict=True):
                stats[leaf.name] = Stat.of(array[there])
        if self.following is not None:
            for leaf, array in zip(self.layout.observation, self.following, strict=True):
                stats[leaf.name] = stats[leaf.name].merged(Stat.of(array[good & ~self.final]))
        first, last = (self.edge(0), self.edge(self.rows - 1)) if self.rows else (None, None)
        return Summary(self.rows, self.runs(), first, last, stats)

    def encode(self, codecs: tuple[SpaceCodec, SpaceCodec]) -> dict[str, Array]:
        """`manifest.ARRAYS` of every row, and next_num, next_cat of every row where the table has next observations. Rows with a problem are zeros."""
        observation, action = codecs
        good = ~self._wrong
        out: dict[str, Array] = {}
        out["obs_num"], out["obs_cat"] = _encoded(observation, self.observation, good)
        out["act_num"], out["act_cat"] = _encoded(action, self.action, good & ~self.final)
        if self.following is not None:
            out["next_num"], out["next_cat"] = _encoded(observation, self.following, good & ~self.final)
        out["reward"], out["terminated"] = self.reward, self.terminated
        if self.duration is not None:
            out["duration"] = self.duration
        return out


def _encoded(codec: SpaceCodec, arrays: Sequence[Array], good: Array) -> tuple[Array, Array]:
    rows = len(good)
    numbers, categories = np.zeros((rows, codec.numbers)), np.zeros((rows, codec.categories), np.int64)
    if good.any():
        values = [_as(leaf.space, array[good]) for leaf, array in zip(codec.leaves, arrays, strict=True)]
        numbers[good], categories[good] = codec.encode_leaves(values, int(good.sum()))
    widest = np.min_scalar_type(max(codec.cardinalities, default=1) - 1)
    return numbers, categories.astype(widest)


def _as(space: Any, array: Array) -> Any:
    """Values that were found to be of the space, in its kind: whole floats as integers."""
    if isinstance(space, spaces.Text):
        return list(array)
    return array.astype(np.int64) if np.dtype(space.dtype).kind not in "f" and array.dtype.kind == "f" else array


def _outside(space: Any, array: Array) -> Array:
    """[B] bool: which values are not of the space. Bounds are compared in the space's own precision, in which the values may have been logged."""
    if not len(array):
        return np.zeros(0, bool)
    flat = array.reshape(len(array), -1)
    if isinstance(space, spaces.Text):
        allowed = space.character_set
        return np.array([not (space.min_length <= len(v) <= space.max_length and set(v) <= allowed) for v in array], bool)
    whole = np.ones(len(array), bool) if flat.dtype.kind != "f" else (flat == np.rint(flat)).all(1)
    if isinstance(space, spaces.Box):
        dtype = np.dtype(space.dtype)
        typed = flat.astype(dtype) if dtype.kind == "f" else flat
        inside = ((typed >= space.low.reshape(-1)) & (typed <= space.high.reshape(-1))).all(1)
        return np.asarray(~(inside if dtype.kind == "f" else inside & whole))
    if isinstance(space, spaces.Discrete):
        low, n = np.array([space.start]), np.array([space.n])
    elif isinstance(space, spaces.MultiDiscrete):
        low, n = np.ravel(space.start), np.ravel(space.nvec)
    else:
        low, n = np.zeros(1, np.int64), np.array([2])
    return np.asarray(~(whole & ((flat >= low) & (flat < low + n)).all(1)))


def _scalar(table: pa.Table, column: str, kind: str) -> Leaf:
    type = table.schema.field(column).type if column in table.column_names else pa.null()
    return Leaf(column, (), (Column(column, (), type),), kind, (), None)


def _keys(table: pa.Table, named: bool) -> list[Key]:
    keys: list[Key | None] = table.column("episode").to_pylist()
    if any(key is None for key in keys):
        raise RowError(keys.index(None), "episode is missing; every row must say which episode it is of")
    if any(isinstance(key, str) != named for key in keys):
        row = next(i for i, key in enumerate(keys) if isinstance(key, str) != named)
        raise RowError(row, f"episode is {keys[row]!r} where it is {'a string' if named else 'a whole number'} before (mixed dtypes); give one type")
    return keys  # type: ignore[return-value]


def _steps(table: pa.Table) -> Array:
    column = table.column("step")
    if column.null_count or not is_.is_integer(column.type):
        row = next((i for i, step in enumerate(column.to_pylist()) if type(step) is not int), 0)
        raise RowError(row, f"step is {column[row].as_py()!r}; every row must have a whole number")
    return np.asarray(column.to_numpy()).astype(np.int64)


def _texts(table: pa.Table, column: str, default: str) -> list[str]:
    return [default if text is None else text for text in _optional(table, column, str)]


def _optional(table: pa.Table, column: str, kind: type) -> list[Any]:
    """A column's values, None where it has none."""
    if column not in table.column_names:
        return [None] * table.num_rows
    values: list[Any] = table.column(column).to_pylist()
    wrong = next((i for i, value in enumerate(values) if value is not None and not isinstance(value, kind)), None)
    if wrong is not None:
        wanted = "a string" if kind is str else "a whole number, or true or false"
        raise RowError(wrong, f"{column} is {values[wrong]!r} (mixed dtypes); give {wanted}")
    return values


def _comparable(value: Any) -> Any:
    """Bytes that are equal where the values are: 1 and 1.0, 0.0 and -0.0."""
    return value if isinstance(value, str) else (np.asarray(value, np.float64) + 0.0).tobytes()


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(np.asarray(value).tolist())
