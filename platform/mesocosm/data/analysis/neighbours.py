"""How densely logged transitions lie among what an agent may do: the numbers beneath `mesocosm data
show` and `diff`.

An agent in a learned world leaves the logged behaviour. What it is told there is true only where
training holds a transition like it, so every transition becomes a point, and the distance from a
point to the nearest one of the training split is its *gap*. Time is linear in the data read; memory
is that of a sample of at most SAMPLE transitions a split, drawn by the seed; the same data and seed
give the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from mesocosm.data.format.dataset import Dataset, Split
from mesocosm.data.format.manifest import ARRAYS, SPLITS
from mesocosm.data.format.permutation import key, mix, permute
from mesocosm.data.format.spaces import SpaceCodec
from mesocosm.data.loading.normalize import Moments

Array = NDArray[Any]
SAMPLE = 20_000
"""Transitions of a split that distances are measured on, at most."""
CELLS = 1 << 23
"""Values of a sample, at most: transitions of many columns are sampled more thinly."""
BUCKETS = 64
"""A category of more values, and a text's pairs of characters, are hashed into so many features."""
WIDE = 16
"""Features from which a tree of points is slower than all distances by one matrix product."""
FOLDS = 5
DRAW, FOLD, ACT = 0xC0FE, 0xF01D, 0xAC7
"""Salts of what a seed draws: transitions, folds of episodes, actions."""
NEIGHBOURS = 32
PROBES = 4096
"""Draws that say how near chance comes to an action."""
BINS = 16
"""Of a numeric action, for entropies."""


@dataclass(frozen=True)
class Sample:
    """N transitions of a split, in the order of the data."""

    values: Array
    """[N, F] float32: `Features` of each"""
    episodes: Array
    """[N] int64: the number of its episode in the dataset"""
    raw: dict[str, Array]
    """`manifest.ARRAYS` by name, each [N, ...]"""

    def __len__(self) -> int:
        return len(self.values)


class Features:
    """Transitions as points: F = `width` features, first the state's (`state`: a slice of them),
    then the action's (`action`).

    A number is standardised by the training split (a constant one is centred only). A category
    becomes one feature a value, sqrt(1/2) where it holds, so that two unlike values are 1 apart;
    with more than BUCKETS values these are hashed. A text becomes its pairs of neighbouring
    characters, counted in BUCKETS features and scaled to length sqrt(1/2): equal texts are 0 apart,
    texts that share no pair 1. Reset options of the task are part of the state. State and action
    are each divided by the root of their number of columns (a text is one), so that a distance is
    in standard deviations, root mean square over columns, and neither drowns the other: where
    states agree, an action of one standard deviation more in every column is 1 away.
    """

    def __init__(self, dataset: Dataset, moments: dict[str, Moments] | None = None):
        """`moments`: of the training split by name (`obs_num`, `act_num`), where they are known
        already; otherwise it is read once.
        """
        self._observation, self._action = dataset.observation_codec, dataset.action_codec
        self._choices = [len(option.values or ()) for option in dataset.options]
        moments = training_moments(dataset) if moments is None else moments
        self._scale = {name: _scaled(found) for name, found in moments.items()}
        train = dataset.episodes("train")
        options = Moments(len(self._choices))
        options.add(dataset.option_numbers[train])
        self._scale["options"] = _scaled(options)
        empty = np.zeros((0, len(self._choices)))
        state = self.states(
            _none(self._observation)[0], _none(self._observation)[1], empty, empty.astype(np.int64)
        ).shape[1]
        self.width = state + self.actions(*_none(self._action)).shape[1]
        self.state, self.action = slice(0, state), slice(state, self.width)

    def states(
        self, numbers: Array, categories: Array, option_numbers: Array, option_values: Array
    ) -> Array:
        """Raw columns of N observations ([N, n] and [N, m]) and their reset options ([N, k] twice,
        as Dataset has them) -> [N, F_state] float32.
        """
        told = [i for i, choices in enumerate(self._choices) if not choices]
        chosen = [
            (option_values[:, i], choices) for i, choices in enumerate(self._choices) if choices
        ]
        mean, scale = self._scale["options"]
        more = [
            ((option_numbers - mean) / scale)[:, told],
            *(_one_hot(values, choices) for values, choices in chosen),
        ]
        return _block(
            self._observation, numbers, categories, self._scale["obs_num"], more, len(self._choices)
        )

    def actions(self, numbers: Array, categories: Array) -> Array:
        """Raw columns of N actions -> [N, F_action] float32."""
        return _block(self._action, numbers, categories, self._scale["act_num"], [], 0)

    def of(self, dataset: Dataset, episodes: Array, raw: dict[str, Array]) -> Array:
        """Transitions of `dataset` (of the same spaces): their episodes [N], and their
        `manifest.ARRAYS` -> [N, F] float32.
        """
        options = dataset.option_numbers[episodes], dataset.option_values[episodes]
        return np.concatenate(
            [
                self.states(raw["obs_num"], raw["obs_cat"], *options),
                self.actions(raw["act_num"], raw["act_cat"]),
            ],
            1,
        )

    def sample(self, dataset: Dataset, split: Split, *, seed: int, limit: int = SAMPLE) -> Sample:
        """At most `limit` transitions of a split, drawn without replacement; all of them where
        there are no more.
        """
        episodes = dataset.episodes(split)
        ends = np.cumsum(dataset.table["length"][episodes])
        total = int(ends[-1]) if len(ends) else 0
        limit = min(
            limit, CELLS // (self.width + self._observation.numbers + self._observation.categories)
        )
        drawn = (
            np.arange(total)
            if total <= limit
            else np.sort(permute(np.arange(limit), total, key(seed, DRAW, SPLITS.index(split))))
        )
        position = np.searchsorted(ends, drawn, "right")
        numbers = episodes[position]
        rows = (
            dataset.table["first_row"][numbers]
            + drawn
            - (ends - dataset.table["length"][episodes])[position]
        )
        shards = dataset.table["shard"][numbers]
        raw = (
            {name: dataset.gather(name, shards, rows) for name in ARRAYS}
            if total
            else _no_rows(dataset)
        )
        return Sample(self.of(dataset, numbers, raw), numbers, raw)


def training_moments(dataset: Dataset) -> dict[str, Moments]:
    """Mean and deviation of each number of the training split's transitions, by one pass."""
    moments = {
        "obs_num": Moments(dataset.observation_codec.numbers),
        "act_num": Moments(dataset.action_codec.numbers),
    }
    for chunk in dataset.chunks("train"):
        for name, found in moments.items():
            found.add(chunk.arrays[name][~chunk.last])
    return moments


# -- gaps
# --------------------------------------------------------------------------------------------------------------


def nearest(reference: Array, queries: Array, k: int = 1) -> tuple[Array, Array]:
    """(distances [Q, k] float64, positions in `reference` [Q, k]) of the k nearest of `reference`
    [N, F] to each of `queries` [Q, F], exact.

    A k-d tree (scipy) for few features; for many, where a tree looks at every point anyway, all
    distances, a block at a time.
    """
    assert 1 <= k <= len(reference), (k, len(reference))
    reference, queries = reference.astype(np.float64), queries.astype(np.float64)
    if reference.shape[1] < WIDE:
        distances, places = cKDTree(reference, balanced_tree=False, compact_nodes=False).query(
            queries, k=k
        )
        return distances.reshape(len(queries), k), places.reshape(len(queries), k)
    squares = np.einsum("nf,nf->n", reference, reference)
    block = max((1 << 24) // len(reference), 1)
    places = np.empty((len(queries), k), np.int64)
    for first in range(0, len(queries), block):
        some = queries[first : first + block]
        near = squares - 2 * some @ reference.T
        places[first : first + block] = (
            np.argpartition(near, k - 1, axis=1)[:, :k] if k < len(reference) else np.arange(k)
        )
    distances = np.stack(
        [np.sqrt(((queries - reference[places[:, j]]) ** 2).sum(1)) for j in range(k)], 1
    )
    order = np.argsort(distances, axis=1, kind="stable")
    return np.take_along_axis(distances, order, 1), np.take_along_axis(places, order, 1)


def gaps(reference: Array, queries: Array) -> Array:
    """The distance from each of `queries` [Q, F] to the nearest of `reference` [N, F]: [Q] float64,
    infinite where there is no reference.
    """
    if not len(reference) or not len(queries):
        return np.full(len(queries), np.inf)
    return nearest(reference, queries)[0][:, 0]


def own_gaps(values: Array, episodes: Array, *, seed: int, queries: Array | None = None) -> Array:
    """Gaps of a split to itself: of each of `values` [N, F] to the nearest of *other* episodes,
    [N]; NaN where all are of one episode.

    A transition's neighbours in time are near it whatever else is in the data; a held-out
    transition has none, so counting them would call half of an honest validation split uncovered.
    The episodes ([N] numbers) are shared out to FOLDS, and a fold is measured against the other
    ones: what a split of 4/5 the size leaves to the rest. `queries` [N, F]: other points, each
    measured in the fold of its row.
    """
    queries = values if queries is None else queries
    distinct, member = np.unique(episodes, return_inverse=True)
    folds = min(FOLDS, len(distinct))
    found = np.full(len(values), np.nan)
    if folds < 2:
        return found
    order = np.argsort(key(seed, FOLD, distinct), kind="stable")
    fold = np.empty(len(distinct), np.int64)
    fold[order] = np.arange(len(distinct)) % folds
    of = fold[member]
    for this in range(folds):
        found[of == this] = gaps(values[of != this], queries[of == this])
    return found


# -- what was done where
# -----------------------------------------------------------------------------------------------


def effective(counts: Array) -> tuple[float, float]:
    """(entropy in nats, effective number exp(entropy)) of shares given by counts: Shannon (1948),
    and Hill's number of order 1 (Hill 1973).
    """
    shares = counts[counts > 0] / max(counts.sum(), 1)
    entropy = float(-(shares * np.log(shares)).sum()) + 0.0
    return entropy, float(np.exp(entropy))


def action_entropy(sample: Sample, features: Features, codec: SpaceCodec) -> float | None:
    """How freely actions were chosen where states agree: 0, one action a state, to 1, every action
    alike. None below 2 * NEIGHBOURS transitions.

    Entropy of the actions at the NEIGHBOURS nearest states of each state, with Miller's (1955)
    correction of its bias, (m - 1) / 2n for m values seen in n; averaged over states and over the
    action's columns, each divided by the log of how many values it has (a number: BINS equal bins
    over its range). States near each other are not the same state, so a policy that turns sharply
    counts as somewhat free.
    """
    columns = _binned(sample.raw["act_num"], sample.raw["act_cat"], codec)
    if len(sample) < 2 * NEIGHBOURS or not columns:
        return None
    states = sample.values[:, features.state]
    _, places = nearest(states, states, NEIGHBOURS)
    shares = []
    for values, size in columns:
        if size < 2:
            continue
        near = np.sort(values[places], axis=1)
        starts = np.concatenate([np.ones((len(near), 1), bool), near[:, 1:] != near[:, :-1]], 1)
        runs = np.diff(np.append(np.flatnonzero(starts), starts.size))
        row = np.flatnonzero(starts) // NEIGHBOURS
        p = runs / NEIGHBOURS
        entropy = np.bincount(row, -p * np.log(p), len(near)) + (
            np.bincount(row, minlength=len(near)) - 1
        ) / (2 * NEIGHBOURS)
        shares.append(np.minimum(entropy / np.log(min(size, NEIGHBOURS)), 1.0).mean())
    return float(np.mean(shares)) if shares else 0.0


def tried(sample: Sample, features: Features, codec: SpaceCodec, *, seed: int) -> float | None:
    """The share of the action space that was tried near logged states, by uniform draws of a state
    of `sample` and an action.

    An action counts as tried where one of those at the state's NEIGHBOURS nearest states is as near
    to it as in 95 of 100 draws it would be, were these actions drawn uniformly too: behaviour that
    is uniform comes to 0.95 in any action space, one action a state to far less. None below 2 *
    NEIGHBOURS transitions, and where even uniform draws would not come near (more kinds of actions
    than a few dozen neighbours can show).
    """
    if len(sample) < 2 * NEIGHBOURS:
        return None
    low, high = action_range(sample, codec)
    rng = np.random.default_rng([seed, ACT])

    def drawn(count: int) -> Array:
        numbers = low + (high - low) * rng.random((count, codec.numbers))
        return features.actions(
            numbers,
            (rng.random((count, codec.categories)) * np.array(codec.cardinalities)).astype(
                np.int64
            ),
        )

    wanted = drawn(len(sample))
    chance = drawn(PROBES * NEIGHBOURS).reshape(PROBES, NEIGHBOURS, -1)
    others = drawn(PROBES)
    apart = np.linalg.norm(chance - others[:, None], axis=2)
    tolerance = np.quantile(apart.min(1), 0.95)
    if tolerance >= apart.mean():
        return None
    states = sample.values[:, features.state]
    _, places = nearest(states, states, NEIGHBOURS)
    found = np.full(len(sample), np.inf)
    for j in range(NEIGHBOURS):
        found = np.minimum(
            found, np.linalg.norm(sample.values[places[:, j], features.action] - wanted, axis=1)
        )
    return float((found <= tolerance + 1e-6).mean())


def any_action(sample: Sample, codec: SpaceCodec, *, seed: int) -> tuple[Array, Array]:
    """Raw columns (numbers, categories) of N actions drawn uniformly from the action space; a
    number without bounds from the range in `sample`.
    """
    rng = np.random.default_rng([seed, ACT])
    low, high = action_range(sample, codec)
    numbers = low + (high - low) * rng.random((len(sample), codec.numbers))
    categories = (
        rng.random((len(sample), codec.categories)) * np.array(codec.cardinalities)
    ).astype(np.int64)
    return numbers, categories


def action_range(sample: Sample, codec: SpaceCodec) -> tuple[Array, Array]:
    """(low, high), each [n]: the bounds of an action's numbers, or their range in `sample` where
    the space has none.
    """
    seen = sample.raw["act_num"]
    low, high = (
        (seen.min(0), seen.max(0))
        if len(seen)
        else (np.zeros(codec.numbers), np.zeros(codec.numbers))
    )
    for leaf in codec.leaves:
        if leaf.start is None and leaf.characters is None:
            box = cast(spaces.Box, leaf.space)
            bounds = np.ravel(box.low).astype(np.float64), np.ravel(box.high).astype(np.float64)
            low[leaf.numbers] = np.where(np.isfinite(bounds[0]), bounds[0], low[leaf.numbers])
            high[leaf.numbers] = np.where(np.isfinite(bounds[1]), bounds[1], high[leaf.numbers])
    return low, high


def principal(values: Array) -> tuple[Array, Array, Array]:
    """(mean [F], directions [F, 2], share of the variance of each [2]) of the first two principal
    components; signs are fixed.
    """
    mean = values.mean(0, dtype=np.float64)
    covariance = np.cov((values - mean).T.astype(np.float64)).reshape(
        values.shape[1], values.shape[1]
    )
    variances, directions = np.linalg.eigh(covariance)
    first = directions[:, ::-1][:, :2]
    first = first * np.where(
        first[np.abs(first).argmax(0), np.arange(first.shape[1])] < 0, -1.0, 1.0
    )
    if first.shape[1] < 2:
        first, variances = (
            np.concatenate([first, np.zeros_like(first)], 1),
            np.concatenate([np.zeros(1), variances]),
        )
    return mean, first, variances[::-1][:2] / max(float(variances.sum()), 1e-300)


# -- columns -> features
# -----------------------------------------------------------------------------------------------


def _block(
    codec: SpaceCodec,
    numbers: Array,
    categories: Array,
    scaling: tuple[Array, Array],
    more: list[Array],
    extra: int,
) -> Array:
    mean, scale = scaling
    blocks, columns = [(numbers - mean) / scale, *more], codec.numbers + extra
    for leaf in codec.leaves:
        codes = categories[:, leaf.categories].astype(np.int64)
        if leaf.characters is not None:
            blocks.append(_pairs(codes))
            columns += 1
        elif leaf.start is not None:
            blocks += [_one_hot(codes[:, i], size) for i, size in enumerate(leaf.cardinalities)]
            columns += len(leaf.cardinalities)
    return (np.concatenate(blocks, 1) / np.sqrt(max(columns, 1))).astype(np.float32)


def _one_hot(values: Array, size: int) -> Array:
    places = values if size <= BUCKETS else (mix(values) % np.uint64(BUCKETS)).astype(np.int64)
    return np.sqrt(0.5) * (places[:, None] == np.arange(min(size, BUCKETS)))


def _pairs(codes: Array) -> Array:
    """Texts as codes [N, L], 0 after the end -> [N, BUCKETS]: their pairs, the text's start and end
    counting as a character.
    """
    edge = np.zeros((len(codes), 1), np.int64)
    framed = np.concatenate([edge, codes, edge], 1)
    left, right = framed[:, :-1], framed[:, 1:]
    buckets = (key(left, right) % np.uint64(BUCKETS)).astype(np.int64)
    there = (left > 0) | (right > 0)
    there[:, 0] = True  # the empty text has one pair: start and end
    flat = (np.arange(len(codes))[:, None] * BUCKETS + buckets)[there]
    counts = (
        np.bincount(flat, minlength=len(codes) * BUCKETS)
        .reshape(len(codes), BUCKETS)
        .astype(np.float64)
    )
    length = np.sqrt((counts**2).sum(1, keepdims=True))
    return np.sqrt(0.5) * counts / np.maximum(length, 1.0)


def _binned(numbers: Array, categories: Array, codec: SpaceCodec) -> list[tuple[Array, int]]:
    """An action's columns as (values [N], how many there are)."""
    low, width = (
        (numbers.min(0), np.ptp(numbers, axis=0))
        if len(numbers)
        else (np.zeros(codec.numbers), np.zeros(codec.numbers))
    )
    bins = np.minimum(
        ((numbers - low) / np.where(width > 0, width, 1.0) * BINS).astype(np.int64), BINS - 1
    )
    return [(bins[:, i], BINS) for i in range(codec.numbers)] + [
        (categories[:, i].astype(np.int64), size) for i, size in enumerate(codec.cardinalities)
    ]


def _scaled(moments: Moments) -> tuple[Array, Array]:
    return moments.mean, np.where(moments.constant, 1.0, moments.std)


def _none(codec: SpaceCodec) -> tuple[Array, Array]:
    return np.zeros((0, codec.numbers)), np.zeros((0, codec.categories), np.int64)


def _no_rows(dataset: Dataset) -> dict[str, Array]:
    raw = {name: np.zeros(0) for name in ARRAYS}
    raw["obs_num"], raw["obs_cat"] = _none(dataset.observation_codec)
    raw["act_num"], raw["act_cat"] = _none(dataset.action_codec)
    return raw
