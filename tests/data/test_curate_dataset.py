"""Curated datasets: made once, of the same bytes from one process and from Ray Data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from mesocosm.cli.main import main
from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.loader import Loader
from mesocosm.datasets.dataset import Dataset
from mesocosm.errors import UsageError
from mesocosm.jobs.curate import JOB
from mesocosm.store.artifacts import Artifact, Storage

from .logs import checksums
from .walks import configured, origins, report, stored, two_datasets, walk

Write = Callable[..., str]
Curate = Callable[..., Artifact]
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


@pytest.mark.integration
def test_a_curated_dataset_trains_and_is_made_once(
    write_walks: Write, curate: Curate, root: str, golden: Any
) -> None:
    names = two_datasets(write_walks)
    artifact = curate(*ALL, datasets=names)
    account, meta = report(artifact), artifact.meta
    assert meta["inputs"] == {"datasets": ["d0", "d1"]} and meta["job"] == "curate"
    assert meta["config"]["operations"] == account["lineage"]
    assert account["lineage"][2] == {**ALL[2], "dimensions": []}
    golden.check("curate", {"shards": golden.of_files(artifact.path, "shards/*/*.npy")})
    data = Dataset([artifact.path])
    assert Loader(data, Codec.fit(data), "train", 8, 16, 0).batch(0).mask.any()
    assert data.table["index"].tolist() == list(range(len(data.table)))
    inputs = {id: stored(root, id) for id in names}
    for episode, (id, index) in zip(data.iter_episodes(), origins(artifact), strict=True):
        source, length = inputs[id].episode(index), len(episode)
        assert np.array_equal(episode.observations, source.observations[: length + 1])
        assert np.array_equal(episode.rewards, source.rewards[:length])
        assert (episode.behaviour, episode.seed) == (source.behaviour, source.seed)
    commit, before = artifact.path / "COMMIT.json", checksums(artifact)
    stamp = commit.stat().st_mtime_ns
    assert curate(*ALL, datasets=names).id == artifact.id and commit.stat().st_mtime_ns == stamp
    again = curate(*ALL, datasets=names, force=True)
    assert checksums(again) == before and commit.stat().st_mtime_ns != stamp
    assert curate(*ALL[:-1], datasets=names).id != artifact.id
    twice = curate({"op": "exact_duplicates"}, datasets=(artifact.id,))
    assert twice.meta["inputs"]["datasets"] == [artifact.id]
    assert report(twice)["kept"] == account["kept"]
    joined = report(curate(datasets=names))
    assert joined["kept"]["episodes"] == 200 and joined["operations"] == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ray_data_gives_the_same_bytes(
    write_walks: Write, curate: Curate, ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = two_datasets(write_walks)
    monkeypatch.setattr("mesocosm.data.curation.scan.ROWS", 900)
    artifact = curate(*ALL, datasets=names)
    before = checksums(artifact)
    by_ray = curate(*ALL, datasets=names, workers=2, force=True)
    assert by_ray.id == artifact.id and checksums(by_ray) == before


@pytest.mark.integration
def test_a_dry_run_reports_and_writes_nothing(
    write_walks: Write,
    curate: Curate,
    root: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    names = two_datasets(write_walks)
    operations = tmp_path / "ops.yaml"
    operations.write_text(json.dumps({"operations": ALL, "data": {"datasets": names}}))
    command = ["curate", "-c", str(operations), f"storage.root={root}", "--dry-run"]
    assert main([*command, "--json"]) == 0
    account = json.loads(capsys.readouterr().out)
    assert Storage(root).list("datasets") == ["d0", "d1"]
    artifact = curate(*ALL, datasets=names)
    entries = report(artifact)["operations"]
    assert account["dataset"] == artifact.name
    for name, expected in (
        ("operations", [entry["kept"]["episodes"] for entry in entries]),
        ("reasons", [row["transitions"] for entry in entries for row in entry["reasons"]]),
    ):
        column = "kept" if name == "operations" else "transitions"
        assert [row[column] for row in account[name]] == expected
    assert main(command) == 0
    assert "exact_duplicates" in capsys.readouterr().out
    assert main([*command, "workers=100000"]) == 2
    assert "workers=100000 asks for 100000 CPUs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        ({"op": "exact_duplicate"}, "op must be .* 'exact_duplicate'; .* 'exact_duplicates'"),
        ({"min": 3}, r"operations\[0\]: op must be one of exact_duplicates, .* got None"),
        ({"op": "length", "mim": 3}, r"operations\[0\] \(length\): .* 'mim'; did you mean 'min'"),
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
    operation: dict[str, Any], message: str, write_walks: Write, root: str
) -> None:
    write_walks([walk(k) for k in range(10)])
    with pytest.raises(UsageError, match=message):
        JOB.plan(configured(root, operation))


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        (("d0", "d1"), "differ in action_space"),
        (("d7",), "no artifact datasets/d7"),
        ((), r"data.datasets must name a dataset, got \[\]"),
    ],
)
def test_wrong_datasets_are_refused(
    datasets: tuple[str, ...], message: str, write_walks: Write, root: str
) -> None:
    write_walks([walk(k) for k in range(10)])
    write_walks([walk(k) for k in range(10)], "d1", action_space=spaces.Discrete(4))
    with pytest.raises(UsageError, match=message):
        JOB.plan(configured(root, datasets=datasets))
