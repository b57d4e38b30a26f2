"""Artifacts appear whole or not at all; small files are created once."""

from __future__ import annotations

import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mesocosm.config import JobConfig, StorageConfig
from mesocosm.errors import ArtifactError, UsageError
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Storage

from .conftest import fill_with, python


def _fill(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "x.bin").write_bytes(b"abc" * 1000)


def test_an_artifact_is_found_again_with_its_lineage(root: str) -> None:
    storage = Storage(root)
    artifact = storage.make("datasets", "d1", {"inputs": {"world": "w"}}, _fill)
    again = storage.artifact("datasets", "datasets/d1")
    assert again.path == artifact.path and again.meta == {"inputs": {"world": "w"}}
    assert (again.path / "deep" / "x.bin").read_bytes() == b"abc" * 1000

    def never(folder: Path) -> None:
        raise AssertionError("made twice")

    assert storage.make("datasets", "d1", {}, never).id == "d1"
    with pytest.raises(AssertionError):
        storage.make("datasets", "d1", {}, never, force=True)
    assert storage.artifact("datasets", "d1").meta == {"inputs": {"world": "w"}}, "the old stays"


def test_force_replaces_it_whole(any_root: str) -> None:
    storage = Storage(any_root)
    storage.make("worlds", "w", {"n": 1}, fill_with(a="old", b="old"))
    artifact = storage.make("worlds", "w", {"n": 2}, fill_with(a="new"), force=True)
    assert artifact.meta == {"n": 2} and (artifact.path / "a").read_text() == "new"
    assert Storage(any_root).artifact("worlds", "w").meta == {"n": 2}
    files = [path for path in storage.files("worlds/w") if not path.endswith("COMMIT.json")]
    assert len(files) == 1, "nothing of the old one is left"


def test_ctrl_c_while_it_is_made_again_leaves_the_old_one(any_root: str) -> None:
    storage = Storage(any_root)
    storage.make("worlds", "w", {}, fill_with(a="old"))

    def interrupted(folder: Path) -> None:
        (folder / "a").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storage.make("worlds", "w", {}, interrupted, force=True)
    assert (storage.artifact("worlds", "w").path / "a").read_text() == "old"


def test_a_slower_maker_changes_nothing(any_root: str) -> None:
    """The second began before the first was done, and is done after it."""
    storage = Storage(any_root)

    def slow(folder: Path) -> None:
        Storage(any_root).make("worlds", "w", {"maker": "fast"}, fill_with(a="fast"))
        fill_with(a="slow", b="slow")(folder)

    artifact = storage.make("worlds", "w", {"maker": "slow"}, slow)
    assert artifact.meta == {"maker": "fast"} and (artifact.path / "a").read_text() == "fast"
    shutil.rmtree(storage.local_path("cache"), ignore_errors=True)
    assert (Storage(any_root).artifact("worlds", "w").path / "a").read_text() == "fast"
    assert len(storage.fs.find(storage._path("worlds", "w"))) == 2, "what lost is removed"


def test_a_root_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    message = r"storage\.root '.*file/root' cannot be written \(Not a directory\); name a folder"
    with pytest.raises(UsageError, match=message) as error:
        Storage(str(tmp_path / "file" / "root")).check_writable()
    assert error.value.exit_code == 2
    config = JobConfig(storage=StorageConfig(str(tmp_path / "file")))
    run = tracking.start("collect", config, quiet=True)
    with pytest.raises(UsageError, match="cannot be written"), run:
        raise AssertionError


def test_a_failed_or_killed_maker_leaves_nothing_to_be_taken_for_whole(root: str) -> None:
    storage = Storage(root)

    def fails(folder: Path) -> None:
        _fill(folder)
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError):
        storage.make("worlds", "w", {}, fails)
    assert storage.find("worlds", "w") is None
    code = f"""
import os, signal
from mesocosm.store.artifacts import Storage
def fill(folder):
    (folder / "x").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
Storage({root!r}).make("worlds", "w", {{}}, fill)
"""
    assert python(code).wait(60) == -signal.SIGKILL
    assert storage.find("worlds", "w") is None and storage.list("worlds") == []
    assert storage.make("worlds", "w", {}, _fill).id == "w"


def test_a_flipped_byte_is_named(root: str) -> None:
    storage = Storage(root)
    path = storage.make("datasets", "d", {}, _fill).path / "deep" / "x.bin"
    path.write_bytes(b"abd" + path.read_bytes()[3:])
    with pytest.raises(ArtifactError, match=r"datasets/d.*deep/x\.bin.*--force"):
        storage.artifact("datasets", "d")


def test_a_missing_artifact_is_named_with_the_nearest(root: str) -> None:
    storage = Storage(root)
    storage.make("worlds", "abcdef01", {}, _fill)
    assert storage.artifact("worlds", "abc").id == "abcdef01"
    with pytest.raises(UsageError, match=r"abcdef02.*abcdef01"):
        storage.artifact("worlds", "abcdef02")
    with pytest.raises(UsageError, match=r"no artifact worlds/'' .*; .*worlds holds abcdef01"):
        storage.artifact("worlds", "")
    with pytest.raises(UsageError, match=r"no artifact agents/x .*; .*agents holds none yet"):
        storage.artifact("agents", "x")


def test_create_is_exclusive(root: str) -> None:
    storage = Storage(root)
    with ThreadPoolExecutor(8) as pool:
        contents = [str(i).encode() for i in range(8)]
        wins = list(pool.map(lambda content: storage.create("ledgers/l/0.json", content), contents))
    assert sum(wins) == 1
    content = storage.read("ledgers/l/0.json")
    assert content is not None and wins[int(content)]
    assert storage.list("ledgers/l") == ["0.json"]
