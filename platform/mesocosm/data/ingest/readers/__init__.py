"""What logs are read from: one module a format, each with

    head(path) -> Table              its first rows, for their columns and types
    pieces(path) -> [Piece]          what may be read apart, in order
    read(piece, columns) -> Tables   those columns of a piece's rows, in order, in batches of bounded size

The tables are of the documented schema. A format with names of its own has, too,

    columns(path) -> {ours: theirs}  what it calls our columns
    made(path) -> {ours: how}        those that the file has not, and what is put there
    notes(path) -> {ours: text}      what is to be known of them

and one that is more than a file, or states its spaces,

    files(path) -> [Path]            what it is made of
    spaces(path) -> (observation space, action space)

Each of these is optional, too:

    ignored(path) -> {theirs: why}   columns that are not read
    done_only(path) -> bool          "terminated" holds time limits as well
    marks_success(path) -> bool      "success" is a flag of each step, true once the episode succeeds

An episode that cannot be read is rows of its episode and step with a sentence in the column
PROBLEM.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from mesocosm.data.ingest.readers import files
from mesocosm.errors import MesocosmError, UsageError

SUFFIXES = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}
PROBLEM = "mesocosm problem"
"""A column of texts that a reader adds: what is wrong with the row's episode."""
BATCH_ROWS = 1 << 14
BATCH_BYTES = 1 << 25


@dataclass(frozen=True)
class Piece:
    format: str
    source: int
    """Position of its file among all"""
    path: str
    begin: int
    end: int
    """Row groups, or bytes: the format's own"""
    number: int = 0
    """Position among all pieces"""
    skip: int = 0
    """Rows at its beginning that are not wanted"""


@dataclass(frozen=True)
class Source:
    """One file of logs, or one Minari dataset."""

    format: str
    path: str
    name: str
    """As the user would know it"""

    @property
    def module(self) -> Any:
        return importlib.import_module(f"mesocosm.data.ingest.readers.{self.format}")

    @property
    def columns(self) -> dict[str, str]:
        """Ours to theirs, where the format names them otherwise."""
        return dict(self.module.columns(self.path)) if hasattr(self.module, "columns") else {}

    @property
    def made(self) -> dict[str, str]:
        """Our columns that the file has not, and what is put there."""
        return dict(self.module.made(self.path)) if hasattr(self.module, "made") else {}

    @property
    def files(self) -> list[str]:
        return (
            [str(path) for path in self.module.files(self.path)]
            if hasattr(self.module, "files")
            else [self.path]
        )

    @property
    def spaces(self) -> tuple[Any, Any] | None:
        """(observation space, action space) that the logs state."""
        return tuple(self.module.spaces(self.path)) if hasattr(self.module, "spaces") else None

    @property
    def notes(self) -> dict[str, str]:
        """What is to be known of our columns, by name."""
        return dict(self.module.notes(self.path)) if hasattr(self.module, "notes") else {}

    @property
    def ignored(self) -> dict[str, str]:
        """Columns that are not read, and why."""
        return dict(self.module.ignored(self.path)) if hasattr(self.module, "ignored") else {}

    @property
    def done_only(self) -> bool:
        """Whether the logs say only that an episode ended, not whether a time limit ended it."""
        return (
            bool(self.module.done_only(self.path)) if hasattr(self.module, "done_only") else False
        )

    @property
    def marks_success(self) -> bool:
        """Whether success is a flag of each step rather than of the episode."""
        return (
            bool(self.module.marks_success(self.path))
            if hasattr(self.module, "marks_success")
            else False
        )

    def head(self) -> pa.Table:
        table: pa.Table = self.module.head(self.path)
        return table

    def pieces(self, source: int) -> list[Piece]:
        return [
            Piece(self.format, source, self.path, begin, end)
            for begin, end in self.module.pieces(self.path)
        ]


def read(piece: Piece, columns: Sequence[str]) -> Iterator[pa.Table]:
    yield from importlib.import_module(f"mesocosm.data.ingest.readers.{piece.format}").read(
        piece, columns
    )


def sources(words: Sequence[str], fetch: bool) -> list[Source]:
    """The files that paths, patterns and folders name, in the order given; those of a pattern or
    folder sorted by name, numbers in the names by value. Words in alphabetical order are sorted
    alike: a shell gives the files of a pattern so. `fetch`: Minari's datasets that are not on this
    machine come from its hub.

    Raises UsageError where there is none, where one is given twice or is of no known format.
    """
    if not words:
        raise UsageError(
            "no path was given; name files, patterns or folders of Parquet or JSONL, such as"
            " 'logs/*.parquet'"
        )
    ordered = files.sorted_naturally(words) if list(words) == sorted(words) else words
    found = [source for word in ordered for source in _of(word, fetch)]
    seen: set[str] = set()
    for source in found:
        if source.path in seen:
            raise UsageError(f"{source.name!r} is given twice; name each file once")
        seen.add(source.path)
    if len({source.format for source in found}) > 1:
        raise UsageError(
            f"{found[0].name!r} is {found[0].format} and others are not; import one format at a"
            " time, and train on both datasets together"
        )
    return found


def _of(word: str, fetch: bool) -> list[Source]:
    if word.startswith("minari:"):
        from mesocosm.data.ingest.readers import minari

        return [Source("minari", minari.folder(word, fetch), word)]
    if files.remote(word):
        return _in_bucket(word)
    if os.path.exists(os.path.join(word, "meta", "info.json")):
        from mesocosm.data.ingest.readers import lerobot

        return [Source("lerobot", os.path.abspath(path), path) for path in lerobot.data(word)]
    return _expand(word)


def _in_bucket(word: str) -> list[Source]:
    """Raises UsageError where the bucket cannot be read."""
    try:
        return _expand(word)
    except MesocosmError:
        raise
    except Exception as error:  # botocore's and s3fs's own
        said = " ".join(str(error).split())
        raise UsageError(
            f"{word!r} cannot be read ({said}); check the endpoint and credentials in the"
            " environment, as for storage.root"
        ) from error


def _expand(word: str) -> list[Source]:
    if files.is_folder(word):
        paths = [path for path in files.below(word) if Path(path).suffix in SUFFIXES]
        if not paths:
            raise UsageError(
                f"the folder {word!r} has no file that ends in {', '.join(SUFFIXES)}; name one"
                " that has"
            )
    elif files.is_file(word):
        paths = [word]
    else:
        paths = files.matching(word)
        if not paths:
            raise UsageError(
                f"{word!r} is no file, folder or pattern that matches any; check the path"
            )
    return [_source(path) for path in paths]


def _source(path: str) -> Source:
    format = SUFFIXES.get(Path(path).suffix)
    if format is None:
        raise UsageError(
            f"{path!r} is of no format that is known by its name; give files that end in"
            f" {', '.join(SUFFIXES)}"
        )
    if format == "parquet":
        from mesocosm.data.ingest.readers import parquet, rllib

        format = "rllib" if rllib.holds(parquet.head(path).schema) else format
    return Source(format, path if files.remote(path) else os.path.abspath(path), path)
