from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from gymnasium import spaces

from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.loader import Loader
from mesocosm.data.loading.windows import observation_parts, start_parts
from mesocosm.datasets.dataset import Dataset, Environment, Manifest, write_dataset
from mesocosm.datasets.episode import Episode
from mesocosm.errors import ArtifactError, MesocosmError, UsageError
from mesocosm.store.artifacts import Storage

Write = Callable[..., Path]
Counted = Callable[..., Episode]
OBSERVATION = spaces.Dict(
    pos=spaces.Box(-np.inf, np.inf, (2, 2), np.float32),
    mode=spaces.Discrete(3, start=-1),
    word=spaces.Text(4, min_length=0, charset="abc"),
    pair=spaces.Tuple([spaces.MultiBinary(2), spaces.Box(-5, 5, (), np.int16)]),
)
ACTION = spaces.Dict(push=spaces.Box(-1, 1, (1,), np.float64), press=spaces.MultiDiscrete([2, 3]))


def rich_episodes(count: int = 5, seed: int = 0) -> list[Episode]:
    """Random episodes of nested spaces, of every outcome, with durations, tasks and successes."""
    rng = np.random.default_rng(seed)
    observation, action = OBSERVATION, ACTION
    observation.seed(seed)
    action.seed(seed)
    outcomes = ["terminated", "truncated", "unfinished"]
    episodes = []
    for k in range(count):
        length = int(rng.integers(1, 9))
        observations = [observation.sample() for _ in range(length + 1)]
        actions = [action.sample() for _ in range(length)]
        rest: dict[str, Any] = {
            "durations": rng.random(length),
            "task": {"mass": 1.5 * k, "map": ["big", "small"][k % 2]},
            "success": [True, False, None][k % 3],
        }
        rewards, outcome = rng.normal(size=length), outcomes[k % 3]
        steps = observations, actions, rewards
        episodes.append(Episode(k, 10 + k, ["random", "noisy"][k % 2], *steps, outcome, **rest))
    return episodes


def rich(write: Write, episodes: list[Episode], **facts: Any) -> Path:
    return write(
        episodes, observation_space=OBSERVATION, action_space=ACTION, task=["mass", "map"], **facts
    )


def assert_equal(a: Any, b: Any) -> None:
    if isinstance(a, dict | tuple | list):
        assert len(a) == len(b)
        for key in a if isinstance(a, dict) else range(len(a)):
            assert_equal(a[key], b[key])
    else:
        np.testing.assert_array_equal(a, b)
        assert np.asarray(a).dtype == np.asarray(b).dtype


@pytest.mark.parametrize("shard_rows", [1 << 20, 6])
def test_episodes_round_trip(write: Write, shard_rows: int) -> None:
    episodes = rich_episodes(7)
    dataset = Dataset([rich(write, episodes, shard_rows=shard_rows)])
    assert (len(dataset.manifests[0].shards) > 1) == (shard_rows == 6)
    assert dataset.observation_space == OBSERVATION and dataset.action_space == ACTION
    for number, written in enumerate(episodes):
        read = dataset.episode(number)
        for field in ("index", "seed", "behaviour", "outcome", "task", "success"):
            assert getattr(read, field) == getattr(written, field)
        for field in ("observations", "actions", "rewards", "durations"):
            assert_equal(getattr(read, field), getattr(written, field))
        assert all(OBSERVATION.contains(o) for o in read.observations)
        assert all(ACTION.contains(a) for a in read.actions)
    assert [e.index for e in dataset.iter_episodes("valid")] == dataset.table["index"][
        dataset.episodes("valid")
    ].tolist()
    chunks = list(dataset.chunks())
    assert (
        sum(int((~chunk.last).sum()) for chunk in chunks)
        == dataset.transitions
        == sum(map(len, episodes))
    )


def test_the_parquet_has_the_documented_schema(write: Write) -> None:
    episodes = rich_episodes(4)
    table = pq.read_table(rich(write, episodes) / "episodes" / "00000.parquet")
    rows = table.to_pylist()
    assert len(rows) == sum(len(e) + 1 for e in episodes)
    assert (
        str(table.schema.field("observation").type.field("pos").type)
        == "list<element: list<element: float>>"
    )
    at = 0
    for episode in episodes:
        for step in range(len(episode) + 1):
            row, raw, final = rows[at], episode.observations[step], step == len(episode)
            at += 1
            assert (row["episode"], row["step"]) == (episode.index, step)
            for name in ("behaviour", "seed", "success", "task"):
                assert row[name] == getattr(episode, name)
            expected = {
                "pos": raw["pos"].tolist(),
                "mode": raw["mode"],
                "word": raw["word"],
                "pair": {"0": raw["pair"][0].tolist(), "1": raw["pair"][1]},
            }
            assert row["observation"] == expected
            of_steps = ["action", "reward", "duration", "terminated", "truncated"]
            if final:
                assert all(row[name] is None for name in of_steps)
                continue
            action = {name: part.tolist() for name, part in episode.actions[step].items()}
            assert row["action"] == action and row["reward"] == episode.rewards[step]
            assert episode.durations is not None and row["duration"] == episode.durations[step]
            for name in ("terminated", "truncated"):
                assert row[name] == (step == len(episode) - 1 and episode.outcome == name)


def test_the_manifest_counts(write: Write, counted: Counted) -> None:
    episodes = [
        counted(0, 3),
        counted(1, 4, "truncated"),
        counted(2, 0),
        counted(3, 5, "unfinished", behaviour="noisy"),
    ]
    manifest = Manifest.read(write(episodes, dropped=2))
    assert manifest.counts.outcomes == {"terminated": 1, "truncated": 1, "unfinished": 1}
    assert (manifest.counts.dropped, manifest.counts.empty, manifest.transitions) == (2, 1, 12)
    assert {b.name: (b.episodes, b.transitions) for b in manifest.behaviours} == {
        "random": (2, 7),
        "noisy": (1, 5),
    }
    assert not manifest.durations


def test_the_same_episodes_give_the_same_bytes(write: Write) -> None:
    folders = [rich(write, rich_episodes()), write_elsewhere(write)]
    names = [
        sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        for folder in folders
    ]
    assert names[0] == names[1]
    assert all(
        (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in names[0]
    )


def write_elsewhere(write: Write) -> Path:
    first = rich(write, rich_episodes())
    moved = first.rename(first.with_name("moved"))
    rich(write, rich_episodes())
    return moved


@pytest.mark.integration
def test_the_split_is_by_episode(
    write: Write, counted: Counted, counted_dataset: Callable[..., Dataset]
) -> None:
    dataset = counted_dataset([3] * 400)
    train, valid = dataset.episodes("train"), dataset.episodes("valid")
    assert sorted([*train, *valid]) == list(range(400))
    assert 20 <= len(valid) <= 65
    assert dataset.count("train") + dataset.count("valid") == dataset.transitions == 1200
    reverse = Dataset([write([counted(k, 3) for k in reversed(range(400))], id="reverse")])
    assert set(reverse.table["index"][reverse.episodes("valid")]) == set(valid.tolist()), (
        "an episode's split does not depend on the others"
    )
    for seed in range(20):
        for count in (1, 2, 4, 5, 6):
            id = f"few{seed}-{count}"
            few = counted_dataset([3] * count, id=id, seed=seed, valid_fraction=1e-6)
            assert len(few.episodes("valid")) == (count >= 5), "one of five is held out"
        most = counted_dataset([3, 3], id=f"most{seed}", seed=seed, valid_fraction=0.999)
        assert len(most.episodes("train")) == 1
    assert not len(counted_dataset([3] * 100, id="none", valid_fraction=0.0).episodes("valid"))


def test_a_dataset_without_validation_works_alone_and_with_another(
    write: Write, counted: Counted
) -> None:
    first = write([counted(k, 9) for k in range(12)], id="first")
    later = write([counted(k, 9) for k in range(2)], id="later", valid_fraction=0.0)
    alone, both = Dataset([later]), Dataset([first, later])
    assert alone.count("valid") == 0 and alone.count("train") == 18
    assert both.count("valid") == Dataset([first]).count("valid") > 0
    for dataset in (alone, both):
        codec = Codec.fit(dataset)
        assert Loader(dataset, codec, "train", 4, 5, 0).transitions_per_epoch == dataset.count(
            "train"
        )
        assert (
            len(start_parts(dataset, codec, "valid")[1].numbers)
            == len(dataset.episodes("valid"))
            == len(list(dataset.iter_episodes("valid")))
        )
        assert len(observation_parts(dataset, codec, "valid", 5, 0)[1].numbers) == min(
            5, dataset.count("valid")
        )
    with pytest.raises(
        UsageError, match="the valid split of later is empty; collect more episodes"
    ):
        Loader(alone, Codec.fit(alone), "valid", 4, 5, 0)
    assert list(Loader(both, Codec.fit(both), "valid", 4, 5, 0).eval_batches())


def test_several_datasets_open_as_one(write: Write, counted: Counted) -> None:
    paths = [
        write([counted(k, 3 + k) for k in range(6)], id=name, shard_rows=10) for name in ("a", "b")
    ]
    dataset = Dataset(paths)
    assert dataset.transitions == 2 * Dataset(paths[:1]).transitions
    assert len(set(dataset.table["hash"].tolist())) == 12, "episode hashes differ between datasets"
    assert dataset.episode(7).index == 1 and len(dataset.episode(11)) == 8
    rows = sum(len(chunk.last) for chunk in dataset.chunks("train"))
    assert rows == dataset.count("train") + len(dataset.episodes("train"))


def test_options_of_several_datasets_are_joined(write: Write, counted: Counted) -> None:
    a = write(
        [counted(k, 3, task={"map": name}) for k, name in enumerate(["b", "d"])],
        id="a",
        task=["map"],
    )
    b = write(
        [counted(k, 3, task={"map": name}) for k, name in enumerate(["c", "d", "a"])],
        id="b",
        task=["map"],
    )
    dataset = Dataset([a, b])
    assert dataset.options[0].values == ["a", "b", "c", "d"]
    assert [e.task["map"] for e in dataset.iter_episodes()] == ["b", "d", "c", "d", "a"]


def test_an_option_with_a_float_is_a_number(write: Write, counted: Counted) -> None:
    path = write(
        [counted(k, 3, task={"mass": mass}) for k, mass in enumerate([1, 2, 1.0])],
        id="a",
        task=["mass"],
    )
    dataset = Dataset([path])
    assert dataset.options[0].values is None
    assert dataset.option_numbers[:, 0].tolist() == [1, 2, 1]


def test_an_environment_under_its_earlier_name_is_the_same(write: Write, counted: Counted) -> None:
    names = ("mesocosm.reality.domains:reacher", "mesocosm.envs.builtin:reacher")
    first, second = (
        write([counted(0, 3)], id=f"d{i}", environment=Environment(id=name))
        for i, name in enumerate(names)
    )
    assert Dataset([first, second]).transitions == 6


def test_datasets_of_different_environments_are_refused(write: Write, counted: Counted) -> None:
    a = write([counted(0, 3)], id="a")
    b = write([counted(0, 3)], id="b", environment=Environment(id="Other-v0"))
    c = write([counted(0, 3)], id="c", action_space=spaces.Discrete(4))
    d, e = (
        write(
            [counted(0, 3)],
            id=name,
            environment=Environment(id="Counted-v0", version=f"counted 1.{name}"),
        )
        for name in "de"
    )
    assert Dataset([a, d]).transitions == 6, "a version that is not known is no other"
    with pytest.raises(
        UsageError,
        match=(r"'.*d' and '.*e' differ in environment version: counted 1.d and counted 1.e; use"),
    ):
        Dataset([d, e])
    for other, word in ((b, "environment id"), (c, "action_space")):
        with pytest.raises(UsageError) as caught:
            Dataset([a, other])
        assert all(part in str(caught.value) for part in (str(a), str(other), word))
    with pytest.raises(UsageError, match="each dataset once"):
        Dataset([a, a])
    with pytest.raises(UsageError, match=r"data\.datasets"):
        Dataset([])


@pytest.mark.parametrize("field", ["observation", "reward", "duration"])
def test_nan_is_refused_with_episode_and_step(write: Write, field: str) -> None:
    episodes = rich_episodes(4)
    bad = episodes[2]
    if field == "observation":
        bad.observations[1]["pos"][0, 1] = np.nan
        name = "observation.pos"
    else:
        name = field
        getattr(bad, f"{field}s")[1] = np.inf
    with pytest.raises(MesocosmError) as caught:
        rich(write, episodes)
    assert all(word in str(caught.value) for word in ("episode 2", "'random'", "step 1", name)), (
        str(caught.value)
    )


def test_values_outside_the_spaces_are_refused_with_the_episode(
    write: Write, counted: Counted
) -> None:
    wrong = counted(4, 3)
    wrong.actions[1] = np.int64(3)
    with pytest.raises(MesocosmError, match=r"episode 4 .*action.*3"):
        write([counted(0, 3), wrong])
    with pytest.raises(MesocosmError, match=r"episode 0 .*twice"):
        write([counted(0, 3), counted(0, 3)], id="twice")
    with pytest.raises(MesocosmError, match="reset options"):
        write([counted(0, 3)], id="options", task=["map"])
    with pytest.raises(MesocosmError, match="single transition"):
        write([counted(0, 0)], id="nothing")


def test_opening_reads_no_shard(write: Write, counted: Counted) -> None:
    folder = write([counted(k, 5) for k in range(4)])
    shutil.rmtree(folder / "shards")
    dataset = Dataset([folder])
    assert dataset.transitions == 20
    with pytest.raises(ArtifactError, match="obs_num"):
        dataset.episode(0)


def test_a_corrupt_shard_is_named(
    write: Write, counted: Counted, root: str, tmp_path: Path
) -> None:
    folder = write([counted(k, 50) for k in range(4)])
    shard = folder / "shards" / "00000" / "obs_num.npy"
    shard.write_bytes(shard.read_bytes()[:-64])
    with pytest.raises(ArtifactError, match=r"obs_num\.npy"):
        Dataset([folder]).episode(0)
    storage = Storage(root)
    facts = {
        "environment": Environment(id="C"),
        "observation_space": spaces.Box(-100, 100, (2,), np.int64),
        "action_space": spaces.Discrete(3),
    }
    artifact = storage.make(
        "datasets",
        "x",
        {},
        lambda path: write_dataset(path, [counted(0, 9)], id="x", seed=0, **facts) and None,
    )
    reward = artifact.path / "shards" / "00000" / "reward.npy"
    data = bytearray(reward.read_bytes())
    data[-9] ^= 1
    reward.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=r"datasets/x.*reward\.npy"):
        storage.find("datasets", "x")
    with pytest.raises(ArtifactError, match="not a dataset"):
        Dataset([tmp_path / "nowhere"])
    (folder / "manifest.json").write_text('{"schema_version": 1}')
    with pytest.raises(ArtifactError, match="not a manifest"):
        Dataset([folder])


def test_starts_and_logged_observations(write: Write, counted: Counted) -> None:
    dataset = Dataset(
        [
            write(
                [counted(k, 4 + k, task={"mass": float(k)}) for k in range(8)],
                task=["mass"],
                shard_rows=12,
            )
        ]
    )
    codec = Codec.fit(dataset)
    task, observation = start_parts(dataset, codec, "train")
    train = dataset.episodes("train")
    assert codec.decode_observation(observation).tolist() == [[k, 0] for k in train]
    assert [round(t["mass"], 5) for t in codec.task_options(task)] == train.tolist()
    task, observation = observation_parts(dataset, codec, "train", 10**6, 0)
    everything = [tuple(row) for row in codec.decode_observation(observation).tolist()]
    assert sorted(everything) == [(k, t) for k in train for t in range(4 + k)], (
        "every observation but the last of each episode, once"
    )
    assert [round(t["mass"], 5) for t in codec.task_options(task)] == [k for k, _ in everything]
    some = codec.decode_observation(observation_parts(dataset, codec, "train", 7, 3)[1]).tolist()
    assert len(some) == 7
    assert (
        some
        != codec.decode_observation(observation_parts(dataset, codec, "train", 7, 4)[1]).tolist()
    )
