"""The loader: the order of samples, also under blocks of shards and weights of datasets, and exact
resumes.
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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.loader import Loader
from mesocosm.data.loading.windows import windows
from mesocosm.datasets.dataset import Dataset, Environment, write_dataset
from mesocosm.datasets.episode import Episode
from mesocosm.datasets.permutation import key, permute
from mesocosm.errors import UsageError
from mesocosm.model.spec import Parts, Windows

MakeDataset = Callable[..., Dataset]
Write = Callable[..., Path]
Counted = Callable[..., Any]
BOX = spaces.Box(-(10**6), 10**6, (2,), np.int64)
LENGTHS = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 24, 31, 40, 4, 4, 6]
ORDERS = {
    "plain": {},
    "blocks": {"block": 2},
    "weights": {"weights": [3.0, 1.0]},
    "both": {"block": 2, "weights": [3.0, 1.0]},
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Codec]:
    folder: Path = tmp_path_factory.mktemp("mixed")
    episodes = [
        Episode(
            k,
            k,
            "random",
            [np.array([k, t]) for t in range(n + 1)],
            [np.int64(t % 3) for t in range(n)],
            np.arange(n) + 0.5,
            "terminated" if k % 2 else "truncated",
        )
        for k, n in enumerate(LENGTHS)
    ]
    write_dataset(
        folder,
        episodes,
        id="mixed",
        environment=Environment(id="Counted-v0"),
        observation_space=BOX,
        action_space=spaces.Discrete(3),
        seed=0,
        shard_rows=40,
    )
    dataset = Dataset([folder])
    assert len(dataset.manifests[0].shards) > 3
    return dataset, Codec.fit(dataset)


def tags(codec: Codec, parts: Parts) -> np.ndarray[Any, Any]:
    """[..., 2]: the (episode, step) of a counted observation."""
    flat = parts.numbers.reshape(-1, 2)
    return codec.decode_observation(
        Parts(flat, torch.zeros(len(flat), 0, dtype=torch.int64))
    ).reshape(*parts.numbers.shape)


def transitions(codec: Codec, windows: Windows) -> list[tuple[int, int]]:
    return [
        tuple(tag)
        for tag in tags(codec, windows.observation)[:, :-1][windows.mask.numpy()].tolist()
    ]


def every_transition(dataset: Dataset, split: Any) -> Counter[tuple[int, int]]:
    return Counter(
        (int(dataset.table["index"][e]), t)
        for e in dataset.episodes(split)
        for t in range(int(dataset.table["length"][e]))
    )


def flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return (
        [] if value is None else [tensor for item in vars(value).values() for tensor in flat(item)]
    )


def same(a: Windows, b: Windows) -> bool:
    x, y = flat(a), flat(b)
    return len(x) == len(y) and all(torch.equal(i, j) for i, j in zip(x, y, strict=True))


@given(n=st.integers(1, 700), seed=st.integers(0, 2**63))
@settings(deadline=None)
def test_the_permutation_is_a_bijection(n: int, seed: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, key(seed))), np.arange(n))


def test_the_permutation_mixes() -> None:
    """Over many keys, the image of 0 is uniform; and neighbours do not stay neighbours."""
    n = 20
    first = permute(np.zeros(20_000, np.int64), n, key(np.arange(20_000)))
    counts = np.bincount(first, minlength=n)
    assert ((counts - 1000) ** 2 / 1000).sum() < 50  # chi-square of 19 degrees: 1e-4
    order = permute(np.arange(10_000), 10_000, key(1))
    assert (np.abs(np.diff(order)) == 1).mean() < 0.01
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(window=st.integers(1, 12), seed=st.integers(0, 10**6), batch=st.integers(5, 40))
def test_every_transition_exactly_once_an_epoch(
    mixed: tuple[Dataset, Codec], window: int, seed: int, batch: int
) -> None:
    dataset, codec = mixed
    loader = Loader(dataset, codec, "train", window, batch, seed)
    epochs = 2
    steps = -(-loader.windows_per_epoch * epochs // batch)
    per_window: list[list[tuple[int, ...]]] = []
    for step in range(steps):
        windows = loader.batch(step)
        rows = tags(codec, windows.observation)[:, :-1].tolist()
        per_window += [
            [tuple(tag) for tag, inside in zip(row, mask, strict=True) if inside]
            for row, mask in zip(rows, windows.mask.tolist(), strict=True)
        ]
    expected = every_transition(dataset, "train")
    assert loader.transitions_per_epoch == expected.total()
    for epoch in range(epochs):
        seen = per_window[epoch * loader.windows_per_epoch : (epoch + 1) * loader.windows_per_epoch]
        assert all(seen), "no window is empty"
        assert Counter(t for w in seen for t in w) == expected
    assert loader.transitions_seen(steps) == sum(len(w) for w in per_window)


def test_windows_equal_the_episodes(mixed: tuple[Dataset, Codec]) -> None:
    dataset, codec = mixed
    loader = Loader(dataset, codec, "train", 6, 5, 1)
    hashes = dict(zip(dataset.table["hash"].tolist(), dataset.table["index"].tolist(), strict=True))
    by_index = {e.index: e for e in dataset.iter_episodes()}
    starts = 0
    for step in range(12):
        windows = loader.batch(step)
        seen = tags(codec, windows.observation)
        reward, action = (
            np.array(codec.spec.reward_values)[windows.reward.long()],
            codec.decode_action(
                Parts(
                    windows.action.numbers.reshape(30, 0), windows.action.categories.reshape(30, 1)
                )
            ),
        )
        for row in range(5):
            episode = by_index[hashes[int(windows.episode[row])]]
            length = int(windows.mask[row].sum())
            first = int(seen[row, 0, 1])
            assert windows.mask[row, :length].all()
            assert bool(windows.start[row]) == (first == 0)
            starts += int(windows.start[row])
            expected = [[episode.index, first + min(t, length)] for t in range(7)]
            assert seen[row].tolist() == expected, "rows after the end repeat the last observation"
            assert reward[row, :length].tolist() == pytest.approx(
                episode.rewards[first : first + length].tolist(), abs=1e-3
            )
            assert (
                action.reshape(5, 6)[row, :length].tolist()
                == episode.actions[first : first + length]
            )
            ends = episode.outcome == "terminated" and first + length == len(episode)
            assert windows.terminated[row].tolist() == [
                float(ends and t == length - 1) for t in range(6)
            ]
            assert (windows.reward[row, length:] == 0).all()
    assert starts > 5


def test_every_episode_starts_once_an_epoch(mixed: tuple[Dataset, Codec]) -> None:
    dataset, codec = mixed
    loader = Loader(dataset, codec, "train", 4, 1, 5)
    starts = [
        int(w.episode[0]) for w in map(loader.batch, range(loader.windows_per_epoch)) if w.start[0]
    ]
    assert sorted(starts) == sorted(dataset.table["hash"][dataset.episodes("train")].tolist())


def test_the_phase_changes_from_epoch_to_epoch(counted_dataset: MakeDataset) -> None:
    """At least half of the possible shifts are used, also where W divides T."""
    for length in (64, 67, 71):
        dataset = counted_dataset([length], id=f"d{length}")
        codec = Codec.fit(dataset)
        loader = Loader(dataset, codec, "train", 8, 400, 0)
        places = tags(codec, loader.batch(0).observation)[:, 0, 1]
        phases = {int(place) % 8 for place in places if place}
        assert len(phases) >= 4


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_share_the_same_global_batch(mixed: tuple[Dataset, Codec], world_size: int) -> None:
    loader = Loader(*mixed, "train", 5, 6, 3, events=12)
    for step in (0, 7, 1000):
        whole = loader.batch(step)
        assert whole.events is not None
        slices = [loader.batch(step, rank, world_size) for rank in range(world_size)]
        for name in ("reward", "mask", "start", "episode", "terminated"):
            assert torch.equal(torch.cat([getattr(s, name) for s in slices]), getattr(whole, name))
        assert torch.equal(
            torch.cat([s.observation.numbers for s in slices]), whole.observation.numbers
        )
        assert torch.equal(
            torch.cat([s.events.observation.numbers for s in slices if s.events]),
            whole.events.observation.numbers,
        )
        assert torch.equal(
            torch.cat([s.events.weight for s in slices if s.events]), whole.events.weight
        )


def test_slices_of_a_batch_are_read_once(
    mixed: tuple[Dataset, Codec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that accumulates gradients reads several slices of each batch in turn."""
    reads = []

    def counted(*arguments: Any) -> Windows:
        reads.append(arguments)
        return windows(*arguments)

    monkeypatch.setattr("mesocosm.data.loading.loader.windows", counted)
    loader, whole = (
        Loader(*mixed, "train", 5, 6, 3, events=12),
        Loader(*mixed, "train", 5, 6, 3, events=12),
    )
    halves = [[loader.batch(step, share, 2) for share in (0, 1)] for step in range(20)]
    assert len(reads) == 2
    for step, two in enumerate(halves):
        batch = whole.batch(step)
        assert all(
            torch.equal(torch.cat(some), all)
            for *some, all in zip(*map(flat, two), flat(batch), strict=True)
        )


def test_an_indivisible_batch_is_refused(mixed: tuple[Dataset, Codec]) -> None:
    with pytest.raises(UsageError, match="6 does not divide by 4 workers"):
        Loader(*mixed, "train", 5, 6, 3).batch(0, 0, 4)
    with pytest.raises(UsageError, match="events of 10 does not divide by 3"):
        Loader(*mixed, "train", 5, 6, 3, events=10).batch(0, 0, 3)


def test_a_resume_continues_the_same_sequence(mixed: tuple[Dataset, Codec]) -> None:
    dataset, codec = mixed
    first = Loader(dataset, codec, "train", 5, 4, 9, events=6)
    sequence = [first.batch(step) for step in range(20)]
    again = Loader(
        Dataset(dataset.paths), Codec.from_json(codec.to_json()), "train", 5, 4, 9, events=6
    )
    assert all(same(again.batch(step), sequence[step]) for step in range(13, 20))
    assert not same(sequence[0], sequence[1])
    assert not same(Loader(dataset, codec, "train", 5, 4, 10, events=6).batch(0), sequence[0])


def test_shards_change_nothing(write: Callable[..., Path], counted: Callable[..., Any]) -> None:
    def load(rows: int, base: str) -> Windows:
        folder = write([counted(k, n) for k, n in enumerate(LENGTHS)], id="same", shard_rows=rows)
        dataset = Dataset([folder.rename(folder.with_name(base))])
        return Loader(dataset, Codec.fit(dataset), "train", 5, 16, 0, events=9).batch(2)

    assert same(load(1 << 20, "one"), load(10, "many"))


def test_evaluation_sees_the_split_once_in_order(mixed: tuple[Dataset, Codec]) -> None:
    dataset, codec = mixed
    for split in ("train", "valid"):
        loader = Loader(dataset, codec, split, 7, 4, 0)
        batches = list(loader.eval_batches(8))
        assert all(b.mask.shape == (8, 7) for b in batches)
        assert Counter(t for b in batches for t in transitions(codec, b)) == every_transition(
            dataset, split
        )
        assert sum(int(b.start.sum()) for b in batches) == len(dataset.episodes(split))
        halves = [list(loader.eval_batches(8, rank, 2)) for rank in range(2)]
        assert len(halves[0]) == len(halves[1]) == len(batches)
        assert all(
            torch.equal(torch.cat([a.mask, b.mask]), w.mask)
            for a, b, w in zip(*halves, batches, strict=True)
        )


def test_part_of_the_split_is_taken_evenly(mixed: tuple[Dataset, Codec]) -> None:
    dataset, codec = mixed
    loader = Loader(dataset, codec, "train", 3, 4, 0)

    def windows(most: int | None) -> list[list[tuple[int, int]]]:
        kept = []
        for batch in loader.eval_batches(8, most=most):
            tagged = tags(codec, batch.observation)[:, :-1]
            kept += [
                [tuple(tag) for tag in row[mask].tolist()]
                for row, mask in zip(tagged, batch.mask.numpy(), strict=True)
                if mask.any()
            ]
        return kept

    whole = windows(None)
    for most in (1, 5, 13, len(whole) - 1):
        assert windows(most) == [whole[i * len(whole) // most] for i in range(most)]
    assert windows(len(whole) + 100) == whole


def test_events_oversample_terminals_and_weights_restore_their_rate(
    mixed: tuple[Dataset, Codec],
) -> None:
    dataset, codec = mixed
    loader = Loader(dataset, codec, "train", 4, 2, 0, events=300)
    terminals = {
        (int(r["index"]), int(r["length"]) - 1)
        for r in dataset.table[dataset.episodes("train")]
        if r["outcome"] == 0
    }
    natural = len(terminals) / loader.transitions_per_epoch
    seen: Counter[tuple[int, int]] = Counter()
    weights: list[float] = []
    flags: list[float] = []
    for step in range(20):
        events = loader.batch(step).events
        assert events is not None
        at, after = tags(codec, events.observation), tags(codec, events.next_observation)
        assert np.array_equal(after, at + np.array([0, 1]))
        assert [
            (tuple(tag) in terminals) for tag in at.tolist()
        ] == events.terminated.bool().tolist()
        seen.update(map(tuple, at.tolist()))
        weights += events.weight.tolist()
        flags += events.terminated.tolist()
    share = float(np.mean(flags))
    assert 1 / 3 <= share < 1 / 3 + 2 * natural
    assert np.mean(weights) == pytest.approx(1, abs=0.02)
    assert np.average(flags, weights=weights) == pytest.approx(natural, rel=0.05)
    counts = [seen[t] for t in terminals]
    assert max(counts) < 1.2 * min(counts), "terminals are visited round and round, evenly"
    assert set(seen) == set(every_transition(dataset, "train"))


def test_events_without_a_terminal_are_uniform(counted_dataset: MakeDataset) -> None:
    dataset = counted_dataset([9, 12, 7], outcome="truncated")
    events = Loader(dataset, Codec.fit(dataset), "train", 4, 2, 0, events=6).batch(3).events
    assert events is not None
    assert (events.weight == 1).all() and (events.terminated == 0).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"window": 0}, "window .*got 0"), ({"batch": 0}, "batch .*got 0"), ({"events": 2}, "got 2")],
)
def test_bad_sizes_are_refused(
    mixed: tuple[Dataset, Codec], arguments: dict[str, int], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        Loader(*mixed, "train", **({"window": 4, "batch": 4, "seed": 0} | arguments))


# -- blocks and weights


@pytest.fixture
def two(write: Write, counted: Counted) -> tuple[list[Path], Codec]:
    """Two datasets of many shards; the second's episodes are those from 1000 on, and few of them
    terminate.
    """
    paths = []
    for number, shard_rows in enumerate((20, 30)):
        outcome = (
            (lambda k: "terminated")
            if number == 0
            else (lambda k: "terminated" if k % 5 == 0 else "truncated")
        )
        episodes = [counted(1000 * number + k, n, outcome(k)) for k, n in enumerate(LENGTHS * 2)]
        paths.append(write(episodes, id=f"d{number}", observation_space=BOX, shard_rows=shard_rows))
    return paths, Codec.fit(Dataset(paths))


def joined(parts: list[Windows]) -> list[torch.Tensor]:
    return [torch.cat(pieces) for pieces in zip(*map(flat, parts), strict=True)]


def test_the_plain_order_is_fixed(write: Write, counted: Counted) -> None:
    """A world's id names its data and seed, not the loader's version: the first windows and events
    of steps 0, 7 and 300.
    """
    dataset = Dataset(
        [
            write(
                [counted(k, n) for k, n in enumerate(LENGTHS)], observation_space=BOX, shard_rows=40
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
def test_a_resume_is_exact_also_with_other_ranks(two: tuple[list[Path], Codec], order: str) -> None:
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
                torch.equal(a, b) for a, b in zip(joined(parts), flat(sequence[step]), strict=True)
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
            transitions(codec, loader.batch(step))
            for step in range(e * loader.windows_per_epoch, (e + 1) * loader.windows_per_epoch)
        ]
        for e in range(3)
    ]
    assert all(Counter(tag for window in epoch for tag in window) == expected for epoch in epochs)
    assert loader.transitions_seen(3 * loader.windows_per_epoch) == 3 * expected.total()
    half = loader.windows_per_epoch // 2
    assert loader.transitions_seen(half) == sum(map(len, epochs[0][:half]))


def test_only_a_block_and_the_next_one_are_held(two: tuple[list[Path], Codec]) -> None:
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
        touched = {shard_of[tag[0]] for tag in transitions(codec, batch)}
        events = {shard_of[int(tag[0])] for tag in tags(codec, batch.events.observation)}
        assert touched | events <= set(dataset._open), "the shards of the batch are held"
        assert len(dataset._open) <= 6 and len(events) <= 2, "at most the blocks of a batch"
        assert len(dataset._pinned) <= 8
        visits += (
            [sorted(touched)]
            if len(touched) == 2 and (not visits or visits[-1] != sorted(touched))
            else []
        )
    pairs = {tuple(pair) for pair in visits}
    assert len(pairs) > len(dataset.shards), "the shards of a block differ in every epoch"
    list(Loader(dataset, codec, "valid", 5, 4, 3, block=2).eval_batches())
    assert not dataset._open and not dataset._pinned, "evaluation releases its shards"


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
        batch_windows = [
            [tuple(tag) for tag in row[mask].tolist()]
            for row, mask in zip(rows, batch.mask.numpy(), strict=True)
        ]
        for window in batch_windows:
            windows[window[0][0] >= 1000].append(window)
        assert 8 <= sum(window[0][0] < 1000 for window in batch_windows) <= 10, (
            "3 of 4, to within one"
        )
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
def test_event_weights_restore_the_rates_of_every_order(
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
    empty = write([counted(1, 9)], id="empty", valid_fraction=0.0, observation_space=BOX)
    with pytest.raises(UsageError, match="the valid split of empty is empty"):
        Loader(Dataset([paths[0], empty]), codec, "valid", 5, 12, 3, weights=[1, 1])
