"""Steering real training runs: each step trains a network on handwritten digits for some epochs.

`reality.env=mesocosm.envs.training:TrainingRun`. It needs scikit-learn (`mesocosm[training]`), in
which the digits are.

An episode is one data set with one network. The agent sees their sizes and the curves, and chooses
how to go on: the learning rate, the batch, the number of epochs, the weight decay, and whether to
continue, to go back to the best network so far, to start afresh, or to stop. What it cannot see is
how many labels are wrong, and the unit of the features: in other units the best learning rate is
another, thousands of times as large, and one that is too large makes the run diverge.

The duration of a step is computed from its operations, as if on one device of FLOPS_PER_S, so that
an episode is the same to the bit on one kind of processor. It spans a factor of 1,000.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from mesocosm.envs.api import package_versions

CONTINUE, FROM_BEST, FROM_SCRATCH, STOP = range(4)
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
BATCHES = (16, 64, 256)
EPOCHS = (1, 3, 9)
DECAYS = (0.0, 1e-3, 1e-2)
CHOICES = [4, len(RATES), len(BATCHES), len(EPOCHS), len(DECAYS)]
NOISES = (0.0, 0.1, 0.3)
"""Shares of wrong training labels; an episode has one of them."""
UNIT = 16.0
"""The features are multiplied by a number between 1 / UNIT and UNIT."""
ROWS, COLUMNS, WIDTHS, DEPTHS = (150, 600), (24, 64), (32, 64, 128), (1, 2, 3)
HELD_OUT, CLASSES = 500, 10
MEMORY = 4
"""Past runs that are observed."""
MOMENTUM = 0.9
LIMIT = 10.0
"""A loss above it, or one that is no number, is observed as this."""

FLOPS_PER_S, UPDATE_S, RUN_S = 5e8, 5e-5, 1e-3
"""The device: its speed, and the seconds that an update and a run take beside their operations."""


class DigitsNet:
    """A ReLU network whose parameters are one vector, trained by SGD with momentum.

    The gradient is written out: for networks this small, automatic differentiation takes several
    times as long as the arithmetic.

    Args:
        sizes: Of the layers, inputs and outputs included.
        seed: Of the parameters.
    """

    def __init__(self, sizes: Sequence[int], seed: int):
        shapes = [(before + 1, after) for before, after in itertools.pairwise(sizes)]
        self.theta = torch.empty(sum(rows * columns for rows, columns in shapes))
        self._gradient = torch.empty_like(self.theta)
        generator = torch.Generator().manual_seed(seed)
        self._layers: list[tuple[Tensor, Tensor]] = []
        start = 0
        for rows, columns in shapes:
            stop = start + rows * columns
            layer, slope = (
                vector[start:stop].view(rows, columns) for vector in (self.theta, self._gradient)
            )
            bound = (6 / (rows - 1)) ** 0.5  # He et al. (2015), for ReLU
            layer.uniform_(-bound, bound, generator=generator)[-1] = 0.0
            self._layers.append((layer, slope))
            start = stop

    def _activations(self, features: Tensor) -> list[Tensor]:
        """The inputs of each layer [rows, before], and the logits."""
        inputs = [features]
        for layer, _ in self._layers:
            inputs.append(torch.addmm(layer[-1], inputs[-1], layer[:-1]))
            if len(inputs) <= len(self._layers):
                inputs[-1].relu_()
        return inputs

    def fit(
        self,
        data: tuple[Tensor, Tensor],
        generator: torch.Generator,
        *,
        rate: float,
        batch: int,
        epochs: int,
        decay: float,
    ) -> tuple[int, bool]:
        """Train on (features, one-hot labels). Returns (finished epochs, whether it diverged)."""
        features, labels = data
        velocity = torch.zeros_like(self.theta)
        for epoch in range(epochs):
            for rows in torch.randperm(len(labels), generator=generator).split(batch):
                *inputs, logits = self._activations(features[rows])
                error = (logits.softmax(1) - labels[rows]) / len(rows)
                for (layer, slope), below in zip(
                    reversed(self._layers), reversed(inputs), strict=True
                ):
                    torch.mm(below.T, error, out=slope[:-1])
                    torch.sum(error, 0, out=slope[-1])
                    if below is not inputs[0]:
                        error = (error @ layer[:-1].T) * (below > 0)
                velocity.mul_(MOMENTUM).add_(self._gradient).add_(self.theta, alpha=decay)
                self.theta.add_(velocity, alpha=-rate)
            if not bool(torch.isfinite(self.theta.sum())):
                return epoch + 1, True
        return epochs, False

    def curve(self, data: tuple[Tensor, Tensor]) -> tuple[float, float]:
        """(cross entropy, at most LIMIT; accuracy) on (features, one-hot labels)."""
        features, labels = data
        logits = self._activations(features)[-1]
        loss = float(-(logits.log_softmax(1) * labels).sum(1).mean())
        hits = (logits.argmax(1) == labels.argmax(1)) & torch.isfinite(logits).all(1)
        return min(loss, LIMIT) if loss < LIMIT else LIMIT, float(hits.float().mean())


class TrainingRun(gymnasium.Env[dict[str, Any], NDArray[Any]]):
    """One training run, steered a few epochs at a time.

    The observation:

    - `data` [4]: log10 of the rows, columns / 64, log2 of the width, depth. The task.
    - `now` [7]: training and held-out loss and accuracy, the best held-out accuracy so far, the
      share of the budget that is left, the number of runs so far / 10.
    - `past` [MEMORY, 7]: the latest runs first: rate, batch, epochs and decay by their positions in
      [0, 1], training and held-out loss, log10 of the seconds.

    The action: [operation, rate, batch, epochs, decay], positions in CONTINUE ... STOP, RATES,
    BATCHES, EPOCHS and DECAYS.

    The reward of a step is 10 ln(error before / error now) of the best held-out accuracy, minus
    `cost` for each second. An episode ends when it is stopped, or when `budget_s` seconds are
    spent. A run that diverges ends at that epoch: its losses are observed as LIMIT,
    `info["diverged"]` is true, and continuing it is of no use.

    Args:
        budget_s: Seconds of an episode; the last run may exceed them.
        cost: Reward that a second costs.
    """

    metadata = {"render_modes": []}

    @classmethod
    def program_versions(cls) -> list[str]:
        """The versions of programs that are a part of the environment's version."""
        return package_versions("torch", "scikit-learn")

    def __init__(self, budget_s: float = 2.0, cost: float = 2.0):
        self.budget_s, self.cost = budget_s, cost
        self.observation_space = spaces.Dict(
            {
                "data": spaces.Box(0, 10, (4,), np.float32),
                "now": spaces.Box(-LIMIT, LIMIT, (7,), np.float32),
                "past": spaces.Box(-LIMIT, LIMIT, (MEMORY, 7), np.float32),
            }
        )
        self.action_space = spaces.MultiDiscrete(CHOICES)
        digits()  # a missing package is reported here, before any step

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        draw, (features, labels) = self.np_random, digits()
        order = draw.permutation(len(labels))
        rows = int(draw.integers(*ROWS, endpoint=True))
        columns = draw.permutation(features.shape[1])[: draw.integers(*COLUMNS, endpoint=True)]
        shown, held = order[:rows], order[-HELD_OUT:]
        noisy = labels[shown].copy()
        wrong = draw.random(rows) < draw.choice(NOISES)
        noisy[wrong] = draw.integers(0, CLASSES, wrong.sum())
        unit = np.float32(UNIT ** draw.uniform(-1, 1))
        scaled = torch.from_numpy(features[:, columns] * unit)
        one_hot = torch.eye(CLASSES)
        self._train = scaled[shown], one_hot[noisy]
        self._held = scaled[held], one_hot[labels[held]]
        self._shape = len(columns), int(draw.choice(WIDTHS)), int(draw.choice(DEPTHS))
        self._seed, self._runs = int(draw.integers(2**31)), 0
        self._data = np.array(
            [np.log10(rows), len(columns) / 64, np.log2(self._shape[1]), self._shape[2]], np.float32
        )
        self._past = np.zeros((MEMORY, 7), np.float32)
        self._left = self.budget_s
        with _one_thread():
            self._begin()
            self._measure()
        self._best, self._saved = 1 / CLASSES, self._net.theta.clone()
        return self._observation(), {"duration": 0.0}

    def step(
        self, action: NDArray[Any]
    ) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        operation, rate, batch, epochs, decay = (int(value) for value in action)
        if operation == STOP:
            return self._observation(), -self.cost * RUN_S, True, False, self._info(RUN_S, False)
        self._runs += 1
        with _one_thread():
            if operation == FROM_BEST:
                self._net.theta.copy_(self._saved)
            elif operation == FROM_SCRATCH:
                self._begin()
            done, diverged = self._net.fit(
                self._train,
                torch.Generator().manual_seed(self._seed - self._runs),
                rate=RATES[rate],
                batch=BATCHES[batch],
                epochs=EPOCHS[epochs],
                decay=DECAYS[decay],
            )
            self._measure()
        seconds = self._seconds(done, BATCHES[batch])
        self._left -= seconds
        accuracy = self._curve[3]
        gain = max(0.0, float(np.log((1.005 - self._best) / (1.005 - accuracy))))
        if accuracy > self._best:
            self._best, self._saved = accuracy, self._net.theta.clone()
        settings = np.array([rate, batch, epochs, decay]) / (np.array(CHOICES[1:]) - 1)
        row = [*settings, self._curve[0], self._curve[2], np.log10(seconds)]
        self._past = np.concatenate([[row], self._past[:-1]]).astype(np.float32)
        reward = 10 * gain - self.cost * seconds
        return self._observation(), reward, self._left <= 0, False, self._info(seconds, diverged)

    def _info(self, seconds: float, diverged: bool) -> dict[str, Any]:
        return {"duration": seconds, "diverged": diverged, "success": self._best >= 0.9}

    def _begin(self) -> None:
        """A new network, another one for each run of the episode."""
        columns, width, depth = self._shape
        self._net = DigitsNet([columns, *[width] * depth, CLASSES], self._seed + self._runs)

    def _measure(self) -> None:
        """Set the curve's last point: training and held-out loss and accuracy."""
        self._curve = [*self._net.curve(self._train), *self._net.curve(self._held)]

    def _seconds(self, epochs: int, batch: int) -> float:
        """The declared duration of a run: 6 operations a parameter and row that is learned (2 to
        predict, 4 for the gradient), 2 for one that is measured.
        """
        rows = len(self._train[1])
        operations = len(self._net.theta) * (6 * epochs * rows + 2 * (rows + HELD_OUT))
        return RUN_S + UPDATE_S * epochs * -(-rows // batch) + operations / FLOPS_PER_S

    def _observation(self) -> dict[str, Any]:
        left = max(self._left, 0.0) / self.budget_s
        now = np.array([*self._curve, self._best, left, self._runs / 10], np.float32)
        return {
            "data": self._data.copy(),
            "now": np.clip(now, -LIMIT, LIMIT),
            "past": self._past.copy(),
        }


@cache
def digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """scikit-learn's 1,797 handwritten digits: features [1797, 64] in [0, 1], labels [1797].

    Raises:
        gymnasium.error.DependencyNotInstalled: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise gymnasium.error.DependencyNotInstalled(
            "scikit-learn is not installed; pip install 'mesocosm[training]'"
        ) from error
    features, labels = load_digits(return_X_y=True)
    return (features / 16).astype(np.float32), labels.astype(np.int64)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums are the same on any number of CPUs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
