"""Logged steps as a world's parts, and logged actions played in the world."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.text_batch import AnyBatchCodec
from mesocosm.data.loading.windows import coded
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.split import Split
from mesocosm.errors import UsageError
from mesocosm.model import rng
from mesocosm.model.carry import Carry, Context, StepOut
from mesocosm.model.tensors import Parts
from mesocosm.model.tokenizer.frames import as_bytes
from mesocosm.model.world import World

Array = NDArray[Any]
ROWS = 2048
"""Environments that step together at most."""


def codec_of(world: World) -> Codec:
    """The codec of a world's spaces."""
    return Codec.from_json(world.codec)


class Log:
    """Logged steps as a world's parts, for any (episode, step) of one split."""

    def __init__(self, dataset: Dataset, codec: Codec, split: Split):
        check_dataset(dataset, codec)
        self.dataset, self.codec, self.split = coded(dataset, codec), codec, split
        self.episodes: Array = dataset.episodes(split)
        self.lengths: Array = dataset.table["length"][self.episodes].astype(np.int64)
        self._options = codec.option_rows(
            dataset.options, dataset.option_numbers, dataset.option_values
        )

    def _gather(self, name: str, episode: Array, step: Array) -> Array:
        """`episode` [n] positions in the split, `step` [n, ...] -> rows [n, ..., columns]."""
        table = self.dataset.table[self.episodes[episode]]
        first = table["first_row"].reshape(-1, *(1,) * (step.ndim - 1))
        return self.dataset.gather(name, table["shard"], first + step)

    def _pair(self, part: str, episode: Array, step: Array) -> tuple[Array, Array]:
        names = (f"{part}_num", f"{part}_cat")
        numbers, categories = (self._gather(name, episode, step) for name in names)
        return numbers, categories

    def observation(self, episode: Array, step: Array) -> Parts:
        return self.codec.observation_parts(*self._pair("obs", episode, step))

    def frames(self, image: str, episode: Array, step: Array) -> Array:
        """The frames of one of `image_names`, uint8 [n, height, width, channels]."""
        return as_bytes(self._gather(image, episode, step))

    def action(self, episode: Array, step: Array) -> Parts:
        return self.codec.action_parts(*self._pair("act", episode, step))

    def task(self, episode: Array) -> Parts:
        zero = np.zeros(len(episode), np.int64)
        options = self._options[self.episodes[episode]]
        return self.codec.task_parts(*self._pair("obs", episode, zero), options)

    def outcome(self, episode: Array, step: Array) -> tuple[Array, Array]:
        """(raw reward [n], terminated [n]) of transitions."""
        terminated = self._gather("terminated", episode, step).astype(bool)
        return self._gather("reward", episode, step), terminated

    def starts(
        self, horizon: int, limit: int, generator: np.random.Generator
    ) -> tuple[Array, Array]:
        """At most `limit` distinct (episode, step) with at least `horizon` steps left, drawn
        uniformly from all such.
        """
        room = np.maximum(self.lengths - horizon + 1, 0)
        ends = np.cumsum(room)
        total = int(ends[-1]) if len(ends) else 0
        chosen = np.sort(generator.choice(total, size=min(limit, total), replace=False))
        episode = np.searchsorted(ends, chosen, "right")
        return episode, chosen - (ends - room)[episode]


def check_dataset(dataset: Dataset, codec: AnyBatchCodec) -> None:
    """Raise UsageError where a dataset is of other spaces than the world's."""
    for key in ("observation_space", "action_space"):
        logged, expected = getattr(dataset, key), getattr(codec, key)
        if logged != expected:
            raise UsageError(
                f"dataset {', '.join(dataset.ids)} has {key} {logged}, the world {expected};"
                " evaluate the world on data of its own environment"
            )


def begin_at(
    world: World, log: Log, episode: Array, step: Array, member: Tensor, warmup: int
) -> Carry:
    """A session at o_step of each logged episode [n], after up to `warmup` true steps."""
    columns = min(warmup, world.net.memory)
    observation = log.observation(episode, step).to(world.device)
    task = log.task(episode).to(world.device)
    if not columns:
        return world.begin(task, observation, member)
    before = step[:, None] - columns + np.arange(columns)
    seen = np.maximum(before, 0)
    context = Context(
        clock=columns,
        past_observation=log.observation(episode, seen),
        past_action=log.action(episode, seen),
        start_column=torch.from_numpy((before < 0).sum(1)),
        observation=observation,
        task=task,
        member=member,
    )
    return world.restore(context)


def play(
    world: World,
    log: Log,
    start: tuple[Array, Array],
    rows: Array,
    samples: int,
    *,
    steps: int,
    seed: int,
    warmup: int,
) -> Iterator[StepOut]:
    """Play logged actions in the world from logged states. After an episode's end its last action
    repeats.

    Args:
        world: Its members play the samples in turn.
        log: The logged steps.
        start: (episode, step) [n] each.
        rows: [k] positions in `start`, which seed the randomness too.
        samples: Rollouts of each row.
        steps: Outputs to yield, of k * samples environments: all samples of a row, then the next.
        seed: Of the randomness.
        warmup: True steps of history before a start, at most.
    """
    every = np.repeat(rows, samples)
    (episode, step), device = (values[every] for values in start), world.device
    row, draw = torch.from_numpy(every), torch.arange(samples).repeat(len(rows))
    row, draw = row.to(device), draw.to(device)
    carry = begin_at(world, log, episode, step, draw % world.config.members, warmup)
    for t in range(steps):
        action = log.action(episode, np.minimum(step + t, log.lengths[episode] - 1)).to(device)
        carry, out = world.step(carry, action, rng.keys(seed, row, draw, t))
        yield out


def single_steps(
    world: World, log: Log, start: tuple[Array, Array], seed: int
) -> Iterator[tuple[Array, StepOut]]:
    """One step from each logged state by each member, after half a context of history.

    Yields:
        Positions [k] in `start`, and the output of k * members environments.
    """
    members, warmup = world.config.members, world.net.memory // 2
    width = max(1, ROWS // members)
    for first in range(0, len(start[0]), width):
        rows = np.arange(first, min(first + width, len(start[0])))
        (out,) = play(world, log, start, rows, members, steps=1, seed=seed, warmup=warmup)
        yield rows, out
