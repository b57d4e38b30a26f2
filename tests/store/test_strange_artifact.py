"""An artifact that a stranger made: its commit record may name anything."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from mesocosm.errors import ArtifactError
from mesocosm.store.artifacts import COMMIT, Storage


@pytest.mark.parametrize("way", ["relative", "absolute", "folder"])
def test_no_file_lands_outside_of_the_cache(
    s3: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    storage = Storage(f"{s3}/{way}")
    cache = storage.local_path("cache", "worlds", "w0")
    target = tmp_path / "owned"
    storage.make("worlds", "w0", {}, lambda folder: (folder / "a.json").write_text("{}") and None)
    commit = json.loads(storage.read(f"worlds/w0/{COMMIT}") or b"")
    entry = {"sha256": hashlib.sha256(b"evil").hexdigest(), "bytes": 4}
    up = "/".join([".."] * len(cache.relative_to(tmp_path).parts)) + "/owned"
    name = {"relative": up, "absolute": str(target), "folder": "a.json"}[way]
    commit |= {"files": {name: entry}, "folder": "../x" if way == "folder" else commit["folder"]}
    bucket = f"{s3.removeprefix('s3://')}/{way}/worlds/w0/{commit['folder']}/{name}"
    storage.fs.call_s3(
        "put_object", Bucket=bucket.split("/")[0], Key=bucket.partition("/")[2], Body=b"evil"
    )
    storage.write(f"worlds/w0/{COMMIT}", json.dumps(commit).encode())
    with pytest.raises(ArtifactError, match=r"COMMIT\.json names '.*', .* outside of the artifact"):
        storage.find("worlds", "w0")
    assert not target.exists()
