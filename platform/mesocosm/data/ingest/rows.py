"""One batch of rows as arrays, each row checked by itself.

A faulty row is marked and raises no error. The episodes decide what happens to it. Batches are read
in any process and joined in order (`episodes`), so rows are plain arrays by name:

    key [B] object                  the episode, an integer or a string
    step [B], unnumbered [B]        unnumbered: the row has no step
    final [B]                       the row is an observation alone, without an action
    reward, terminated, truncated   [B]; false and 0 in final rows
    duration [B]                    seconds, NaN where the row has none
    behaviour, task, seed, success  [B] object; constant in an episode. Success may be None
    wrong [B]                       the row is faulty
    obs_*, act_*, next_* [B, ...]   values: a leaf each, or encoded (`manifest.ARRAYS`, `texts`).
                                    Of images digests; encoded, references (`LoggedFrame`)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from gymnasium import spaces

from mesocosm.data.ingest.frames import FrameDecoder, digest, digests, raw_frames
from mesocosm.data.ingest.leaves import ColumnLeaf, kind_of
from mesocosm.data.ingest.readers import PROBLEM, LogPiece
from mesocosm.data.ingest.schema import IMPORTED, Schema
from mesocosm.data.ingest.values import Array, RowError, Stat, take, take_integers
from mesocosm.data.ingest.video import FrameProblem
from mesocosm.datasets.bounds import FIX, outside
from mesocosm.datasets.images import image_names
from mesocosm.datasets.leaf import EXACT, FLOAT32
from mesocosm.datasets.spaces import SpaceCodec, shown_space
from mesocosm.datasets.texts import text_problem

Key = int | str
Rows = dict[str, Array]
Problem = tuple[str, str]
"""(reason, one of a few for counts; message)"""
Codecs = tuple[SpaceCodec, SpaceCodec]
UNKNOWN_SEED = -1
"""`Episode.seed` where the table has no seed."""
OUTSIDE = "outside the space"
"""The reason that `reality.bounds` decides about."""
FIXES = {
    "not finite": "; give finite numbers",
    "wrong shape": "; give one shape in all rows",
    "too large": "; rescale it",
    "unreadable episode": "; correct it, or set bad=drop",
    "unreadable frame": "; write it again, or set bad=drop",
    "missing frame": "; correct the timestamps or the video, or set bad=drop",
    "alpha channel": "; save frames as RGB, without alpha",
    OUTSIDE: f"; {FIX}",
}


@dataclass
class Batch:
    """Consecutive rows of a piece."""

    source: int
    piece: int
    begin: int
    """The position of its first row in the piece."""
    rows: Rows
    problems: dict[int, Problem]
    """The first fault of each run of rows of one episode, by row."""
    stats: dict[str, Stat]
    """The values by leaf, of the rows without a fault."""


def read_batch(
    table: pa.Table,
    schema: Schema,
    codecs: Codecs | None,
    piece: LogPiece,
    begin: int,
    decoder: FrameDecoder,
) -> Batch:
    """Check the rows of a table that `Schema.select` made.

    Args:
        codecs: Those that encode the values. None returns the values as they are, and decodes and
            checks pictures.

    Raises:
        RowError: A column has another type than in the first rows, or no row has an episode.
    """
    rows, count = _CheckedRows(table, schema, piece), table.num_rows
    rows.decoder = decoder if codecs is None else None
    everything = np.ones(count, bool)
    observation = [rows.read(leaf, everything) for leaf in schema.observation]
    taken = [take(table, leaf) for leaf in schema.action]
    final = np.all([missing for _, missing, _ in taken], 0)
    acted = ~final
    action = [rows.check(leaf, *t, acted) for leaf, t in zip(schema.action, taken, strict=True)]
    reward = rows.read(ColumnLeaf.scalar("reward", "number"), acted).astype(np.float64)
    duration = np.full(count, np.nan)
    if "duration" in schema.types:
        timed = acted & table["duration"].is_valid().to_numpy()
        seconds = rows.read(ColumnLeaf.scalar("duration", "number"), timed).astype(np.float64)
        negative = timed & (seconds < 0)
        rows.mark(negative, "wrong value", lambda i: f"duration must be >= 0, got {seconds[i]:g}")
        duration = np.where(timed, seconds, np.nan)
    terminated, truncated = rows.flag("terminated", acted), rows.flag("truncated", acted)
    following = [rows.read(leaf, acted) for leaf in schema.next_observation]
    names = [leaf.path[0] for leaf in schema.task]
    options = zip(*(rows.read(leaf, everything).tolist() for leaf in schema.task), strict=True)
    tasks = [dict(zip(names, row, strict=True)) for row in options] or [{}] * count
    seeds, seedless = take_integers(table, "seed")
    success, unknown, _ = take(table, ColumnLeaf.scalar("success", "flag"))
    behaviour, nameless, _ = take(table, ColumnLeaf.scalar("behaviour", "text"))
    columns: Rows = {
        "key": rows.keys,
        "step": rows.steps,
        "unnumbered": rows.unnumbered,
        "final": final,
        "reward": reward,
        "terminated": terminated,
        "truncated": truncated,
        "duration": duration,
        "behaviour": np.where(nameless, IMPORTED, behaviour),
        "task": np.fromiter(tasks, object, count),
        "seed": np.where(seedless, UNKNOWN_SEED, seeds).astype(object),
        "success": np.where(unknown, np.array(None), success.astype(bool)),
        "wrong": rows.wrong,
    }
    stats: dict[str, Stat] = {}
    for part, leaves, arrays, usable in (
        ("obs", schema.observation, observation, ~rows.wrong),
        ("act", schema.action, action, ~rows.wrong & acted),
        ("next", schema.next_observation, following, ~rows.wrong & acted),
    ):
        if codecs is not None and arrays:
            codec = codecs[part == "act"]
            encoded = _encode(codec, arrays, usable)
            columns |= zip((f"{part}_num", f"{part}_cat", f"{part}_text"), encoded, strict=True)
            columns |= _references(codec, leaves, arrays, part)
            continue
        for i, (leaf, array) in enumerate(zip(leaves, arrays, strict=True)):
            name = leaf.name.removeprefix("next_")
            if leaf.pixels:
                columns[f"{part}_{i}"] = array if leaf.kind == "image" else digests(array)
                seen = Stat(int(usable.sum()), frozenset({"image"}))
                stats[name] = stats.get(name, Stat()).merged(seen)
                continue
            columns[f"{part}_{i}"] = array
            stats[name] = stats.get(name, Stat()).merged(Stat.of(array[usable]))
    return Batch(piece.source, piece.number, begin, columns, rows.problems(), stats)


def begins(keys: Array) -> Array:
    """[B] bool: the row has another key than the row before it."""
    return np.append(np.ones(len(keys[:1]), bool), keys[1:] != keys[:-1])


class _CheckedRows:
    """The rows of a table, and the first fault of each."""

    decoder: FrameDecoder | None = None
    """Decodes pictures to check them. None skips the check."""

    def __init__(self, table: pa.Table, schema: Schema, piece: LogPiece):
        self._table, self._schema = table, schema
        self.wrong = np.zeros(table.num_rows, bool)
        self._faults: dict[int, tuple[str, Callable[[int], str]]] = {}
        self._unnamed = np.zeros(table.num_rows, bool)
        self.keys = np.zeros(table.num_rows, object)
        if "episode" in table.column_names:
            self._unnamed = table["episode"].is_null().to_numpy()
            # A row without an episode counts as one of the episode before it, or else after it.
            named = pc.fill_null_backward(pc.fill_null_forward(table["episode"]))
            if named.null_count:
                raise RowError(0, "episode is missing; every row must have one")
            filled = pa.table({"episode": named})
            if kind_of(schema.types["episode"]) == "text":
                self.keys = take(filled, ColumnLeaf.scalar("episode", "text"))[0]
            else:
                self.keys = take_integers(filled, "episode")[0].astype(object)
        if schema.per_file:
            self.keys = np.array([f"{k} of file {piece.source + 1}" for k in self.keys], object)
        self.steps, self.unnumbered = take_integers(table, "step")
        if PROBLEM in table.column_names:
            texts = table[PROBLEM].to_pylist()
            unreadable = np.array([text is not None for text in texts])
            self.mark(unreadable, "unreadable episode", lambda row: str(texts[row]))
        self.mark(self._unnamed, "missing value", lambda row: "episode is missing")
        self.mark(self.unnumbered, "missing value", lambda row: "step is missing")

    def mark(self, mask: Array, reason: str, text: Callable[[int], str]) -> None:
        """Mark faulty rows. Only a row's first fault is recorded."""
        mask = mask & ~self.wrong
        self.wrong |= mask
        self._faults |= dict.fromkeys(np.flatnonzero(mask).tolist(), (reason, text))

    def problems(self) -> dict[int, Problem]:
        """The first fault of each run of rows of one episode."""
        runs = np.cumsum(begins(self.keys))
        problems, last_run = {}, 0
        for row, (reason, text) in sorted(self._faults.items()):
            if runs[row] == last_run:
                continue
            last_run = runs[row]
            at = f"at step {self.steps[row]} of"
            if self._unnamed[row] or self.unnumbered[row]:
                at = "in a row next to" if self._unnamed[row] else "in a row of"
            message = f"{text(row)} {at} episode {self.keys[row]!r}{FIXES.get(reason, '')}"
            problems[row] = reason, message
        return problems

    def read(self, leaf: ColumnLeaf, mask: Array) -> Array:
        """The values of a leaf [B, ...], checked in the rows of `mask`."""
        return self.check(leaf, *take(self._table, leaf), mask)

    def flag(self, name: str, mask: Array) -> Array:
        """A column of booleans, or of 0 and 1, as [B] bool: false outside of `mask`."""
        values = self.read(ColumnLeaf.scalar(name, "flag"), mask)
        other = mask & (values != 0) & (values != 1)
        must = f"{name} must be true or false"
        self.mark(other, "wrong value", lambda row: f"{must}, got {values[row]}")
        return (values == 1) & mask

    def check(
        self, leaf: ColumnLeaf, values: Array, missing: Array, misshapen: Array, mask: Array
    ) -> Array:
        name, space = leaf.name, leaf.space
        self.mark(missing & mask, "missing value", lambda row: f"{name} is missing")
        if leaf.kind == "image":
            return self._check_frames(leaf, values, mask)
        shape = f"{name} must have the shape {leaf.shape}"
        self.mark(misshapen & mask, "wrong shape", lambda row: shape)
        kind, flat = values.dtype.kind, values.reshape(len(values), math.prod(leaf.shape))
        if kind == "f":
            self._check_elements(leaf, flat, mask, ~np.isfinite(flat), "not finite", "finite")
        if kind in "fiu" and values.dtype.itemsize == 8:
            limit: float = EXACT  # an int: as a float, 2**53 + 1 would equal it
            most = "within 2**53"
            if kind == "f":
                limit, most = FLOAT32, "within 3.4e38 (worlds compute in float32)"
            beyond = (flat > limit) | (flat < -limit)
            self._check_elements(leaf, flat, mask, beyond, "too large", most)
        if space is None:
            return values
        good = mask & ~self.wrong
        if self._schema.bounds == "clip" and isinstance(space, spaces.Box) and kind in "fiu":
            clipped = np.clip(values, space.low, space.high)
            values = np.where(good.reshape(-1, *[1] * len(leaf.shape)), clipped, values)
        bad = np.zeros(len(values), bool)
        bad[good] = outside(space, values[good], self._schema.bounds)
        must = f"{name} must be in the environment's {shown_space(space)}"

        def text(row: int) -> str:
            if isinstance(space, spaces.Text):
                return f"{name}: {text_problem(space, values[row])}"
            return f"{must}, got {values[[row]].tolist()[0]!r}"

        self.mark(bad, OUTSIDE, text)
        return values

    def _check_frames(self, leaf: ColumnLeaf, frames: Array, mask: Array) -> Array:
        """Digests [B] of the frames of `mask`; without a decoder, the frames [B] themselves."""
        if self.decoder is None:
            return frames
        dtype = None if leaf.space is None else np.dtype(leaf.space.dtype)
        checked = np.full(len(frames), b"", object)
        for row in np.flatnonzero(mask & ~self.wrong).tolist():
            reason = None
            try:
                frame = self.decoder.decode(frames[row], leaf.shape, dtype)
            except FrameProblem as problem:
                reason, text = problem.reason, f"{leaf.name}: {problem}"
            else:
                checked[row] = digest(frame)
                if frames[row].raw and leaf.space is not None:
                    if not np.isfinite(frame).all():
                        reason, text = "not finite", f"{leaf.name} must be finite"
                    elif outside(leaf.space, frame[None], self._schema.bounds)[0]:
                        must = f"{leaf.name} must be in the environment's {leaf.space}"
                        reason, text = OUTSIDE, f"{must}, got {frame.min()} to {frame.max()}"
            if reason is not None:
                at = np.arange(len(frames)) == row
                self.mark(at, reason, partial(_constant, text))
        return checked

    def _check_elements(
        self, leaf: ColumnLeaf, flat: Array, mask: Array, bad: Array, reason: str, must: str
    ) -> None:
        """Mark rows with a bad number, and name the first one: `observation[2]`."""

        def text(row: int) -> str:
            column = int(np.argmax(bad[row]))
            label = f"{leaf.name}[{column}]" if leaf.shape else leaf.name
            return f"{label} must be {must}, got {flat[row, column]}"

        self.mark(mask & bad.any(1), reason, text)


def _constant(text: str, row: int) -> str:
    return text


def _references(
    codec: SpaceCodec, leaves: Sequence[ColumnLeaf], arrays: Sequence[Array], part: str
) -> Rows:
    """`LoggedFrame` [B] of each image, by the name of its rows."""
    frames: list[Array] = []
    for leaf, column, array in zip(codec.leaves, leaves, arrays, strict=True):
        if leaf.image is not None:
            raw = column.kind != "image"
            frames.append(raw_frames(array.astype(leaf.dtype)) if raw else array)
    names = [name.replace("obs", part, 1) for name in image_names(len(frames))]
    return dict(zip(names, frames, strict=True))


def _encode(codec: SpaceCodec, arrays: Sequence[Array], usable: Array) -> tuple[Array, ...]:
    """(numbers, categories, texts) of every row as they are stored; 0 or "" where it is not
    usable. Images are left out.
    """
    count = len(usable)
    numbers = np.zeros((count, codec.numbers))
    categories = np.zeros((count, len(codec.plain)), codec.plain_dtype)
    texts = np.full((count, len(codec.text_leaves)), "", object)
    values = []
    for leaf, array in zip(codec.leaves, arrays, strict=True):
        if leaf.image is not None:
            shape = (int(usable.sum()), *leaf.shape)
            values.append(np.broadcast_to(np.zeros((), leaf.dtype), shape))  # takes no memory
            continue
        integers = leaf.text is None and leaf.dtype.kind != "f" and array.dtype.kind == "f"
        values.append(array[usable].astype(np.int64) if integers else array[usable])
    if usable.any():
        encoded = codec.encode_stored(values, int(usable.sum()))[:3]
        numbers[usable], categories[usable], texts[usable] = encoded
    return numbers, categories, texts
