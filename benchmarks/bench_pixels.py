"""`make bench-pixels`: worlds of three image environments, from nothing.

    python benchmarks/bench_pixels.py [--task T] [--seed N] [--minutes M] [--dry-run | --table-only]

A cell is a task and a seed.

PixCart, 32 x 32: configs/loop/pixcart.yaml, that is 8,192 frames of a noisy script and of random
actions, the fsq tokenizer, a world of two members, PPO on codes inside it, and 20 greedy real
episodes of at most 250 steps; then a second round with 4,096 frames that the agent collects. The
aims are a median of 150 after the first round, and of 200 after the second.

CoinGrid: a world of 12,800 frames of configs/collect/coingrid.yaml in the codes of a dictionary,
one code after another. The aims are .15 nats above the known entropy of a step on held-out
episodes, and exactly one coin, bomb and monster in 95% of the frames 11 to 15 steps after a logged
one, with random actions.

DoorKey, MiniGrid's DoorKey-5x5: configs/loop/minigrid.yaml, that is 12,000 frames of a noisy script
and of random actions, the exact dictionary, a world of two members, PPO on codes inside it, 20
greedy real episodes of at most 250 steps; a second round with 2,000 frames that the agent collects;
a clone of the better half of the first logs; and PPO in reality with the same codes, judged every
4,096 steps by as many episodes until it solves 90% of them. That PPO begins again if it is
interrupted. The aim is a tenth of its real steps.

Results lie in benchmarks/results/bench_pixels.json, and a finished cell is never run again. A cell
that takes longer than --minutes is interrupted and continues after its last finished stage when the
command is run again; a round that was measured is not measured again. --dry-run lists the cells;
otherwise the end prints the tables of docs/images.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from bench_world import ROOT, commit
from cells import add_options, read_results, run_cells, save_result

from mesocosm import config
from mesocosm.agents.cloning import CloneConfig
from mesocosm.agents.config import BaselineConfig
from mesocosm.data.collecting.config import CollectConfig
from mesocosm.data.loading.windows import observation_parts
from mesocosm.envs.ledger import Ledger
from mesocosm.envs.pixels import ENTROPY, read_grid
from mesocosm.evaluate.judge import judge
from mesocosm.evaluate.metrics.log import codec_of
from mesocosm.jobs import baseline, clone, collect, loop, pretrain, tokenize
from mesocosm.jobs.loop_config import LoopConfig, fill
from mesocosm.jobs.pretrain import PretrainConfig
from mesocosm.jobs.tokenize import TokenizeConfig
from mesocosm.model.world import World
from mesocosm.policies.stored import policy_of
from mesocosm.runs import tracking
from mesocosm.serve.world_env import WorldVectorEnv
from mesocosm.store.artifacts import Artifact, Storage
from mesocosm.train.prepare import open_datasets

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "bench_pixels.json"
CONFIGS = HERE.parent / "configs"
LOOPS = {"PixCart": ("pixcart.yaml", "kind=fsq"), "DoorKey": ("minigrid.yaml", "kind=dictionary")}
"""The loop of a task, and its tokenizer."""
TASKS = "PixCart", "CoinGrid", "DoorKey"
SEEDS, EPISODES = (0, 1, 2), 20
AIMS = (150, 200)
LEAN = ["evaluate.episodes=5", "evaluate.horizons=[1,5]", "evaluate.full=false"]
LEAN += ["evaluate.starts=32", "evaluate.samples=2", "evaluate.policies=[]"]
"""Overrides of every world's run, whose agent is measured here, by more episodes."""


GAME = "model.family=sequence model.size=300k model.members=1 model.context=8 model.head_steps=300"
GAME += " train.steps=3000 train.batch=16 train.epochs=null"
"""Overrides of CoinGrid's pretraining."""
PEER = "algo=PPO steps=200000 num_envs=16 rollout=128 judge_every=4096 select_episodes=0"
PEER += " gamma=0.97 params.num_epochs=8 params.minibatch_size=512 params.entropy_coeff=0.002"
PEER += " params.lr=0.001"
"""Overrides of DoorKey's PPO in reality, which are those of the world's agent."""
GAMES, AHEAD = 256, range(11, 16)
"""Imagined episodes of CoinGrid, and the steps after which their frames are read."""


@dataclass(frozen=True)
class Cell:
    task: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}/{self.seed}"


def run(cell: Cell) -> None:
    {"PixCart": run_loop, "CoinGrid": run_game, "DoorKey": run_door}[cell.task](cell)
    save_result(RESULTS, cell.name, read_results(RESULTS)[cell.name] | {"finished": True})


def finished(job: Any, cfg: Any) -> Artifact:
    """The artifact of a job, which is run if there is none."""
    with tracking.start(job.name, cfg) as running:
        artifact: Artifact = job.run(cfg, running)
    return artifact


def run_game(cell: Cell) -> None:
    """Train a world of CoinGrid; save its held-out nats and what it imagines."""
    words = [f"storage.root={ROOT}", f"seed={cell.seed}"]
    logs = config.load(
        CollectConfig, [CONFIGS / "collect" / "coingrid.yaml"], [*words, "steps=12800"]
    )
    datasets = f"data.datasets=[{finished(collect.JOB, logs).id}]"
    tokens = finished(tokenize.JOB, config.load(TokenizeConfig, [], [*words, datasets]))
    settings = [*words, datasets, f"data.tokenizer={tokens.id}", *GAME.split()]
    world = finished(pretrain.JOB, config.load(PretrainConfig, [], settings))
    data = open_datasets(Storage(str(ROOT)), world.meta["inputs"]["datasets"], None, tokens.id)
    model = World.load(world.path)
    starts = observation_parts(data, codec_of(model), "valid", GAMES, cell.seed)
    env = WorldVectorEnv(GAMES, model, starts=starts, seed=cell.seed)
    rng, running = np.random.default_rng(cell.seed), np.ones(GAMES, np.bool_)
    env.reset(seed=cell.seed)
    single: dict[str, list[bool]] = {"coin": [], "bomb": [], "monster": []}
    for step in range(1, max(AHEAD) + 1):
        frames, _, terminated, truncated, _ = env.step(rng.integers(0, 3, GAMES))
        if step in AHEAD:
            for name, cells in read_grid(frames[running]).items():
                if name in single:
                    single[name] += (cells.sum((1, 2)) == 1).tolist()
        running &= ~(terminated | truncated)
    env.close()
    values = {"nats": world.meta["metrics"]["valid/dynamics"], "entropy": ENTROPY}
    values |= {"single": {name: float(np.mean(each)) for name, each in single.items()}}
    values |= {"frames": len(single["coin"]), "seconds": world.meta["seconds"]}
    save_result(RESULTS, cell.name, values | {"commit": commit()})


def loop_of(cell: Cell) -> tuple[LoopConfig, str]:
    """The loop of a cell, with its tokenizer, and the id of its first logs."""
    file, kind = LOOPS[cell.task]
    words = [f"storage.root={ROOT}", f"seed={cell.seed}"]
    cfg = config.load(LoopConfig, [CONFIGS / "loop" / file], [*words, *LEAN])
    data = finished(collect.JOB, fill(cfg.collect, cfg, 0))
    settings = [*words, f"data.datasets=[{data.id}]", kind]
    tokens = finished(tokenize.JOB, config.load(TokenizeConfig, [], settings))
    cfg.pretrain.data.tokenizer = tokens.id
    return cfg, data.id


def run_loop(cell: Cell) -> tuple[LoopConfig, str]:
    """Run what is missing and save the result of each round. Returns `loop_of` the cell."""
    storage, seed = Storage(str(ROOT)), cell.seed
    cfg, data = loop_of(cell)
    points = read_results(RESULTS).get(cell.name, {"points": []})["points"]
    for rounds in range(len(points) + 1, cfg.rounds + 1):
        artifact = finished(loop.JOB, replace(cfg, rounds=rounds))
        (curve,) = json.loads((artifact.path / "summary.json").read_text())["curves"]["world"]
        agent = storage.artifact("agents", artifact.meta["inputs"]["agents"][-1])
        ledger = Ledger(storage, f"bench-pixels-{cell.task}-{seed}")
        policy = policy_of(storage, agent.name)
        judged = judge(policy, cfg.reality, ledger, episodes=EPISODES, seed=seed)
        point = {"real_frames": curve["points"][-1]["real_steps"], "return": judged.mean}
        point |= {"returns": list(judged.returns), "imagined": agent.meta["metrics"]}
        points.append(point)
        values = {"points": points, "wall_seconds": round(curve["wall_seconds"], 1)}
        save_result(RESULTS, cell.name, values | {"finished": False, "commit": commit()})
    return cfg, data


def run_door(cell: Cell) -> None:
    """The rounds, then a clone of the first logs' better half and PPO in reality."""
    cfg, data = run_loop(cell)
    tokens = cfg.pretrain.data.tokenizer
    words = [f"storage.root={ROOT}", f"seed={cell.seed}", f"tokenizer={tokens}"]
    words += [f"reality.env={cfg.reality.env}"]
    words += [f"reality.kwargs.task={cfg.reality.kwargs['task']}"]
    words += [f"reality.horizon={cfg.reality.horizon}"]
    settings = [f"datasets=[{data}]", "share=0.5", f"episodes={EPISODES}"]
    cloned = finished(clone.JOB, config.load(CloneConfig, [], [*words, *settings]))
    settings = [*PEER.split(), f"target={cfg.target}", f"judge_episodes={EPISODES}"]
    peer = finished(baseline.JOB, config.load(BaselineConfig, [], [*words, *settings]))
    curve = json.loads((peer.path / "curve.json").read_text())
    judged = [[p["steps"], p["return"]] for p in curve["points"] if p["kind"] == "judge"]
    values = {"clone": cloned.meta["metrics"], "peer": judged, "peer_reached": curve["reached"]}
    values |= {"commit": commit()}
    save_result(RESULTS, cell.name, read_results(RESULTS)[cell.name] | values)


def table() -> str:
    """The tables of docs/images.md."""
    results = read_results(RESULTS)
    rows = {"PixCart": rows_of_carts, "CoinGrid": rows_of_games, "DoorKey": rows_of_doors}
    tables = []
    for task, rows_of in rows.items():
        cells = [result for name, result in results.items() if name.startswith(f"{task}/")]
        if cells:
            tables.append("\n".join(rows_of(cells)))
    return "\n\n".join(tables)


def rows_of_carts(carts: list[Any]) -> list[str]:
    rows = ["| real frames | aim | return of 250, median (each seed) |", "|---|---|---|"]
    for i, aim in enumerate(AIMS):
        points = [cart["points"][i] for cart in carts if len(cart["points"]) > i]
        if points:
            frames = f"{points[0]['real_frames']:,}"
            rows.append(f"| {frames} | {aim} | {of_seeds([p['return'] for p in points], '.0f')} |")
    return rows


def rows_of_games(games: list[Any]) -> list[str]:
    rows = ["| CoinGrid | aim | median (each seed) |", "|---|---|---|"]
    above = of_seeds([game["nats"] - game["entropy"] for game in games], ".3f")
    rows.append(f"| held-out nats above the entropy | .15 | {above} |")
    for name in games[0]["single"]:
        share = of_seeds([game["single"][name] for game in games], ".3f")
        rows.append(f"| share of frames with exactly one {name} | .95 | {share} |")
    return rows


def rows_of_doors(doors: list[Any]) -> list[str]:
    rows = ["| DoorKey-5x5 | real frames | solved, median (each seed) |", "|---|---|---|"]
    for i in range(2):
        points = [door["points"][i] for door in doors if len(door["points"]) > i]
        if points:
            frames = f"{points[0]['real_frames']:,}"
            shares = of_seeds([p["return"] for p in points], ".2f")
            rows.append(f"| in the world, round {i + 1} | {frames} | {shares} |")
    peers = [door for door in doors if "peer" in door]
    if peers:
        frames = f"{peers[0]['points'][0]['real_frames']:,}"
        shares = of_seeds([peer["clone"]["return"] for peer in peers], ".2f")
        rows.append(f"| clone of the better half of the first logs | {frames} | {shares} |")
        each = [
            f"{peer['peer_reached']:,}" if peer["peer_reached"] else f"> {peer['peer'][-1][0]:,}"
            for peer in peers
        ]
        shares = of_seeds([peer["peer"][-1][1] for peer in peers], ".2f")
        rows.append(f"| PPO in reality | {', '.join(each)} | {shares} |")
    return rows


def of_seeds(values: list[float], form: str) -> str:
    return f"{median(values):{form}} ({', '.join(f'{value:{form}}' for value in values)})"


def is_finished(cell: Cell) -> bool:
    return bool(read_results(RESULTS).get(cell.name, {}).get("finished"))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--seed", type=int, choices=SEEDS)
    add_options(parser)
    options = parser.parse_args()
    chosen = [
        Cell(task, seed)
        for task in TASKS
        for seed in SEEDS
        if options.task in (None, task) and options.seed in (None, seed)
    ]
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
