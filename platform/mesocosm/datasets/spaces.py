"""Gymnasium spaces <-> flat arrays: numbers [B, n] float64 and categories [B, m] int64.

A space is flattened into leaves, in its own order. A Box becomes numbers (a Box of bool: categories
of 2). Discrete, MultiDiscrete and MultiBinary become categories that count from 0. Values outside a
Box pass both ways (`bounds` checks them).

A Text has two forms. Datasets store it as it is: `encode_stored` gives [B, t] of `str` beside the
numbers and the other categories (`texts`). Families of tensors read it as slots: a short Text
of at most L characters becomes L categories, 0 after its end, c for the c-th character of its
sorted charset. A longer one has no slots (`slots`).

An image (`images.is_image`) is stored as it is, too: `encode_stored` gives its frames. With a
tokenizer it is read as slots, too: the codes of its frames, position by position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from mesocosm.datasets.images import check_layout, is_image
from mesocosm.datasets.leaf import (
    AGREE,
    Leaf,
    Path,
    Space,
    check_numbers,
    checked_categories,
    checked_frames,
    checked_texts,
    children,
)
from mesocosm.datasets.masks import mask_size
from mesocosm.datasets.slots import LONGEST, MOST, decode_texts, encode_texts, has_slots
from mesocosm.datasets.tables import table_of
from mesocosm.datasets.texts import SHOWN
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.model.spec import ImageSpan, TextSpan
from mesocosm.model.tokenizer.frames import FrameTokenizer, as_bytes, as_dtype

Array = NDArray[Any]


class SpaceCodec:
    """Encodes and decodes batches of one space. Raises UsageError where a leaf is not supported.

    Args:
        space: The space.
        name: Of the space, for messages.
        tokenizers: One for each image, or none: images then have no categories.
    """

    def __init__(
        self, space: Space, name: str = "observation", tokenizers: Sequence[FrameTokenizer] = ()
    ):
        self.space, self.tokenizers = space, tuple(tokenizers)
        self.leaves: list[Leaf] = []
        self.text_leaves: list[Leaf] = []
        """The t leaves that are texts."""
        self.image_leaves: list[Leaf] = []
        """The leaves that are images (`images`)."""
        self.numbers = 0
        """n"""
        self.cardinalities: tuple[int, ...] = ()
        """of each of the m category columns"""
        self._append(space, (), name)
        if not self.leaves:
            fix = "a world needs at least one number, category or text"
            raise UsageError(f"{name}: the space {space} has no parts; {fix}")
        leaves = [*self.text_leaves, *self.image_leaves]
        slots = [np.arange(self.categories)[leaf.categories] for leaf in leaves]
        self.plain: Array = np.setdiff1d(np.arange(self.categories), np.concatenate([[], *slots]))
        """Positions of the category columns that are not slots of a text or image"""

    @property
    def categories(self) -> int:
        return len(self.cardinalities)

    @property
    def texts(self) -> list[TextSpan]:
        """The category columns that hold texts."""
        return [
            TextSpan(leaf.categories.start, leaf.space.max_length, leaf.space.min_length)
            for leaf in self.leaves
            if isinstance(leaf.space, spaces.Text) and leaf.cardinalities
        ]

    @property
    def images(self) -> list[ImageSpan]:
        """The category columns that hold codes of images."""
        return [
            ImageSpan(leaf.categories.start, *tokenizer.grid, tokenizer.digits)
            for leaf, tokenizer in zip(self.image_leaves, self.tokenizers, strict=False)
        ]

    @property
    def long_texts(self) -> list[Leaf]:
        """The texts that are too long for slots."""
        return [leaf for leaf in self.text_leaves if not has_slots(leaf.space)]

    def check_images(self) -> None:
        """Raise UsageError where a leaf is an image without a tokenizer."""
        for leaf in self.image_leaves[len(self.tokenizers) :]:
            raise UsageError(
                f"{leaf.name} is an image {list(leaf.shape)}, which pretrain, sweep and loop learn"
                " by model.family=sequence and data.tokenizer=ID (mesocosm tokenize); give features"
                " instead, or drop this key with a wrapper"
            )

    def check_slots(self) -> None:
        """Raise UsageError where a leaf is an image, or a text too long for the families of
        tensors.
        """
        self.check_images()
        for leaf in self.long_texts:
            space: Any = leaf.space
            raise UsageError(
                f"{leaf.name} may have {space.max_length} characters out of"
                f" {len(space.character_set)}, and the families ensemble and sequence learn a text"
                f" as one category per character, with at most {LONGEST} characters and {MOST}"
                " categories together; give model.family=language, which reads any text, or shorten"
                " it with a wrapper"
            )

    @cached_property
    def plain_dtype(self) -> np.dtype[Any]:
        """The smallest type of the categories that are not slots of a text or image."""
        return np.min_scalar_type(max((self.cardinalities[i] for i in self.plain), default=1) - 1)

    def labels(self) -> list[str]:
        return [label for leaf in self.leaves for label in leaf.labels()]

    def matching(self, name: str) -> list[Leaf]:
        """The leaves at or under the key path `name` ("goal", "camera.pose")."""
        paths = [".".join([*map(str, leaf.path), ""]) for leaf in self.leaves]
        return [self.leaves[i] for i, path in enumerate(paths) if path.startswith(f"{name}.")]

    def _append(self, space: Space, path: Path, name: str) -> None:
        if isinstance(space, spaces.Dict | spaces.Tuple):
            for key, child in children(space):
                if isinstance(space, spaces.Dict) and not isinstance(key, str):
                    raise UsageError(f"{name}: a Dict key must be a string, got {key!r}")
                self._append(child, (*path, key), f"{name}.{key}")
            return
        m, numbers, start, characters, text = self.categories, 0, None, None, None
        image = len(self.image_leaves) if is_image(space) else None
        size = int(np.prod(space.shape or ()))
        cardinalities: tuple[int, ...] = ()
        box = isinstance(space, spaces.Box)
        if isinstance(space, spaces.MultiBinary) or (box and space.dtype == np.bool_):
            cardinalities, start = (2,) * size, np.zeros(size, np.int64)
        elif isinstance(space, spaces.Box) and image is None:
            check_layout(space, name)
            dtype = np.dtype(space.dtype)
            if dtype.kind == "f" and dtype.itemsize > 8:
                raise UsageError(f"{name}: dtype {dtype} is wider than float64; use float64")
            numbers = size
        elif isinstance(space, spaces.Discrete):
            cardinalities, start = (int(space.n),), np.array([space.start], np.int64)
        elif isinstance(space, spaces.MultiDiscrete):
            cardinalities = tuple(np.ravel(space.nvec).tolist())
            start = np.ravel(space.start).astype(np.int64)
        elif isinstance(space, spaces.Text):
            text, characters = len(self.text_leaves), np.zeros(0, np.uint32)
            if has_slots(space):
                characters = np.array(sorted(map(ord, space.character_set)), np.uint32)
                cardinalities = (len(characters) + 1,) * space.max_length
        elif image is None:
            raise unsupported(space, name)
        elif self.tokenizers:
            cardinalities = self.tokenizers[image].sizes
        columns = slice(self.numbers, self.numbers + numbers), slice(m, m + len(cardinalities))
        self.leaves.append(
            Leaf(name, path, space, *columns, cardinalities, start, characters, text, image)
        )
        self.text_leaves += self.leaves[-1:] if text is not None else []
        self.image_leaves += self.leaves[-1:] if image is not None else []
        self.numbers += numbers
        self.cardinalities += cardinalities

    def encode(self, batch: Any) -> tuple[Array, Array]:
        """Encode B values in a vector environment's layout (leaves [B, ...]; Text: B strings).
        Raises MesocosmError where a leaf's shape, kind or range is not its space's.
        """
        columns = [_descend(batch, leaf) for leaf in self.leaves]
        try:
            size = len(columns[0])
        except TypeError as error:
            problem = f"{self.leaves[0].name} must have a leading batch dimension"
            raise MesocosmError(f"{problem}, got {columns[0]!r}") from error
        return self.encode_leaves(columns, size)

    def encode_list(self, values: Sequence[Any]) -> tuple[Array, Array]:
        """Encode a list of B raw values, as `encode`."""
        columns = [[_descend(value, leaf) for value in values] for leaf in self.leaves]
        return self.encode_leaves(columns, len(values))

    def encode_leaves(self, columns: Sequence[Any], size: int) -> tuple[Array, Array]:
        """Encode `size` values given leaf by leaf, in the order of `leaves`, as `encode`."""
        self.check_images()
        numbers, plain, texts, *images = self.encode_stored(columns, size)
        pairs = zip(self.tokenizers, images, strict=True)
        codes = [tokenizer.encode(as_bytes(frames)) for tokenizer, frames in pairs]
        return numbers, self.slots(plain, texts, codes)

    def encode_stored(self, columns: Sequence[Any], size: int) -> tuple[Array, ...]:
        """Encode `size` values given leaf by leaf, as a dataset stores them.

        Returns:
            (numbers [B, n] float64, categories [B, len(plain)] int64, texts [B, t] of `str`, and
            for each image frames [B, height, width, channels]).
        """
        numbers = np.empty((size, self.numbers), np.float64)
        categories = np.empty((size, self.categories), np.int64)
        texts = np.empty((size, len(self.text_leaves)), object)
        images: list[Array] = []
        for leaf, values in zip(self.leaves, columns, strict=True):
            if leaf.text is not None:
                texts[:, leaf.text] = checked_texts(leaf, values, size)
                continue
            try:
                array = np.asarray(values)
            except ValueError as error:
                problem = f"every value must have shape {leaf.shape}, got several shapes"
                raise MesocosmError(f"{leaf.name}: {problem}") from error
            if array.shape != (size, *leaf.shape):
                problem = f"must have shape {leaf.shape}, got {array.shape[1:]}"
                raise MesocosmError(f"{leaf.name} {problem}; {AGREE}")
            flat = array.reshape(size, int(np.prod(leaf.shape)))
            if leaf.image is not None:
                images.append(checked_frames(leaf, array))
            elif leaf.start is None:
                check_numbers(leaf, flat)
                numbers[:, leaf.numbers] = flat
            else:
                categories[:, leaf.categories] = checked_categories(leaf, leaf.start, flat)
        if len(self.plain) < self.categories:
            categories = categories.take(self.plain, axis=1)
        return numbers, categories, texts, *images

    def stored_list(self, values: Sequence[Any]) -> tuple[Array, ...]:
        """Encode a list of B raw values, as `encode_stored`."""
        columns = [[_descend(value, leaf) for value in values] for leaf in self.leaves]
        return self.encode_stored(columns, len(values))

    def slots(self, plain: Array, texts: Array, codes: Sequence[Array] = ()) -> Array:
        """Categories [B, m] of the stored categories and texts, and of the codes [B, n] of each
        image; long texts have none.
        """
        if len(self.plain) == self.categories:
            return plain
        categories = np.empty((len(plain), self.categories), np.int64)
        categories[:, self.plain] = plain
        for leaf in self.text_leaves:
            if leaf.cardinalities:
                assert leaf.characters is not None
                width = len(leaf.cardinalities)
                slots = encode_texts(leaf.characters, width, texts[:, leaf.text])
                categories[:, leaf.categories] = slots
        for leaf, of_image in zip(self.image_leaves, codes, strict=True):
            categories[:, leaf.categories] = of_image
        return categories

    def decode_stored(self, numbers: Array, plain: Array, texts: Array, *images: Array) -> Any:
        """Like `decode`, for the arrays of `encode_stored`."""
        categories = np.zeros((len(plain), self.categories), np.int64)
        categories[:, self.plain] = plain

        def column(leaf: Leaf) -> Any:
            if leaf.image is not None:
                return images[leaf.image]
            if leaf.text is not None:
                return tuple(texts[:, leaf.text].tolist())
            return _decode_leaf(leaf, numbers, categories)

        return _build(self.space, map(column, self.leaves))

    def decode(self, numbers: Array, categories: Array, codes: bool = False) -> Any:
        """Decode numbers [B, n] and categories [B, m] into a vector environment's batch
        (`gymnasium.vector.utils.concatenate`).

        Integers are rounded and saturate at their dtype's range. A text that ends before its
        min_length continues with the first character; one without slots is empty. With `codes` an
        image stays the codes [B, n] of its tokenizer.
        """
        self.check_images()

        def column(leaf: Leaf) -> Any:
            if leaf.image is not None and codes:
                return categories[:, leaf.categories]
            if leaf.image is not None:
                frames = self.tokenizers[leaf.image].decode(categories[:, leaf.categories])
                return as_dtype(frames, leaf.dtype)
            return _decode_leaf(leaf, numbers, categories)

        return _build(self.space, map(column, self.leaves))

    def unbatch(self, batch: Any) -> list[Any]:
        """Split a batch into its raw values."""
        columns = []
        for leaf in self.leaves:
            values = _descend(batch, leaf)
            scalar = isinstance(leaf.space, spaces.Text | spaces.Discrete)
            columns.append(values if scalar else [np.array(value) for value in values])
        return [_build(self.space, iter(row)) for row in zip(*columns, strict=True)]


def check_spaces(observation: Space, action: Space) -> None:
    """Raise UsageError where a world cannot hold one of them."""
    SpaceCodec(observation, "observation")
    for leaf in SpaceCodec(action, "action").image_leaves:
        raise UsageError(f"{leaf.name} must not be an image, got {leaf.space}; act in numbers")
    mask_size(observation, action)
    table_of(observation, action)


def _build(space: Space, leaves: Iterator[Any]) -> Any:
    if isinstance(space, spaces.Dict):
        return {key: _build(child, leaves) for key, child in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_build(child, leaves) for child in space.spaces)
    return next(leaves)


def _descend(value: Any, leaf: Leaf) -> Any:
    for key in leaf.path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError) as error:
            raise MesocosmError(f"{leaf.name}: the value has no key {key!r}; {AGREE}") from error
    return value


def shown_space(space: Space) -> str:
    """`str(space)` with long charsets cut, for tables and messages."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        parts = [shown_space(child) for _, child in children(space)]
        if isinstance(space, spaces.Dict):
            names = [repr(name) for name, _ in children(space)]
            pairs = [f"{name}: {part}" for name, part in zip(names, parts, strict=True)]
            return f"Dict({', '.join(pairs)})"
        return f"Tuple({', '.join(parts)})"
    if isinstance(space, spaces.Text) and len(space.character_set) > SHOWN:
        limits = f"{space.min_length}, {space.max_length}"
        return f"Text({limits}, charset of {len(space.character_set)} characters)"
    return str(space)


def _decode_leaf(leaf: Leaf, numbers: Array, categories: Array) -> Any:
    if leaf.characters is not None:
        assert isinstance(leaf.space, spaces.Text)
        codes = categories[:, leaf.categories]
        return decode_texts(leaf.characters, leaf.space.min_length, codes)
    if leaf.start is not None:
        values = categories[:, leaf.categories] + leaf.start
    else:
        values = numbers[:, leaf.numbers]
        if leaf.dtype.kind != "f":
            info = np.iinfo(leaf.dtype)
            top = float(info.max)
            if top > info.max:  # 2**63 - 1 and 2**64 - 1 round up
                top = np.nextafter(top, 0.0)
            values = np.clip(np.rint(values), float(info.min), top)
    return values.astype(leaf.dtype).reshape(len(numbers), *leaf.shape)


def unsupported(space: Space, name: str) -> UsageError:
    fix = "use Box, Discrete, MultiDiscrete, MultiBinary, Text, Dict and Tuple"
    return UsageError(f"{name}: the space {space} ({type(space).__name__}) is not supported; {fix}")
