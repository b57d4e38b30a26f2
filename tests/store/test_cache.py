"""Partial artifacts: units are fetched and verified once, within a budget, whatever is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import cart_in_bucket

from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.loader import Loader
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.split import Split
from mesocosm.errors import ArtifactError, UsageError
from mesocosm.store import cache
from mesocosm.store.artifacts import Storage
from mesocosm.store.cache import open_partial

from .conftest import python

pytestmark = pytest.mark.usefixtures("temporary_folder")
SHARDS = [f"shards/{number:05d}" for number in range(4)]


OPEN = """
import os, signal, sys, time
from pathlib import Path
from mesocosm.store.artifacts import Storage
from mesocosm.store.cache import open_partial
storage = Storage({root!r})
fetch = storage.fetch
"""


@pytest.fixture
def bucket(s3: str, tmp_path: Path) -> Storage:
    """A root with the dataset `cart` of several shards, of which this machine has nothing."""
    return cart_in_bucket(f"{s3}/{tmp_path.name}", tmp_path, shard_rows=60)


def cached(storage: Storage) -> list[str]:
    """The shards in the cache."""
    parts = storage.local_path("cache", "parts")
    return sorted(folder.name for folder in parts.glob("*/*/*/shards/*"))


def cached_bytes(storage: Storage) -> int:
    """Bytes of the shards in the cache, from which threads remove some meanwhile."""
    while True:
        with suppress(FileNotFoundError):
            files = storage.local_path("cache", "parts").glob("*/*/*/shards/*/*")
            return sum(file.stat().st_size for file in files)


def test_only_units_in_use_are_fetched_and_once_for_all_processes(bucket: Storage) -> None:
    dataset = Dataset([open_partial(bucket, "datasets", "cart")])
    assert len(dataset.shards) > 4 and cached(bucket) == []
    dataset.array(2, "obs_num")
    assert cached(bucket) == ["00002"]
    for path in [path for path in bucket.files("datasets/cart") if "shards/00002" in path]:
        bucket.fs.rm(bucket._path(path))
    code = OPEN + 'print(open_partial(storage, "datasets", "cart").hold("shards/00002"))'
    out, errors = python(code.format(root=bucket.root)).communicate(timeout=600)
    assert Path(out.strip()).is_dir(), errors
    folder = bucket.folder_of("datasets", "cart")
    damaged = bucket._path(f"datasets/cart/{folder}/shards/00003/obs_num.npy")
    good = bucket.fs.cat(damaged)
    bucket.fs.pipe(damaged, good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=r"file 'shards/00003/obs_num.npy' is damaged"):
        dataset.array(3, "reward")
    assert cached(bucket) == ["00002"], "nothing of a damaged shard is kept"
    bucket.fs.pipe(damaged, good)
    assert len(dataset.array(3, "reward")) > 0, "restored as the message says"


def test_a_fetch_that_is_killed_leaves_nothing_that_looks_whole(bucket: Storage) -> None:
    code = """
def half(commit, name, path):
    fetch(commit, name, path)
    if name.endswith("step.npy"):
        path.write_bytes(path.read_bytes()[:100])
        os.kill(os.getpid(), signal.SIGKILL)
    return True
storage.fetch = half
open_partial(storage, "datasets", "cart").hold("shards/00001")
"""
    killed = python((OPEN + code).format(root=bucket.root))
    killed.communicate(timeout=600)
    assert killed.returncode == -signal.SIGKILL
    assert cached(bucket) == [] and list(bucket.local_path("cache", "arriving").rglob("*.npy"))
    folder = open_partial(bucket, "datasets", "cart").hold("shards/00001")
    assert cached(bucket) == ["00001"] and np.load(folder / "step.npy").ndim == 1
    assert not bucket.local_path("cache", "arriving", "shards", "00001").exists()


def test_the_least_recently_used_goes_and_never_one_in_use(
    bucket: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = open_partial(bucket, "datasets", "cart")
    sizes = [every.bytes(shard) for shard in SHARDS]
    most = sum(sorted(sizes)[-2:]) + 100
    files = open_partial(bucket, "datasets", "cart", most)
    for shard in SHARDS[:2]:
        files.hold(shard)
        files.release([shard])
    files.release([SHARDS[1], SHARDS[0]])
    files.hold(SHARDS[0])
    files.release([SHARDS[0]])
    files.hold(SHARDS[2])
    assert cached(bucket) == ["00000", "00002"], "the one used least recently went"
    code = """
files = open_partial(storage, "datasets", "cart", {most})
print(files.hold("shards/00000"), flush=True)
input()
"""
    other = python((OPEN + code).format(root=bucket.root, most=most))
    assert other.stdout is not None and other.stdout.readline()
    monkeypatch.setattr(cache, "PATIENCE_S", 0.5)
    with pytest.raises(ArtifactError, match=r"shards in use .* data\.cache_gib .* data\.block"):
        files.hold(SHARDS[3])
    assert cached(bucket) == ["00000", "00002"]
    other.kill()
    other.wait()
    files.hold(SHARDS[3])
    assert cached(bucket) == ["00002", "00003"], "a killed reader holds nothing"


def test_a_local_copy_is_verified_once(
    tmp_path: Path, cart_root: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(cart_root(tmp_path, 400, shard_rows=60))
    read: list[Path] = []

    def sha256(path: Path, plain: Callable[[Path], str] = cache.sha256) -> str:
        read.append(path)
        return plain(path)

    def hold() -> Path:
        return open_partial(storage, "datasets", "cart").hold(SHARDS[1])

    monkeypatch.setattr(cache, "sha256", sha256)
    folder = hold()
    assert len(read) == 8 and {path.parent for path in read} == {folder}
    hold()
    assert len(read) == 8, "not again"
    reward = folder / "reward.npy"
    data = reward.read_bytes()
    reward.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=r"cart: file 'shards/00001/reward.npy' is damaged"):
        hold()
    reward.write_bytes(data)
    hold()
    os.unlink(reward)
    with pytest.raises(ArtifactError, match=r"cart: file 'shards/00001/reward.npy' is missing"):
        hold()


def test_data_larger_than_the_cache_load_as_from_a_folder(bucket: Storage, tmp_path: Path) -> None:
    local = Dataset([tmp_path / "root" / "datasets" / "cart"])
    codec = Codec.fit(local)
    sizes = sorted(local.shard_bytes(shard) for shard in range(len(local.shards)))
    most = 2 * sum(sizes[-2:])
    assert most < sum(sizes)
    dataset = Dataset([open_partial(bucket, "datasets", "cart", most)])
    assert Codec.fit(dataset).id == codec.id, "a fit reads shards in order and needs few at once"

    def load(data: Dataset, split: Split, **options: int) -> Loader:
        return Loader(data, codec, split, 8, 4, 0, **options)

    def same(a: Any, b: Any) -> bool:
        return torch.equal(a.observation.numbers, b.observation.numbers)

    expected, loader = (load(data, "train", events=6, block=2) for data in (local, dataset))
    for step in range(2 * loader.windows_per_epoch // 4):
        batch, reference = loader.batch(step), expected.batch(step)
        assert batch.events is not None and reference.events is not None
        assert same(batch, reference) and same(batch.events, reference.events)
        assert cached_bytes(bucket) <= most
    valid = [list(load(data, "valid", block=2).eval_batches()) for data in (dataset, local)]
    assert all(same(*pair) for pair in zip(*valid, strict=True))
    some = list(load(local, "valid", block=2).eval_batches(most=2))
    assert sum(int(batch.mask.any(1).sum()) for batch in some) == 2
    all_hashes, some_hashes = (
        {int(hash) for batch in batches for hash in batch.episode[batch.mask.any(1)]}
        for batches in (valid[1], some)
    )
    table = local.table[local.episodes("valid")]
    shard_of = dict(zip(table["hash"].tolist(), table["shard"].tolist(), strict=True))
    counts = [len({shard_of[hash] for hash in hashes}) for hashes in (some_hashes, all_hashes)]
    assert some_hashes < all_hashes and counts[0] <= 2 < counts[1], "at most a block's shards"
    unblocked = [load(data, "train").batch(5) for data in (dataset, local)]
    assert same(*unblocked), "also where the order does not suit the cache"
    with pytest.raises(UsageError, match=r"data\.cache_gib must be >= .* data\.block=3 .*, got"):
        load(dataset, "train", block=3)


def test_threads_share_it(bucket: Storage) -> None:
    """They hold and release the same shards in different orders, with room for all."""
    files = open_partial(bucket, "datasets", "cart")
    sizes = {shard: files.bytes(shard) for shard in SHARDS}

    def work(seed: int) -> int:
        random, done = np.random.default_rng(seed), 0
        for shard in random.choice(SHARDS, 150).tolist():
            files.ahead([SHARDS[done % len(SHARDS)]])
            folder = files.hold(shard)
            assert sum(file.stat().st_size for file in folder.iterdir()) == sizes[shard]
            files.release([shard])
            done += 1
        return done

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [150] * 4


def test_a_release_by_one_thread_leaves_the_hold_of_another(
    bucket: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = open_partial(bucket, "datasets", "cart", 1)  # no shard fits beside another
    files.most = files.bytes(SHARDS[0]) + 1
    files.hold(SHARDS[0])
    with ThreadPoolExecutor(1) as pool:
        pool.submit(files.hold, SHARDS[0]).result()
        pool.submit(files.release, [SHARDS[0]]).result()
    monkeypatch.setattr(cache, "PATIENCE_S", 0.5)
    with pytest.raises(ArtifactError, match="other shards in use fill the cache"):
        files.hold(SHARDS[1])
    assert cached(bucket) == ["00000"], "it is still held by this thread"


def test_processes_fetch_different_shards_at_the_same_time(bucket: Storage, tmp_path: Path) -> None:
    """Each is in the middle of its fetch when the other begins."""
    code = """
def meet(*args):
    Path({at!r}, {me!r}).touch()
    while not Path({at!r}, {other!r}).exists():
        time.sleep(0.01)
    return fetch(*args)
storage.fetch = meet
print(open_partial(storage, "datasets", "cart", {most}).hold("shards/0000" + {me!r}))
"""
    most = sum(open_partial(bucket, "datasets", "cart").bytes(shard) for shard in SHARDS[:2])
    pairs = (("0", "1"), ("1", "0"))
    root, at = bucket.root, str(tmp_path)
    both = [
        python((OPEN + code).format(root=root, at=at, me=a, other=b, most=most)) for a, b in pairs
    ]
    try:
        outputs = [process.communicate(timeout=600) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], outputs
    assert cached(bucket) == ["00000", "00001"]
    assert not list(bucket.local_path("cache", "arriving").iterdir())


def test_fetches_of_other_processes_count_as_room_in_use(
    bucket: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
def stuck(*args):
    print("begun\\n", end="", flush=True)  # in one piece: two threads may be here
    time.sleep(600)
storage.fetch = stuck
open_partial(storage, "datasets", "cart").hold("shards/00000")
"""
    other = python((OPEN + code).format(root=bucket.root))
    assert other.stdout is not None and other.stdout.readline() == "begun\n"
    files = open_partial(bucket, "datasets", "cart")
    files.most = files.bytes(SHARDS[0]) + files.bytes(SHARDS[1]) - 1
    monkeypatch.setattr(cache, "PATIENCE_S", 0.5)
    try:
        with pytest.raises(ArtifactError, match="other shards in use fill the cache"):
            files.hold(SHARDS[1])
    finally:
        other.kill()
        other.wait()
    files.hold(SHARDS[1])
    assert cached(bucket) == ["00001"], "a killed fetch reserves nothing"
