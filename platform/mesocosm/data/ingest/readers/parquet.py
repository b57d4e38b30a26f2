"""Parquet files. Pieces are row groups, which are read in batches to bound the memory.

Dictionaries are read as their values, decimals as float64, views and fixed-size lists as lists.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as is_

from mesocosm.data.ingest.readers import BATCH_BYTES, BATCH_ROWS, LogPiece
from mesocosm.data.ingest.readers.files import opened, remote
from mesocosm.errors import UsageError

HEAD_ROWS = 1000
PIECE_ROWS = 1 << 17


def head(path: str) -> pa.Table:
    with _open(path) as (file, schema):
        batches = list(itertools.islice(file.iter_batches(HEAD_ROWS), 1))
        return pa.Table.from_batches(batches, file.schema_arrow).cast(schema)


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
        groups = range(piece.begin, piece.end)
        bytes = sum(file.metadata.row_group(i).total_byte_size for i in groups)
        rows = max(sum(file.metadata.row_group(i).num_rows for i in groups), 1)
        size = max(1, min(BATCH_ROWS, BATCH_BYTES * rows // max(bytes, 1)))
        names = [name for name in columns if name in schema.names]
        types = pa.schema([schema.field(name) for name in names])
        for batch in file.iter_batches(size, row_groups=list(groups), columns=names):
            yield pa.Table.from_batches([batch]).select(names).cast(types)


@contextmanager
def _open(path: str) -> Iterator[tuple[pq.ParquetFile, pa.Schema]]:
    """(file, its columns with the types that they are read as)."""
    try:
        with opened(path) as raw, pq.ParquetFile(raw if remote(path) else path) as file:
            schema = file.schema_arrow
            plain = pa.schema([field.with_type(_plain(field.type)) for field in schema])
            if not any(_fixed(field.type) for field in schema):
                yield file, plain
                return
            with pq.ParquetFile(
                raw if remote(path) else path, metadata=_without_arrow_schema(raw)
            ) as untyped:
                yield untyped, plain
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
    if is_.is_string_view(type):
        return pa.string()
    if is_.is_struct(type):
        return pa.struct([field.with_type(_plain(field.type)) for field in type])
    if _is_list(type):
        field = type.value_field
        return pa.list_(field.with_type(_plain(field.type)))
    return type


def _is_list(type: pa.DataType) -> bool:
    lists = (pa.ListType, pa.LargeListType, pa.FixedSizeListType, pa.ListViewType)
    return isinstance(type, (*lists, pa.LargeListViewType))


def _fixed(type: pa.DataType) -> bool:
    """True if the type is or contains a fixed-size list."""
    if is_.is_struct(type):
        return any(_fixed(field.type) for field in type)
    return is_.is_fixed_size_list(type) or (_is_list(type) and _fixed(type.value_type))


def _without_arrow_schema(raw: IO[bytes]) -> pq.FileMetaData:
    """The metadata of a file without the Arrow types of its columns.

    Arrow cannot read a null among fixed-size lists (apache/arrow#35692: "Expected all lists to be
    of size=2"). Without the Arrow types the same column is of lists, which can be null.
    """
    raw.seek(-8, os.SEEK_END)
    size = int.from_bytes(raw.read(4), "little")
    raw.seek(-8 - size, os.SEEK_END)
    footer = raw.read(size + 8).replace(b"ARROW:schema", b"arrow-schema")
    raw.seek(0)
    return pq.read_metadata(pa.BufferReader(b"PAR1" + footer))
