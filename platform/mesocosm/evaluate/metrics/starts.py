"""Task distribution: starts (task, o_0) that a world generates, against held-out real ones.

Numbers are normalised and rounded to the precision that the codec states, on both sides and to one
grid, so that no digit tells them apart which the likelihood does not count. Distances weigh every
number by the deviation of the real starts (one that is constant there by its deviation over all
observations), a category that differs as two draws of a number do, and a text by the share of its
characters that differ.

"Training" is the training split of the dataset that is given: for a world of other data, it says
nothing of copies.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mesocosm.data.format.dataset import Dataset, Split
from mesocosm.data.format.spaces import SpaceCodec
from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.parts import start_parts
from mesocosm.evaluate.metrics import stats
from mesocosm.evaluate.metrics.log import Array, check_dataset, codec_of
from mesocosm.model import rng
from mesocosm.model.spec import Parts, TextSpan
from mesocosm.model.world import World

STARTS = 512
"""Starts that are generated, and real ones that they are compared with at most."""
LEAST = 20
"""Starts that each side of a comparison needs."""
POWER = 100
"""Pairs below which the two-sample test overlooks much: of 50, it tells a uniform from a normal of
the same deviation in six independent numbers by an AUC of .60, of 150 by .71, of 500 by .81.
"""
NEIGHBOURS = 5
"""k of coverage: equal distributions have about 1 - 2**-k of it."""
FOLDS = 5
MARGIN = 0.1
"""How far beyond the range of the real starts a number may lie, as a share of the range's width...
"""
LEEWAY = 0.01
"""... and as a share of its deviation over all observations, whichever is more. It is the least
radius of a neighbourhood, too.
"""
CONSTANT = 1e-4
"""A number that deviates less among the starts, as a share of its deviation over all observations,
is constant there.
"""
TRAINING = 10_000
"""Training starts among which the nearest is sought, at most. Exact copies are sought among all."""
CHUNK = 2048

Interval = stats.Interval


@dataclass(frozen=True)
class TaskDistribution:
    """Where a figure is None, `notes` says why. Intervals are of 90%, by bootstrap over starts."""

    generated: int
    real: int
    """Held-out starts compared with"""
    training: int
    split: Split
    """Where the real starts are from"""
    pairs: int
    """Starts of each side in `auc` and `nearest`"""
    in_space: float | None
    """Share of generated starts with finite numbers within the Boxes (to one unit of precision),
    categories that exist, and whole texts
    """
    in_range: float | None
    """Share whose numbers lie in the range of all real starts, give or take `MARGIN` and `LEEWAY`
    """
    validity: float | None
    """Share of which both hold"""
    validity_interval: Interval | None
    validity_real: float | None
    """The same share of validation's starts, by the range of the training starts: what a perfect
    generator could reach
    """
    coverage: float | None
    """Share of held-out starts with a generated one as near as the `NEIGHBOURS`-th nearest of as
    many training starts (Naeem et al. 2020, arXiv 2002.09797)
    """
    coverage_interval: Interval | None
    coverage_expected: float | None
    """What equal continuous distributions have of it at these numbers of starts"""
    auc: float | None
    """Of a gradient-boosted classifier that tells generated from real, on folds that it was not
    trained on: .5 (or less) tells nothing, 1 everything
    """
    auc_interval: Interval | None
    """Of these classifiers' scores. It does not know how others, trained on other starts, would
    score: of equal distributions of 4 numbers (20 to 200 pairs, 40 draws each) about 7 in 10 of
    these intervals held .5, and the AUCs deviated by 1.4 times what it says
    """
    nearest: float | None
    """Median distance of a generated start to the nearest training start"""
    nearest_real: float | None
    """The same of a held-out start"""
    nearest_ratio: float | None
    """`nearest / nearest_real`: near 0 the starts are copies of training's, near 1 they are new"""
    nearest_ratio_interval: Interval | None
    copies: float | None
    """Share of generated starts that equal a training start"""
    copies_real: float | None
    """The same share of held-out starts"""
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Starts:
    """n starts, task and observation side by side."""

    numbers: NDArray[np.float64]
    """[n, d] normalised"""
    categories: NDArray[np.int64]
    """[n, m]"""

    @staticmethod
    def of(task: Parts, observation: Parts) -> _Starts:
        def joined(a: torch.Tensor, b: torch.Tensor, dtype: Any) -> Array:
            return torch.cat((a, b), -1).cpu().numpy().astype(dtype)

        return _Starts(
            joined(task.numbers, observation.numbers, np.float64),
            joined(task.categories, observation.categories, np.int64),
        )

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, rows: Any) -> _Starts:
        return _Starts(self.numbers[rows], self.categories[rows])

    def __add__(self, other: _Starts) -> _Starts:
        return _Starts(
            np.concatenate((self.numbers, other.numbers)),
            np.concatenate((self.categories, other.categories)),
        )

    @property
    def columns(self) -> NDArray[np.float64]:
        return np.concatenate((self.numbers, self.categories), 1)

    def fingerprints(self) -> list[bytes]:
        """Equal for equal starts."""
        return [row.tobytes() for row in self.columns + 0.0]  # -0.0 becomes 0.0


class _Form:
    """What starts of a codec's spaces may be."""

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
        low, high = (self._bound(codec, side) for side in ("low", "high"))
        self.low, self.high = (
            low - self.bins - 1e-6 * np.abs(low),
            high + self.bins + 1e-6 * np.abs(high),
        )

    @staticmethod
    def _bound(codec: Codec, side: str) -> NDArray[np.float64]:
        """The Boxes' `side`, normalised; a reset option's number has none."""
        space = SpaceCodec(codec.observation_space)
        numbers, categories = (
            np.zeros((1, space.numbers)),
            np.zeros((1, space.categories), np.int64),
        )
        for leaf in space.leaves:
            if leaf.numbers.stop > leaf.numbers.start:
                numbers[0, leaf.numbers] = np.ravel(getattr(leaf.space, side))
        with np.errstate(
            over="ignore"
        ):  # a float64 bound may be beyond float32: infinite is what it means
            task = codec.task_parts(numbers, categories, np.zeros((1, len(codec.options))))
            found = _Starts.of(task, codec.observation_parts(numbers, categories)).numbers[0]
        options, width = (
            sum(option.values is None for option in codec.options),
            codec.spec.task.numbers,
        )
        found[width - options : width] = -np.inf if side == "low" else np.inf
        return found

    def holds(self, starts: _Starts) -> NDArray[np.bool_]:
        """[n]: whether each lies in the spaces."""
        with np.errstate(invalid="ignore"):
            numbers = (
                np.isfinite(starts.numbers)
                & (starts.numbers >= self.low)
                & (starts.numbers <= self.high)
            )
        categories = (starts.categories >= 0) & (starts.categories < self.cardinalities)
        held: NDArray[np.bool_] = numbers.all(1) & categories.all(1)
        for text in self.texts:
            there = starts.categories[:, text.start : text.start + text.length] > 0
            held &= there[:, : text.min_length].all(1) & (there[:, 1:] <= there[:, :-1]).all(1)
        return held

    def rounded(self, starts: _Starts, origin: NDArray[np.float64]) -> _Starts:
        """Whole bins from `origin` [d], a real start: values that reality rounds more coarsely, or
        always repeats, lie mid-bin.
        """
        return _Starts(
            np.round((starts.numbers - origin) / self.bins) * self.bins, starts.categories
        )


class _Metric:
    """Distances as the module says, with the deviations of `starts`."""

    def __init__(self, form: _Form, starts: _Starts):
        deviation = starts.numbers.std(0)
        self.scale = np.where(deviation >= CONSTANT, deviation, 1.0)
        self.weights = form.weights

    def __call__(self, a: _Starts, b: _Starts) -> NDArray[np.float64]:
        """[len(a), len(b)]"""
        from scipy.spatial.distance import cdist

        squares = np.zeros((len(a), len(b)))
        if len(self.scale):
            squares += cdist(a.numbers / self.scale, b.numbers / self.scale, "sqeuclidean")
        if len(self.weights):
            squares += (
                2
                * self.weights.sum()
                * cdist(a.categories, b.categories, "hamming", w=self.weights)
            )
        return np.sqrt(squares)


def task_distribution(
    world: World,
    dataset: Dataset,
    *,
    seed: int = 0,
    starts: int = STARTS,
    more: tuple[Parts, Parts] | None = None,
) -> TaskDistribution:
    """`starts` generated starts of `world` against the validation split's, and `more` (task, o_0)
    of real episodes that no dataset holds.

    Falls back on the training split, with a note, where validation holds fewer than LEAST episodes;
    there a start's nearest is that among the others. Raises UsageError where the dataset is of
    other spaces.
    """
    codec = codec_of(world)
    check_dataset(dataset, codec)
    form = _Form(codec)
    train, valid = (_Starts.of(*start_parts(dataset, codec, split)) for split in ("train", "valid"))
    if more is not None:
        valid += _Starts.of(*more)
    made = _Starts.of(
        *world.sample_start(rng.keys(seed, torch.arange(starts, device=world.device), 0, 0))
    )
    split: Split = "valid" if len(valid) >= LEAST else "train"
    real, every = valid if split == "valid" else train, train + valid
    found: dict[str, Any] = {"generated": len(made), "training": len(train), "split": split}
    notes: list[str] = []
    _validity(found, notes, form, made, train, valid, seed)
    finite = np.isfinite(made.numbers).all(1)
    if not finite.all():
        notes.append(
            f"{int((~finite).sum())} of {len(made)} generated starts have numbers that are not"
            " finite: only validity counts them."
        )
    if len(every):
        train, real, made = (
            form.rounded(some, every.numbers[0]) for some in (train, real, made[finite])
        )
    rows = np.random.default_rng(seed).permutation(len(real))[:starts]
    found |= {"real": len(rows), "pairs": min(len(rows), len(made))}
    if len(valid) < LEAST <= len(train):
        notes.append(
            f"validation and judged episodes are {len(valid)} where {LEAST} are needed: the starts"
            " are compared with those of the training split, so the two-sample test and coverage"
            " would not find a copy, and validity has no figure of reality beside it."
        )
    if len(real) < LEAST or len(made) < LEAST:
        where = (
            f"{len(valid)} held-out and {len(train)} training"
            if len(real) < LEAST
            else f"{len(made)} generated"
        )
        notes.append(
            f"{where} starts are too few: coverage, the two-sample test and distances need {LEAST}"
            " of each side."
        )
        found["pairs"] = 0
    else:
        _two_sample(found, notes, real[rows], made, seed)
        _against_training(
            found, notes, form, train, real[rows], rows if split == "train" else None, made, seed
        )
    figures = {field.name: None for field in fields(TaskDistribution)} | found
    return TaskDistribution(**{**figures, "notes": tuple(notes)})


def _validity(
    found: dict[str, Any],
    notes: list[str],
    form: _Form,
    made: _Starts,
    train: _Starts,
    valid: _Starts,
    seed: int,
) -> None:
    def ranged(starts: _Starts, among: _Starts) -> NDArray[np.bool_]:
        low, high = among.numbers.min(0), among.numbers.max(0)
        margin = np.maximum(np.maximum(MARGIN * (high - low), LEEWAY), form.bins)
        return ((starts.numbers >= low - margin) & (starts.numbers <= high + margin)).all(1)

    if not len(made):
        return
    every, held = train + valid, form.holds(made)
    found["in_space"] = float(held.mean())
    outside = int((~form.holds(every)).sum())
    if outside:
        notes.append(
            f"{outside} of {len(every)} real starts lie outside the environment's own space: its"
            " bounds are wrong, and validity suffers from that."
        )
    if len(every) < LEAST:
        notes.append(f"{len(every)} real starts have no range: validity needs {LEAST}.")
        return
    inside = ranged(made, every)
    both = held & inside
    found |= {
        "in_range": float(inside.mean()),
        "validity": float(both.mean()),
        "validity_interval": stats.mean_interval(both, seed=seed),
    }
    if min(len(train), len(valid)) >= LEAST:
        found["validity_real"] = float((form.holds(valid) & ranged(valid, train)).mean())


def _two_sample(
    found: dict[str, Any], notes: list[str], real: _Starts, made: _Starts, seed: int
) -> None:
    pairs = found["pairs"]
    a, b = out_of_fold(real.columns[:pairs], made.columns[:pairs], seed)
    wins = (b > a[:, None]) + 0.5 * (b == a[:, None])

    def statistic(rows: NDArray[np.int64]) -> NDArray[np.float64]:
        counts = np.zeros(rows.shape)
        np.add.at(counts, (np.arange(len(rows))[:, None], rows), 1.0)
        return ((counts @ wins) * counts).sum(1) / pairs**2

    found |= {
        "auc": float(wins.mean()),
        "auc_interval": stats.bootstrap(statistic, pairs, seed=seed),
    }
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


def out_of_fold(
    real: NDArray[np.float64], made: NDArray[np.float64], seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scores (higher: generated) of the rows of two [n, columns], each by a classifier trained on
    the folds without it.

    Every fold has as many of one side as of the other; with unequal ones, the classifiers' priors
    alone would bring the AUC below .5. Small leaves find more at every n and bring no more false
    alarms; folds and bootstrap see to those.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier  # a second to import

    n = len(real)
    fold = np.random.default_rng([seed, n]).permutation(n) % FOLDS
    scores = np.zeros((2, n))
    for number in range(FOLDS):
        out, rest = fold == number, fold != number
        classifier = HistGradientBoostingClassifier(
            max_iter=100,
            max_leaf_nodes=8,
            min_samples_leaf=min(max(n // 10, 2), 5),
            early_stopping=False,
            random_state=seed,
        )
        classifier.fit(np.concatenate((real[rest], made[rest])), np.repeat([0, 1], int(rest.sum())))
        scores[:, out] = classifier.decision_function(
            np.concatenate((real[out], made[out]))
        ).reshape(2, -1)
    return scores[0], scores[1]


def _against_training(
    found: dict[str, Any],
    notes: list[str],
    form: _Form,
    train: _Starts,
    real: _Starts,
    own: Array | None,
    made: _Starts,
    seed: int,
) -> None:
    """Coverage, copies and nearest distances. `own` [len(real)]: which of `train` the real starts
    are; None: none of them.
    """
    if len(train) < LEAST:
        notes.append(
            f"{len(train)} training starts are too few: coverage, copies, distances to the nearest"
            f" of them and validity's figure of reality need {LEAST}."
        )
        return
    pairs, metric = found["pairs"], _Metric(form, train)
    drawn = np.random.default_rng([seed, len(train)]).permutation(len(train))[:TRAINING]
    if len(drawn) < len(train):
        notes.append(
            f"the nearest training start is sought among {len(drawn)} of {len(train)}, drawn at"
            " random."
        )

    def to_training(starts: _Starts, among: Array) -> NDArray[np.float64]:
        distances = metric(starts, train[among])
        if own is not None and starts is real:
            distances[own[:, None] == among] = np.inf
        return distances

    def nearest(starts: _Starts) -> NDArray[np.float64]:
        return np.min(
            [to_training(starts, drawn[i : i + CHUNK]).min(1) for i in range(0, len(drawn), CHUNK)],
            axis=0,
        )

    size = min(len(made), len(drawn))
    radius = np.sort(to_training(real, drawn[:size]), axis=1)[:, NEIGHBOURS - 1]
    covered = metric(real, made[:size]).min(1) <= np.maximum(radius, LEEWAY)
    others = size - np.arange(NEIGHBOURS)
    expected = 1 - float(np.prod(others / (others + size)))
    found |= {
        "coverage": float(covered.mean()),
        "coverage_interval": stats.mean_interval(covered, seed=seed),
        "coverage_expected": expected,
    }

    counts = Counter(train.fingerprints())
    for name, starts, least in (
        ("copies", made, 1),
        ("copies_real", real, 1 if own is None else 2),
    ):
        found[name] = float(np.mean([counts[one] >= least for one in starts.fingerprints()]))

    of_made, of_real = nearest(made)[:pairs], nearest(real)[:pairs]
    found |= {"nearest": float(np.median(of_made)), "nearest_real": float(np.median(of_real))}
    if found["nearest_real"] == 0:
        notes.append(
            "half of the held-out starts or more equal a training start: there is no distance to"
            " compare with, and copies are no fault."
        )
        return

    def ratio(resampled: NDArray[np.int64]) -> NDArray[np.float64]:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.median(of_made[resampled], 1) / np.median(of_real[resampled], 1)

    found |= {
        "nearest_ratio": found["nearest"] / found["nearest_real"],
        "nearest_ratio_interval": stats.bootstrap(ratio, pairs, seed=seed),
    }
