"""Frames of logs: how the columns of a table hold them, and how they are decoded.

    binary                         a PNG or JPEG
    struct<bytes: binary, path>    the same, as Hugging Face's `Image` feature stores it
    FrameType                      made by a reader: a file, a time in a video, or the raw values

Only references (`LoggedFrame`) are held in memory until a frame is checked or written. The first
pass of an import decodes every frame and keeps a digest of it; the second decodes them again,
`CHUNK` at a time, where they are written.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.types as is_
from numpy.typing import NDArray

from mesocosm.data.ingest.video import FrameProblem, Video
from mesocosm.datasets.images import CHUNK
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.extras import fix_missing
from mesocosm.model.tokenizer.frames import as_dtype

Array = NDArray[Any]
OPEN_VIDEOS = 16
"""Videos that are open at a time, one for each camera that is read in turn."""
FORMATS = ("PNG", "JPEG")
MODES = {"RGB": "RGB", "P": "RGB", "L": "L", "1": "L"}
"""The modes of Pillow that are read, and the mode to which each is converted."""


class FrameType(pa.ExtensionType):  # type: ignore[misc]
    """An Arrow type of frames that a reader refers to; see `frame_array`. Never in a file."""

    def __init__(self) -> None:
        fields = [("raw", pa.binary()), ("path", pa.string()), ("seconds", pa.float64())]
        super().__init__(pa.struct(fields), "mesocosm.frame")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: Any, serialized: bytes) -> FrameType:
        return cls()

    def __str__(self) -> str:
        return "frames"


@dataclass(frozen=True, slots=True)
class LoggedFrame:
    """A frame that is not decoded yet: a picture, a file, a place in a video, or values."""

    data: bytes | None = None
    path: str | None = None
    seconds: float | None = None
    """The time in the video at `path`. None if `path` is a picture."""
    raw: bool = False
    """`data` are the values of the frame, in its space's dtype."""


def frame_array(
    *,
    raw: Sequence[bytes] | None = None,
    paths: Sequence[str | None] | None = None,
    seconds: Sequence[float | None] | None = None,
) -> pa.ExtensionArray:
    """A column of frames: values, files (None for a row without one), or times in videos."""
    count = len(raw if raw is not None else paths or ())
    parts = (raw, paths, seconds)
    columns = [
        pa.nulls(count, field.type) if part is None else pa.array(part, field.type)
        for part, field in zip(parts, FrameType().storage_type, strict=True)
    ]
    storage = pa.StructArray.from_arrays(columns, [f.name for f in FrameType().storage_type])
    return pa.ExtensionArray.from_storage(FrameType(), storage)


def is_picture(type: pa.DataType) -> bool:
    """True if a column of this type holds frames."""
    if isinstance(type, FrameType) or is_.is_binary(type):
        return True
    if not is_.is_struct(type) or {field.name for field in type} != {"bytes", "path"}:
        return False
    return bool(is_.is_binary(type.field("bytes").type))


def logged_frames(array: pa.Array) -> tuple[Array, Array]:
    """The frames of a column of pictures: (`LoggedFrame` [B] object, missing [B] bool)."""
    frames = np.full(len(array), LoggedFrame(), object)
    if isinstance(array.type, FrameType):
        parts = [part.to_pylist() for part in array.storage.flatten()]
        for i, (raw, path, seconds) in enumerate(zip(*parts, strict=True)):
            frames[i] = LoggedFrame(raw, path, seconds, raw is not None)
    elif is_.is_struct(array.type):
        for i, row in enumerate(array.to_pylist()):
            named = row is not None and row["bytes"] is None and row["path"] is not None
            frames[i] = LoggedFrame(b"" if named else (row or {}).get("bytes"))
    elif not is_.is_null(array.type):
        for i, data in enumerate(array.to_pylist()):
            frames[i] = LoggedFrame(data)
    missing = [frame.data is None and frame.path is None for frame in frames]
    return frames, np.array(missing, bool)


def raw_frames(values: Array) -> Array:
    """`LoggedFrame` [B] of the values [B, height, width, channels] themselves."""
    frames = np.empty(len(values), object)
    for i, value in enumerate(values):
        frames[i] = LoggedFrame(value.tobytes(), raw=True)
    return frames


def digests(values: Array) -> Array:
    """A digest [B] object for each frame of [B, height, width, channels]."""
    out = np.empty(len(values), object)
    for i, value in enumerate(values):
        out[i] = digest(value)
    return out


def digest(frame: Array) -> bytes:
    """16 bytes that are equal for equal frames only."""
    return hashlib.blake2b(np.ascontiguousarray(frame).tobytes(), digest_size=16).digest()


class FrameDecoder:
    """Decodes frames in any order; consecutive frames of a video are decoded in one go."""

    def __init__(self) -> None:
        self._videos: OrderedDict[str, Video] = OrderedDict()
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))

    def close(self) -> None:
        """Close the videos."""
        self._pool.shutdown()
        while self._videos:
            self._videos.popitem()[1].close()

    def decode(
        self,
        frame: LoggedFrame,
        shape: tuple[int, ...] | None = None,
        dtype: np.dtype[Any] | None = None,
    ) -> Array:
        """One frame [height, width, channels].

        Args:
            frame: The reference.
            shape: The shape that it must have. None for any.
            dtype: The dtype of values that are not encoded, and of the result; uint8 if None.

        Raises:
            FrameProblem: It cannot be read, or has another shape or an alpha channel.
            UsageError: A package or a codec is missing.
        """
        dtype = np.dtype(np.uint8) if dtype is None else dtype
        if frame.raw:
            assert frame.data is not None and shape is not None
            values = np.frombuffer(frame.data, dtype)
            if values.size != np.prod(shape):
                must = f"it must be {list(shape)} in all frames, got {values.size} values"
                raise FrameProblem("wrong shape", must)
            return values.reshape(shape)
        if frame.seconds is not None:
            assert frame.path is not None
            picture = self._video(frame.path).frame(frame.seconds)
        else:
            picture = decode_picture(frame)
        if shape is not None and picture.shape != tuple(shape):
            must = f"it must be {list(shape)} in all frames, got {list(picture.shape)}"
            raise FrameProblem("wrong shape", must)
        return as_dtype(picture, dtype)

    def decode_all(
        self, frames: Sequence[LoggedFrame], shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> Array:
        """[B, height, width, channels], as `decode`; pictures are decoded in parallel."""
        if any(frame.seconds is not None for frame in frames):
            decoded = [self.decode(frame, shape, dtype) for frame in frames]
        else:
            decoded = list(self._pool.map(lambda each: self.decode(each, shape, dtype), frames))
        return np.stack(decoded)

    def _video(self, path: str) -> Video:
        if path not in self._videos:
            if len(self._videos) == OPEN_VIDEOS:
                self._videos.popitem(last=False)[1].close()
            self._videos[path] = Video(path)
        self._videos.move_to_end(path)
        return self._videos[path]


@dataclass(frozen=True)
class FrameStream:
    """The frames of an episode, decoded as they are written: arrays [k, height, width, channels],
    k at most `images.CHUNK`.
    """

    frames: Array
    """`LoggedFrame` [T+1]"""
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    decoder: FrameDecoder
    where: str
    """The episode, for messages."""

    def __iter__(self) -> Iterator[Array]:
        for start in range(0, len(self.frames), CHUNK):
            part = self.frames[start : start + CHUNK]
            try:
                yield self.decoder.decode_all(list(part), self.shape, self.dtype)
            except FrameProblem as problem:
                raise MesocosmError(
                    f"{self.where}: a frame changed while it was imported ({problem}); import"
                    " again when nothing writes to the logs"
                ) from problem


def decode_picture(frame: LoggedFrame) -> Array:
    """A PNG or JPEG as uint8 [height, width, 1 or 3]. Raises FrameProblem."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise UsageError(
            f"pictures are read by the package pillow, which is not installed ({error});"
            f" {fix_missing('PIL')}"
        ) from error
    if frame.data == b"":
        raise FrameProblem(
            "unreadable frame",
            "it is a path without bytes; write the dataset with its pictures embedded",
        )
    source: Any = frame.path if frame.data is None else io.BytesIO(frame.data)
    name = "the picture" if frame.path is None else repr(frame.path)
    try:
        with Image.open(source, formats=FORMATS) as image:
            alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
            if alpha:
                raise FrameProblem("alpha channel", f"{name} has an alpha channel")
            if image.mode not in MODES:
                text = f"{name} is {image.mode}, which is not 8 bits of grey or RGB"
                raise FrameProblem("unreadable frame", text)
            upright = ImageOps.exif_transpose(image)
            array = np.asarray(upright.convert(MODES[image.mode]))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        kinds = " or ".join(FORMATS)
        text = f"{name} cannot be read as {kinds} ({reason})"
        raise FrameProblem("unreadable frame", text) from error
    return array if array.ndim == 3 else array[:, :, None]
