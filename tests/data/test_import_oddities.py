"""Mistakes of loggers and oddities of file formats: each is named, and the rest is imported."""

from __future__ import annotations

import decimal
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gymnasium import spaces

from mesocosm.data.ingest.readers import files
from mesocosm.data.ingest.readers import parquet as parquet_reader
from mesocosm.data.ingest.sources import sources
from mesocosm.datasets.dataset import Dataset
from mesocosm.errors import UsageError
from mesocosm.jobs.import_logs import JOB, ImportConfig
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Artifact, Storage

Rows = list[dict[str, Any]]


@pytest.fixture
def import_logs(root: str, a_run: tracking.Run) -> Callable[..., Artifact]:
    def make(*paths: Path | str, **keys: Any) -> Artifact:
        config = configured(*paths, **keys)
        config.storage.root = root
        a_run.storage = Storage(root)
        return JOB.run(config, a_run)

    return make


def configured(*paths: Path | str, **keys: Any) -> ImportConfig:
    return ImportConfig(paths=[str(path) for path in paths], **{"workers": 0, **keys})


def logs(lengths: tuple[int, ...] = (4, 3, 5), **changes: Any) -> Rows:
    """Episodes that terminate. Every next observation is different."""
    return [
        {
            "episode": k,
            "step": t,
            "observation": [t / 2, k / 8],
            "action": t % 2,
            "reward": 1.0,
            "terminated": t == length - 1,
            "truncated": False,
            "next_observation": [(t + 1) / 2, k / 8],
            **changes,
        }
        for k, length in enumerate(lengths)
        for t in range(length)
    ]


def at(rows: Rows, episode: int, step: int) -> int:
    return next(i for i, row in enumerate(rows) if (row["episode"], row["step"]) == (episode, step))


def altered(k: int, t: int, **changes: Any) -> Rows:
    rows = logs()
    rows[at(rows, k, t)] |= changes
    return rows


def parquet(path: Path, rows: Rows, **types: pa.DataType) -> Path:
    table = pa.Table.from_pylist(rows)
    schema = pa.schema(
        [field.with_type(types.get(field.name, field.type)) for field in table.schema]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=5)
    return path


def warned(config: ImportConfig, *words: str) -> bool:
    return any(all(word in text for word in words) for text in JOB.plan(config).get("warnings", []))


# -- LeRobot


def lerobot(
    folder: Path, lengths: tuple[int, ...], **columns: Callable[[int, int, bool], Any]
) -> Path:
    """A folder of version 3. `columns` are functions of (episode, step, whether it is the last)."""
    (folder / "meta").mkdir(parents=True)
    (folder / "meta" / "info.json").write_text(json.dumps({"codebase_version": "v3.0", "fps": 10}))
    (folder / "data" / "chunk-000").mkdir(parents=True)
    rows = []
    for k, length in enumerate(lengths):
        for t in range(length):
            row = {
                "observation.state": [t / 2, float(k)],
                "action": [t / 4],
                "episode_index": k,
                "frame_index": t,
            }
            named = {name.replace("_", ".", 1): of for name, of in columns.items()}
            rows.append(row | {name: of(k, t, t == length - 1) for name, of in named.items()})
    pq.write_table(
        pa.Table.from_pylist(rows),
        folder / "data" / "chunk-000" / "file-000.parquet",
        row_group_size=3,
    )
    return folder


def described(config: ImportConfig, name: str) -> dict[str, str]:
    return next(row for row in JOB.plan(config)["columns"] if row["column"] == name)


def paid(k: int, t: int, last: bool) -> float:
    return float(t)


def done(k: int, t: int, last: bool) -> bool:
    return last


@pytest.mark.parametrize(
    ("lengths", "became"),
    [((5, 5, 5), "truncated"), ((5, 5, 4), "terminated"), ((5,), "terminated")],
)
def test_one_common_length_of_lerobot_is_a_time_limit(
    tmp_path: Path, lengths: tuple[int, ...], became: str
) -> None:
    config = configured(lerobot(tmp_path / "robot", lengths, next_done=done, next_reward=paid))
    row = described(config, "next.done")
    assert row["became"] == became and "guess" in row["how"]
    assert ("have 5 steps: a time limit" in row["how"]) == (became == "truncated")


def test_truncated_and_success_of_lerobot(
    tmp_path: Path, import_logs: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_reader, "BATCH_ROWS", 2)
    folder = lerobot(
        tmp_path / "robot",
        (5, 5, 5),
        next_done=done,
        next_truncated=lambda k, t, last: last and k == 1,
        next_success=lambda k, t, last: t == 2 and k == 2,
        next_reward=paid,
    )
    assert described(configured(folder), "next.done")["became"] == "terminated"
    dataset = Dataset([import_logs(folder).path])
    assert [episode.success for episode in dataset.iter_episodes()] == [False, False, True]
    table = next(source.head() for source in sources([str(folder)], fetch=False))
    ends = table.filter(table["next.done"])["episode_index"].to_pylist()
    assert ends == [0, 2], "what is truncated is not terminated"


def test_successes_of_lerobot_do_not_count_among_those_that_a_limit_ends(tmp_path: Path) -> None:
    folder = lerobot(
        tmp_path / "robot",
        (5, 3, 5),
        next_done=done,
        next_success=lambda k, t, last: last and k == 1,
    )
    row = described(configured(folder), "next.done")
    assert (
        row["became"] == "truncated"
        and "all 2 episodes that end without success have 5 steps" in row["how"]
    )


def test_the_states_of_lerobot(tmp_path: Path, import_logs: Callable[..., Artifact]) -> None:
    state = {
        "observation_environment_state": lambda k, t, last: [1.0, 2.0, float(t)],
        "observation_images.top": lambda k, t, last: b"x",
    }
    folder = lerobot(tmp_path / "robot", (5, 5), next_done=done, **state)
    assert described(configured(folder), "observation.images.top")["became"] == "nothing"
    dataset = Dataset([import_logs(folder).path])
    assert isinstance(dataset.observation_space, spaces.Dict)
    assert {key: box.shape for key, box in dataset.observation_space.items()} == {
        "state": (2,),
        "environment_state": (3,),
    }
    path = folder / "data" / "chunk-000" / "file-000.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["observation.state"]), path)
    assert Dataset([import_logs(folder).path]).observation_space.shape == (3,)


def test_rewards_that_are_all_0(tmp_path: Path) -> None:
    assert warned(
        configured(lerobot(tmp_path / "none", (5, 4), next_done=done)), "every reward is 0"
    )
    only_last = lerobot(
        tmp_path / "last", (5, 4), next_done=done, next_reward=lambda k, t, last: float(last)
    )
    assert warned(configured(only_last), "every reward is 0", "the last actions that were left out")
    assert not warned(
        configured(lerobot(tmp_path / "paid", (5, 4), next_done=done, next_reward=paid)),
        "every reward is 0",
    )
    assert warned(
        configured(parquet(tmp_path / "a.parquet", logs(reward=0.0))),
        "every reward is 0",
        "columns.reward=NAME",
    )
    rows = [{**row, "reward": float(row["terminated"])} for row in logs()]
    assert not warned(configured(parquet(tmp_path / "b.parquet", rows)), "every reward is 0")


def test_the_files_of_a_lerobot_folder_name_the_folder(tmp_path: Path) -> None:
    folder = lerobot(tmp_path / "robot", (5, 4), next_done=done)
    with pytest.raises(UsageError, match=rf"LeRobot folder itself, '{folder}', instead") as error:
        JOB.plan(configured(folder / "data" / "chunk-000" / "file-000.parquet"))
    assert "\n" not in str(error.value)


# -- Minari


def test_minari_episodes_of_wrong_lengths(
    tmp_path: Path, import_logs: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    minari = pytest.importorskip("minari", reason="an extra")
    import h5py
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    buffers = []
    for k in range(8):
        length = (6, 1, 5, 5, 5, 5, 5, 5)[k]
        observations = [np.array([t, k], np.float32) / 8 for t in range(length + 1)]
        ended = [t == length - 1 for t in range(length)]
        buffers.append(
            EpisodeBuffer(
                None,
                k,
                None,
                observations,
                [t % 2 for t in range(length)],
                [1.0] * length,
                ended,
                [False] * length,
                None,
            )
        )  # type: ignore[arg-type]
    minari.create_dataset_from_buffers(
        "odd-v0",
        buffers,
        observation_space=spaces.Box(-5.0, 5.0, (2,)),
        action_space=spaces.Discrete(2),
    )
    with h5py.File(tmp_path / "odd-v0" / "data" / "main_data.hdf5", "a") as store:
        for k, name, rows in ((0, "observations", 6), (4, "actions", 3)):
            values = store[f"episode_{k}"][name][:rows]
            del store[f"episode_{k}"][name]
            store[f"episode_{k}"][name] = values
        del store["episode_5"]["rewards"]
    with pytest.raises(
        UsageError,
        match=(r"'minari:odd-v0' row 1: .*observation must .* 7 .* 6 rewards, got 6.* episode 0"),
    ) as error:
        JOB.plan(configured("minari:odd-v0"))
    assert "\n" not in str(error.value)
    rest = JOB.plan(configured("minari:odd-v0", bad="drop"))
    assert [(row["reason"], row["episodes"], row["first"]) for row in rest["left out"]] == [
        ("unreadable episode", 3, "'minari:odd-v0' row 1")
    ]
    result = Dataset([import_logs("minari:odd-v0", bad="drop").path])
    assert [(e.index, len(e)) for e in result.iter_episodes()] == [
        (1, 1),
        (2, 5),
        (3, 5),
        (6, 5),
        (7, 5),
    ]


# -- Parquet

NOTHING: dict[str, Any] = dict.fromkeys(logs()[0])
FIXED = {"observation": pa.list_(pa.float32(), 2), "next_observation": pa.list_(pa.float32(), 2)}
ODD: dict[str, tuple[Rows, dict[str, pa.DataType], str]] = {
    "null row": (
        [*logs()[:5], NOTHING, *logs()[5:]],
        {},
        "row 6: episode is missing in a row beside episode 1",
    ),
    "null episode": (
        altered(1, 1, episode=None),
        {},
        "row 6: episode is missing in a row beside episode 1",
    ),
    "null step": (altered(1, 1, step=None), {}, "row 6: step is missing in a row of episode 1"),
    "null first step": (
        altered(1, 0, step=None),
        {},
        "row 5: step is missing in a row of episode 1",
    ),
    "null fixed-size list": (
        altered(1, 1, observation=None),
        FIXED,
        "row 6: observation is missing at step 1 of episode 1",
    ),
    "null in a fixed-size list": (
        altered(1, 1, observation=[None, 1.0]),
        FIXED,
        "row 6: observation is missing at step 1 of episode 1",
    ),
    "null decimal": (
        [
            {**row, "reward": None if i == 5 else decimal.Decimal("0.5")}
            for i, row in enumerate(logs())
        ],
        {"reward": pa.decimal128(5, 2)},
        "row 6: reward is missing at step 1 of episode 1",
    ),
    "negative duration": (
        [{**row, "duration": -1.0 if i == 5 else 1.0} for i, row in enumerate(logs())],
        {},
        "row 6: duration .* got -1 at step 1 of episode 1",
    ),
    "huge observation": (
        altered(1, 1, observation=[0.5, 1e300]),
        {},
        r"row 6: observation\[1\] .*float32.* got 1e\+300 at step 1 of episode 1; rescale it",
    ),
    "huge reward": (
        altered(1, 1, reward=-1e39),
        {},
        r"row 6: reward .*float32.* got -1e\+39 at step 1 of episode 1; rescale it",
    ),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("batch", [2, 1 << 14])
def test_an_odd_row_of_parquet_is_named_or_its_episode_dropped(
    name: str, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_reader, "BATCH_ROWS", batch)
    rows, types, message = ODD[name]
    path = parquet(tmp_path / "odd.parquet", rows, **types)
    with pytest.raises(UsageError, match=message) as error:
        JOB.plan(configured(path))
    assert "odd.parquet' row" in str(error.value) and "\n" not in str(error.value)
    rest = JOB.plan(configured(path, bad="drop"))
    assert rest["episodes left out"] == 1 and rest["episodes"] == 2 and rest["transitions"] == 9


def test_types_of_parquet_that_mean_the_same(
    tmp_path: Path, import_logs: Callable[..., Artifact]
) -> None:
    half = decimal.Decimal("0.50")
    rows = [
        {
            **row,
            "episode": f"e{row['episode']}",
            "behaviour": "ab"[row["episode"] % 2],
            "reward": half,
            "task": {"side": "left"},
            "observation": [half, half * row["step"]],
        }
        for row in logs(next_observation=None)
    ]
    rows = [{key: value for key, value in row.items() if key != "next_observation"} for row in rows]
    text = pa.dictionary(pa.int32(), pa.string())
    types = {
        "episode": text,
        "behaviour": text,
        "reward": pa.decimal128(6, 2),
        "task": pa.struct([("side", text)]),
        "observation": pa.list_(pa.decimal256(40, 2), 2),
    }
    columns = {name: pa.array([row[name] for row in rows]) for name in rows[0]}
    plain = pa.table(columns)
    side = pa.StructArray.from_arrays(
        [plain["task"].combine_chunks().field(0).dictionary_encode()], ["side"]
    )
    cast = {
        name: (
            side
            if name == "task"
            else plain[name].cast(types[name])
            if name in types
            else plain[name]
        )
        for name in plain.column_names
    }
    pq.write_table(pa.table(cast), tmp_path / "odd.parquet")
    pq.write_table(
        plain.set_column(4, "reward", plain["reward"].cast(pa.float64())),
        tmp_path / "plain.parquet",
    )
    odd = Dataset([import_logs(tmp_path / "odd.parquet").path])
    assert {episode.behaviour for episode in odd.iter_episodes()} == {"a", "b"} and odd.episode(
        0
    ).task == {"side": "left"}
    assert odd.episode(0).rewards.tolist() == [0.5] * 3 and odd.episode(0).observations[
        2
    ].tolist() == [0.5, 1.0]


def test_a_vector_of_one_flattened_column(
    tmp_path: Path, import_logs: Callable[..., Artifact]
) -> None:
    rows = [
        {**row, "observation.0": row["step"] / 2, "next_observation.0": (row["step"] + 1) / 2}
        for row in logs()
    ]
    for row in rows:
        del row["observation"], row["next_observation"]
    dataset = Dataset([import_logs(parquet(tmp_path / "a.parquet", rows)).path])
    assert dataset.observation_space.shape == (1,)
    assert np.concatenate(dataset.episode(1).observations).tolist() == [0.0, 0.5, 1.0, 1.5]


def test_episodes_of_one_row_that_lead_nowhere(tmp_path: Path) -> None:
    rows = [
        {key: value for key, value in row.items() if key != "next_observation"}
        for row in logs((1, 1))
    ]
    with pytest.raises(
        UsageError, match="each of the 2 has one row, and nothing says what its action led to"
    ):
        JOB.plan(configured(parquet(tmp_path / "a.parquet", rows)))
    assert JOB.plan(configured(parquet(tmp_path / "b.parquet", logs((1, 1)))))["transitions"] == 2


def test_huge_values_of_a_task(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", logs(task={"mass": 1e300}))
    with pytest.raises(
        UsageError, match=(r"row 1: task.mass .*float32.* got 1e\+300 at step 0 of episode 0")
    ):
        JOB.plan(configured(path))


# -- mistakes of loggers


@pytest.mark.parametrize("batch", [1, 2, 1 << 14])
@pytest.mark.parametrize("form", ["next", "last row"])
def test_known_mistakes_are_named(
    form: str, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_reader, "BATCH_ROWS", batch)

    def path(name: str, last: Callable[[dict[str, Any]], Any], but: int = -1) -> Path:
        rows = [
            row
            | (
                {"next_observation": last(row)}
                if row["terminated"] and row["episode"] != but
                else {}
            )
            for row in logs()
        ]
        if form == "last row":
            ends = {row["episode"]: row["next_observation"] for row in rows if row["terminated"]}
            kept = ("episode", "step", "observation", "action", "reward", "terminated", "truncated")
            rows = [{key: row[key] for key in kept} for row in rows]
            nothing = dict.fromkeys(kept)
            result = []
            for k, end in ends.items():
                rows_of_episode = [row for row in rows if row["episode"] == k]
                result += [
                    *rows_of_episode,
                    nothing | {"episode": k, "step": len(rows_of_episode), "observation": end},
                ]
            rows = result
        return parquet(tmp_path / f"{name}.parquet", rows)

    def same(row: dict[str, Any]) -> Any:
        return row["observation"]

    def following(row: dict[str, Any]) -> Any:
        return [0.0, (row["episode"] + 1) / 8]

    repeats, restarts = (
        ("equals the observation before it", "twice"),
        ("first observation of the next episode", "SAME_STEP", "final_obs"),
    )
    assert warned(configured(path("same", same)), *repeats) and not warned(
        configured(path("same", same)), *restarts
    )
    assert warned(configured(path("next", following)), *restarts) and not warned(
        configured(path("next", following)), *repeats
    )
    for name, mistake, words in (("a", same, repeats), ("b", following, restarts)):
        assert not warned(configured(path(name, mistake, but=1)), *words), "not in every episode"
    good = configured(parquet(tmp_path / "good.parquet", logs()))
    assert not warned(good, *repeats) and not warned(good, *restarts)
    still = configured(
        parquet(
            tmp_path / "still.parquet", logs(observation=[1.0, 1.0], next_observation=[1.0, 1.0])
        )
    )
    assert not warned(still, *repeats) and not warned(still, *restarts), (
        "an observation that never changes"
    )


def test_a_next_observation_that_repeats_every_observation_is_named(tmp_path: Path) -> None:
    rows = [{**row, "next_observation": row["observation"]} for row in logs()]
    with pytest.raises(
        UsageError,
        match="row 1: next_observation at step 0 of episode 0 repeats the observation of that step",
    ):
        JOB.plan(configured(parquet(tmp_path / "a.parquet", rows)))


# -- order


def test_numbers_in_names_are_sorted_by_value(
    tmp_path: Path, import_logs: Callable[..., Artifact]
) -> None:
    names = [f"part-{i}.parquet" for i in range(12)]
    assert files.sorted_naturally(sorted(names)) == names
    assert files.sorted_naturally(["b/1", "a/10", "a/2", "a/02", "a/x"]) == [
        "a/02",
        "a/2",
        "a/10",
        "a/x",
        "b/1",
    ]
    (tmp_path / "logs").mkdir()
    rows = logs((12, 12))
    for i, name in enumerate(names):  # episodes lie across files
        parquet(tmp_path / "logs" / name, rows[2 * i : 2 * i + 2])
    folder = tmp_path / "logs"
    as_a_shell_gives_them = sorted(str(path) for path in folder.iterdir())
    result = [
        import_logs(folder),
        import_logs(folder / "*.parquet"),
        import_logs(*as_a_shell_gives_them),
    ]
    assert (
        len({artifact.id for artifact in result}) == 1 and result[0].meta["counts"]["episodes"] == 2
    )
    with pytest.raises(UsageError, match=r"part-9.parquet' row 1: episode 1 begins at step 6"):
        JOB.plan(configured(*reversed(as_a_shell_gives_them)))
