"""Fits tokenizers to a dataset and encodes it, shard by shard, in memory bounded by one shard's
codes. Each part is stored as it is made, so that a killed job continues after the stored parts.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from mesocosm.data.tokens.counting import PatchCounts
from mesocosm.data.tokens.learning import fit_fsq
from mesocosm.data.tokens.reading import Tokenizers
from mesocosm.data.tokens.reconstruction import Reconstruction
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.leaf import Leaf
from mesocosm.datasets.manifest import SPLITS
from mesocosm.datasets.split import Split
from mesocosm.model.tokenizer.dictionary import PatchDictionary
from mesocosm.model.tokenizer.frames import FrameTokenizer, as_bytes, sizes_dtype
from mesocosm.model.tokenizer.fsq import PatchFSQ
from mesocosm.runs.tracking import Run
from mesocosm.store.artifacts import Storage

Array = NDArray[Any]
FOLDER = "runs/tokens"
FRAMES = 256
"""Frames that are read at once, and of which the median frame is made."""
TRAINED = 6000
"""The most frames that a learned tokenizer is trained on."""
AUTO, DICTIONARY, FSQ = "auto", PatchDictionary.kind, PatchFSQ.kind
KINDS_OR_AUTO = (AUTO, DICTIONARY, FSQ)
COVERED = 0.999
"""`auto` takes a dictionary where its codes are this share of the patches."""


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
    def part(place: str, image: str) -> str:
        """The name, without its ending, of the parts of an image's codes in DATASET/SHARD."""
        return f"{place.replace('/', '-')}.{image}"

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


@dataclass(frozen=True)
class FitSettings:
    """How tokenizers are fitted: the keys of `mesocosm tokenize`."""

    kind: str
    patch: int
    codes: int
    steps: int
    seed: int


def fit(
    leaves: Sequence[Leaf],
    settings: FitSettings,
    old: Tokenizers | None,
    dataset: Dataset,
    parts: StoredParts,
    run: Run,
) -> Tokenizers:
    """Fit a tokenizer to each image of the training split.

    Args:
        leaves: The images, in their order.
        settings: Of all of them.
        old: Dictionaries whose codes come first.
        dataset: The data.
        parts: Counts and trained tokenizers that exist already, and where new ones are stored.
        run: Shows the progress.

    Raises:
        UsageError: An image has too many distinct patches for a dictionary, or uses fewer than 2
            codes.
    """
    total = None
    if settings.kind != FSQ:
        total = _count(leaves, settings.patch, dataset, parts, run)
    each: list[FrameTokenizer] = []
    for i, (leaf, image) in enumerate(zip(leaves, dataset.image_names, strict=True)):
        height, width, channels = leaf.shape
        counts = None if total is None else total[i]
        covered = 0.0 if counts is None else counts.covered(settings.codes)
        if counts is not None and (settings.kind == DICTIONARY or covered >= COVERED):
            first = None if old is None else old.each[i]
            assert first is None or isinstance(first, PatchDictionary)
            each.append(counts.dictionary((height, width, channels), settings.codes, first))
            continue
        stored = parts.find(f"{image}.safetensors")
        if stored is not None:
            each.append(PatchFSQ.of(load(stored)))
            continue
        with run.progress(f"train {leaf.name}", settings.steps) as update:

            def trained(step: int) -> None:
                update(step, f"{step}/{settings.steps} steps")

            frames = spread(dataset, image, TRAINED, "train")
            median = _median(dataset, image)
            chosen = settings.patch, settings.steps, settings.seed
            each.append(fit_fsq(frames, median, *chosen, leaf.name, trained))
        parts.write(f"{image}.safetensors", save(each[-1].state()))
    return Tokenizers(tuple(leaf.name for leaf in leaves), tuple(each))


def _count(
    leaves: Sequence[Leaf], patch: int, dataset: Dataset, parts: StoredParts, run: Run
) -> list[PatchCounts]:
    """The distinct patches of each image."""
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
            distinct = (f"{len(counts):,}" if not counts.full else "many" for counts in total)
            update(shard + 1, f"{', '.join(distinct)} distinct patches")
    return total


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
                name = parts.part(place, image)
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
                "codes": math.prod(one.sizes[: one.digits]),
                "digits": one.digits,
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


def spread(dataset: Dataset, image: str, count: int, split: Split | None = None) -> Array:
    """At most `count` frames of a split (None: all), uint8, spread evenly over its rows."""
    table = dataset.table[dataset.episodes(split)]
    lengths = table["length"] + 1
    ends = np.cumsum(lengths)
    chosen = np.unique(np.linspace(0, ends[-1] - 1, count).astype(np.int64))
    numbers = np.searchsorted(ends, chosen, "right")
    rows = table["first_row"][numbers] + chosen - (ends - lengths)[numbers]
    return as_bytes(dataset.gather(image, table["shard"][numbers], rows))


def _median(dataset: Dataset, image: str) -> Array:
    """The median frame, uint8 [H, W, C]."""
    return np.median(spread(dataset, image, FRAMES), 0).astype(np.uint8)
