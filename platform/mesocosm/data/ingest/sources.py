"""The files of an import, each with the reader of its format."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from mesocosm.config import fingerprint
from mesocosm.data.ingest.readers import (
    About,
    LogPiece,
    files,
    lerobot,
    minari,
    parquet,
    pictures,
    rllib,
)
from mesocosm.data.ingest.readers.lerobot_cameras import INFO
from mesocosm.data.ingest.readers.registry import IN_FOLDERS, READERS, SUFFIXES, TRACES
from mesocosm.data.ingest.readers.traces import TraceOptions, documents
from mesocosm.errors import MesocosmError, UsageError


@dataclass(frozen=True)
class Source:
    """One file of logs, one episode's folder of pictures, or one Minari dataset."""

    format: str
    path: str
    name: str
    """The name that the user gave."""
    traces: TraceOptions = field(default_factory=TraceOptions)

    @functools.cached_property
    def about(self) -> About:
        reader = READERS[self.format]
        return reader.about(self.path) if hasattr(reader, "about") else About()

    @property
    def files(self) -> list[str]:
        return self.about.files or [self.path]

    def stamp(self) -> tuple[int, tuple[str, ...]]:
        """Its size in bytes, and strings that change when its files do."""
        sizes, marks = zip(*map(files.stamp, self.files), strict=True)
        return sum(sizes), marks

    def checksum(self, by_path: Mapping[str, str]) -> str:
        """The sha256 of a file, or one of those of several; of a folder with their names.

        Args:
            by_path: The sha256 of each file.
        """
        sums = [by_path[path] for path in self.files]
        if self.format == "pictures":  # the name of a folder is that of its camera
            names = [os.path.relpath(path, self.path) for path in self.files]
            return fingerprint("source", [names, sums])
        return sums[0] if len(sums) == 1 else fingerprint("source", sums)

    def head(self) -> pa.Table:
        reader = READERS[self.format]
        if self.format in (*TRACES, "pictures"):
            return reader.head(self.path, self.traces)
        return reader.head(self.path)

    def pieces(self, source: int) -> list[LogPiece]:
        ranges = READERS[self.format].pieces(self.path)
        return [
            LogPiece(self.format, source, self.path, begin, end, traces=self.traces)
            for begin, end in ranges
        ]


def read(piece: LogPiece, columns: Sequence[str]) -> Iterator[pa.Table]:
    """The rows of a piece, in batches of bounded size."""
    yield from READERS[piece.format].read(piece, columns)


def sources(words: Sequence[str], fetch: bool, traces: TraceOptions | None = None) -> list[Source]:
    """The files that paths, patterns and folders name, in the order given.

    The files of a pattern or folder are sorted by name, with numbers by value, and so are words in
    alphabetical order, as a shell gives the files of a pattern.

    Args:
        words: As the command line gives them.
        fetch: Download Minari's datasets that are not on this machine.
        traces: How traces of language agents are read.

    Raises:
        UsageError: No file, a file twice, several formats, or an unknown format.
    """
    if not words:
        raise UsageError(
            "no path was given; name files, patterns or folders of Parquet, JSONL or JSON, such as"
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
    return [replace(source, traces=traces or source.traces) for source in sources]


def _sources_of(word: str, fetch: bool) -> list[Source]:
    if word.startswith(minari.PREFIX):
        return [Source("minari", minari.folder(word, fetch), word)]
    if not files.is_remote(word) and os.path.exists(os.path.join(word, INFO)):
        return [Source("lerobot", os.path.abspath(path), path) for path in lerobot.data(word)]
    if not files.is_remote(word) and os.path.isdir(word) and pictures.holds(word):
        return [Source("pictures", os.path.abspath(path), path) for path in pictures.episodes(word)]
    try:
        paths = files.expand(word, IN_FOLDERS) or files.expand(word, [".json"])
        if not paths:
            raise UsageError(
                f"{word!r} must be a file, a folder or a pattern that matches a file that ends in"
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
    if format in ("json", "jsonl"):
        format = _json_format(path, format)
    return Source(format, path if files.is_remote(path) else os.path.abspath(path), path)


def _json_format(path: str, suffix: str) -> str:
    """The format of a file of JSON: of traces, as its first value is, else rows of JSONL."""
    first: Any = None
    with suppress(UsageError):  # the reader of rows names the row
        first = next((value for _, value in documents(path)), None)
    for format, holds in TRACES.items():
        if holds(first):
            return format
    if suffix == "json":
        next(documents(path), None)  # an error of the file itself comes first
        raise UsageError(
            f"{path!r} holds no traces that are known; give chats (objects with messages),"
            " OpenTelemetry spans (resourceSpans) or AgentWorldBench's samples, or rows in JSONL"
        )
    return suffix
