"""Fits tokenizers to a dataset and encodes it, shard by shard, in memory bounded by one shard's
codes. What is done is stored as it is made, so that a job that was killed goes on after it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesocosm.data.tokens.counting import PatchCounts
from mesocosm.data.tokens.reading import Tokenizers
from mesocosm.data.tokens.reconstruction import Reconstruction
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.leaf import Leaf
from mesocosm.datasets.manifest import SPLITS
from mesocosm.model.tokenizer.dictionary import PatchDictionary
from mesocosm.model.tokenizer.frames import as_bytes, sizes_dtype
from mesocosm.runs.tracking import Run
from mesocosm.store.artifacts import Storage

Array = NDArray[Any]
FOLDER = "runs/tokens"
FRAMES = 256
"""Frames that are read at once, and of which the median frame is made."""


class StoredParts:
    """The results so far, a file a shard and image, in `runs/tokens/ID`."""

    def __init__(self, storage: Storage, id: str):
        self._storage, self._folder = storage, f"{FOLDER}/{id}"

    def find(self, name: str) -> bytes | None:
        """The bytes of a part; None where it is not stored yet."""
        return self._storage.read(f"{self._folder}/{name}")

    def read(self, name: str) -> bytes:
        """The bytes of a part that is stored."""
        data = self.find(name)
        assert data is not None, name
        return data

    def write(self, name: str, data: bytes) -> None:
        """Store a part."""
        self._storage.write(f"{self._folder}/{name}", data)

    def remove(self) -> None:
        """Remove all parts, once the tokenizer is committed."""
        self._storage.remove(self._folder)

    @staticmethod
    def codes(dataset: Dataset) -> Iterator[tuple[str, str]]:
        """(DATASET/SHARD, image) of each file of codes."""
        for shard, name in enumerate(dataset.shards):
            for image in dataset.image_names:
                yield f"{dataset.ids[int(dataset.shard_part[shard])]}/{name}", image


def _blocks(dataset: Dataset, shard: int, image: str) -> Iterator[tuple[Array, Array]]:
    """The frames of a shard, FRAMES at a time, and [B] bool: the frame is of training."""
    records = dataset.records(shard)
    train = np.repeat(records["split"] == SPLITS.index("train"), records["length"] + 1)
    frames = dataset.images(shard, image)
    for start in range(0, len(frames), FRAMES):
        yield frames[start : start + FRAMES], train[start : start + FRAMES]


def fit(
    leaves: Sequence[Leaf],
    patch: int,
    codes: int,
    old: Tokenizers | None,
    dataset: Dataset,
    parts: StoredParts,
    run: Run,
) -> Tokenizers:
    """Fit a dictionary to each image of the training split, in its order.

    Args:
        leaves: The images.
        patch: Pixels of a patch's side.
        codes: The most codes of each.
        old: Dictionaries whose codes come first.
        dataset: The data.
        parts: Counts of shards that exist already, and where new ones are stored.
        run: Shows the progress.

    Raises:
        UsageError: An image has too many distinct patches, or fewer than 2.
    """
    total = [PatchCounts(leaf.name, patch) for leaf in leaves]
    with run.progress("count patches", len(dataset.shards)) as update:
        for shard in range(len(dataset.shards)):
            dataset.turn([shard], [shard + 1] if shard + 1 < len(dataset.shards) else [])
            for image, counts, leaf in zip(dataset.image_names, total, leaves, strict=True):
                stored = parts.find(f"{shard}.{image}.counts.npz")
                if stored is None:
                    here = PatchCounts(leaf.name, patch)
                    for frames, train in _blocks(dataset, shard, image):
                        if train.any():
                            here.add(frames[train])
                    parts.write(f"{shard}.{image}.counts.npz", here.to_bytes())
                else:
                    here = PatchCounts.of_bytes(stored, leaf.name, patch)
                counts.join(here)
            distinct = ", ".join(f"{len(counts):,}" for counts in total)
            update(shard + 1, f"{distinct} distinct patches")
    each = []
    for i, (leaf, counts) in enumerate(zip(leaves, total, strict=True)):
        height, width, channels = leaf.shape
        first = None if old is None else old.each[i]
        assert first is None or isinstance(first, PatchDictionary)
        each.append(counts.dictionary((height, width, channels), codes, first))
    return Tokenizers(tuple(leaf.name for leaf in leaves), tuple(each))


def encode(dataset: Dataset, fitted: Tokenizers, parts: StoredParts, run: Run) -> dict[str, Any]:
    """Store the codes of each shard.

    Args:
        dataset: The data.
        fitted: The tokenizers of its images.
        parts: Codes of shards that exist already, and where new ones are stored.
        run: Shows the progress.

    Returns:
        The report: for each image its facts, and the figures of `Reconstruction` by split.
    """
    medians = [_median(dataset, name) for name in dataset.image_names]
    sums = [{split: Reconstruction() for split in SPLITS} for _ in fitted.each]
    places = [place for place, image in parts.codes(dataset) if image == dataset.image_names[0]]
    with run.progress("encode frames", len(places)) as update:
        for shard, place in enumerate(places):
            dataset.turn([shard], [shard + 1] if shard + 1 < len(places) else [])
            for i, image in enumerate(dataset.image_names):
                name = f"{place.replace('/', '-')}.{image}"
                stored = parts.find(f"{name}.json")
                if stored is None:
                    here = _encode_shard(dataset, shard, image, fitted, i, medians[i], parts, name)
                else:
                    here = {k: Reconstruction(**v) for k, v in json.loads(stored).items()}
                sums[i] = {split: sums[i][split].join(here[split]) for split in SPLITS}
            update(shard + 1, f"{shard + 1}/{len(places)} shards")
    dataset.turn(())
    images = []
    for name, one, by_split in zip(fitted.names, fitted.each, sums, strict=True):
        images.append(
            {
                "name": name,
                "kind": one.kind,
                "shape": list(one.shape),
                "grid": list(one.grid),
                "codes": max(one.sizes),
                "bytes_a_frame": len(one.sizes) * sizes_dtype(one.sizes).itemsize,
                **{split: sums_of.figures() for split, sums_of in by_split.items()},
            }
        )
    return {"images": images}


def _encode_shard(
    dataset: Dataset,
    shard: int,
    image: str,
    fitted: Tokenizers,
    place: int,
    median: Array,
    parts: StoredParts,
    name: str,
) -> dict[str, Reconstruction]:
    """Store the codes of an image in a shard, then their figures."""
    one = fitted.each[place]
    sums = {split: Reconstruction() for split in SPLITS}
    codes = []
    for frames, train in _blocks(dataset, shard, image):
        block = one.encode(as_bytes(frames))
        codes.append(block.astype(sizes_dtype(one.sizes)))
        for split, mine in zip(SPLITS, (train, ~train), strict=True):
            sums[split].add(frames[mine], one, block[mine], median)
    buffer = io.BytesIO()
    np.save(buffer, np.concatenate(codes), allow_pickle=False)
    parts.write(f"{name}.npy", buffer.getvalue())
    figures = {split: asdict(summed) for split, summed in sums.items()}
    parts.write(f"{name}.json", json.dumps(figures).encode())
    return sums


def spread(dataset: Dataset, image: str, count: int) -> Array:
    """At most `count` frames, spread evenly over all rows."""
    table = dataset.table
    lengths = table["length"] + 1
    ends = np.cumsum(lengths)
    chosen = np.unique(np.linspace(0, ends[-1] - 1, count).astype(np.int64))
    numbers = np.searchsorted(ends, chosen, "right")
    rows = table["first_row"][numbers] + chosen - (ends - lengths)[numbers]
    return as_bytes(dataset.gather(image, table["shard"][numbers], rows))


def _median(dataset: Dataset, image: str) -> Array:
    """The median frame, uint8 [H, W, C]."""
    return np.median(spread(dataset, image, FRAMES), 0).astype(np.uint8)
