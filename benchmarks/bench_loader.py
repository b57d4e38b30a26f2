"""`make bench-loader`: the loader's bytes per second against a plain memory-mapped read, its
memory, and how long it takes to start.

    python benchmarks/bench_loader.py [--transitions N ...] [--remote N] [--rounds N] [--root
    FOLDER] [--save]

Generated datasets (8 observed numbers, 2 of action, episodes of 50 to 350 steps, shards as
`mesocosm` writes them) in a folder; one of --remote transitions also at an S3 endpoint, a
moto_server in a process of its own, or what MESOCOSM_TEST_S3_ENDPOINT names. Every measurement is a
process of its own. Windows of 32 transitions, 64 a batch, no events.

Plain read: the same windows of the same memory-mapped arrays, where they lie known beforehand, the
quicker of a slice a window and of a take a shard. Bytes are those of the rows that both hand out,
seconds the processor's (all pages are in memory; others work here, too). Rounds alternate; a ratio
is the plain read's seconds over the loader's, the median over rounds. `reading` is the loader up to
there (the permutation, the episodes' tables, the rows); `batch` is all of it, normalised and as
tensors. --save keeps the result in benchmarks/results/bench_loader.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import loader_tasks
import numpy as np
from bench_storage import endpoint
from gymnasium import spaces
from loader_tasks import BLOCK

from mesocosm.data.loading.codec import Codec
from mesocosm.datasets.dataset import Dataset, DatasetWriter, Environment
from mesocosm.datasets.episode import Episode
from mesocosm.store.artifacts import Storage
from mesocosm.store.cache import open_partial

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "bench_loader.json"


def write(folder: Path, id: str, transitions: int, shard_rows: int) -> None:
    """Episodes of noise; each is a slice of the same few megabytes."""
    draw = np.random.default_rng(0)
    rows = {
        "obs_num": draw.normal(size=(1 << 16, 8)).astype(np.float32).astype(np.float64),
        "act_num": draw.uniform(-1, 1, (1 << 16, 2)).astype(np.float32).astype(np.float64),
        "reward": draw.normal(size=1 << 16),
    }
    none = np.zeros((1 << 16, 0), np.uint8)
    facts = {
        "observation_space": spaces.Box(-np.inf, np.inf, (8,)),
        "action_space": spaces.Box(-1, 1, (2,)),
    }
    writer = DatasetWriter(
        folder,
        id=id,
        environment=Environment(id="Noise-v0"),
        seed=0,
        shard_rows=shard_rows,
        **facts,
    )
    left, index = transitions, 0
    while left > 0:
        length = min(left, int(draw.integers(50, 351)))
        at = int(draw.integers(0, (1 << 16) - 351))
        part = slice(at, at + length + 1)
        episode = Episode(
            index,
            index,
            "noise",
            [None] * (length + 1),
            [None] * length,
            rows["reward"][at : at + length],
            "truncated",
        )
        columns = {name: array[part] for name, array in rows.items()} | {
            "obs_cat": none[part],
            "act_cat": none[part],
        }
        columns |= {
            "terminated": np.zeros(length + 1, bool),
            "duration": np.full(length + 1, np.nan),
            "step": np.arange(length + 1, dtype=np.int32),
        }
        writer.add(episode, columns)
        left, index = left - length, index + 1
    writer.close()


def measured(**task: Any) -> dict[str, Any]:
    """`task` done in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--task", json.dumps(task)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--transitions", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000]
    )
    parser.add_argument("--remote", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--root",
        help=(
            "where the datasets are made, and kept for the next time; default: a folder that is"
            " removed"
        ),
    )
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        task = json.loads(options.task)
        print(json.dumps(getattr(loader_tasks, task.pop("what"))(**task)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["TMPDIR"] = tempfile.tempdir = temporary
        root = options.root or f"{temporary}/root"
        storage = Storage(root)
        for number in options.transitions:
            storage.make(
                "datasets", f"d{number}", {}, lambda to, n=number: write(to, f"d{n}", n, 1 << 20)
            )
        os.environ["CODECS"] = temporary
        codec = Codec.fit(
            Dataset([open_partial(storage, "datasets", f"d{options.transitions[0]}")])
        )
        (Path(temporary) / "codec.json").write_text(json.dumps(codec.to_json()))
        result: dict[str, Any] = {"start": {}, "memory": {}, "speed": {}}
        for number in options.transitions:
            shutil.rmtree(storage.machine_path("verified"), ignore_errors=True)
            first = measured(what="start", root=root, id=f"d{number}")
            again = [measured(what="start", root=root, id=f"d{number}") for _ in range(5)]
            row = {name: statistics.median(one[name] for one in again) for name in first} | {
                f"unverified_{name}": value for name, value in first.items()
            }
            result["start"][number] = row
            print(
                f"start, {number:,}: "
                + ", ".join(f"{name} {value:.1f}" for name, value in row.items()),
                flush=True,
            )
        largest = options.transitions[-1]
        for number, block in (
            *((number, None) for number in options.transitions[1:]),
            (largest, BLOCK),
        ):
            row = measured(
                what="speed", root=root, id=f"d{number}", block=block, rounds=options.rounds
            )
            result["speed"][f"folder, {number}, block {block}"] = row
            tell(f"folder, {number:,}, block {block}", row)
        for block in (None, BLOCK):
            row = result["memory"][f"block {block}"] = measured(
                what="memory", root=root, id=f"d{largest}", block=block
            )
            steps = "; ".join(
                f"step {at['step']}: own {at['own_mib']:.0f} MiB, with mapped files"
                f" {at['with_files_mib']:.0f}"
                for at in row["at"]
            )
            print(
                f"memory, {largest:,}, block {block}, an epoch of {row['steps']} batches: {steps}",
                flush=True,
            )
        with endpoint() as bucket:
            remote = Storage(f"s3://{bucket}/bench-loader")
            remote.fs.makedirs(bucket, exist_ok=True)
            remote.make(
                "datasets", "there", {}, lambda to: write(to, "there", options.remote, 1 << 17)
            )
            shutil.rmtree(remote.local_path("cache"))
            row = result["cold"] = measured(
                what="fetched", root=remote.root, id="there", block=BLOCK, cache_gib=64 / 1024
            )
            print(
                "s3, cold, an epoch in blocks through a cache of 64 MiB: "
                + ", ".join(f"{name} {value:.1f}" for name, value in row.items()),
                flush=True,
            )
            shutil.rmtree(remote.local_path("cache"))
            result["s3_start"] = {
                "cold": measured(what="start", root=remote.root, id="there"),
                "warm": measured(what="start", root=remote.root, id="there"),
            }
            print(f"s3, start: {json.dumps(result['s3_start'])}", flush=True)
            for block in (None, BLOCK):
                row = result["speed"][f"s3, block {block}"] = measured(
                    what="speed", root=remote.root, id="there", block=block, rounds=options.rounds
                )
                tell(f"s3, {options.remote:,}, warm, block {block}", row)
    if options.save:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE
        ).stdout.strip()
        facts = {
            "commit": commit,
            "command": "python " + " ".join(sys.argv),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        }
        RESULTS.write_text(json.dumps(facts | result, indent=1) + "\n")


def tell(name: str, row: dict[str, Any]) -> None:
    parts = [
        f"{part} {row[part]['mib_per_s']:.0f} MiB/s, ratio {row[part]['ratio']:.2f}"
        f" ({row[part]['lowest']:.2f} to {row[part]['highest']:.2f})"
        for part in ("reading", "batch")
    ]
    each = ", ".join(f"{part} {ms:.2f}" for part, ms in row["ms_a_batch"].items())
    print(
        f"speed, {name}: plain {row['plain_mib_per_s']:.0f} MiB/s, {'; '.join(parts)}; ms a batch:"
        f" {each}",
        flush=True,
    )


if __name__ == "__main__":
    main()
