"""Importing from LeRobot, Minari and RLlib, and Parquet's own types."""

from __future__ import annotations

import decimal
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gymnasium import spaces

from mesocosm.data.ingest.readers import parquet as parquet_reader
from mesocosm.data.ingest.sources import sources
from mesocosm.datasets.dataset import Dataset
from mesocosm.errors import UsageError
from mesocosm.store.artifacts import Artifact

from .logs import columns, each, jsonl, parquet, planned, refused, report, steps, warns, without

Import = Callable[..., Artifact]
Column = Callable[[int, int, bool], Any]
"""A function of (episode, step, whether it is the last)."""


def test_types_of_parquet_that_mean_the_same(tmp_path: Path, import_logs: Import) -> None:
    half, text = decimal.Decimal("0.50"), pa.dictionary(pa.int32(), pa.string())
    rows = each(
        without(steps(), "next_observation"),
        episode=lambda row: f"e{row['episode']}",
        reward=half,
        task={"side": "left"},
        observation=lambda row: [half, half * row["step"]],
    )
    rows = each(rows, behaviour=lambda row: "ab"[int(row["episode"][1]) % 2])
    types = {
        "episode": text,
        "behaviour": text,
        "reward": pa.decimal128(6, 2),
        "observation": pa.list_(pa.decimal256(40, 2), 2),
    }
    table = pa.Table.from_pylist(rows)
    for i, name in enumerate(table.column_names):
        if name in types:
            table = table.set_column(i, name, table[name].cast(types[name]))
        elif name == "task":
            sides = table[name].combine_chunks().field(0).dictionary_encode()
            table = table.set_column(i, name, pa.StructArray.from_arrays([sides], ["side"]))
    pq.write_table(table, tmp_path / "odd.parquet")
    dataset = Dataset([import_logs(tmp_path / "odd.parquet").path])
    first = dataset.episode(0)
    assert {episode.behaviour for episode in dataset.iter_episodes()} == {"a", "b"}
    assert first.task == {"side": "left"} and first.rewards.tolist() == [0.5] * 3
    assert first.observations[2].tolist() == [0.5, 1.0]


def test_a_type_without_a_unit_in_the_schema_is_refused(tmp_path: Path) -> None:
    """Parquet stores it as an integer, whose unit is in Arrow's type alone."""
    table = pa.Table.from_pylist(steps(duration=1))
    column = table["duration"].cast(pa.duration("ms"))
    table = table.set_column(table.column_names.index("duration"), "duration", column)
    pq.write_table(table, tmp_path / "a.parquet")
    refused(r"duration must be number, got duration\[ms\]", tmp_path / "a.parquet")


def test_what_is_wrong_with_a_file_of_parquet(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", steps())
    path.write_bytes(path.read_bytes()[:-20])
    refused("cannot be read as Parquet .*magic bytes not found in footer", path)
    path.write_bytes(b"abc")
    refused("cannot be read as Parquet .*smaller than the minimum", path)


def test_a_name_with_the_characters_of_a_pattern(tmp_path: Path) -> None:
    jsonl(tmp_path / "run1.jsonl", steps())
    assert planned(jsonl(tmp_path / "run[1].jsonl", steps((2,))))["transitions"] == 2


# -- LeRobot


def lerobot(folder: Path, lengths: tuple[int, ...], **names: Column) -> Path:
    """A folder of version 3, with two episodes a file. `next_done` makes the column next.done."""
    (folder / "meta").mkdir(parents=True)
    (folder / "meta" / "info.json").write_text(json.dumps({"codebase_version": "v3.0", "fps": 10}))
    (folder / "data" / "chunk-000").mkdir(parents=True)
    for number, first in enumerate(range(0, len(lengths), 2)):
        rows = [
            {
                "observation.state": [t / 2, float(k)],
                "action": [t / 4],
                "episode_index": k,
                "frame_index": t,
                "timestamp": t / 10,
                **{
                    name.replace("_", ".", 1): value(k, t, t == length - 1)
                    for name, value in names.items()
                },
            }
            for k, length in list(enumerate(lengths))[first : first + 2]
            for t in range(length)
        ]
        path = folder / "data" / "chunk-000" / f"file-{number:03d}.parquet"
        parquet(path, rows, row_group_size=3)
    return folder


def paid(k: int, t: int, last: bool) -> float:
    return float(t)


def done(k: int, t: int, last: bool) -> bool:
    return last


def test_a_lerobot_folder(folder: Path, import_logs: Import) -> None:
    lerobot(folder / "robot", (5, 5, 5, 5), next_done=done)
    result = import_logs(folder / "robot")
    episode = Dataset([result.path]).episode(3)
    counts = result.meta["counts"]
    assert counts["episodes"] == 4 and counts["last_actions_left_out"] == 4
    assert episode.observations[2].tolist() == [1.0, 3.0] and episode.actions[2].tolist() == [0.5]
    table = columns(report(result))
    assert "0 throughout" in table["reward"]["how"]
    assert table["next.done"]["became"] == "truncated"
    assert table["timestamp"]["became"] == "nothing"
    (folder / "robot" / "meta" / "info.json").write_text(json.dumps({"codebase_version": "v1.6"}))
    refused(r"LeRobot folder of version v2 or v3, got v1.6", folder / "robot")


@pytest.mark.parametrize(
    ("lengths", "became"),
    [((5, 5, 5), "truncated"), ((5, 5, 4), "terminated"), ((5,), "terminated")],
)
def test_one_common_length_of_lerobot_is_a_time_limit(
    tmp_path: Path, lengths: tuple[int, ...], became: str
) -> None:
    robot = lerobot(tmp_path / "robot", lengths, next_done=done, next_reward=paid)
    row = columns(planned(robot))["next.done"]
    assert row["became"] == became and "guess" in row["how"]
    assert ("have 5 steps: a time limit" in row["how"]) == (became == "truncated")


def test_truncated_and_success_of_lerobot(
    tmp_path: Path, import_logs: Import, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_reader, "BATCH_ROWS", 2)
    robot = lerobot(
        tmp_path / "robot",
        (5, 5, 5),
        next_done=done,
        next_truncated=lambda k, t, last: last and k == 1,
        next_success=lambda k, t, last: t == 2 and k == 2,
        next_reward=paid,
    )
    assert columns(planned(robot))["next.done"]["became"] == "terminated"
    dataset = Dataset([import_logs(robot).path])
    assert [episode.success for episode in dataset.iter_episodes()] == [False, False, True]
    table = pa.concat_tables(source.head() for source in sources([str(robot)], fetch=False))
    ends = table.filter(table["next.done"])["episode_index"].to_pylist()
    assert ends == [0, 2], "what is truncated is not terminated"


def test_successes_of_lerobot_do_not_count_among_those_that_a_limit_ends(tmp_path: Path) -> None:
    success: Column = lambda k, t, last: last and k == 1  # noqa: E731
    robot = lerobot(tmp_path / "robot", (5, 3, 5), next_done=done, next_success=success)
    row = columns(planned(robot))["next.done"]
    assert row["became"] == "truncated"
    assert "all 2 episodes that end without success have 5 steps" in row["how"]


def test_the_states_of_lerobot(tmp_path: Path, import_logs: Import) -> None:
    states: dict[str, Column] = {
        "observation_environment_state": lambda k, t, last: [1.0, 2.0, float(t)],
        "observation_images.top": lambda k, t, last: b"x",
    }
    robot = lerobot(tmp_path / "robot", (5, 5), next_done=done, **states)
    assert columns(planned(robot))["observation.images.top"]["became"] == "nothing"
    space = Dataset([import_logs(robot).path]).observation_space
    assert isinstance(space, spaces.Dict)
    shapes = {"state": (2,), "environment_state": (3,)}
    assert {key: box.shape for key, box in space.items()} == shapes
    path = robot / "data" / "chunk-000" / "file-000.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["observation.state"]), path)
    assert Dataset([import_logs(robot).path]).observation_space.shape == (3,)


def test_rewards_that_are_all_0(tmp_path: Path) -> None:
    zero = "every reward is 0"
    only_last: Column = lambda k, t, last: float(last)  # noqa: E731
    robots = {
        name: planned(lerobot(tmp_path / name, (5, 4), next_done=done, **rewards))
        for name, rewards in (
            ("none", {}),
            ("last", {"next_reward": only_last}),
            ("paid", {"next_reward": paid}),
        )
    }
    assert warns(robots["none"], zero) and not warns(robots["paid"], zero)
    assert warns(robots["last"], zero, "the last actions that were left out")
    unpaid = planned(parquet(tmp_path / "a.parquet", steps(reward=0.0)))
    assert warns(unpaid, zero, "columns.reward=NAME")
    rows = each(steps(), reward=lambda row: float(row["terminated"]))
    assert not warns(planned(parquet(tmp_path / "b.parquet", rows)), zero)


def test_the_files_of_a_lerobot_folder_name_the_folder(tmp_path: Path) -> None:
    robot = lerobot(tmp_path / "robot", (5, 4), next_done=done)
    path = robot / "data" / "chunk-000" / "file-000.parquet"
    refused(rf"LeRobot folder itself, '{robot}', instead", path)


# -- Minari


def minari_dataset(name: str, episodes: list[tuple[Any, Any, Any, Any]], **facts: Any) -> None:
    """Write a dataset of (observations, actions, rewards, terminations)."""
    minari = pytest.importorskip("minari", reason="an extra")
    from minari.data_collector import EpisodeBuffer

    buffers = [
        EpisodeBuffer(None, k, None, *arrays, [False] * len(arrays[-1]), None)
        for k, arrays in enumerate(episodes)
    ]
    minari.create_dataset_from_buffers(name, buffers, **facts)


def test_a_minari_dataset(
    cart: Dataset, tmp_path: Path, import_logs: Import, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    episodes = [
        (e.observations, e.actions, list(e.rewards), list(e.terminated))
        for e in cart.iter_episodes()
    ]
    facts = {"observation_space": cart.observation_space, "action_space": cart.action_space}
    minari_dataset("cart-v0", episodes, **facts)
    result = import_logs("minari:cart-v0")
    back = Dataset([result.path])
    assert back.observation_space == cart.observation_space
    assert back.action_space == cart.action_space
    for one, other in zip(cart.iter_episodes(), back.iter_episodes(), strict=True):
        assert np.array_equal(one.observations, other.observations)
        assert np.array_equal(one.actions, other.actions) and one.outcome == other.outcome
    assert "of the dataset" in report(result)["columns"][0]["how"]
    refused("'minari:none-v0' is not on this machine; leave --dry-run out", "minari:none-v0")

    from minari.storage import remotes

    class Folder(remotes.CloudStorage):  # type: ignore[misc]
        """A hub that is a folder, whose downloads fail if it holds a file `broken`."""

        def __init__(self, name: str, token: str | None = None):
            self.at = tmp_path / name

        def list_datasets(self, prefix: str | None = None) -> list[str]:
            return [path.name for path in self.at.iterdir() if path.name.startswith(prefix or "")]

        def get_dataset_metadata(self, dataset_id: str) -> Any:
            return json.loads((self.at / dataset_id / "data" / "metadata.json").read_text())

        def download_dataset(self, dataset_id: str, path: Path) -> None:
            shutil.copytree(self.at / dataset_id, Path(path) / dataset_id)
            if (self.at / "broken").exists():
                raise OSError("connection reset")

        upload_dataset = upload_namespace = list_namespaces = download_namespace_metadata = None

    (tmp_path / "minari").rename(tmp_path / "hub")
    monkeypatch.setitem(remotes._registry, "folder", lambda: Folder)
    monkeypatch.setenv("MINARI_REMOTE", "folder://hub")
    (tmp_path / "hub" / "broken").touch()
    with pytest.raises(UsageError, match=r"'minari:cart-v0' .* folder://hub \(connection reset\)"):
        import_logs("minari:cart-v0")
    assert not (tmp_path / "minari" / "cart-v0").exists(), "an incomplete download stays"
    with pytest.raises(UsageError, match=r"'minari:none-v0' is not .*Couldn't find any version"):
        import_logs("minari:none-v0")
    (tmp_path / "hub" / "broken").unlink()
    assert import_logs("minari:cart-v0").id == result.id
    assert (tmp_path / "minari" / "cart-v0").is_dir()


def test_minari_episodes_of_wrong_lengths(
    tmp_path: Path, import_logs: Import, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    episodes = []
    for k, n in enumerate((6, 1, 5, 5, 5, 5, 5, 5)):
        observations = [np.array([t, k], np.float32) / 8 for t in range(n + 1)]
        actions, ended = [t % 2 for t in range(n)], [t == n - 1 for t in range(n)]
        episodes.append((observations, actions, [1.0] * n, ended))
    facts = {"observation_space": spaces.Box(-5.0, 5.0, (2,)), "action_space": spaces.Discrete(2)}
    minari_dataset("odd-v0", episodes, **facts)
    import h5py

    with h5py.File(tmp_path / "odd-v0" / "data" / "main_data.hdf5", "a") as store:
        for k, name, rows in ((0, "observations", 6), (4, "actions", 3)):
            values = store[f"episode_{k}"][name][:rows]
            del store[f"episode_{k}"][name]
            store[f"episode_{k}"][name] = values
        del store["episode_5"]["rewards"]
    name = "minari:odd-v0"
    refused(f"'{name}' row 1: .*observation must have 7 .* 6 rewards, got 6.* episode 0", name)
    (left,) = planned(name, bad="drop")["left out"]
    assert (left["reason"], left["episodes"]) == ("unreadable episode", 3)
    assert left["first"] == f"'{name}' row 1"
    dataset = Dataset([import_logs(name, bad="drop").path])
    lengths = {episode.index: len(episode) for episode in dataset.iter_episodes()}
    assert lengths == {1: 1, 2: 5, 3: 5, 6: 5, 7: 5}


# -- RLlib


@pytest.mark.slow
def test_episodes_that_rllib_recorded(folder: Path, import_logs: Import, ray_local: None) -> None:
    pytest.importorskip("msgpack_numpy", reason="RLlib records with it")
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.rllib.offline.offline_env_runner import OfflineSingleAgentEnvRunner

    config = PPOConfig().environment("CartPole-v1")
    config = config.env_runners(num_env_runners=0, batch_mode="complete_episodes")
    config = config.offline_data(output=str(folder), output_write_episodes=True)
    runner = OfflineSingleAgentEnvRunner(config=config, worker_index=0)
    recorded = runner.sample(num_episodes=3, random_actions=True)
    runner.stop()
    result = import_logs(folder, env="CartPole-v1")
    counts = result.meta["counts"]
    assert counts["episodes"] == len(recorded) >= 3
    assert counts["transitions"] == sum(map(len, recorded))
    imported = {
        episode.observations[0].tobytes(): episode
        for episode in Dataset([result.path]).iter_episodes()
    }
    for episode in recorded:
        copy = imported[episode.get_observations(0).tobytes()]
        assert np.array_equal(episode.get_observations(), copy.observations)
        assert np.array_equal(episode.get_actions(), copy.actions)
        assert np.array_equal(episode.get_rewards(), copy.rewards)
        assert copy.outcome == "terminated"
    assert "RLlib's module" in columns(report(result))["action"]["how"]
