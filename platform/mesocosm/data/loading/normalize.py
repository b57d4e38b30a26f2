"""Columns of numbers -> normalised numbers and back, and the moments they are normalised by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
CONSTANT = 1e-8
"""A column whose deviation is at most this share of its mean's magnitude is constant: scale 1."""
CONSTANT_PRECISION = 1e-4
AT_ONCE = 1 << 15
"""Numbers normalised at once, so that between the two operations they stay in a core's cache."""


@dataclass(frozen=True)
class Scaling:
    """Per-column statistics in raw units, [n] float64; normalised = (raw - mean) / scale."""

    mean: Array
    scale: Array
    precision: Array

    def normalise(self, raw: Array) -> Tensor:
        """[..., n] raw -> float32."""
        out = np.empty(raw.size, np.float32)
        if raw.size:
            mean, scale = self._repeated
            values, between = raw.reshape(-1), np.empty(min(len(mean), raw.size))
            for start in range(0, len(values), len(mean)):
                some = values[start : start + len(mean)]
                result = np.subtract(some, mean[: len(some)], out=between[: len(some)])
                out[start : start + len(some)] = np.divide(result, scale[: len(some)], out=result)
        return torch.from_numpy(out.reshape(raw.shape))

    @cached_property
    def _repeated(self) -> tuple[Array, Array]:
        """Mean and scale repeated for AT_ONCE numbers: one long row takes a third of the time of
        many short ones.
        """
        rows = max(1, AT_ONCE // len(self.mean))
        return np.tile(self.mean, rows), np.tile(self.scale, rows)

    def only(self, columns: Array) -> Scaling:
        """The scaling of some columns."""
        return Scaling(self.mean[columns], self.scale[columns], self.precision[columns])

    def raw(self, normalised: Tensor) -> Array:
        """[..., n] float32 -> float64 raw."""
        return normalised.detach().cpu().numpy().astype(np.float64) * self.scale + self.mean

    def bins(self) -> tuple[float, ...]:
        """The precision in normalised units."""
        return tuple((self.precision / self.scale).tolist())

    def zero(self) -> list[float]:
        """A raw 0 in normalised units."""
        zeros: list[float] = (-self.mean / self.scale).tolist()
        return zeros

    def to_json(self) -> dict[str, list[float]]:
        return {name: getattr(self, name).tolist() for name in ("mean", "scale", "precision")}

    @staticmethod
    def from_json(data: Mapping[str, list[float]]) -> Scaling:
        return Scaling(**{name: np.array(values, np.float64) for name, values in data.items()})

    @staticmethod
    def of(moments: Moments, first: Moments, integers: Array | None = None) -> Scaling:
        """The scaling of columns with these moments.

        Args:
            moments: of all datasets.
            first: of the first dataset. The precision of a float is 10**floor(log10(1e-4 std)) with
                its std (that of all, where the column is constant in the first).
            integers: [n] bool, the columns of integers, whose precision is 1.
        """
        scale = np.where(moments.constant, 1.0, moments.std)
        stated = np.where(first.constant, scale, first.std)
        precision = np.where(
            moments.constant, CONSTANT_PRECISION, 10.0 ** np.floor(np.log10(1e-4 * stated))
        )
        if integers is not None:
            precision = np.where(integers, 1.0, precision)
        return Scaling(moments.mean, scale, precision)


class Moments:
    """Mean and standard deviation of columns, chunk by chunk (Chan, Golub and LeVeque 1979)."""

    def __init__(self, columns: int):
        self.count: int | Array = 0
        """Rows; [n] where columns have different numbers of them"""
        self.mean = np.zeros(columns)
        self.squares = np.zeros(columns)
        """Sums of squared differences from the mean."""

    def add(self, values: Array) -> None:
        """Add [rows, columns]."""
        if len(values):
            mean = values.mean(0)
            self.merge(len(values), mean, ((values - mean) ** 2).sum(0))

    def merge(self, count: int | Array, mean: Array, squares: Array) -> None:
        """Add the moments of other rows."""
        total = self.count + count
        shift = mean - self.mean
        self.squares += squares + shift**2 * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total

    @property
    def std(self) -> Array:
        return np.sqrt(self.squares / np.maximum(self.count, 1))

    @property
    def constant(self) -> Array:
        return self.std <= CONSTANT * np.abs(self.mean)
