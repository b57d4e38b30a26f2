"""Importing: exports come back, faults are named by file and row, and the bytes never differ."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from factories import SMALL_WORLD
from gymnasium import spaces

from mesocosm.cli.main import main
from mesocosm.data.ingest.readers import jsonl as jsonl_reader
from mesocosm.data.ingest.readers import parquet as parquet_reader
from mesocosm.data.parallel import ordered
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.manifest import Manifest
from mesocosm.datasets.writer import DatasetWriter
from mesocosm.errors import UsageError
from mesocosm.jobs.import_logs import JOB, ImportConfig
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Artifact, Storage

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def cart(tmp_path_factory: pytest.TempPathFactory, cart_root: Callable[..., str]) -> Dataset:
    """400 transitions of CartPole-v1 and more, by a random policy."""
    return Dataset(
        [Storage(cart_root(tmp_path_factory.mktemp("cart"))).artifact("datasets", "cart").path]
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of logs alone."""
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs"


@pytest.fixture
def import_logs(root: str, a_run: tracking.Run) -> Callable[..., Artifact]:
    """`import_logs(path, ..., key=value)` imports, in this process by default."""

    def make(*paths: Path, env: str = "", to: str = root, **keys: Any) -> Artifact:
        config = configured(paths, env, **keys)
        config.storage.root = to
        a_run.storage = Storage(to)
        return JOB.run(config, a_run)

    return make


def configured(paths: Sequence[Path | str], env: str = "", **keys: Any) -> ImportConfig:
    config = ImportConfig(paths=[str(path) for path in paths], **{"workers": 0, **keys})
    config.reality.env = env
    return config


def exported(dataset: Dataset) -> Rows:
    return pq.read_table(dataset.paths[0] / "episodes").to_pylist()


def parquet(path: Path, rows: Rows, **options: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def jsonl(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def moves(rows: Rows) -> Rows:
    """One row a transition, with what followed."""
    return [
        {**row, "next_observation": after["observation"]}
        for row, after in itertools.pairwise(rows)
        if row["action"] is not None
    ]


def same(a: Dataset, b: Dataset) -> None:
    assert len(a.table) == len(b.table)
    for one, other in zip(a.iter_episodes(), b.iter_episodes(), strict=True):
        assert (one.index, one.behaviour, one.outcome, one.success) == (
            other.index,
            other.behaviour,
            other.outcome,
            other.success,
        )
        assert np.array_equal(one.observations, other.observations) and np.array_equal(
            one.actions, other.actions
        )
        assert np.array_equal(one.rewards, other.rewards)


def checksums(artifact: Artifact) -> dict[str, Any]:
    return json.loads((artifact.path / "COMMIT.json").read_text())["files"]


def line(*keys: Any, **changes: Any) -> dict[str, Any]:
    episode, step = keys
    return {
        "episode": episode,
        "step": step,
        "observation": [float(step), 0.5],
        "action": step % 2,
        "reward": 1.0,
        "terminated": False,
        "truncated": False,
        **changes,
    }


def ends(episode: int, step: int) -> dict[str, Any]:
    return line(episode, step, action=None, reward=None, terminated=None, truncated=None)


def logs(episodes: int = 3, length: int = 4) -> Rows:
    """Episodes that terminate, each with a last row that is an observation alone."""
    return [
        row
        for k in range(episodes)
        for row in [
            *(line(k, t, terminated=t == length - 1) for t in range(length)),
            ends(k, length),
        ]
    ]


# -- imports


def test_a_collected_dataset_is_imported_from_its_export(
    cart: Dataset, import_logs: Callable[..., Artifact], golden: Any
) -> None:
    result = import_logs(cart.paths[0] / "episodes", env="CartPole-v1")
    back = Dataset([result.path])
    same(cart, back)
    golden.check("import", {"shards": golden.of_shards(result.path)})
    assert (
        back.manifests[0].environment.id == "CartPole-v1"
        and back.environment.max_episode_steps == 500
        and back.environment.version == ""
    )
    assert (back.observation_space, back.action_space) == (
        cart.observation_space,
        cart.action_space,
    )
    assert np.array_equal(back.table["seed"], cart.table["seed"]) and np.array_equal(
        back.table["split"], cart.table["split"]
    )
    assert (
        result.meta["counts"]["transitions"] == cart.transitions
        and result.meta["job"] == "import"
        and "ledger" not in result.meta
    )
    report = json.loads((result.path / "import.json").read_text())
    assert (
        report["left_out"] == []
        and {"column": "action", "type": "int64", "became": "action: Discrete(2)"}.items()
        <= report["columns"][1].items()
    )
    again = import_logs(cart.paths[0] / "episodes", env="CartPole-v1")
    assert again.id == result.id
    assert import_logs(cart.paths[0] / "episodes", env="CartPole-v1", force=True).id == result.id


@pytest.mark.parametrize("form", ["jsonl", "next", "flat", "struct"])
@pytest.mark.parametrize("batch", [5, 1 << 14])
def test_every_form_of_the_schema_gives_the_same_dataset(
    form: str,
    batch: int,
    cart: Dataset,
    tmp_path: Path,
    import_logs: Callable[..., Artifact],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parquet_reader, "BATCH_ROWS", batch)
    monkeypatch.setattr(jsonl_reader, "BATCH_ROWS", batch)
    monkeypatch.setattr(jsonl_reader, "PIECE_BYTES", 100 * batch)
    rows = exported(cart)
    if form == "jsonl":
        path = jsonl(tmp_path / "a.jsonl", rows)
    elif form == "next":
        path = parquet(tmp_path / "a.parquet", moves(rows))
    else:
        rows = [
            {
                **{k: v for k, v in row.items() if k != "observation"},
                **{f"observation.{i}": x for i, x in enumerate(row["observation"])},
            }
            for row in rows
        ]
        path = parquet(tmp_path / "a.parquet", rows)
        if form == "struct":
            rows = [
                {
                    **{k: v for k, v in row.items() if "." not in k},
                    "observation": {
                        "cart": [row["observation.0"], row["observation.1"]],
                        "pole": row["observation.2"],
                    },
                }
                for row in rows
            ]
            path = parquet(tmp_path / "b.parquet", rows)
    result = import_logs(path, env="" if form == "struct" else "CartPole-v1")
    if form != "struct":
        same(cart, Dataset([result.path]))
        return
    back = Dataset([result.path])
    assert (
        isinstance(back.observation_space, spaces.Dict)
        and back.observation_space["cart"].shape == (2,)
        and back.observation_space["pole"].shape == ()
    )
    for one, other in zip(cart.iter_episodes(), back.iter_episodes(), strict=True):
        assert all(
            a[0] == b["cart"][0] and a[2] == b["pole"]
            for a, b in zip(one.observations, other.observations, strict=True)
        )


def test_everything_optional(tmp_path: Path, import_logs: Callable[..., Artifact]) -> None:
    rows = [
        {
            **row,
            "behaviour": f"b{row['episode'] % 2}",
            "task": {"mass": row["episode"] / 2, "side": "left"},
            "duration": 0.25,
            "seed": 7,
            "success": True,
        }
        for row in logs(6)
    ]
    result = import_logs(jsonl(tmp_path / "a.jsonl", rows))
    manifest = Manifest.read(result.path)
    assert (
        manifest.environment.task == ["mass", "side"]
        and [o.values for o in manifest.task_options] == [None, ["left"]]
        and manifest.durations
    )
    assert {b.name: b.episodes for b in manifest.behaviours} == {"b0": 3, "b1": 3}
    episode = Dataset([result.path]).episode(3)
    assert (
        episode.task == {"mass": 1.5, "side": "left"}
        and episode.seed == 7
        and episode.success
        and episode.durations is not None
    )
    assert episode.durations.tolist() == [0.25] * 4


def test_inferred_spaces_are_called_guesses(
    tmp_path: Path, import_logs: Callable[..., Artifact]
) -> None:
    rows = []
    for row in logs(5):
        step, acted = row["step"], row["action"] is not None
        observation = {
            "pose": [step / 8, -1.0],
            "count": -step,
            "word": "ab"[: step % 3],
            "lit": step % 2 == 0,
            "mode": step % 3,
        }
        rows.append(
            {
                **row,
                "observation": observation,
                "action": {"push": step / 2, "keys": [step % 2, step]} if acted else None,
                "note": "x",
            }
        )
    result = import_logs(jsonl(tmp_path / "a.jsonl", rows))
    dataset = Dataset([result.path])
    seen, done = dataset.observation_space, dataset.action_space
    assert isinstance(seen, spaces.Dict) and isinstance(done, spaces.Dict)
    assert seen["pose"] == spaces.Box(-np.inf, np.inf, (2,), np.float64) and seen[
        "mode"
    ] == spaces.Discrete(3)
    assert (
        isinstance(seen["count"], spaces.Box)
        and seen["count"].dtype == np.int64
        and seen["lit"] == spaces.Discrete(2)
    )
    assert (
        isinstance(seen["word"], spaces.Text)
        and seen["word"].character_set == {"a", "b"}
        and seen["word"].max_length == 2
    )
    assert done["push"] == spaces.Box(0.0, 1.5, (), np.float64) and done[
        "keys"
    ] == spaces.MultiDiscrete([2, 4])
    table = {
        row["column"]: row
        for row in json.loads((result.path / "import.json").read_text())["columns"]
    }
    assert table["note"]["became"] == "nothing" and "unknown" in table["note"]["how"]
    assert (
        "guess" in table["observation.mode"]["how"]
        and "guess" in table["action.push"]["how"]
        and "missing" in table["behaviour"]["how"]
    )
    first = dataset.episode(0).observations[1]
    assert first["word"] == "a" and first["count"] == -1 and first["lit"] == 0


def test_ends_that_are_missing(tmp_path: Path, import_logs: Callable[..., Artifact]) -> None:
    without = [row for row in logs() if row["action"] is not None]
    result = import_logs(parquet(tmp_path / "a.parquet", without))
    counts = result.meta["counts"]
    assert (
        counts["last_actions_left_out"] == 3
        and counts["transitions"] == 9
        and counts["outcomes"] == {"terminated": 0, "truncated": 0, "unfinished": 3}
    )
    warnings = json.loads((result.path / "import.json").read_text())["warnings"]
    assert "lost their last action" in warnings[0] and "never ends" in warnings[1]
    never = [{**row, "terminated": None if row["action"] is None else False} for row in logs()]
    assert (
        import_logs(parquet(tmp_path / "b.parquet", never)).meta["counts"]["outcomes"]["unfinished"]
        == 3
    )
    cut = [
        {
            **row,
            "terminated": row["terminated"] and row["episode"] == 0,
            "truncated": row["terminated"] and row["episode"] == 1,
        }
        for row in moves(logs())
    ]
    outcomes = import_logs(parquet(tmp_path / "c.parquet", cut)).meta["counts"]["outcomes"]
    assert outcomes == {"terminated": 1, "truncated": 1, "unfinished": 1}


def test_files_that_number_their_own_episodes(
    folder: Path, import_logs: Callable[..., Artifact]
) -> None:
    paths = [parquet(folder / f"{i}.parquet", logs(2)) for i in range(3)]
    with pytest.raises(
        UsageError, match=r"1.parquet' row 1: episode 0 comes again .*per_file=true"
    ):
        JOB.plan(configured(paths))
    assert import_logs(folder, per_file=True).meta["counts"]["episodes"] == 6
    for i in range(3):
        parquet(
            folder / f"{i}.parquet",
            [{k: v for k, v in row.items() if k != "episode"} for row in logs(1)],
        )
    with pytest.raises(UsageError, match=r"no column 'episode'.*per_file=true"):
        JOB.plan(configured(paths))
    result = import_logs(folder, per_file=True)
    assert [e.index for e in Dataset([result.path]).iter_episodes()] == [0, 1, 2]


def test_episodes_beyond_the_limit_give_a_warning(tmp_path: Path) -> None:
    config = configured([parquet(tmp_path / "a.parquet", logs())])
    for horizon, warns in ((4, False), (3, True)):
        config.reality.horizon = horizon
        warnings = JOB.plan(config).get("warnings", [])
        assert any("longest episode has 4 steps" in text for text in warnings) == warns


def test_columns_with_other_names(tmp_path: Path, import_logs: Callable[..., Artifact]) -> None:
    rows = [
        {{"observation": "obs", "terminated": "done"}.get(k, k): v for k, v in row.items()}
        | {"episode": f"run-{row['episode']}"}
        for row in logs()
    ]
    path = jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(
        UsageError,
        match=(
            r"no column 'observation', which is required .it has episode, step,"
            r" obs.*columns.observation=NAME"
        ),
    ):
        JOB.plan(configured([path]))
    result = import_logs(path, columns={"observation": "obs", "terminated": "done"})
    assert result.meta["counts"]["transitions"] == 12 and [
        e.index for e in Dataset([result.path]).iter_episodes()
    ] == [0, 1, 2]


def test_a_lerobot_folder(folder: Path, import_logs: Callable[..., Artifact]) -> None:
    (folder / "meta").mkdir()
    (folder / "data" / "chunk-000").mkdir(parents=True)
    (folder / "meta" / "info.json").write_text(json.dumps({"codebase_version": "v3.0", "fps": 10}))
    for i in range(2):
        rows = [
            {
                "observation.state": [t / 2, float(k)],
                "action": [t / 4],
                "episode_index": k,
                "frame_index": t,
                "timestamp": t / 10,
                "next.done": t == 4,
            }
            for k in (2 * i, 2 * i + 1)
            for t in range(5)
        ]
        parquet(folder / "data" / "chunk-000" / f"file-{i:03d}.parquet", rows)
    result = import_logs(folder)
    dataset = Dataset([result.path])
    assert (
        result.meta["counts"]["episodes"] == 4
        and result.meta["counts"]["last_actions_left_out"] == 4
    )
    assert dataset.episode(3).observations[2].tolist() == [1.0, 3.0] and dataset.episode(3).actions[
        2
    ].tolist() == [0.5]
    table = {
        row["column"]: row
        for row in json.loads((result.path / "import.json").read_text())["columns"]
    }
    assert (
        "0 throughout" in table["reward"]["how"]
        and table["next.done"]["became"] == "truncated"
        and table["timestamp"]["became"] == "nothing"
    )
    (folder / "meta" / "info.json").write_text(json.dumps({"codebase_version": "v2.1"}))
    with pytest.raises(UsageError, match=r"LeRobot folder of version v3, got v2.1"):
        JOB.plan(configured([folder]))


def test_a_minari_dataset(
    cart: Dataset,
    tmp_path: Path,
    import_logs: Callable[..., Artifact],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    minari = pytest.importorskip("minari", reason="an extra")
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    buffers = []
    for episode in cart.iter_episodes():
        ended = episode.terminated
        buffers.append(
            EpisodeBuffer(
                None,
                0,
                None,
                episode.observations,
                episode.actions,
                list(episode.rewards),
                list(ended),
                [False] * len(ended),
                None,
            )
        )  # type: ignore[arg-type]
    minari.create_dataset_from_buffers(
        "cart-v0", buffers, observation_space=cart.observation_space, action_space=cart.action_space
    )
    result = import_logs(Path("minari:cart-v0"))
    back = Dataset([result.path])
    assert (
        len(back.table) == len(cart.table)
        and back.observation_space == cart.observation_space
        and back.action_space == cart.action_space
    )
    for one, other in zip(cart.iter_episodes(), back.iter_episodes(), strict=True):
        assert (
            np.array_equal(one.observations, other.observations)
            and np.array_equal(one.actions, other.actions)
            and one.outcome == other.outcome
        )
    assert (
        "of the dataset"
        in json.loads((result.path / "import.json").read_text())["columns"][0]["how"]
    )
    with pytest.raises(
        UsageError, match="'minari:none-v0' is not on this machine; leave --dry-run out"
    ):
        JOB.plan(configured(["minari:none-v0"]))

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
    with pytest.raises(
        UsageError,
        match=(r"'minari:cart-v0' is not on this machine .* folder://hub \(connection reset\)"),
    ):
        import_logs(Path("minari:cart-v0"))
    assert not (tmp_path / "minari" / "cart-v0").exists(), "an incomplete download stays"
    with pytest.raises(UsageError, match=r"'minari:none-v0' is not .*Couldn't find any version"):
        import_logs(Path("minari:none-v0"))
    (tmp_path / "hub" / "broken").unlink()
    assert (
        import_logs(Path("minari:cart-v0")).id == result.id
        and (tmp_path / "minari" / "cart-v0").is_dir()
    )


@pytest.mark.slow
def test_episodes_that_rllib_recorded(
    folder: Path, import_logs: Callable[..., Artifact], ray_local: None
) -> None:
    pytest.importorskip("msgpack_numpy", reason="RLlib records with it")
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.rllib.offline.offline_env_runner import OfflineSingleAgentEnvRunner

    config = (
        PPOConfig()
        .environment("CartPole-v1")
        .env_runners(num_env_runners=0, batch_mode="complete_episodes")
    )
    runner = OfflineSingleAgentEnvRunner(
        config=config.offline_data(output=str(folder), output_write_episodes=True), worker_index=0
    )
    recorded = runner.sample(num_episodes=3, random_actions=True)
    runner.stop()
    result = import_logs(folder, env="CartPole-v1")
    assert result.meta["counts"]["episodes"] == len(recorded) >= 3 and result.meta["counts"][
        "transitions"
    ] == sum(map(len, recorded))
    back = {
        episode.observations[0].tobytes(): episode
        for episode in Dataset([result.path]).iter_episodes()
    }
    for episode in recorded:
        imported = back[episode.get_observations(0).tobytes()]
        assert np.array_equal(episode.get_observations(), imported.observations) and np.array_equal(
            episode.get_actions(), imported.actions
        )
        assert (
            np.array_equal(episode.get_rewards(), imported.rewards)
            and imported.outcome == "terminated"
        )
    assert (
        "RLlib's module"
        in json.loads((result.path / "import.json").read_text())["columns"][1]["how"]
    )


# -- faults


def changed(row: int, **changes: Any) -> Rows:
    rows = logs()
    rows[row] = {**rows[row], **changes}
    return rows


BAD: dict[str, tuple[Rows, str]] = {
    "nan": (
        changed(6, observation=[float("nan"), 0.0]),
        "row 7: .*observation.* finite, got nan at step 1 of episode 1",
    ),
    "reward inf": (
        changed(6, reward=float("inf")),
        "row 7: reward .* finite, got inf at step 1 of episode 1",
    ),
    "duplicate": (changed(6, step=0), "row 7: step 0 of episode 1 comes twice"),
    "gap": (changed(6, step=3), "row 7: episode 1 goes from step 0 to step 3"),
    "unsorted": (changed(7, step=0), "row 8: step 0 of episode 1 comes after its step 1; sort"),
    "late start": (logs()[:5] + logs()[6:], "row 6: episode 1 begins at step 1"),
    "comes again": ([*logs(), line(0, 0)], "row 16: episode 0 comes again"),
    "goes on": (changed(6, truncated=True), "row 8: episode 1 has ended at step 1"),
    "no action": (
        changed(6, action=None, reward=None, terminated=None, truncated=None),
        "row 7: action is missing at step 1 of episode 1, which goes on",
    ),
    "no observation": (changed(6, observation=None), "row 7: observation is missing at step 1"),
    "no reward": (changed(6, reward=None), "row 7: reward is missing at step 1"),
    "shape": (changed(6, observation=[1.0]), r"row 7: observation .* shape \(2,\) at step 1"),
    "negative": (
        [{**row, "episode": row["episode"] - 1} for row in logs()],
        "row 1: episode -1 is negative",
    ),
    "behaviour": (
        [{**row, "behaviour": "ab"[i == 6]} for i, row in enumerate(logs())],
        "row 7: behaviour of episode 1 changes from 'a' to 'b'",
    ),
    "task": (
        [{**row, "task": {"m": int(i == 6)}} for i, row in enumerate(logs())],
        "row 7: task of episode 1 changes",
    ),
    "next": (
        [
            {**row, "next_observation": [9.0, 9.0] if i == 5 else row["next_observation"]}
            for i, row in enumerate(moves(logs()))
        ],
        "row 6: next_observation at step 1 of episode 1 is not the observation of step 2",
    ),
    "half a duration": (
        [{**row, "duration": None if i == 6 else 1.0} for i, row in enumerate(logs())],
        "row 7: duration is missing",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize("batch", [1, 3, 1 << 14])
def test_bad_rows_are_named(
    name: str, form: str, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_reader, "BATCH_ROWS", batch)
    monkeypatch.setattr(jsonl_reader, "BATCH_ROWS", batch)
    rows, message = BAD[name]
    path = (
        parquet(tmp_path / "bad.parquet", rows, row_group_size=4)
        if form == "parquet"
        else jsonl(tmp_path / "bad.jsonl", rows)
    )
    with pytest.raises(UsageError, match=message) as error:
        JOB.plan(configured([path]))
    assert f"bad.{form}' row" in str(error.value) and "\n" not in str(error.value)
    rest = JOB.plan(configured([path], bad="drop"))
    assert rest["left out"][0]["episodes"] >= 1 and rest["episodes"] >= 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"observation": "a"},
            "row 7: observation is a string where it was a list before .mixed dtypes",
        ),
        ({"observation": [1.0, True]}, "row 7: observation is true or false where it was a number"),
        ({"action": 2**70}, "row 7: action holds an integer beyond 64 bits"),
        ({"episode": None}, "row 7: episode is missing"),
        ({"step": 1.5}, "row 7: step .* got 1.5"),
        ({"reward": "much"}, "row 7: reward is a string where it was a number"),
    ],
)
def test_mixed_kinds_in_json(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        JOB.plan(configured([jsonl(tmp_path / "a.jsonl", changed(6, **row))]))


def test_mixed_kinds_far_into_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl_reader, "BATCH_ROWS", 6)
    monkeypatch.setattr(jsonl_reader, "HEAD_ROWS", 6)
    monkeypatch.setattr(jsonl_reader, "PIECE_BYTES", 300)
    for change, message in (
        ({"episode": "2"}, "row 13: episode is .* where it .* before .mixed dtypes"),
        ({"observation": "a"}, "row 13: observation is .* where it .* before .mixed dtypes"),
        ({"behaviour": 3}, "row 13: behaviour is .*mixed dtypes"),
        ({"observation": [0.0, float("inf")]}, "row 13: observation.1. .* got inf"),
        ({"step": 7}, "row 13: episode 2 goes from step 1 to step 7"),
    ):
        rows = [{**row, "behaviour": "a"} for row in logs()]
        with pytest.raises(UsageError, match=message):
            JOB.plan(
                configured(
                    [
                        jsonl(
                            tmp_path / "a.jsonl",
                            [{**row, **change} if i == 12 else row for i, row in enumerate(rows)],
                        )
                    ]
                )
            )


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_the_faulty_row_is_named_and_not_the_one_before(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl_reader, "BATCH_ROWS", size)
    nan, rows = [float("nan"), 0.0], moves(logs())
    row = next(i for i, r in enumerate(rows) if (r["episode"], r["step"]) == (1, 1))
    for change, message in (
        ({"observation": nan}, "observation.0."),
        ({"next_observation": nan}, "next_observation.0."),
    ):
        changed = [{**r, **change} if i == row else r for i, r in enumerate(rows)]
        path = jsonl(tmp_path / "a.jsonl", changed)
        with pytest.raises(
            UsageError, match=f"row {row + 1}: {message} .* got nan at step 1 of episode 1"
        ):
            JOB.plan(configured([path]))
        (left,) = JOB.plan(configured([path], bad="drop"))["left out"]
        assert (left["reason"], left["episodes"]) == ("not finite", 1)


def test_lines_that_are_not_objects(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", logs())
    for bad, message in (
        ("{", "row 16: the line is not JSON"),
        ("[1]", "row 16: the line holds a list"),
        ("\n{}", "row 16: the line is empty"),
    ):
        (tmp_path / "b.jsonl").write_text(path.read_text() + bad + "\n")
        with pytest.raises(UsageError, match=message):
            JOB.plan(configured([tmp_path / "b.jsonl"]))
    path.write_text(path.read_text() + "\n\n")
    assert JOB.plan(configured([path]))["transitions"] == 12


def test_files_that_differ(tmp_path: Path) -> None:
    later = [{**row, "episode": row["episode"] + 3} for row in logs()]
    a = parquet(tmp_path / "a.parquet", logs())
    b = parquet(tmp_path / "b.parquet", [{**row, "observation": [0, 1]} for row in later])
    with pytest.raises(
        UsageError,
        match=(
            r"column 'observation' is list<.*double> in '.*a.parquet' and list<.*int64> in"
            r" '.*b.parquet' \(mixed dtypes\)"
        ),
    ):
        JOB.plan(configured([a, b]))
    c = parquet(
        tmp_path / "c.parquet", [{k: v for k, v in row.items() if k != "reward"} for row in later]
    )
    with pytest.raises(
        UsageError, match=r"c.parquet' has no column 'reward', which '.*a.parquet' has"
    ):
        JOB.plan(configured([a, c]))
    d = parquet(tmp_path / "d.parquet", [{**row, "extra": 1} for row in later])
    assert (
        next(row for row in JOB.plan(configured([a, d]))["columns"] if row["column"] == "extra")[
            "became"
        ]
        == "nothing"
    )
    (tmp_path / "e.parquet").write_bytes(b"PAR1 not at all")
    with pytest.raises(UsageError, match=r"e.parquet' cannot be read as Parquet"):
        JOB.plan(configured([a, tmp_path / "e.parquet"]))


def test_every_value_is_checked_against_the_environment(cart: Dataset, tmp_path: Path) -> None:
    rows = exported(cart)
    half = next(i for i, row in enumerate(rows) if row["episode"] == 1)
    for change, message in (
        ({"action": 2}, r"row 3: action .* Discrete\(2\), got 2 at step 2 of episode 0"),
        (
            {"observation": [9.0, 0.0, 0.0, 0.0]},
            r"row 3: observation .* got \[9.0, 0.0, 0.0, 0.0\] at step 2 of episode 0",
        ),
    ):
        path = parquet(
            tmp_path / "a.parquet",
            [{**row, **change} if i == 2 else row for i, row in enumerate(rows)],
        )
        for bad in ("refuse", "drop"):
            dropped = JOB.plan(configured([path], "CartPole-v1", bad=bad))["left out"]
            assert [(d["reason"], d["episodes"], d["first"]) for d in dropped] == [
                ("outside the space", 1, f"{str(path)!r} row 3")
            ]
        only = parquet(tmp_path / "only.parquet", pq.read_table(path).slice(0, half).to_pylist())
        with pytest.raises(UsageError, match=message):
            JOB.plan(configured([only], "CartPole-v1"))
    with pytest.raises(UsageError, match=r"observation .* shape \(3,\)"):
        JOB.plan(configured([cart.paths[0] / "episodes"], "Pendulum-v1"))
    with pytest.raises(UsageError, match="did you mean 'CartPole-v1'"):
        JOB.plan(configured([cart.paths[0] / "episodes"], "CartPol-v1"))


def test_words_are_paths_and_wrong_use_is_status_2(
    tmp_path: Path, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "year=2024").mkdir()
    path = parquet(tmp_path / "year=2024" / "a.parquet", logs())
    assert (
        main(["import", str(path), f"storage.root={root}", "workers=0", "--dry-run", "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["transitions"] == 12 and not Path(root).exists()
    assert (
        main(["import", str(path), "--env", "CartPole-v1", f"storage.root={root}", "--dry-run"])
        == 2
    )
    assert "shape (4,)" in capsys.readouterr().err
    bad = parquet(tmp_path / "bad.parquet", changed(6, step=0))
    assert main(["import", str(bad), f"storage.root={root}", "workers=0"]) == 2
    assert "bad.parquet' row 7: step 0 of episode 1 comes twice" in capsys.readouterr().err
    assert Storage(root).list("datasets") == [] == Storage(root).list("ledgers")
    for words, message in (
        ([], "no path was given"),
        (["nowhere/*.parquet"], "is no file, folder or pattern"),
        ([str(path), str(path)], "given twice"),
    ):
        assert main(["import", *words, f"storage.root={root}", "--dry-run"]) == 2
        err = capsys.readouterr().err
        assert message in err and len(err.strip().splitlines()) == 1


def test_logs_in_a_bucket(
    cart: Dataset,
    tmp_path: Path,
    s3: str,
    import_logs: Callable[..., Artifact],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The id depends on the content of the files, not on their place."""
    monkeypatch.setattr(parquet_reader, "PIECE_ROWS", 100)
    rows = exported(cart)
    half = next(i for i in range(len(rows) // 2, len(rows)) if rows[i]["step"] == 0)
    folder = tmp_path / "logs"
    folder.mkdir()
    files = [
        parquet(folder / "0.parquet", rows[:half], row_group_size=50),
        parquet(folder / "1.parquet", rows[half:]),
    ]
    lines = jsonl(tmp_path / "b.jsonl", rows)
    store = Storage(s3)
    for path in files:
        store.write(f"logs/year=2024/{path.name}", path.read_bytes())
    store.write("logs/_temporary/2.parquet", b"hidden")
    store.write("lines/b.jsonl", lines.read_bytes())
    here = import_logs(folder, env="CartPole-v1", to=str(tmp_path / "here"))
    for words in (
        [f"{s3}/logs"],
        [f"{s3}/logs/year=2024/*.parquet"],
        [f"{s3}/logs/year=2024/{path.name}" for path in files],
    ):
        result = [
            "import",
            *words,
            "--env",
            "CartPole-v1",
            f"storage.root={tmp_path / words[0][-6:].replace('/', '-')}",
            "workers=0",
            "--json",
        ]
        assert main(result) == 0
        assert json.loads(capsys.readouterr().out)["artifact"] == here.name
    same(
        cart,
        Dataset(
            [import_logs(f"{s3}/lines/b.jsonl", env="CartPole-v1", to=str(tmp_path / "lines")).path]
        ),
    )  # type: ignore[arg-type]
    for word, message in (
        (f"{s3}/nowhere/*.parquet", "is no file, folder or pattern"),
        (f"{s3}/lines/c.jsonl", "is no file, folder"),
        ("s3://no-such-bucket-x/a", "is no file, folder|cannot be read"),
    ):
        with pytest.raises(UsageError, match=message):
            JOB.plan(configured([word]))


# -- any workers, and after interruptions


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_any_number_of_workers_gives_the_same_bytes(
    cart: Dataset,
    folder: Path,
    tmp_path: Path,
    import_logs: Callable[..., Artifact],
    ray_local: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parquet_reader, "PIECE_ROWS", 50)
    rows = exported(cart)
    third = len(rows) // 3
    for i in range(3):  # episodes lie across files, and across row groups
        parquet(
            folder / f"{i}.parquet",
            rows[i * third : (i + 1) * third if i < 2 else None],
            row_group_size=7,
        )
    result = [
        import_logs(folder, env="CartPole-v1", workers=workers, to=str(tmp_path / f"to{workers}"))
        for workers in (0, 1, 3)
    ]
    assert len({artifact.id for artifact in result}) == 1
    assert checksums(result[0]) == checksums(result[1]) == checksums(result[2])
    same(cart, Dataset([result[2].path]))
    whole = import_logs(
        parquet(tmp_path / "whole.parquet", rows), env="CartPole-v1", to=str(tmp_path / "whole")
    )
    shard = [sums for name, sums in checksums(whole).items() if name.startswith("shards")]
    assert shard == [
        sums for name, sums in checksums(result[0]).items() if name.startswith("shards")
    ]


def test_a_broken_import_goes_on_where_it_was(
    tmp_path: Path, import_logs: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted before each episode in turn: the same bytes. One episode is left out, and one
    comes again.
    """
    rows = [
        {**row, "episode": f"e{row['episode']}", "task": {"mass": float(row["episode"])}}
        for row in logs(12)
    ]
    rows[7]["observation"] = [float("nan"), 0.5]
    rows += [
        {**row, "episode": name, "task": {"mass": 0.5}}
        for name in ("e3", "last")
        for row in logs(1, 6)
    ]
    path = parquet(tmp_path / "a.parquet", rows, row_group_size=7)
    monkeypatch.setattr(parquet_reader, "PIECE_ROWS", 7)
    monkeypatch.setattr("mesocosm.datasets.writer.SHARD_BYTES", 500)
    whole = import_logs(path, bad="drop", to=str(tmp_path / "whole"))
    shard_of = Dataset([whole.path]).table["shard"].tolist()
    assert len(shard_of) == 12 and shard_of[-1] >= 4
    add, passes = DatasetWriter.add, []
    monkeypatch.setattr(
        "mesocosm.jobs.import_logs.ordered", lambda *given: passes.append(given) or ordered(*given)
    )

    for last in range(12):
        added: list[int] = []

        def adds(
            self: DatasetWriter, *given: Any, added: list[int] = added, last: int = last
        ) -> None:
            if len(added) == last:
                raise KeyboardInterrupt
            added.append(given[0].index)
            add(self, *given)

        def adds_again(self: DatasetWriter, *given: Any, added: list[int] = added) -> None:
            added.append(given[0].index)
            add(self, *given)

        to = tmp_path / str(last)
        monkeypatch.setattr(DatasetWriter, "add", adds)
        with pytest.raises(KeyboardInterrupt):
            import_logs(path, bad="drop", to=str(to))
        assert (
            Storage(str(to)).list("datasets") == [] and len(list(to.glob("scratch/import-*"))) == 1
        )
        added.clear(), passes.clear()
        monkeypatch.setattr(DatasetWriter, "add", adds_again)
        result = import_logs(path, bad="drop", to=str(to))
        assert len(passes) == 1, "the first pass was repeated"
        assert len(added) == 12 - shard_of.index(shard_of[last]), "whole shards were written again"
        assert checksums(result) == checksums(whole) and not list(to.glob("scratch/*"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_import_goes_on(tmp_path: Path, root: str) -> None:
    path = parquet(tmp_path / "a.parquet", logs(20000))

    def command(root: str) -> list[str]:
        words = ["import", str(path), f"storage.root={root}", "workers=0"]
        small = "import mesocosm.datasets.writer as writer; writer.SHARD_BYTES = 1 << 18; "
        return [
            sys.executable,
            "-c",
            f"{small}from mesocosm.cli.main import main; raise SystemExit(main({words!r}))",
        ]

    for shard in (0, 5, 10):
        process = subprocess.Popen(
            command(root), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while not list(Path(root).glob(f"scratch/*/{shard:05d}.json")):
            assert process.poll() is None, "it was over before it could be killed"
            time.sleep(0.001)
        process.kill()
        process.wait()
        assert Storage(root).list("datasets") == []
    assert (
        "goes on from there"
        in subprocess.run(command(root), capture_output=True, text=True, check=True).stderr
    )
    subprocess.run(command(str(tmp_path / "whole")), capture_output=True, check=True)
    (id,) = Storage(root).list("datasets")
    result, whole = (Storage(at).artifact("datasets", id) for at in (root, str(tmp_path / "whole")))
    assert checksums(result) == checksums(whole) and result.meta["counts"]["transitions"] == 80000


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_world_is_pretrained_and_judged_on_what_was_imported(
    cart: Dataset, tmp_path: Path, root: str, ray_local: None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = parquet(tmp_path / "a.parquet", exported(cart))

    def artifact(*words: str) -> str:
        assert main([*words, f"storage.root={root}", "--json"]) == 0
        return str(json.loads(capsys.readouterr().out)["artifact"])

    data = artifact("import", str(path), "--env", "CartPole-v1", "workers=0")
    small = (*SMALL_WORLD, "train.steps=40")
    world = artifact("pretrain", f"data.datasets=[{data}]", *small)
    evaluation = artifact("evaluate", f"world={world}", "horizons=[1,5]", "starts=16", "samples=2")
    assert [text.partition("/")[0] for text in (data, world, evaluation)] == [
        "datasets",
        "worlds",
        "evaluations",
    ]
    assert Storage(root).list("ledgers") == []
