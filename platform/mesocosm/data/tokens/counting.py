"""Counts the distinct patches of frames, in bounded memory, and makes a dictionary of them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesocosm.errors import UsageError
from mesocosm.model.tokenizer.dictionary import PatchDictionary, hashed
from mesocosm.model.tokenizer.frames import as_bytes, cut

Array = NDArray[Any]
MOST_CODES = 1 << 16
"""Codes of a dictionary, which are stored in 16 bits; and distinct patches that are counted."""
MEMORY = 1 << 28
"""The most bytes that the distinct patches of an image may have."""


class PatchCounts:
    """The distinct patches of an image, and how often each of them comes.

    Args:
        name: The image's leaf, for messages.
        patch: Pixels of a patch's side.
    """

    def __init__(self, name: str, patch: int):
        self.name, self.patch = name, patch
        self.frames = 0
        self.full = False
        """True if there are too many distinct patches, which are then not counted."""
        self.most = MOST_CODES
        self._hashes = np.zeros(0, np.uint64)
        """[d] sorted"""
        self._counts = np.zeros(0, np.int64)
        self._examples: Array = np.zeros((0, 0), np.uint8)

    def __len__(self) -> int:
        return len(self._hashes)

    def add(self, frames: Array) -> None:
        """Count the patches of frames [B, height, width, channels], unless there are more distinct
        ones than a dictionary may have (`full`).
        """
        self.frames += len(frames)
        if self.full:
            return
        patches = cut(as_bytes(frames), self.patch)
        flat = patches.reshape(-1, patches.shape[-1])
        hashes, first, counts = np.unique(hashed(flat), return_index=True, return_counts=True)
        self._merge(hashes, counts, flat[first])

    def _merge(self, hashes: Array, counts: Array, examples: Array) -> None:
        if not len(self):
            self._hashes, self._counts, self._examples = hashes, counts, examples
        else:
            places = np.searchsorted(self._hashes, hashes).clip(max=len(self) - 1)
            known = self._hashes[places] == hashes
            self._counts[places[known]] += counts[known]
            if not known.all():
                merged = np.concatenate([self._hashes, hashes[~known]])
                order = np.argsort(merged, kind="stable")
                self._hashes = merged[order]
                self._counts = np.concatenate([self._counts, counts[~known]])[order]
                self._examples = np.concatenate([self._examples, examples[~known]])[order]
        self.most = min(MOST_CODES, MEMORY // max(self._examples.shape[1], 1))
        if len(self) > self.most:
            self.full = True
            self._hashes, self._counts = self._hashes[:0], self._counts[:0]
            self._examples = self._examples[:0]

    def join(self, other: PatchCounts) -> None:
        """Add the counts of other frames."""
        self.frames += other.frames
        self.full, self.most = self.full or other.full, min(self.most, other.most)
        if len(other) and not self.full:
            self._merge(other._hashes, other._counts, other._examples)

    def to_bytes(self) -> bytes:
        """The counts as the bytes of an npz file."""
        buffer = io.BytesIO()
        arrays = {"hashes": self._hashes, "counts": self._counts, "examples": self._examples}
        facts = {name: np.array(getattr(self, name)) for name in ("frames", "full", "most")}
        np.savez_compressed(buffer, allow_pickle=False, **facts, **arrays)
        return buffer.getvalue()

    @staticmethod
    def of_bytes(data: bytes, name: str, patch: int) -> PatchCounts:
        """The counts of `to_bytes`."""
        counts = PatchCounts(name, patch)
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            counts.frames, counts.most = int(file["frames"]), int(file["most"])
            counts.full = bool(file["full"])
            counts._hashes, counts._counts = file["hashes"], file["counts"]
            counts._examples = file["examples"]
        return counts

    def covered(self, codes: int) -> float:
        """The share of all patches that a dictionary of at most `codes` codes has."""
        if self.full:
            return 0.0
        return float(np.sort(self._counts)[::-1][:codes].sum() / max(self._counts.sum(), 1))

    def dictionary(
        self, shape: tuple[int, int, int], codes: int, old: PatchDictionary | None = None
    ) -> PatchDictionary:
        """The dictionary of the most frequent patches, whose code 0 is the most frequent one.

        Args:
            shape: [height, width, channels] of a frame.
            codes: The most codes.
            old: A dictionary whose codes come first.

        Raises:
            UsageError: Fewer than 2 codes occur (all frames are equal), or there are too many
                distinct patches.
        """
        if self.full:
            raise UsageError(
                f"{self.name} has more than {self.most} distinct patches of {self.patch} x"
                f" {self.patch} pixels in {self.frames} frames, too many for a dictionary, which is"
                " for sprites, tiles and screens; give kind=fsq, or a smaller patch"
            )
        if len(self) < 2:
            black = not self._examples.any()
            problem = "all of them are black" if black else "all of their patches are equal"
            raise UsageError(
                f"{self.name} uses {len(self)} code in {self.frames} frames, and a world needs at"
                f" least 2: {problem}; correct the camera, or drop this key with a wrapper"
            )
        # Patches of equal frequency are sorted by their bytes.
        order = np.lexsort((*self._examples.T[::-1], -self._counts))
        table = self._examples[order]
        if old is not None:
            grown = PatchDictionary(shape, self.patch, old.table)
            known = grown.known(table)
            table = np.concatenate([old.table, table[~known]])
        return PatchDictionary(shape, self.patch, table[:codes])
