"""Which episodes of a dataset are held out for validation: decided once, when it is written.

A world never trains on held-out episodes. They stop its training, and `evaluate` measures on them
(`split_to_measure`). Curation can choose others (`data.curation.choose`).
"""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mesocosm.datasets.permutation import key

Split = Literal["train", "valid"]
ENOUGH = 5
"""A dataset of this many episodes always holds one out."""


def choose_splits(
    seed: int, index: NDArray[np.int64], behaviours: list[str], valid_fraction: float
) -> NDArray[np.uint8]:
    """The split of each episode, by a hash of (seed, episode index, behaviour's name).

    Each episode is held out with the probability `valid_fraction`. At least one of ENOUGH episodes
    is held out unless the fraction is 0, and one is always left to train on.

    Args:
        index: [E] int64, the episodes' indices.
        behaviours: E names.

    Returns:
        [E] uint8 positions in `manifest.SPLITS`: 1 is held out.
    """
    words = {name: hashed_word(name) for name in set(behaviours)}
    hashes = key(seed, index, np.array([words[name] for name in behaviours], np.uint64))
    valid = hashes.astype(np.float64) / 2.0**64 < valid_fraction
    if valid_fraction > 0 and len(index) >= ENOUGH and not valid.any():
        valid[hashes.argmin()] = True
    if valid.all():
        valid[hashes.argmax()] = False
    return valid.astype(np.uint8)


def split_to_measure(held_out: int, least: int) -> Split:
    """The split on which an evaluation measures: the training split, which flatters a world, only
    where fewer than `least` episodes or starts are held out. Reports note it.
    """
    return "valid" if held_out >= least else "train"


def hashed_word(text: str) -> int:
    """64 bits of a text's sha256, the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
