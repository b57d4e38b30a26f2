"""Short texts as slots of characters, for families of tensors (`model.spec.TextSpan`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from mesocosm.datasets.texts import TextRows

Array = NDArray[Any]
LONGEST = 512
"""The most characters of a text that has slots."""
MOST = 1 << 18
"""The most categories that all slots of a text have together."""
IN_MEMORY = 1 << 28
"""The most bytes of a dataset's slots that are held in memory; of more, rows are read as needed."""
BLOCK = 4096
"""Rows whose slots are made at once."""


def has_slots(space: gymnasium.Space[Any]) -> bool:
    """True if a text is short enough, and its charset small enough, for slots."""
    assert isinstance(space, spaces.Text)
    size = space.max_length * (len(space.character_set) + 1)
    return space.max_length <= LONGEST and size <= MOST


def encode_texts(characters: Array, width: int, texts: Array) -> Array:
    """Slots of texts.

    Args:
        characters: The sorted code points of the charset, uint32.
        width: L, the most characters of a text.
        texts: [B] of `str`, checked.

    Returns:
        [B, L] int64: 0 after the end of a text, else 1 + the position in `characters`.
    """
    padded = "".join(text.ljust(width, "\0") for text in texts)
    codes = np.frombuffer(padded.encode("utf-32-le"), "<u4").reshape(len(texts), width)
    # A table is ten times as fast as a binary search.
    table = np.zeros(int(characters.max(initial=0)) + 1, np.int64)
    table[characters] = np.arange(1, len(characters) + 1)
    slots = table[codes]
    if table[0]:  # the padding is a character of this charset
        ends = np.array([len(text) for text in texts], np.int64)
        slots[np.arange(width) >= ends[:, None]] = 0
    return slots


def decode_texts(characters: Array, min_length: int, codes: Array) -> tuple[str, ...]:
    """The texts of slots [B, L]. One that ends before `min_length` continues with the first
    character.

    Args:
        characters: The sorted code points of the charset, uint32.
        min_length: The fewest characters of a text.
        codes: [B, L] as `encode_texts` gives them.
    """
    width = codes.shape[1]
    if width == 0 or not len(characters):
        return ("",) * len(codes)
    ended = codes == 0
    ended[:, :min_length] = False
    lengths = np.where(ended.any(1), ended.argmax(1), width)
    points = np.concatenate([characters[:1], characters])[np.clip(codes, 0, len(characters))]
    text = points.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")
    return tuple(text[i * width : i * width + length] for i, length in enumerate(lengths.tolist()))


class SlotRows:
    """[rows, m] categories whose texts become slots of characters where they are read, and images
    slots of codes.
    """

    def __init__(
        self,
        plain: Array,
        texts: TextRows,
        cardinalities: tuple[int, ...],
        slots: Callable[[Array, Array, Sequence[Array]], Array],
        codes: Sequence[Any] = (),
    ):
        self._plain, self._texts, self._slots, self._codes = plain, texts, slots, codes
        self.shape = len(plain), len(cardinalities)
        self.dtype = np.min_scalar_type(max(cardinalities, default=1) - 1)
        self.nbytes = self.shape[0] * self.shape[1] * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Array:
        return self.take(np.arange(*rows.indices(len(self))))

    def whole(self) -> Array:
        """All rows, [rows, m]."""
        out = np.empty(self.shape, self.dtype)
        for start in range(0, len(self), BLOCK):
            out[start : start + BLOCK] = self[start : start + BLOCK]
        return out

    def take(self, at: Array, axis: int = 0) -> Array:
        """The rows `at` [...], as [..., m] categories. `axis` must be 0."""
        assert axis == 0
        flat = at.reshape(-1)
        codes = [rows.take(flat, axis=0) for rows in self._codes]
        slots = self._slots(self._plain.take(flat, axis=0), self._texts.take(flat), codes)
        return slots.astype(self.dtype).reshape(*at.shape, self.shape[1])
