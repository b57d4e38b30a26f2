"""What a dataset covers, as one summary: `mesocosm data show` and its page (coverage_page.py) are
drawn from it alone.

Distances are those of `data/coverage.py`: of a transition's state and action, in standard
deviations, root mean square over columns. All of them are measured on a sample of each split, drawn
by the seed; ranges and counts are of every transition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesocosm.data.analysis.neighbours import (
    Features,
    Sample,
    action_entropy,
    any_action,
    effective,
    gaps,
    nearest,
    own_gaps,
    principal,
    tried,
)
from mesocosm.data.format.dataset import Dataset, Split
from mesocosm.data.format.manifest import OUTCOMES
from mesocosm.data.format.spaces import SpaceCodec

Array = NDArray[Any]
SCHEMA = 1
SPLITS: tuple[Split, Split] = ("train", "valid")
BEYOND = 0.99
"""A transition is missing in training where its gap is larger than of so many in 100 of training's
own.
"""
QUANTILES = (0.1, 0.5, 0.9, 0.99)
CURVE = 101
BINS, PLANE = 32, 40
NAMED = 12
"""Episodes and values of a category that are named one by one."""


@dataclass
class Extent:
    """Lowest and highest of each number column of a split, and the values of each category column."""

    low: Array
    high: Array
    values: list[Array]
    """Of each category, how often each value is there"""


class Columns:
    """Names of the columns of state and action, in the order numbers of the observation, its
    categories, those of the action.
    """

    def __init__(self, dataset: Dataset):
        self.parts = [("obs", dataset.observation_codec), ("act", dataset.action_codec)]
        self.numbers = [name for _, codec in self.parts for name in codec.labels()]
        self.categories = [name for _, codec in self.parts for name, _ in category_names(codec)]
        self.sizes = [size for _, codec in self.parts for size in codec.cardinalities]

    def number(self, raw: dict[str, Array]) -> Array:
        return np.concatenate([raw[f"{part}_num"] for part, _ in self.parts], 1)

    def category(self, raw: dict[str, Array]) -> Array:
        return np.concatenate([raw[f"{part}_cat"] for part, _ in self.parts], 1).astype(np.int64)

    def bounds(self) -> tuple[Array, Array]:
        """Of each number, as the spaces state them; infinite where they do not."""
        low, high = [], []
        for _, codec in self.parts:
            for leaf in codec.leaves:
                if leaf.numbers.stop > leaf.numbers.start:
                    low.append(np.ravel(leaf.space.low).astype(np.float64))  # type: ignore[attr-defined]
                    high.append(np.ravel(leaf.space.high).astype(np.float64))  # type: ignore[attr-defined]
        return np.concatenate(low or [np.zeros(0)]), np.concatenate(high or [np.zeros(0)])

    def extent(self, dataset: Dataset, split: Split) -> Extent:
        """One pass over the split."""
        low, high = np.full(len(self.numbers), np.inf), np.full(len(self.numbers), -np.inf)
        values = [np.zeros(size, np.int64) for size in self.sizes]
        for chunk in dataset.chunks(split):
            rows = {
                name: chunk.arrays[name][~chunk.last]
                for name in ("obs_num", "obs_cat", "act_num", "act_cat")
            }
            numbers, categories = self.number(rows), self.category(rows)
            if len(numbers):
                low, high = (
                    np.minimum(low, numbers.min(0, initial=np.inf)),
                    np.maximum(high, numbers.max(0, initial=-np.inf)),
                )
            for i, counts in enumerate(values):
                counts += np.bincount(categories[:, i], minlength=len(counts))
        return Extent(low, high, values)


def category_names(codec: SpaceCodec) -> list[tuple[str, bool]]:
    """Of each category column its name, and whether it is a character of a text."""
    return [
        (
            leaf.name if len(leaf.cardinalities) == 1 else f"{leaf.name}[{i}]",
            leaf.characters is not None,
        )
        for leaf in codec.leaves
        for i in range(len(leaf.cardinalities))
    ]


def summarise(dataset: Dataset, *, name: str, seed: int = 0) -> dict[str, Any]:
    """The summary of one dataset: JSON without NaN or infinity. `name` heads the page."""
    features, columns = Features(dataset), Columns(dataset)
    train, valid = (features.sample(dataset, split, seed=seed) for split in SPLITS)
    extents = {split: columns.extent(dataset, split) for split in SPLITS}
    own = own_gaps(train.values, train.episodes, seed=seed)
    held = gaps(train.values, valid.values) if len(valid) else np.zeros(0)
    numbers, categories = any_action(train, dataset.action_codec, seed=seed)
    free = train.values.copy()
    free[:, features.action] = features.actions(numbers, categories)
    strange = own_gaps(train.values, train.episodes, seed=seed, queries=free)
    threshold = _threshold(own)
    return {
        "schema": SCHEMA,
        "title": name,
        "environment": dataset.manifests[0].environment.id or "no environment was named",
        "seed": seed,
        "sampled": {
            split: {"transitions": len(one), "of": dataset.count(split)}
            for split, one in zip(SPLITS, (train, valid), strict=True)
        },
        "episodes": {split: len(dataset.episodes(split)) for split in SPLITS},
        "behaviours": _behaviours(dataset),
        "behaviour_entropy": _entropy(dataset),
        "tasks": _tasks(dataset),
        "numbers": _numbers(columns, extents, train, valid),
        "categories": _categories(columns, extents),
        "actions": {
            "tried": tried(train, features, dataset.action_codec, seed=seed),
            "entropy": action_entropy(train, features, dataset.action_codec),
        },
        "gaps": {
            "threshold": threshold,
            "train": _curve(own),
            "valid": _curve(held),
            "any_action": _curve(strange) | {"beyond": _share(strange, threshold)},
        },
        "plane": _plane(train, valid),
        "missing": _missing(dataset, columns, extents, train, valid, held, threshold),
        "notes": _notes(dataset, own, valid),
    }


def _threshold(own: Array) -> float | None:
    known = own[np.isfinite(own)]
    return float(np.quantile(known, BEYOND)) if len(known) else None


def _share(found: Array, threshold: float | None) -> float | None:
    return (
        float((found > threshold).mean())
        if threshold is not None and len(found) and np.isfinite(found).any()
        else None
    )


def _curve(found: Array) -> dict[str, Any]:
    """Quantiles, and CURVE of them for a plot; None where there is nothing."""
    known = found[np.isfinite(found)]
    if not len(known):
        return {"quantiles": None, "curve": None}
    return {
        "quantiles": {
            f"{q:g}": float(v)
            for q, v in zip(QUANTILES, np.quantile(known, QUANTILES), strict=True)
        },
        "curve": np.quantile(known, np.linspace(0, 1, CURVE)).tolist(),
    }


def _names(dataset: Dataset) -> list[str]:
    return [behaviour.name for behaviour in dataset.manifests[0].behaviours]


def _behaviours(dataset: Dataset) -> list[dict[str, Any]]:
    table, rows = dataset.table, []
    for i, name in enumerate(_names(dataset)):
        own = table[table["behaviour"] == i]
        said = own["success"][own["success"] >= 0]
        rows.append(
            {
                "name": name,
                "episodes": len(own),
                "transitions": int(own["length"].sum()),
                "returns": [float(v) for v in np.quantile(own["total_reward"], (0, 0.5, 1))],
                "outcomes": {
                    outcome: int((own["outcome"] == k).sum()) for k, outcome in enumerate(OUTCOMES)
                },
                "success": float(said.mean()) if len(said) else None,
                "valid_episodes": int((own["split"] == SPLITS.index("valid")).sum()),
            }
        )
    return rows


def _entropy(dataset: Dataset) -> dict[str, float]:
    """Of who acted, by transitions."""
    counts = np.bincount(dataset.table["behaviour"], dataset.table["length"], len(_names(dataset)))
    entropy, number = effective(counts)
    return {"nats": entropy, "effective": number, "of": len(_names(dataset))}


def _tasks(dataset: Dataset) -> list[dict[str, Any]]:
    """Of each reset option: the range of a number, or episodes by value."""
    rows: list[dict[str, Any]] = []
    for i, option in enumerate(dataset.options):
        if option.values:
            counts = np.bincount(dataset.option_values[:, i], minlength=len(option.values))
            rows.append(
                {
                    "name": option.name,
                    "values": {
                        str(value): int(count)
                        for value, count in zip(option.values, counts, strict=True)
                    },
                }
            )
        else:
            numbers = dataset.option_numbers[:, i]
            rows.append(
                {"name": option.name, "low": float(numbers.min()), "high": float(numbers.max())}
            )
    return rows


def _numbers(
    columns: Columns, extents: dict[Split, Extent], train: Sample, valid: Sample
) -> list[dict[str, Any]]:
    ours, theirs = columns.number(train.raw), columns.number(valid.raw)
    floor, ceiling = columns.bounds()
    rows = []
    for i, name in enumerate(columns.numbers):
        low, high = float(extents["train"].low[i]), float(extents["train"].high[i])
        if not np.isfinite(low):
            continue
        bounded = bool(
            np.isfinite(floor[i])
            and np.isfinite(ceiling[i])
            and abs(floor[i]) < 1e30
            and ceiling[i] > floor[i]
        )
        outside = (theirs[:, i] < low) | (theirs[:, i] > high) if len(valid) else np.zeros(0, bool)
        edges = (
            np.linspace(np.quantile(ours[:, i], 0.001), np.quantile(ours[:, i], 0.999), BINS + 1)
            if high > low
            else np.array([low, high])
        )
        rows.append(
            {
                "name": name,
                "low": low,
                "high": high,
                "constant": high == low,
                "mean": float(ours[:, i].mean()),
                "std": float(ours[:, i].std()),
                "entropy": _spread(ours[:, i], low, high),
                "space": [float(floor[i]), float(ceiling[i])] if bounded else None,
                "covered": (
                    _covered(ours[:, i], float(floor[i]), float(ceiling[i])) if bounded else None
                ),
                "valid_outside": float(outside.mean()) if len(valid) else None,
                "edges": edges.tolist(),
                "train": np.histogram(ours[:, i], edges)[0].tolist() if high > low else [len(ours)],
                "valid": (
                    np.histogram(theirs[:, i], edges)[0].tolist() if high > low else [len(theirs)]
                ),
            }
        )
    return rows


def _spread(values: Array, low: float, high: float) -> float:
    """Entropy of a number over BINS equal bins of its range, as a share of the largest there can
    be.
    """
    return (
        float(effective(np.histogram(values, BINS, (low, high))[0])[0] / np.log(BINS))
        if high > low
        else 0.0
    )


def _covered(values: Array, low: float, high: float) -> float:
    """The share of BINS equal bins of the space's own bounds that hold a transition."""
    return float((np.histogram(values, BINS, (low, high))[0] > 0).mean())


def _categories(columns: Columns, extents: dict[Split, Extent]) -> list[dict[str, Any]]:
    rows = []
    characters = [text for _, codec in columns.parts for _, text in category_names(codec)]
    for i, (name, text) in enumerate(zip(columns.categories, characters, strict=True)):
        train, valid = (extents[split].values[i] for split in SPLITS)
        if not text:
            common = np.argsort(-train, kind="stable")[:NAMED]
            entropy, number = effective(train)
            rows.append(
                {
                    "name": name,
                    "of": len(train),
                    "seen": int((train > 0).sum()),
                    "entropy": entropy,
                    "effective": number,
                    "counts": {str(value): int(train[value]) for value in common},
                    "only_valid": [
                        int(value) for value in np.flatnonzero((train == 0) & (valid > 0))[:NAMED]
                    ],
                }
            )
    return rows


def _plane(train: Sample, valid: Sample) -> dict[str, Any] | None:
    """State and action on training's first two principal components: counts in PLANE x PLANE cells
    over 99.8% of each.
    """
    if len(train) < 2:
        return None
    mean, directions, shares = principal(train.values)
    ours = (train.values - mean) @ directions
    theirs = (valid.values - mean) @ directions
    edges = []
    for k in range(2):
        low, high = np.quantile(ours[:, k], (0.001, 0.999))
        edges.append(np.linspace(low, high if high > low else low + 1.0, PLANE + 1))
    return {
        "shares": [float(share) for share in shares],
        "edges": [e.tolist() for e in edges],
        "train": np.histogram2d(ours[:, 0], ours[:, 1], edges)[0].astype(int).tolist(),
        "valid": np.histogram2d(theirs[:, 0], theirs[:, 1], edges)[0].astype(int).tolist(),
    }


def _missing(
    dataset: Dataset,
    columns: Columns,
    extents: dict[Split, Extent],
    train: Sample,
    valid: Sample,
    held: Array,
    threshold: float | None,
) -> dict[str, Any] | None:
    """What the validation split has that training lacks; None without one."""
    if not len(valid) or threshold is None:
        return None
    beyond = held > threshold
    table, worst = dataset.table, []
    episodes, member = np.unique(valid.episodes, return_inverse=True)
    shares = np.bincount(member, beyond) / np.bincount(member)
    for i in np.lexsort((episodes, -shares))[:NAMED]:
        if shares[i] > 0:
            row = table[episodes[i]]
            rows = beyond & (member == i)
            worst.append(
                {
                    "episode": int(row["index"]),
                    "behaviour": _names(dataset)[int(row["behaviour"])],
                    "length": int(row["length"]),
                    "return": float(row["total_reward"]),
                    "beyond": float(shares[i]),
                    "farthest": float(held[rows].max()),
                    "most": _most(columns, train, valid, rows),
                }
            )
    of = {split: table[dataset.episodes(split)] for split in SPLITS}
    only = set(of["valid"]["behaviour"].tolist()) - set(of["train"]["behaviour"].tolist())
    return {
        "beyond": float(beyond.mean()),
        "expected": 1 - BEYOND,
        "episodes": worst,
        "behaviours": [_names(dataset)[i] for i in sorted(only)],
        "outside": {
            name: [float(extents["valid"].low[i]), float(extents["valid"].high[i])]
            for i, name in enumerate(columns.numbers)
            if extents["valid"].low[i] < extents["train"].low[i]
            or extents["valid"].high[i] > extents["train"].high[i]
        },
    }


def _most(columns: Columns, train: Sample, valid: Sample, rows: Array) -> str:
    """The column in which these transitions of `valid` differ most from their nearest of training."""
    _, places = nearest(train.values, valid.values[rows])
    ours, theirs = columns.number(train.raw), columns.number(valid.raw)[rows]
    std = ours.std(0)
    apart = (((theirs - ours[places[:, 0]]) / np.where(std > 0, std, 1.0)) ** 2).mean(0)
    unlike = (columns.category(valid.raw)[rows] != columns.category(train.raw)[places[:, 0]]).mean(
        0
    )
    return [*columns.numbers, *columns.categories][int(np.argmax(np.concatenate([apart, unlike])))]


def _notes(dataset: Dataset, own: Array, valid: Sample) -> list[str]:
    notes = []
    if not np.isfinite(own).any():
        notes.append("training is one episode: there are no other episodes to measure a gap to")
    if not len(valid):
        notes.append(
            "there is no validation split, so what training lacks cannot be said; hold some out"
            " with valid_fraction, or curate's hold_out"
        )
    if len(_names(dataset)) == 1:
        notes.append(
            "one behaviour made all of it: what it never does, no world learns from this data"
        )
    return notes


def compare(a: Dataset, b: Dataset, *, seed: int = 0) -> dict[str, Any]:
    """How far each one's training transitions lie from the other's, by a's standard deviations:
    {"a_lacks": ..., "b_lacks": ...}.

    `beyond` is the share of the other's transitions whose gap is more than that of 99 in 100 of
    one's own to one's other episodes; of data alike it is .01.
    """
    features = Features(a)
    ours, theirs = features.sample(a, "train", seed=seed), features.sample(b, "train", seed=seed)

    def lacks(one: Sample, other: Sample) -> dict[str, Any]:
        threshold = _threshold(own_gaps(one.values, one.episodes, seed=seed))
        found = gaps(one.values, other.values)
        return {
            "beyond": _share(found, threshold),
            "quantiles": _curve(found)["quantiles"],
            "threshold": threshold,
        }

    return {"a_lacks": lacks(ours, theirs), "b_lacks": lacks(theirs, ours)}
