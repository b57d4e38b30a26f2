"""The coverage of a dataset, as the summary behind `mesocosm data show` and its page.

Distances (`data.analysis.neighbours`) are measured on a seeded sample of each split; ranges and
counts are of every transition.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesocosm.data.analysis import texts
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
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.leaf import Leaf
from mesocosm.datasets.manifest import OUTCOMES
from mesocosm.datasets.split import Split

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


def summarise(dataset: Dataset, *, name: str, seed: int = 0) -> dict[str, Any]:
    """The summary of one dataset: JSON without NaN or infinity. `name` heads the page."""
    features, codec = Features(dataset), dataset.action_codec
    train, valid = samples = [features.sample(dataset, split, seed=seed) for split in SPLITS]
    columns = _Columns(dataset, train, valid)
    # Without any column, as of images alone, states are not compared.
    compared = features.state.stop > 0
    train_gaps, valid_gaps, uniform = np.zeros(0), np.zeros(0), np.zeros(0)
    if compared:
        train_gaps = own_gaps(train.values, train.episodes, seed=seed)
        valid_gaps = gaps(train.values, valid.values) if len(valid) else valid_gaps
    spoken = bool(codec.text_leaves)  # random characters are not actions
    if compared and not spoken:
        free = train.values.copy()
        free[:, features.action] = features.actions(*any_action(train, codec, seed=seed))
        uniform = own_gaps(train.values, train.episodes, seed=seed, queries=free)
    threshold, names = _threshold(train_gaps), columns.behaviours
    counts = np.bincount(dataset.table["behaviour"], dataset.table["length"], len(names))
    entropy, number = effective(counts)
    notes = [unseen(leaf, compared) for leaf in dataset.observation_codec.image_leaves]
    if compared and not np.isfinite(train_gaps).any():
        notes.append("training is one episode: there are no other episodes to measure a gap to")
    if not len(valid):
        notes.append(
            "there is no validation split, so what training lacks is unknown; hold some out with"
            " valid_fraction, or curate's hold_out"
        )
    if len(names) == 1:
        notes.append(
            "all of it is by one behaviour: a world cannot learn what this behaviour never does"
        )
    missing = None
    if len(valid) and threshold is not None:
        missing = columns.missing(valid_gaps, threshold)
    return {
        "schema": SCHEMA,
        "title": name,
        "environment": dataset.manifests[0].environment.id or "no environment was named",
        "seed": seed,
        "sampled": {
            split: {"transitions": len(sample), "of": dataset.count(split)}
            for split, sample in zip(SPLITS, samples, strict=True)
        },
        "episodes": {split: len(dataset.episodes(split)) for split in SPLITS},
        "behaviours": [_behaviour(dataset, i, name) for i, name in enumerate(names)],
        "behaviour_entropy": {"nats": entropy, "effective": number, "of": len(names)},
        "tasks": _tasks(dataset),
        "numbers": columns.number_rows(),
        "categories": columns.category_rows(),
        "texts": [texts.describe(dataset, leaf, seed) for leaf in texts.text_leaves(dataset)],
        "actions": {
            "tried": tried(train, features, codec, seed=seed) if compared and not spoken else None,
            "entropy": action_entropy(train, features, codec) if compared else None,
        },
        "gaps": {
            "threshold": threshold,
            "train": _curve(train_gaps),
            "valid": _curve(valid_gaps),
            "any_action": _curve(uniform) | {"beyond": _share(uniform, threshold)},
        },
        "plane": _plane(train, valid) if compared and len(train) >= 2 else None,
        "missing": missing,
        "notes": notes,
    }


def unseen(leaf: Leaf, compared: bool = True) -> str:
    """One sentence on the figures that do not apply to an image.

    Args:
        leaf: An image.
        compared: False if the observation has nothing else.
    """
    if compared:
        return f"{leaf.name} is an image, which distances between transitions do not see"
    return f"{leaf.name} is an image, and nothing else is observed: transitions are not compared"


def compare(a: Dataset, b: Dataset, *, seed: int = 0) -> dict[str, Any] | None:
    """The distance of each dataset's training transitions from the other's, in units of a's
    standard deviations: {"a_lacks": ..., "b_lacks": ...}; None where only images are observed.

    `beyond` is the share of the other's transitions whose gap exceeds the BEYOND quantile of one's
    own gaps to other episodes; it is .01 for data of the same distribution.
    """
    features = Features(a)
    if not features.state.stop:
        return None

    def lacks(one: Sample, other: Sample) -> dict[str, Any]:
        threshold = _threshold(own_gaps(one.values, one.episodes, seed=seed))
        gap = gaps(one.values, other.values)
        quantiles = _curve(gap)["quantiles"]
        return {"beyond": _share(gap, threshold), "quantiles": quantiles, "threshold": threshold}

    first, second = (features.sample(dataset, "train", seed=seed) for dataset in (a, b))
    return {"a_lacks": lacks(first, second), "b_lacks": lacks(second, first)}


def _threshold(train_gaps: Array) -> float | None:
    known = train_gaps[np.isfinite(train_gaps)]
    return float(np.quantile(known, BEYOND)) if len(known) else None


def _share(gap: Array, threshold: float | None) -> float | None:
    """The share of gaps beyond the threshold."""
    known = threshold is not None and len(gap) and np.isfinite(gap).any()
    return float((gap > threshold).mean()) if known else None


def _curve(gap: Array) -> dict[str, Any]:
    """Quantiles, and CURVE of them for a plot; None where there are no gaps."""
    known = gap[np.isfinite(gap)]
    if not len(known):
        return {"quantiles": None, "curve": None}
    quantiles = zip(QUANTILES, np.quantile(known, QUANTILES).tolist(), strict=True)
    curve = np.quantile(known, np.linspace(0, 1, CURVE)).tolist()
    return {"quantiles": {f"{q:g}": value for q, value in quantiles}, "curve": curve}


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


class _Columns:
    """The columns of state and action: numbers of the observation, then of the action, and so the
    categories. Lowest and highest numbers, and counts of values, are of every transition.
    """

    def __init__(self, dataset: Dataset, train: Sample, valid: Sample):
        self.dataset, self.train, self.valid = dataset, train, valid
        self.behaviours = [behaviour.name for behaviour in dataset.manifests[0].behaviours]
        self.codecs = codecs = (dataset.observation_codec, dataset.action_codec)
        self.leaves = [leaf for codec in codecs for leaf in codec.leaves]
        self.numbers = [name for codec in codecs for name in codec.labels()]
        self.categories: list[str] = []
        for leaf in self.leaves:
            width = len(leaf.cardinalities)
            names = [f"{leaf.name}[{i}]" for i in range(width)]
            self.categories += [leaf.name] if width == 1 else names
        self.low, self.high, self.counts = zip(*map(self._extent, SPLITS), strict=True)

    def _extent(self, split: Split) -> tuple[Array, Array, list[Array]]:
        """Lowest and highest of each number, and counts of each category's values."""
        low, high = np.full(len(self.numbers), np.inf), np.full(len(self.numbers), -np.inf)
        counts = [np.zeros(n, np.int64) for leaf in self.leaves for n in leaf.cardinalities]
        for chunk in self.dataset.chunks(split):
            rows = {key: array[~chunk.last] for key, array in chunk.arrays.items()}
            numbers, categories = _joined(rows, "num"), _joined(rows, "cat").astype(np.int64)
            low = np.minimum(low, numbers.min(0, initial=np.inf))
            high = np.maximum(high, numbers.max(0, initial=-np.inf))
            for values, column in zip(counts, categories.T, strict=True):
                values += np.bincount(column, minlength=len(values))
        return low, high, counts

    def _bounds(self, side: str) -> Array:
        """Bounds of each number, as the spaces state them; infinite where they do not."""
        boxes = [leaf.space for leaf in self.leaves if leaf.numbers.stop > leaf.numbers.start]
        edges = [np.ravel(getattr(box, side)).astype(np.float64) for box in boxes]
        return np.concatenate([np.zeros(0), *edges])

    def number_rows(self) -> list[dict[str, Any]]:
        trained, held_out = _joined(self.train.raw, "num"), _joined(self.valid.raw, "num")
        rows = []
        bounds = zip(self._bounds("low"), self._bounds("high"), strict=True)
        for i, (name, (floor, ceiling)) in enumerate(zip(self.numbers, bounds, strict=True)):
            low, high = float(self.low[0][i]), float(self.high[0][i])
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
                "valid_outside": float(outside.mean()) if len(others) else None,
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

    def category_rows(self) -> list[dict[str, Any]]:
        texts = [leaf.characters is not None for leaf in self.leaves for _ in leaf.cardinalities]
        rows = []
        for name, text, train, valid in zip(self.categories, texts, *self.counts, strict=True):
            if text:
                continue
            common = np.argsort(-train, kind="stable")[:NAMED].tolist()
            entropy, number = effective(train)
            row = {
                "name": name,
                "of": len(train),
                "seen": int((train > 0).sum()),
                "entropy": entropy,
                "effective": number,
                "counts": {str(value): int(train[value]) for value in common},
                "only_valid": np.flatnonzero((train == 0) & (valid > 0))[:NAMED].tolist(),
            }
            rows.append(row)
        return rows

    def missing(self, valid_gaps: Array, threshold: float) -> dict[str, Any]:
        """Parts of the validation split that training lacks."""
        beyond, worst, names, data = valid_gaps > threshold, [], self.behaviours, self.dataset
        episodes, member = np.unique(self.valid.episodes, return_inverse=True)
        shares = np.bincount(member, beyond) / np.bincount(member)
        for i in np.lexsort((episodes, -shares))[:NAMED]:
            if shares[i] > 0:
                row, rows = data.table[episodes[i]], beyond & (member == i)
                episode = {
                    "episode": int(row["index"]),
                    "behaviour": names[int(row["behaviour"])],
                    "length": int(row["length"]),
                    "return": float(row["total_reward"]),
                    "beyond": float(shares[i]),
                    "farthest": float(valid_gaps[rows].max()),
                    "most": self._most(rows),
                }
                worst.append(episode)
        seen, new = (set(data.table["behaviour"][data.episodes(s)].tolist()) for s in SPLITS)
        (low, new_low), (high, new_high) = self.low, self.high
        outside = np.flatnonzero((new_low < low) | (new_high > high)).tolist()
        return {
            "beyond": float(beyond.mean()),
            "expected": 1 - BEYOND,
            "episodes": worst,
            "behaviours": [names[i] for i in sorted(new - seen)],
            "outside": {self.numbers[i]: [float(new_low[i]), float(new_high[i])] for i in outside},
        }

    def _most(self, rows: Array) -> str:
        """The column in which these held-out transitions differ most from their nearest ones."""
        train, valid = self.train, self.valid
        places = nearest(train.values, valid.values[rows])[1][:, 0]
        trained, held_out = _joined(train.raw, "num"), _joined(valid.raw, "num")[rows]
        std = trained.std(0)
        squares = ((held_out - trained[places]) / np.where(std > 0, std, 1.0)) ** 2
        unlike = _joined(valid.raw, "cat")[rows] != _joined(train.raw, "cat")[places]
        differences, names = [squares.mean(0), unlike.mean(0)], [*self.numbers, *self.categories]
        if any(codec.long_texts for codec in self.codecs):
            other = _joined(valid.raw, "text")[rows] != _joined(train.raw, "text")[places]
            differences.append(other.mean(0))
            names += [leaf.name for codec in self.codecs for leaf in codec.text_leaves]
        return names[int(np.argmax(np.concatenate(differences)))]


def _joined(arrays: dict[str, Array], kind: str) -> Array:
    """The columns of one kind, "num", "cat" or "text", of observation and action."""
    return np.concatenate([arrays[f"obs_{kind}"], arrays[f"act_{kind}"]], 1)
