"""Pretraining on a bucket's data that are larger than the machine's cache: in blocks, of two
datasets by weight, by two workers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from factories import SMALL_WORLD

from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.writer import write_dataset
from mesocosm.store.artifacts import Storage

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_local")]
Make = Callable[..., Any]
STEPS = ["train.steps=12", "train.checkpoint_every=4", "train.validate_every=6"]
STEPS += ["train.peak_flops=1e9", "data.datasets=[cart,again]", "data.block=1"]


@pytest.fixture(autouse=True)
def short_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For this test's caches; a short name, for Ray's sockets lie in it. Made after pytest's own,
    which would lie in it, too.
    """
    with tempfile.TemporaryDirectory(prefix="meso-", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield


def test_training_through_a_small_cache_is_that_from_a_folder(
    s3: str, tmp_path: Path, cart_root: Make, pretrain: Make
) -> None:
    local = Storage(cart_root(tmp_path, 400, shard_rows=50))
    first = Dataset([local.artifact("datasets", "cart").path])
    names = ("environment", "observation_space", "action_space")
    facts = {name: getattr(first, name) for name in names}
    bucket = Storage(f"{s3}/{tmp_path.name}")

    def copy(storage: Storage, id: str, seed: int, episodes: list[Any]) -> None:
        def fill(folder: Path) -> None:
            write_dataset(folder, episodes, id=id, seed=seed, shard_rows=50, **facts)

        storage.make("datasets", id, {}, fill)

    episodes = list(first.iter_episodes())
    odd = [episode for episode in episodes if episode.index % 2]
    copy(local, "again", 1, odd)
    copy(bucket, "again", 1, odd)
    copy(bucket, "cart", 0, episodes)
    datasets = Dataset([local.artifact("datasets", id).path for id in ("cart", "again")])
    sizes = [datasets.shard_bytes(shard) for shard in range(len(datasets.shards))]
    most = 5 * max(sizes)
    assert most < sum(sizes)
    options = (*STEPS, "data.weights=[1,3]", f"data.cache_gib={most / 2**30}")
    whole = pretrain(local.root, *options)

    for id in ("cart", "again"):
        bucket.local_path("cache", "datasets", id).rename(tmp_path / f"moved-{id}")
    words = [
        f"storage.root={bucket.root}",
        *SMALL_WORLD,
        "train.lr=3e-3",
        *options,
        "train.workers=2",
        "--json",
    ]
    command = [
        sys.executable,
        "-m",
        "mesocosm",
        "pretrain",
        *words,
        "train.workers=2",
        "tracking.uri=none",
    ]
    command += ["--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    world = bucket.artifact("worlds", whole.artifact.id)
    metrics = bucket.read(f"runs/pretrain/{world.meta['run']}/metrics.jsonl") or b""
    lines = map(json.loads, metrics.splitlines())
    losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    expected = {step: values[0] for step, values in whole.losses.items()}
    assert losses == pytest.approx(expected, abs=1e-4)
    files = bucket.local_path("cache", "parts").rglob("shards/*/*")
    cached = [file.stat().st_size for file in files if file.is_file()]
    assert cached and sum(cached) <= most
    plain = pretrain(local.root, *STEPS)
    assert plain.artifact.id != whole.artifact.id and plain.losses != whole.losses
