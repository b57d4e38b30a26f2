"""A dictionary of patches: the code of a patch is its place in a table, or that of the nearest one.

It is exact, without any training, if frames are composed of few patches: sprites, tiles and screens
(nearest neighbours as a tokenizer: Dedieu et al. 2025, arXiv 2502.01591). Codes are only ever
appended, so that the codes of a dictionary keep their meaning in all that grow from it.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesocosm.model.tokenizer.frames import cut, paste

Array = NDArray[Any]
INDICATORS = 16
"""The most codes of a dictionary that a policy's network reads as indicators."""
BLOCK = 1024
"""Patches without a code whose distances to all codes are computed at once."""


class PatchDictionary:
    """Made by `data.tokens.fit` or from its state.

    Args:
        shape: [height, width, channels] of a frame.
        patch: Pixels of a patch's side, which divides height and width.
        table: uint8 [V, patch * patch * channels], all different.
    """

    kind = "dictionary"
    digits = 1

    def __init__(self, shape: tuple[int, int, int], patch: int, table: Array):
        self.shape, self.patch, self.table = shape, patch, table
        self.grid = shape[0] // patch, shape[1] // patch
        self.sizes = (len(table),) * (self.grid[0] * self.grid[1])
        hashes = hashed(table)
        self._order = np.argsort(hashes, kind="stable")
        self._sorted = hashes[self._order]
        self._wide = table.astype(np.float64)
        self._squares = (self._wide**2).sum(1)

    def encode(self, frames: Array) -> Array:
        """Codes [B, n] int64 of frames uint8 [B, height, width, channels]."""
        return self.lookup(frames)[0]

    def lookup(self, frames: Array) -> tuple[Array, Array]:
        """(codes [B, n] int64, [B, n] bool: the patch has a code of its own). A patch without one
        has the code of the nearest patch, by the sum of squared differences, the first of equals.
        """
        patches = cut(frames, self.patch)
        flat = patches.reshape(-1, patches.shape[-1])
        codes, known = self._places(flat)
        missed = np.flatnonzero(~known)
        for start in range(0, len(missed), BLOCK):
            some = missed[start : start + BLOCK]
            distances = self._squares - 2 * flat[some].astype(np.float64) @ self._wide.T
            codes[some] = distances.argmin(1)
        return codes.reshape(patches.shape[:2]), known.reshape(patches.shape[:2])

    def known(self, patches: Array) -> Array:
        """[N] bool: which patches uint8 [N, bytes] have a code of their own."""
        return self._places(patches)[1]

    def _places(self, patches: Array) -> tuple[Array, Array]:
        """(codes [N], which of them are right [N])"""
        places = np.searchsorted(self._sorted, hashed(patches)).clip(max=len(self.table) - 1)
        codes = self._order[places]
        return codes, (self.table[codes] == patches).all(1)

    def decode(self, codes: Array) -> Array:
        """Frames uint8 [B, height, width, channels] of codes [B, n]."""
        return paste(self.table[codes], self.shape, self.patch)

    def features(self, codes: Array) -> Array:
        """[B, n * f] float32 in [-1, 1] of codes [B, n]: an indicator of each code, where there are
        few; else the means of each channel in the four quarters of its patch.
        """
        return self._features[codes].reshape(len(codes), -1)

    @cached_property
    def _features(self) -> Array:
        """[V, f] float32"""
        if len(self.table) <= INDICATORS:
            return np.eye(len(self.table), dtype=np.float32)
        pixels = self.table.reshape(len(self.table), self.patch, self.patch, self.shape[2])
        middle = self.patch // 2
        halves = [slice(None)] if not middle else [slice(middle), slice(middle, None)]
        means = [pixels[:, rows, columns].mean((1, 2)) for rows in halves for columns in halves]
        return (np.concatenate(means, 1) / 127.5 - 1).astype(np.float32)

    def state(self) -> dict[str, Array]:
        """The table, the patch's side and the frame's shape."""
        return {
            "table": self.table,
            "patch": np.array(self.patch),
            "shape": np.array(self.shape, np.int64),
        }

    @staticmethod
    def of(state: dict[str, Array]) -> PatchDictionary:
        """The dictionary of a state."""
        height, width, channels = state["shape"].tolist()
        return PatchDictionary((height, width, channels), state["patch"].item(), state["table"])


def hashed(patches: Array) -> Array:
    """[N] uint64: a hash of each of the rows uint8 [N, bytes].

    Words of 8 bytes are mixed by two multiplications and a shift, as in MurmurHash3, with other
    factors for each place, and added up.
    """
    spare = -patches.shape[1] % 8
    padded = np.pad(patches, ((0, 0), (0, spare))) if spare else np.ascontiguousarray(patches)
    words = padded.view(np.uint64)
    factors = np.random.default_rng(0).integers(0, 2**63, (2, words.shape[1]), np.int64)
    first, second = factors.astype(np.uint64) * np.uint64(2) + np.uint64(1)
    mixed = words * first
    mixed ^= mixed >> np.uint64(32)
    mixed *= second
    mixed ^= mixed >> np.uint64(29)
    return mixed.sum(1, dtype=np.uint64)
