"""Operations on texts: their length, and what an episode's texts add to those before."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from mesocosm.data.analysis.texts import GRAM, episode_columns, grams
from mesocosm.data.curation.scan import EpisodePiece
from mesocosm.data.curation.table import TRAIN, Operation, Step
from mesocosm.datasets.dataset import Dataset
from mesocosm.errors import UsageError

Array = NDArray[Any]
PARTS = {"observation": "obs_text", "action": "act_text"}


class _OfTexts(Operation):
    """An operation on the texts of one part."""

    part: str

    def check(self) -> None:
        """Raise UsageError where the part is unknown."""
        if self.part not in PARTS:
            raise UsageError(f"part must be observation or action, got {self.part!r}")

    def array(self, dataset: Dataset) -> str:
        """The name of the texts. Raises UsageError if the part has no texts."""
        codec = dataset.observation_codec if self.part == "observation" else dataset.action_codec
        if not codec.text_leaves:
            raise UsageError(f"part={self.part} has no Text; name the part that has texts")
        return PARTS[self.part]


@dataclass
class TextLength(_OfTexts):
    """Keep the episodes whose longest text has at least `min` and at most `max` bytes."""

    part: str = "observation"
    min: int | None = None
    max: int | None = None

    def check(self) -> None:
        """Raise UsageError where no limit is given, or the part is unknown."""
        super().check()
        if self.min is None and self.max is None:
            raise UsageError("min or max must be given, in bytes; got neither")

    def run(self, step: Step) -> None:
        """Drop the others."""
        array, episodes = self.array(step.dataset), step.episodes()
        longest = step.measure(partial(longest_text, array=array), episodes)["longest"]
        if self.min is not None:
            short = longest < self.min
            step.drop(episodes[short], f"no text of at least {self.min} bytes")
            episodes, longest = episodes[~short], longest[~short]
        if self.max is not None:
            step.drop(episodes[longest > self.max], f"a text of more than {self.max} bytes")


def longest_text(dataset: Dataset, piece: EpisodePiece, array: str) -> dict[str, Array]:
    """longest [e] int64: the bytes of the longest text of each episode."""
    longest = []
    for columns in _columns(dataset, piece, array):
        sizes = [pc.max(pc.binary_length(column)).as_py() or 0 for column in columns]
        longest.append(max(sizes))
    return {"longest": np.array(longest, np.int64)}


@dataclass
class TextNovelty(_OfTexts):
    """Keep the episodes of whose distinct n-grams of words at least the share `share` is in no
    episode that is kept before it. Validation comes first, as for duplicates.
    """

    part: str = "observation"
    share: float = 0.1
    n: int = GRAM

    def check(self) -> None:
        """Raise UsageError if n is not positive, or the part is unknown."""
        super().check()
        if self.n < 1:
            raise UsageError(f"n must be at least 1, got {self.n}")

    def run(self, step: Step) -> None:
        """Drop the others, in the order of the data."""
        array, episodes = self.array(step.dataset), step.episodes()
        order = np.lexsort((episodes, step.table.split[episodes] == TRAIN))
        episodes = episodes[order]
        measured = step.measure(partial(episode_grams, array=array, n=self.n), episodes)
        ends = np.cumsum(measured["count"])
        seen: set[int] = set()
        familiar = []
        for episode, end, count in zip(episodes, ends, measured["count"], strict=True):
            new = set(measured["grams"][end - count : end].tolist()) - seen
            if len(new) < self.share * count:
                familiar.append(episode)
            else:
                seen |= new
        reason = f"less than {self.share:g} of its {self.n}-grams are new"
        step.drop(np.sort(np.array(familiar, np.int64)), reason)


def episode_grams(dataset: Dataset, piece: EpisodePiece, array: str, n: int) -> dict[str, Array]:
    """count [e], and grams: the distinct n-grams of each episode, one episode after the other."""
    every = [
        np.unique(
            np.concatenate(
                [
                    np.zeros(0, np.uint64),
                    *(grams(text, n) for column in columns for text in column.to_pylist()),
                ]
            )
        )
        for columns in _columns(dataset, piece, array)
    ]
    return {"count": np.array(list(map(len, every)), np.int64), "grams": np.concatenate(every)}


def _columns(dataset: Dataset, piece: EpisodePiece, array: str) -> list[list[Any]]:
    """The texts of each episode of a piece, as an Arrow array a leaf."""
    places = (piece.shards.tolist(), piece.first.tolist(), piece.length.tolist())
    return [episode_columns(dataset, array, *place) for place in zip(*places, strict=True)]
