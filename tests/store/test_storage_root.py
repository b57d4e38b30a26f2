"""A root's address, its durability, and this machine's folder for copies of remote roots."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mesocosm.cli.main import main
from mesocosm.cluster import ray_session
from mesocosm.config import JobConfig, StorageConfig, load
from mesocosm.errors import UsageError
from mesocosm.store.artifacts import Storage
from mesocosm.store.files import CACHE_VARIABLE, use_cache

NO_EXCLUSIVE_CREATION = "gs://b/x memory://x http://host/x file:///tmp/x az://b s3a://b/x"
INCOMPLETE = ["", "s3://", "s3:///x", "~no-such-user/x"]


@pytest.mark.parametrize("root", [*NO_EXCLUSIVE_CREATION.split(), *INCOMPLETE])
def test_other_stores_and_incomplete_addresses_are_refused(root: str) -> None:
    with pytest.raises(UsageError, match=rf"storage\.root .*{re.escape(repr(root))}") as caught:
        Storage(root)
    assert root in INCOMPLETE or "s3://bucket/prefix" in str(caught.value)


@pytest.mark.integration
def test_an_unknown_scheme_is_one_sentence_of_a_job(tmp_path: Path) -> None:
    """No thread prints a traceback before it."""
    words = ["collect", "reality.env=CartPole-v1", "steps=5", "storage.root=gs://b/x"]
    command = [sys.executable, "-m", "mesocosm", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "gs://" in done.stderr, done.stderr


def test_a_file_is_no_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    for command in (["data", "list"], ["storage", "gc", "--dry-run"]):
        assert main([*command, f"storage.root={tmp_path / 'file'}"]) == 2
        assert "is a file" in capsys.readouterr().err


def test_home_and_relative_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("storage: {root: ~/x}\n")
    expected = str(tmp_path / "home" / "x")
    assert load(JobConfig, [tmp_path / "config.yaml"]).storage.root == expected
    assert load(JobConfig, [], ["storage.root=~/x"]).storage.root == expected
    Storage("~/x").write("runs/a", b"1")
    assert (tmp_path / "home" / "x" / "runs" / "a").exists() and not (tmp_path / "~").exists()
    assert Storage("relative/root").root == str(tmp_path / "relative" / "root")


def test_renames_are_durable(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of every new name is synced, after the name is there."""
    synced: dict[str, set[str]] = {}
    plain = os.fsync

    def fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if os.path.isdir(path):
            synced.setdefault(path, set()).update(os.listdir(path))
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    storage = Storage(root)
    storage.write("runs/a/status.json", b"1")
    storage.create("ledgers/l/0.json", b"1")

    def fill(folder: Path) -> None:
        (folder / "deep").mkdir()
        (folder / "deep" / "x").write_text("x")

    for _ in range(2):
        storage.make("worlds", "w", {}, fill, force=True)
    for path in ("runs", "runs/a", "runs/a/status.json", "ledgers/l/0.json", "worlds", "worlds/w"):
        folder, name = os.path.split(os.path.join(root, path))
        assert name in synced[folder], path
    inside = [names for path, names in synced.items() if path.endswith("/deep")]
    assert inside and all("x" in names for names in inside)


# -- the cache -----------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return tmp_path / "tmp"


def test_the_cache_is_private(place: Path) -> None:
    old = os.umask(0)
    try:
        folder = Storage("s3://bucket/x").local_path("cache")
    finally:
        os.umask(old)
    mine = place / f"mesocosm-{os.getuid()}"
    assert folder.is_relative_to(mine) and stat.S_IMODE(mine.stat().st_mode) == 0o700
    mine.chmod(0o755)
    Storage("s3://bucket/x").local_path("cache")
    assert stat.S_IMODE(mine.stat().st_mode) == 0o700


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to another user")
def test_a_cache_of_another_user_is_refused(place: Path) -> None:
    mine = place / f"mesocosm-{os.getuid()}"
    mine.mkdir()
    os.chown(mine, 12345, 12345)
    with pytest.raises(UsageError, match=r"must be a folder of this user; set storage\.cache"):
        Storage("s3://bucket/x").local_path("cache")


def test_a_link_in_place_of_the_cache_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (place / f"mesocosm-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"must be a folder of this user"):
        Storage("s3://bucket/x").local_path("cache")


def test_the_cache_lies_where_the_key_says(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "")
    use_cache(StorageConfig(cache=None).cache)
    assert Storage("s3://bucket/x").local_path().is_relative_to(place)
    use_cache(str(tmp_path / "big" / "disk"))
    folder = Storage("s3://bucket/x").local_path("cache")
    assert folder.is_relative_to(tmp_path / "big" / "disk" / f"mesocosm-{os.getuid()}")
    assert ray_session.worker_env()[CACHE_VARIABLE] == str(tmp_path / "big" / "disk")
    (tmp_path / "file").write_text("")
    use_cache(str(tmp_path / "file" / "x"))
    with pytest.raises(UsageError, match=r"cannot be created .*; set storage\.cache"):
        Storage("s3://bucket/x").local_path("cache")


def test_the_command_line_sets_the_cache(
    s3: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "")
    where = [f"storage.root={s3}/{tmp_path.name}", f"storage.cache={tmp_path / 'mine'}"]
    assert main(["data", "list", *where]) == 0
    made = Storage(f"{s3}/{tmp_path.name}").make("worlds", "w", {}, lambda folder: None)
    assert made.path.is_relative_to(tmp_path / "mine") and not list(place.iterdir())
