"""Curating: the episodes and reasons of each operation, an account that adds up to the input, and
the same bytes from one process and from Ray Data.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from gymnasium import spaces

from mesocosm.cli.main import main
from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.loader import Loader
from mesocosm.datasets.dataset import Dataset, Environment, write_dataset
from mesocosm.datasets.episode import Episode
from mesocosm.errors import UsageError
from mesocosm.jobs.curate import JOB, CurateConfig
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Artifact, Storage

OBSERVATION = spaces.Box(-np.inf, np.inf, (3,), np.float64)
Make = Callable[..., Episode]


@pytest.fixture(scope="module")
def a_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tracking.Run]:
    config = CurateConfig()
    config.storage.root = str(tmp_path_factory.mktemp("run"))
    with tracking.start("curate", config, quiet=True) as started:
        yield started


def walk(index: int, length: int = 30, seed: int | None = None, **rest: Any) -> Episode:
    """A random walk in three dimensions; the return is near 0.1 a step."""
    rng = np.random.default_rng(index if seed is None else seed)
    observations = np.cumsum(rng.normal(size=(length + 1, 3)), 0)
    rewards = 0.1 + 0.01 * rng.normal(size=length)
    facts: dict[str, Any] = {"seed": index, "behaviour": "random", "outcome": "terminated", **rest}
    return Episode(
        index=index,
        observations=list(observations),
        actions=[np.int64(a) for a in rng.integers(3, size=length)],
        rewards=rewards,
        **facts,
    )


def seen(episode: Episode, change: Callable[[np.ndarray[Any, Any]], None]) -> Episode:
    """The episode with observations [T+1, 3] changed in place."""
    observations = np.array(episode.observations)
    change(observations)
    episode.observations = list(observations)
    return episode


@pytest.fixture
def dataset(root: str) -> Callable[..., str]:
    """`dataset(episodes, id)` writes them into storage; by default a tenth is for validation."""

    def make(episodes: list[Episode], id: str = "d0", **facts: Any) -> str:
        defaults = {
            "environment": Environment(id="Walk-v0", task=facts.pop("task", [])),
            "observation_space": OBSERVATION,
            "action_space": spaces.Discrete(3),
        }

        def filled(to):
            write_dataset(to, episodes, id=id, **{"seed": 0, **defaults, **facts})

        Storage(root).make(
            "datasets",
            id,
            {"job": "collect", "inputs": {"agents": []}, "dropped": [{"steps": 3}]},
            filled,
        )
        return id

    return make


@pytest.fixture
def curate(root: str, a_run: tracking.Run) -> Callable[..., Artifact]:
    """`curate(operation, ..., datasets=[...])`, in this process unless `workers` is set."""

    def make(
        *operations: dict[str, Any], datasets: tuple[str, ...] = ("d0",), **keys: Any
    ) -> Artifact:
        a_run.storage = Storage(root)
        return JOB.run(configured(root, *operations, datasets=datasets, **keys), a_run)

    return make


def configured(
    root: str, *operations: dict[str, Any], datasets: tuple[str, ...] = ("d0",), **keys: Any
) -> CurateConfig:
    config = CurateConfig(operations=list(operations), **{"workers": 0, **keys})
    config.data.datasets = list(datasets)
    config.storage.root = root
    return config


def stored(root: str, id: str = "d0") -> Dataset:
    return Dataset([Storage(root).artifact("datasets", id).path])


def report(artifact: Artifact) -> dict[str, Any]:
    """Check that curate.json adds up, by operation and by reason, and agrees with dropped.parquet
    and the dataset; return it.
    """
    account = json.loads((artifact.path / "curate.json").read_text())
    size_in = account["in"]
    assert size_in["transitions"] == sum(each["transitions"] for each in account["datasets"])
    for entry in account["operations"]:
        assert entry["in"] == size_in
        for unit in ("episodes", "transitions"):
            assert (
                entry["in"][unit] + entry["put_back"][unit]
                == entry["dropped"][unit] + entry["kept"][unit]
            )
            assert entry["kept"][unit] == sum(size[unit] for size in entry["splits"].values())
        signed = {"dropped": 1, "cut": 1, "put back": -1}
        assert entry["in"]["transitions"] - entry["kept"]["transitions"] == sum(
            signed[r["what"]] * r["transitions"] for r in entry["reasons"]
        )
        size_in = entry["kept"]
    dataset = Dataset([artifact.path])
    assert (
        size_in
        == account["kept"]
        == {"episodes": len(dataset.table), "transitions": dataset.transitions}
    )
    rows = pq.read_table(artifact.path / "dropped.parquet").to_pylist()
    assert sum(row["transitions"] for row in rows) == account["in"][
        "transitions"
    ] - dataset.transitions and all(row["reason"] for row in rows)
    storage = Storage(str(artifact.path.parents[1]))
    inherited = [
        drop
        for each in account["datasets"]
        for drop in storage.artifact("datasets", each["id"]).meta["dropped"]
    ]
    steps, before = (
        sum(int(drop["steps"]) for drop in drops) for drops in (artifact.meta["dropped"], inherited)
    )
    assert (
        before >= 3 * len(account["datasets"])
        and steps == before + account["in"]["transitions"] - dataset.transitions
    )
    return account


def left(artifact: Artifact) -> list[tuple[str, int]]:
    return [
        (row["dataset"], row["index"])
        for row in pq.read_table(artifact.path / "origin.parquet").to_pylist()
    ]


def indices(artifact: Artifact) -> list[int]:
    report(artifact)
    return [index for _, index in left(artifact)]


def dropped(artifact: Artifact) -> dict[int, str]:
    return {
        row["episode"]: row["reason"]
        for row in pq.read_table(artifact.path / "dropped.parquet").to_pylist()
    }


# -- duplicates and sensors


def test_one_copy_is_kept_validation_first(
    dataset: Callable[..., str], curate: Callable[..., Artifact], root: str
) -> None:
    episodes = [walk(k) for k in range(40)]
    dataset(episodes)
    split = stored(root).table["split"]
    held = int(np.flatnonzero(split == 1)[0])
    train = [int(k) for k in np.flatnonzero(split == 0)[:2]]
    dataset(
        [
            walk(0, seed=held),
            walk(1, seed=train[0]),
            walk(2, seed=99),
            walk(3, seed=99, behaviour="other"),
        ],
        "d1",
        valid_fraction=0.0,
    )
    artifact = curate({"op": "exact_duplicates"}, datasets=("d0", "d1"))
    assert left(artifact) == [*(("d0", k) for k in range(40)), ("d1", 2)]
    rows = pq.read_table(artifact.path / "dropped.parquet").to_pylist()
    assert [(row["episode"], row["of_dataset"], row["of_episode"]) for row in rows] == [
        (0, "d0", held),
        (1, "d0", train[0]),
        (3, "d1", 2),
    ]
    assert report(artifact)["operations"][0]["reasons"][0]["first"][0] == f"d1/0 of d0/{held}"
    one_reward = walk(5, seed=train[1])
    one_reward.rewards = one_reward.rewards + np.eye(30)[-1] * 1e-9
    dataset([one_reward], "d2", valid_fraction=0.0)
    assert ("d2", 5) in left(curate({"op": "exact_duplicates"}, datasets=("d0", "d2"))), (
        "the last reward tells them apart"
    )
    swapped = curate({"op": "exact_duplicates"}, datasets=("d1", "d0"))
    assert (
        ("d0", held) in left(swapped)
        and ("d1", 0) not in left(swapped)
        and ("d1", 1) in left(swapped)
    ), "validation before order"


def test_near_duplicates_agree_with_a_full_comparison(
    dataset: Callable[..., str], curate: Callable[..., Artifact]
) -> None:
    rng = np.random.default_rng(0)
    episodes = [walk(k, length=int(rng.integers(20, 60))) for k in range(60)]
    for k in range(60, 120):  # noisy copies, nearer and further than the tolerance
        copy = walk(k, length=len(episodes[k - 60]), seed=k - 60)
        noise = 10.0 ** rng.uniform(-3, 0) * rng.normal(size=(len(copy) + 1, 3))
        episodes.append(seen(copy, lambda o, noise=noise: o.__iadd__(noise)))
    dataset(episodes, valid_fraction=0.0)
    artifact = curate({"op": "near_duplicates", "tolerance": 0.02})
    numbers = np.concatenate([np.array(e.observations) for e in episodes])
    scale = np.array([*numbers.std(0), np.concatenate([e.rewards for e in episodes]).std()])

    def vector(e: Episode) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        at = [[(i * last + 7) // 15 for i in range(16)] for last in (len(e), len(e) - 1)]
        return (
            np.concatenate([np.array(e.observations)[at[0]], e.rewards[at[1], None]], 1) / scale,
            np.array(e.actions)[at[1]],
        )

    kept: list[int] = []
    for e in episodes:
        (a, b), near = vector(e), False
        for other in kept:
            c, d = vector(episodes[other])
            close = np.sqrt((((a - c) ** 2).sum() + (b != d).sum()) / (16 * 5)) <= 0.02
            near |= bool(close) and abs(len(e) - len(episodes[other])) <= 0.02 * max(
                len(e), len(episodes[other])
            )
        if not near:
            kept.append(e.index)
    assert indices(artifact) == kept and 60 < len(kept) < 115


def test_a_stuck_sensor_is_a_fault_and_a_constant_is_not(
    dataset: Callable[..., str], curate: Callable[..., Artifact]
) -> None:
    episodes = [
        seen(walk(k), lambda o, k=k: o.__setitem__((slice(None), 2), float(k))) for k in range(20)
    ]  # the third is a goal: constant in an episode
    seen(episodes[3], lambda o: o.__setitem__((slice(12, 23), 1), o[12, 1]))
    seen(episodes[4], lambda o: o.__setitem__((slice(12, 22), 1), o[12, 1]))  # one step less
    seen(episodes[5], lambda o: o.__setitem__((slice(0, 31), 0), 0.0))
    dataset(episodes)
    artifact = curate({"op": "stuck", "steps": 10})
    assert dropped(artifact) == {
        3: "observation[1] does not change for 10 steps",
        5: "observation[0] does not change for 10 steps",
    }
    assert report(artifact)["operations"][0]["notes"] == [
        "observation[2] is unchanged for 10 steps in 20 of 20 episodes: taken as its nature, not as"
        " a fault"
    ]
    cut = curate({"op": "stuck", "steps": 10, "keep": "before"})
    assert indices(cut) == [k for k in range(20) if k != 5], (
        "an episode that is stuck from the start is dropped"
    )
    episode = next(e for e in Dataset([cut.path]).iter_episodes() if e.index == 3)
    assert (
        len(episode) == 12
        and episode.outcome == "unfinished"
        and np.array_equal(episode.observations, episodes[3].observations[:13])
    )
    assert (
        episode.total_reward == episodes[3].rewards[:12].sum()
        and not Dataset([cut.path]).array(0, "terminated")[:0].any()
    )
    with pytest.raises(
        UsageError,
        match=(
            r"operations\[0\] \(stuck\): dimensions names 'observation\[4\]'.*did you mean"
            r" 'observation\[\d\]'"
        ),
    ):
        curate({"op": "stuck", "dimensions": ["observation[4]"]})
    assert 4 in dropped(curate({"op": "stuck", "steps": 9, "dimensions": ["observation[1]"]}))


def test_a_saturated_sensor_is_a_fault_and_a_contact_is_not(
    dataset: Callable[..., str], curate: Callable[..., Artifact]
) -> None:
    episodes = [
        seen(walk(k), lambda o: o.__setitem__((slice(None), 2), (o[:, 0] > 0).astype(float)))
        for k in range(20)
    ]
    for k in (6, 7):
        seen(episodes[k], lambda o, k=k: o.__setitem__((slice(0, 10 if k == 6 else 4), 0), 50.0))
    dataset(episodes)
    artifact = curate({"op": "saturated", "share": 0.2})
    assert list(dropped(artifact)) == [6] and "observation[0] is at" in dropped(artifact)[6]
    assert (
        "observation[2] is at its limits in 20 of 20"
        in report(artifact)["operations"][0]["notes"][0]
    )


# -- choices


def test_filters_drop_with_a_reason(
    dataset: Callable[..., str], curate: Callable[..., Artifact], root: str
) -> None:
    facts = [
        {
            "behaviour": "ab"[k % 2],
            "success": [True, False, None][k % 3],
            "outcome": ["terminated", "truncated"][k % 2],
        }
        for k in range(30)
    ]
    dataset([walk(k, length=k + 1, **facts[k]) for k in range(30)])
    artifact = curate(
        {"op": "length", "min": 5, "max": 25},
        {"op": "return", "min": 1.0},
        {"op": "where", "by": "behaviour", "keep": ["a"]},
    )
    assert (
        all(5 <= k + 1 <= 25 and k % 2 == 0 for k in indices(artifact))
        and {0: "length below 5", 29: "length above 25"}.items() <= dropped(artifact).items()
    )
    assert dropped(artifact)[11] == "behaviour b" and dropped(artifact)[5] == "return below 1"
    assert all(
        k % 3 != 1 for k in indices(curate({"op": "where", "by": "success", "drop": ["failure"]}))
    )
    assert all(
        k % 2 for k in indices(curate({"op": "where", "by": "outcome", "keep": ["truncated"]}))
    )
    before = stored(root)
    after = Dataset([artifact.path])
    was = dict(zip(before.table["index"].tolist(), before.table["split"].tolist(), strict=True))
    assert all(
        was[k] == split
        for k, split in zip(
            after.table["index"].tolist(), after.table["split"].tolist(), strict=True
        )
    ), "the split is kept"
    with pytest.raises(
        UsageError, match=r"operations\[0\] \(length\): nothing to train on is left"
    ):
        curate({"op": "length", "min": 500})


def test_balance_and_mix_choose_among_training_episodes(
    dataset: Callable[..., str], curate: Callable[..., Artifact], root: str
) -> None:
    dataset([walk(k, length=10, behaviour="few" if k % 5 == 0 else "many") for k in range(100)])
    dataset([walk(k, length=10, seed=500 + k) for k in range(50)], "d1")
    artifact = curate({"op": "balance", "by": "behaviour", "most": 2})
    data = Dataset([artifact.path])
    sizes = {
        b.name: int((data.table["behaviour"][data.episodes("train")] == i).sum())
        for i, b in enumerate(data.manifests[0].behaviours)
    }
    assert (
        sizes["many"] == 2 * sizes["few"] > 20
        and report(artifact)["operations"][0]["splits"]["valid"]["episodes"]
        == len(data.episodes("valid"))
        > 0
    )
    mixed = curate({"op": "mix", "weights": [1, 2]}, datasets=("d0", "d1"))
    report(mixed)
    of = pq.read_table(mixed.path / "origin.parquet")["dataset"].to_pylist()
    train = [of[i] for i in Dataset([mixed.path]).episodes("train")]
    all_of_d1 = len(stored(root, "d1").episodes("train"))
    assert 2 * train.count("d0") in (all_of_d1 - 1, all_of_d1) and train.count("d1") == all_of_d1, (
        "all of d1, and half as much of d0"
    )
    less = curate({"op": "mix", "weights": [1, 2], "transitions": 300}, datasets=("d0", "d1"))
    assert Dataset([less.path]).count("train") == 300 and set(left(less)) <= set(left(mixed))
    with pytest.raises(UsageError, match=r"weights must be .* each of data\.datasets"):
        curate({"op": "mix", "weights": [1]}, datasets=("d0", "d1"))


def test_failures_are_put_back_unless_they_are_broken(
    dataset: Callable[..., str], curate: Callable[..., Artifact]
) -> None:
    episodes = [walk(k, length=40 if k % 2 else 20, success=bool(k % 2)) for k in range(40)]
    seen(episodes[0], lambda o: o.__setitem__((slice(0, 21), 0), 0.0))
    dataset(episodes, valid_fraction=0.0)
    artifact = curate(
        {"op": "stuck", "steps": 15}, {"op": "length", "min": 30}, {"op": "failures", "share": 0.2}
    )
    kept = indices(artifact)
    assert sum(k % 2 == 0 for k in kept) == 5 and len(kept) == 25 and 0 not in kept
    assert report(artifact)["operations"][2]["put_back"] == {"episodes": 5, "transitions": 100}
    with pytest.raises(
        UsageError, match=r"share=0.6 needs .* failed episodes, got 0 and 19 to put back"
    ):
        curate(
            {"op": "stuck", "steps": 15},
            {"op": "length", "min": 30},
            {"op": "failures", "share": 0.6},
        )
    assert (
        "no failed episode is left"
        in report(curate({"op": "where", "by": "success", "keep": ["success"]}))["warnings"][-1]
    )


def test_hold_out_by_task_behaviour_and_time(
    dataset: Callable[..., str], curate: Callable[..., Artifact]
) -> None:
    tasks = [{"mass": 0.1 * k, "map": ["big", "small", "round"][k % 3]} for k in range(30)]
    dataset(
        [walk(k, task=tasks[k], behaviour="ab"[k % 2]) for k in range(30)], task=["mass", "map"]
    )

    def held(**params: Any) -> list[int]:
        artifact = curate({"op": "exact_duplicates"}, {"op": "hold_out", **params})
        data = Dataset([artifact.path])
        assert (
            len(data.table) == 30
            and [e.task for e in data.iter_episodes()] == tasks
            and not report(artifact)["operations"][1]["dropped"]["episodes"]
        )
        return [int(k) for k in data.table["index"][data.episodes("valid")]]

    assert held(by="map", values=["round"]) == list(range(2, 30, 3))
    assert held(by="behaviour", values=["b"]) == list(range(1, 30, 2))
    assert held(by="time", share=0.1) == [27, 28, 29]
    assert len(held(by="random", share=0.2)) == 6 and held(by="random", share=0.1) == [
        k for k in held(by="random", share=0.2) if k in held(share=0.1)
    ]
    assert {k % 3 for k in held(by="map", share=0.4)} in ({0}, {1}, {2})
    ranges = held(by="mass", values=["2.32..2.9"])
    assert ranges == list(range(24, 30))
    with pytest.raises(
        UsageError,
        match="values names 'rond', which is no map of these episodes; did you mean 'round'",
    ):
        held(by="map", values=["rond"])
    with pytest.raises(UsageError, match=r"by must be one of .* got 'mas'; did you mean 'mass'"):
        held(by="mas")


# -- the dataset

ALL: tuple[dict[str, Any], ...] = (
    {"op": "exact_duplicates"},
    {"op": "near_duplicates", "tolerance": 0.05},
    {"op": "stuck", "steps": 10, "keep": "before"},
    {"op": "saturated"},
    {"op": "length", "min": 12},
    {"op": "failures", "share": 0.05},
    {"op": "balance", "by": "behaviour", "most": 1.5},
    {"op": "mix", "weights": [2, 1]},
    {"op": "hold_out", "share": 0.15},
)


def two(dataset: Callable[..., str]) -> tuple[str, str]:
    rng = np.random.default_rng(1)
    for id, base in (("d0", 0), ("d1", 1000)):
        episodes = [
            walk(
                k,
                length=int(rng.integers(8, 40)),
                seed=base + k % 90,
                behaviour="abc"[k % 3],
                success=k % 4 > 0,
            )
            for k in range(100)
        ]
        seen(episodes[20], lambda o: o.__setitem__((slice(3, None), 1), 0.25))
        dataset(episodes, id, shard_rows=500)
    return "d0", "d1"


def checksums(artifact: Artifact) -> dict[str, Any]:
    return json.loads((artifact.path / "COMMIT.json").read_text())["files"]


def test_a_curated_dataset_trains_and_is_made_once(
    dataset: Callable[..., str], curate: Callable[..., Artifact], root: str, golden: Any
) -> None:
    names = two(dataset)
    artifact = curate(*ALL, datasets=names)
    account = report(artifact)
    assert (
        artifact.meta["inputs"] == {"datasets": ["d0", "d1"]}
        and artifact.meta["config"]["operations"] == account["lineage"]
        and artifact.meta["job"] == "curate"
    )
    assert account["lineage"][2] == {"op": "stuck", "steps": 10, "keep": "before", "dimensions": []}
    golden.check("curate", {"shards": golden.of_files(artifact.path, "shards/*/*.npy")})
    data = Dataset([artifact.path])
    batch = Loader(data, Codec.fit(data), "train", 8, 16, 0).batch(0)
    assert batch.mask.any() and data.table["index"].tolist() == list(range(len(data.table)))
    inputs = {id: stored(root, id) for id in names}
    for episode, (id, index) in zip(data.iter_episodes(), left(artifact), strict=True):
        source = inputs[id].episode(index)
        assert np.array_equal(
            episode.observations, source.observations[: len(episode) + 1]
        ) and np.array_equal(episode.rewards, source.rewards[: len(episode)])
        assert episode.behaviour == source.behaviour and episode.seed == source.seed
    stamp = (artifact.path / "COMMIT.json").stat().st_mtime_ns
    assert (
        curate(*ALL, datasets=names).id == artifact.id
        and (artifact.path / "COMMIT.json").stat().st_mtime_ns == stamp
    )
    before = checksums(artifact)
    again = curate(*ALL, datasets=names, force=True)
    assert checksums(again) == before and (again.path / "COMMIT.json").stat().st_mtime_ns != stamp
    assert curate(*ALL[:-1], datasets=names).id != artifact.id
    twice = curate({"op": "exact_duplicates"}, datasets=(artifact.id,))
    assert (
        twice.meta["inputs"]["datasets"] == [artifact.id]
        and report(twice)["kept"] == account["kept"]
    )
    joined = curate(datasets=names)
    assert report(joined)["kept"]["episodes"] == 200 and report(joined)["operations"] == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ray_data_gives_the_same_bytes(
    dataset: Callable[..., str],
    curate: Callable[..., Artifact],
    ray_local: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = two(dataset)
    monkeypatch.setattr("mesocosm.data.curation.scan.ROWS", 900)
    artifact = curate(*ALL, datasets=names)
    before = checksums(artifact)
    by_ray = curate(*ALL, datasets=names, workers=2, force=True)
    assert by_ray.id == artifact.id and checksums(by_ray) == before


def test_a_dry_run_reports_and_writes_nothing(
    dataset: Callable[..., str],
    curate: Callable[..., Artifact],
    root: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    names = two(dataset)
    operations = tmp_path / "ops.yaml"
    operations.write_text(json.dumps({"operations": ALL, "data": {"datasets": names}}))
    assert (
        main(["curate", "-c", str(operations), f"storage.root={root}", "--dry-run", "--json"]) == 0
    )
    account = json.loads(capsys.readouterr().out)
    assert Storage(root).list("datasets") == ["d0", "d1"]
    artifact = curate(*ALL, datasets=names)
    entries = report(artifact)["operations"]
    assert account["dataset"] == artifact.name
    assert [row["kept"] for row in account["operations"]] == [
        entry["kept"]["episodes"] for entry in entries
    ]
    assert [row["transitions"] for row in account["reasons"]] == [
        r["transitions"] for entry in entries for r in entry["reasons"]
    ]
    assert main(["curate", "-c", str(operations), f"storage.root={root}", "--dry-run"]) == 0
    assert "exact_duplicates" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (
            {"op": "exact_duplicate"},
            "op must be .* got 'exact_duplicate'; did you mean 'exact_duplicates'",
        ),
        ({"min": 3}, r"operations\[0\]: op must be one of exact_duplicates, .* got None"),
        (
            {"op": "length", "mim": 3},
            r"operations\[0\] \(length\): unknown config key 'mim'; did you mean 'min'",
        ),
        ({"op": "stuck", "steps": "many"}, r"operations\[0\] \(stuck\): config key 'steps'"),
        ({"op": "stuck", "steps": 0}, r"steps must be in \[1, inf\), got 0"),
        ({"op": "length"}, "min or max must be a number"),
        ({"op": "hold_out", "share": 1}, r"share must be in \[0, 1\), got 1.0"),
        ({"op": "where", "by": "behaviour"}, "keep or drop must be a list"),
        ({"op": "balance", "by": "task"}, "has no task"),
        ({"op": "failures", "share": 0.1}, "below must be a return"),
        ({"op": "failures", "share": 0}, "share must be > 0, got 0"),
    ],
    ids=str,
)
def test_wrong_operations_are_refused(
    operation: dict[str, Any], message: str, dataset: Callable[..., str], root: str
) -> None:
    dataset([walk(k) for k in range(10)])
    with pytest.raises(UsageError, match=message):
        JOB.plan(configured(root, operation))


def test_datasets_of_different_spaces_are_refused(
    dataset: Callable[..., str], curate: Callable[..., Artifact]
) -> None:
    dataset([walk(k) for k in range(10)])
    dataset([walk(k) for k in range(10)], "d1", action_space=spaces.Discrete(4))
    with pytest.raises(UsageError, match="differ in action_space"):
        curate(datasets=("d0", "d1"))
    with pytest.raises(UsageError, match="no artifact datasets/d7"):
        curate(datasets=("d7",))
    with pytest.raises(UsageError, match=r"data.datasets must name a dataset, got \[\]"):
        curate(datasets=())
