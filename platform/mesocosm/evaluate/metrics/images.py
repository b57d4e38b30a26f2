"""The accuracy of a world's predicted frames: references for its nats of codes, and errors of
imagined pixels over the horizon.

A reference is a distribution of the next codes that is counted on the training split: `unigram`,
of each position alone; `copy or unigram`, where each position keeps its code with a counted
probability, else changes to a counted one. A world that has learned anything has fewer nats.

PSNR is 10 log10(255^2 / mean squared error) in dB, of the pixels that move in the true frame: those
that differ from the median frame by more than MOVING.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesocosm.data.tokens.making import spread
from mesocosm.data.tokens.reconstruction import MOVING, psnr
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.images import image_names, image_values
from mesocosm.datasets.split import Split
from mesocosm.evaluate.metrics.log import Array, Log, codec_of, play
from mesocosm.evaluate.metrics.open_loop import Progress
from mesocosm.model.tokenizer.frames import as_bytes
from mesocosm.model.world import World

STARTS = 64
"""Logged states that are imagined from, at most."""
SHOWN, COLUMNS = 3, 12
"""Strips of an image, and the frames of each, at most."""
MEDIAN = 256
"""Frames whose median is the still picture."""


@dataclass(frozen=True)
class FrameRow:
    """Errors of one image some steps ahead, of one sampled rollout from each start."""

    steps: int
    starts: int
    world: float | None
    """PSNR of imagined frames' moving pixels; None without error, or where nothing moves"""
    still: float | None
    """The same of the last true frame, repeated"""
    tokenizer: float | None
    """The same of the true frame's reconstruction, the best that a world can reach"""


@dataclass(frozen=True)
class FrameStrip:
    """True frames over imagined ones, of the same logged actions."""

    steps: tuple[int, ...]
    """Steps ahead of each column."""
    true: NDArray[np.uint8]
    """[k, height, width, channels]"""
    imagined: NDArray[np.uint8]


@dataclass(frozen=True)
class ImageFidelity:
    """All of it."""

    unigram: float
    """Nats of a transition's codes, held out"""
    copy_or_unigram: float
    nats: float | None
    """The world's own nats; None if other parts of the observation are also predicted."""
    images: tuple[tuple[str, tuple[FrameRow, ...], tuple[FrameStrip, ...]], ...]
    """(leaf, rows by horizon, strips) of each image"""
    notes: tuple[str, ...]

    @property
    def reference(self) -> float:
        """The better of the two references."""
        return min(self.unigram, self.copy_or_unigram)


def image_fidelity(
    world: World,
    dataset: Dataset,
    losses: Mapping[str, float],
    *,
    horizons: Sequence[int | str],
    starts: int,
    seed: int,
    split: Split,
    progress: Progress = lambda text: None,
) -> ImageFidelity | None:
    """Measure a world of images.

    Args:
        world: The world.
        dataset: Of the world's spaces, tokenized.
        losses: The world's nats by part on the split.
        horizons: Steps ahead; "full" is left out.
        starts: Logged states to imagine from, at most; no more than STARTS are used.
        seed: Of the starts and the rollouts.
        split: The split to measure on; references are counted on "train".
        progress: Called on each imagined step.

    Returns:
        None where no image is predicted.
    """
    codec, part = codec_of(world), world.spec.observation
    if not part.images:
        return None
    progress("references of codes")
    columns_of = codec.observation_codec
    columns = np.concatenate([np.arange(i.start, i.start + i.length) for i in part.images])
    sizes = np.array(part.categories)[columns]
    counts = CodeCounts(sizes)
    for before, after in _pairs(dataset, codec, "train", columns):
        counts.add(before, after)
    nats = np.concatenate([counts.nats(*pair) for pair in _pairs(dataset, codec, split, columns)])
    alone = not part.numbers and len(columns) == len(part.categories)
    ahead = sorted({int(h) for h in horizons if h != "full"})
    task = {leaf.path for key in codec.environment["task"] for leaf in columns_of.matching(key)}
    leaves = columns_of.image_leaves
    places = [place for place, leaf in enumerate(leaves) if leaf.path not in task]
    frames = _Frames(world, Log(dataset, codec, split), places, min(starts, STARTS), seed)
    rows, strips, notes = frames.measure(ahead, progress)
    return ImageFidelity(
        unigram=float(nats[:, 0].mean()),
        copy_or_unigram=float(nats[:, 1].mean()),
        nats=float(losses["dynamics"]) if alone else None,
        images=tuple(zip([leaves[place].name for place in places], rows, strips, strict=True)),
        notes=tuple(notes),
    )


def _pairs(dataset: Dataset, codec: Any, split: Split, columns: Array) -> Any:
    """(codes before [K, n], codes after) of the transitions of a split, a chunk at a time."""
    for chunk in dataset.chunks(split):
        numbers, categories = chunk.arrays["obs_num"], chunk.arrays["obs_cat"]
        codes = codec.observation_parts(numbers, categories).categories.numpy()[:, columns]
        going = np.flatnonzero(~chunk.last)
        yield codes[going], codes[going + 1]


class CodeCounts:
    """The counts of both references; each has one count in all for the codes that never came.

    Args:
        sizes: [n] the number of values of each code.
    """

    def __init__(self, sizes: Array):
        self._places = np.cumsum(sizes) - sizes
        each = np.repeat(1.0 / sizes, sizes)
        self._every, self._changed = each.copy(), each
        self._stays, self._moves = np.ones(len(sizes)), np.ones(len(sizes))

    def add(self, before: Array, after: Array) -> None:
        """Count transitions [K, n]."""
        at = after + self._places
        same = before == after
        length = len(self._every)
        self._every += np.bincount(at.ravel(), minlength=length)
        self._changed += np.bincount(at[~same], minlength=length)
        self._stays += same.sum(0)
        self._moves += (~same).sum(0)

    def nats(self, before: Array, after: Array) -> Array:
        """[K, 2]: nats of transitions [K, n], as `unigram` and as `copy or unigram`."""
        at = after + self._places
        every, changed = (np.add.reduceat(c, self._places) for c in (self._every, self._changed))
        unigram = -np.log(self._every[at] / every).sum(1)
        stay = self._stays / (self._stays + self._moves)
        shares = self._changed[at] / (changed - self._changed[before + self._places])
        chances = np.where(before == after, stay, (1 - stay) * shares)
        return np.stack([unigram, -np.log(chances).sum(1)], 1)


@dataclass(frozen=True)
class _Frames:
    """Imagines frames from logged states."""

    world: World
    log: Log
    places: list[int]
    """The images to measure, by their place in an observation."""
    starts: int
    seed: int

    def measure(
        self, horizons: Sequence[int], progress: Progress
    ) -> tuple[list[tuple[FrameRow, ...]], list[tuple[FrameStrip, ...]], list[str]]:
        """(rows, strips) of each image, and notes: the horizons that no episode reaches."""
        draw = np.random.default_rng([self.seed, 7])
        reached = [h for h in horizons if (self.log.lengths >= h).any()]
        notes = [f"frames {h} ahead: no episode is that long." for h in horizons[len(reached) :]]
        empty: list[Any] = [()] * len(self.places)
        if not reached:
            return empty, empty, notes
        start = self.log.starts(reached[-1], self.starts, draw)
        columns = self.log.codec.observation_codec
        names = [image_names(len(columns.image_leaves))[place] for place in self.places]
        tokenizers = [columns.tokenizers[place] for place in self.places]
        medians = [np.median(spread(self.log.dataset, n, MEDIAN, "train"), 0) for n in names]
        first = [self.log.frames(name, *start) for name in names]
        task, last = self.log.task(start[0]), reached[-1]
        shown = sorted({round(x) for x in np.linspace(1, last, min(COLUMNS, last))})
        rows: list[list[FrameRow]] = [[] for _ in names]
        pairs: list[list[tuple[Array, Array]]] = [[] for _ in names]
        every = np.arange(len(start[0]))
        settings: dict[str, int] = {"steps": last, "seed": self.seed, "samples": 1}
        warmup = self.world.net.memory // 2
        outputs = play(self.world, self.log, start, every, warmup=warmup, **settings)
        for t, out in enumerate(outputs, 1):
            progress(f"frames, step {t} of {last}")
            if t not in shown and t not in reached:
                continue
            decoded = self.log.codec.decode_observation(out.observation.to("cpu"), task)
            values = image_values(columns.space, decoded)
            for i, name in enumerate(names):
                true = self.log.frames(name, start[0], start[1] + t)
                imagined = as_bytes(values[self.places[i]])
                if t in shown:
                    pairs[i].append((true[:SHOWN], imagined[:SHOWN]))
                if t in reached:
                    again = tokenizers[i].decode(tokenizers[i].encode(true))
                    errors = (moving_psnr(true, x, medians[i]) for x in (imagined, first[i], again))
                    rows[i].append(FrameRow(t, len(every), *errors))
        strips = []
        for both in pairs:
            true, imagined = (np.stack(side) for side in zip(*both, strict=True))
            count = min(SHOWN, len(every))
            steps = tuple(shown)
            strips.append(
                tuple(FrameStrip(steps, true[:, k], imagined[:, k]) for k in range(count))
            )
        return [tuple(each) for each in rows], strips, notes


def moving_psnr(true: Array, other: Array, median: Array) -> float | None:
    """PSNR of the moving pixels of frames uint8 [B, H, W, C] against others."""
    wide = true.astype(np.int32)
    moving = (np.abs(wide - median) > MOVING).any(-1)
    error = (wide - other)[moving]
    return psnr(float((error**2).sum(dtype=np.float64)), error.size)
