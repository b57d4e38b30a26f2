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
STEPS = (
    "train.steps=12",
    "train.checkpoint_every=4",
    "train.validate_every=6",
    "train.peak_flops=1e9",
    "data.datasets=[cart,again]",
    "data.block=1",
)


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
    facts = {
        "environment": first.environment,
        "observation_space": first.observation_space,
        "action_space": first.action_space,
    }
    episodes = [episode for episode in first.iter_episodes() if episode.index % 2]
    bucket = Storage(f"{s3}/{tmp_path.name}")
    for storage in (local, bucket):
        storage.make(
            "datasets",
            "again",
            {},
            lambda to: (
                write_dataset(to, episodes, id="again", seed=1, shard_rows=50, **facts) and None
            ),
        )
    bucket.make(
        "datasets",
        "cart",
        {},
        lambda to: (
            write_dataset(to, first.iter_episodes(), id="cart", seed=0, shard_rows=50, **facts)
            and None
        ),
    )
    datasets = Dataset([local.artifact("datasets", id).path for id in ("cart", "again")])
    sizes = [datasets.shard_bytes(shard) for shard in range(len(datasets.shards))]
    most = 5 * max(sizes)
    assert most < sum(sizes)
    options = (*STEPS, "data.weights=[1,3]", f"data.cache_gib={most / 2**30}")
    whole = pretrain(local.root, *options)

    for id in ("cart", "again"):
        bucket.local_path("cache", "datasets", id).rename(tmp_path / f"away-{id}")
    words = [
        f"storage.root={bucket.root}",
        *SMALL_WORLD,
        "train.lr=3e-3",
        *options,
        "train.workers=2",
    ]
    words += ["--json"]
    done = subprocess.run(
        [sys.executable, "-m", "mesocosm", "pretrain", *words],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    world = bucket.artifact("worlds", whole.artifact.id)
    lines = map(
        json.loads,
        (bucket.read(f"runs/pretrain/{world.meta['run']}/metrics.jsonl") or b"").splitlines(),
    )
    losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    assert losses == pytest.approx({step: of[0] for step, of in whole.losses.items()}, abs=1e-4)
    cached = [
        file for file in bucket.local_path("cache", "parts").rglob("shards/*/*") if file.is_file()
    ]
    assert cached and sum(file.stat().st_size for file in cached) <= most
    plain = pretrain(local.root, *STEPS)
    assert plain.artifact.id != whole.artifact.id and plain.losses != whole.losses
