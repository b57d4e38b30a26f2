"""How well a tokenizer reconstructs the frames of a dataset. These figures are the tokenizer's own,
and never part of a world's loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesocosm.model.tokenizer.dictionary import PatchDictionary
from mesocosm.model.tokenizer.frames import FrameTokenizer, as_bytes

Array = NDArray[Any]
MOVING = 12
"""A pixel moves where a channel differs by more than this, of 255, from the median frame."""


@dataclass
class Reconstruction:
    """Sums over the frames of one image and split."""

    frames: int = 0
    exact: int = 0
    """Frames without any error."""
    squares: float = 0.0
    values: int = 0
    """Squared errors of all values (pixels times channels), of 255, and their number."""
    moving_squares: float = 0.0
    moving_values: int = 0
    """The same of moving pixels."""
    patches: int = 0
    unseen: int = 0
    """The number of patches, and of patches without a code of their own."""
    used: list[int] = field(default_factory=list)
    """How often each code of any position comes: a value of all its digits."""

    def add(self, frames: Array, tokenizer: FrameTokenizer, codes: Array, median: Array) -> None:
        """Add frames [B, H, W, C] and their codes [B, n].

        Args:
            frames: As a dataset holds them.
            tokenizer: The one that gave the codes.
            codes: Of the frames.
            median: uint8 [H, W, C], the median frame.
        """
        if not len(frames):
            return
        true = as_bytes(frames)
        error = true.astype(np.int32) - tokenizer.decode(codes)
        moving = (np.abs(true.astype(np.int32) - median) > MOVING).any(-1)
        self.frames += len(frames)
        self.exact += int((error == 0).all((1, 2, 3)).sum())
        self.squares += float((error**2).sum(dtype=np.float64))
        self.values += error.size
        self.moving_squares += float((error[moving] ** 2).sum(dtype=np.float64))
        self.moving_values += int(moving.sum()) * error.shape[-1]
        if isinstance(tokenizer, PatchDictionary):
            self.patches += codes.size
            self.unseen += int((~tokenizer.lookup(true)[1]).sum())
        levels = tokenizer.sizes[: tokenizer.digits]
        places = codes.reshape(-1, tokenizer.digits).T
        joint = np.ravel_multi_index(tuple(places), levels)
        counts = np.bincount(joint, minlength=math.prod(levels))
        self.used = (counts if not self.used else np.array(self.used) + counts).tolist()

    def join(self, other: Reconstruction) -> Reconstruction:
        """The sums of both."""
        values = {
            name: getattr(self, name) + getattr(other, name)
            for name in vars(self)
            if name != "used"
        }
        both = [used for used in (self.used, other.used) if used]
        return Reconstruction(**values, used=np.sum(both, 0).tolist() if both else [])

    def figures(self) -> dict[str, float | int | None]:
        """The figures by name. A PSNR is null if there is no error, or no such pixel.

        PSNR is 10 log10(255^2 / mean squared error) in dB, over all frames together.
        """
        known = self.patches > 0
        return {
            "frames": self.frames,
            "exact": self.exact / self.frames if self.frames else None,
            "psnr": psnr(self.squares, self.values),
            "moving_psnr": psnr(self.moving_squares, self.moving_values),
            "unseen": self.unseen / self.patches if known else None,
            "codes_used": sum(count > 0 for count in self.used),
        }


def psnr(squares: float, values: int) -> float | None:
    """PSNR in dB of the summed squared errors of uint8 values and their number; None without error
    or values.
    """
    if not values or not squares:
        return None
    return float(10 * np.log10(255.0**2 * values / squares))
