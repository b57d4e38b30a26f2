"""The start model on starts that it has not seen.

    python benchmarks/bench_starts.py [ENV ...]

For each environment, number of episodes (four fifths of them for training) and seed: the nats of
512 held-out starts, the AUC of the suite's classifier of generated against held-out starts (50 of
each, as a small evaluation has, and 512), the share of generated starts nearer to a training start
than held-out ones are (.5: equally near; 1: copies), and the CPU seconds of the fit. Prints medians
of three seeds as a table. Ten CPU seconds an environment.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray

from mesocosm.evaluate.metrics.starts import out_of_fold
from mesocosm.model import rng
from mesocosm.model.spec import PartSpec, Spec
from mesocosm.model.start import StartModel
from mesocosm.model.tensors import Parts

ENVS = ("Reacher-v5", "InvertedPendulum-v5", "CartPole-v1", "Pendulum-v1", "Hopper-v5")
EPISODES, SEEDS, HELD_OUT, STEPS = (16, 50, 200), 3, 512, 50
Array = NDArray[np.float64]


def rollouts(name: str, starts: int, episodes: int) -> tuple[Array, Array]:
    """The observations after `starts` resets, and those of `episodes` random ones, [n, d]."""
    env = gymnasium.make(name)
    env.action_space.seed(0)
    first, seen = [], []
    for seed in range(starts):
        first.append(np.ravel(env.reset(seed=seed)[0]))
        for _ in range(STEPS if seed < episodes else 0):
            observation, _, terminated, truncated, _ = env.step(env.action_space.sample())
            seen.append(np.ravel(observation))
            if terminated or truncated:
                break
    return np.array(first, np.float64), np.array(first[:episodes] + seen, np.float64)


def auc(real: Array, made: Array, pairs: int) -> float:
    """The AUC of the suite's classifier, on `pairs` starts of each side."""
    a, b = out_of_fold(real[:pairs], made[:pairs], 0)
    return float(((b > a[:, None]) + 0.5 * (b == a[:, None])).mean())


def nearer(made: Array, real: Array, train: Array) -> float:
    """Share of pairs in which the generated start is nearer to a training start."""
    scale = np.maximum(train.std(0), 1e-9)
    of_made, of_real = (
        np.sqrt((((x[:, None] - train) / scale) ** 2).sum(-1)).min(1) for x in (made, real)
    )
    return float((of_made[:, None] < of_real).mean())


def parts(values: Array) -> tuple[Parts, Parts]:
    """An empty task, and observations."""
    nothing = torch.zeros(len(values), 0, dtype=torch.int64)
    return Parts(torch.zeros(len(values), 0), nothing), Parts(
        torch.from_numpy(values).float(), nothing
    )


def cell(first: Array, seen: Array, episodes: int, seed: int, fit: Any) -> list[float]:
    """Nats, the two AUCs, the share of nearer starts and CPU seconds of the fit."""
    mean, scale = seen.mean(0), seen.std(0)
    scale = np.where(scale <= 1e-8 * np.abs(mean), 1.0, scale)
    bins = 10.0 ** np.floor(np.log10(1e-4 * scale)) / scale
    starts = (first - mean) / scale
    real, logged = starts[:HELD_OUT], starts[HELD_OUT + 200 * seed :][: episodes * 4 // 5]
    spec = Spec(PartSpec(starts.shape[1], tuple(bins.tolist())), PartSpec())
    began = time.process_time()
    model = fit(spec, *parts(logged))
    seconds = time.process_time() - began
    keys = rng.keys(seed, torch.arange(HELD_OUT), 0, 0)
    made = model.draw(keys)[1].numbers.double().numpy()
    nats = -float(model.log_prob(*parts(real)).mean())
    on_grid = [np.round(x / bins) * bins for x in (real, made)]
    areas = [auc(*on_grid, pairs) for pairs in (50, HELD_OUT)]
    return [nats, *areas, nearer(made, real, logged), seconds]


def fit(spec: Spec, task: Parts, observation: Parts) -> StartModel:
    """The start model of these starts."""
    return StartModel(spec).fit(task, observation)


def main(envs: list[str], fit: Any = fit) -> None:
    """Print the table."""
    print("| task | episodes | nats | AUC, 50 pairs | AUC, 512 pairs | nearer | CPU s |")
    print("|---|---|---|---|---|---|---|")
    for name in envs or ENVS:
        first, seen = rollouts(name, HELD_OUT + 200 * SEEDS, 50)
        for episodes in EPISODES:
            cells = [cell(first, seen, episodes, seed, fit) for seed in range(SEEDS)]
            nats, few, many, share, seconds = np.median(cells, 0)
            row = f"{nats:.1f} | {few:.2f} | {many:.2f} | {share:.2f} | {seconds:.2f}"
            print(f"| {name} | {episodes} | {row} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
