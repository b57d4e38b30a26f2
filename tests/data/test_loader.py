"""The loader: every transition once an epoch, exact resumes, and events that oversample ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.loader import Loader
from mesocosm.data.loading.windows import windows
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.permutation import key, permute
from mesocosm.errors import UsageError
from mesocosm.model.tensors import Parts, Windows

from .counted import (
    LENGTHS,
    Step,
    counted_episode,
    every_transition,
    same,
    steps_of,
    tags,
    transitions,
    write_counted,
)

Mixed = tuple[Dataset, Codec]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    """Episodes of LENGTHS in several shards; every other one is terminated."""
    episodes = [
        counted_episode(k, n, "terminated" if k % 2 else "truncated") for k, n in enumerate(LENGTHS)
    ]
    folder = tmp_path_factory.mktemp("mixed")
    path = write_counted(folder, episodes, "mixed", shard_rows=40)
    dataset = Dataset([path])
    assert len(dataset.manifests[0].shards) > 3
    return dataset, Codec.fit(dataset)


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
    mixed: Mixed, window: int, seed: int, batch: int
) -> None:
    dataset, codec = mixed
    loader = Loader(dataset, codec, "train", window, batch, seed)
    each = loader.windows_per_epoch
    steps = -(-each * 2 // batch)
    every = [steps for step in range(steps) for steps in steps_of(codec, loader.batch(step))]
    expected = every_transition(dataset)
    assert loader.transitions_per_epoch == expected.total()
    for epoch in (every[:each], every[each : 2 * each]):
        assert all(epoch), "no window is empty"
        assert Counter(step for steps in epoch for step in steps) == expected
    assert loader.transitions_seen(steps) == sum(map(len, every))


def test_windows_equal_the_episodes(mixed: Mixed) -> None:
    dataset, codec = mixed
    loader = Loader(dataset, codec, "train", 6, 5, 1)
    hashes = dict(zip(dataset.table["hash"].tolist(), dataset.table["index"].tolist(), strict=True))
    by_index = {e.index: e for e in dataset.iter_episodes()}
    starts = 0
    for step in range(12):
        batch = loader.batch(step)
        seen = tags(codec, batch.observation)
        rewards = np.array(codec.spec.reward_values)[batch.reward.long()]
        parts = batch.action.numbers.reshape(30, 0), batch.action.categories.reshape(30, 1)
        actions = codec.decode_action(Parts(*parts)).reshape(5, 6)
        for row in range(5):
            episode = by_index[hashes[int(batch.episode[row])]]
            length, first = int(batch.mask[row].sum()), int(seen[row, 0, 1])
            last = first + length
            assert batch.mask[row, :length].all()
            assert bool(batch.start[row]) == (first == 0)
            starts += int(batch.start[row])
            expected = [[episode.index, first + min(t, length)] for t in range(7)]
            assert seen[row].tolist() == expected, "rows after the end repeat the last observation"
            assert rewards[row, :length] == pytest.approx(episode.rewards[first:last], abs=1e-3)
            assert actions[row, :length].tolist() == episode.actions[first:last]
            ends = episode.outcome == "terminated" and last == len(episode)
            terminated = [float(ends and t == length - 1) for t in range(6)]
            assert batch.terminated[row].tolist() == terminated
            assert (batch.reward[row, length:] == 0).all()
    assert starts > 5


def test_every_episode_starts_once_an_epoch(mixed: Mixed) -> None:
    dataset, codec = mixed
    loader = Loader(dataset, codec, "train", 4, 1, 5)
    epoch = map(loader.batch, range(loader.windows_per_epoch))
    starts = [int(batch.episode[0]) for batch in epoch if batch.start[0]]
    assert sorted(starts) == sorted(dataset.table["hash"][dataset.episodes("train")].tolist())


@pytest.mark.integration
@pytest.mark.parametrize("length", [64, 67, 71])
def test_the_phase_changes_from_epoch_to_epoch(
    length: int, counted_dataset: Callable[..., Dataset]
) -> None:
    """At least half of the possible shifts are used, also where W divides T."""
    dataset = counted_dataset([length])
    codec = Codec.fit(dataset)
    batch = Loader(dataset, codec, "train", 8, 400, 0).batch(0)
    starts = tags(codec, batch.observation)[:, 0, 1]
    assert len({int(start) % 8 for start in starts if start}) >= 4


@pytest.mark.integration
@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_share_the_same_global_batch(mixed: Mixed, world_size: int) -> None:
    loader = Loader(*mixed, "train", 5, 6, 3, events=12)
    for step in (0, 7, 1000):
        slices = [loader.batch(step, rank, world_size) for rank in range(world_size)]
        assert same(loader.batch(step), *slices)


def test_slices_of_a_batch_are_read_once(mixed: Mixed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that accumulates gradients reads several slices of each batch in turn."""
    reads = []

    def counted(*arguments: Any) -> Windows:
        reads.append(arguments)
        return windows(*arguments)

    monkeypatch.setattr("mesocosm.data.loading.loader.windows", counted)
    loader, whole = (Loader(*mixed, "train", 5, 6, 3, events=12) for _ in range(2))
    halves = [[loader.batch(step, rank, 2) for rank in (0, 1)] for step in range(20)]
    assert len(reads) == 2
    assert all(same(whole.batch(step), *two) for step, two in enumerate(halves))


def test_an_indivisible_batch_is_refused(mixed: Mixed) -> None:
    with pytest.raises(UsageError, match="6 does not divide by 4 workers"):
        Loader(*mixed, "train", 5, 6, 3).batch(0, 0, 4)
    with pytest.raises(UsageError, match="events of 10 does not divide by 3"):
        Loader(*mixed, "train", 5, 6, 3, events=10).batch(0, 0, 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"window": 0}, "window .*got 0"), ({"batch": 0}, "batch .*got 0"), ({"events": 2}, "got 2")],
)
def test_bad_sizes_are_refused(mixed: Mixed, arguments: dict[str, int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Loader(*mixed, "train", **({"window": 4, "batch": 4, "seed": 0} | arguments))


def test_a_resume_continues_the_same_sequence(mixed: Mixed) -> None:
    dataset, codec = mixed

    def loader(dataset: Dataset, codec: Codec, seed: int) -> Loader:
        return Loader(dataset, codec, "train", 5, 4, seed, events=6)

    first = loader(dataset, codec, 9)
    sequence = [first.batch(step) for step in range(20)]
    again = loader(Dataset(dataset.paths), Codec.from_json(codec.to_json()), 9)
    assert all(same(again.batch(step), sequence[step]) for step in range(13, 20))
    assert not same(sequence[0], sequence[1])
    assert not same(loader(dataset, codec, 10).batch(0), sequence[0])


def test_shards_change_nothing(write: Callable[..., Path]) -> None:
    def load(rows: int, name: str) -> Windows:
        episodes = [counted_episode(k, n) for k, n in enumerate(LENGTHS)]
        folder = write(episodes, id="same", shard_rows=rows)
        dataset = Dataset([folder.rename(folder.with_name(name))])
        return Loader(dataset, Codec.fit(dataset), "train", 5, 16, 0, events=9).batch(2)

    assert same(load(1 << 20, "one"), load(10, "many"))


@pytest.mark.parametrize("split", ["train", "valid"])
def test_evaluation_sees_the_split_once_in_order(mixed: Mixed, split: Any) -> None:
    dataset, codec = mixed
    loader = Loader(dataset, codec, split, 7, 4, 0)
    batches = list(loader.eval_batches(8))
    assert all(batch.mask.shape == (8, 7) for batch in batches)
    seen = Counter(step for batch in batches for step in transitions(codec, batch))
    assert seen == every_transition(dataset, split)
    assert sum(int(batch.start.sum()) for batch in batches) == len(dataset.episodes(split))
    halves = (loader.eval_batches(8, rank, 2) for rank in range(2))
    assert all(same(batch, *two) for batch, *two in zip(batches, *halves, strict=True))


def test_part_of_the_split_is_taken_evenly(mixed: Mixed) -> None:
    dataset, codec = mixed
    loader = Loader(dataset, codec, "train", 3, 4, 0)

    def taken(most: int | None) -> list[list[Step]]:
        batches = loader.eval_batches(8, most=most)
        return [steps for batch in batches for steps in steps_of(codec, batch) if steps]

    whole = taken(None)
    for most in (1, 5, 13, len(whole) - 1):
        assert taken(most) == [whole[i * len(whole) // most] for i in range(most)]
    assert taken(len(whole) + 100) == whole


def test_events_oversample_terminals_and_weights_restore_their_rate(mixed: Mixed) -> None:
    dataset, codec = mixed
    loader = Loader(dataset, codec, "train", 4, 2, 0, events=300)
    records = dataset.table[dataset.episodes("train")]
    ended = records[records["outcome"] == 0]
    terminals = set(zip(ended["index"].tolist(), (ended["length"] - 1).tolist(), strict=True))
    natural = len(terminals) / loader.transitions_per_epoch
    seen: Counter[Step] = Counter()
    weights: list[float] = []
    flags: list[float] = []
    for step in range(20):
        events = loader.batch(step).events
        assert events is not None
        at, after = tags(codec, events.observation), tags(codec, events.next_observation)
        assert np.array_equal(after, at + np.array([0, 1]))
        drawn = list(map(tuple, at.tolist()))
        assert [tag in terminals for tag in drawn] == events.terminated.bool().tolist()
        seen.update(drawn)
        weights += events.weight.tolist()
        flags += events.terminated.tolist()
    assert 1 / 3 <= float(np.mean(flags)) < 1 / 3 + 2 * natural
    assert np.mean(weights) == pytest.approx(1, abs=0.02)
    assert np.average(flags, weights=weights) == pytest.approx(natural, rel=0.05)
    counts = [seen[tag] for tag in terminals]
    assert max(counts) < 1.2 * min(counts), "terminals are visited round and round, evenly"
    assert set(seen) == set(every_transition(dataset))


def test_events_without_a_terminal_are_uniform(counted_dataset: Callable[..., Dataset]) -> None:
    dataset = counted_dataset([9, 12, 7], outcome="truncated")
    events = Loader(dataset, Codec.fit(dataset), "train", 4, 2, 0, events=6).batch(3).events
    assert events is not None
    assert (events.weight == 1).all() and (events.terminated == 0).all()
