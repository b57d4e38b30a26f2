"""Importing: exports come back, in every form of the schema, from paths and from a bucket."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from mesocosm.cli.main import main
from mesocosm.data.ingest.readers import files
from mesocosm.data.ingest.readers import jsonl as jsonl_reader
from mesocosm.data.ingest.readers import parquet as parquet_reader
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.manifest import Manifest
from mesocosm.jobs.import_logs import JOB
from mesocosm.store.artifacts import Artifact, Storage

from .logs import (
    columns,
    configured,
    each,
    exported,
    jsonl,
    logs,
    moves,
    parquet,
    planned,
    refused,
    report,
    same,
    steps,
    warns,
    without,
)

Import = Callable[..., Artifact]


def test_a_collected_dataset_is_imported_from_its_export(
    cart: Dataset, import_logs: Import, golden: Any
) -> None:
    export = cart.paths[0] / "episodes"
    result = import_logs(export, env="CartPole-v1")
    back = Dataset([result.path])
    same(cart, back)
    golden.check("import", {"shards": golden.of_shards(result.path)})
    environment = back.manifests[0].environment
    assert (environment.id, environment.version) == ("CartPole-v1", "")
    assert back.environment.max_episode_steps == 500
    assert back.observation_space == cart.observation_space
    assert back.action_space == cart.action_space
    for name in ("seed", "split"):
        assert np.array_equal(back.table[name], cart.table[name])
    assert result.meta["counts"]["transitions"] == cart.transitions
    assert result.meta["job"] == "import" and "ledger" not in result.meta
    action = columns(report(result))["action"]
    assert report(result)["left_out"] == []
    assert (action["type"], action["became"]) == ("int64", "action: Discrete(2)")
    for force in (False, True):
        assert import_logs(export, env="CartPole-v1", force=force).id == result.id


@pytest.mark.integration
@pytest.mark.parametrize("form", ["jsonl", "next", "flat", "struct"])
@pytest.mark.parametrize("batch", [5, 1 << 14])
def test_every_form_of_the_schema_gives_the_same_dataset(
    form: str,
    batch: int,
    cart: Dataset,
    tmp_path: Path,
    import_logs: Import,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parquet_reader, "BATCH_ROWS", batch)
    monkeypatch.setattr(jsonl_reader, "BATCH_ROWS", batch)
    monkeypatch.setattr(jsonl_reader, "PIECE_BYTES", 100 * batch)
    rows, path = exported(cart), tmp_path / "a.parquet"
    if form == "jsonl":
        path = jsonl(tmp_path / "a.jsonl", rows)
    elif form == "next":
        parquet(path, moves(rows))
    elif form == "flat":
        flat = [{f"observation.{i}": x for i, x in enumerate(row["observation"])} for row in rows]
        rows = [a | b for a, b in zip(without(rows, "observation"), flat, strict=True)]
        parquet(path, rows)
    else:

        def nested(row: dict[str, Any]) -> Any:
            return {"cart": row["observation"][:2], "pole": row["observation"][2]}

        back = Dataset([import_logs(parquet(path, each(rows, observation=nested))).path])
        assert isinstance(back.observation_space, spaces.Dict)
        assert [space.shape for space in back.observation_space.values()] == [(2,), ()]
        for one, other in zip(cart.iter_episodes(), back.iter_episodes(), strict=True):
            for a, b in zip(one.observations, other.observations, strict=True):
                assert a[0] == b["cart"][0] and a[2] == b["pole"]
        return
    same(cart, Dataset([import_logs(path, env="CartPole-v1").path]))


def test_everything_optional(tmp_path: Path, import_logs: Import) -> None:
    rows = each(
        logs(6),
        behaviour=lambda row: f"b{row['episode'] % 2}",
        task=lambda row: {"mass": row["episode"] / 2, "side": "left"},
        duration=0.25,
        seed=7,
        success=True,
    )
    result = import_logs(jsonl(tmp_path / "a.jsonl", rows))
    manifest = Manifest.read(result.path)
    assert manifest.environment.task == ["mass", "side"] and manifest.durations
    assert [option.values for option in manifest.task_options] == [None, ["left"]]
    assert {b.name: b.episodes for b in manifest.behaviours} == {"b0": 3, "b1": 3}
    episode = Dataset([result.path]).episode(3)
    assert episode.task == {"mass": 1.5, "side": "left"}
    assert episode.seed == 7 and episode.success and episode.durations is not None
    assert episode.durations.tolist() == [0.25] * 4


def test_inferred_spaces_are_called_guesses(tmp_path: Path, import_logs: Import) -> None:
    rows = each(
        logs(5),
        observation=lambda row: {
            "pose": [row["step"] / 8, -1.0],
            "count": -row["step"],
            "word": "ab"[: row["step"] % 3],
            "lit": row["step"] % 2 == 0,
            "mode": row["step"] % 3,
        },
        action=lambda row: (
            None
            if row["action"] is None
            else {"push": row["step"] / 2, "keys": [row["step"] % 2, row["step"]]}
        ),
        note="x",
    )
    result = import_logs(jsonl(tmp_path / "a.jsonl", rows))
    dataset = Dataset([result.path])
    seen, acted = dataset.observation_space, dataset.action_space
    assert isinstance(seen, spaces.Dict) and isinstance(acted, spaces.Dict)
    assert seen["pose"] == spaces.Box(-np.inf, np.inf, (2,), np.float64)
    assert seen["mode"] == spaces.Discrete(3) and seen["lit"] == spaces.Discrete(2)
    assert isinstance(seen["count"], spaces.Box) and seen["count"].dtype == np.int64
    word = seen["word"]
    assert isinstance(word, spaces.Text)
    assert word.character_set == {"a", "b"} and word.max_length == 2
    assert acted["push"] == spaces.Box(0.0, 1.5, (), np.float64)
    assert acted["keys"] == spaces.MultiDiscrete([2, 4])
    table = columns(report(result))
    assert table["note"]["became"] == "nothing"
    for name, how in (
        ("note", "unknown"),
        ("observation.mode", "guess"),
        ("action.push", "guess"),
        ("behaviour", "missing"),
    ):
        assert how in table[name]["how"]
    first = dataset.episode(0).observations[1]
    assert (first["word"], first["count"], first["lit"]) == ("a", -1, 0)


def test_a_vector_of_one_flattened_column(tmp_path: Path, import_logs: Import) -> None:
    flat = {"observation.0": lambda row: row["step"] / 2}
    flat["next_observation.0"] = lambda row: (row["step"] + 1) / 2
    rows = without(each(steps(), **flat), "observation", "next_observation")
    dataset = Dataset([import_logs(parquet(tmp_path / "a.parquet", rows)).path])
    assert dataset.observation_space.shape == (1,)
    assert np.concatenate(dataset.episode(1).observations).tolist() == [0.0, 0.5, 1.0, 1.5]


def test_ends_that_are_missing(tmp_path: Path, import_logs: Import) -> None:
    rows = [row for row in logs() if row["action"] is not None]
    result = import_logs(parquet(tmp_path / "a.parquet", rows))
    counts = result.meta["counts"]
    assert counts["last_actions_left_out"] == 3 and counts["transitions"] == 9
    assert counts["outcomes"] == {"terminated": 0, "truncated": 0, "unfinished": 3}
    warnings = report(result)["warnings"]
    assert "lost their last action" in warnings[0] and "never ends" in warnings[1]
    never = each(logs(), terminated=lambda row: None if row["action"] is None else False)
    counts = import_logs(parquet(tmp_path / "b.parquet", never)).meta["counts"]
    assert counts["outcomes"]["unfinished"] == 3
    cut = each(
        moves(logs()),
        terminated=lambda row: row["terminated"] and row["episode"] == 0,
        truncated=lambda row: row["terminated"] and row["episode"] == 1,
    )
    outcomes = import_logs(parquet(tmp_path / "c.parquet", cut)).meta["counts"]["outcomes"]
    assert outcomes == {"terminated": 1, "truncated": 1, "unfinished": 1}


def test_episodes_of_one_row_that_lead_nowhere(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", without(steps((1, 1)), "next_observation"))
    refused("each of the 2 has one row, and nothing says what its action led to", path)
    assert planned(parquet(tmp_path / "b.parquet", steps((1, 1))))["transitions"] == 2


def test_files_that_number_their_own_episodes(folder: Path, import_logs: Import) -> None:
    paths = [parquet(folder / f"{i}.parquet", logs(2)) for i in range(3)]
    refused(r"1.parquet' row 1: episode 0 comes again .*per_file=true", *paths)
    assert import_logs(folder, per_file=True).meta["counts"]["episodes"] == 6
    for path in paths:
        parquet(path, without(logs(1), "episode"))
    refused(r"no column 'episode'.*per_file=true", *paths)
    dataset = Dataset([import_logs(folder, per_file=True).path])
    assert [episode.index for episode in dataset.iter_episodes()] == [0, 1, 2]


def test_episodes_beyond_the_limit_give_a_warning(tmp_path: Path) -> None:
    config = configured(parquet(tmp_path / "a.parquet", logs()))
    for horizon, warned in ((4, False), (3, True)):
        config.reality.horizon = horizon
        assert warns(JOB.plan(config), "longest episode has 4 steps") == warned


def test_columns_with_other_names(tmp_path: Path, import_logs: Import) -> None:
    rows = each(
        logs(),
        episode=lambda row: f"run-{row['episode']}",
        obs=lambda row: row["observation"],
        done=lambda row: row["terminated"],
    )
    path = jsonl(tmp_path / "a.jsonl", without(rows, "observation", "terminated"))
    refused(
        r"no column 'observation', .* required .it has episode,.*columns.observation=NAME", path
    )
    result = import_logs(path, columns={"observation": "obs", "terminated": "done"})
    assert result.meta["counts"]["transitions"] == 12
    indices = [episode.index for episode in Dataset([result.path]).iter_episodes()]
    assert indices == [0, 1, 2]


# -- paths


def test_numbers_in_names_are_sorted_by_value(folder: Path, import_logs: Import) -> None:
    names = [f"part-{i}.parquet" for i in range(12)]
    assert files.sorted_naturally(sorted(names)) == names
    mixed = ["b/1", "a/10", "a/2", "a/02", "a/x"]
    assert files.sorted_naturally(mixed) == ["a/02", "a/2", "a/10", "a/x", "b/1"]
    rows = steps((12, 12))
    for i, name in enumerate(names):  # episodes lie across files
        parquet(folder / name, rows[2 * i : 2 * i + 2])
    as_a_shell_gives_them = sorted(str(path) for path in folder.iterdir())
    words = [[folder], [folder / "*.parquet"], as_a_shell_gives_them]
    results = [import_logs(*paths) for paths in words]
    assert len({artifact.id for artifact in results}) == 1
    assert results[0].meta["counts"]["episodes"] == 2
    refused(r"part-9.parquet' row 1: .* 1 begins at step 6", *reversed(as_a_shell_gives_them))


def test_words_are_paths_and_wrong_use_is_status_2(
    tmp_path: Path, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "year=2024").mkdir()
    path = str(parquet(tmp_path / "year=2024" / "a.parquet", logs()))
    storage = f"storage.root={root}"
    assert main(["import", path, storage, "workers=0", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["transitions"] == 12 and not Path(root).exists()
    rows = logs()
    rows[6]["step"] = 0
    bad = str(parquet(tmp_path / "bad.parquet", rows))
    for words, message in (
        ([path, "--env", "CartPole-v1", "--dry-run"], "shape (4,)"),
        ([bad, "workers=0"], "bad.parquet' row 7: step 0 of episode 1 comes twice"),
        (["--dry-run"], "no path was given"),
        (["nowhere/*.parquet", "--dry-run"], "must be a file, a folder or a pattern"),
        ([path, path, "--dry-run"], "given twice"),
    ):
        assert main(["import", *words, storage]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert "--dry-run" not in words or len(err.strip().splitlines()) == 1
    assert Storage(root).list("datasets") == [] == Storage(root).list("ledgers")


def test_logs_in_a_bucket(
    cart: Dataset,
    folder: Path,
    tmp_path: Path,
    s3: str,
    import_logs: Import,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The id depends on the content of the files, not on their place."""
    monkeypatch.setattr(parquet_reader, "PIECE_ROWS", 100)
    rows, env = exported(cart), "CartPole-v1"
    half = next(i for i in range(len(rows) // 2, len(rows)) if rows[i]["step"] == 0)
    paths = [
        parquet(folder / "0.parquet", rows[:half], row_group_size=50),
        parquet(folder / "1.parquet", rows[half:]),
    ]
    store = Storage(s3)
    for path in paths:
        store.write(f"logs/year=2024/{path.name}", path.read_bytes())
    store.write("logs/_temporary/2.parquet", b"hidden")
    store.write("lines/b.jsonl", jsonl(tmp_path / "b.jsonl", rows).read_bytes())
    local = import_logs(folder, env=env, to=str(tmp_path / "local"))
    for i, words in enumerate(
        (
            [f"{s3}/logs"],
            [f"{s3}/logs/year=2024/*.parquet"],
            [f"{s3}/logs/year=2024/{path.name}" for path in paths],
        )
    ):
        options = ["--env", env, f"storage.root={tmp_path / str(i)}", "workers=0", "--json"]
        assert main(["import", *words, *options]) == 0
        assert json.loads(capsys.readouterr().out)["artifact"] == local.name
    lines = import_logs(f"{s3}/lines/b.jsonl", env=env, to=str(tmp_path / "lines"))
    same(cart, Dataset([lines.path]))
    for word, message in (
        (f"{s3}/nowhere/*.parquet", "must be a file, a folder or a pattern"),
        (f"{s3}/lines/c.jsonl", "must be a file, a folder"),
        ("s3://no-such-bucket-x/a", "must be a file, a folder|cannot be read"),
    ):
        refused(message, word)
