"""The order of samples under blocks of shards and weights of datasets, and that it goes on exactly
wherever it is taken up.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from mesocosm.data.format.dataset import Dataset
from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.loader import Loader
from mesocosm.errors import UsageError
from mesocosm.model.spec import Parts, Windows

Write = Callable[..., Path]
Counted = Callable[..., Any]
LENGTHS = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 24, 31, 40, 4, 4, 6]
ORDERS = {
    "plain": {},
    "blocks": {"block": 2},
    "weights": {"weights": [3.0, 1.0]},
    "both": {"block": 2, "weights": [3.0, 1.0]},
}


@pytest.fixture
def two(write: Write, counted: Counted) -> tuple[list[Path], Codec]:
    """Two datasets of many shards; the second's episodes are those from 1000 on, and few of them
    terminate.
    """
    box = spaces.Box(-(10**6), 10**6, (2,), np.int64)
    paths = []
    for number, shard_rows in enumerate((20, 30)):
        outcome = (
            (lambda k: "terminated")
            if number == 0
            else (lambda k: "terminated" if k % 5 == 0 else "truncated")
        )
        episodes = [counted(1000 * number + k, n, outcome(k)) for k, n in enumerate(LENGTHS * 2)]
        paths.append(write(episodes, id=f"d{number}", observation_space=box, shard_rows=shard_rows))
    return paths, Codec.fit(Dataset(paths))


def tags(codec: Codec, parts: Parts) -> Any:
    """[..., 2]: the (episode, step) that a counted observation says."""
    flat = parts.numbers.reshape(-1, 2)
    return codec.decode_observation(
        Parts(flat, torch.zeros(len(flat), 0, dtype=torch.int64))
    ).reshape(*parts.numbers.shape)


def seen(codec: Codec, windows: Windows) -> list[tuple[int, int]]:
    return [
        tuple(tag)
        for tag in tags(codec, windows.observation)[:, :-1][windows.mask.numpy()].tolist()
    ]


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return (
        []
        if value is None
        else [tensor for item in vars(value).values() for tensor in tensors(item)]
    )


def same(a: Windows, b: Windows) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def joined(parts: list[Windows]) -> list[torch.Tensor]:
    return [torch.cat(pieces) for pieces in zip(*map(tensors, parts), strict=True)]


def test_the_plain_order_is_that_of_the_first_version(write: Write, counted: Counted) -> None:
    """Worlds name their data and seed, not the version that read them: first windows and events of
    steps 0, 7 and 300, as 0.1 had them.
    """
    box = spaces.Box(-(10**6), 10**6, (2,), np.int64)
    dataset = Dataset(
        [
            write(
                [counted(k, n) for k, n in enumerate(LENGTHS)], observation_space=box, shard_rows=40
            )
        ]
    )
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


def test_opening_reads_no_episode(two: tuple[list[Path], Codec]) -> None:
    paths, codec = two
    expected = Loader(Dataset(paths), codec, "train", 5, 6, 3).windows_per_epoch
    for path in paths:
        shutil.rmtree(path / "tables")
        shutil.rmtree(path / "shards")
    dataset = Dataset(paths)
    loader = Loader(dataset, codec, "train", 5, 6, 3, events=6, block=2, weights=[1, 2])
    assert (
        loader.windows_per_epoch == expected
        and dataset.transitions == 4 * sum(LENGTHS)
        and dataset.size("valid") > 0
    )


@pytest.mark.parametrize("order", ORDERS)
def test_a_resume_goes_on_exactly_also_with_other_ranks(
    two: tuple[list[Path], Codec], order: str
) -> None:
    paths, codec = two

    def fresh() -> Loader:
        return Loader(
            Dataset(paths),
            Codec.from_json(codec.to_json()),
            "train",
            5,
            12,
            7,
            events=12,
            **ORDERS[order],
        )

    first = fresh()
    sequence = [first.batch(step) for step in range(40)]
    resumed = fresh()
    assert all(same(resumed.batch(step), sequence[step]) for step in range(23, 40))
    for world_size in (2, 3):
        ranks = [fresh() for _ in range(world_size)]
        for step in (0, 11, 23, 24, 39):
            parts = [loader.batch(step, rank, world_size) for rank, loader in enumerate(ranks)]
            assert all(
                torch.equal(a, b)
                for a, b in zip(joined(parts), tensors(sequence[step]), strict=True)
            )
    assert not same(sequence[0], sequence[1])


@pytest.mark.parametrize("order", ["plain", "blocks"])
def test_an_epoch_has_every_transition_once(two: tuple[list[Path], Codec], order: str) -> None:
    paths, codec = two
    dataset = Dataset(paths)
    loader = Loader(dataset, codec, "train", 5, 1, 3, **ORDERS[order])
    records = dataset.table[dataset.episodes("train")]
    expected = Counter((int(r["index"]), t) for r in records for t in range(r["length"]))
    epochs = [
        [
            seen(codec, loader.batch(step))
            for step in range(e * loader.windows_per_epoch, (e + 1) * loader.windows_per_epoch)
        ]
        for e in range(3)
    ]
    assert all(Counter(tag for window in epoch for tag in window) == expected for epoch in epochs)
    assert loader.transitions_seen(3 * loader.windows_per_epoch) == 3 * expected.total()
    half = loader.windows_per_epoch // 2
    assert loader.transitions_seen(half) == sum(map(len, epochs[0][:half]))


def test_only_a_block_and_the_next_are_held(two: tuple[list[Path], Codec]) -> None:
    paths, codec = two
    dataset = Dataset(paths)
    assert len(dataset.shards) > 20
    loader = Loader(dataset, codec, "train", 5, 4, 3, events=6, block=2)
    shard_of = {int(r["index"]): int(r["shard"]) for r in dataset.table}
    dataset.turn(())
    visits: list[list[int]] = []
    for step in range(3 * loader.windows_per_epoch // 4):
        batch = loader.batch(step)
        assert batch.events is not None
        touched = {shard_of[tag[0]] for tag in seen(codec, batch)}
        events = {shard_of[int(tag[0])] for tag in tags(codec, batch.events.observation)}
        assert touched | events <= set(dataset._open), "what was read is held"
        assert len(dataset._open) <= 6 and len(events) <= 2, (
            "at most the blocks that a batch lies in"
        )
        assert len(dataset._pinned) <= 8
        visits += (
            [sorted(touched)]
            if len(touched) == 2 and (not visits or visits[-1] != sorted(touched))
            else []
        )
    pairs = {tuple(pair) for pair in visits}
    assert len(pairs) > len(dataset.shards), "the shards of a block are others in every epoch"
    list(Loader(dataset, codec, "valid", 5, 4, 3, block=2).eval_batches())
    assert not dataset._open and not dataset._pinned, "evaluation lets go of what it read"


@pytest.mark.parametrize("order", ["weights", "both"])
def test_each_dataset_has_its_share_of_every_batch(
    two: tuple[list[Path], Codec], order: str
) -> None:
    paths, codec = two
    dataset = Dataset(paths)
    loader = Loader(dataset, codec, "train", 5, 12, 3, **ORDERS[order])
    alone = [Loader(Dataset([path]), codec, "train", 5, 12, 3).windows_per_epoch for path in paths]
    windows: list[list[list[tuple[int, int]]]] = [[], []]
    for step in range(60):
        batch = loader.batch(step)
        rows = tags(codec, batch.observation)[:, :-1]
        there = [
            [tuple(tag) for tag in row[mask].tolist()]
            for row, mask in zip(rows, batch.mask.numpy(), strict=True)
        ]
        for window in there:
            windows[window[0][0] >= 1000].append(window)
        assert 8 <= sum(window[0][0] < 1000 for window in there) <= 10, "3 of 4, to within one"
    assert [len(each) for each in windows] == pytest.approx([540, 180], abs=1)
    assert loader.transitions_seen(60) == sum(len(window) for each in windows for window in each)
    for number, each in enumerate(windows):
        records = [
            r
            for e in dataset.episodes("train")
            if dataset.part[e] == number
            for r in [dataset.table[e]]
        ]
        expected = Counter((int(r["index"]), t) for r in records for t in range(r["length"]))
        whole = len(each) // alone[number]
        assert whole >= 1
        for epoch in range(whole):
            assert (
                Counter(
                    tag
                    for window in each[epoch * alone[number] : (epoch + 1) * alone[number]]
                    for tag in window
                )
                == expected
            )


@pytest.mark.parametrize("order", ORDERS)
def test_events_weigh_back_to_what_the_order_draws(
    two: tuple[list[Path], Codec], order: str
) -> None:
    paths, codec = two
    dataset = Dataset(paths)
    loader = Loader(dataset, codec, "train", 5, 12, 3, events=300, **ORDERS[order])
    records, parts = (
        dataset.table[dataset.episodes("train")],
        dataset.part[dataset.episodes("train")],
    )
    rates = [
        (records["outcome"][parts == i] == 0).sum() / records["length"][parts == i].sum()
        for i in range(2)
    ]
    share = (
        [0.75, 0.25]
        if "weights" in ORDERS[order]
        else [records["length"][parts == i].sum() / records["length"].sum() for i in range(2)]
    )
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
    assert np.average(flags, weights=weights) == pytest.approx(np.dot(share, rates), rel=0.1)
    assert np.average(second, weights=weights) == pytest.approx(share[1], abs=0.04)


def test_wrong_weights_are_refused(
    two: tuple[list[Path], Codec], write: Write, counted: Counted
) -> None:
    paths, codec = two
    with pytest.raises(UsageError, match="less than one sample in 10000"):
        Loader(Dataset(paths), codec, "train", 5, 12, 3, weights=[1e6, 1])
    box = spaces.Box(-(10**6), 10**6, (2,), np.int64)
    empty = write([counted(1, 9)], id="empty", valid_fraction=0.0, observation_space=box)
    with pytest.raises(UsageError, match="the valid split of empty is empty"):
        Loader(Dataset([paths[0], empty]), codec, "valid", 5, 12, 3, weights=[1, 1])
