"""`make bench-storage`: making and opening an artifact on S3 against the s3fs client alone, which
transfers the same files.

    python benchmarks/bench_storage.py [--rounds N] [--mib N ...] [--save]

The endpoint is a moto_server in a process of its own, on loopback, or what
MESOCOSM_TEST_S3_ENDPOINT names (with MESOCOSM_TEST_S3_BUCKET). Rounds alternate in one run; a ratio
is s3fs's seconds over ours, and its median over rounds is reported. Ours include the checksums, the
marker, and for making the copy that stays in the cache; both begin with the files on this machine's
disk, and end with them there. --save keeps the result in benchmarks/results/bench_storage.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import s3fs

from mesocosm.store.artifacts import Storage
from mesocosm.store.files import sha256

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "bench_storage.json"
MIB = 1 << 20
SIZES = [96, 48, 48, *[8] * 8]
"""MiB of the artifact's files: 256 in all."""


@contextmanager
def endpoint() -> Iterator[str]:
    """A bucket at the endpoint that the environment then names."""
    bucket = os.environ.get("MESOCOSM_TEST_S3_BUCKET", "bucket")
    if named := os.environ.get("MESOCOSM_TEST_S3_ENDPOINT"):
        os.environ["AWS_ENDPOINT_URL"] = named
        yield bucket
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    try:
        for _ in range(600):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        yield bucket
    finally:
        server.terminate()
        server.wait(30)


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mib", type=int, nargs="+", default=SIZES)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    total = sum(options.mib)
    rounds: list[dict[str, float]] = []
    with endpoint() as bucket, tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        source = Path(folder) / "source"
        source.mkdir()
        for i, mib in enumerate(options.mib):
            (source / f"{i:02d}.bin").write_bytes(os.urandom(mib * MIB))
        names = sorted(path.name for path in source.iterdir())
        alone = s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"])
        alone.makedirs(bucket, exist_ok=True)
        storage = Storage(f"s3://{bucket}/bench-{uuid.uuid4().hex[:8]}")

        def link(to: Path) -> None:
            for name in names:
                os.link(source / name, to / name)

        def one(number: int) -> dict[str, float]:
            targets = [f"{storage._path('alone', str(number))}/{name}" for name in names]
            back = Path(folder) / "back"
            back.mkdir()
            spent = {}
            steps = {
                "put": lambda: alone.put([str(source / name) for name in names], targets),
                "make": lambda: storage.make("datasets", str(number), {}, link),
                "get": lambda: alone.get(targets, [str(back / name) for name in names]),
                "open": lambda: storage.artifact("datasets", str(number)),
                "sha256": lambda: [sha256(source / name) for name in names],
            }
            order = ["put", "make", "get", "open"] if number % 2 else ["make", "put", "open", "get"]
            for step in [*order, "sha256"]:
                if step == "open":
                    shutil.rmtree(storage.local_path("cache"))
                spent[step] = seconds(steps[step])
            shutil.rmtree(back)
            storage.fs.rm(storage._base, recursive=True)
            return spent

        one(0)  # the first connects, and is not counted
        rounds = [one(number) for number in range(1, options.rounds + 1)]
    mid = {step: statistics.median(round[step] for round in rounds) for step in rounds[0]}
    rows = []
    print(f"{len(names)} files, {total} MiB; median of {options.rounds} alternating rounds (range)")
    for ours, s3fs_step in (("make", "put"), ("open", "get")):
        ratios = [round[s3fs_step] / round[ours] for round in rounds]
        row: dict[str, Any] = {
            "what": ours,
            "mib_per_s": round(total / mid[ours], 1),
            "s3fs_mib_per_s": round(total / mid[s3fs_step], 1),
        }
        row |= {
            "ratio": round(statistics.median(ratios), 3),
            "lowest": round(min(ratios), 3),
            "highest": round(max(ratios), 3),
        }
        row["sha256_share"] = round(mid["sha256"] / mid[ours], 3)
        rows.append(row)
        print(
            f"  {ours}: {row['mib_per_s']:.0f} MiB/s, s3fs alone ({s3fs_step})"
            f" {row['s3fs_mib_per_s']:.0f} MiB/s: ratio {row['ratio']:.2f} ({row['lowest']:.2f} to"
            f" {row['highest']:.2f}); one core's sha256 of the files would be"
            f" {row['sha256_share']:.0%} of that time"
        )
    if options.save:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE
        ).stdout.strip()
        facts = {
            "commit": commit,
            "command": "python " + " ".join(sys.argv),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "mib": options.mib,
        }
        RESULTS.write_text(json.dumps(facts | {"rows": rows, "rounds": rounds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
