"""The measurements of bench_loader.py, each run in a process of its own."""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.loader import Loader
from mesocosm.data.loading.windows import raw_rows
from mesocosm.datasets.dataset import Dataset
from mesocosm.store.artifacts import Storage
from mesocosm.store.cache import open_partial

WINDOW, BATCH, BLOCK = 32, 64, 2
STEPS = 200
"""Batches a round, about: a multiple of those that are read at once."""


def kib(field: str) -> int:
    return next(
        int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field)
    )


def opened(
    root: str, id: str, block: int | None, cache_gib: float | None = None
) -> tuple[Dataset, Codec, Loader]:
    dataset = Dataset(
        [
            open_partial(
                Storage(root), "datasets", id, None if cache_gib is None else int(cache_gib * 2**30)
            )
        ]
    )
    codec = Codec.from_json(json.loads((Path(os.environ["CODECS"]) / "codec.json").read_text()))
    return dataset, codec, Loader(dataset, codec, "train", WINDOW, BATCH, 0, block=block)


def start(root: str, id: str) -> dict[str, Any]:
    """The time to make the loader, and to get its first batch."""
    began = time.perf_counter()
    *_, loader = opened(root, id, None)
    ready = time.perf_counter()
    loader.batch(0)
    return {"open_ms": 1e3 * (ready - began), "first_batch_ms": 1e3 * (time.perf_counter() - ready)}


def memory(root: str, id: str, block: int | None) -> dict[str, Any]:
    """An epoch: this process's own memory, and with the pages of the files that it has mapped."""
    *_, loader = opened(root, id, block)
    steps = loader.windows_per_epoch // BATCH
    points = []
    for step in range(steps):
        loader.batch(step)
        if step in (steps // 10, steps // 2, steps - 1):
            points.append(
                {
                    "step": step,
                    "own_mib": kib("RssAnon") / 1024,
                    "with_files_mib": kib("VmRSS") / 1024,
                }
            )
    return {"steps": steps, "at": points}


def fetched(root: str, id: str, block: int, cache_gib: float) -> dict[str, Any]:
    """An epoch from an empty cache that cannot hold it all: MiB that were fetched and read, and
    seconds.
    """
    dataset, _, loader = opened(root, id, block, cache_gib)
    began, most = time.perf_counter(), 0
    for step in range(loader.windows_per_epoch // BATCH):
        loader.batch(step)
        if step % 20 == 0:
            most = max(
                most,
                sum(
                    f.stat().st_size
                    for f in Storage(root).local_path("cache", "parts").rglob("shards/*/*")
                ),
            )
    seconds = time.perf_counter() - began
    whole = sum(map(dataset.shard_bytes, range(len(dataset.shards))))
    return {
        "seconds": seconds,
        "dataset_mib": whole / 2**20,
        "mib_per_s": whole / 2**20 / seconds,
        "cache_at_most_mib": most / 2**20,
    }


def speed(root: str, id: str, block: int | None, rounds: int) -> dict[str, Any]:
    dataset, _, loader = opened(root, id, block)
    spent: dict[str, list[float]] = {"slices": [], "takes": [], "reading": [], "batch": []}
    passes: dict[str, float] = {}
    total, count = 0, max(1, round(STEPS / loader._at_once)) * loader._at_once
    for shard in range(
        len(dataset.shards) if block is None else 0
    ):  # the first reader would pay for mapping a page
        for name in ("obs_num", "act_num", "reward", "terminated"):
            dataset.array(shard, name).sum()
    for number in range(rounds + 1):  # the first is not counted: tables
        steps = range(number * count, (number + 1) * count)
        places = [loader._places(np.arange(BATCH) + step * BATCH) for step in steps]
        lying = []
        for place in places:
            shards, first = place["shard"], place["first_row"] + place["start"]
            names = dict.fromkeys(("obs_num", "obs_cat"), 1) | dict.fromkeys(
                ("act_num", "act_cat", "reward", "terminated"), 0
            )
            lying.append((shards.tolist(), first.tolist(), place["count"].tolist(), names))
        loader._turn(steps[0], 0, BATCH)
        arrays = (
            {
                (shard, name): dataset.array(shard, name)
                for shard in range(len(dataset.shards))
                for name in names
            }
            if block is None
            else None
        )
        order = (
            ["slices", "takes", "reading", "batch"]
            if number % 2
            else ["batch", "reading", "takes", "slices"]
        )
        for part in (
            "takes",
            *order,
        ):  # the first of them pays for memory that no cache has: it counts only if it comes again
            seconds = 0.0
            loader._read_ahead = -1, {}
            for step, (shards, first, length, names) in zip(steps, lying, strict=True):
                if part in ("slices", "takes"):
                    if block is not None:
                        loader._turn(step - step % loader._at_once, 0, BATCH)
                    here = (
                        arrays
                        if arrays is not None
                        else {(s, n): dataset.array(s, n) for s in set(shards) for n in names}
                    )
                    by_shard = {s: np.flatnonzero(np.array(shards) == s) for s in set(shards)}
                    out = {
                        n: np.empty(
                            (BATCH, WINDOW + more, *here[shards[0], n].shape[1:]),
                            here[shards[0], n].dtype,
                        )
                        for n, more in names.items()
                    }
                if part == "takes":
                    padded = [
                        np.minimum(np.arange(WINDOW + 1), n) + f
                        for f, n in zip(first, length, strict=True)
                    ]
                    tails = [
                        np.minimum(np.arange(WINDOW), max(n - 1, 0)) + f
                        for f, n in zip(first, length, strict=True)
                    ]
                    lie = {
                        s: (np.array([tails[i] for i in at]), np.array([padded[i] for i in at]))
                        for s, at in by_shard.items()
                    }
                began = time.thread_time()
                if part == "slices":
                    for name, more in names.items():
                        into = out[name]
                        for i in range(BATCH):
                            into[i, : length[i] + more] = here[shards[i], name][
                                first[i] : first[i] + length[i] + more
                            ]
                elif part == "takes":
                    for s, at in by_shard.items():
                        for name, more in names.items():
                            values = here[s, name].take(lie[s][more], axis=0)
                            if len(by_shard) > 1:
                                out[name][at] = values
                elif part == "reading":
                    if step % loader._at_once == 0:
                        loader._turn(step, 0, BATCH)
                        samples = np.arange(loader._at_once * BATCH) + step * BATCH
                        data = raw_rows(dataset, loader.codec, loader._places(samples), WINDOW)
                        if number == 0:
                            total += sum(array.nbytes for array in data.values())
                else:
                    loader.batch(step)
                seconds += time.thread_time() - began
            passes[part] = seconds
        if number:
            for part in order:
                spent[part].append(passes[part])
    plain = [min(pair) for pair in zip(spent["slices"], spent["takes"], strict=True)]
    speeds: dict[str, Any] = {
        "bytes_a_batch": total // count,
        "plain_mib_per_s": total / 2**20 / statistics.median(plain),
    }
    for part in ("reading", "batch"):
        ratios = [a / b for a, b in zip(plain, spent[part], strict=True)]
        speeds[part] = {
            "mib_per_s": total / 2**20 / statistics.median(spent[part]),
            "ratio": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
        }
    return speeds | {
        "ms_a_batch": {part: 1e3 * statistics.median(each) / count for part, each in spent.items()}
    }
