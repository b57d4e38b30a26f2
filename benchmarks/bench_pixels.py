"""`make bench-pixels`: an agent of PixCart, 32 x 32, from 8,192 real frames and then 4,096 more.

    python benchmarks/bench_pixels.py [--seed N] [--minutes M] [--dry-run | --table-only]

A cell is one seed of configs/loop/pixcart.yaml, with everything from nothing: the frames of a noisy
script and of random actions, the fsq tokenizer, a world of two members, PPO on codes inside it, and
20 greedy real episodes of at most 250 steps; then a second round, whose frames the agent collects.
The aims are a median of 150 after the first round, and of 200 after the second.

Results lie in benchmarks/results/bench_pixels.json, and a finished cell is never run again. A cell
that takes longer than --minutes is interrupted and goes on after its last finished stage when the
command is run again; a round that was measured is not measured again. --dry-run lists the cells;
otherwise the end prints the table of docs/images.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")

from bench_world import ROOT, commit
from cells import add_options, read_results, run_cells, save_result

from mesocosm import config
from mesocosm.envs.ledger import Ledger
from mesocosm.evaluate.judge import judge
from mesocosm.jobs import collect, loop, tokenize
from mesocosm.jobs.loop_config import LoopConfig, fill
from mesocosm.policies.stored import policy_of
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Storage

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "bench_pixels.json"
CONFIG = HERE.parent / "configs" / "loop" / "pixcart.yaml"
SEEDS, EPISODES = (0, 1, 2), 20
AIMS = (150, 200)
LEAN = ["evaluate.episodes=5", "evaluate.horizons=[1,5]", "evaluate.full=false"]
LEAN += ["evaluate.starts=32", "evaluate.samples=2", "evaluate.policies=[]"]
"""Overrides of every world's run, whose agent is measured here, by more episodes."""


@dataclass(frozen=True)
class Cell:
    seed: int

    @property
    def name(self) -> str:
        return f"PixCart/{self.seed}"


def run(cell: Cell) -> None:
    """Run what is missing and save the result of each round."""
    storage, seed = Storage(str(ROOT)), cell.seed
    words = [f"storage.root={ROOT}", f"seed={seed}"]
    cfg = config.load(LoopConfig, [CONFIG], [*words, *LEAN])
    logs = fill(cfg.collect, cfg, 0)
    with tracking.start("collect", logs) as running:
        data = collect.JOB.run(logs, running)
    settings = [*words, f"data.datasets=[{data.id}]", "kind=fsq"]
    tokens = config.load(tokenize.TokenizeConfig, [], settings)
    with tracking.start("tokenize", tokens) as running:
        cfg.pretrain.data.tokenizer = tokenize.JOB.run(tokens, running).id
    points = read_results(RESULTS).get(cell.name, {"points": []})["points"]
    for rounds in range(len(points) + 1, cfg.rounds + 1):
        part = replace(cfg, rounds=rounds)
        with tracking.start("loop", part) as running:
            artifact = loop.JOB.run(part, running)
        (curve,) = json.loads((artifact.path / "summary.json").read_text())["curves"]["world"]
        agent = storage.artifact("agents", artifact.meta["inputs"]["agents"][-1])
        ledger = Ledger(storage, f"bench-pixels-{seed}")
        policy = policy_of(storage, agent.name)
        judged = judge(policy, cfg.reality, ledger, episodes=EPISODES, seed=seed)
        point = {"real_frames": curve["points"][-1]["real_steps"], "return": judged.mean}
        point |= {"returns": list(judged.returns), "imagined": agent.meta["metrics"]}
        points.append(point)
        about = {"finished": rounds == cfg.rounds, "commit": commit()}
        seconds = round(curve["wall_seconds"], 1)
        save_result(RESULTS, cell.name, {"points": points, "wall_seconds": seconds, **about})


def table() -> str:
    """The table of docs/images.md."""
    results = read_results(RESULTS)
    lines = ["| real frames | aim | return of 250, median (each seed) |", "|---|---|---|"]
    for i, aim in enumerate(AIMS):
        points = [result["points"][i] for result in results.values() if len(result["points"]) > i]
        if points:
            returns = [point["return"] for point in points]
            each = ", ".join(f"{value:.0f}" for value in returns)
            frames = points[0]["real_frames"]
            lines.append(f"| {frames:,} | {aim} | {median(returns):.0f} ({each}) |")
    return "\n".join(lines)


def is_finished(cell: Cell) -> bool:
    return bool(read_results(RESULTS).get(cell.name, {}).get("finished"))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, choices=SEEDS)
    add_options(parser)
    options = parser.parse_args()
    chosen = [Cell(seed) for seed in SEEDS if options.seed in (None, seed)]
    if options.dry_run:
        for cell in chosen:
            print(f"{cell.name}: {'finished' if is_finished(cell) else 'to do'}")
        return 0
    code = 0
    if not options.table_only:
        code = run_cells(chosen, run, is_finished, options.minutes)
    print(table())
    return code


if __name__ == "__main__":
    sys.exit(main())
