"""`make bench-sweep`: how much of a sweep's wall time is not training.

    python benchmarks/bench_sweep.py [--config FILE] [key=value of the sweep ...]

Collects configs/collect/halfcheetah.yaml once, then runs the quickstart sweep as a user does, in a
process of its own and a fresh root that shares only the dataset, and measures that process from its
start to its end. Outside training is 1 - (seconds of training, validating and fitting bases, which
is training too: 1500 gradient steps of a part of the model, over all cells) / (wall seconds x
trunks at once), in one run: imports, Ray, waiting for the last trunk, MLflow, the law. With bases
counted as outside it is given apart. Prints JSON, keeps it in benchmarks/results/bench_sweep.json,
and ends with status 1 above ALLOWED.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
RESULTS = HERE / "results" / "bench_sweep.json"
ROOT = REPOSITORY / ".mesocosm" / "bench"
ALLOWED, GOAL = 0.10, 0.05


def mesocosm(*arguments: str) -> dict[str, Any]:
    """A job by the command line; what it says with --json."""
    command = [sys.executable, "-m", "mesocosm", *arguments, "--json"]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, check=True)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/sweep/quickstart.yaml")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    data = mesocosm("collect", "-c", "configs/collect/halfcheetah.yaml", f"storage.root={ROOT}")
    with tempfile.TemporaryDirectory() as fresh:
        shutil.copytree(data["path"], Path(fresh) / "datasets" / Path(data["path"]).name)
        given = [
            f"storage.root={fresh}",
            f"data.datasets=[{Path(data['path']).name}]",
            *args.overrides,
        ]
        load, began = os.getloadavg()[0], time.perf_counter()
        report = mesocosm("sweep", "-c", args.config, *given)
        wall = time.perf_counter() - began
        summary = json.loads((Path(report["path"]) / "summary.json").read_text())
    seconds = summary["seconds"]
    capacity = wall * seconds["concurrent"]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    result = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit,
        "cells": summary["cells"],
        "wall_seconds": wall,
        "trunks_at_once": seconds["concurrent"],
        "training_seconds": seconds["training"],
        "bases_seconds": seconds["bases"],
        "outside_training": 1 - (seconds["training"] + seconds["bases"]) / capacity,
        "outside_training_and_bases": 1 - seconds["training"] / capacity,
        "steps": summary["steps"],
        "steps_saved_by_trunks": 1 - summary["steps"]["run"] / summary["steps"]["without_trunks"],
        "load_before": load,
        "cpus": os.cpu_count(),
    }
    print(json.dumps(result, indent=1))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"outside training {result['outside_training']:.1%}; allowed {ALLOWED:.0%}, goal {GOAL:.0%}"
    )
    return int(result["outside_training"] > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
