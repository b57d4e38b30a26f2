"""Damaged artifacts, full disks and lost connections: one sentence that names the artifact."""

from __future__ import annotations

import errno
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import urllib.error
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy
from factories import free_port

from mesocosm import faults
from mesocosm.cli.main import main
from mesocosm.config import JobConfig, StorageConfig, TrackingConfig
from mesocosm.errors import ArtifactError, StorageError, UsageError
from mesocosm.runs import tracking
from mesocosm.store.artifacts import COMMIT, Storage
from mesocosm.store.cache import open_partial

Cart = Callable[..., str]
DIRTY = re.compile(r"Traceback|Errno|Error\b|SELECT|INSERT|\[SQL")
"""What never reaches a user."""

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "torn": lambda commit: commit[:300],
    "empty": lambda commit: b"",
    "object": lambda commit: b"{}",
    "list": lambda commit: b"[]",
    "binary": lambda commit: b"\xff\x00\x01",
    "meta": lambda commit: json.dumps(json.loads(commit) | {"meta": None}).encode(),
    "other": lambda commit: commit.replace(b'"cart"', b'"cat"'),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESOCOSM_CACHE", str(tmp_path / "cache"))


def _copy(of: Storage, to: Storage, id: str) -> None:
    made = of.artifact("datasets", "cart")

    def fill(folder: Path) -> None:
        shutil.copytree(made.path, folder, dirs_exist_ok=True)
        (folder / COMMIT).unlink()

    to.make("datasets", id, {"job": "collect"}, fill)


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, cart_root: Cart) -> Storage:
    """A root with the datasets `cart` and `good`."""
    local = Storage(cart_root(tmp_path, 200))
    if request.param == "local":
        _copy(local, local, "good")
        return local
    remote = Storage(f"{request.getfixturevalue('s3')}/{tmp_path.name}")
    for id in ("cart", "good"):
        _copy(local, remote, id)
    return remote


@pytest.mark.integration
@pytest.mark.parametrize("how", DAMAGES)
def test_a_commit_that_cannot_be_used(
    storage: Storage,
    how: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # `gc` looks there for what others left
    commit = storage.read(f"datasets/cart/{COMMIT}")
    assert commit is not None
    storage.write(f"datasets/cart/{COMMIT}", DAMAGES[how](commit))
    for find in (storage.find, storage.artifact, partial(open_partial, storage)):
        with pytest.raises(ArtifactError, match=r"datasets/cart: COMMIT\.json is damaged \("):
            find("datasets", "cart")
    root = f"storage.root={storage.root}"
    assert main(["data", "list", root]) == 0
    listed = capsys.readouterr()
    assert (
        re.search(r"^good ", listed.out, re.M) and "datasets/cart: COMMIT.json is dam" in listed.out
    )
    assert main(["data", "list", root, "--json"]) == 0
    rows = {row["id"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["good"]["error"] is None and rows["good"]["episodes"]
    assert "datasets/cart" in rows["cart"]["error"] and rows["cart"]["episodes"] is None
    assert main(["pretrain", root, "data.datasets=[cart]", "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "datasets/cart" in error and not DIRTY.search(error)
    assert main(["storage", "gc", root, "--older-than", "0", "--json", "--yes"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [remain["what"] for remain in found["remains"]] == ["damaged artifact"]
    assert found["removed"] == 1 and storage.list("datasets") == ["good"]
    assert storage.artifact("datasets", "good").id == "good"


def test_force_replaces_a_damaged_artifact(storage: Storage) -> None:
    storage.write(f"datasets/cart/{COMMIT}", b"{")
    made = storage.make(
        "datasets",
        "cart",
        {"n": 2},
        lambda folder: (folder / "x").write_text("new") and None,
        force=True,
    )
    assert made.meta == {"n": 2}
    assert (storage.artifact("datasets", "cart").path / "x").read_text() == "new"


def test_what_is_mended_meanwhile_is_not_removed(storage: Storage) -> None:
    assert not storage.discard("datasets/cart")
    assert storage.artifact("datasets", "cart").id == "cart"


def test_a_damaged_manifest_is_a_line(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    commit = storage.commit_of("datasets", "cart")
    assert commit is not None
    folder = "/".join(filter(None, ("datasets/cart", commit.get("folder"))))
    storage.write(f"{folder}/manifest.json", b"{")
    assert main(["data", "list", f"storage.root={storage.root}"]) == 0
    out = capsys.readouterr().out
    assert "good" in out and "datasets/cart: file 'manifest.json' is damaged" in out


# -- a full disk -----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("a small disk can only be mounted by root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_one_sentence(small_disk: Path) -> None:
    storage = Storage(str(small_disk / "root"))

    def fill(folder: Path) -> None:
        np.save(folder / "x.npy", np.zeros(1 << 20))

    with pytest.raises(StorageError, match=r"worlds/w .*: no space is left on the disk; free some"):
        storage.make("worlds", "w", {}, fill)
    with pytest.raises(StorageError, match=r"cells/c\.json .*: no space is left"):
        storage.write("cells/c.json", b"x" * (2 << 20))
    assert storage.list("worlds") == [] and not list(small_disk.rglob("*.tmp"))
    made = storage.make("worlds", "w", {}, lambda folder: (folder / "x").write_text("x") and None)
    assert made.id == "w"


@pytest.mark.slow
def test_a_job_on_a_full_disk_and_again_with_room(small_disk: Path) -> None:
    words = [
        "reality.env=CartPole-v1",
        "steps=12000",
        "workers=0",
        f"storage.root={small_disk}/root",
    ]
    command = [sys.executable, "-m", "mesocosm", "collect", "tracking.uri=none", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("mesocosm: ") and "no space is left on the disk" in last
    assert not DIRTY.search(done.stderr), done.stderr
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


# -- tracking --------------------------------------------------------------------------------------


def test_the_error_of_a_job_is_seen_though_its_end_is_not_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    away = TrackingConfig(uri="http://127.0.0.1:9")
    config = JobConfig(storage=StorageConfig(str(tmp_path / "root")), tracking=away)
    with (
        pytest.raises(UsageError, match="the original"),
        tracking.start("collect", config, id="a", quiet=True) as run,
    ):
        shutil.rmtree(run.folder)
        run.folder.write_text("no folder any more")
        raise UsageError("the original")
    error = capsys.readouterr().err
    assert "the end of run collect/a is not recorded" in error and not DIRTY.search(error)


def test_a_replay_that_fails_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = JobConfig(storage=StorageConfig(str(tmp_path / "root")))
    foreign = tmp_path / "root" / "runs" / "collect" / "foreign"
    foreign.mkdir(parents=True)
    (foreign / "mlflow.pending").write_text("{}")
    (foreign / "status.json").write_text('{"state": "running"}')
    tracking.replay_in_background(config)
    for thread in threading.enumerate():
        if thread.name == "replay":
            thread.join(60)
    error = capsys.readouterr().err
    assert "Traceback" not in error and error.count("\n") <= 1


@pytest.mark.integration
def test_no_sql_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """MLflow's database loses a table that a pending run needs."""
    root = str(tmp_path / "root")
    here = JobConfig(storage=StorageConfig(root))
    away = JobConfig(storage=StorageConfig(root), tracking=TrackingConfig(uri="http://127.0.0.1:9"))
    with tracking.start("collect", here, id="first", quiet=True):
        pass
    with tracking.start("collect", away, id="pending", quiet=True) as run:
        run.log({"steps": 5}, step=2)
    engine = sqlalchemy.create_engine(tracking.uri_of(here))
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("DROP TABLE latest_metrics"))
    capsys.readouterr()
    assert tracking.replay_pending(here) == 0
    shown = capsys.readouterr().err
    assert "collect/pending could not be brought to MLflow" in shown and not DIRTY.search(shown)


def test_reasons_hold_no_sql() -> None:
    engine = sqlalchemy.create_engine("sqlite://")
    with engine.connect() as connection, pytest.raises(sqlalchemy.exc.OperationalError) as caught:
        connection.execute(sqlalchemy.text("INSERT INTO nowhere VALUES (:a)"), {"a": 12345})
    for text in (faults.first_line(caught.value), faults.reason(caught.value) or ""):
        assert "no such table" in text and "INSERT" not in text and "12345" not in text
    assert faults.reason(KeyError("x")) is None


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "the server runs"),
        (TimeoutError("timed out"), "the server runs"),
        (socket.gaierror(-2, "Name or service not known"), "the server runs"),
        (urllib.error.URLError("no host given"), "the server runs"),
        (OSError(errno.EMFILE, "Too many open files"), "raise ulimit -n"),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), "'/a'; check that the path"),
    ],
)
def test_each_error_of_the_system_has_its_fix(error: OSError, fix: str) -> None:
    assert fix in (faults.reason(error) or "")


def test_a_connection_that_fails_while_an_artifact_is_made_is_not_storage_s(tmp_path: Path) -> None:
    """Training may lose its server; the folder that it writes to is not to blame."""
    port = free_port()

    def fill(folder: Path) -> None:
        try:
            socket.create_connection(("127.0.0.1", port))
        except OSError as error:
            raise RuntimeError("the client stops") from error

    with pytest.raises(RuntimeError, match="the client stops") as caught:
        Storage(str(tmp_path)).make("agents", "ab", {}, fill)
    assert "the server runs" in (faults.reason(caught.value) or "")
