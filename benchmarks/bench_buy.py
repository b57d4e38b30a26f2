"""`make bench-buy`: does a proposal's data lower held-out policy-value error more than random data
of the same price?

    python benchmarks/bench_buy.py [--seeds N ...] [--table-only]

Pendulum-v1. The rule by which a proposal divides its budget was chosen on seeds 0 to 11
(docs/buying.md). The default seeds are others. For each seed: 1000 random real steps and a world of
them; then 1000 steps more, bought as `mesocosm propose` says (candidates: random actions, a
controller that swings up and balances, and one that only spins, both at three levels of noise), at
random, or evenly over the same candidates; then a world of old and new data. Worlds are ensembles
of 4 members, trained by bench_world's plain loop. Policy-value error is the mean over 16 policies
of |mean return in the world - in reality|: controllers of other gains than those collected with,
judged once by 50 real episodes each and imagined 256 times. Worlds, data and judged episodes lie in
the bench's root, cells in benchmarks/results/bench_buy.json; none is made twice. Writes
docs/tables/buy.csv and docs/plots/buy.svg.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib
import numpy as np
import torch

matplotlib.use("svg")
from bench_pessimism import saved
from bench_world import HERE, ROOT, commit, train
from matplotlib import pyplot

from mesocosm import config
from mesocosm.agents.rollout import imagined_episodes
from mesocosm.config import StorageConfig, fingerprint, to_dict
from mesocosm.data.loading.codec import Codec
from mesocosm.datasets.dataset import Dataset
from mesocosm.envs.config import BudgetConfig, PriceConfig, RealityConfig
from mesocosm.envs.ledger import Ledger
from mesocosm.envs.make import facts_of
from mesocosm.evaluate.judge import judge
from mesocosm.evaluate.metrics import stats
from mesocosm.evaluate.policy_set import Noisy, Scripted
from mesocosm.evaluate.policy_value import imagining
from mesocosm.jobs import collect, propose
from mesocosm.model.world import World
from mesocosm.plotting import STYLE
from mesocosm.policies.behaviours import BehaviourConfig
from mesocosm.runs import tracking
from mesocosm.serve.world_env import WorldVectorEnv
from mesocosm.store.artifacts import Artifact, Storage
from mesocosm.train.config import PretrainConfig
from mesocosm.train.export import calibrate

REPOSITORY = HERE.parent
RESULTS = HERE / "results" / "bench_buy.json"
TABLE, PLOT = REPOSITORY / "docs" / "tables" / "buy.csv", REPOSITORY / "docs" / "plots" / "buy.svg"
REALITY = RealityConfig(env="Pendulum-v1", price=PriceConfig(per_step=0.01))
FIRST, MORE = 1000, 1000
EPISODES, IMAGINED, HORIZON = 50, 256, 200
ARMS = {"before": "#9aa3af", "proposed": "#30638e", "random": "#d1495b", "even": "#edae49"}
MODULE = "benchmarks.bench_buy"


def controller(energy: float, angle: float, speed: float) -> Callable[[Any, Any], Any]:
    """Pumps energy by `energy` per unit lacking, and near the top is a linear controller."""

    def act(observation: Any, rng: Any) -> Any:
        cos, sin, spin = (float(x) for x in observation)
        lacking = 15.0 * (1.0 - cos) - spin**2 / 2
        torque = (
            -angle * np.arctan2(sin, cos) - speed * spin
            if cos > 0.8 and abs(spin) < 4
            else energy * np.sign(spin or 1.0) * lacking
        )
        return np.clip([torque], -2.0, 2.0).astype(np.float32)

    return act


def swing(observation: Any, rng: Any) -> Any:
    return controller(1.0, 12.0, 3.0)(observation, rng)


def spin(observation: Any, rng: Any) -> Any:
    """Pushes on in the direction of motion, faster and faster."""
    return np.array([2.0 if observation[2] >= 0 else -2.0], np.float32)


CANDIDATES = [
    BehaviourConfig(kind="noisy", function=f"{MODULE}:{name}", noise=noise)
    for name in ("swing", "spin")
    for noise in (0.0, 0.3, 0.6)
]
HELD_OUT = [
    (e, a, s, n)
    for e, a, s in ((0.1, 8.0, 2.0), (0.3, 15.0, 4.0), (3.0, 6.0, 1.0), (-0.5, 5.0, 1.0))
    for n in (0.0, 0.2, 0.5, 1.0)
]
"""(gains, noise): from balancing to worse than random."""


def policies() -> list[Noisy]:
    spaces = facts_of(REALITY).spaces
    return [
        Noisy(Scripted(controller(e, a, s), *spaces), spaces[1], noise)
        for e, a, s, noise in HELD_OUT
    ]


def collected(cfg: collect.CollectConfig) -> Artifact:
    with tracking.start("collect", cfg, quiet=True) as run:
        return collect.JOB.run(cfg, run)


def buying(seed: int, steps: int, behaviours: list[BehaviourConfig]) -> collect.CollectConfig:
    return collect.CollectConfig(
        seed=seed,
        storage=StorageConfig(str(ROOT)),
        reality=REALITY,
        steps=steps,
        lanes=1,
        workers=0,
        behaviours=behaviours,
    )


def world_of(data: list[Artifact], seed: int) -> Artifact:
    cfg = config.load(
        PretrainConfig,
        overrides=[
            "model.family=ensemble",
            "model.size=30k",
            "model.members=4",
            "train.steps=800",
            "train.lr=3e-3",
            f"seed={seed}",
        ],
    )
    storage = Storage(str(ROOT))
    id = fingerprint(
        "bench-buy", [a.id for a in data], to_dict(cfg.model), to_dict(cfg.train), seed
    )
    if (artifact := storage.find("worlds", id)) is not None:
        return artifact
    dataset = Dataset([a.path for a in data])
    world, _ = train(dataset, cfg)
    calibrate(world, dataset, Codec.from_json(world.codec))
    return storage.make("worlds", id, {"inputs": {"datasets": [a.id for a in data]}}, world.save)


def real() -> list[float]:
    """The real return of each held-out policy, measured once."""
    cell = saved(RESULTS).get("reality")
    if cell is None:
        ledger = Ledger(Storage(str(ROOT)), "bench-buy", BudgetConfig(), REALITY.price)
        values = [
            judge(policy, REALITY, ledger, episodes=EPISODES, seed=0).mean for policy in policies()
        ]
        cell = keep("reality", {"values": values})
    values: list[float] = cell["values"]
    return values


def value_errors(world: Artifact, seed: int) -> list[float]:
    """World - reality, of each held-out policy."""
    loaded = World.load(world.path)
    errors = []
    for policy, truth in zip(policies(), real(), strict=True):
        env = WorldVectorEnv(IMAGINED, loaded, horizon=HORIZON)
        returns, _ = imagined_episodes([policy], env, imagining(seed))
        errors.append(float(returns.mean()) - truth)
    return errors


def proposed(world: Artifact, seed: int) -> tuple[collect.CollectConfig, dict[str, Any]]:
    """The config that `propose` writes, loaded as `collect -c` loads it, and the proposal."""
    cfg = propose.ProposeConfig(
        seed=seed,
        storage=StorageConfig(str(ROOT)),
        world=world.id,
        steps=MORE,
        behaviours=CANDIDATES,
        reality=REALITY,
    )
    with tracking.start("propose", cfg) as run:
        made = propose.JOB.run(cfg, run)
    overrides = [f"storage.root={ROOT}", "workers=0", "lanes=1"]
    job = config.load(collect.CollectConfig, [made.path / propose.NEXT], overrides)
    return job, json.loads((made.path / propose.PROPOSAL).read_text())


def keep(name: str, cell: dict[str, Any]) -> dict[str, Any]:
    cell |= {"commit": commit(), "command": "python benchmarks/bench_buy.py"}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        json.dumps(dict(sorted({**saved(RESULTS), name: cell}.items())), indent=1) + "\n"
    )
    return cell


def cells(seed: int) -> None:
    first = collected(buying(1000 * seed, FIRST, [BehaviourConfig()]))
    before = world_of([first], seed)
    job, answer = proposed(before, seed)
    even = [replace(b, weight=1.0) for b in (BehaviourConfig(), *CANDIDATES)]
    arms = {
        "proposed": job,
        "random": buying(job.seed, MORE, [BehaviourConfig()]),
        "even": buying(job.seed, MORE, even),
    }
    for arm in ARMS:
        name = f"{seed}/{arm}"
        if name in saved(RESULTS):
            continue
        data = [first] if arm == "before" else [first, collected(arms[arm])]
        errors = value_errors(before if arm == "before" else world_of(data, seed), seed)
        shares = (
            {row["behaviour"]: row["steps"] for row in answer["candidates"]}
            if arm == "proposed"
            else {}
        )
        steps = sum(a.meta["counts"]["steps"] for a in data)
        cell = keep(
            name,
            {
                "errors": errors,
                "steps": steps,
                "episodes": [a.meta["counts"]["behaviours"] for a in data],
                "proposed": shares,
            },
        )
        print(f"seed {seed}, {arm}: error {np.abs(cell['errors']).mean():.1f}", flush=True)


def rows() -> list[dict[str, Any]]:
    cells = saved(RESULTS)
    every = []
    for name, cell in cells.items():
        if "/" in name:
            seed, arm = name.split("/")
            errors = np.array(cell["errors"])
            low, high = stats.mean_interval(np.abs(errors)) or (0.0, 0.0)
            figures = {
                "error": np.abs(errors).mean(),
                "low": low,
                "high": high,
                "bias": errors.mean(),
            }
            every.append(
                {
                    "seed": int(seed),
                    "arm": arm,
                    "real_steps": cell["steps"],
                    **{k: f"{v:.2f}" for k, v in figures.items()},
                }
            )
    return sorted(every, key=lambda row: (row["seed"], list(ARMS).index(row["arm"])))


def write(every: list[dict[str, Any]]) -> None:
    for path in (TABLE, PLOT):
        path.parent.mkdir(parents=True, exist_ok=True)
    with open(TABLE, "w", newline="") as file:
        writer = csv.DictWriter(file, list(every[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(every)
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "mesocosm"}):
        figure, axes = pyplot.subplots(figsize=(9, 3.6), layout="constrained")
        seeds = sorted({row["seed"] for row in every})
        for k, (arm, colour) in enumerate(ARMS.items()):
            some = [row for row in every if row["arm"] == arm]
            middle, low, high = (
                [float(row[key]) for row in some] for key in ("error", "low", "high")
            )
            spread = [
                [m - lo for m, lo in zip(middle, low, strict=True)],
                [h - m for m, h in zip(middle, high, strict=True)],
            ]
            at = [seeds.index(row["seed"]) + (k - 1.5) * 0.15 for row in some]
            axes.errorbar(at, middle, spread, color=colour, fmt="o", label=arm)
        axes.set_xticks(range(len(seeds)), [str(seed) for seed in seeds])
        axes.set(
            xlabel="seed",
            ylabel="policy-value error, units of return",
            title="Pendulum-v1: 1000 real steps, and 1000 more bought three ways",
        )
        axes.set_ylim(bottom=0)
        axes.legend()
        figure.savefig(PLOT, metadata={"Date": None})
        pyplot.close(figure)


def summary(every: list[dict[str, Any]]) -> str:
    """Markdown, and the paired differences over seeds and policies."""
    arms = list(ARMS)
    lines = ["| seed | " + " | ".join(arms) + " |", "|---|" + "---|" * len(arms)]
    for seed in sorted({row["seed"] for row in every}):
        by = {row["arm"]: row for row in every if row["seed"] == seed}
        lines.append(
            f"| {seed} | "
            + " | ".join(
                f"{by[a]['error']} ({by[a]['low']} to {by[a]['high']})" if a in by else "-"
                for a in arms
            )
            + " |"
        )
    cells = saved(RESULTS)
    for other in ("random", "even"):
        pairs = [
            (cells[f"{s}/proposed"], cells[f"{s}/{other}"])
            for s in sorted({row["seed"] for row in every})
            if {f"{s}/proposed", f"{s}/{other}"} <= cells.keys()
        ]
        apart = np.array([np.abs(a["errors"]) - np.abs(b["errors"]) for a, b in pairs])
        means = ", ".join(f"{mean:.1f}" for mean in apart.mean(1))
        lines.append(
            f"\nproposed - {other}: {means} by seed, mean {apart.mean():.1f}, 90% over policies"
            f" {stats.mean_interval(apart.mean(0))}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(12, 18)))
    parser.add_argument("--table-only", action="store_true")
    options = parser.parse_args()
    os.chdir(REPOSITORY)
    torch.set_num_threads(1)
    for seed in () if options.table_only else options.seeds:
        cells(seed)
    write(rows())
    print(summary(rows()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
