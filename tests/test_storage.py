"""Artifacts appear whole or not at all; small files are created once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mesocosm.errors import ArtifactError, UsageError
from mesocosm.storage import Storage


def _fill(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "x.bin").write_bytes(b"abc" * 1000)


def test_an_artifact_is_found_again_with_its_lineage(root: str) -> None:
    storage = Storage(root)
    made = storage.make("datasets", "d1", {"inputs": {"world": "w"}}, _fill)
    found = storage.artifact("datasets", "datasets/d1")
    assert found.path == made.path and found.meta == {"inputs": {"world": "w"}}
    assert (found.path / "deep" / "x.bin").read_bytes() == b"abc" * 1000

    def never(folder: Path) -> None:
        raise AssertionError("made twice")

    assert storage.make("datasets", "d1", {}, never).id == "d1"
    with pytest.raises(AssertionError):
        storage.make("datasets", "d1", {}, never, force=True)


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
from mesocosm.storage import Storage
def fill(folder):
    (folder / "x").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
Storage({root!r}).make("worlds", "w", {{}}, fill)
"""
    killed = subprocess.run([sys.executable, "-c", code], timeout=60)
    assert killed.returncode == -signal.SIGKILL
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


def test_create_is_exclusive(root: str) -> None:
    storage = Storage(root)
    with ThreadPoolExecutor(8) as pool:
        wins = list(pool.map(lambda i: storage.create("ledgers/l/0.json", str(i).encode()), range(8)))
    assert sum(wins) == 1
    content = storage.read("ledgers/l/0.json")
    assert content is not None and wins[int(content)]
    assert storage.list("ledgers/l") == ["0.json"]


def test_two_makers_at_once_one_wins_whole(root: str) -> None:
    storage = Storage(root)

    def filler(i: int) -> str:
        def fill(folder: Path) -> None:
            for name in "abc":
                (folder / name).write_text(str(i))

        artifact = storage.make("laws", "l", {"maker": i}, fill)
        assert len({(artifact.path / name).read_text() for name in "abc"}) == 1
        return (artifact.path / "a").read_text()

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(filler, range(4)))) == 1
    commit = json.loads((Path(root) / "laws" / "l" / "COMMIT.json").read_text())
    assert str(commit["meta"]["maker"]) == (Path(root) / "laws" / "l" / "a").read_text()
    assert not os.listdir(Path(root) / "scratch")
