"""`make bench-training`: what scripts and agents earn in `TrainingRun`, on the same episodes.

    python benchmarks/bench_training.py [--episodes N] [--agents FOLDER ...] [--plot FILE]
    python benchmarks/bench_training.py --durations

Each row is a policy over episodes with the seeds 10,000 to 9,999 + N, of at most 20 steps. FOLDER
is a trained policy, such as `evaluations/ID/policy` of `mesocosm baseline`; it acts greedily. The
last column is the mean paired difference from the best script whose plan is fixed. Errors are
standard errors. FILE is a plot of the curves of three episodes.

`--durations` fits one small network (scikit-learn's MLPRegressor) to the seconds of random steps,
and to their logarithm, from observation and action, and prints its errors on a quarter of the
episodes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.neural_network import MLPRegressor

from mesocosm.envs.training import CHOICES, CONTINUE, TrainingRun
from mesocosm.envs.training_policies import (
    AdaptiveRate,
    ConstantRate,
    FallingRate,
    FixedPlan,
    RandomSettings,
)
from mesocosm.plotting import FREE, STYLE, WORLD, svg
from mesocosm.policies.stored import load_policy

Act = Callable[[Any, np.random.Generator], Any]
SEED, HORIZON = 10_000, 20
SHOWN = (10_000, 10_003, 10_006)
"""Seeds of the plotted episodes."""


class LowRate(FixedPlan):
    """The best of 84 plans of one rate, one batch size and 1 to 6 runs, over ten other episodes."""

    plan = ((CONTINUE, 2, 0, 1, 0), (CONTINUE, 2, 0, 2, 0))


def uniform(observation: Any, rng: np.random.Generator) -> Any:
    """Uniform from the action space, which stops a quarter of the time."""
    return rng.integers(0, CHOICES)


def episode(act: Act, seed: int) -> tuple[float, list[tuple[float, float]], dict[str, Any]]:
    """(return, (seconds so far, held-out accuracy) after each step, the last info)."""
    env, rng = TrainingRun(), np.random.default_rng(seed)
    observation, _ = env.reset(seed=seed)
    total, seconds, curve = 0.0, 0.0, [(0.0, float(observation["now"][3]))]
    for _ in range(HORIZON):
        observation, reward, ended, _, info = env.step(act(observation, rng))
        total, seconds = total + reward, seconds + info["duration"]
        curve.append((seconds, float(observation["now"][3])))
        if ended:
            break
    return total, curve, info


def durations(least: int = 1200) -> None:
    """Compare durations learned in seconds and by their logarithm, on `least` random steps."""
    env, act = TrainingRun(), RandomSettings()
    inputs, seconds, episodes = list[Any](), list[float](), list[int]()
    while len(seconds) < least:
        number = episodes[-1] + 1 if episodes else 0
        observation, _ = env.reset(seed=number)
        rng, ended = np.random.default_rng(number), False
        while not ended and (not episodes or episodes.count(number) < HORIZON):
            action = act(observation, rng)
            one_hot = [np.eye(n)[value] for n, value in zip(CHOICES, action, strict=True)]
            inputs.append(np.concatenate([*(v.ravel() for v in observation.values()), *one_hot]))
            observation, _, ended, _, info = env.step(action)
            seconds.append(info["duration"])
            episodes.append(number)
    x, y, train = np.array(inputs), np.array(seconds), np.array(episodes) < 0.75 * episodes[-1]
    x = (x - x.mean(0)) / (x.std(0) + 1e-6)
    table = Table("learned", "median factor", "90%", "median below 20 ms", "negative", "RMSE, s")
    for name, apply, invert in (("seconds", np.array, np.array), ("logarithm", np.log, np.exp)):
        target = apply(y)
        mean, scale = target[train].mean(), target[train].std()
        settings: Any = {"max_iter": 150, "early_stopping": True, "random_state": 0}
        net = MLPRegressor(hidden_layer_sizes=(64, 64), **settings)
        net.fit(x[train], (target[train] - mean) / scale)
        predicted, true = invert(net.predict(x[~train]) * scale + mean), y[~train]
        factor = np.exp(np.abs(np.log(np.maximum(predicted, 1e-4) / true)))
        cells = [np.median(factor), np.quantile(factor, 0.9), np.median(factor[true < 0.02])]
        rest = [f"{np.mean(predicted < 0):.0%}", f"{np.sqrt(np.mean((predicted - true) ** 2)):.3f}"]
        table.add_row(name, *(f"{cell:.2f}" for cell in cells), *rest)
    print(f"{len(y)} steps of {y.min():.4f} to {y.max():.2f} s")
    Console(width=140).print(table)


def spread(values: Any) -> str:
    return f"{np.mean(values):.2f} ± {np.std(values) / len(values) ** 0.5:.2f}"


def plot(acts: dict[str, Act]) -> Figure:
    """Held-out accuracy over the declared seconds, an episode a column."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 2.9), layout="constrained")
        grid = figure.subplots(1, len(SHOWN), sharey=True)
        for axes, seed in zip(grid, SHOWN, strict=True):
            for (name, act), colour in zip(acts.items(), (*FREE[:2], WORLD[0]), strict=True):
                seconds, accuracy = zip(*episode(act, seed)[1], strict=True)
                axes.plot(seconds, accuracy, color=colour, marker="o", markersize=4, label=name)
            axes.set(xlabel="seconds", title=f"episode {seed}")
        grid[0].set_ylabel("held-out accuracy")
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
        return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--agents", nargs="*", default=[], help="folders of trained policies")
    parser.add_argument("--plot", help="where to write the curves, as SVG")
    parser.add_argument("--durations", action="store_true", help="how durations are learned")
    options = parser.parse_args()
    if options.durations:
        durations()
        return
    scripts = (ConstantRate, FallingRate, LowRate, AdaptiveRate)
    acts: dict[str, Act] = {script.__name__: script() for script in scripts}
    everyone: dict[str, Act] = {"uniform": uniform, "RandomSettings": RandomSettings(), **acts}
    for folder in options.agents:
        policy = load_policy(folder)
        everyone[folder] = lambda o, rng, policy=policy: policy.act_one(o, False, rng)
    rows = {
        name: [episode(act, SEED + k) for k in range(options.episodes)]
        for name, act in everyone.items()
    }
    returns = {name: np.array([total for total, *_ in row]) for name, row in rows.items()}
    fixed = max(("ConstantRate", "FallingRate", "LowRate"), key=lambda name: returns[name].mean())
    columns = ("policy", "return", "accuracy", "success", "runs", "seconds", f"minus {fixed}")
    table = Table(*columns, box=None, pad_edge=False)
    for name, row in rows.items():
        best = [max(accuracy for _, accuracy in curve) for _, curve, _ in row]
        success = np.mean([info["success"] for *_, info in row])
        cells = [name, spread(returns[name]), f"{np.mean(best):.3f}", f"{success:.0%}"]
        cells += [f"{np.mean([len(curve) - 1 for _, curve, _ in row]):.1f}"]
        cells += [f"{np.mean([curve[-1][0] for _, curve, _ in row]):.2f}"]
        table.add_row(*cells, spread(returns[name] - returns[fixed]))
    Console(width=140).print(table)
    if options.plot:
        shown = {name: acts[name] for name in ("ConstantRate", "FallingRate", "AdaptiveRate")}
        text = svg(plot(shown), "training", "Curves of three training runs under scripts")
        Path(options.plot).write_text(text)


if __name__ == "__main__":
    main()
