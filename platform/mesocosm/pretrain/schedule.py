"""The learning rate's course, and the watch for a loss that explodes. Both are functions of plain numbers that a checkpoint holds."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import median

RECENT = 64
FACTOR = 10.0
MARGIN = 10.0
PATIENCE = 5


def lr_factor(step: int, steps: int, warmup: float, decay: float) -> float:
    """Warm-up, stable, decay: the multiplier in step 1..steps. Linear up over the first `warmup` share, linear to 0 over the last `decay` share
    (the last step still has a positive rate)."""
    rise, fall = math.ceil(warmup * steps), math.ceil(decay * steps)
    factor = 1.0
    if rise:
        factor = min(factor, step / rise)
    if fall:
        factor = min(factor, (steps - step + 1) / fall)
    return factor


class Watch:
    """Says when training has gone wrong: a value that is not finite, or a loss far above the recent ones for several steps on end."""

    def __init__(self, recent: Iterable[float] = (), high: int = 0):
        self.recent = deque(recent, maxlen=RECENT)
        self.high = high

    def check(self, step: int, **values: float) -> str | None:
        """A sentence that names the step, or None. `loss` among `values` is compared with its own past."""
        for name, value in values.items():
            if not math.isfinite(value):
                return f"the {name.replace('_', ' ')} is {value} at step {step}"
        loss = values.get("loss")
        if loss is None:
            return None
        usual = median(self.recent) if len(self.recent) == RECENT else math.inf
        self.high = self.high + 1 if loss > FACTOR * usual + MARGIN else 0
        if self.high >= PATIENCE:
            return f"the loss exploded: {loss:.4g} nats a transition at step {step}, after a median of {usual:.4g}"
        if not self.high:
            self.recent.append(loss)
        return None
