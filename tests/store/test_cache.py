"""Artifacts of which a machine holds what is read: fetched and verified once, within a budget,
whatever is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import cart_in_bucket

from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.loader import Loader
from mesocosm.datasets.dataset import Dataset
from mesocosm.errors import ArtifactError, UsageError
from mesocosm.store import cache
from mesocosm.store.artifacts import Storage
from mesocosm.store.cache import open_partial

Cart = Callable[..., str]
SHARDS = [f"shards/{number:05d}" for number in range(4)]


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For this test's caches. Made after pytest's own, which would lie in it, too."""
    with tempfile.TemporaryDirectory(prefix="meso-", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield


@pytest.fixture
def bucket(s3: str, tmp_path: Path) -> Storage:
    """A root in the bucket with the dataset `cart` of several shards, of which this machine has
    nothing.
    """
    return cart_in_bucket(f"{s3}/{tmp_path.name}", tmp_path, shard_rows=60)


def python(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def cached(storage: Storage) -> list[str]:
    """The shards in the cache."""
    return sorted(
        folder.name for folder in storage.local_path("cache", "parts").glob("*/*/*/shards/*")
    )


def remote_path(storage: Storage, unit: str, name: str) -> str:
    return storage._path(f"datasets/cart/{storage.folder_of('datasets', 'cart')}/{unit}/{name}")


def _bytes_here(storage: Storage) -> int:
    """Of the shards in the cache, from which threads remove some meanwhile."""
    while True:
        with suppress(FileNotFoundError):
            files = storage.local_path("cache", "parts").glob("*/*/*/shards/*/*")
            return sum(file.stat().st_size for file in files)


def test_only_what_is_read_is_fetched_and_once_for_all_processes(bucket: Storage) -> None:
    dataset = Dataset([open_partial(bucket, "datasets", "cart")])
    assert len(dataset.shards) > 4 and cached(bucket) == []
    dataset.array(2, "obs_num")
    assert cached(bucket) == ["00002"]
    for path in [path for path in bucket.files("datasets/cart") if "shards/00002" in path]:
        bucket.fs.rm(bucket._path(path))
    code = f"""
from mesocosm.store.artifacts import Storage
from mesocosm.store.cache import open_partial
print(open_partial(Storage({bucket.root!r}), "datasets", "cart").hold("shards/00002"))
"""
    out, errors = python(code).communicate(timeout=60)
    assert Path(out.strip()).is_dir(), errors
    with pytest.raises(
        ArtifactError, match=r"datasets/cart: file 'shards/00003/obs_num.npy' is damaged"
    ):
        damaged = remote_path(bucket, "shards/00003", "obs_num.npy")
        good = bucket.fs.cat(damaged)
        bucket.fs.pipe(damaged, good[:-1] + bytes([good[-1] ^ 1]))
        dataset.array(3, "reward")
    assert cached(bucket) == ["00002"], "nothing of a damaged shard is kept"
    bucket.fs.pipe(damaged, good)
    assert len(dataset.array(3, "reward")) > 0, "restored as the message says"


def test_a_fetch_that_is_killed_leaves_nothing_that_looks_whole(bucket: Storage) -> None:
    code = f"""
import os, signal
from mesocosm.store.artifacts import Storage
from mesocosm.store.cache import open_partial
storage = Storage({bucket.root!r})
fetch = storage.fetch
def half(commit, name, path):
    found = fetch(commit, name, path)
    if name.endswith("step.npy"):
        path.write_bytes(path.read_bytes()[:100])
        os.kill(os.getpid(), signal.SIGKILL)
    return found
storage.fetch = half
open_partial(storage, "datasets", "cart").hold("shards/00001")
"""
    killed = python(code)
    killed.communicate(timeout=60)
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
    code = f"""
from mesocosm.store.artifacts import Storage
from mesocosm.store.cache import open_partial
files = open_partial(Storage({bucket.root!r}), "datasets", "cart", {most})
print(files.hold("shards/00000"), flush=True)
input()
"""
    other = python(code)
    assert other.stdout is not None and other.stdout.readline()
    monkeypatch.setattr(cache, "PATIENCE_S", 0.5)
    with pytest.raises(
        ArtifactError,
        match=(
            r"other shards in use fill the cache .* give a larger data\.cache_gib or a smaller"
            r" data\.block"
        ),
    ):
        files.hold(SHARDS[3])
    assert cached(bucket) == ["00000", "00002"]
    other.kill()
    other.wait()
    files.hold(SHARDS[3])
    assert cached(bucket) == ["00002", "00003"], "a killed reader holds nothing"


def test_a_copy_that_is_here_is_verified_once(
    tmp_path: Path, cart_root: Cart, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(cart_root(tmp_path, 400, shard_rows=60))
    read: list[Path] = []
    monkeypatch.setattr(
        cache, "sha256", lambda path, plain=cache.sha256: read.append(path) or plain(path)
    )
    folder = open_partial(storage, "datasets", "cart").hold(SHARDS[1])
    assert len(read) == 8 and {path.parent for path in read} == {folder}
    open_partial(storage, "datasets", "cart").hold(SHARDS[1])
    assert len(read) == 8, "not again"
    reward = folder / "reward.npy"
    data = reward.read_bytes()
    reward.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(
        ArtifactError, match=r"datasets/cart: file 'shards/00001/reward.npy' is damaged"
    ):
        open_partial(storage, "datasets", "cart").hold(SHARDS[1])
    reward.write_bytes(data)
    open_partial(storage, "datasets", "cart").hold(SHARDS[1])
    os.unlink(reward)
    with pytest.raises(
        ArtifactError, match=r"datasets/cart: file 'shards/00001/reward.npy' is missing"
    ):
        open_partial(storage, "datasets", "cart").hold(SHARDS[1])


def test_data_larger_than_the_cache_load_as_from_a_folder(bucket: Storage, tmp_path: Path) -> None:
    local = Dataset([tmp_path / "root" / "datasets" / "cart"])
    codec = Codec.fit(local)
    sizes = sorted(local.shard_bytes(shard) for shard in range(len(local.shards)))
    most = 2 * sum(sizes[-2:])
    assert most < sum(sizes)
    dataset = Dataset([open_partial(bucket, "datasets", "cart", most)])
    assert Codec.fit(dataset).id == codec.id, (
        "what reads all of it in order needs no room for all of it"
    )
    expected, loader = (
        Loader(data, codec, "train", 8, 4, 0, events=6, block=2) for data in (local, dataset)
    )
    for step in range(2 * loader.windows_per_epoch // 4):
        batch, reference = loader.batch(step), expected.batch(step)
        assert (
            torch.equal(batch.observation.numbers, reference.observation.numbers)
            and batch.events is not None
            and reference.events is not None
        )
        assert torch.equal(batch.events.observation.numbers, reference.events.observation.numbers)
        assert _bytes_here(bucket) <= most
    for batch, reference in zip(
        *(
            Loader(data, codec, "valid", 8, 4, 0, block=2).eval_batches()
            for data in (dataset, local)
        ),
        strict=True,
    ):
        assert torch.equal(batch.observation.numbers, reference.observation.numbers)
    every, some = (
        list(Loader(local, codec, "valid", 8, 4, 0, block=2).eval_batches(most=most))
        for most in (None, 2)
    )
    hashes = [
        {int(hash) for batch in batches for hash in batch.episode[batch.mask.any(1)]}
        for batches in (every, some)
    ]
    of = {
        int(hash): int(shard)
        for hash, shard in local.table[["hash", "shard"]][local.episodes("valid")].tolist()
    }
    assert sum(int(batch.mask.any(1).sum()) for batch in some) == 2
    assert hashes[1] < hashes[0] and len({of[hash] for hash in hashes[1]}) <= 2 < len(
        {of[hash] for hash in hashes[0]}
    ), "no more shards than a block has"
    plain, expected_plain = (
        Loader(data, codec, "train", 8, 4, 0).batch(5) for data in (dataset, local)
    )
    assert torch.equal(plain.observation.numbers, expected_plain.observation.numbers), (
        "also where the order is not made for it"
    )
    with pytest.raises(
        UsageError, match=r"data\.cache_gib must be >= .* two blocks of data\.block=3 shards, got"
    ):
        Loader(dataset, codec, "train", 8, 4, 0, block=3)


def test_threads_share_it(bucket: Storage) -> None:
    """Four threads hold and release the same shards in different orders, with room for all."""
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


def test_a_release_by_one_thread_leaves_what_another_holds(
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
import sys, time
from pathlib import Path
from mesocosm.store.artifacts import Storage
from mesocosm.store.cache import open_partial
storage, at = Storage({root!r}), Path({at!r})
fetch = storage.fetch
def meet(*args):
    (at / {me!r}).touch()
    while not (at / {other!r}).exists():
        time.sleep(0.01)
    return fetch(*args)
storage.fetch = meet
print(open_partial(storage, "datasets", "cart", {most}).hold("shards/0000" + {me!r}))
"""
    most = sum(open_partial(bucket, "datasets", "cart").bytes(shard) for shard in SHARDS[:2])
    pairs = (("0", "1"), ("1", "0"))
    root, at = bucket.root, str(tmp_path)
    both = [python(code.format(root=root, at=at, me=a, other=b, most=most)) for a, b in pairs]
    try:
        outputs = [process.communicate(timeout=120) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], outputs
    assert cached(bucket) == ["00000", "00001"]
    assert not list(bucket.local_path("cache", "arriving").iterdir())


def test_what_others_are_fetching_counts_as_room_in_use(
    bucket: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = f"""
import time
from mesocosm.store.artifacts import Storage
from mesocosm.store.cache import open_partial
storage = Storage({bucket.root!r})
def stuck(*args):
    print("begun\\n", end="", flush=True)  # in one piece: two threads may be here
    time.sleep(600)
storage.fetch = stuck
open_partial(storage, "datasets", "cart").hold({SHARDS[0]!r})
"""
    other = python(code)
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
