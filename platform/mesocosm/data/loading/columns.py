"""Columns of the leaves of a space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesocosm.data.loading.normalize import Scaling
from mesocosm.datasets.leaf import Leaf
from mesocosm.datasets.spaces import SpaceCodec
from mesocosm.model.spec import ImageSpan, TextSpan

Array = NDArray[Any]


class LeafColumns:
    """The number and category columns of some leaves."""

    def __init__(self, leaves: Sequence[Leaf]):
        slices = [[leaf.numbers for leaf in leaves], [leaf.categories for leaf in leaves]]
        self.numbers, self.categories = (
            np.array([i for part in parts for i in range(part.start, part.stop)], np.int64)
            for parts in slices
        )

    def __len__(self) -> int:
        return len(self.numbers) + len(self.categories)

    def texts(self, codec: SpaceCodec) -> tuple[TextSpan, ...]:
        """The texts among the categories, counted within them."""
        position = {column: i for i, column in enumerate(self.categories.tolist())}
        return tuple(
            TextSpan(position[text.start], text.length, text.min_length)
            for text in codec.texts
            if text.start in position
        )

    def images(self, codec: SpaceCodec) -> tuple[ImageSpan, ...]:
        """The images among the categories, counted within them."""
        position = {column: i for i, column in enumerate(self.categories.tolist())}
        return tuple(
            replace(image, start=position[image.start])
            for image in codec.images
            if image.start in position
        )


@dataclass(frozen=True)
class NumberColumns:
    """The layout of spaces of numbers only, flattened in their own order."""

    body: Array  # [n] int64: columns of an observation that the world predicts
    task: Array  # [k] int64: columns of an observation that hold the task
    observation: Scaling  # of all columns
    action: Scaling
