"""Figures with intervals, and `None` where the data cannot say: nothing here returns nan or
infinity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Interval = tuple[float, float]

LEVEL = 0.9
RESAMPLES = 2000


def mean_interval(values: ArrayLike, *, seed: int = 0) -> Interval | None:
    """Percentile bootstrap interval of the mean of `values` [n]; None below two values, where there
    is no spread to resample.
    """
    data = np.asarray(values, dtype=np.float64)
    return bootstrap(lambda rows: data[rows].mean(-1), len(data), seed=seed)


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], NDArray[np.float64]],
    count: int,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval | None:
    """Percentile bootstrap interval of `statistic`, which takes `rows` [r, count], resamples of
    0..count-1 with replacement, and gives [r].

    The unit that is resampled must be the independent one (an episode, not a transition). None
    below two units, or where the statistic is undefined (not finite) on half of the resamples or
    more.
    """
    if count < 2:
        return None
    drawn = statistic(
        np.random.default_rng([seed, count]).integers(0, count, size=(resamples, count))
    )
    defined = drawn[np.isfinite(drawn)]
    if len(defined) * 2 <= resamples:
        return None
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def ratio_of_rms(error: ArrayLike, baseline: ArrayLike) -> float | None:
    """sqrt(sum error / sum baseline) of the summed squares of n units; None where the baseline made
    no error.
    """
    total = float(np.sum(baseline))
    return math.sqrt(float(np.sum(error)) / total) if total > 0 else None


def ratio_interval(error: ArrayLike, baseline: ArrayLike, *, seed: int = 0) -> Interval | None:
    """Bootstrap interval of `ratio_of_rms` over its units."""
    above, below = np.asarray(error, dtype=np.float64), np.asarray(baseline, dtype=np.float64)

    def statistic(rows: NDArray[np.int64]) -> NDArray[np.float64]:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.sqrt(above[rows].sum(-1) / below[rows].sum(-1))

    return bootstrap(statistic, len(above), seed=seed)


def mean_of_groups(
    sums: ArrayLike, counts: ArrayLike, *, seed: int = 0
) -> tuple[float | None, Interval | None]:
    """The mean of what n groups (episodes) sum to, over all that they count, and its interval over
    the groups; None where they count nothing.
    """
    above, below = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)

    def statistic(rows: NDArray[np.int64]) -> NDArray[np.float64]:
        with np.errstate(divide="ignore", invalid="ignore"):
            return above[rows].sum(-1) / below[rows].sum(-1)

    total = float(below.sum())
    return (
        (float(above.sum()) / total, bootstrap(statistic, len(above), seed=seed))
        if total > 0
        else (None, None)
    )


def r_squared_interval(
    truth: ArrayLike, predicted: ArrayLike, group: NDArray[np.int64], *, seed: int = 0
) -> Interval | None:
    """Bootstrap interval of `r_squared` over the groups, numbered 0..n-1, that values belong to."""
    actual, guess = np.asarray(truth, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    centred = actual - actual.mean()
    sums = [
        np.bincount(group, weights=values)
        for values in (np.ones(len(actual)), centred, centred**2, (actual - guess) ** 2)
    ]

    def statistic(rows: NDArray[np.int64]) -> NDArray[np.float64]:
        count, first, second, residual = (values[rows].sum(-1) for values in sums)
        with np.errstate(divide="ignore", invalid="ignore"):
            return 1.0 - residual / (second - first**2 / count)

    return bootstrap(statistic, len(sums[0]), seed=seed)


def auc(
    truth: ArrayLike, score: ArrayLike, group: NDArray[np.int64] | None = None, *, seed: int = 0
) -> tuple[float | None, Interval | None]:
    """(area under the ROC curve, its interval over groups): the chance that a true one's score is
    above a false one's, ties counted half.

    None where there is only one kind. `group` [N] numbers the independent units 0..n-1 that are
    resampled; None: no interval.
    """
    actual, scores = np.asarray(truth, dtype=np.bool_), np.asarray(score, dtype=np.float64)
    if actual.all() or not actual.any():
        return None, None
    levels, level = np.unique(scores, return_inverse=True)

    def area(weight: NDArray[np.float64]) -> float:
        true = np.bincount(level, weights=weight * actual, minlength=len(levels))
        false = np.bincount(level, weights=weight * ~actual, minlength=len(levels))
        total = true.sum() * false.sum()
        return (
            float((true * (np.cumsum(false) - false / 2)).sum() / total) if total > 0 else math.nan
        )

    whole = area(np.ones(len(actual)))
    if group is None:
        return whole, None
    count = int(group.max()) + 1

    def statistic(rows: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.array(
            [area(np.bincount(row, minlength=count)[group].astype(np.float64)) for row in rows]
        )

    return whole, bootstrap(
        statistic, count, seed=seed, resamples=RESAMPLES // 4
    )  # each costs a pass over all values


def r_squared(truth: ArrayLike, predicted: ArrayLike) -> float | None:
    """1 - residual / total sum of squares; None where the truth is constant, for which it is
    undefined.
    """
    actual, guess = np.asarray(truth, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    if actual.size == 0 or np.ptp(actual) == 0:
        return None
    total = float(((actual - actual.mean()) ** 2).sum())
    return 1.0 - float(((actual - guess) ** 2).sum()) / total


def precision_recall(truth: ArrayLike, predicted: ArrayLike) -> tuple[float | None, float | None]:
    """Precision (None where nothing was predicted) and recall (None where there was nothing to
    find) of boolean arrays.
    """
    actual, guess = np.asarray(truth, dtype=np.bool_), np.asarray(predicted, dtype=np.bool_)
    hits = int((actual & guess).sum())
    found, there = int(guess.sum()), int(actual.sum())
    return (hits / found if found else None), (hits / there if there else None)


def describe(values: Sequence[float], *, seed: int = 0) -> dict[str, Any]:
    """count, mean, interval, min, max and standard deviation of `values`, with a `note` in words
    where a figure is undefined.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        return {
            "count": 0,
            "mean": None,
            "interval": None,
            "min": None,
            "max": None,
            "std": None,
            "note": "no values",
        }
    note = None
    if data.size < 2:
        note = "one value: no interval"
    elif np.ptp(data) == 0:
        note = (
            f"all {data.size} values are equal: the interval has no width, which is no proof of"
            " certainty"
        )
    return {
        "count": int(data.size),
        "mean": float(data.mean()),
        "interval": mean_interval(data, seed=seed),
        "min": float(data.min()),
        "max": float(data.max()),
        "std": float(data.std(ddof=1)) if data.size > 1 else None,
        "note": note,
    }
