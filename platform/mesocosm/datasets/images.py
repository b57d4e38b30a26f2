"""Images of a dataset: one rule for spaces, and lossless chunks of frames on disk.

A Box is an image if it has exactly three dimensions [height, width, channels] with 1 channel (grey)
or 3 (red, green, blue), and its values are uint8, or floats whose bounds are 0 and 1. Any other
uint8 Box of three or more dimensions, such as a stack of frames [k, height, width] or a picture
with an alpha channel, is refused: a world keeps the history itself, so that the newest frame is
enough. Any other Box holds numbers.

    shards/00000/obs_image0.bin      the first image leaf: zstd chunks of CHUNK consecutive rows
    shards/00000/obs_image0.idx.npy  [chunks + 1] int64: where each chunk begins, and the last ends

In memory the frames of an episode are an array [rows, height, width, channels] a leaf
(`image_names`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import gymnasium
import numpy as np
import pyarrow as pa
from gymnasium import spaces
from numpy.typing import NDArray

from mesocosm.errors import ArtifactError, UsageError

Array = NDArray[Any]
Space = gymnasium.Space[Any]
CHUNK = 16
"""Rows that are compressed together, and that reading one of them decompresses."""
CACHED = 64
"""Decompressed chunks of a leaf that are held in memory."""
CHANNELS = (1, 3)


def is_image(space: Space) -> bool:
    """True if a space is an image, by the rule above."""
    if not isinstance(space, spaces.Box) or len(space.shape) != 3:
        return False
    if space.shape[2] not in CHANNELS or min(space.shape) < 1:
        return False
    unit = bool((space.low == 0).all() and (space.high == 1).all())
    return space.dtype == np.uint8 or (np.dtype(space.dtype).kind == "f" and unit)


def check_layout(space: Space, name: str) -> None:
    """Raise UsageError where a space holds pictures in another layout than the rule's.

    Args:
        space: The space of a leaf.
        name: Its name, for the message.
    """
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8 or len(space.shape) < 3:
        return
    if is_image(space):
        return
    shape = space.shape
    if len(shape) == 3 and shape[0] in CHANNELS:
        problem, fix = "its channels come first", "transpose it to [height, width, channels]"
    elif len(shape) == 3 and shape[2] == 4:
        problem = "it has an alpha channel or is a stack of 4 frames"
        fix = "drop the alpha channel, or give the newest frame, with a wrapper"
    else:
        problem = "it is a stack of frames, or has another layout"
        fix = "give the newest frame, with a wrapper: a world keeps the history itself"
    raise UsageError(
        f"{name} must be [height, width, channels] with 1 or 3 channels to be an image, got shape"
        f" {list(shape)}: {problem}; {fix}"
    )


def image_spaces(space: Space) -> list[Any]:
    """The images of a space, in order."""
    if is_image(space):
        return [space]
    if isinstance(space, spaces.Dict):
        return [leaf for child in space.spaces.values() for leaf in image_spaces(child)]
    if isinstance(space, spaces.Tuple):
        return [leaf for child in space.spaces for leaf in image_spaces(child)]
    return []


def with_images(space: Space, replacements: Iterator[Space]) -> Space:
    """The space with another one in place of each image, in order."""
    if is_image(space):
        return next(replacements)
    if isinstance(space, spaces.Dict):  # pairs keep their order; gymnasium sorts a dict
        return spaces.Dict([(k, with_images(v, replacements)) for k, v in space.spaces.items()])
    if isinstance(space, spaces.Tuple):
        return spaces.Tuple([with_images(child, replacements) for child in space.spaces])
    return space


def image_values(space: Space, batch: Any) -> list[Any]:
    """The values of each image of a batch in vector layout, in order."""
    if is_image(space):
        return [batch]
    if isinstance(space, spaces.Dict):
        return [v for k, child in space.spaces.items() for v in image_values(child, batch[k])]
    if isinstance(space, spaces.Tuple):
        pairs = zip(space.spaces, batch, strict=True)
        return [value for child, part in pairs for value in image_values(child, part)]
    return []


def with_image_values(space: Space, batch: Any, values: Iterator[Any]) -> Any:
    """A batch in vector layout with other values in place of each image, in order."""
    if is_image(space):
        return next(values)
    if isinstance(space, spaces.Dict):
        items = space.spaces.items()
        return {key: with_image_values(child, batch[key], values) for key, child in items}
    if isinstance(space, spaces.Tuple):
        pairs = zip(space.spaces, batch, strict=True)
        return tuple(with_image_values(child, part, values) for child, part in pairs)
    return batch


def image_names(count: int) -> list[str]:
    """The names of an observation's `count` image leaves among the arrays of rows."""
    return [f"obs_image{i}" for i in range(count)]


def images_of(rows: Mapping[str, Array]) -> list[str]:
    """The names of the image leaves that `rows` holds, in order."""
    return [name for name in rows if name.startswith("obs_image")]


def zstd() -> Any:
    """The codec of frames. Raises UsageError where pyarrow was built without it."""
    if not pa.Codec.is_available("zstd"):
        raise UsageError(
            "images need pyarrow with zstd, which this build of pyarrow lacks; install pyarrow from"
            " its wheel (pip install --force-reinstall pyarrow)"
        )
    return pa.Codec("zstd")


class FrameWriter:
    """Compresses the frames of one leaf as they arrive. Fewer than CHUNK raw frames are in memory.

    The same frames give the same bytes, however they are split over calls of `add`.

    Args:
        path: The file for the chunks, written as they come. None keeps them in memory.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._codec = zstd()
        self._path = path
        self._rest: Array | None = None
        self._chunks: list[bytes] = []
        """The compressed chunks, if there is no file."""
        self._ends = [0]
        self._file: IO[bytes] | None = None

    @property
    def size(self) -> int:
        """The bytes of the compressed chunks."""
        return self._ends[-1]

    def add(self, frames: Array) -> None:
        """Append frames [k, height, width, channels]."""
        if self._rest is not None:
            frames = np.concatenate([self._rest, frames])
        whole = len(frames) - len(frames) % CHUNK
        for start in range(0, whole, CHUNK):
            self._compress(frames[start : start + CHUNK])
        self._rest = frames[whole:].copy() if whole < len(frames) else None

    def _compress(self, frames: Array) -> None:
        chunk = self._codec.compress(np.ascontiguousarray(frames).tobytes(), asbytes=True)
        self._ends.append(self._ends[-1] + len(chunk))
        if self._path is None:
            self._chunks.append(chunk)
            return
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("wb")
        self._file.write(chunk)

    def close(self) -> tuple[bytes, Array]:
        """Compress the rest.

        Returns:
            (all chunks, or b"" if they are in a file; the offsets of each chunk and of the end
            [chunks + 1] int64).
        """
        if self._rest is not None:
            self._compress(self._rest)
            self._rest = None
        if self._file is not None:
            self._file.close()
        return b"".join(self._chunks), np.array(self._ends, np.int64)

    def write_index(self) -> None:
        """Close the file, and write the offsets next to it."""
        assert self._path is not None
        offsets = self.close()[1]
        np.save(self._path.with_suffix(".idx.npy"), offsets, allow_pickle=False)


class ImageRows:
    """[rows, height, width, channels] frames, decompressed where they are read, as an array.

    Args:
        source: The chunks of `FrameWriter`.
        offsets: [chunks + 1] their offsets.
        rows: The number of frames.
        space: The leaf's Box.
        where: Where they are from, for messages.
    """

    def __init__(self, source: Any, offsets: Array, rows: int, space: Any, where: str):
        self._source, self._offsets, self._where = source, offsets, where
        self.shape: tuple[int, ...] = (rows, *space.shape)
        self.dtype = np.dtype(space.dtype)
        self._codec = zstd()
        self._cache: OrderedDict[int, Array] = OrderedDict()
        if len(offsets) - 1 != -(-rows // CHUNK) or len(source) != int(offsets[-1]):
            raise _damaged(where, "its chunks do not fit its index")

    @staticmethod
    def open(folder: Path, name: str, rows: int, space: Any) -> ImageRows:
        """The frames of a leaf in the folder of a shard, memory-mapped.

        Raises:
            ArtifactError: A file is missing or damaged.
        """
        path = folder / f"{name}.bin"
        try:
            offsets = np.load(folder / f"{name}.idx.npy", allow_pickle=False)
            with pa.memory_map(str(path)) as file:
                source = file.read_buffer()
        except (OSError, ValueError, EOFError, pa.ArrowException) as error:
            raise _damaged(str(path), str(error)) from error
        return ImageRows(source, offsets, rows, space, str(path))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Array:
        return self.take(np.arange(*rows.indices(len(self))))

    def take(self, at: Array, axis: int = 0) -> Array:
        """The rows `at` [...], as [..., height, width, channels]. `axis` must be 0."""
        assert axis == 0
        flat = at.reshape(-1)
        out = np.empty((len(flat), *self.shape[1:]), self.dtype)
        chunks = flat // CHUNK
        order = np.argsort(chunks, kind="stable")
        bounds = np.flatnonzero(np.diff(chunks[order])) + 1
        for places in np.split(order, bounds) if len(flat) else ():
            number = int(chunks[places[0]])
            out[places] = self._chunk(number)[flat[places] - number * CHUNK]
        return out.reshape(*at.shape, *self.shape[1:])

    def _chunk(self, number: int) -> Array:
        if number in self._cache:
            self._cache.move_to_end(number)
            return self._cache[number]
        start, end = int(self._offsets[number]), int(self._offsets[number + 1])
        count = min(CHUNK, len(self) - number * CHUNK)
        size = count * int(np.prod(self.shape[1:])) * self.dtype.itemsize
        try:
            raw = self._codec.decompress(self._source[start:end], size, asbytes=True)
            frames = np.frombuffer(raw, self.dtype).reshape(count, *self.shape[1:])
        except (OSError, ValueError, pa.ArrowException) as error:
            raise _damaged(self._where, f"chunk {number}: {error}") from error
        self._cache[number] = frames
        if len(self._cache) > CACHED:
            self._cache.popitem(last=False)
        return frames


def pack_frames(name: str, parts: Sequence[Array]) -> dict[str, Array]:
    """The frames [k, height, width, channels] of several arrays, compressed, as arrays by name: the
    chunks, their offsets, and one black frame that tells shape and dtype.
    """
    writer, rows = FrameWriter(), sum(map(len, parts))
    for part in parts:
        writer.add(part)
    chunks, offsets = writer.close()
    frame = np.zeros(parts[0].shape[1:], parts[0].dtype)
    about = {"chunks": np.frombuffer(chunks, np.uint8), "offsets": offsets, "rows": np.array(rows)}
    return {name: frame} | {f"{name}_{part}": array for part, array in about.items()}


def unpack_frames(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The frames [rows, height, width, channels] by name that `pack_frames` compressed."""
    frames: dict[str, Array] = {}
    for name in (name for name in arrays if name.removeprefix("obs_image").isdigit()):
        chunks, offsets, rows = (arrays[f"{name}_{part}"] for part in ("chunks", "offsets", "rows"))
        frame = arrays[name]
        box = spaces.Box(0, 1, frame.shape, frame.dtype.type)
        frames[name] = ImageRows(chunks.tobytes(), offsets, int(rows), box, "a segment")[:]
    return frames


def _damaged(where: str, problem: str) -> ArtifactError:
    fix = "make the dataset again by its job with --force, or restore it from a copy"
    return ArtifactError(f"{where!r} is missing or damaged ({problem}); {fix}")
