"""Do values in the world rank policies as reality does: correlations, rank violation and regret."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from mesocosm.agents.gate import POLICIES
from mesocosm.evaluate.metrics import stats

Array = NDArray[np.float64]
LEAST, PER_FIFTH = POLICIES, 3
"""Policies, and policies in each fifth of the range of real returns, that a firm ranking needs."""
FEWEST = 3
"""Fewest policies for a correlation: that of two points is always 1 or -1."""


@dataclass(frozen=True)
class Ranking:
    """Statistics of the mean returns of n policies in reality R and in the world S.

    Intervals are 90% bootstrap over policies. `notes` say why a value is None.
    """

    policies: int
    low: float
    high: float
    """Lowest and highest real return"""
    fifths: tuple[int, ...]
    """Policies in each fifth of that range, from below"""
    pearson: float | None
    pearson_interval: stats.Interval | None
    spearman: float | None
    spearman_interval: stats.Interval | None
    spearman_top: float | None
    """Spearman of the policies whose real return is at least the median"""
    mmrv: float | None
    """Mean maximum rank violation, in units of return: the mean over policies of the largest real
    difference to another that the world ranks the other way round (Li et al. 2024, arXiv
    2405.05941)
    """
    regret: float | None
    """regret@1: what choosing the policy that is best in the world loses in reality, as a share of
    the range; the mean over equally good ones
    """
    chosen: int
    """Row of that policy, the first of equals"""
    error: float
    """Mean absolute error of the world's values, in units of return"""
    bias: float
    """Mean of (world - reality): above 0 where the world flatters"""
    notes: tuple[str, ...]


def fifths_of(returns: ArrayLike) -> tuple[int, ...]:
    """The number of values in each fifth of their range, lowest first. The values are not all
    equal.
    """
    values = np.asarray(returns, dtype=np.float64)
    fifth = 5 * (values - values.min()) / np.ptp(values)
    return tuple(np.bincount(np.minimum(fifth.astype(int), 4), minlength=5).tolist())


def firm(fifths: Sequence[int]) -> bool:
    """True if that many policies in each fifth make a firm ranking."""
    return sum(fifths) >= LEAST and min(fifths) >= PER_FIFTH


def ranking(real: ArrayLike, imagined: ArrayLike, *, seed: int = 0) -> Ranking:
    """`real`, `imagined`: mean returns [n], n >= 1, of the same policies."""
    R, S = np.asarray(real, dtype=np.float64), np.asarray(imagined, dtype=np.float64)
    n, low, high = len(R), float(R.min()), float(R.max())
    span = _spread(R)
    fifths = fifths_of(R) if span > 0 else (n, 0, 0, 0, 0)
    notes = []
    if n < FEWEST:
        notes.append(
            f"{n} policies: a correlation needs at least {FEWEST}; add policies, or raise graded."
        )
    elif span == 0:
        notes.append(
            f"all {n} policies have the same real return, {low:g}: correlation, rank violation and"
            " regret are undefined."
        )
    elif _spread(S) == 0:
        notes.append(
            f"the world gives all {n} policies the same value, {S[0]:g}: correlations are"
            " undefined."
        )
    if n < LEAST or (span > 0 and not firm(fifths)):
        notes.append(
            f"{n} policies, in the fifths of the real range {', '.join(map(str, fifths))}: at least"
            f" {LEAST}, and {PER_FIFTH} in each, make these figures firm."
        )
    pearson, pearson_interval = _correlation(_pearson, R, S, seed)
    spearman, spearman_interval = _correlation(_spearman, R, S, seed)
    top = np.median(R) <= R
    spearman_top = _correlation(_spearman, R[top], S[top], seed)[0]
    if spearman is not None and spearman_top is None:
        notes.append(
            "the better half of the policies are too few, or equal, for a correlation of their own."
        )
    chosen = R[S.max() == S].mean()  # any of those that the world values equally may be chosen
    violated = (S[:, None] < S) != (R[:, None] < R)
    return Ranking(
        policies=n,
        low=low,
        high=high,
        fifths=fifths,
        pearson=pearson,
        pearson_interval=pearson_interval,
        spearman=spearman,
        spearman_interval=spearman_interval,
        spearman_top=spearman_top,
        mmrv=float((np.abs(R[:, None] - R) * violated).max(1).mean()) if span > 0 else None,
        regret=float(high - chosen) / span if span > 0 and _spread(S) > 0 else None,
        chosen=int(S.argmax()),
        error=float(np.abs(S - R).mean()),
        bias=float((S - R).mean()),
        notes=tuple(notes),
    )


def _correlation(
    measure: Callable[[Array, Array], Array], R: Array, S: Array, seed: int
) -> tuple[float | None, stats.Interval | None]:
    if len(R) < FEWEST or _spread(R) == 0 or _spread(S) == 0:
        return None, None

    def statistic(rows: Array) -> Array:
        return measure(R[rows], S[rows])

    resamples = stats.RESAMPLES // 4
    return float(measure(R, S)), stats.bootstrap(statistic, len(R), seed=seed, resamples=resamples)


def _spread(values: Array) -> float:
    """The highest less the lowest; 0 where that is rounding."""
    spread = float(np.ptp(values))
    return spread if spread > 1e-9 * float(np.abs(values).max()) else 0.0


def _pearson(R: Array, S: Array) -> Array:
    """[..., n] -> [...]; nan where either is constant, which is exactly 0 less its first value."""
    R, S = R - R[..., :1], S - S[..., :1]
    R, S = R - R.mean(-1, keepdims=True), S - S.mean(-1, keepdims=True)
    scale = np.sqrt((R**2).sum(-1) * (S**2).sum(-1))
    return np.clip((R * S).sum(-1) / scale, -1, 1)


def _spearman(R: Array, S: Array) -> Array:
    return _pearson(rankdata(R, axis=-1), rankdata(S, axis=-1))
