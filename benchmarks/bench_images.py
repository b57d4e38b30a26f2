"""`make bench-images`: bytes a frame on disk, and CPU seconds to write and read frames.

    python benchmarks/bench_images.py [--frames 8192] [--save]

Frames of PixCart and CoinGrid by noisy scripts, in chunks as a dataset stores them
(`mesocosm.datasets.images`). Seconds are of one thread's processor. Random rows are read in batches
of 64, each row once. --save keeps the result in benchmarks/results/bench_images.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mesocosm.datasets.images import FrameWriter, ImageRows
from mesocosm.envs.pixels import Balancer, CoinGrid, PixCart, catch

RESULTS = Path(__file__).resolve().parent / "results" / "bench_images.json"
NOISE = 0.3
BATCH = 64


def drawn(env: Any, act: Callable[..., Any], count: int) -> np.ndarray[Any, Any]:
    """`count` frames of whole episodes, one after the other."""
    rng = np.random.default_rng(0)
    frames: list[Any] = []
    episode = 0
    while len(frames) < count:
        frame, _ = env.reset(seed=episode)
        if isinstance(act, Balancer):
            act.start(episode, rng)
        ended = False
        frames.append(frame)
        while not ended:
            action = act(frame, rng)
            if rng.random() < NOISE:
                action = np.int64(rng.integers(env.action_space.n))
            frame, _, terminated, truncated, _ = env.step(action)
            ended = terminated or truncated
            frames.append(frame)
        episode += 1
    return np.stack(frames[:count])


def measure(frames: np.ndarray[Any, Any], space: Any) -> dict[str, float]:
    """The row of one environment."""
    count = len(frames)
    began = time.process_time()
    writer = FrameWriter()
    for start in range(0, count, 100):
        writer.add(frames[start : start + 100])
    chunks, offsets = writer.close()
    written = time.process_time() - began
    orders = {"in order": np.arange(count), "random": np.random.default_rng(1).permutation(count)}
    speeds = {}
    for name, order in orders.items():
        rows = ImageRows(chunks, offsets, count, space, "memory")
        began = time.process_time()
        for start in range(0, count, BATCH):
            at = order[start : start + BATCH]
            assert (rows.take(at)[0] == frames[at[0]]).all()
        speeds[f"frames a CPU s, {name}"] = round(count / (time.process_time() - began))
    return {
        "bytes a frame": round(len(chunks) / count, 1),
        "raw bytes": frames[0].nbytes,
        "write, CPU ms a frame": round(1e3 * written / count, 4),
        **speeds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=8192)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    results = {}
    for name, env, act in (
        ("PixCart 64x64", PixCart(64), Balancer()),
        ("PixCart 32x32", PixCart(32), Balancer()),
        ("CoinGrid 40x40", CoinGrid(), catch),
    ):
        frames = drawn(env, act, options.frames)
        results[name] = measure(frames, env.observation_space)
        print(name, json.dumps(results[name]), flush=True)
    if options.save:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
