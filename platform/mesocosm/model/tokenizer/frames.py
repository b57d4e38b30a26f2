"""The interface of tokenizers of frames, and their file.

A tokenizer is fitted before a world and then frozen. Its codes are the category slots of an image
(`spec.ImageSpan`): position by position, row by row. Frames that are floats in [0, 1] enter as 256
levels.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class FrameTokenizer(Protocol):
    """Encodes frames of one shape."""

    kind: str
    shape: tuple[int, int, int]
    """[height, width, channels]"""
    grid: tuple[int, int]
    """Positions in a column and in a row."""
    digits: int
    """Codes of a position."""
    sizes: tuple[int, ...]
    """The number of values of each of the n codes of a frame."""

    def encode(self, frames: Array) -> Array:
        """Codes [B, n] int64 of frames uint8 [B, height, width, channels]."""

    def decode(self, codes: Array) -> Array:
        """Frames uint8 [B, height, width, channels] of codes [B, n]."""

    def features(self, codes: Array) -> Array:
        """[B, f] float32 in [-1, 1] of codes [B, n]: the codes as a policy's network reads them."""

    def state(self) -> dict[str, Array]:
        """Its arrays by name, from which `tokenizer_of` makes it again."""


def as_bytes(frames: Array) -> Array:
    """Frames as uint8: floats in [0, 1] become the nearest of 256 levels."""
    if frames.dtype == np.uint8:
        return frames
    return np.rint(np.clip(frames.astype(np.float64), 0.0, 1.0) * 255.0).astype(np.uint8)


def as_dtype(frames: Array, dtype: np.dtype[Any]) -> Array:
    """The inverse of `as_bytes` for frames of a dtype."""
    return frames if dtype == np.uint8 else (frames / 255.0).astype(dtype)


def cut(frames: Array, patch: int) -> Array:
    """Patches [B, n, patch * patch * C] of frames [B, H, W, C], row by row. `patch` divides H and
    W.
    """
    b, h, w, c = frames.shape
    blocks = frames.reshape(b, h // patch, patch, w // patch, patch, c)
    joined = blocks.transpose(0, 1, 3, 2, 4, 5)
    return joined.reshape(b, (h // patch) * (w // patch), patch * patch * c)


def paste(patches: Array, shape: tuple[int, int, int], patch: int) -> Array:
    """Frames [B, H, W, C] of patches [B, n, patch * patch * C]: the inverse of `cut`."""
    h, w, c = shape
    blocks = patches.reshape(-1, h // patch, w // patch, patch, patch, c)
    return blocks.transpose(0, 1, 3, 2, 4, 5).reshape(-1, h, w, c)


def sizes_dtype(sizes: tuple[int, ...]) -> np.dtype[Any]:
    """The smallest unsigned dtype of codes."""
    return np.min_scalar_type(max(sizes, default=1) - 1)
