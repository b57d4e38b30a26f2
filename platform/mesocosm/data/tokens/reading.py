"""A tokenizer's artifact: one tokenizer for each image of an observation, and codes of datasets.

tokenizers/ID/tokenizer.json           kind, and the images in the order of the observation
              tokenizer.safetensors    their arrays, `IMAGE.ARRAY`
              report.json, tokenizer.html    how well it reconstructs frames
              codes/DATASET/SHARD/obs_image0.npy    [rows, n] codes, memory-mapped
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.images import image_names
from mesocosm.datasets.leaf import Leaf
from mesocosm.errors import ArtifactError, UsageError
from mesocosm.model.tokenizer.frames import FrameTokenizer
from mesocosm.model.tokenizer.kinds import KINDS
from mesocosm.store.artifacts import Storage
from mesocosm.store.cache import Partial, open_partial

Array = NDArray[Any]
TOKENIZER, ARRAYS = "tokenizer.json", "tokenizer.safetensors"
REPORT, PAGE = "report.json", "tokenizer.html"


@dataclass(frozen=True)
class Tokenizers:
    """The tokenizers of an observation's images, in their order."""

    names: tuple[str, ...]
    """The leaves: `observation.camera`"""
    each: tuple[FrameTokenizer, ...]

    def save(self, folder: Path) -> None:
        """Write the two files of the tokenizers."""
        about = [
            {"name": name, "kind": one.kind, "shape": list(one.shape), "codes": len(one.sizes)}
            for name, one in zip(self.names, self.each, strict=True)
        ]
        (folder / TOKENIZER).write_text(json.dumps({"images": about}, indent=1) + "\n")
        arrays = {
            f"{image}.{name}": np.ascontiguousarray(array)
            for image, one in zip(image_names(len(self.each)), self.each, strict=True)
            for name, array in one.state().items()
        }
        save_file(arrays, folder / ARRAYS)

    @staticmethod
    def load(folder: Path) -> Tokenizers:
        """The tokenizers in a folder. Raises ArtifactError where a file is missing or damaged."""
        try:
            about = json.loads((folder / TOKENIZER).read_text())["images"]
            arrays = load_file(folder / ARRAYS)
            each = []
            for image, one in zip(image_names(len(about)), about, strict=True):
                prefix = f"{image}."
                state = {
                    name.removeprefix(prefix): array
                    for name, array in arrays.items()
                    if name.startswith(prefix)
                }
                each.append(KINDS[one["kind"]].of(state))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ArtifactError(
                f"{str(folder)!r} is not a tokenizer, or it is damaged ({error}); make it again by"
                " mesocosm tokenize"
            ) from error
        return Tokenizers(tuple(one["name"] for one in about), tuple(each))

    def check(self, leaves: Sequence[Leaf], name: str) -> None:
        """Raise UsageError where the images of an observation are not those of the tokenizers.

        Args:
            leaves: The images of the observation.
            name: The key with the tokenizer's artifact, for the message.
        """
        shapes = {n: list(one.shape) for n, one in zip(self.names, self.each, strict=True)}
        observed = {leaf.name: list(leaf.shape) for leaf in leaves}
        if shapes != observed:
            raise UsageError(
                f"{name} is for the images {shapes}, and the observations have {observed}; fit"
                " another one by mesocosm tokenize"
            )


def stored_tokenizers(
    storage: Storage, ref: str, images: Sequence[Leaf], key: str
) -> tuple[Partial, Tokenizers]:
    """The files of a tokenizer, and the tokenizers in them, which are for these images. Raises as
    `tokenized`; messages name the config's `key` of the tokenizer.
    """
    files = open_partial(storage, "tokenizers", ref)
    folder = files.hold(TOKENIZER).parent
    files.hold(ARRAYS)
    tokenizers = Tokenizers.load(folder)
    tokenizers.check(images, f"{key}={files.name}")
    return files, tokenizers


def tokenized(dataset: Dataset, storage: Storage, ref: str, key: str) -> Dataset:
    """A view of a dataset in which images are also categories: the codes of a tokenizer.

    Args:
        dataset: Of observations with images.
        storage: Where the tokenizer is.
        ref: `tokenizers/ID`, an id or a unique prefix.
        key: The config's key of the tokenizer, for messages.

    Raises:
        UsageError: There is no such tokenizer, or it is for other images.
        ArtifactError: It is damaged.
    """
    images = dataset.observation_codec.image_leaves
    files, tokenizers = stored_tokenizers(storage, ref, images, key)

    def stored(place: str, image: str) -> Path | None:
        path = files.hold(f"codes/{place}") / f"{image}.npy"
        return path if path.is_file() else None

    return dataset.tokenized(tokenizers.each, stored)
