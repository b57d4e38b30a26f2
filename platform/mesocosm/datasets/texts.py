"""Texts of a dataset: UTF-8 bytes of any length, in one Arrow file per shard.

    shards/00000/texts.arrow    a large_string column (offsets and values) for each Text leaf of the
                                observation, then of the action; one row an observation

In memory the texts of an episode are object arrays of `str`, [rows, leaves]: `TEXTS`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from gymnasium import spaces
from numpy.typing import NDArray

from mesocosm.datasets.images import images_of
from mesocosm.errors import ArtifactError, MesocosmError

Array = NDArray[Any]
TEXTS = ("obs_text", "act_text")
"""The texts of observations and actions, [rows, leaves] of `str`; empty in an episode's last row,
which has no action.
"""
FILE = "texts.arrow"
SHOWN = 60
"""Characters of a text, and of a charset, that a message shows."""


def shown(text: str) -> str:
    """The beginning of a text, for messages."""
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")


def check_text(space: spaces.Text, text: str, name: str) -> None:
    """Raise MesocosmError where UTF-8 cannot hold a text, or it is outside its space.

    Args:
        space: The space of its leaf.
        text: Any string.
        name: The name of its leaf, for the message.
    """
    problem = utf8_problem(text) or text_problem(space, text)
    if problem is not None:
        raise MesocosmError(f"{name}: {problem}")


def utf8_bytes(value: Any) -> int:
    """The UTF-8 bytes of all texts of an observation or action, or of a batch of them."""
    if isinstance(value, str):
        return len(value.encode(errors="surrogatepass"))
    if isinstance(value, Mapping):
        return sum(map(utf8_bytes, value.values()))
    if isinstance(value, tuple | list):
        return sum(map(utf8_bytes, value))
    return 0


def utf8_problem(text: str) -> str | None:
    """The reason why UTF-8 cannot encode a text, and the fix; None if it can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return (
            f"the text holds the lone surrogate {text[error.start]!r} at character {error.start},"
            " which UTF-8 cannot hold; decode the text with errors='replace'"
        )
    return None


def text_problem(space: spaces.Text, text: str) -> str | None:
    """The reason why a text is outside its space, and the fix; None if it is inside."""
    if not space.min_length <= len(text) <= space.max_length:
        limits = f"{space.min_length} to {space.max_length} characters, got {len(text)}"
        fix = "give the space another min_length or max_length"
        return f"the text {shown(text)} must have {limits}; {fix}"
    if unknown := set(text) - space.character_set:
        charset = "".join(sorted(space.character_set))
        return (
            f"the character {min(unknown, key=text.index)!r} of {shown(text)} is not in the charset"
            f" {shown(charset)} of the space (gymnasium's default has letters and digits only);"
            " give Text(..., charset=...) every character that occurs"
        )
    return None


def write_texts(path: Path, names: Sequence[str], texts: Array) -> None:
    """Write the texts of a shard. The same texts give the same bytes.

    Args:
        path: The new file.
        names: The name of each column.
        texts: [rows, columns] of `str`.
    """
    columns = [pa.array(column, pa.large_string()) for column in texts.T]
    schema = pa.schema([pa.field(name, pa.large_string()) for name in names])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema))


def read_texts(path: Path) -> list[pa.Array]:
    """The memory-mapped columns of `write_texts`. Raises ArtifactError if they are damaged."""
    try:
        with pa.memory_map(str(path)) as source:
            return list(pa.ipc.open_file(source).get_batch(0).columns)
    except (OSError, pa.ArrowException) as error:
        fix = "make the dataset again by its job with --force, or restore it from a copy"
        raise ArtifactError(f"{str(path)!r} is missing or damaged ({error}); {fix}") from error


class TextRows:
    """[rows, leaves] texts, decoded where they are read, as an array of `str` would be."""

    def __init__(self, columns: Sequence[pa.Array], rows: int):
        self.columns = list(columns)
        """One large_string array a leaf."""
        self.shape = rows, len(self.columns)
        self.dtype = np.dtype(object)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Array:
        return self.take(np.arange(*rows.indices(len(self))))

    def take(self, at: Array, axis: int = 0) -> Array:
        """The rows `at` [...], as [..., leaves] of `str`. `axis` must be 0."""
        assert axis == 0
        out = np.empty((at.size, self.shape[1]), object)
        places = pa.array(at.reshape(-1), pa.int64())
        for i, column in enumerate(self.columns):
            out[:, i] = column.take(places).to_numpy(zero_copy_only=False)
        return out.reshape(*at.shape, self.shape[1])


def stored(rows: Mapping[str, Array], part: str, end: int | None = None) -> tuple[Array, ...]:
    """The numbers, categories, texts and frames of a part of the rows, for
    `SpaceCodec.decode_stored`.

    Args:
        rows: Of an episode or a shard, by the names in `manifest.ARRAYS` and `TEXTS`.
        part: `obs` or `act`.
        end: The row that ends it; None for all.
    """
    names = [f"{part}_{kind}" for kind in ("num", "cat", "text")]
    if part == "obs":
        names += images_of(rows)
    return tuple(rows[name][:end] for name in names)


def pack(texts: Array) -> tuple[Array, Array]:
    """Texts of any shape as (UTF-8 bytes, uint8; the end of each text in them, int64)."""
    parts = [text.encode() for text in texts.reshape(-1)]
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64).reshape(texts.shape)
    return np.frombuffer(b"".join(parts), np.uint8), ends


def unpack(values: Array, ends: Array) -> Array:
    """The texts that `pack` gave."""
    whole, flat = values.tobytes(), ends.reshape(-1).tolist()
    out = np.empty(len(flat), object)
    for i, (start, end) in enumerate(itertools.pairwise([0, *flat])):
        out[i] = whole[start:end].decode()
    return out.reshape(ends.shape)
