"""Do values in the world rank policies as reality does: correlations, rank violation, regret, and
when none of them can be said.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as scipy_stats

from mesocosm.evaluate.metrics import stats

LEAST, PER_FIFTH = 15, 3
"""Policies, and policies in each fifth of the range of real returns, below which a note says that
the figures rest on few.
"""
FEWEST = 3
"""A correlation of two points is 1 or -1 whatever they are."""


@dataclass(frozen=True)
class Ranking:
    """Of n policies' mean returns in reality R and in the world S. Intervals are 90% bootstrap over
    policies. None: see `notes`.
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
    """Of the policies whose real return is at least the median"""
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
    """Row of that policy among those that are counted, the first of equals"""
    error: float
    """Mean absolute error of the world's values, in units of return"""
    bias: float
    """Mean of (world - reality): above 0 where the world flatters"""
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def fifths_of(returns: ArrayLike) -> tuple[int, ...]:
    """How many lie in each fifth of their range, from below; they are not all equal."""
    values = np.asarray(returns, dtype=np.float64)
    low, span = values.min(), np.ptp(values)
    return tuple(
        np.bincount(
            np.minimum((5 * (values - low) / span).astype(np.int64), 4), minlength=5
        ).tolist()
    )


def firm(fifths: Sequence[int]) -> bool:
    """Whether so many policies in each fifth are enough for figures to rest on."""
    return sum(fifths) >= LEAST and min(fifths) >= PER_FIFTH


def ranking(real: ArrayLike, imagined: ArrayLike, *, seed: int = 0) -> Ranking:
    """`real`, `imagined`: mean returns [n], n >= 1, of the same policies."""
    R, S = np.asarray(real, dtype=np.float64), np.asarray(imagined, dtype=np.float64)
    low, high = float(R.min()), float(R.max())
    span = _spread(R)
    worth = float(
        R[S.max() == S].mean()
    )  # of policies that the world holds equally good any may be chosen
    fifths = fifths_of(R) if span > 0 else (len(R), 0, 0, 0, 0)
    notes = []
    if len(R) < FEWEST:
        notes.append(
            f"{len(R)} policies: a correlation needs at least {FEWEST}; add policies, or raise"
            " graded."
        )
    elif span == 0:
        notes.append(
            f"all {len(R)} policies have the same real return, {low:g}: correlation, rank violation"
            " and regret are undefined."
        )
    elif _spread(S) == 0:
        notes.append(
            f"the world gives all {len(R)} policies the same value, {S[0]:g}: correlations are"
            " undefined."
        )
    if len(R) < LEAST or (span > 0 and not firm(fifths)):
        held = ", ".join(map(str, fifths))
        notes.append(
            f"{len(R)} policies, in the fifths of the real range {held}: at least {LEAST}, and"
            f" {PER_FIFTH} in each, make these figures firm."
        )
    pearson, pearson_interval = _correlation(_pearson, R, S, seed)
    spearman, spearman_interval = _correlation(_spearman, R, S, seed)
    top = np.median(R) <= R
    spearman_top = _correlation(_spearman, R[top], S[top], seed)[0]
    if spearman is not None and spearman_top is None:
        notes.append(
            "the better half of the policies are too few, or equal, for a correlation of their own."
        )
    chosen = int(S.argmax())
    return Ranking(
        policies=len(R),
        low=low,
        high=high,
        fifths=fifths,
        pearson=pearson,
        pearson_interval=pearson_interval,
        spearman=spearman,
        spearman_interval=spearman_interval,
        spearman_top=spearman_top,
        mmrv=_mmrv(R, S) if span > 0 else None,
        regret=(high - worth) / span if span > 0 and _spread(S) > 0 else None,
        chosen=chosen,
        error=float(np.abs(S - R).mean()),
        bias=float((S - R).mean()),
        notes=tuple(notes),
    )


def _correlation(
    of: Callable[[NDArray[np.float64], NDArray[np.float64]], float],
    R: NDArray[np.float64],
    S: NDArray[np.float64],
    seed: int,
) -> tuple[float | None, stats.Interval | None]:
    if len(R) < FEWEST or _spread(R) == 0 or _spread(S) == 0:
        return None, None

    def statistic(rows: NDArray[np.int64]) -> NDArray[np.float64]:
        with warnings.catch_warnings(), np.errstate(invalid="ignore"):
            warnings.simplefilter("ignore", scipy_stats.ConstantInputWarning)
            warnings.simplefilter("ignore", scipy_stats.NearConstantInputWarning)
            return np.array([of(R[row], S[row]) for row in rows])

    return of(R, S), stats.bootstrap(statistic, len(R), seed=seed, resamples=stats.RESAMPLES // 4)


def _spread(values: NDArray[np.float64]) -> float:
    """Of the highest over the lowest; 0 where that is rounding."""
    spread = float(np.ptp(values))
    return spread if spread > 1e-9 * float(np.abs(values).max()) else 0.0


def _pearson(R: NDArray[np.float64], S: NDArray[np.float64]) -> float:
    return float(np.clip(scipy_stats.pearsonr(R, S).statistic, -1, 1))


def _spearman(R: NDArray[np.float64], S: NDArray[np.float64]) -> float:
    return float(np.clip(scipy_stats.spearmanr(R, S).statistic, -1, 1))


def _mmrv(R: NDArray[np.float64], S: NDArray[np.float64]) -> float:
    violated = (S[:, None] < S) != (R[:, None] < R)
    return float((np.abs(R[:, None] - R) * violated).max(1).mean())
