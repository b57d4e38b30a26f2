"""Evidence in logs for a world to learn from: whether actions vary freely, and which rewards occur.

Where the logs' action follows from the observation, a world that ignores actions has the same
likelihood, and its answers about other actions are guesses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mesocosm.data.analysis.neighbours import Features, Sample, nearest, nearest_elsewhere
from mesocosm.data.loading.normalize import Moments
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.spaces import SpaceCodec

Array = NDArray[Any]
SAMPLE = 5000
"""Most transitions of the training split that are compared."""
FEWEST = 100
"""Transitions below which `Evidence.known` is false."""
NEIGHBOURS = 8
FIXED_NUMBER, FIXED_CATEGORY = 0.05, 0.1
"""A part of the action with a smaller free share follows from the observation.

The share of a policy that switches between categories is overestimated: states gather where it
switches.
"""
WINDOW = 10
"""Consecutive steps over which rewards are averaged."""
MARGIN = 0.1
"""Share of the range of logged reward rates by which a rate may exceed the highest one."""
ROWS = 1 << 20
"""Rows whose rewards are read at a time."""


@dataclass(frozen=True)
class Evidence:
    """The evidence in the logs that a world is trained on."""

    transitions: int
    """The number that `free` compares."""
    free: dict[str, float]
    """Part of the action -> share of its variance that the observation leaves open."""
    fixed: list[str]
    """The parts that follow from the observation."""
    best_return: float
    low_rate: float
    high_rate: float
    """Lowest and highest mean reward over WINDOW consecutive steps (`reward_rates`)."""

    @property
    def known(self) -> bool:
        """True if there are enough transitions."""
        return self.transitions >= FEWEST and bool(self.free)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def unidentified(self) -> str | None:
        """A warning if the effect of a part of the action is not identified."""
        if not self.known or not self.fixed:
            return None
        shares = [f"{name} ({self.free[name]:.1%} of its variance is free)" for name in self.fixed]
        named = ", ".join(shares[:3])
        more = f" and {len(shares) - 3} more" if len(shares) > 3 else ""
        return (
            f"in the logs the action follows from the observation: {named}{more}; a world that "
            "ignores it fits as well, so add logs in which it varies, such as random or noisy ones"
        )

    def unexplained(self, earned: float, steps: float) -> str | None:
        """A warning if the logs cannot explain a mean return.

        Args:
            earned: The mean undiscounted return of an agent's imagined episodes.
            steps: Their mean length.
        """
        rate = earned / max(steps, 1.0)
        slack = MARGIN * (self.high_rate - self.low_rate) + 1e-3 * abs(self.high_rate)
        # A goal that is reached sooner: fewer steps than WINDOW may earn what WINDOW logged did.
        if min(rate, earned / max(steps, WINDOW)) > self.high_rate + slack:
            return (
                f"it earns {rate:.4g} a step in the world, and no {WINDOW} consecutive steps of the"
                f" logs average more than {self.high_rate:.4g}; judge it in reality before it is"
                " trusted"
            )
        if self.known and self.fixed and earned > self.best_return + slack:
            return (
                f"it earns {earned:.4g} in the world and the best logged episode"
                f" {self.best_return:.4g}, but the logs do not show what actions do; judge it in"
                " reality before it is trusted"
            )
        return None


def evidence(dataset: Dataset, *, seed: int = 0) -> Evidence:
    """Evidence of both splits' rewards, and of a sample of the training split's actions."""
    codec = dataset.action_codec
    moments = {
        "obs_num": Moments(dataset.observation_codec.numbers),
        "act_num": Moments(codec.numbers),
    }
    # The moments are those of the sample, because all transitions would take a pass over the data.
    sample = Features(dataset, moments).sample(dataset, "train", seed=seed, limit=SAMPLE)
    for name, columns in moments.items():
        columns.add(sample.raw[name])
    features = Features(dataset, moments)
    sample = replace(sample, values=features.of(dataset, sample.episodes, sample.raw))
    free = free_shares(sample, features, codec, seed=seed) if len(sample) >= FEWEST else {}
    limits = dict.fromkeys(codec.labels(), FIXED_NUMBER)
    fixed = [name for name, share in free.items() if share <= limits.get(name, FIXED_CATEGORY)]
    low, high = reward_rates(dataset)
    best = float(dataset.table["total_reward"].max())
    return Evidence(len(sample), free, fixed, best, low, high)


def free_shares(
    sample: Sample, features: Features, codec: SpaceCodec, *, seed: int
) -> dict[str, float]:
    """Var(part of the action | observation) / Var(part), by name. 0 for a constant part.

    Half the mean squared difference of two actions at a state and its k-th neighbour estimates the
    conditional variance plus a term that vanishes with their distance. The share is the intercept
    over k, of the squared distance for numbers (the Gamma test, Stefansson, Koncar and Jones 1997)
    and of the distance for categories, whose policies switch. Neighbours are of other episodes,
    because an action that is held for several steps is like its neighbours in time.
    """
    states = sample.values[:, features.state]
    if (count := len(np.unique(sample.episodes))) > 1:
        order = np.random.default_rng(seed).permutation(count)
        distances, places = nearest_elsewhere(states, sample.episodes, NEIGHBOURS, order=order)
    else:
        distances, places = (side[:, 1:] for side in nearest(states, states, NEIGHBOURS + 1))
    shares: dict[str, float] = {}
    for name, values, squared in _parts(sample, codec):
        if squared:
            spread, apart = 2.0 * values.var(), (values[places] - values[:, None]) ** 2
        else:
            counts = np.unique(values, return_counts=True)[1] / len(values)
            spread, apart = 1.0 - (counts**2).sum(), values[places] != values[:, None]
        x = (distances**2 if squared else distances).mean(0)
        y = apart.mean(0) / spread if spread > 1e-12 else np.zeros(NEIGHBOURS)
        centred = x - x.mean()
        slope = float(centred @ y) / max(float(centred @ centred), 1e-300)
        shares[name] = float(np.clip(y.mean() - max(slope, 0.0) * x.mean(), 0.0, 1.0))
    return shares


def _parts(sample: Sample, codec: SpaceCodec) -> Iterator[tuple[str, Array, bool]]:
    """(name, values [N], whether it is a number) of each part of the action.

    A text is one category.
    """
    numbers, categories = sample.raw["act_num"].astype(np.float64), sample.raw["act_cat"]
    for i, name in enumerate(codec.labels()):
        yield name, numbers[:, i], True
    for leaf in codec.leaves:
        codes = categories[:, leaf.categories].astype(np.int64)
        if leaf.characters is not None:
            yield leaf.name, np.unique(codes, axis=0, return_inverse=True)[1].reshape(-1), False
        else:
            for i, values in enumerate(codes.T):
                yield (leaf.name if len(codes.T) == 1 else f"{leaf.name}[{i}]"), values, False


def reward_rates(dataset: Dataset) -> tuple[float, float]:
    """(lowest, highest) mean reward over WINDOW consecutive steps.

    A shorter episode counts with all its steps, and with all but the last one, whose reward may be
    the price of ending.
    """
    table, low, high = dataset.table, np.inf, -np.inf
    parts = int(table["length"].sum()) // ROWS + 1
    for episodes in np.array_split(np.arange(len(table)), min(parts, len(table))):
        lengths = table["length"][episodes].astype(np.int64)
        ends = np.cumsum(lengths)
        steps = np.arange(ends[-1])
        rows = steps + np.repeat(table["first_row"][episodes] - (ends - lengths), lengths)
        rewards = dataset.gather("reward", np.repeat(table["shard"][episodes], lengths), rows)
        total = np.concatenate([[0.0], np.cumsum(rewards.reshape(-1), dtype=np.float64)])
        first = steps[np.repeat(ends, lengths) - steps >= WINDOW]
        begins, short = ends - lengths, lengths < WINDOW
        before = short & (lengths > 1)
        rates = np.concatenate(
            [
                (total[first + WINDOW] - total[first]) / WINDOW,
                (total[ends] - total[begins])[short] / lengths[short],
                (total[ends - 1] - total[begins])[before] / (lengths[before] - 1),
            ]
        )
        low, high = min(low, float(rates.min())), max(high, float(rates.max()))
    return low, high
