"""Random walks to curate, and checks of a curated dataset."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from gymnasium import spaces

from mesocosm.datasets.dataset import Dataset, Environment, write_dataset
from mesocosm.datasets.episode import Episode
from mesocosm.jobs.curate import CurateConfig
from mesocosm.store.artifacts import Artifact, Storage

OBSERVATION = spaces.Box(-np.inf, np.inf, (3,), np.float64)


def walk(index: int, length: int = 30, seed: int | None = None, **rest: Any) -> Episode:
    """A random walk in three dimensions; the return is near 0.1 a step."""
    rng = np.random.default_rng(index if seed is None else seed)
    observations = np.cumsum(rng.normal(size=(length + 1, 3)), 0)
    rewards = 0.1 + 0.01 * rng.normal(size=length)
    facts: dict[str, Any] = {"seed": index, "behaviour": "random", "outcome": "terminated", **rest}
    actions = [np.int64(a) for a in rng.integers(3, size=length)]
    return Episode(
        index=index, observations=list(observations), actions=actions, rewards=rewards, **facts
    )


def seen(
    episode: Episode, column: int, value: Any, begin: int = 0, end: int | None = None
) -> Episode:
    """The episode with a column of its observations changed, to a value or a function of them."""
    observations = np.array(episode.observations)
    observations[begin:end, column] = value(observations) if callable(value) else value
    episode.observations = list(observations)
    return episode


def write_walks(root: str, episodes: list[Episode], id: str = "d0", **facts: Any) -> str:
    """Write a dataset into storage. By default a tenth is for validation."""
    facts = {
        "environment": Environment(id="Walk-v0", task=facts.pop("task", [])),
        "observation_space": OBSERVATION,
        "action_space": spaces.Discrete(3),
        "seed": 0,
        **facts,
    }
    meta = {"job": "collect", "inputs": {"agents": []}, "dropped": [{"steps": 3}]}
    Storage(root).make(
        "datasets", id, meta, lambda to: write_dataset(to, episodes, id=id, **facts) and None
    )
    return id


def two_datasets(write: Callable[..., str]) -> tuple[str, str]:
    """Two datasets of 100 walks, with copies and a stuck sensor."""
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
        seen(episodes[20], 1, 0.25, begin=3)
        write(episodes, id, shard_rows=500)
    return "d0", "d1"


def configured(
    root: str, *operations: dict[str, Any], datasets: tuple[str, ...] = ("d0",), **keys: Any
) -> CurateConfig:
    config = CurateConfig(operations=list(operations), **{"workers": 0, **keys})
    config.data.datasets = list(datasets)
    config.storage.root = root
    return config


def stored(root: str, id: str = "d0") -> Dataset:
    return Dataset([Storage(root).artifact("datasets", id).path])


def rows_of(artifact: Artifact, name: str) -> list[dict[str, Any]]:
    return pq.read_table(artifact.path / f"{name}.parquet").to_pylist()


def report(artifact: Artifact) -> dict[str, Any]:
    """Check that curate.json adds up, by operation and by reason, and agrees with dropped.parquet
    and the dataset; return it.
    """
    account = json.loads((artifact.path / "curate.json").read_text())
    size, signs = account["in"], {"dropped": 1, "cut": 1, "put back": -1}
    assert size["transitions"] == sum(each["transitions"] for each in account["datasets"])
    for entry in account["operations"]:
        assert entry["in"] == size
        size = entry["kept"]
        for unit in ("episodes", "transitions"):
            put_back, dropped = entry["put_back"][unit], entry["dropped"][unit]
            assert entry["in"][unit] + put_back == dropped + size[unit]
            assert size[unit] == sum(split[unit] for split in entry["splits"].values())
        by_reason = sum(signs[row["what"]] * row["transitions"] for row in entry["reasons"])
        assert entry["in"]["transitions"] - size["transitions"] == by_reason
    dataset = Dataset([artifact.path])
    expected = {"episodes": len(dataset.table), "transitions": dataset.transitions}
    assert size == account["kept"] == expected
    rows, lost = rows_of(artifact, "dropped"), account["in"]["transitions"] - dataset.transitions
    assert sum(row["transitions"] for row in rows) == lost and all(row["reason"] for row in rows)
    storage = Storage(str(artifact.path.parents[1]))
    inputs = [storage.artifact("datasets", each["id"]).meta for each in account["datasets"]]
    before = sum(drop["steps"] for meta in inputs for drop in meta["dropped"])
    assert before >= 3 * len(inputs)
    assert sum(drop["steps"] for drop in artifact.meta["dropped"]) == before + lost
    return account


def origins(artifact: Artifact) -> list[tuple[str, int]]:
    return [(row["dataset"], row["index"]) for row in rows_of(artifact, "origin")]


def indices(artifact: Artifact) -> list[int]:
    report(artifact)
    return [index for _, index in origins(artifact)]


def reasons(artifact: Artifact) -> dict[int, str]:
    """The reason of each dropped episode."""
    return {row["episode"]: row["reason"] for row in rows_of(artifact, "dropped")}
