"""`make bench-mup`: does one base learning rate serve every rung of the sequence family?

    python benchmarks/bench_mup.py [--size RUNG] [--seed N] [--minutes M] [--plot-only]

A cell is (rung, steps, lr, seed): the sequence family trained by a plain loop on 20000 transitions
of InvertedPendulum-v5, its validation loss in nats a transition (all parts). Rungs 10k, 30k, 100k,
300k; two durations; learning rates in factor-2 notches around BASE. Cells are kept in
benchmarks/results/bench_mup.json and never run twice; --minutes stops after the cell in which they
ran out. The end prints, for each rung and duration, the best notch and what BASE costs against it,
and draws docs/plots/bench_mup.svg. Exit status 1 where BASE is more than one notch from the best,
or costs more than 1%.

BASE was chosen by these very cells: the one learning rate whose largest cost is least.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib

matplotlib.use("svg")
import torch
from bench_world import BEHAVIOURS, HERE, HORIZON, ROOT, commit
from matplotlib import pyplot

from mesocosm.config import StorageConfig, TrackingConfig, fingerprint
from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.loader import Loader
from mesocosm.datasets.dataset import Dataset
from mesocosm.envs.config import RealityConfig
from mesocosm.jobs import collect
from mesocosm.model import mup
from mesocosm.model.config import ModelConfig
from mesocosm.model.families import build
from mesocosm.model.net import apply_base
from mesocosm.model.tensors import Windows
from mesocosm.model.world import World
from mesocosm.runs import tracking
from mesocosm.train.config import TrainConfig
from mesocosm.train.prepare import fitted_base
from mesocosm.train.schedule import lr_factor

RESULTS = HERE / "results" / "bench_mup.json"
PLOT = HERE.parent / "docs" / "plots" / "bench_mup.svg"
ENV = "InvertedPendulum-v5"
TRANSITIONS = 20_000
SIZES = ("10k", "30k", "100k", "300k")
DURATIONS = (150, 450)
NOTCHES = (-2, -1, 0, 1, 2)
BASE = 6e-3
SEEDS = (0, 1, 2)
MODEL = ModelConfig(members=1)
"""One member: members share nothing but the backbone, and a law is of one head."""
OPTIONS = TrainConfig(lr=BASE)
ALLOWED_COST = 0.01


class Setting:
    """The data, the base that all cells share, and the validation windows."""

    def __init__(self) -> None:
        cfg = collect.CollectConfig(
            storage=StorageConfig(str(ROOT)),
            tracking=TrackingConfig(experiment="bench-mup"),
            reality=RealityConfig(env=ENV, horizon=HORIZON[ENV]),
            steps=TRANSITIONS,
            workers=0,
            behaviours=BEHAVIOURS[ENV],
            valid_fraction=0.2,
        )
        with tracking.start("collect", cfg, quiet=True) as run:
            self.data = Dataset([collect.JOB.run(cfg, run).path])
        self.codec = Codec.fit(self.data)
        self.base = fitted_base(self.data, self.codec, MODEL, 0)
        self.valid: list[Windows] = list(self.loader("valid", 0).eval_batches(128))

    def loader(self, split: Any, seed: int) -> Loader:
        return Loader(self.data, self.codec, split, MODEL.context, OPTIONS.batch, seed)


def cell(setting: Setting, size: str, steps: int, lr: float, seed: int) -> dict[str, float]:
    """The validation loss by part and in total, and the CPU seconds it took."""
    began = time.process_time()
    net = build(setting.codec.spec, replace(MODEL, size=size))
    mup.init_(net, seed)
    loader = setting.loader("train", seed)
    optimizer = torch.optim.AdamW(
        mup.param_groups(net, lr, OPTIONS.weight_decay), betas=(0.9, 0.95), fused=True
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * lr_factor(step + 1, steps, OPTIONS.warmup, OPTIONS.decay)
        windows = loader.batch(step)
        optimizer.zero_grad(set_to_none=True)
        net(windows, apply_base(setting.base, windows)).objective.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), OPTIONS.clip)
        optimizer.step()
    world, sums, count = World(net, setting.base), {}, 0.0
    for windows in setting.valid:
        losses = world.losses(windows)
        count += float(losses.transitions)
        for part, nats in losses.nats.items():
            sums[part] = sums.get(part, 0.0) + float(nats)
    result = {part: nats / count for part, nats in sums.items()}
    return result | {"total": sum(result.values()), "seconds": time.process_time() - began}


def summary(stored: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a rung and duration whose cells are all there: mean loss by notch, the best notch,
    and the default's cost.
    """
    rows = []
    for size in SIZES:
        for steps in DURATIONS:
            names = {
                notch: [name_of(size, steps, notch, seed) for seed in SEEDS] for notch in NOTCHES
            }
            if all(name in stored for group in names.values() for name in group):
                loss = {
                    notch: sum(stored[name]["total"] for name in group) / len(group)
                    for notch, group in names.items()
                }
                best = min(loss, key=loss.__getitem__)
                spread = max(
                    statistics.stdev(stored[name]["total"] for name in names[notch]) / loss[best]
                    for notch in (0, best)
                )
                rows.append(
                    {
                        "size": size,
                        "steps": steps,
                        "loss": loss,
                        "best": best,
                        "cost": loss[0] / loss[best] - 1,
                        "spread": spread,
                    }
                )
    return rows


def name_of(size: str, steps: int, notch: int, seed: int) -> str:
    return f"{size}/{steps}/{BASE * 2.0**notch:g}/{seed}"


def plot(rows: list[dict[str, Any]]) -> None:
    pyplot.rcParams["svg.hashsalt"] = "mesocosm"
    figure, axes = pyplot.subplots(
        1, len(DURATIONS), figsize=(9, 3.6), sharey=True, layout="constrained"
    )
    for axis, steps in zip(axes, DURATIONS, strict=True):
        for row in (row for row in rows if row["steps"] == steps):
            axis.plot(
                [BASE * 2.0**notch for notch in NOTCHES],
                [row["loss"][notch] for notch in NOTCHES],
                marker="o",
                label=row["size"],
            )
        axis.axvline(BASE, color="grey", linewidth=0.8, linestyle=":")
        axis.set(
            xscale="log",
            xlabel="base learning rate",
            title=f"{steps} steps of {OPTIONS.batch} windows",
        )
        axis.set_xticks(
            [BASE * 2.0**notch for notch in NOTCHES],
            [f"{BASE * 2.0**notch:g}" for notch in NOTCHES],
        )
        axis.minorticks_off()
    axes[0].set_ylabel("validation loss, nats a transition")
    axes[0].legend(title="rung", frameon=False)
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES)
    parser.add_argument("--seed", type=int, choices=SEEDS)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--plot-only", action="store_true")
    args = parser.parse_args()
    os.chdir(Path(__file__).resolve().parents[1])
    torch.set_num_threads(1)
    stored: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    settings = fingerprint(MODEL, OPTIONS, ENV, TRANSITIONS, BEHAVIOURS[ENV])
    stored = {name: outcome for name, outcome in stored.items() if outcome["settings"] == settings}
    began, setting = time.monotonic(), None
    todo = [
        (size, steps, notch, seed)
        for seed in SEEDS
        for size in SIZES
        for steps in DURATIONS
        for notch in NOTCHES
    ]
    todo = [cell for cell in todo if args.size in (None, cell[0]) and args.seed in (None, cell[3])]
    for size, steps, notch, seed in [] if args.plot_only else todo:
        name = name_of(size, steps, notch, seed)
        if name in stored:
            continue
        if time.monotonic() - began > 60 * args.minutes:
            break
        setting = setting or Setting()
        outcome = cell(setting, size, steps, BASE * 2.0**notch, seed)
        print(
            f"{name:<16} {outcome['total']:.4f} nats, {outcome['seconds']:.0f} CPU seconds",
            flush=True,
        )
        stored[name] = outcome | {
            "settings": settings,
            "commit": commit(),
            "command": " ".join(["python", *sys.argv]),
        }
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")
    rows = summary(stored)
    failed = [row for row in rows if abs(row["best"]) > 1 or row["cost"] > ALLOWED_COST]
    print(
        f"base lr {BASE:g}; best notch (factors of 2 from it), what the base costs, and the"
        f" standard deviation over {len(SEEDS)} seeds"
    )
    for row in rows:
        best = f"best {row['best']:+d}, {row['loss'][row['best']]:.4f} nats"
        print(
            f"  {row['size']:>5} {row['steps']:>5} steps: {best}; cost {row['cost']:.2%}, sd"
            f" {row['spread']:.2%}",
            end="",
        )
        print("  FAILS" if row in failed else "")
    print(f"{len(rows)} of {len(SIZES) * len(DURATIONS)} rungs and durations are complete")
    if rows:
        plot(rows)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
