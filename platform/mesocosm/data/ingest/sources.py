"""The files of an import, each with the reader of its format."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from mesocosm.data.ingest.readers import (
    About,
    LogPiece,
    files,
    jsonl,
    lerobot,
    minari,
    parquet,
    rllib,
)
from mesocosm.errors import MesocosmError, UsageError

READERS: dict[str, Any] = {
    "jsonl": jsonl,
    "lerobot": lerobot,
    "minari": minari,
    "parquet": parquet,
    "rllib": rllib,
}
SUFFIXES = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}


@dataclass(frozen=True)
class Source:
    """One file of logs, or one Minari dataset."""

    format: str
    path: str
    name: str
    """As the user named it."""

    @functools.cached_property
    def about(self) -> About:
        reader = READERS[self.format]
        return reader.about(self.path) if hasattr(reader, "about") else About()

    @property
    def files(self) -> list[str]:
        return self.about.files or [self.path]

    def head(self) -> pa.Table:
        return READERS[self.format].head(self.path)

    def pieces(self, source: int) -> list[LogPiece]:
        ranges = READERS[self.format].pieces(self.path)
        return [LogPiece(self.format, source, self.path, begin, end) for begin, end in ranges]


def read(piece: LogPiece, columns: Sequence[str]) -> Iterator[pa.Table]:
    """The rows of a piece, in batches of bounded size."""
    yield from READERS[piece.format].read(piece, columns)


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
    sources = [source for word in ordered for source in _sources_of(word, fetch)]
    seen: set[str] = set()
    for source in sources:
        if source.path in seen:
            raise UsageError(f"{source.name!r} is given twice; name each file once")
        seen.add(source.path)
        if source.format != sources[0].format:
            raise UsageError(
                f"{sources[0].name!r} is {sources[0].format} and {source.name!r} is"
                f" {source.format}; import one format at a time, and train on both datasets"
                " together"
            )
    return sources


def _sources_of(word: str, fetch: bool) -> list[Source]:
    if word.startswith(minari.PREFIX):
        return [Source("minari", minari.folder(word, fetch), word)]
    if not files.is_remote(word) and os.path.exists(os.path.join(word, lerobot.INFO)):
        return [Source("lerobot", os.path.abspath(path), path) for path in lerobot.data(word)]
    try:
        paths = files.expand(word, list(SUFFIXES))
        if not paths:
            raise UsageError(
                f"{word!r} is no file, folder or pattern that matches a file that ends in"
                f" {', '.join(SUFFIXES)}; check the path"
            )
        return [_source(path) for path in paths]
    except MesocosmError:
        raise
    except Exception as error:  # botocore's and s3fs's own
        if not files.is_remote(word):
            raise
        raise UsageError(
            f"{word!r} cannot be read ({' '.join(str(error).split())}); check the endpoint and"
            " credentials in the environment, as for storage.root"
        ) from error


def _source(path: str) -> Source:
    format = SUFFIXES.get(Path(path).suffix)
    if format is None:
        raise UsageError(
            f"{path!r} has an unknown suffix; give files that end in {', '.join(SUFFIXES)}"
        )
    if format == "parquet" and rllib.holds(parquet.head(path).schema):
        format = "rllib"
    return Source(format, path if files.is_remote(path) else os.path.abspath(path), path)
