"""The learning rate's course, and the watch for a loss that explodes. Both are functions of plain
numbers that a checkpoint holds.
"""

from __future__ import annotations

import math

FACTOR, MARGIN = 10.0, 10.0
"""A loss above FACTOR * the best so far + MARGIN nats is high. In whole runs on CartPole and
InvertedPendulum no step came near: at most 0.7 of it.
"""
PATIENCE = 5
"""So many high losses on end are an explosion; at the last step, one is."""
GRACE = 8
"""No explosion is called in the first steps."""


def lr_factor(step: int, steps: int, warmup: float, decay: float) -> float:
    """Warm-up, stable, decay: the multiplier in step 1..steps. Linear up over the first `warmup`
    share, linear to 0 over the last `decay` share (the last step still has a positive rate).
    """
    return factor(step, steps, length(warmup, steps), length(decay, steps))


def factor(step: int, steps: int, rise: int, fall: int) -> float:
    """`lr_factor` with the warm-up and the decay in steps. Up to step `steps - fall` it is that of
    any longer run of the same `rise`.
    """
    multiplier = 1.0
    if rise:
        multiplier = min(multiplier, step / rise)
    if fall:
        multiplier = min(multiplier, (steps - step + 1) / fall)
    return multiplier


def length(share: float, steps: int) -> int:
    """Steps in a share of them."""
    return math.ceil(share * steps)


def share(length: int, steps: int) -> float:
    """A share of `steps` that is `length` steps long."""
    return max(0.0, length - 0.5) / steps


def due(step: int, saved: int, every: int, high: int) -> bool:
    """Whether `step` is to be saved after step `saved` was: where `every` steps are full, but never
    while the loss is high; then as soon as it is not.
    """
    return step // every > saved // every and not high


class Watch:
    """Says when training has gone wrong: a value that is not finite, or a loss far above the best
    so far for several steps on end.
    """

    def __init__(self, best: float | None = None, high: int = 0):
        self.best, self.high = best, high

    def check(self, step: int, *, last: bool = False, **values: float) -> str | None:
        """A sentence that names the step, or None. `loss` among `values` is compared with its own
        past.
        """
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
