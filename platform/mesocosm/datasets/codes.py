"""Codes of frames, encoded where they are read."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesocosm.datasets.images import ImageRows
from mesocosm.model.tokenizer.frames import FrameTokenizer, as_bytes, sizes_dtype

Array = NDArray[Any]


class CodeRows:
    """[rows, n] codes of frames, as an array of them would be."""

    def __init__(self, frames: ImageRows, tokenizer: FrameTokenizer):
        self._frames, self._tokenizer = frames, tokenizer
        self.shape = len(frames), len(tokenizer.sizes)
        self.dtype = sizes_dtype(tokenizer.sizes)

    def __len__(self) -> int:
        return self.shape[0]

    def take(self, at: Array, axis: int = 0) -> Array:
        """The rows `at` [...], as [..., n] codes. `axis` must be 0."""
        assert axis == 0
        distinct, places = np.unique(at.reshape(-1), return_inverse=True)
        codes = self._tokenizer.encode(as_bytes(self._frames.take(distinct)))
        return codes.astype(self.dtype)[places].reshape(*at.shape, self.shape[1])
