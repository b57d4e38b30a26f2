"""`mesocosm storage gc`: what interrupted jobs left is listed and removed, and nothing else is."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mesocosm.cli.main import main
from mesocosm.config import JobConfig, StorageConfig
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Storage
from mesocosm.store.lease import Claim, this_process

Listed = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches and half-sent checkpoints of this test's own."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.fixture(params=["local", "s3"])
def any_root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return (
        str(tmp_path / "root")
        if request.param == "local"
        else f"{request.getfixturevalue('s3')}/{tmp_path.name}"
    )


@pytest.fixture
def gc(capsys: pytest.CaptureFixture[str]) -> Listed:
    """What `storage gc --json` says."""

    def listed(root: str, *words: str, status: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["storage", "gc", f"storage.root={root}", "--json", *words]) == status
        return dict(json.loads(capsys.readouterr().out))

    return listed


def _small(folder: Path) -> None:
    (folder / "x").write_bytes(b"x" * 10)


def _killed(root: str, what: str) -> None:
    """A process that does `what` on `storage` and is killed."""
    code = (
        "import os, signal\nfrom pathlib import Path\nfrom mesocosm.store.artifacts import"
        f" Storage\nstorage = Storage({root!r})\n{what}\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=600).returncode == -signal.SIGKILL


HALF = """
def fill(folder):
    (folder / "x").write_bytes(b"x" * 10)
    os.kill(os.getpid(), signal.SIGKILL)
storage.make("worlds", "half", {}, fill)
"""


@pytest.mark.integration
def test_only_what_nobody_needs_goes(any_root: str, gc: Listed) -> None:
    storage = Storage(any_root)
    whole = storage.make("worlds", "whole", {}, _small)
    storage.create("ledgers/l/00000000.json", b"{}")
    storage.create("cells/results/c.json", b"{}")
    storage.write("runs/checkpoints/w/checkpoint_1/progress.json", b"{}")
    with tracking.start(
        "collect", JobConfig(storage=StorageConfig(any_root)), id="going", quiet=True
    ):
        assert gc(any_root, "--dry-run", "--older-than", "0")["remains"] == []
        _killed(any_root, HALF)
        report = gc(any_root, "--dry-run", "--older-than", "0")
        assert [(remain["what"], remain["bytes"]) for remain in report["remains"]] == [
            ("scratch", 10)
        ]
        assert gc(any_root, "--dry-run")["remains"] == [], (
            "a job may be at work on what is younger than a day"
        )
        assert gc(any_root, "--yes", "--older-than", "0")["removed"] == 1
        assert gc(any_root, "--dry-run", "--older-than", "0")["remains"] == []
        storage.write("runs/collect/going/here", b"")
    assert (storage.artifact("worlds", "whole").path / "x").read_bytes() == (
        whole.path / "x"
    ).read_bytes()
    for name in (
        "ledgers/l/00000000.json",
        "cells/results/c.json",
        "runs/checkpoints/w/checkpoint_1/progress.json",
        "runs/collect/going/here",
    ):
        assert storage.read(name) is not None, name


@pytest.mark.integration
def test_the_checkpoint_of_a_finished_artifact_goes(any_root: str, gc: Listed) -> None:
    """The process was killed between the commit and the removal. An unfinished training's stays."""
    storage = Storage(any_root)
    for kind in ("worlds", "agents"):
        storage.make(kind, f"done-{kind}", {}, _small)
        storage.write(f"runs/checkpoints/done-{kind}/progress.json", b"{}")
        storage.write(f"runs/checkpoints/done-{kind}/snapshots/0/policy.json", b"{}")
    storage.write("runs/checkpoints/going/progress.json", b"{}")
    listed = gc(any_root, "--dry-run", "--older-than", "0")["remains"]
    assert [(remain["what"], remain["bytes"]) for remain in listed] == [("checkpoint", 4)] * 2
    assert {remain["why"] for remain in listed} == {
        "worlds/done-worlds is finished",
        "agents/done-agents is finished",
    }
    assert gc(any_root, "--dry-run")["remains"] == [], "a job may be about to remove it"
    assert gc(any_root, "--yes", "--older-than", "0")["removed"] == 2
    assert storage.list("runs/checkpoints/done-agents") == []
    assert storage.list("runs/checkpoints/going") == ["progress.json"]


@pytest.mark.integration
def test_episodes_of_a_finished_artifact_and_leases_of_dead_processes_go(
    any_root: str, gc: Listed
) -> None:
    storage = Storage(any_root)
    storage.make("datasets", "done", {}, _small)
    storage.make("evaluations", "judged", {}, _small)
    for name in ("done", "going", "judged/policy"):
        storage.write(f"runs/episodes/{name}/0000-00000000.npz", b"1234")
    mine = this_process()
    for number, owner in enumerate(
        (mine, replace(mine, started=1), replace(mine, machine="other"))
    ):
        record = Claim(owner, "collect", 0.0)
        storage.write(f"leases/datasets.{number}.00000000.json", record.to_json())
    listed = gc(any_root, "--dry-run", "--older-than", "0")["remains"]
    assert [(remain["what"], remain["why"]) for remain in listed] == [
        ("checkpoint", "datasets/done is finished"),
        ("checkpoint", "evaluations/judged is finished"),
        ("lease", "its process is gone"),
        ("lease", "its process is on host " + mine.host),
    ]
    assert gc(any_root, "--yes", "--older-than", "0")["removed"] == 4
    assert storage.list("runs/episodes") == ["going"]
    assert storage.list("leases") == ["datasets.0.00000000.json"]


def test_age_is_of_the_newest_file(tmp_path: Path, gc: Listed) -> None:
    """A local folder without COMMIT.json, as a copy that was cut short leaves."""
    folder = tmp_path / "root" / "datasets" / "copied"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "new").write_bytes(b"new")
    (folder / "old").write_bytes(b"old")
    root, day = str(tmp_path / "root"), time.time() - 25 * 3600
    for path in (folder / "old", folder / "deep", folder):
        os.utime(path, (day, day))
    assert gc(root, "--dry-run")["remains"] == []
    os.utime(folder / "deep" / "new", (day, day))
    (remain,) = gc(root, "--dry-run")["remains"]
    assert (remain["what"], remain["path"], remain["bytes"]) == (
        "unfinished artifact",
        str(folder),
        6,
    ) and remain["age_s"] >= 25 * 3600
    assert "no COMMIT.json" in remain["why"]
    assert gc(root, "--yes")["removed"] == 1 and not folder.exists()


def test_temporary_files_of_writes_cut_short(tmp_path: Path, gc: Listed) -> None:
    storage = Storage(str(tmp_path / "root"))
    kill = "os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)\n"
    _killed(storage.root, kill + "storage.write('runs/collect/r/status.json', b'12345')")
    (tmp_path / "root" / "runs" / "collect" / "r" / "mine.tmp").write_text("of the user's own")
    (remain,) = gc(storage.root, "--yes", "--older-than", "0")["remains"]
    assert (
        remain["what"] == "temporary file"
        and remain["bytes"] == 5
        and "status.json." in remain["path"]
    )
    assert os.listdir(tmp_path / "root" / "runs" / "collect" / "r") == ["mine.tmp"]


def test_the_only_copy_of_an_artifact_stays(tmp_path: Path, gc: Listed) -> None:
    """A maker with --force is killed between putting the old one away and putting the new one
    there.
    """
    storage = Storage(str(tmp_path / "root"))
    storage.make("worlds", "w", {}, _small)
    kill = """
rename = os.replace
def once(source, target):
    rename(source, target)
    os.kill(os.getpid(), signal.SIGKILL)
os.replace = once
storage.make("worlds", "w", {}, lambda folder: (folder / "y").write_bytes(b"y"), force=True)
"""
    _killed(storage.root, kill)
    assert storage.find("worlds", "w") is None
    report = gc(storage.root, "--yes", "--older-than", "0")
    assert (
        len(report["remains"]) == 1
        and "y" in report["remarks"][0]
        and "move the folder to" in report["remarks"][0]
    )
    only_copy = Path(report["remarks"][0].split(" is the only copy")[0])
    only_copy.rename(tmp_path / "root" / "worlds" / "w")
    assert (storage.artifact("worlds", "w").path / "x").read_bytes() == b"x" * 10


def test_what_a_bucket_and_its_cache_keep(s3: str, tmp_path: Path, gc: Listed) -> None:
    storage = Storage(f"{s3}/{tmp_path.name}")
    for id in ("whole", "gone"):
        storage.make("worlds", id, {}, _small)
    storage.fs.rm(storage._path("worlds", "gone"), recursive=True)
    storage.fs.pipe(storage._path("worlds", "whole", "0123456789ab", "y"), b"of a slower maker")
    storage.fs.pipe(storage._path("worlds", "never", "0123456789ab", "y"), b"of a killed one")
    bucket, key, _ = storage.fs.split_path(
        storage._path("datasets", "big", "0123456789ab", "shard")
    )
    begun = storage.fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
    storage.fs.call_s3(
        "upload_part",
        Bucket=bucket,
        Key=key,
        UploadId=begun["UploadId"],
        PartNumber=1,
        Body=b"p" * 100,
    )
    (tmp_path / "tmp" / "mesocosm-checkpoint-a").mkdir()
    (tmp_path / "tmp" / "mesocosm-checkpoint-a" / "ds").write_bytes(b"c" * 7)
    assert gc(storage.root, "--dry-run")["remains"] == []
    report = {
        remain["what"]: remain
        for remain in gc(storage.root, "--dry-run", "--older-than", "0")["remains"]
    }
    sizes = {what: remain["bytes"] for what, remain in report.items()}
    assert sizes == {
        "superseded files": 17,
        "unfinished artifact": 15,
        "upload": 100,
        "cache": 10,
        "scratch": 7,
    }
    assert (
        report["upload"]["path"]
        == f"{storage.root}/datasets/big/0123456789ab/shard?uploadId={begun['UploadId']}"
    )
    assert report["cache"]["path"].endswith("cache/worlds/gone")
    assert gc(storage.root, "--yes", "--older-than", "0")["removed"] == 5
    assert gc(storage.root, "--dry-run", "--older-than", "0")["remains"] == []
    assert storage.uploads() == {} and storage.list("worlds") == ["whole"]
    shutil.rmtree(storage.local_path("cache"))
    assert (storage.artifact("worlds", "whole").path / "x").read_bytes() == b"x" * 10


def test_what_was_committed_since_the_list_was_made_stays(any_root: str) -> None:
    storage = Storage(any_root)
    storage.make("worlds", "w", {}, _small)
    path = f"worlds/w/{storage.folder_of('worlds', 'w')}" if storage.remote else "worlds/w"
    assert not storage.discard(path)
    assert (storage.artifact("worlds", "w").path / "x").exists()


@pytest.mark.parametrize(("answer", "status"), [("y\n", 0), ("n\n", 1)])
def test_it_asks(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answer: str,
    status: int,
) -> None:
    folder = tmp_path / "root" / "worlds" / "w"
    folder.mkdir(parents=True)
    words = ["storage", "gc", "--older-than", "0", f"storage.root={tmp_path / 'root'}"]
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    assert main(words) == 2 and folder.exists()
    assert "give --yes" in capsys.readouterr().err
    terminal = io.StringIO(answer)
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)
    assert main(words) == status
    captured = capsys.readouterr()
    assert (
        "remove 1 item? [y/N]" in captured.err
        and f"{folder}  (it has no COMMIT.json)" in captured.out
        and folder.exists() == (status == 1)
    )


@pytest.mark.integration
def test_wrong_use_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["storage", "gc", f"storage.root={tmp_path}/nowhere"]) == 2
    assert f"storage.root '{tmp_path}/nowhere' does not exist" in capsys.readouterr().err
    assert main(["storage", "gc", "--older-than", "-1"]) == 2
    assert main(["storage", "gc", "storage.rot=x"]) == 2
    assert "did you mean 'storage.root'" in capsys.readouterr().err
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert main(["storage", "gc", "storage.root=s3://bucket/prefix"]) == 2
    assert "storage.root 's3://bucket/prefix' cannot be read" in capsys.readouterr().err
