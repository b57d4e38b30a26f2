"""The formats of logs, one module each:

    head(path) -> Table              the first rows, for their columns and types
    pieces(path) -> [(begin, end)]   parts that can be read separately, in order
    read(piece, columns) -> Tables   those columns of a piece's rows, in order, in batches
    about(path) -> About             optional: what the format adds to the documented schema

The tables have the documented schema. An episode that cannot be read is rows of its episode and
step, with a message in the column PROBLEM.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import pyarrow as pa

from mesocosm.data.ingest.readers import files
from mesocosm.errors import MesocosmError, UsageError

SUFFIXES = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}
PROBLEM = "mesocosm problem"
"""A text column that a reader adds: what is wrong with the row's episode."""
BATCH_ROWS = 1 << 14
BATCH_BYTES = 1 << 25


@dataclass(frozen=True)
class About:
    """What a format adds to the documented schema."""

    columns: dict[str, str] = field(default_factory=dict)
    """Schema's name -> the format's own name."""
    filled: dict[str, str] = field(default_factory=dict)
    """Columns that the file lacks and the reader adds, with an explanation."""
    notes: dict[str, str] = field(default_factory=dict)
    """Remarks on columns, by the schema's names."""
    ignored: dict[str, str] = field(default_factory=dict)
    """Columns that are not read, by the format's names, and why."""
    done_only: bool = False
    """The logs do not say whether a time limit ended an episode."""
    marks_success: bool = False
    """`success` is a flag of each step rather than of the episode."""
    spaces: tuple[gymnasium.Space[Any], gymnasium.Space[Any]] | None = None
    """(observation space, action space) that the logs state."""
    files: list[str] | None = None
    """The files of a source that is a folder."""


@dataclass(frozen=True)
class Piece:
    """A part of a source that is read by itself."""

    format: str
    source: int
    """Position of its file among all."""
    path: str
    begin: int
    end: int
    """Row groups, bytes or episodes, as the format counts."""
    number: int = 0
    """Position among all pieces."""
    skip: int = 0
    """Rows at its beginning that are not read."""


@dataclass(frozen=True)
class Source:
    """One file of logs, or one Minari dataset."""

    format: str
    path: str
    name: str
    """As the user named it."""

    @functools.cached_property
    def about(self) -> About:
        module = _module(self.format)
        about: About = module.about(self.path) if hasattr(module, "about") else About()
        return about

    def head(self) -> pa.Table:
        table: pa.Table = _module(self.format).head(self.path)
        return table

    def pieces(self, source: int) -> list[Piece]:
        ranges = _module(self.format).pieces(self.path)
        return [Piece(self.format, source, self.path, begin, end) for begin, end in ranges]


def _module(format: str) -> Any:
    return importlib.import_module(f"mesocosm.data.ingest.readers.{format}")


def read(piece: Piece, columns: Sequence[str]) -> Iterator[pa.Table]:
    """The rows of a piece, in batches of bounded size."""
    yield from _module(piece.format).read(piece, columns)


def sources(words: Sequence[str], fetch: bool) -> list[Source]:
    """The files that paths, patterns and folders name, in the order given.

    The files of a pattern or folder are sorted by name, with numbers by value, and so are words in
    alphabetical order, as a shell gives the files of a pattern.

    Args:
        fetch: Download Minari's datasets that are not on this machine.

    Raises:
        UsageError: No file, a file twice, several formats, or an unknown format.
    """
    if not words:
        raise UsageError(
            "no path was given; name files, patterns or folders of Parquet or JSONL, such as"
            " 'logs/*.parquet'"
        )
    ordered = files.sorted_naturally(words) if list(words) == sorted(words) else words
    found = [source for word in ordered for source in _sources_of(word, fetch)]
    seen: set[str] = set()
    for source in found:
        if source.path in seen:
            raise UsageError(f"{source.name!r} is given twice; name each file once")
        seen.add(source.path)
        if source.format != found[0].format:
            raise UsageError(
                f"{found[0].name!r} is {found[0].format} and {source.name!r} is {source.format};"
                " import one format at a time, and train on both datasets together"
            )
    return found


def _sources_of(word: str, fetch: bool) -> list[Source]:
    if word.startswith("minari:"):
        from mesocosm.data.ingest.readers import minari

        return [Source("minari", minari.folder(word, fetch), word)]
    if os.path.exists(os.path.join(word, "meta", "info.json")) and not files.remote(word):
        from mesocosm.data.ingest.readers import lerobot

        return [Source("lerobot", os.path.abspath(path), path) for path in lerobot.data(word)]
    try:
        return _expand(word)
    except MesocosmError:
        raise
    except Exception as error:  # botocore's and s3fs's own
        if not files.remote(word):
            raise
        raise UsageError(
            f"{word!r} cannot be read ({' '.join(str(error).split())}); check the endpoint and"
            " credentials in the environment, as for storage.root"
        ) from error


def _expand(word: str) -> list[Source]:
    """The files of a path, folder or pattern."""
    suffixes = ", ".join(SUFFIXES)
    if files.is_folder(word):
        paths = [path for path in files.below(word) if Path(path).suffix in SUFFIXES]
        if not paths:
            raise UsageError(f"the folder {word!r} has no file that ends in {suffixes}")
    else:
        paths = [word] if files.is_file(word) else files.matching(word)
        if not paths:
            raise UsageError(
                f"{word!r} is no file, folder or pattern that matches a file; check the path"
            )
    return [_source(path) for path in paths]


def _source(path: str) -> Source:
    format = SUFFIXES.get(Path(path).suffix)
    if format is None:
        raise UsageError(
            f"{path!r} has an unknown suffix; give files that end in {', '.join(SUFFIXES)}"
        )
    if format == "parquet":
        from mesocosm.data.ingest.readers import parquet, rllib

        format = "rllib" if rllib.holds(parquet.head(path).schema) else format
    return Source(format, path if files.remote(path) else os.path.abspath(path), path)
