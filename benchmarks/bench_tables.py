"""`python benchmarks/bench_tables.py`: real steps that weights shared over a table's slots save.

Worlds of `mesocosm.envs.items:Items` learn from the real steps of a noisy script, once with its
table and once from the same columns without one, in equal CPU seconds of training. Each keeps the
weights that predict the validation split best. Printed for new episodes: the nats of an observation
a transition, the share of predicted observations of which every category is right (the likeliest
one), and of submissions whose reward is predicted right. With --reward, the reward network alone.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from gymnasium.spaces import Dict

from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.loader import Loader
from mesocosm.datasets.dataset import Dataset, Environment, write_dataset
from mesocosm.datasets.episode import Episode
from mesocosm.envs.config import RealityConfig
from mesocosm.envs.episode import run_episode
from mesocosm.envs.items import Items, expert
from mesocosm.model import mup
from mesocosm.model.base import Base
from mesocosm.model.config import ModelConfig
from mesocosm.model.families import build
from mesocosm.model.head_fit import fit_heads
from mesocosm.model.heads import head_inputs
from mesocosm.model.net import WorldNet, apply_base, unroll
from mesocosm.model.tensors import Windows
from mesocosm.policies.behaviours import NoisyActions
from mesocosm.train.prepare import fitted_base

STEPS = (250, 1000, 4000)
WINDOW, BATCH, EVERY = 4, 32, 20
"""Transitions of a window, windows of a batch, and training steps between two looks at the
validation split.
"""


class FlatItems(Items):
    """The same environment with another name for `present`, so that it has no table."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        spaces = dict(self.observation_space.spaces)
        items = dict(spaces["items"].spaces)  # type: ignore[attr-defined]
        items["here"] = items.pop("present")
        self.observation_space = Dict(spaces | {"items": Dict(items)})

    def _observation(self) -> dict[str, Any]:
        observation = super()._observation()
        items = observation["items"]
        items["here"] = items.pop("present")
        return observation


KINDS: dict[str, type[Items]] = {"table": Items, "flat": FlatItems}


def scripted(observation: Any, rng: np.random.Generator) -> Any:
    """The expert, in both environments."""
    items = observation["items"]
    present = items["present"] if "present" in items else items["here"]
    return expert(observation | {"items": items | {"present": present}}, rng)


def episodes(env: Items, steps: int, first: int) -> list[Episode]:
    """Collect at least `steps` transitions of a script with a third of random actions."""
    act = NoisyActions(scripted, env.action_space, 1 / 3)
    done: list[Episode] = []
    while sum(map(len, done)) < steps:
        k = first + len(done)
        config: Any = {"max_steps": None, "config": RealityConfig(env="items")}
        done.append(run_episode(env, act, k=k, seed=0, behaviour="script", **config))
    return done


def dataset(folder: Path, env: Items, rows: list[Episode], valid: float) -> Dataset:
    write_dataset(
        folder,
        rows,
        id=folder.name,
        environment=Environment(id="items", max_episode_steps=env.steps),
        observation_space=env.observation_space,
        action_space=env.action_space,
        seed=0,
        valid_fraction=valid,
    )
    return Dataset([folder])


def nats(net: WorldNet, base: Any, batches: list[Windows]) -> float:
    with torch.no_grad():
        losses = [net(windows, apply_base(base, windows)) for windows in batches]
    total = sum(float(loss.nats["dynamics"]) for loss in losses)
    return total / sum(float(loss.transitions) for loss in losses)


def right(net: Any, base: Any, batches: list[Windows]) -> tuple[float, float]:
    """The shares of right observations and of right rewards of submissions."""
    hits = []
    with torch.no_grad():
        for windows in batches:
            transition, outcome = unroll(windows)
            _, _, logits = net._outputs(None, transition.flatten())
            likeliest = logits.softmax(-1).mean(0).argmax(-1)
            same = (likeliest == outcome.observation.categories.flatten(0, 1)).all(-1)
            hits.append(same[windows.mask.flatten()])
    return float(torch.cat(hits).float().mean()), right_rewards(base, batches)


def right_rewards(base: Base, batches: list[Windows]) -> float:
    """The share of right rewards of submissions."""
    ends = []
    with torch.no_grad():
        for windows in batches:
            transition, outcome = unroll(windows)
            outputs = base.reward(head_inputs(transition, outcome.observation))
            rewards = outputs.softmax(-1).mean(0).argmax(-1) == windows.reward.flatten()
            submitted = windows.mask & (windows.action.categories[..., 0] == 1)
            ends.append(rewards[submitted.flatten()])
    return float(torch.cat(ends).float().mean())


def reward_alone(env: Items, steps: int, seed: int, folder: Path) -> list[float]:
    """(right rewards, steps of the kept weights, CPU seconds) of one member, at most 500 steps."""
    name = f"{type(env).__name__}-{steps}-{seed}"
    data = dataset(folder / name, env, episodes(env, steps, 10_000 * (seed + 1)), 0.2)
    codec = Codec.fit(data)
    base = Base(codec.spec, ModelConfig(family="ensemble", members=1))
    loader = Loader(data, codec, "train", 1, 128, seed)
    judged = replace(Loader(data, codec, "valid", 1, 512, seed).batch(0), events=None)
    began = time.process_time()
    fit_heads(base, lambda step: replace(loader.batch(step), events=None), judged, 500, seed)
    spent = time.process_time() - began
    test = dataset(folder / f"{name}-new", env, episodes(env, 1500, 0), 0.99)
    batches = [Loader(test, codec, "valid", WINDOW, 64, 0).batch(i) for i in range(5)]
    return [right_rewards(base, batches), base.metrics["reward_steps"], spent]


def measured(env: Items, steps: int, seed: int, seconds: float, folder: Path) -> list[float]:
    """(nats, right observations, right rewards, steps, CPU seconds of the heads)."""
    name = type(env).__name__
    rows = episodes(env, steps, 10_000 * (seed + 1))
    data = dataset(folder / f"{name}-{steps}-{seed}", env, rows, 0.2)
    codec = Codec.fit(data)
    model = ModelConfig(family="ensemble", size="30k", members=2, context=WINDOW, head_steps=800)
    began = time.process_time()
    base = fitted_base(data, codec, model, seed)
    heads = time.process_time() - began
    net = build(codec.spec, model)
    mup.init_(net, seed)
    optimizer = torch.optim.AdamW(mup.param_groups(net, 3e-3, 0.01), betas=(0.9, 0.99), fused=True)
    loader = Loader(data, codec, "train", WINDOW, BATCH, seed)
    valid = [Loader(data, codec, "valid", WINDOW, 64, seed).batch(i) for i in range(2)]
    best, weights, spent, step = np.inf, None, 0.0, 0
    while spent < seconds:
        began = time.process_time()
        for _ in range(EVERY):
            windows = loader.batch(step)
            optimizer.zero_grad()
            net(windows, apply_base(base, windows)).objective.backward()
            optimizer.step()
            step += 1
        spent += time.process_time() - began
        if (now := nats(net, base, valid)) < best:
            best, weights = now, copy.deepcopy(net.state_dict())
    assert weights is not None
    net.load_state_dict(weights)
    test = dataset(folder / f"{name}-{steps}-{seed}-new", env, episodes(env, 1500, 0), 0.99)
    batches = [Loader(test, codec, "valid", WINDOW, 64, 0).batch(i) for i in range(5)]
    return [nats(net, base, batches), *right(net, base, batches), step, heads]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, nargs="*", default=list(STEPS))
    parser.add_argument("--worlds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--reward", action="store_true")
    args = parser.parse_args()
    if args.reward:
        print("real steps | world | right rewards | training steps | CPU s")
    else:
        print(
            "real steps | world | nats | right observations | right rewards | steps | heads, CPU s"
        )
    with tempfile.TemporaryDirectory() as folder:
        for steps in args.steps:
            for kind in [KINDS[name] for name in args.worlds]:
                env, where = kind(slots=args.slots), Path(folder)
                for seed in range(args.seeds):
                    if args.reward:
                        row = reward_alone(env, steps, seed, where)
                    else:
                        row = measured(env, steps, seed, args.seconds, where)
                    figures = (f"{x:.3g}" for x in row)
                    print(steps, kind.__name__, *figures, sep=" | ", flush=True)


if __name__ == "__main__":
    main()
