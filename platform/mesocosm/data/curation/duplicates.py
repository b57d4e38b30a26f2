"""Operations on copies and near copies."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from mesocosm.data.analysis.texts import hashed as hashed_text
from mesocosm.data.curation.scan import EpisodePiece, Rows
from mesocosm.data.curation.table import TRAIN, Operation, Step
from mesocosm.data.loading.normalize import Moments
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.manifest import ARRAYS
from mesocosm.datasets.texts import TEXTS, pack

Array = NDArray[Any]
POINTS = 16
"""Steps of an episode at which near copies are compared."""
SKETCH = 8
"""Numbers an episode that show which pairs may be near."""
BLOCK = 1024
FRAMES = 256
"""Frames that are hashed at once."""


@dataclass
class ExactDuplicates(Operation):
    """Keep one of the episodes that are equal bit for bit: one of validation if there is any, else
    the first.
    """

    def run(self, step: Step) -> None:
        episodes = step.episodes()
        digest = step.measure(hashed, episodes)["digest"]
        keys = np.concatenate([digest, _tasks(step.dataset)[episodes, None].view(np.uint64)], 1)
        order = _priority(step, episodes)
        _, first, group = np.unique(keys[order], axis=0, return_index=True, return_inverse=True)
        leader = np.empty(len(order), np.int64)
        leader[order] = order[first[group.reshape(-1)]]
        copies = leader != np.arange(len(order))
        step.drop(episodes[copies], "equal to an episode that is kept", episodes[leader[copies]])


def hashed(dataset: Dataset, piece: EpisodePiece) -> dict[str, Array]:
    """digest [e, 2] uint64: BLAKE2b of 128 bits of all of an episode's arrays and frames."""
    rows = Rows(dataset, piece)
    digests = [hashlib.blake2b(digest_size=16) for _ in rows.lengths]
    texts = [name for name in TEXTS if rows[name].size]
    for name in (*ARRAYS, *texts):
        array = rows[name]
        if not name.startswith("obs"):
            # An episode that was cut has its next action there.
            array[rows.last] = "" if name in texts else 0
        if name in texts:
            for digest, start, length in zip(digests, rows.starts, rows.lengths, strict=True):
                values, ends = pack(array[start : start + length + 1])
                digest.update(ends.tobytes() + values.tobytes())
            continue
        if array.dtype.kind == "f":
            array = array + 0.0  # -0.0 becomes 0.0
        for digest, start, length in zip(digests, rows.starts, rows.lengths, strict=True):
            digest.update(array[start : start + length + 1].tobytes())
    places = zip(digests, piece.shards.tolist(), piece.first.tolist(), strict=True)
    for (digest, shard, first), length in zip(places, piece.length.tolist(), strict=True):
        for name in dataset.image_names:
            frames = dataset.images(shard, name)
            for start in range(first, first + length + 1, FRAMES):
                digest.update(frames[start : min(start + FRAMES, first + length + 1)].tobytes())
    every = b"".join(digest.digest() for digest in digests)
    return {"digest": np.frombuffer(every, np.uint64).reshape(-1, 2)}


@dataclass
class NearDuplicates(Operation):
    """Keep one of the episodes whose distance is at most `tolerance`, as for exact copies.

    Two episodes of the same task, whose lengths differ by at most the share `tolerance` of the
    longer, are compared at 16 evenly spaced steps (first and last among them): in every number of
    observation, action and reward, in units of its standard deviation over the kept episodes, and
    in every category, where a difference counts 1; a text too long for slots is one category, and
    so is a frame. The distance is the root mean square of these.
    """

    tolerance: float = 0.01

    def run(self, step: Step) -> None:
        """Compare each leader with the later episodes whose sketches are near, and drop the near
        ones. The sketch is an orthogonal projection, which makes no distance longer: no near pair
        is missed.
        """
        episodes = step.episodes()
        episodes = episodes[_priority(step, episodes)]
        lengths, tasks = step.table.length[episodes], _tasks(step.dataset)[episodes]
        scale = _scale(step.measure(moments, np.sort(episodes)))
        sketch = step.measure(partial(sketched, scale=scale), episodes)["sketch"]
        codecs = step.dataset.observation_codec, step.dataset.action_codec
        categories = sum(codec.categories + len(codec.long_texts) for codec in codecs)
        categories += len(step.dataset.image_names)
        width = POINTS * (len(scale) + categories)
        reach = self.tolerance * math.sqrt(width) * (1 + 1e-6) + 1e-9
        tree = cKDTree(sketch)
        leader = np.arange(len(episodes))
        for one in np.flatnonzero(tree.query_ball_point(sketch, reach, return_length=True) > 1):
            if leader[one] != one:
                continue
            others = np.array(tree.query_ball_point(sketch[one], reach), np.int64)
            others = np.sort(others[(others > one) & (leader[others] == others)])
            longer = np.maximum(lengths[others], lengths[one])
            alike = np.abs(lengths[others] - lengths[one]) <= self.tolerance * longer
            others = others[alike & (tasks[others] == tasks[one])]
            for start in range(0, len(others), BLOCK):
                block = others[start : start + BLOCK]
                distance = _distance(step, episodes[one], episodes[block], scale, width)
                leader[block[distance <= self.tolerance]] = one
        copies = np.flatnonzero(leader != np.arange(len(episodes)))
        copies = copies[np.argsort(episodes[copies])]
        reason = f"within {self.tolerance:g} of an episode that is kept"
        step.drop(episodes[copies], reason, episodes[leader[copies]])


def moments(dataset: Dataset, piece: EpisodePiece) -> dict[str, Array]:
    """Count, mean and sum of squared differences of each number of observation, action and reward,
    each [1, d].
    """
    rows = Rows(dataset, piece)
    parts = [rows["obs_num"], rows["act_num"][~rows.last], rows["reward"][~rows.last, None]]
    means = [part.mean(0) for part in parts]
    squares = [((part - mean) ** 2).sum(0) for part, mean in zip(parts, means, strict=True)]
    counts = [np.full(part.shape[1], float(len(part))) for part in parts]
    columns = {"count": counts, "mean": means, "squares": squares}
    return {name: np.concatenate(values)[None] for name, values in columns.items()}


def _scale(pieces: dict[str, Array]) -> Array:
    """[d] standard deviations, 1 where nothing varies."""
    joined = Moments(pieces["mean"].shape[1])
    for count, mean, squares in zip(
        *(pieces[n] for n in ("count", "mean", "squares")), strict=True
    ):
        joined.merge(count, mean, squares)
    return np.where(joined.std > 0, joined.std, 1.0)


def sketched(dataset: Dataset, piece: EpisodePiece, scale: Array) -> dict[str, Array]:
    """sketch [e, SKETCH]. A category enters as a random number in [0, 1) of its value: two are
    never further apart than the 1 that a difference counts.
    """
    numbers, categories = _vectors(dataset, piece, scale)
    spread = np.random.default_rng(1).random(257)
    values = np.concatenate([numbers, spread[categories % 257]], 1)
    basis, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((values.shape[1], SKETCH)))
    return {"sketch": values @ basis}


def _vectors(dataset: Dataset, piece: EpisodePiece, scale: Array) -> tuple[Array, Array]:
    """The compared values of each episode: numbers [e, POINTS * d] in units of scale, and
    categories [e, POINTS * m].
    """
    fractions = np.arange(POINTS)

    def take(name: str, last: Array) -> Array:
        steps = (fractions * last[:, None] + (POINTS - 1) // 2) // (POINTS - 1)
        return dataset.gather(name, piece.shards, piece.first[:, None] + steps)

    last = piece.length - 1
    parts = [take("obs_num", piece.length), take("act_num", last), take("reward", last)[..., None]]
    numbers = np.concatenate(parts, -1) / scale
    codes = [take("obs_cat", piece.length), take("act_cat", last)]
    for name, codec, ends in (
        ("obs_text", dataset.observation_codec, piece.length),
        ("act_text", dataset.action_codec, last),
    ):
        columns = np.array([leaf.text for leaf in codec.long_texts], np.int64)
        if len(columns):
            texts = take(name, ends)[..., columns]
            hashes = [hashed_text(text) & 0x7FFFFFFFFFFFFFFF for text in texts.flat]
            codes.append(np.array(hashes, np.int64).reshape(texts.shape))
    for name in dataset.image_names:
        steps = (fractions * piece.length[:, None] + (POINTS - 1) // 2) // (POINTS - 1)
        codes.append(_frame_hashes(dataset, name, piece, steps)[..., None])
    categories = np.concatenate([code.astype(np.int64) for code in codes], -1)
    return numbers.reshape(len(numbers), -1), categories.reshape(len(categories), -1)


def _frame_hashes(dataset: Dataset, name: str, piece: EpisodePiece, steps: Array) -> Array:
    """[e, POINTS] int64: a hash of each episode's frames at POINTS steps. Few frames are in memory
    at once.
    """
    hashes = np.empty(steps.shape, np.int64)
    for i, shard in enumerate(piece.shards.tolist()):
        for j, frame in enumerate(dataset.images(shard, name).take(piece.first[i] + steps[i])):
            digest = hashlib.blake2b(frame.tobytes(), digest_size=8).digest()
            hashes[i, j] = int.from_bytes(digest, "little") & 0x7FFFFFFFFFFFFFFF
    return hashes


def _distance(step: Step, one: int, others: Array, scale: Array, width: int) -> Array:
    """[n]"""
    episodes = np.concatenate([[one], others])
    piece = EpisodePiece.of(step.dataset, episodes, step.table.length[episodes])
    numbers, categories = _vectors(step.dataset, piece, scale)
    squares = ((numbers[1:] - numbers[0]) ** 2).sum(1) + (categories[1:] != categories[0]).sum(1)
    return np.asarray(np.sqrt(squares / width))


def _tasks(dataset: Dataset) -> Array:
    """[E] int64: a number for each combination of reset options."""
    if not dataset.options:
        return np.zeros(len(dataset.table), np.int64)
    both = np.concatenate([dataset.option_numbers, dataset.option_values], 1)
    return np.unique(both, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _priority(step: Step, episodes: Array) -> Array:
    """Positions in `episodes`: validation first, as a training copy of a held-out one is a leak."""
    return np.lexsort((episodes, step.table.split[episodes] == TRAIN))
