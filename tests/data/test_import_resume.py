"""An import gives the same bytes for any number of workers and after any interruption."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from factories import SMALL_WORLD

from mesocosm.cli.main import main
from mesocosm.cluster import ray_session
from mesocosm.config import RayConfig
from mesocosm.data.ingest.readers import parquet as parquet_reader
from mesocosm.data.parallel import ordered
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.writer import DatasetWriter
from mesocosm.store.artifacts import Artifact, Storage

from .logs import checksums, each, exported, logs, parquet, same

Import = Callable[..., Artifact]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_any_number_of_workers_gives_the_same_bytes(
    cart: Dataset,
    folder: Path,
    tmp_path: Path,
    import_logs: Import,
    ray_local: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parquet_reader, "PIECE_ROWS", 50)
    rows, env = exported(cart), "CartPole-v1"
    third = len(rows) // 3
    # Episodes lie across files, and across row groups.
    for i, (begin, end) in enumerate(itertools.pairwise([0, third, 2 * third, len(rows)])):
        parquet(folder / f"{i}.parquet", rows[begin:end], row_group_size=7)
    results = [
        import_logs(folder, env=env, workers=workers, to=str(tmp_path / f"to{workers}"))
        for workers in (0, 1, 3)
    ]
    assert len({artifact.id for artifact in results}) == 1
    assert checksums(results[0]) == checksums(results[1]) == checksums(results[2])
    same(cart, Dataset([results[2].path]))
    whole = import_logs(
        parquet(tmp_path / "whole.parquet", rows), env=env, to=str(tmp_path / "whole")
    )
    shards = [
        [file for name, file in checksums(artifact).items() if name.startswith("shards")]
        for artifact in (whole, results[0])
    ]
    assert shards[0] == shards[1]


@pytest.mark.integration
def test_a_broken_import_goes_on_where_it_was(
    tmp_path: Path, import_logs: Import, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted before each episode in turn: the same bytes. One episode is left out, and one
    comes again.
    """
    rows = each(
        logs(12),
        episode=lambda row: f"e{row['episode']}",
        task=lambda row: {"mass": float(row["episode"])},
    )
    rows[7]["observation"] = [float("nan"), 0.5]
    for name in ("e3", "last"):
        rows += each(logs(1, 6), episode=name, task={"mass": 0.5})
    path = parquet(tmp_path / "a.parquet", rows, row_group_size=7)
    monkeypatch.setattr(parquet_reader, "PIECE_ROWS", 7)
    monkeypatch.setattr("mesocosm.datasets.writer.SHARD_BYTES", 500)
    whole = import_logs(path, bad="drop", to=str(tmp_path / "whole"))
    shard_of = Dataset([whole.path]).table["shard"].tolist()
    assert len(shard_of) == 12 and shard_of[-1] >= 4

    passes: list[Any] = []
    added: list[int] = []
    limit, add = 0, DatasetWriter.add

    def count_pass(*args: Any) -> Any:
        passes.append(args)
        return ordered(*args)

    def add_up_to_limit(self: DatasetWriter, *args: Any) -> None:
        if len(added) == limit:
            raise KeyboardInterrupt
        added.append(args[0].index)
        add(self, *args)

    monkeypatch.setattr("mesocosm.jobs.import_logs.ordered", count_pass)
    monkeypatch.setattr(DatasetWriter, "add", add_up_to_limit)
    for last in range(12):
        to = tmp_path / str(last)
        limit = last
        with pytest.raises(KeyboardInterrupt):
            import_logs(path, bad="drop", to=str(to))
        assert Storage(str(to)).list("datasets") == []
        assert len(list(to.glob("scratch/import-*"))) == 1
        added.clear(), passes.clear()
        limit = -1
        result = import_logs(path, bad="drop", to=str(to))
        assert len(passes) == 1, "the first pass was repeated"
        assert len(added) == 12 - shard_of.index(shard_of[last]), "whole shards were written again"
        assert checksums(result) == checksums(whole) and not list(to.glob("scratch/*"))
        added.clear()


def test_progress_of_an_earlier_version_begins_anew(
    tmp_path: Path, import_logs: Import, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = parquet(tmp_path / "a.parquet", logs(3))
    expected = import_logs(path)
    folder = tmp_path / "other" / "scratch" / f"import-{expected.id}"
    (folder / "data" / "shards" / "00000").mkdir(parents=True)
    state = {"next": [0, 0], "number": 0, "names": [], "writer": {}}
    (folder / "00000.json").write_text(json.dumps(state))
    (folder / "00000.npy").touch()
    assert checksums(import_logs(path, to=str(tmp_path / "other"))) == checksums(expected)


def test_nothing_that_is_left_to_read_needs_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill after the last shard, before the commit."""
    monkeypatch.setattr(ray_session, "ensure", None)
    assert list(ordered(lambda item: [item], [], 2, RayConfig())) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_import_goes_on(tmp_path: Path, root: str) -> None:
    path = parquet(tmp_path / "a.parquet", logs(20000))

    def command(root: str) -> list[str]:
        words = ["import", str(path), f"storage.root={root}", "workers=0"]
        small = "import mesocosm.datasets.writer as writer; writer.SHARD_BYTES = 1 << 18"
        code = f"{small}; from mesocosm.cli.main import main; raise SystemExit(main({words!r}))"
        return [sys.executable, "-c", code]

    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for shard in (0, 5, 10):
        process = subprocess.Popen(command(root), **quiet)
        while not list(Path(root).glob(f"scratch/*/{shard:05d}.json")):
            assert process.poll() is None, "it was over before it could be killed"
            time.sleep(0.001)
        process.kill()
        process.wait()
        assert Storage(root).list("datasets") == []
    done = subprocess.run(command(root), capture_output=True, text=True, check=True)
    assert "continues from there" in done.stderr
    whole = str(tmp_path / "whole")
    subprocess.run(command(whole), capture_output=True, check=True)
    (id,) = Storage(root).list("datasets")
    results = [Storage(to).artifact("datasets", id) for to in (root, whole)]
    assert checksums(results[0]) == checksums(results[1])
    assert results[0].meta["counts"]["transitions"] == 80000


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
    world = artifact("pretrain", f"data.datasets=[{data}]", *SMALL_WORLD, "train.steps=40")
    evaluation = artifact("evaluate", f"world={world}", "horizons=[1,5]", "starts=16", "samples=2")
    kinds = [name.partition("/")[0] for name in (data, world, evaluation)]
    assert kinds == ["datasets", "worlds", "evaluations"]
    assert Storage(root).list("ledgers") == []
