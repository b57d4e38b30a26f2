"""The layout of a space's raw tensors, which known functions receive (`model.known`)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mesocosm.datasets.leaf import Leaf
from mesocosm.datasets.spaces import SpaceCodec
from mesocosm.errors import UsageError
from mesocosm.model.known import RawLeaf


def raw_leaves(
    space: SpaceCodec,
    scale: NDArray[np.float64] | None = None,
    mean: NDArray[np.float64] | None = None,
) -> list[RawLeaf]:
    """The leaves of a space whose columns are all in one `Parts`.

    Args:
        space: Of observations or actions.
        scale: [n] raw units of a normalised 1; None for numbers that are raw already.
        mean: [n] raw value of a normalised 0; None for numbers that are raw already.

    Raises:
        UsageError: A leaf is a text, which no tensor holds.
    """
    scale = np.ones(space.numbers) if scale is None else scale
    mean = np.zeros(space.numbers) if mean is None else mean
    return [_leaf(leaf, scale, mean) for leaf in space.leaves]


def _leaf(leaf: Leaf, scale: NDArray[np.float64], mean: NDArray[np.float64]) -> RawLeaf:
    if leaf.image is not None:
        raise UsageError(
            f"known functions must receive tensors of values, and {leaf.name} is an image; leave"
            " known out"
        )
    if leaf.characters is not None:
        raise UsageError(
            f"known functions must receive tensors, and {leaf.name} is a text; leave known out, or"
            " drop the text with a wrapper"
        )
    if leaf.start is not None:
        columns = range(leaf.categories.start, leaf.categories.stop)
        return RawLeaf(leaf.path, leaf.shape, tuple(columns), first=tuple(leaf.start.tolist()))
    columns, integers = range(leaf.numbers.start, leaf.numbers.stop), leaf.dtype.kind != "f"
    return RawLeaf(
        leaf.path,
        leaf.shape,
        tuple(columns),
        scale=tuple(scale[leaf.numbers].tolist()),
        mean=tuple(mean[leaf.numbers].tolist()),
        integers=integers,
    )
