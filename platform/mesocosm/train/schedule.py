"""The learning rate schedule, when held-out data stop training, and the detection of a diverging
loss: functions of plain numbers that a checkpoint holds.
"""

from __future__ import annotations

import math
from typing import NamedTuple

FACTOR, MARGIN = 10.0, 10.0
"""A loss above FACTOR * the best so far + MARGIN nats is high. In whole runs on CartPole and
InvertedPendulum no step came near: at most 0.7 of it.
"""
PATIENCE = 5
"""Consecutive high losses that count as divergence (1 at the last step)."""
GRACE = 8
"""First steps, in which no loss counts as divergence."""

JUDGED_RATIO = 1.5
"""The ratio of successive steps after which held-out data judge the weights."""
OVER, RISE = 2.5, 0.02
"""Training ends once the steps are OVER times those of the best weights and the held-out loss is
above theirs by a fraction RISE, while the training loss is below theirs. A plateau, which a
transformer may leave late, does not end it, and too high a learning rate is not overtraining.
"""


def judged_steps(steps: int, warmup: float) -> set[int]:
    """The steps after which the weights are judged: the last, and JUDGED_RATIO times fewer each
    time, down to the end of the warm-up.
    """
    chosen, step = {steps}, float(steps)
    while step >= max(1, length(warmup, steps)):
        chosen.add(round(step))
        step /= JUDGED_RATIO
    return chosen


class Judgement(NamedTuple):
    """The losses of the weights after a step, in nats: of held-out data, and of the step's batch
    without its starts, of which a batch has more or fewer.
    """

    step: int
    held_out: float
    trained: float


def overtrained(now: Judgement, best: Judgement) -> bool:
    """Decide whether training ends now, because the best weights are well behind."""
    worse = now.held_out > best.held_out + RISE * abs(best.held_out)
    return now.step >= OVER * best.step and worse and now.trained < best.trained


def lr_factor(step: int, steps: int, warmup: float, decay: float) -> float:
    """Warm-up, stable, decay: the multiplier in step 1..steps. Linear up over the first `warmup`
    fraction, linear to 0 over the last `decay` fraction; the last step still has a positive rate.
    """
    return factor(step, steps, length(warmup, steps), length(decay, steps))


def factor(step: int, steps: int, rise: int, fall: int) -> float:
    """`lr_factor` with warm-up and decay in steps. Up to step `steps - fall` it equals that of any
    longer run with the same `rise`.
    """
    multiplier = 1.0
    if rise:
        multiplier = min(multiplier, step / rise)
    if fall:
        multiplier = min(multiplier, (steps - step + 1) / fall)
    return multiplier


def length(share: float, steps: int) -> int:
    """The number of steps in a fraction of them."""
    return math.ceil(share * steps)


def share(length: int, steps: int) -> float:
    """A fraction of `steps` that is `length` steps long."""
    return max(0.0, length - 0.5) / steps


def due(step: int, saved: int, every: int, high: int) -> bool:
    """Decide whether to save `step` after step `saved`: once `every` steps have passed, but only
    when the loss is not high.
    """
    return step // every > saved // every and not high


class Watch:
    """Detects a value that is not finite, and several consecutive losses far above the best."""

    def __init__(self, best: float | None = None, high: int = 0):
        self.best, self.high = best, high

    def check(self, step: int, *, last: bool = False, **values: float) -> str | None:
        """The problem in one sentence, or None. `loss` among `values` is compared with its past."""
        for name, value in values.items():
            if not math.isfinite(value):
                return f"the {name.replace('_', ' ')} is {value} at step {step}"
        loss = values.get("loss")
        if loss is None:
            return None
        best = loss if self.best is None else self.best
        self.high = self.high + 1 if loss > FACTOR * best + MARGIN else 0
        if self.high >= (1 if last else PATIENCE) and step > GRACE:
            return (
                f"the loss exploded: {loss:.4g} nats a transition at step {step}, after {best:.4g}"
                " at its best"
            )
        self.best = min(best, loss)
        return None
