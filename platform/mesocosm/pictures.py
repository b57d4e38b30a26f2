"""Pictures as addresses that a page can show."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesocosm.errors import UsageError

CHANNELS = {1: 0, 3: 2, 4: 6}
"""PNG's colour type by the number of channels: grey, RGB, RGBA."""


def png(picture: NDArray[Any]) -> bytes:
    """A picture as a PNG (RFC 2083), lossless.

    Args:
        picture: [height, width] or [height, width, 1, 3 or 4], uint8.

    Raises:
        UsageError: It is of another shape or dtype.
    """
    array = picture[..., None] if picture.ndim == 2 else picture
    valid = array.dtype == np.uint8 and array.ndim == 3 and array.size
    if not valid or array.shape[2] not in CHANNELS:
        raise UsageError(
            "a picture must be a uint8 array [height, width, 1, 3 or 4], got"
            f" {picture.dtype} {list(picture.shape)}"
        )
    height, width, channels = array.shape
    rows = np.zeros((height, 1 + width * channels), np.uint8)  # filter 0 before each row
    rows[:, 1:] = array.reshape(height, -1)
    head = struct.pack(">IIBBBBB", width, height, 8, CHANNELS[channels], 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows.tobytes(), 3)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def address(picture: NDArray[Any]) -> str:
    """A picture as a `data:` address. Raises UsageError as `png` does."""
    return f"data:image/png;base64,{base64.b64encode(png(picture)).decode()}"
