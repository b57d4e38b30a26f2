"""`python benchmarks/bench_stopping.py reacher|hopper SEED [key=value of the pretrain job ...]`:
one-step errors of a world on the data that it was trained on and on other random data.

1,000 random steps of Reacher-v5 (5,000 others), or 3,000 of Hopper-v5 (10,000 others); the
ensemble family with the settings of configs/loop. Three worlds: all steps by bench_world's plain
loop; the weights that the job keeps; and the job's world, whose densities have the width that
held-out data ask for. Printed are what the fits of the base report and, for both data sets: the
root mean square error of the members' mean over persistence's, averaged over the numbers; nats of
the observation a transition; the error of the expected reward, in raw units; recall and precision
of the terminations (p > 0.5).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from benchmarks.bench_world import train
from mesocosm.config import StorageConfig, TrackingConfig, load
from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.loader import Loader
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.split import Split
from mesocosm.envs.config import RealityConfig
from mesocosm.jobs import collect
from mesocosm.jobs.pretrain import JOB
from mesocosm.model.groups import MemberGroups
from mesocosm.model.heads import head_inputs
from mesocosm.model.net import apply_base, unroll
from mesocosm.model.tensors import Windows
from mesocosm.model.world import World
from mesocosm.policies.behaviours import BehaviourConfig
from mesocosm.runs import tracking
from mesocosm.train.config import DataConfig, PretrainConfig

ROOT = Path(__file__).resolve().parent.parent / ".mesocosm" / "bench"
TASKS = {
    "reacher": (RealityConfig(env="mesocosm.envs.builtin:reacher", task=["target"]), 1000, 5000),
    "hopper": (RealityConfig(env="Hopper-v5"), 3000, 10_000),
}
SETTINGS = {
    "reacher": ["model.size=30k", "train.steps=400", "train.batch=32"],
    "hopper": ["model.size=100k", "train.steps=1000", "train.batch=64"],
}


def dataset(task: str, seed: int, *, held_out: bool) -> Dataset:
    """Random steps by the ordinary job; all of `held_out` but one percent are for validation."""
    reality, steps, others = TASKS[task]
    cfg = collect.CollectConfig(
        seed=1000 + seed if held_out else seed,
        storage=StorageConfig(str(ROOT)),
        tracking=TrackingConfig(experiment="bench-stopping"),
        reality=reality,
        steps=others if held_out else steps,
        workers=0,
        behaviours=[BehaviourConfig("random")],
        valid_fraction=0.99 if held_out else 0.1,
    )
    with tracking.start("collect", cfg, quiet=True) as run:
        return Dataset([collect.JOB.run(cfg, run).path])


def predictions(world: World, windows: Iterator[Windows]) -> Iterator[tuple[Tensor, ...]]:
    """For windows of one transition: the predicted and true change of the numbers, reward and
    termination, each by the members' mean.
    """
    spec, members = world.spec, world.config.members
    for batch in windows:
        transition, outcome = unroll(batch)
        valid, rows = batch.mask[:, 0], len(batch.mask)
        inputs = head_inputs(transition, outcome.observation)
        now, following = batch.observation[:, 0], batch.observation[:, 1]
        means = []
        for k in range(members):
            groups = MemberGroups(torch.full((rows,), k), members)
            means.append(world.predict(now, batch.action[:, 0], batch.task, groups).numbers)
        reward = world.net.reward.expected(world.base.reward(inputs), None).mean(0)
        logit = world.net.termination.logit(world.base.termination(inputs))
        true_reward = batch.reward[:, 0] * spec.reward_scale + spec.reward_mean
        ends = torch.sigmoid(logit).mean(0) > 0.5, batch.terminated[:, 0] > 0.5
        change = torch.stack(means).mean(0) - now.numbers, following.numbers - now.numbers
        yield tuple(values[valid] for values in (*change, reward, true_reward, *ends))


@torch.no_grad()
def errors(world: World, data: Dataset, split: Split) -> str:
    loader = Loader(data, Codec.from_json(world.codec), split, 1, 512, 0)
    parts = zip(*predictions(world, loader.eval_batches()), strict=True)
    change, true_change, reward, true_reward, ends, true_ends = map(torch.cat, parts)
    size = true_change.pow(2).mean(0).sqrt()
    ratio = float(((change - true_change).pow(2).mean(0).sqrt() / size).mean())
    nats = count = 0.0
    for windows in loader.eval_batches():
        losses = world.net(windows, apply_base(world.base, windows))
        nats, count = nats + float(losses.nats["dynamics"]), count + float(losses.transitions)
    text = f"error {ratio:.3f}, nats {nats / count:.1f}"
    text += f", reward {float((reward - true_reward).pow(2).mean().sqrt()):.4f}"
    if true_ends.any():
        hits = float((ends & true_ends).sum())
        recall, precision = hits / float(true_ends.sum()), hits / max(1.0, float(ends.sum()))
        text += f", recall {recall:.2f}, precision {precision:.2f} of {int(true_ends.sum())}"
    return text


def main() -> None:
    task, seed, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    keys = ["model.family=ensemble", "train.lr=3e-3", f"seed={seed}", *SETTINGS[task], *overrides]
    data, others = (dataset(task, int(seed), held_out=held_out) for held_out in (False, True))
    cfg = load(PretrainConfig, overrides=keys)
    print(task, seed, *overrides, flush=True)

    def report(name: str, world: World) -> None:
        print(f"  {name}\n    trained on: {errors(world, data, 'train')}")
        print(f"    others:     {errors(world, others, 'valid')}", flush=True)

    world, _ = train(data, cfg)
    print(" ", {name: round(value, 3) for name, value in world.base.metrics.items()})
    report("all steps", world)
    ids = [data.ids[0]]
    cfg = replace(cfg, data=DataConfig(ids), storage=StorageConfig(str(ROOT)), force=True)
    with tracking.start("pretrain", cfg, quiet=True) as run:
        artifact = JOB.run(cfg, run)
    world = World.load(artifact.path)
    factors = world.base.widening.clone()
    world.base.widening.fill_(1.0)
    report(f"kept: step {artifact.meta['metrics']['chosen_step']:.0f}", world)
    world.base.widening.copy_(factors)
    report(f"widened by {[round(f, 1) for f in factors.tolist()]}", world)


if __name__ == "__main__":
    main()
