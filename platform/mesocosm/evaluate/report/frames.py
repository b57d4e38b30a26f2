"""Frames on the pages of reports."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesocosm.evaluate.metrics.images import ImageFidelity
from mesocosm.pictures import address

Array = NDArray[Any]
LARGEST = 96
"""Pixels of a side to which small frames are enlarged, by whole factors."""


def strip(frames: Array) -> str:
    """Frames uint8 [B, H, W, C] side by side, as the address of a PNG picture."""
    b, h, w, _ = frames.shape
    times = max(1, LARGEST // max(h, w))
    gap = np.full((b, h, 1, 3), 255, np.uint8)
    coloured = np.concatenate([np.broadcast_to(frames, (b, h, w, 3)), gap], 2)
    row = coloured.transpose(1, 0, 2, 3).reshape(h, b * (w + 1), 3)
    return address(row.repeat(times, 0).repeat(times, 1))


def images_json(measured: ImageFidelity) -> dict[str, Any]:
    """The figures as JSON values, with the strips as PNG addresses."""
    return {
        "unigram": measured.unigram,
        "copy_or_unigram": measured.copy_or_unigram,
        "nats": measured.nats,
        "images": [
            {
                "name": name,
                "rows": [vars(row) for row in rows],
                "strips": [
                    {"steps": one.steps, "true": strip(one.true), "imagined": strip(one.imagined)}
                    for one in strips
                ],
            }
            for name, rows, strips in measured.images
        ],
        "notes": measured.notes,
    }
