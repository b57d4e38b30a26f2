from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mesocosm.data.format.dataset import Dataset
from mesocosm.data.format.permutation import key, permute
from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.loader import Loader
from mesocosm.data.loading.windows import windows
from mesocosm.errors import UsageError
from mesocosm.model.spec import Parts, Windows

MakeDataset = Callable[..., Dataset]
LENGTHS = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 24, 31, 40, 4, 4, 6]


def tags(codec: Codec, parts: Parts) -> np.ndarray[Any, Any]:
    """[..., 2]: the (episode, step) that a counted observation says."""
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
    """Over many keys, where 0 goes is uniform; and neighbours do not stay neighbours."""
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
            [tuple(tag) for tag, there in zip(row, mask, strict=True) if there]
            for row, mask in zip(rows, windows.mask.tolist(), strict=True)
        ]
    expected = every_transition(dataset, "train")
    assert loader.transitions_per_epoch == expected.total()
    for epoch in range(epochs):
        seen = per_window[epoch * loader.windows_per_epoch : (epoch + 1) * loader.windows_per_epoch]
        assert all(seen), "no window is empty"
        assert Counter(t for w in seen for t in w) == expected
    assert loader.transitions_seen(steps) == sum(len(w) for w in per_window)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Codec]:
    from gymnasium import spaces

    from mesocosm.data.format.dataset import Environment, write_dataset
    from mesocosm.data.format.episode import Episode

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
    box = spaces.Box(-(10**6), 10**6, (2,), np.int64)
    environment = Environment(id="Counted-v0")
    write_dataset(
        folder,
        episodes,
        id="mixed",
        environment=environment,
        observation_space=box,
        action_space=spaces.Discrete(3),
        seed=0,
        shard_rows=40,
    )
    dataset = Dataset([folder])
    assert len(dataset.manifests[0].shards) > 3
    return dataset, Codec.fit(dataset)


def test_windows_hold_what_the_episodes_hold(mixed: tuple[Dataset, Codec]) -> None:
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


def test_slices_in_turn_are_read_once(
    mixed: tuple[Dataset, Codec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that accumulates gradients asks for several slices of each batch, one after the other."""
    reads = []

    def counted(*told: Any) -> Windows:
        reads.append(told)
        return windows(*told)

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


def test_part_of_the_split_is_taken_evenly_of_all_of_it(mixed: tuple[Dataset, Codec]) -> None:
    dataset, codec = mixed
    loader = Loader(dataset, codec, "train", 3, 4, 0)

    def windows(most: int | None) -> list[list[tuple[int, int]]]:
        found = []
        for batch in loader.eval_batches(8, most=most):
            tagged = tags(codec, batch.observation)[:, :-1]
            found += [
                [tuple(tag) for tag in row[mask].tolist()]
                for row, mask in zip(tagged, batch.mask.numpy(), strict=True)
                if mask.any()
            ]
        return found

    whole = windows(None)
    for most in (1, 5, 13, len(whole) - 1):
        assert windows(most) == [whole[i * len(whole) // most] for i in range(most)]
    assert windows(len(whole) + 100) == whole


def test_events_oversample_terminals_and_weigh_them_back(mixed: tuple[Dataset, Codec]) -> None:
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
