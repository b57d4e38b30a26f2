"""How densely logged transitions cover what an agent may do: `mesocosm data show` and `diff`.

A world's answers are reliable only near training transitions. Every transition becomes a point; the
distance from a point to the nearest one of the training split is its *gap*. Memory holds at most
SAMPLE transitions per split, drawn by the seed: the same data and seed give the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from mesocosm.data.analysis.texts import bags_of_words
from mesocosm.data.loading.normalize import Moments
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.manifest import ARRAYS, SPLITS
from mesocosm.datasets.permutation import key, mix, permute
from mesocosm.datasets.spaces import SpaceCodec
from mesocosm.datasets.split import Split
from mesocosm.datasets.texts import TEXTS

Array = NDArray[Any]
SAMPLE = 20_000
"""Most transitions of a split that distances are measured on."""
CELLS = 1 << 23
"""Most values of a sample: transitions of many columns are sampled more thinly."""
BUCKETS = 64
"""Features of a category with more values, or of a text's pairs of characters, which are hashed."""
WIDE = 16
"""Features from which a k-d tree is slower than all distances by matrix products."""
FOLDS, NEIGHBOURS = 5, 32
DRAW, FOLD, ACT = 0xC0FE, 0xF01D, 0xAC7
"""Salts of the seed for draws of transitions, folds of episodes, and actions."""
PROBES = 4096
"""Draws that estimate how near a uniform action comes to another one."""
BINS = 16
"""Bins of a numeric action, for entropies."""


@dataclass(frozen=True)
class Sample:
    """N transitions of a split, in the order of the data."""

    values: Array
    """[N, F] float32: the `Features` of each transition."""
    episodes: Array
    """[N] int64: the number of its episode in the dataset."""
    raw: dict[str, Array]
    """`manifest.ARRAYS` by name, each [N, ...], and `texts.TEXTS` where texts have no slots."""

    def __len__(self) -> int:
        return len(self.values)


class Features:
    """Transitions as points: `width` features, those of the slice `state`, then of `action`.

    A number is standardised by the training split (a constant one is only centred). A category
    becomes one feature per value, sqrt(1/2) where it holds, so two different values are 1 apart;
    more than BUCKETS values are hashed. A text becomes its pairs of neighbouring characters (one
    that is too long for slots: its words), counted in BUCKETS features and scaled to length
    sqrt(1/2): equal texts are 0 apart, texts that share no pair 1. Reset options of the task are
    part of the state. State and action are each divided by the root of their number of columns (a
    text is one). So a distance is in standard deviations, root mean square over columns: where
    states agree, an action of one standard deviation more in every column is 1 away.

    Args:
        moments: Of the training split, by name (`obs_num`, `act_num`). None reads the split once.
    """

    def __init__(self, dataset: Dataset, moments: dict[str, Moments] | None = None):
        self._observation, self._action = dataset.observation_codec, dataset.action_codec
        self._choices = [len(option.values or ()) for option in dataset.options]
        options = Moments(len(self._choices))
        options.add(dataset.option_numbers[dataset.episodes("train")])
        moments = (moments or training_moments(dataset)) | {"options": options}
        self._scale = {
            name: (moment.mean, np.where(moment.constant, 1.0, moment.std))
            for name, moment in moments.items()
        }
        none = np.zeros((0, len(self._choices)))
        state = self.states(*_no_rows(self._observation), none, none.astype(int)).shape[1]
        self.width = state + self.actions(*_no_rows(self._action)).shape[1]
        self.state, self.action = slice(0, state), slice(state, self.width)

    def states(
        self,
        numbers: Array,
        categories: Array,
        option_numbers: Array,
        option_values: Array,
        texts: Array | None = None,
    ) -> Array:
        """Features [N, F_state] float32 of N observations and their reset options [N, k]; `texts`:
        [N, t], where they have no slots.
        """
        mean, scale = self._scale["options"]
        numeric = [i for i, choices in enumerate(self._choices) if not choices]
        options = [((option_numbers - mean) / scale)[:, numeric]]
        for i, choices in enumerate(self._choices):
            if choices:
                options.append(_one_hot(option_values[:, i], choices))
        scaling, extra = self._scale["obs_num"], len(self._choices)
        codec = self._observation
        return _features(codec, numbers, categories, texts, scaling, options, extra)

    def actions(self, numbers: Array, categories: Array, texts: Array | None = None) -> Array:
        """Features [N, F_action] float32 of N actions; `texts` as for `states`."""
        scaling = self._scale["act_num"]
        return _features(self._action, numbers, categories, texts, scaling, [], 0)

    def of(self, dataset: Dataset, episodes: Array, raw: dict[str, Array]) -> Array:
        """Features [N, F] float32 of transitions, given their episodes [N] and ARRAYS.

        `dataset` may be another one of the same spaces.
        """
        options = dataset.option_numbers[episodes], dataset.option_values[episodes]
        states = self.states(raw["obs_num"], raw["obs_cat"], *options, raw.get("obs_text"))
        actions = self.actions(raw["act_num"], raw["act_cat"], raw.get("act_text"))
        return np.concatenate([states, actions], 1)

    def sample(self, dataset: Dataset, split: Split, *, seed: int, limit: int = SAMPLE) -> Sample:
        """At most `limit` transitions of a split, drawn without replacement."""
        table, episodes = dataset.table, dataset.episodes(split)
        lengths = table["length"][episodes]
        ends = np.cumsum(lengths)
        total = int(lengths.sum())
        columns = self.width + self._observation.numbers + self._observation.categories
        limit = min(limit, CELLS // columns)
        drawn = np.arange(total)
        if total > limit:
            salt = key(seed, DRAW, SPLITS.index(split))
            drawn = np.sort(permute(np.arange(limit), total, salt))
        position = np.searchsorted(ends, drawn, "right")
        numbers = episodes[position]
        rows = table["first_row"][numbers] + drawn - (ends - lengths)[position]
        names: list[str] = list(ARRAYS)
        if self._observation.long_texts or self._action.long_texts:
            names += TEXTS
        raw = dataset.gathered(table["shard"][numbers], dict.fromkeys(names, rows))
        return Sample(self.of(dataset, numbers, raw), numbers, raw)


def training_moments(dataset: Dataset) -> dict[str, Moments]:
    """Mean and deviation of each number of the training split's transitions, in one pass."""
    moments = {
        "obs_num": Moments(dataset.observation_codec.numbers),
        "act_num": Moments(dataset.action_codec.numbers),
    }
    for chunk in dataset.chunks("train"):
        for name, moment in moments.items():
            moment.add(chunk.arrays[name][~chunk.last])
    return moments


# -- gaps


def nearest(reference: Array, queries: Array, k: int = 1) -> tuple[Array, Array]:
    """The k nearest of `reference` [N, F] to each of `queries` [Q, F], exact.

    Returns:
        (distances [Q, k] float64, positions in `reference` [Q, k]).
    """
    reference, queries = reference.astype(np.float64), queries.astype(np.float64)
    if reference.shape[1] < WIDE:
        from scipy.spatial import KDTree  # half a second to import

        places: Array = KDTree(reference).query(queries, np.arange(1, k + 1))[1]
    else:
        from sklearn.neighbors import NearestNeighbors  # two seconds to import

        index = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(reference)
        places = index.kneighbors(queries, return_distance=False)
    # Distances by matrix products are not exact: equal points would be 1e-7 apart.
    apart = [np.linalg.norm(queries - reference[places[:, j]], axis=1) for j in range(k)]
    return np.stack(apart, 1), places


def gaps(reference: Array, queries: Array) -> Array:
    """The distance [Q] float64 from each query [Q, F] to the nearest of `reference` [N, F].

    Infinite where there is no reference.
    """
    if not len(reference) or not len(queries):
        return np.full(len(queries), np.inf)
    return nearest(reference, queries)[0][:, 0]


def nearest_elsewhere(
    values: Array, episodes: Array, k: int, *, order: Array, queries: Array | None = None
) -> tuple[Array, Array]:
    """The k nearest of the points of *other* episodes.

    A transition's neighbours in time are near it whatever else is in the data, and a held-out
    transition has none. So the episodes are dealt to FOLDS, each measured against the others.

    Args:
        values: [N, F].
        episodes: [N] numbers, of at least two episodes.
        order: [E] the order in which the distinct episodes are dealt to folds.
        queries: [N, F] other points, each measured in the fold of its row.

    Returns:
        (distances [N, k], places [N, k]). The last neighbour is repeated where there are fewer.
    """
    queries = values if queries is None else queries
    member = np.unique(episodes, return_inverse=True)[1]
    folds = (np.argsort(order) % min(FOLDS, len(order)))[member]
    distances, places = np.empty((len(values), k)), np.empty((len(values), k), np.int64)
    for fold in np.unique(folds):
        others, this = np.flatnonzero(folds != fold), folds == fold
        enough = min(k, len(others))
        columns = np.minimum(np.arange(k), enough - 1)
        apart, at = nearest(values[others], queries[this], enough)
        distances[this], places[this] = apart[:, columns], others[at][:, columns]
    return distances, places


def own_gaps(values: Array, episodes: Array, *, seed: int, queries: Array | None = None) -> Array:
    """Gaps [N] of a split to itself, by `nearest_elsewhere`. NaN where all are of one episode."""
    if len(np.unique(episodes)) < 2:
        return np.full(len(values), np.nan)
    order = np.argsort(key(seed, FOLD, np.unique(episodes)), kind="stable")
    return nearest_elsewhere(values, episodes, 1, order=order, queries=queries)[0][:, 0]


# -- actions


def effective(counts: Array) -> tuple[float, float]:
    """(entropy in nats, exp(entropy): the effective number) of shares given by counts.

    Shannon (1948), and Hill's number of order 1 (Hill 1973).
    """
    shares = counts[counts > 0] / max(counts.sum(), 1)
    entropy = float(-(shares * np.log(shares)).sum()) + 0.0
    return entropy, float(np.exp(entropy))


def action_entropy(sample: Sample, features: Features, codec: SpaceCodec) -> float | None:
    """How freely actions were chosen where states agree, from 0 (one action per state) to 1.

    Entropy of the actions at the NEIGHBOURS nearest states of each state, with Miller's (1955)
    correction of its bias, (m - 1) / 2n for m values seen in n. It is averaged over states and over
    the action's columns, each divided by the log of its number of values (of a number: BINS equal
    bins over its range). None below 2 * NEIGHBOURS transitions.
    """
    if len(sample) < 2 * NEIGHBOURS or not codec.numbers + codec.categories:
        return None
    numbers, categories = sample.raw["act_num"], sample.raw["act_cat"]
    width = np.ptp(numbers, axis=0)
    scaled = (numbers - numbers.min(0)) / np.where(width > 0, width, 1.0)
    bins = np.minimum((scaled * BINS).astype(np.int64), BINS - 1)
    columns = [*bins.T, *categories.T]
    sizes = [BINS] * codec.numbers + list(codec.cardinalities)
    states = sample.values[:, features.state]
    _, places = nearest(states, states, NEIGHBOURS)
    shares = []
    for values, size in zip(columns, sizes, strict=True):
        if size >= 2:
            near = values[places]
            equal = (near[:, :, None] == near[:, None, :]).sum(2)  # of each neighbour, with itself
            entropy = -np.log(equal / NEIGHBOURS).mean(1)
            entropy += ((1 / equal).sum(1) - 1) / (2 * NEIGHBOURS)
            shares.append(np.minimum(entropy / np.log(min(size, NEIGHBOURS)), 1.0).mean())
    return float(np.mean(shares)) if shares else 0.0


def tried(sample: Sample, features: Features, codec: SpaceCodec, *, seed: int) -> float | None:
    """The share of the action space that was tried near logged states, by uniform draws.

    A drawn action counts as tried where one of those at the state's NEIGHBOURS nearest states is as
    near to it as it would be in 95 of 100 draws if these were uniform: uniform behaviour comes to
    0.95 in any action space, one action per state to far less.

    Returns:
        None below 2 * NEIGHBOURS transitions, and where even uniform draws would not come near
        (more kinds of actions than a few dozen neighbours can show).
    """
    if len(sample) < 2 * NEIGHBOURS:
        return None
    rng = np.random.default_rng([seed, ACT])
    bounds = action_range(sample, codec)
    counts = (len(sample), PROBES * NEIGHBOURS, PROBES)
    actions, chance, others = (
        features.actions(*_draw_actions(rng, bounds, codec, count)) for count in counts
    )
    apart = np.linalg.norm(chance.reshape(PROBES, NEIGHBOURS, -1) - others[:, None], axis=2)
    tolerance = np.quantile(apart.min(1), 0.95)
    if tolerance >= apart.mean():
        return None
    states, logged = sample.values[:, features.state], sample.values[:, features.action]
    _, places = nearest(states, states, NEIGHBOURS)
    distances = [np.linalg.norm(logged[column] - actions, axis=1) for column in places.T]
    return float((np.min(distances, 0) <= tolerance + 1e-6).mean())


def any_action(sample: Sample, codec: SpaceCodec, *, seed: int) -> tuple[Array, Array]:
    """Raw columns (numbers, categories) of N actions drawn uniformly from the action space."""
    rng = np.random.default_rng([seed, ACT])
    return _draw_actions(rng, action_range(sample, codec), codec, len(sample))


def _draw_actions(
    rng: np.random.Generator, bounds: tuple[Array, Array], codec: SpaceCodec, count: int
) -> tuple[Array, Array]:
    low, high = bounds
    numbers = low + (high - low) * rng.random((count, codec.numbers))
    categories = rng.random((count, codec.categories)) * np.array(codec.cardinalities)
    return numbers, categories.astype(np.int64)


def action_range(sample: Sample, codec: SpaceCodec) -> tuple[Array, Array]:
    """(low, high), each [n]: the bounds of an action's numbers, or else their range in `sample`."""
    logged = sample.raw["act_num"] if len(sample) else np.zeros((1, codec.numbers))
    low, high = logged.min(0), logged.max(0)
    for leaf in codec.leaves:
        if leaf.start is None and leaf.characters is None:
            box = cast(spaces.Box, leaf.space)
            for bounds, limit in ((low, box.low), (high, box.high)):
                limit = np.ravel(limit).astype(np.float64)
                bounds[leaf.numbers] = np.where(np.isfinite(limit), limit, bounds[leaf.numbers])
    return low, high


def principal(values: Array) -> tuple[Array, Array, Array]:
    """The first two principal components of values [N, F], with fixed signs.

    Returns:
        (mean [F], directions [F, 2], share of the variance of each [2]).
    """
    mean = values.mean(0, dtype=np.float64)
    covariance = np.atleast_2d(np.cov((values - mean).T.astype(np.float64)))
    variances, directions = np.linalg.eigh(covariance)
    directions, shares = directions[:, :-3:-1], variances[:-3:-1] / max(variances.sum(), 1e-300)
    largest = np.take_along_axis(directions, np.abs(directions).argmax(0)[None], 0)
    directions = directions * np.where(largest < 0, -1.0, 1.0)
    lacking = 2 - directions.shape[1]
    return mean, np.pad(directions, ((0, 0), (0, lacking))), np.pad(shares, (0, lacking))


# -- columns -> features


def _features(
    codec: SpaceCodec,
    numbers: Array,
    categories: Array,
    texts: Array | None,
    scaling: tuple[Array, Array],
    options: list[Array],
    extra: int,
) -> Array:
    """`extra`: the number of columns that `options` are made of."""
    mean, scale = scaling
    blocks, columns = [(numbers - mean) / scale, *options], codec.numbers + extra
    for leaf in codec.leaves:
        codes = categories[:, leaf.categories].astype(np.int64)
        if leaf in codec.long_texts:
            absent = np.zeros((len(numbers), BUCKETS))
            blocks.append(absent if texts is None else bags_of_words(texts[:, leaf.text], BUCKETS))
            columns += 1
        elif leaf.characters is not None:
            blocks.append(_pairs(codes))
            columns += 1
        elif leaf.start is not None or leaf.image is not None:
            blocks += [_one_hot(codes[:, i], size) for i, size in enumerate(leaf.cardinalities)]
            columns += len(leaf.cardinalities)
    return (np.concatenate(blocks, 1) / np.sqrt(max(columns, 1))).astype(np.float32)


def _one_hot(values: Array, size: int) -> Array:
    places = values if size <= BUCKETS else (mix(values) % np.uint64(BUCKETS)).astype(np.int64)
    return np.sqrt(0.5) * (places[:, None] == np.arange(min(size, BUCKETS)))


def _pairs(codes: Array) -> Array:
    """Pairs of texts, given as codes [N, L] with 0 after the end: [N, BUCKETS].

    The start and the end of a text count as a character.
    """
    framed = np.pad(codes, ((0, 0), (1, 1)))
    left, right = framed[:, :-1], framed[:, 1:]
    present = (left > 0) | (right > 0)
    present[:, 0] = True  # the empty text has one pair: start and end
    counts = np.zeros((len(codes), BUCKETS))
    row, place = np.nonzero(present)
    buckets = (key(left, right) % np.uint64(BUCKETS)).astype(np.int64)
    np.add.at(counts, (row, buckets[row, place]), 1)
    length = np.linalg.norm(counts, axis=1, keepdims=True)
    return np.sqrt(0.5) * counts / np.maximum(length, 1.0)


def _no_rows(codec: SpaceCodec) -> tuple[Array, Array]:
    return np.zeros((0, codec.numbers)), np.zeros((0, codec.categories), np.int64)
