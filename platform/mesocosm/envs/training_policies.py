"""Scripted policies of `TrainingRun`, as behaviours and to be compared:
`{kind: scripted, function: "mesocosm.envs.training_policies:FallingRate"}`. Kind `noisy` replaces
a share of their actions by those of `RandomSettings`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mesocosm.envs.training import CHOICES, CONTINUE, FROM_BEST, FROM_SCRATCH, RATES, STOP

Observation = Mapping[str, NDArray[np.float32]]
OPERATIONS = (0.6, 0.2, 0.17, 0.03)
"""How often `RandomSettings` continues, goes back to the best, starts afresh and stops."""
HALT = (STOP, 0, 0, 0, 0)


class RandomSettings:
    """Draws each setting uniformly, and seldom stops."""

    def __call__(self, observation: Observation, rng: np.random.Generator) -> NDArray[np.int64]:
        return self.random_action(observation, rng)

    def random_action(
        self, observation: Observation, rng: np.random.Generator
    ) -> NDArray[np.int64]:
        """An action of any script's noise."""
        return np.array([rng.choice(4, p=OPERATIONS), *rng.integers(0, CHOICES[1:])])


class FixedPlan(RandomSettings):
    """One action a run, then stop."""

    plan: ClassVar[Sequence[tuple[int, ...]]]

    def __call__(self, observation: Observation, rng: np.random.Generator) -> NDArray[np.int64]:
        done = runs(observation)
        return np.array(self.plan[done] if done < len(self.plan) else HALT)


class ConstantRate(FixedPlan):
    """Six runs of nine epochs at the rate .03."""

    plan = ((CONTINUE, 3, 1, 2, 0),) * 6


class FallingRate(FixedPlan):
    """A schedule: the rates .1, .1, .03 and, from the best network, .01."""

    plan = (
        (CONTINUE, 4, 0, 1, 1),
        (CONTINUE, 4, 1, 2, 1),
        (CONTINUE, 3, 1, 2, 1),
        (FROM_BEST, 2, 1, 2, 1),
    )


class AdaptiveRate(RandomSettings):
    """Reads the curves: it tries three rates for an epoch each, from scratch, and trains at the one
    of the lowest loss; then it lowers the rate from the best network, until the loss is small.
    """

    tried = (1, 3, 5)

    def __call__(self, observation: Observation, rng: np.random.Generator) -> NDArray[np.int64]:
        done, past = runs(observation), observation["past"]
        if done < len(self.tried):
            return np.array((FROM_SCRATCH, self.tried[done], 0, 0, 0))
        if done == len(self.tried):
            loss = past[: len(self.tried), 4]  # the latest comes first
            return np.array((FROM_SCRATCH, self.tried[::-1][int(loss.argmin())], 0, 2, 0))
        if done >= 8 or past[0, 4] < 0.05:
            return np.array(HALT)
        rate = round(float(past[0, 0]) * (len(RATES) - 1))
        rose = past[0, 4] > past[1, 4]
        lower = 2 if rose else int(past[0, 4] < 1.0)
        return np.array((FROM_BEST, max(rate - lower, 0), 0, 2, 0))


def runs(observation: Observation) -> int:
    """The number of runs so far."""
    return round(float(observation["now"][6]) * 10)
