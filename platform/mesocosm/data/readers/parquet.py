"""Parquet files: pieces are row groups, which are read in batches, so that a large one is never in memory whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from mesocosm.data.readers import BATCH_BYTES, BATCH_ROWS, Piece
from mesocosm.data.readers.files import opened, remote
from mesocosm.errors import UsageError

HEAD_ROWS = 1000
PIECE_ROWS = 1 << 17


def head(path: str) -> pa.Table:
    with _open(path) as file:
        first = next(file.iter_batches(HEAD_ROWS), None)
        return file.schema_arrow.empty_table() if first is None else pa.Table.from_batches([first])


def pieces(path: str) -> list[tuple[int, int]]:
    """Small row groups together, so that a task has something to do."""
    with _open(path) as file:
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    found: list[tuple[int, int]] = []
    begin = rows = 0
    for i, size in enumerate(sizes):
        rows += size
        if rows >= PIECE_ROWS or i == len(sizes) - 1:
            found.append((begin, i + 1))
            begin, rows = i + 1, 0
    return found


def read(piece: Piece, columns: Sequence[str]) -> Iterator[pa.Table]:
    with _open(piece.path) as file:
        groups = range(piece.begin, piece.end)
        bytes = sum(file.metadata.row_group(i).total_byte_size for i in groups)
        rows = max(sum(file.metadata.row_group(i).num_rows for i in groups), 1)
        size = max(1, min(BATCH_ROWS, BATCH_BYTES * rows // max(bytes, 1)))
        wanted = [name for name in columns if name in file.schema_arrow.names]
        for batch in file.iter_batches(size, row_groups=list(groups), columns=wanted):
            yield pa.Table.from_batches([batch])


@contextmanager
def _open(path: str) -> Iterator[pq.ParquetFile]:
    try:
        with opened(path) as raw, pq.ParquetFile(raw if remote(path) else path) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{path!r} cannot be read as Parquet ({' '.join(str(error).split())}); write it again, or leave it out") from error
