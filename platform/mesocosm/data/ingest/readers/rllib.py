"""Episodes that RLlib (new API stack, Ray 2.60) recorded with `output_write_episodes`.

They are Parquet files with one column, `item`. A row is the state of a `SingleAgentEpisode`, by
msgpack with arrays in msgpack-numpy's form. Nothing is unpickled. The parts of a long episode must
follow each other: record with batch_mode="complete_episodes".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgpack
import numpy as np
import pyarrow as pa
from gymnasium.spaces import Box

from mesocosm.data.ingest.readers import About, LogPiece, parquet
from mesocosm.data.ingest.values import RowError
from mesocosm.datasets.parquet import arrow

ITEM = "item"
ACTION = (
    "as RLlib's module gave it: of a Box it is scaled to [-1, 1] and not clipped, unless"
    " normalize_actions=False was set when it was recorded"
)

pieces = parquet.pieces


def holds(schema: pa.Schema) -> bool:
    """True if a Parquet file of this schema holds RLlib's episodes."""
    return schema.names == [ITEM] and schema.field(ITEM).type == pa.binary()


def about(path: str) -> About:
    return About(notes={"action": ACTION})


def head(path: str) -> pa.Table:
    for item in parquet.head(path).column(ITEM).to_pylist():
        table = _table(item, 0)
        if table is not None:
            return table
    return pa.table({})


def read(piece: LogPiece, columns: Sequence[str]) -> Iterator[pa.Table]:
    done = 0
    for batch in parquet.read(piece, [ITEM]):
        for item in batch.column(ITEM).to_pylist():
            table = _table(item, done)
            if table is not None:
                yield table.select([name for name in columns if name in table.column_names])
                done += table.num_rows


def _table(item: bytes, done: int) -> pa.Table | None:
    """One row per step. None for an episode without steps."""
    try:
        state = msgpack.unpackb(item, object_hook=_decoded, strict_map_key=False)
        # A buffer begins with items of the previous part (`lookback`).
        buffers = [state[name] for name in ("observations", "actions", "rewards")]
        observations, actions, rewards = (
            _unstacked(buffer["data"])[int(buffer["lookback"]) :] for buffer in buffers
        )
        length = len(rewards)
        if not length:
            return None
        last = np.arange(length) == length - 1
        first = int(state["t_started"])
        return pa.table(
            {
                "episode": pa.array([str(state["id_"])] * length),
                "step": pa.array(np.arange(first, first + length)),
                "observation": _arrow(observations[:length]),
                "action": _arrow(actions[:length]),
                "reward": pa.array(np.asarray(rewards, np.float64)),
                "terminated": pa.array(last & bool(state["is_terminated"])),
                "truncated": pa.array(last & bool(state["is_truncated"])),
                "next_observation": _arrow(observations[1 : length + 1]),
            }
        )
    except (ValueError, LookupError, TypeError, msgpack.UnpackException) as error:
        cause = f"{type(error).__name__}: {error}"
        fix = "record it with Ray 2.60's output_write_episodes"
        raise RowError(done, f"the episode cannot be read ({cause}); {fix}") from error


def _unstacked(data: Any) -> list[Any]:
    """The items of a finalised buffer, whose arrays have a leading dimension."""
    if isinstance(data, dict):
        columns = {key: _unstacked(value) for key, value in data.items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return list(data)


def _arrow(values: Sequence[Any]) -> pa.Array:
    first = values[0]
    if isinstance(first, list | tuple) and first and isinstance(first[0], np.ndarray | dict | str):
        values = [dict(enumerate(value)) for value in values]
        first = values[0]
    if isinstance(first, dict):
        parts = [_arrow([value[key] for value in values]) for key in first]
        return pa.StructArray.from_arrays(parts, list(map(str, first)))
    if isinstance(first, str):
        return pa.array(values)
    return arrow(Box(0, 1), np.stack([np.asarray(value) for value in values]))


def _decoded(value: dict[Any, Any]) -> Any:
    """Decode an array or scalar of msgpack-numpy. Object arrays, which it pickles, stay encoded."""
    if b"nd" not in value or value.get(b"kind") == b"O":
        return value
    array = np.frombuffer(value[b"data"], np.dtype(value[b"type"]))
    return array.reshape(value[b"shape"]) if value[b"nd"] else array[0]
