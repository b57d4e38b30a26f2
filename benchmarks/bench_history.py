"""`python benchmarks/bench_history.py`: what training on corrupted histories
(`train.corrupt_history`) does to long horizons.

    python benchmarks/bench_history.py [--env ID] [--amount X] [--seed N] [--force] [key=value of
    the pretrain job ...]

A cell is bench_world's (3000 transitions, the sequence family, a plain training loop, held-out data
of the same behaviours), with another `train.corrupt_history`; it runs once and is stored in
benchmarks/results/bench_history.json with its commit and command. Overrides hold for every cell;
with other settings a cell is done again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import bench_world
import numpy as np
import torch

from mesocosm.config import fingerprint, load, to_dict
from mesocosm.train.config import PretrainConfig

RESULTS = bench_world.HERE / "results" / "bench_history.json"
AMOUNTS = (0.0, 1.0, 4.0)
SEEDS = (0, 1, 2)
SHOWN = ("1", "15", "50", "full")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--env", choices=bench_world.ENVIRONMENTS)
    parser.add_argument("--amount", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--force", action="store_true")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    os.chdir(bench_world.HERE.parent)
    torch.set_num_threads(1)
    stored: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for env in [args.env] if args.env else bench_world.ENVIRONMENTS:
        print(
            f"{env}: RMSE / persistence's (mean of 8 rollouts), {' / '.join(SHOWN)} steps ahead",
            flush=True,
        )
        for amount in AMOUNTS if args.amount is None else [args.amount]:
            ratios = []
            for seed in SEEDS if args.seed is None else [args.seed]:
                cfg = load(
                    PretrainConfig,
                    overrides=[
                        *bench_world.SETTINGS,
                        "model.family=sequence",
                        f"seed={seed}",
                        *args.overrides,
                        f"train.corrupt_history={amount}",
                    ],
                )
                settings = {"model": to_dict(cfg.model), "train": to_dict(cfg.train)}
                name = f"{env}/{amount:g}/{seed}"
                cell = stored.get(name)
                if cell is None or args.force or cell["settings"] != fingerprint(settings):
                    cell = bench_world.cell(env, cfg, (1, 15, 50, "full"))
                    cell |= {
                        "settings": fingerprint(settings),
                        "config": settings,
                        "commit": bench_world.commit(),
                        "command": " ".join(["python", *sys.argv]),
                    }
                    stored = (json.loads(RESULTS.read_text()) if RESULTS.exists() else {}) | {
                        name: cell
                    }
                    RESULTS.parent.mkdir(exist_ok=True)
                    RESULTS.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")
                rows = {row["horizon"]: row["ratio"] for row in cell["open_loop"]["rows"]}
                ratios.append([np.nan if rows.get(h) is None else rows[h] for h in SHOWN])
            print(
                f"  corrupt_history={amount:<6g}"
                + "".join(f"{value:>12.4g}" for value in np.median(ratios, 0))
                + f"   median of {len(ratios)} seeds",
                flush=True,
            )


if __name__ == "__main__":
    main()
