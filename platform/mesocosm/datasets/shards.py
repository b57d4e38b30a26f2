"""The arrays of a dataset's shards, memory-mapped or decoded where they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mesocosm.datasets.codes import CodeRows
from mesocosm.datasets.images import ImageRows, image_names
from mesocosm.datasets.slots import IN_MEMORY, SlotRows
from mesocosm.datasets.spaces import SpaceCodec
from mesocosm.datasets.texts import FILE, TEXTS, TextRows, read_texts
from mesocosm.errors import ArtifactError
from mesocosm.model.tokenizer.frames import FrameTokenizer
from mesocosm.store.cache import Files

Array = NDArray[Any]
StoredCodes = Callable[[str, str], Path | None]
"""(DATASET/SHARD, image) -> the file of its codes; None where there is none."""


def _no_codes(place: str, image: str) -> None:
    return None


class ShardArrays:
    """The arrays of S shards. A subclass sets the attributes below."""

    observation_codec: SpaceCodec
    action_codec: SpaceCodec
    shards: list[str]
    """[S] names within their datasets; shards are numbered over all datasets"""
    shard_part: Array
    """[S] which of the datasets a shard is of"""
    rows_of_all: int
    """The rows of all shards."""

    @property
    def ids(self) -> list[str]:
        """The ids of the datasets."""
        raise NotImplementedError

    def __init__(self, files: list[Files]):
        self._files = files
        self.stored_codes: StoredCodes = _no_codes
        # A view (`Dataset.unique`) shares these.
        self._open: dict[int, tuple[Path, dict[str, Array]]] = {}
        """The folder and the mapped arrays of each open shard."""
        self._pinned: set[int] = set()

    def tokenized(
        self, tokenizers: Sequence[FrameTokenizer], codes: StoredCodes = _no_codes
    ) -> Self:
        """A view in which images are also categories: their codes.

        Args:
            tokenizers: One for each image of the observation.
            codes: The files of codes. Frames of shards without one are encoded where they are
                read.
        """
        view = copy(self)
        view.observation_codec = SpaceCodec(self.observation_codec.space, "observation", tokenizers)
        view.stored_codes, view._open, view._pinned = codes, {}, set()
        return view

    def _unit(self, shard: int) -> tuple[Files, str]:
        return self._files[int(self.shard_part[shard])], f"shards/{self.shards[shard]}"

    def shard_bytes(self, shard: int) -> int:
        files, unit = self._unit(shard)
        return files.bytes(unit)

    @property
    def most(self) -> int | None:
        """Bytes of shards that may be on this machine; None: any number."""
        return min((files.most for files in self._files if files.most is not None), default=None)

    def turn(self, now: Iterable[int], ahead: Iterable[int] = ()) -> None:
        """Hold only the shards `now`, which are read, and `ahead`, which are fetched meanwhile."""
        pinned = list(dict.fromkeys([*now, *ahead]))
        self._release((set(self._open) | self._pinned) - set(pinned))
        self._pinned.clear()
        self._pinned.update(pinned)
        self._fetch(pinned)

    def expect(self, shards: Array) -> None:
        """Begin to fetch and verify the next shards to be read, where there is room for all."""
        if self.most is None:
            self._fetch(shard for shard in np.unique(shards).tolist() if shard not in self._open)

    def _fetch(self, shards: Iterable[int]) -> None:
        for files, unit in map(self._unit, shards):
            files.ahead([unit])

    def _release(self, shards: Iterable[int]) -> None:
        for shard in list(shards):
            self._open.pop(shard, None)
            files, unit = self._unit(shard)
            files.release([unit])

    def array(self, shard: int, name: str) -> Array:
        """One of a shard's `manifest.ARRAYS`, `texts.TEXTS` or `image_names`, memory-mapped. Texts,
        categories with slots of texts, and frames are decoded where they are read. Raises
        ArtifactError where it is missing or damaged.
        """
        if name in self.image_names:
            return self.images(shard, name)  # type: ignore[return-value]
        codec = self.observation_codec if name.startswith("obs") else self.action_codec
        if name in TEXTS:
            return self.texts(shard, name)  # type: ignore[return-value]
        if not name.endswith("_cat") or not (codec.text_leaves or codec.tokenizers):
            return self.plain(shard, name)
        arrays, full_name = self._hold(shard)[1], f"{name} with slots"
        if full_name not in arrays:
            plain, texts = self.plain(shard, name), self.texts(shard, name.replace("cat", "text"))
            codes = self._codes(shard) if codec.tokenizers else []
            slots = SlotRows(plain, texts, codec.cardinalities, codec.slots, codes)
            mapped = len(codes) == 1 and codec.categories == codes[0].shape[1]
            if mapped and isinstance(codes[0], np.ndarray):
                arrays[full_name] = codes[0]  # nothing but these codes: as they are stored
            elif self.rows_of_all * codec.categories <= IN_MEMORY:
                arrays[full_name] = slots.whole()
            else:
                arrays[full_name] = slots  # type: ignore[assignment]
        return arrays[full_name]

    def _codes(self, shard: int) -> list[Any]:
        """The codes of each image in a shard: read from a tokenizer's artifact, or encoded on
        reading.
        """
        codes: list[Any] = []
        dataset = self.ids[int(self.shard_part[shard])]
        for image, tokenizer in zip(
            self.image_names, self.observation_codec.tokenizers, strict=True
        ):
            path = self.stored_codes(f"{dataset}/{self.shards[shard]}", image)
            if path is None:
                codes.append(CodeRows(self.images(shard, image), tokenizer))
                continue
            codes.append(load_array(path, mapped=True))
            if codes[-1].shape != (len(self.plain(shard, "reward")), len(tokenizer.sizes)):
                raise ArtifactError(
                    f"{str(path)!r} does not fit the dataset; make the tokenizer again by mesocosm"
                    " tokenize --force"
                )
        return codes

    def texts(self, shard: int, name: str) -> TextRows:
        """The texts of a shard's observations (`obs_text`) or actions (`act_text`)."""
        folder, arrays = self._hold(shard)
        if name not in arrays:
            count = len(self.observation_codec.text_leaves)
            columns: list[Any] = []
            if count or self.action_codec.text_leaves:
                columns = read_texts(folder / FILE)
            columns = columns[:count] if name == "obs_text" else columns[count:]
            rows = len(self.plain(shard, "reward"))
            arrays[name] = TextRows(columns, rows)  # type: ignore[assignment]
        return arrays[name]  # type: ignore[return-value]

    @cached_property
    def image_names(self) -> list[str]:
        """The names of the observation's images among the arrays."""
        return image_names(len(self.observation_codec.image_leaves))

    def images(self, shard: int, name: str) -> ImageRows:
        """The frames of one of `image_names` in a shard."""
        folder, arrays = self._hold(shard)
        if name not in arrays:
            leaf = self.observation_codec.image_leaves[self.image_names.index(name)]
            rows = len(self.plain(shard, "reward"))
            arrays[name] = ImageRows.open(folder, name, rows, leaf.space)  # type: ignore[assignment]
        return arrays[name]  # type: ignore[return-value]

    def plain(self, shard: int, name: str) -> Array:
        """A shard's array as it is stored: its categories hold no slots of texts."""
        folder, arrays = self._hold(shard)
        if name not in arrays:
            arrays[name] = load_array(folder / f"{name}.npy", mapped=True)
        return arrays[name]

    def _hold(self, shard: int) -> tuple[Path, dict[str, Array]]:
        """A shard's folder, and its arrays that are mapped already."""
        if shard not in self._open:
            if self.most is not None and shard not in self._pinned:
                # Hold one unpinned shard at a time, so that random reads need no further room.
                self._release(set(self._open) - self._pinned)
            files, unit = self._unit(shard)
            self._open[shard] = files.hold(unit), {}
        return self._open[shard]


def load_array(path: Path, mapped: bool = False) -> Array:
    """An array of a file. Raises ArtifactError where it is missing or damaged."""
    try:
        array = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        fix = "collect the data again, or restore it from a copy"
        raise ArtifactError(f"{str(path)!r} is missing or damaged ({error}); {fix}") from error
    return np.asarray(array)
