"""The coverage of a dataset, as the summary behind `mesocosm data show` and its page.

Distances are those of `data.analysis.neighbours`: of a transition's state and action, in standard
deviations, root mean square over columns. They are measured on a sample of each split, drawn by the
seed; ranges and counts are of every transition.
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
from mesocosm.datasets.dataset import Dataset, Split
from mesocosm.datasets.manifest import OUTCOMES
from mesocosm.datasets.spaces import SpaceCodec

Array = NDArray[Any]
SCHEMA = 1
SPLITS: tuple[Split, Split] = ("train", "valid")
BEYOND = 0.99
"""A transition is missing in training if its gap exceeds this quantile of training's gaps."""
QUANTILES = (0.1, 0.5, 0.9, 0.99)
CURVE = 101
BINS, PLANE = 32, 40
NAMED = 12
"""Episodes and values of a category that are named one by one."""


@dataclass
class Extent:
    """Lowest and highest of each number column of a split, and counts of each category's values."""

    low: Array
    high: Array
    values: list[Array]


class Columns:
    """The columns of state and action: numbers of the observation, then of the action, and so the
    categories.
    """

    def __init__(self, dataset: Dataset):
        self.parts = {"obs": dataset.observation_codec, "act": dataset.action_codec}
        codecs = self.parts.values()
        self.numbers = [name for codec in codecs for name in codec.labels()]
        self.categories = [name for codec in codecs for name in category_names(codec)]
        self.sizes = [size for codec in codecs for size in codec.cardinalities]
        self.texts = [
            leaf.characters is not None
            for codec in codecs
            for leaf in codec.leaves
            for _ in leaf.cardinalities
        ]

    def number(self, raw: dict[str, Array]) -> Array:
        return np.concatenate([raw[f"{part}_num"] for part in self.parts], 1)

    def category(self, raw: dict[str, Array]) -> Array:
        return np.concatenate([raw[f"{part}_cat"] for part in self.parts], 1).astype(np.int64)

    def bounds(self) -> tuple[Array, Array]:
        """Bounds of each number, as the spaces state them; infinite where they do not."""
        leaves = [leaf for codec in self.parts.values() for leaf in codec.leaves]
        boxes: list[Any] = [e.space for e in leaves if e.numbers.stop > e.numbers.start]
        low = [np.zeros(0), *(np.ravel(box.low).astype(np.float64) for box in boxes)]
        high = [np.zeros(0), *(np.ravel(box.high).astype(np.float64) for box in boxes)]
        return np.concatenate(low), np.concatenate(high)

    def extent(self, dataset: Dataset, split: Split) -> Extent:
        """One pass over the split."""
        low, high = np.full(len(self.numbers), np.inf), np.full(len(self.numbers), -np.inf)
        values = [np.zeros(size, np.int64) for size in self.sizes]
        names = ("obs_num", "obs_cat", "act_num", "act_cat")
        for chunk in dataset.chunks(split):
            rows = {name: chunk.arrays[name][~chunk.last] for name in names}
            numbers, categories = self.number(rows), self.category(rows)
            if len(numbers):
                low = np.minimum(low, numbers.min(0, initial=np.inf))
                high = np.maximum(high, numbers.max(0, initial=-np.inf))
            for i, counts in enumerate(values):
                counts += np.bincount(categories[:, i], minlength=len(counts))
        return Extent(low, high, values)


def category_names(codec: SpaceCodec) -> list[str]:
    """A name for each category column."""
    return [
        leaf.name if len(leaf.cardinalities) == 1 else f"{leaf.name}[{i}]"
        for leaf in codec.leaves
        for i in range(len(leaf.cardinalities))
    ]


def summarise(dataset: Dataset, *, name: str, seed: int = 0) -> dict[str, Any]:
    """The summary of one dataset: JSON without NaN or infinity. `name` heads the page."""
    features, columns = Features(dataset), Columns(dataset)
    train, valid = (features.sample(dataset, split, seed=seed) for split in SPLITS)
    extents = [columns.extent(dataset, split) for split in SPLITS]
    train_gaps = own_gaps(train.values, train.episodes, seed=seed)
    valid_gaps = gaps(train.values, valid.values) if len(valid) else np.zeros(0)
    numbers, categories = any_action(train, dataset.action_codec, seed=seed)
    free = train.values.copy()
    free[:, features.action] = features.actions(numbers, categories)
    uniform = own_gaps(train.values, train.episodes, seed=seed, queries=free)
    threshold, names = _threshold(train_gaps), _names(dataset)
    counts = np.bincount(dataset.table["behaviour"], dataset.table["length"], len(names))
    entropy, number = effective(counts)
    notes = []
    if not np.isfinite(train_gaps).any():
        notes.append("training is one episode: there are no other episodes to measure a gap to")
    if not len(valid):
        notes.append(
            "there is no validation split, so what training lacks is unknown; hold some out with"
            " valid_fraction, or curate's hold_out"
        )
    if len(names) == 1:
        notes.append(
            "one behaviour made all of it: what it never does, no world learns from this data"
        )
    missing = None
    if len(valid) and threshold is not None:
        missing = _missing(dataset, columns, extents, train, valid, valid_gaps, threshold)
    return {
        "schema": SCHEMA,
        "title": name,
        "environment": dataset.manifests[0].environment.id or "no environment was named",
        "seed": seed,
        "sampled": {
            split: {"transitions": len(sample), "of": dataset.count(split)}
            for split, sample in zip(SPLITS, (train, valid), strict=True)
        },
        "episodes": {split: len(dataset.episodes(split)) for split in SPLITS},
        "behaviours": [_behaviour(dataset, i, name) for i, name in enumerate(names)],
        "behaviour_entropy": {"nats": entropy, "effective": number, "of": len(names)},
        "tasks": _tasks(dataset),
        "numbers": _numbers(columns, extents, train, valid),
        "categories": _categories(columns, extents),
        "actions": {
            "tried": tried(train, features, dataset.action_codec, seed=seed),
            "entropy": action_entropy(train, features, dataset.action_codec),
        },
        "gaps": {
            "threshold": threshold,
            "train": _curve(train_gaps),
            "valid": _curve(valid_gaps),
            "any_action": _curve(uniform) | {"beyond": _share(uniform, threshold)},
        },
        "plane": _plane(train, valid) if len(train) >= 2 else None,
        "missing": missing,
        "notes": notes,
    }


def _threshold(train_gaps: Array) -> float | None:
    known = train_gaps[np.isfinite(train_gaps)]
    return float(np.quantile(known, BEYOND)) if len(known) else None


def _share(gap: Array, threshold: float | None) -> float | None:
    """The share of gaps beyond the threshold."""
    known = threshold is not None and np.isfinite(gap).any()
    return float((gap > threshold).mean()) if known else None


def _curve(gap: Array) -> dict[str, Any]:
    """Quantiles, and CURVE of them for a plot; None where there are no gaps."""
    known = gap[np.isfinite(gap)]
    if not len(known):
        return {"quantiles": None, "curve": None}
    quantiles = zip(QUANTILES, np.quantile(known, QUANTILES).tolist(), strict=True)
    curve = np.quantile(known, np.linspace(0, 1, CURVE)).tolist()
    return {"quantiles": {f"{q:g}": value for q, value in quantiles}, "curve": curve}


def _names(dataset: Dataset) -> list[str]:
    return [behaviour.name for behaviour in dataset.manifests[0].behaviours]


def _behaviour(dataset: Dataset, number: int, name: str) -> dict[str, Any]:
    rows = dataset.table[dataset.table["behaviour"] == number]
    known = rows["success"][rows["success"] >= 0]
    counts = np.bincount(rows["outcome"], minlength=len(OUTCOMES)).tolist()
    return {
        "name": name,
        "episodes": len(rows),
        "transitions": int(rows["length"].sum()),
        "returns": np.quantile(rows["total_reward"], (0, 0.5, 1)).tolist(),
        "outcomes": dict(zip(OUTCOMES, counts, strict=True)),
        "success": float(known.mean()) if len(known) else None,
        "valid_episodes": int((rows["split"] == SPLITS.index("valid")).sum()),
    }


def _tasks(dataset: Dataset) -> list[dict[str, Any]]:
    """Coverage of each reset option: the range of a number, or episodes by value."""
    rows: list[dict[str, Any]] = []
    for i, option in enumerate(dataset.options):
        if option.values:
            counts = np.bincount(dataset.option_values[:, i], minlength=len(option.values))
            values = dict(zip(map(str, option.values), counts.tolist(), strict=True))
            rows.append({"name": option.name, "values": values})
        else:
            numbers = dataset.option_numbers[:, i]
            low, high = float(numbers.min()), float(numbers.max())
            rows.append({"name": option.name, "low": low, "high": high})
    return rows


def _numbers(
    columns: Columns, extents: list[Extent], train: Sample, valid: Sample
) -> list[dict[str, Any]]:
    trained, held_out = columns.number(train.raw), columns.number(valid.raw)
    rows = []
    for i, (name, floor, ceiling) in enumerate(
        zip(columns.numbers, *columns.bounds(), strict=True)
    ):
        low, high = float(extents[0].low[i]), float(extents[0].high[i])
        if not np.isfinite(low):
            continue
        values, others = trained[:, i], held_out[:, i]
        outside = (others < low) | (others > high)
        bounded = np.isfinite([floor, ceiling]).all() and abs(floor) < 1e30 and ceiling > floor
        row = {
            "name": name,
            "low": low,
            "high": high,
            "constant": high == low,
            "mean": float(values.mean()),
            "std": float(values.std()),
            "entropy": 0.0,
            "space": [float(floor), float(ceiling)] if bounded else None,
            "covered": None,
            "valid_outside": float(outside.mean()) if len(valid) else None,
            "edges": [low, high],
            "train": [len(values)],
            "valid": [len(others)],
        }
        if bounded:  # the share of equal bins of the space's own bounds that hold a transition
            counts = np.histogram(values, BINS, (floor, ceiling))[0]
            row["covered"] = float((counts > 0).mean())
        if high > low:
            spread = effective(np.histogram(values, BINS, (low, high))[0])[0]
            row["entropy"] = float(spread / np.log(BINS))  # a share of the largest possible
            first, last = np.quantile(values, (0.001, 0.999))
            edges = np.linspace(first, last, BINS + 1)
            for key, some in (("train", values), ("valid", others)):
                row[key] = np.histogram(some, edges)[0].tolist()
            row["edges"] = edges.tolist()
        rows.append(row)
    return rows


def _categories(columns: Columns, extents: list[Extent]) -> list[dict[str, Any]]:
    rows = []
    for i, (name, text) in enumerate(zip(columns.categories, columns.texts, strict=True)):
        if text:
            continue
        train, valid = (extent.values[i] for extent in extents)
        common = np.argsort(-train, kind="stable")[:NAMED].tolist()
        entropy, number = effective(train)
        rows.append(
            {
                "name": name,
                "of": len(train),
                "seen": int((train > 0).sum()),
                "entropy": entropy,
                "effective": number,
                "counts": {str(value): int(train[value]) for value in common},
                "only_valid": np.flatnonzero((train == 0) & (valid > 0))[:NAMED].tolist(),
            }
        )
    return rows


def _plane(train: Sample, valid: Sample) -> dict[str, Any]:
    """State and action on training's first two principal components: counts in PLANE x PLANE cells
    over 99.8% of each.
    """
    mean, directions, shares = principal(train.values)
    trained, held_out = ((sample.values - mean) @ directions for sample in (train, valid))
    edges = []
    for low, high in np.quantile(trained[:, :2], (0.001, 0.999), axis=0).T:
        edges.append(np.linspace(low, high if high > low else low + 1.0, PLANE + 1))

    def counts(points: Array) -> list[list[int]]:
        return np.histogram2d(points[:, 0], points[:, 1], edges)[0].astype(int).tolist()

    return {
        "shares": [float(share) for share in shares],
        "edges": [edge.tolist() for edge in edges],
        "train": counts(trained),
        "valid": counts(held_out),
    }


def _missing(
    dataset: Dataset,
    columns: Columns,
    extents: list[Extent],
    train: Sample,
    valid: Sample,
    valid_gaps: Array,
    threshold: float,
) -> dict[str, Any]:
    """Parts of the validation split that training lacks."""
    beyond, worst, names = valid_gaps > threshold, [], _names(dataset)
    episodes, member = np.unique(valid.episodes, return_inverse=True)
    shares = np.bincount(member, beyond) / np.bincount(member)
    for i in np.lexsort((episodes, -shares))[:NAMED]:
        if shares[i] > 0:
            row, rows = dataset.table[episodes[i]], beyond & (member == i)
            worst.append(
                {
                    "episode": int(row["index"]),
                    "behaviour": names[int(row["behaviour"])],
                    "length": int(row["length"]),
                    "return": float(row["total_reward"]),
                    "beyond": float(shares[i]),
                    "farthest": float(valid_gaps[rows].max()),
                    "most": _most(columns, train, valid, rows),
                }
            )
    seen, new = (set(dataset.table["behaviour"][dataset.episodes(s)].tolist()) for s in SPLITS)
    (low, high), (new_low, new_high) = ((extent.low, extent.high) for extent in extents)
    outside = np.flatnonzero((new_low < low) | (new_high > high)).tolist()
    return {
        "beyond": float(beyond.mean()),
        "expected": 1 - BEYOND,
        "episodes": worst,
        "behaviours": [names[i] for i in sorted(new - seen)],
        "outside": {columns.numbers[i]: [float(new_low[i]), float(new_high[i])] for i in outside},
    }


def _most(columns: Columns, train: Sample, valid: Sample, rows: Array) -> str:
    """The column in which these transitions of `valid` differ most from the nearest of training."""
    places = nearest(train.values, valid.values[rows])[1][:, 0]
    trained, held_out = columns.number(train.raw), columns.number(valid.raw)[rows]
    std = trained.std(0)
    squares = ((held_out - trained[places]) / np.where(std > 0, std, 1.0)) ** 2
    unlike = columns.category(valid.raw)[rows] != columns.category(train.raw)[places]
    differences = np.concatenate([squares.mean(0), unlike.mean(0)])
    return [*columns.numbers, *columns.categories][int(np.argmax(differences))]


def compare(a: Dataset, b: Dataset, *, seed: int = 0) -> dict[str, Any]:
    """The distance of each one's training transitions from the other's, by a's standard deviations:
    {"a_lacks": ..., "b_lacks": ...}.

    `beyond` is the share of the other's transitions whose gap exceeds the BEYOND quantile of one's
    own gaps to other episodes; it is .01 if the data are alike.
    """
    features = Features(a)

    def lacks(one: Sample, other: Sample) -> dict[str, Any]:
        threshold = _threshold(own_gaps(one.values, one.episodes, seed=seed))
        gap = gaps(one.values, other.values)
        quantiles = _curve(gap)["quantiles"]
        return {"beyond": _share(gap, threshold), "quantiles": quantiles, "threshold": threshold}

    first, second = (features.sample(dataset, "train", seed=seed) for dataset in (a, b))
    return {"a_lacks": lacks(first, second), "b_lacks": lacks(second, first)}
