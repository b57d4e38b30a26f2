"""Starts (task, o_0) as rows, their spaces, and the distances between them.

Numbers are normalised and rounded to the codec's precision on one grid, so that starts never differ
below the precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mesocosm.data.loading.codec import Codec
from mesocosm.model.spec import TextSpan
from mesocosm.model.tensors import Parts

CONSTANT = 1e-4
"""A number that deviates less among the starts, as a share of its deviation over all observations,
is constant there.
"""


@dataclass(frozen=True)
class StartRows:
    """n starts, task and observation side by side."""

    numbers: NDArray[np.float64]
    """[n, d] normalised"""
    categories: NDArray[np.int64]
    """[n, m]"""

    @staticmethod
    def of(task: Parts, observation: Parts) -> StartRows:
        numbers = torch.cat((task.numbers, observation.numbers), -1)
        categories = torch.cat((task.categories, observation.categories), -1)
        return StartRows(numbers.cpu().double().numpy(), categories.cpu().numpy())

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, rows: Any) -> StartRows:
        return StartRows(self.numbers[rows], self.categories[rows])

    def __add__(self, other: StartRows) -> StartRows:
        numbers = np.concatenate((self.numbers, other.numbers))
        return StartRows(numbers, np.concatenate((self.categories, other.categories)))

    @property
    def columns(self) -> NDArray[np.float64]:
        return np.concatenate((self.numbers, self.categories), 1)

    def fingerprints(self) -> list[bytes]:
        """Equal for equal starts."""
        return [row.tobytes() for row in self.columns + 0.0]  # -0.0 becomes 0.0


class StartSpace:
    """The valid starts of a codec's spaces, and the distances between them."""

    def __init__(self, codec: Codec):
        task, observation = codec.spec.task, codec.spec.observation
        self.bins = np.array(task.bins + observation.bins)
        self.cardinalities = np.array(task.categories + observation.categories, np.int64)
        offset = len(task.categories)
        self.texts = task.texts + tuple(
            TextSpan(text.start + offset, text.length, text.min_length)
            for text in observation.texts
        )
        self.weights = np.ones(len(self.cardinalities))
        for text in self.texts:
            self.weights[text.start : text.start + text.length] = 1 / text.length
        low, high = self._bound(codec, "low"), self._bound(codec, "high")
        self.low = low - self.bins - 1e-6 * np.abs(low)
        self.high = high + self.bins + 1e-6 * np.abs(high)

    @staticmethod
    def _bound(codec: Codec, side: str) -> NDArray[np.float64]:
        """The bound `side` of the Boxes, normalised. A reset option's number has no bound."""
        space = codec.observation_codec
        numbers = np.zeros((1, space.numbers))
        categories = np.zeros((1, space.categories), np.int64)
        for leaf in space.leaves:
            if leaf.numbers.stop > leaf.numbers.start:
                numbers[0, leaf.numbers] = np.ravel(getattr(leaf.space, side))
        with np.errstate(over="ignore"):  # a float64 bound beyond float32 becomes infinite
            task = codec.task_parts(numbers, categories, np.zeros((1, len(codec.options))))
            bound = StartRows.of(task, codec.observation_parts(numbers, categories)).numbers[0]
        options = sum(option.values is None for option in codec.options)
        width = codec.spec.task.numbers
        bound[width - options : width] = -np.inf if side == "low" else np.inf
        return bound

    def holds(self, starts: StartRows) -> NDArray[np.bool_]:
        """[n] bool: the starts that are in the spaces."""
        x, codes = starts.numbers, starts.categories
        with np.errstate(invalid="ignore"):
            inside = np.isfinite(x) & (x >= self.low) & (x <= self.high)
        held: NDArray[np.bool_] = inside.all(1)
        held &= ((codes >= 0) & (codes < self.cardinalities)).all(1)
        for text in self.texts:
            filled = codes[:, text.start : text.start + text.length] > 0
            held &= filled[:, : text.min_length].all(1)
            held &= (filled[:, 1:] <= filled[:, :-1]).all(1)
        return held

    def rounded(self, starts: StartRows, origin: NDArray[np.float64]) -> StartRows:
        """Whole bins from `origin` [d], a real start: values that reality rounds more coarsely, or
        always repeats, lie mid-bin.
        """
        numbers = np.round((starts.numbers - origin) / self.bins) * self.bins
        return StartRows(numbers, starts.categories)

    def distances(self, a: StartRows, b: StartRows, among: StartRows) -> NDArray[np.float64]:
        """[len(a), len(b)]. A number weighs by its deviation in `among` (a constant one by that
        over all observations), a category as two draws of a number, a text by its characters.
        """
        from scipy.spatial.distance import cdist

        deviation = among.numbers.std(0)
        scale = np.where(deviation >= CONSTANT, deviation, 1.0)
        squares = np.zeros((len(a), len(b)))
        if len(scale):
            squares += cdist(a.numbers / scale, b.numbers / scale, "sqeuclidean")
        if len(self.weights):
            differ = cdist(a.categories, b.categories, "hamming", w=self.weights)
            squares += 2 * self.weights.sum() * differ
        return np.sqrt(squares)
