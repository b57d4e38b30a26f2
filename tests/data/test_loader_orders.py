"""Orders of the loader: plain, under blocks of shards, and with weights of datasets."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.loader import Loader
from mesocosm.datasets.dataset import Dataset
from mesocosm.errors import UsageError

from .counted import (
    LENGTHS,
    Step,
    counted_episode,
    every_transition,
    same,
    steps_of,
    tags,
    transitions,
)

Write = Callable[..., Path]
Two = tuple[list[Path], Codec]
ORDERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "blocks": {"block": 2},
    "weights": {"weights": [3.0, 1.0]},
    "both": {"block": 2, "weights": [3.0, 1.0]},
}


@pytest.fixture
def two(write: Write) -> Two:
    """Two datasets of many shards; the second's episodes are those from 1000 on, and few of them
    terminate.
    """
    paths = []
    for number, shard_rows in enumerate((20, 30)):
        episodes = [
            counted_episode(
                1000 * number + k, n, "terminated" if not number or k % 5 == 0 else "truncated"
            )
            for k, n in enumerate(LENGTHS * 2)
        ]
        paths.append(write(episodes, id=f"d{number}", shard_rows=shard_rows))
    return paths, Codec.fit(Dataset(paths))


def test_the_plain_order_is_fixed(write: Write) -> None:
    """A world's id names its data and seed, not the loader's version: the first windows and events
    of steps 0, 7 and 300.
    """
    episodes = [counted_episode(k, n) for k, n in enumerate(LENGTHS)]
    dataset = Dataset([write(episodes, shard_rows=40)])
    codec = Codec.fit(dataset)
    loader = Loader(dataset, codec, "train", 5, 6, 9, events=6)
    windows = {
        0: [[9, 8], [10, 7], [8, 7], [11, 21], [5, 0], [10, 0]],
        7: [[15, 0], [12, 1], [9, 5], [8, 0], [6, 1], [9, 10]],
        300: [[11, 8], [11, 28], [11, 13], [12, 38], [10, 1], [12, 13]],
    }
    events = {
        0: [[1, 1], [8, 7], [9, 8], [15, 5], [12, 11], [12, 5]],
        7: [[2, 2], [4, 5], [5, 0], [5, 7], [15, 1], [9, 6]],
        300: [[12, 39], [11, 3], [4, 3], [6, 8], [11, 17], [12, 18]],
    }
    for step, expected in windows.items():
        batch = loader.batch(step)
        assert batch.events is not None
        assert tags(codec, batch.observation)[:, 0].tolist() == expected
        assert tags(codec, batch.events.observation).tolist() == events[step]


def test_opening_reads_no_episode(two: Two) -> None:
    paths, codec = two
    expected = Loader(Dataset(paths), codec, "train", 5, 6, 3).windows_per_epoch
    for path in paths:
        shutil.rmtree(path / "tables")
        shutil.rmtree(path / "shards")
    dataset = Dataset(paths)
    loader = Loader(dataset, codec, "train", 5, 6, 3, events=6, block=2, weights=[1, 2])
    assert loader.windows_per_epoch == expected
    assert dataset.transitions == 4 * sum(LENGTHS) and dataset.size("valid") > 0


@pytest.mark.integration
@pytest.mark.parametrize("order", ORDERS)
def test_a_resume_is_exact_also_with_other_ranks(two: Two, order: str) -> None:
    paths, codec = two

    def fresh() -> Loader:
        copy = Codec.from_json(codec.to_json())
        return Loader(Dataset(paths), copy, "train", 5, 12, 7, events=12, **ORDERS[order])

    first, resumed = fresh(), fresh()
    sequence = [first.batch(step) for step in range(40)]
    assert all(same(resumed.batch(step), sequence[step]) for step in range(23, 40))
    for world_size in (2, 3):
        ranks = [fresh() for _ in range(world_size)]
        for step in (0, 11, 23, 24, 39):
            parts = [loader.batch(step, rank, world_size) for rank, loader in enumerate(ranks)]
            assert same(sequence[step], *parts)
    assert not same(sequence[0], sequence[1])


@pytest.mark.parametrize("order", ["plain", "blocks"])
def test_an_epoch_has_every_transition_once(two: Two, order: str) -> None:
    paths, codec = two
    dataset = Dataset(paths)
    loader = Loader(dataset, codec, "train", 5, 1, 3, **ORDERS[order])
    each, expected = loader.windows_per_epoch, every_transition(dataset)
    windows = [transitions(codec, loader.batch(step)) for step in range(3 * each)]
    for epoch in range(3):
        seen = windows[epoch * each : (epoch + 1) * each]
        assert Counter(step for window in seen for step in window) == expected
    assert loader.transitions_seen(3 * each) == 3 * expected.total()
    assert loader.transitions_seen(each // 2) == sum(map(len, windows[: each // 2]))


@pytest.mark.integration
def test_only_a_block_and_the_next_one_are_held(two: Two) -> None:
    paths, codec = two
    dataset = Dataset(paths)
    assert len(dataset.shards) > 20
    loader = Loader(dataset, codec, "train", 5, 4, 3, events=6, block=2)
    shard_of = {int(record["index"]): int(record["shard"]) for record in dataset.table}
    dataset.turn(())
    pairs: set[tuple[int, ...]] = set()
    for step in range(3 * loader.windows_per_epoch // 4):
        batch = loader.batch(step)
        assert batch.events is not None
        touched = {shard_of[tag[0]] for tag in transitions(codec, batch)}
        events = {shard_of[int(tag[0])] for tag in tags(codec, batch.events.observation)}
        assert touched | events <= set(dataset._open), "the shards of the batch are held"
        assert len(dataset._open) <= 6 and len(events) <= 2, "at most the blocks of a batch"
        assert len(dataset._pinned) <= 8
        if len(touched) == 2:
            pairs.add(tuple(sorted(touched)))
    assert len(pairs) > len(dataset.shards), "the shards of a block differ in every epoch"
    list(Loader(dataset, codec, "valid", 5, 4, 3, block=2).eval_batches())
    assert not dataset._open and not dataset._pinned, "evaluation releases its shards"


@pytest.mark.integration
@pytest.mark.parametrize("order", ["weights", "both"])
def test_each_dataset_has_its_share_of_every_batch(two: Two, order: str) -> None:
    paths, codec = two
    dataset = Dataset(paths)
    loader = Loader(dataset, codec, "train", 5, 12, 3, **ORDERS[order])
    windows: list[list[list[Step]]] = [[], []]
    for step in range(60):
        batch = steps_of(codec, loader.batch(step))
        for window in batch:
            windows[window[0][0] >= 1000].append(window)
        first = sum(window[0][0] < 1000 for window in batch)
        assert 8 <= first <= 10, "3 of 4, to within one"
    assert [len(each) for each in windows] == pytest.approx([540, 180], abs=1)
    assert loader.transitions_seen(60) == sum(len(window) for each in windows for window in each)
    for number, path in enumerate(paths):
        size = Loader(Dataset([path]), codec, "train", 5, 12, 3).windows_per_epoch
        expected = every_transition(dataset, part=number)
        assert len(windows[number]) >= size
        for epoch in range(len(windows[number]) // size):
            seen = windows[number][epoch * size : (epoch + 1) * size]
            assert Counter(step for window in seen for step in window) == expected


@pytest.mark.parametrize("order", ORDERS)
def test_event_weights_restore_the_rates_of_every_order(two: Two, order: str) -> None:
    paths, codec = two
    dataset = Dataset(paths)
    loader = Loader(dataset, codec, "train", 5, 12, 3, events=300, **ORDERS[order])
    train = dataset.episodes("train")
    records, part = dataset.table[train], dataset.part[train]
    transitions = np.array([records["length"][part == i].sum() for i in range(2)])
    rates = [(records["outcome"][part == i] == 0).sum() for i in range(2)] / transitions
    share = transitions / transitions.sum()
    if "weights" in ORDERS[order]:
        share = np.array([0.75, 0.25])
    weights: list[float] = []
    flags: list[float] = []
    second: list[float] = []
    for step in range(2 * loader.windows_per_epoch // 12):
        events = loader.batch(step).events
        assert events is not None
        weights += events.weight.tolist()
        flags += events.terminated.tolist()
        second += (tags(codec, events.observation)[:, 0] >= 1000).tolist()
    assert np.mean(flags) > 0.25
    assert np.mean(weights) == pytest.approx(1, abs=0.03)
    assert np.average(flags, weights=weights) == pytest.approx(share @ rates, rel=0.1)
    assert np.average(second, weights=weights) == pytest.approx(share[1], abs=0.04)


def test_wrong_weights_are_refused(two: Two, write: Write) -> None:
    paths, codec = two
    with pytest.raises(UsageError, match="less than one sample in 10000"):
        Loader(Dataset(paths), codec, "train", 5, 12, 3, weights=[1e6, 1])
    episodes = [counted_episode(1, 9)]
    empty = write(episodes, id="empty", valid_fraction=0.0)
    with pytest.raises(UsageError, match="the valid split of empty is empty"):
        Loader(Dataset([paths[0], empty]), codec, "valid", 5, 12, 3, weights=[1, 1])
