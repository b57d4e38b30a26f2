"""Statistics with bootstrap intervals. A statistic is None if the data cannot answer. No function
returns nan or infinity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Interval = tuple[float, float]
Array = NDArray[Any]

LEVEL = 0.9
RESAMPLES = 2000


def bootstrap(
    statistic: Callable[[Array], Array], count: int, *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval | None:
    """Percentile bootstrap interval.

    Args:
        statistic: Takes `rows` [r, count], resamples of 0..count-1 with replacement; returns [r].
        count: Independent units: episodes, not transitions.
        seed: Of the resamples.
        resamples: How many are drawn.

    Returns:
        None below two units, or where the statistic is not finite on half of the resamples.
    """
    if count < 2:
        return None
    rows = np.random.default_rng([seed, count]).integers(0, count, size=(resamples, count))
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = statistic(rows)
    defined = drawn[np.isfinite(drawn)]
    if len(defined) * 2 <= resamples:
        return None
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mean_interval(values: ArrayLike, *, seed: int = 0) -> Interval | None:
    """Bootstrap interval of the mean of `values` [n]; None below two values."""
    data = np.asarray(values, dtype=np.float64)
    return bootstrap(lambda rows: data[rows].mean(-1), len(data), seed=seed)


def grouped_mean(
    values: ArrayLike,
    group: Array,
    *,
    weights: ArrayLike | None = None,
    root: bool = False,
    seed: int = 0,
) -> tuple[float | None, Interval | None]:
    """sum(values) / sum(weights) and its interval over groups (episodes).

    Args:
        values: [N].
        group: [N] the group of each, numbered 0..n-1.
        weights: [N]; None: ones, which gives the mean.
        root: Take the square root of the ratio.
        seed: Of the resamples.

    Returns:
        None where the weights sum to 0.
    """
    sums = np.bincount(group, np.asarray(values, dtype=np.float64))
    counts = np.bincount(group, None if weights is None else np.asarray(weights, dtype=np.float64))

    def statistic(rows: Array) -> Array:
        ratio: Array = sums[rows].sum(-1) / counts[rows].sum(-1)
        return np.sqrt(ratio) if root else ratio

    if counts.sum() <= 0:
        return None, None
    ratio = float(sums.sum() / counts.sum())
    interval = bootstrap(statistic, len(sums), seed=seed)
    return math.sqrt(ratio) if root else ratio, interval


def ratio_of_rms(error: ArrayLike, baseline: ArrayLike) -> float | None:
    """sqrt(sum error / sum baseline) of squared errors; None where the baseline made no error."""
    total = float(np.sum(baseline))
    return math.sqrt(float(np.sum(error)) / total) if total > 0 else None


def r_squared(
    truth: ArrayLike, predicted: ArrayLike, group: Array
) -> tuple[float | None, Interval | None]:
    """1 - residual / total sum of squares, and its interval over groups numbered 0..n-1; None where
    the truth is constant.
    """
    actual, guess = np.asarray(truth, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    if actual.size == 0 or np.ptp(actual) == 0:
        return None, None
    centred = actual - actual.mean()
    columns = (np.ones(len(actual)), centred, centred**2, (actual - guess) ** 2)
    sums = np.stack([np.bincount(group, column) for column in columns])

    def statistic(rows: Array) -> Array:
        count, first, second, residual = sums[:, rows].sum(-1)
        explained: Array = 1.0 - residual / (second - first**2 / count)
        return explained

    whole = statistic(np.arange(sums.shape[1])[None])
    return float(whole[0]), bootstrap(statistic, sums.shape[1])


def auc(truth: ArrayLike, score: ArrayLike, group: Array) -> tuple[float | None, Interval | None]:
    """(area under the ROC curve, its interval over groups numbered 0..n-1): the probability that
    the score of a true one exceeds that of a false one, ties counted half.

    None where there is only one kind.
    """
    actual, scores = np.asarray(truth, dtype=np.bool_), np.asarray(score, dtype=np.float64)
    if actual.all() or not actual.any():
        return None, None
    levels, level = np.unique(scores, return_inverse=True)
    count = int(group.max()) + 1

    def area(rows: Array) -> float:
        weight = np.bincount(rows, minlength=count)[group]
        true = np.bincount(level, weight * actual, minlength=len(levels))
        false = np.bincount(level, weight * ~actual, minlength=len(levels))
        total = true.sum() * false.sum()
        return float((true * (np.cumsum(false) - false / 2)).sum() / total) if total else math.nan

    def statistic(rows: Array) -> Array:
        return np.array([area(row) for row in rows])

    # Each resample costs a pass over all values.
    return area(np.arange(count)), bootstrap(statistic, count, resamples=RESAMPLES // 4)


def interval_note(values: Sequence[float]) -> str | None:
    """The reason why the interval of the mean is uninformative, or None."""
    if len(values) < 2:
        return "one value: no interval"
    if len(set(values)) == 1:
        return (
            f"all {len(values)} values are equal: the interval has no width, which proves nothing"
        )
    return None
