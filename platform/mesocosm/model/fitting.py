"""The fit of a small network with early stopping, for the parts trained before pretraining.

The learning rate is constant. The fit evaluates and keeps a running average of the weights over the
last tenth of the steps. Averaging has the effect of a decaying rate, at any step. The fit ends once
a third of all steps and SLACK more have passed since the best step, so that its cost depends on the
data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

EVERY = 50
"""Steps between evaluations."""
SHARE = 0.1
"""Length of the running average, as a fraction of the steps so far."""
SLACK = 200
GAIN = 0.01
"""Fraction by which the held-out loss must fall to postpone the end. Smaller gains are kept too."""
ALONE = 300
"""The most steps without held-out data."""

Report = Callable[[str], None]
"""A function that receives the progress of a fit as text."""


def silent(text: str) -> None:
    """Discard a report."""


def of_part(report: Report, part: str) -> Report:
    """Return a Report that puts the name of the part before each text."""
    return lambda text: report(f"{part}, {text}")


@dataclass(frozen=True)
class StoppedFit:
    """The result of a fit."""

    steps: int  # after which the kept weights were reached
    loss: float  # held-out, of the kept weights; NaN without held-out data


def fit(
    optimizer: Optimizer,
    loss: Callable[[int], Tensor],
    held_out: Callable[[], Tensor] | None,
    most: int,
    report: Report = silent,
) -> StoppedFit:
    """Minimise `loss` and leave the average with the least held-out loss in the parameters.

    Args:
        optimizer: Of the parameters, which are trained in place.
        loss: The scalar to minimise at a step, counted from 0, with gradient.
        held_out: The scalar loss of the present parameters on held-out data; None if no data are
            held out, and the fit then ends after ALONE steps.
        most: The most steps.
        report: Called with the progress in words after each evaluation.

    Returns:
        The steps to the kept weights and their held-out loss.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    average = [p.detach().clone() for p in parameters]
    best = [p.clone() for p in average]
    result, reference, last_gain = StoppedFit(0, math.nan), math.inf, 0
    if held_out is None:
        most = min(most, ALONE)
    for step in range(1, most + 1):
        with torch.enable_grad():
            loss(step - 1).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 / (SHARE * step + 1))
        if not step % EVERY:
            report(f"step {step:,} of at most {most:,}")
        if held_out is None or (step % EVERY and step != most):
            continue
        value = _judged(parameters, average, held_out)
        if math.isnan(result.loss) or value < result.loss:
            result = StoppedFit(step, value)
            torch._foreach_copy_(best, average)
        if value < (1 - GAIN) * reference:
            reference, last_gain = value, step
        if step > 1.5 * last_gain + SLACK:
            break
    if held_out is None:
        result, best = StoppedFit(most, math.nan), average
    with torch.no_grad():
        torch._foreach_copy_(parameters, best)
    return result


@torch.no_grad()
def _judged(
    parameters: list[Tensor], average: list[Tensor], held_out: Callable[[], Tensor]
) -> float:
    """The held-out loss of the average; the parameters are as before afterwards."""
    present = [p.detach().clone() for p in parameters]
    torch._foreach_copy_(parameters, average)
    value = float(held_out())
    torch._foreach_copy_(parameters, present)
    return value
