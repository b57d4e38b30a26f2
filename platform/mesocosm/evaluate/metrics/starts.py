"""Task distribution: starts (task, o_0) that a world generates, against held-out real ones."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mesocosm.data.loading.windows import start_parts
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.split import Split, split_to_measure
from mesocosm.evaluate.metrics import stats
from mesocosm.evaluate.metrics.log import Array, check_dataset, codec_of
from mesocosm.evaluate.metrics.start_space import StartRows, StartSpace
from mesocosm.model import rng
from mesocosm.model.tensors import Parts
from mesocosm.model.world import World

STARTS = 512
"""Starts that are generated, and real ones that they are compared with at most."""
LEAST = 20
"""Starts that each side of a comparison needs."""
POWER = 100
"""Pairs below which the two-sample test is weak. It separates a uniform from a normal of the same
deviation in six independent numbers with an AUC of .60 at 50 pairs, .71 at 150 and .81 at 500.
"""
NEIGHBOURS = 5
"""k of coverage: equal distributions have about 1 - 2**-k of it."""
FOLDS = 5
MARGIN = 0.1
"""How far a number may be outside the range of the real starts, as a share of the range. `LEEWAY`
applies instead where it is more.
"""
LEEWAY = 0.01
"""The least such distance, as a share of the number's standard deviation over all observations. It
is also the least radius of a neighbourhood.
"""
TRAINING = 10_000
"""Training starts that are searched for the nearest, at most. Copies are searched among all."""
CHUNK = 2048

Interval = stats.Interval


@dataclass(frozen=True)
class TaskDistribution:
    """Generated starts against real ones.

    `notes` say why a value is None. Intervals are 90% bootstrap over starts.
    """

    generated: int
    real: int
    """Held-out starts compared with"""
    training: int
    split: Split
    """The split of the real starts"""
    pairs: int
    """Starts of each side in `auc` and `nearest`"""
    in_space: float | None = None
    """Share of generated starts with finite numbers within the Boxes (to one unit of precision),
    categories that exist, and whole texts
    """
    in_range: float | None = None
    """Share whose numbers lie in the range of all real starts, plus `MARGIN` and `LEEWAY`"""
    validity: float | None = None
    """Share of starts in space and in range"""
    validity_interval: Interval | None = None
    validity_real: float | None = None
    """The same share of validation's starts, by the range of the training starts: the best that a
    generator can reach
    """
    coverage: float | None = None
    """Share of held-out starts with a generated one as near as the `NEIGHBOURS`-th nearest of as
    many training starts (Naeem et al. 2020, arXiv 2002.09797)
    """
    coverage_interval: Interval | None = None
    coverage_expected: float | None = None
    """Its expectation for equal continuous distributions at these numbers of starts"""
    auc: float | None = None
    """AUC of a gradient-boosted classifier of generated against real, on held-out folds: at .5 (or
    less) it cannot tell them apart, at 1 it always can
    """
    auc_interval: Interval | None = None
    """Interval of these classifiers' scores, not of classifiers trained on other starts, so too
    narrow: with equal distributions of 4 numbers (20 to 200 pairs, 40 draws each) 7 in 10 held .5
    """
    nearest: float | None = None
    """Median distance of a generated start to the nearest training start"""
    nearest_real: float | None = None
    """The same of a held-out start"""
    nearest_ratio: float | None = None
    """`nearest / nearest_real`: near 0 the starts are copies of training's, near 1 they are new"""
    nearest_ratio_interval: Interval | None = None
    copies: float | None = None
    """Share of generated starts that equal a training start"""
    copies_real: float | None = None
    """The same share of held-out starts"""
    notes: tuple[str, ...] = ()


def task_distribution(
    world: World,
    dataset: Dataset,
    *,
    seed: int = 0,
    starts: int = STARTS,
    more: tuple[Parts, Parts] | None = None,
) -> TaskDistribution:
    """Compare generated starts with those of the validation split.

    If validation has fewer than LEAST episodes, the training split replaces it, with a note. A
    start's nearest is then searched among the other starts.

    Args:
        world: Generates `starts` starts.
        dataset: Of the world's spaces.
        seed: Of the starts and draws.
        starts: On each side, at most.
        more: (task, o_0) of real episodes that no dataset holds.

    Raises:
        UsageError: The dataset is of other spaces.
    """
    codec = codec_of(world)
    check_dataset(dataset, codec)
    space = StartSpace(codec)
    train, valid = (
        StartRows.of(*start_parts(dataset, codec, split)) for split in ("train", "valid")
    )
    if more is not None:
        valid += StartRows.of(*more)
    keys = rng.keys(seed, torch.arange(starts, device=world.device), 0, 0)
    made = StartRows.of(*world.sample_start(keys))
    split = split_to_measure(len(valid), LEAST)
    real, every = valid if split == "valid" else train, train + valid
    notes: list[str] = []
    facts: dict[str, Any] = {"generated": len(made), "training": len(train), "split": split}
    facts |= _validity(notes, space, made, train, valid, seed)
    finite = np.isfinite(made.numbers).all(1)
    if not finite.all():
        notes.append(
            f"{int((~finite).sum())} of {len(made)} generated starts have numbers that are not"
            " finite: only validity counts them."
        )
    made = made[finite]
    if len(every):
        origin = every.numbers[0]
        train, real, made = (space.rounded(some, origin) for some in (train, real, made))
    rows = np.random.default_rng(seed).permutation(len(real))[:starts]
    pairs = min(len(rows), len(made))
    if len(valid) < LEAST <= len(train):
        notes.append(
            f"validation and judged episodes are {len(valid)} where {LEAST} are needed: the starts"
            " are compared with those of the training split, so the two-sample test and coverage"
            " would not find a copy, and validity has no figure of reality beside it."
        )
    if min(len(real), len(made)) < LEAST:
        held = f"{len(valid)} held-out and {len(train)} training"
        notes.append(
            f"{held if len(real) < LEAST else f'{len(made)} generated'} starts are too few:"
            f" coverage, the two-sample test and distances need {LEAST} of each side."
        )
        pairs = 0
    else:
        facts |= _two_sample(notes, real[rows], made, pairs, seed)
        positions = rows if split == "train" else None
        facts |= _against_training(notes, space, train, real[rows], positions, made, pairs, seed)
    return TaskDistribution(**facts | {"real": len(rows), "pairs": pairs, "notes": tuple(notes)})


def _validity(
    notes: list[str],
    space: StartSpace,
    made: StartRows,
    train: StartRows,
    valid: StartRows,
    seed: int,
) -> dict[str, Any]:
    def in_range(starts: StartRows, among: StartRows) -> NDArray[np.bool_]:
        low, high = among.numbers.min(0), among.numbers.max(0)
        margin = np.maximum(np.maximum(MARGIN * (high - low), LEEWAY), space.bins)
        return ((starts.numbers >= low - margin) & (starts.numbers <= high + margin)).all(1)

    if not len(made):
        return {}
    every, held = train + valid, space.holds(made)
    facts: dict[str, Any] = {"in_space": float(held.mean())}
    outside = int((~space.holds(every)).sum())
    if outside:
        notes.append(
            f"{outside} of {len(every)} real starts lie outside the environment's own space: its"
            " bounds are wrong, and validity suffers from that."
        )
    if len(every) < LEAST:
        notes.append(f"{len(every)} real starts have no range: validity needs {LEAST}.")
        return facts
    inside = in_range(made, every)
    both = held & inside
    facts |= {"in_range": float(inside.mean()), "validity": float(both.mean())}
    facts["validity_interval"] = stats.mean_interval(both, seed=seed)
    if min(len(train), len(valid)) >= LEAST:
        facts["validity_real"] = float((space.holds(valid) & in_range(valid, train)).mean())
    return facts


def _two_sample(
    notes: list[str], real: StartRows, made: StartRows, pairs: int, seed: int
) -> dict[str, Any]:
    a, b = out_of_fold(real.columns[:pairs], made.columns[:pairs], seed)
    wins = (b > a[:, None]) + 0.5 * (b == a[:, None])

    def statistic(rows: Array) -> Array:
        counts = np.stack([np.bincount(row, minlength=pairs) for row in rows]).astype(np.float64)
        area: Array = ((counts @ wins) * counts).sum(1) / pairs**2
        return area

    still = np.ptp(real.columns, axis=0) == 0
    if still.all():
        notes.append(f"all {len(real)} real starts are the same: the world had one start to learn.")
    moved = np.abs(made.numbers - real.numbers[0]).max(0)[still[: made.numbers.shape[1]]]
    if moved.any():
        notes.append(
            f"{np.count_nonzero(moved)} numbers are constant among the real starts and not among"
            f" the generated, which leave them by up to {moved.max():.2g} of a deviation over all"
            " observations: by that alone the two-sample test tells them, however small it is."
        )
    if pairs < POWER:
        notes.append(
            f"the two-sample test has {pairs} starts of each side: below {POWER} it overlooks small"
            " differences, and a low AUC is weak evidence."
        )
    interval = stats.bootstrap(statistic, pairs, seed=seed)
    return {"auc": float(wins.mean()), "auc_interval": interval}


def out_of_fold(
    real: NDArray[np.float64], made: NDArray[np.float64], seed: int
) -> NDArray[np.float64]:
    """[2, n] scores (higher: generated) of two [n, columns], each by a classifier trained on the
    folds without it.

    Every fold has as many of one side as of the other; with unequal ones, the classifiers' priors
    alone would bring the AUC below .5. Small leaves find more at every n and bring no more false
    alarms.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier  # a second to import
    from sklearn.model_selection import PredefinedSplit, cross_val_predict

    n = len(real)
    classifier = HistGradientBoostingClassifier(
        max_iter=100,
        max_leaf_nodes=8,
        min_samples_leaf=min(max(n // 10, 2), 5),
        early_stopping=False,
        random_state=seed,
    )
    x, side = np.concatenate((real, made)), np.repeat([0, 1], n)
    folds = PredefinedSplit(np.tile(np.random.default_rng([seed, n]).permutation(n) % FOLDS, 2))
    scores = cross_val_predict(classifier, x, side, cv=folds, method="decision_function")
    return scores.reshape(2, n)


def _against_training(
    notes: list[str],
    space: StartSpace,
    train: StartRows,
    real: StartRows,
    positions: Array | None,
    made: StartRows,
    pairs: int,
    seed: int,
) -> dict[str, Any]:
    """Coverage, copies and nearest distances. `positions` [len(real)] of the real starts in
    `train`; None: they are not of it.
    """
    if len(train) < LEAST:
        notes.append(
            f"{len(train)} training starts are too few: coverage, copies, distances to the nearest"
            f" of them and validity's figure of reality need {LEAST}."
        )
        return {}
    drawn = np.random.default_rng([seed, len(train)]).permutation(len(train))[:TRAINING]
    if len(drawn) < len(train):
        notes.append(
            f"the nearest training start is sought among {len(drawn)} of {len(train)}, drawn at"
            " random."
        )

    def to_training(starts: StartRows, among: Array) -> NDArray[np.float64]:
        distances = space.distances(starts, train[among], train)
        if positions is not None and starts is real:
            distances[positions[:, None] == among] = np.inf
        return distances

    def nearest(starts: StartRows) -> NDArray[np.float64]:
        chunks = [drawn[i : i + CHUNK] for i in range(0, len(drawn), CHUNK)]
        return np.min([to_training(starts, chunk).min(1) for chunk in chunks], axis=0)

    size = min(len(made), len(drawn))
    radius = np.sort(to_training(real, drawn[:size]), axis=1)[:, NEIGHBOURS - 1]
    covered = space.distances(real, made[:size], train).min(1) <= np.maximum(radius, LEEWAY)
    others = size - np.arange(NEIGHBOURS)
    counts = Counter(train.fingerprints())
    itself = 1 if positions is None else 2
    of_made, of_real = nearest(made)[:pairs], nearest(real)[:pairs]
    median_made, median_real = float(np.median(of_made)), float(np.median(of_real))
    facts = {
        "coverage": float(covered.mean()),
        "coverage_interval": stats.mean_interval(covered, seed=seed),
        "coverage_expected": 1 - float(np.prod(others / (others + size))),
        "copies": float(np.mean([counts[one] >= 1 for one in made.fingerprints()])),
        "copies_real": float(np.mean([counts[one] >= itself for one in real.fingerprints()])),
        "nearest": median_made,
        "nearest_real": median_real,
    }
    if median_real == 0:
        notes.append(
            "half of the held-out starts or more equal a training start: there is no distance to"
            " compare with, and copies are no fault."
        )
        return facts

    def ratio(rows: Array) -> Array:
        return np.median(of_made[rows], 1) / np.median(of_real[rows], 1)

    interval = stats.bootstrap(ratio, pairs, seed=seed)
    return facts | {"nearest_ratio": median_made / median_real, "nearest_ratio_interval": interval}
