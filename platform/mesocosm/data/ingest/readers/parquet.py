"""Parquet files. Pieces are row groups, which are read in batches to bound the memory.

Decimals are read as float64, dictionaries as their values, fixed-size lists and views as lists.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as is_

from mesocosm.data.ingest.readers import BATCH_BYTES, BATCH_ROWS, LogPiece
from mesocosm.data.ingest.readers.files import is_remote, open_file
from mesocosm.errors import UsageError

HEAD_ROWS = 1000
PIECE_ROWS = 1 << 17


def head(path: str) -> pa.Table:
    with _open(path) as (file, schema):
        size = _batch_rows(file, range(file.num_row_groups), HEAD_ROWS)
        batch = next(file.iter_batches(size), None)
        return (
            schema.empty_table() if batch is None else pa.Table.from_batches([batch]).cast(schema)
        )


def pieces(path: str) -> list[tuple[int, int]]:
    """Small row groups are read together, since a task has a cost."""
    with _open(path) as (file, _):
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    ranges: list[tuple[int, int]] = []
    begin = rows = 0
    for i, size in enumerate(sizes):
        rows += size
        if rows >= PIECE_ROWS or i == len(sizes) - 1:
            ranges.append((begin, i + 1))
            begin, rows = i + 1, 0
    return ranges


def read(piece: LogPiece, columns: Sequence[str]) -> Iterator[pa.Table]:
    with _open(piece.path) as (file, schema):
        numbers = list(range(piece.begin, piece.end))
        size = _batch_rows(file, numbers, BATCH_ROWS)
        names = [name for name in columns if name in schema.names]
        types = pa.schema([schema.field(name) for name in names])
        for batch in file.iter_batches(size, row_groups=numbers, columns=names):
            yield pa.Table.from_batches([batch]).select(names).cast(types)


def _batch_rows(file: pq.ParquetFile, numbers: Sequence[int], most: int) -> int:
    """The rows of these row groups that are read at a time, at most `most`."""
    groups = [file.metadata.row_group(i) for i in numbers]
    bytes, rows = sum(g.total_byte_size for g in groups), sum(g.num_rows for g in groups)
    return max(1, min(most, BATCH_BYTES * rows // max(bytes, 1)))


@contextmanager
def _open(path: str) -> Iterator[tuple[pq.ParquetFile, pa.Schema]]:
    """(file, its columns with the types that they are read as).

    The file is read without the Arrow types of its columns, as Arrow cannot read a null among
    fixed-size lists (apache/arrow#35692: "Expected all lists to be of size=2").
    """
    try:
        with open_file(path) as raw:
            # This comes first, because it explains the fault of a file that is cut or has another
            # format.
            schema = pq.read_schema(raw)
            raw.seek(-8, os.SEEK_END)
            size = int.from_bytes(raw.read(4), "little")
            raw.seek(-8 - size, os.SEEK_END)
            footer = raw.read(size + 8).replace(b"ARROW:schema", b"arrow-schema")
            metadata = pq.read_metadata(pa.BufferReader(b"PAR1" + footer))
            types = [field.with_type(_plain(field.type)) for field in schema]
            with pq.ParquetFile(raw if is_remote(path) else path, metadata=metadata) as file:
                yield file, pa.schema(types)
    except (OSError, pa.ArrowException) as error:
        raise UsageError(
            f"{path!r} cannot be read as Parquet ({' '.join(str(error).split())}); write it again,"
            " or leave it out"
        ) from error


def _plain(type: pa.DataType) -> pa.DataType:
    if is_.is_dictionary(type):
        return _plain(type.value_type)
    if is_.is_decimal(type):
        return pa.float64()
    if is_.is_struct(type):
        return pa.struct([field.with_type(_plain(field.type)) for field in type])
    if hasattr(type, "value_field"):  # lists of all kinds
        return pa.list_(type.value_field.with_type(_plain(type.value_type)))
    if type in (pa.large_string(), pa.string_view()):
        return pa.string()
    return pa.binary() if type in (pa.large_binary(), pa.binary_view()) else type
