"""One factor a slot on the scales of a trained network's densities, chosen on held-out data.

A network is trained on residuals of a base that was fitted to the same transitions. They are
smaller than those of new data, so its densities are too narrow. One number for each slot repairs
most of it, as temperature scaling does for classifiers (Guo et al. 2017, arXiv 1706.04599). A world
of Reacher-v5 from 1,000 transitions had 80 nats a transition on new data before and 67 after.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mesocosm.model.base import Base
from mesocosm.model.net import BaseOut, Features, WorldNet, apply_base, unroll
from mesocosm.model.tables import pooled
from mesocosm.model.tensors import Outcome, Transition, Windows

LOW, HIGH = math.log(1 / 16), math.log(256)
"""The range of the factors' logarithms."""
HALVINGS = 9  # of the range, to 1.4%
FEW = 100
"""Fewest pairs of a member and a transition that it has not seen; with fewer the factors stay 1."""


def fit(net: WorldNet, base: Base, batches: Iterable[tuple[Windows, bool]]) -> int:
    """Choose the factors with the least nats, and store them in `base.widening`.

    A slot's nats have one minimum over its factor, for practical purposes, and depend on no other
    slot's factor: all slots are found at once, by halving the range by the sign of the derivative.

    Args:
        net: Of the world, trained.
        base: Its base.
        batches: Windows, and whether no member was trained on them; of other windows each member is
            judged on the episodes that it leaves out.

    Returns:
        The number of pairs of a member and a transition that it was not trained on. Below FEW, the
        factors are 1.
    """
    base.widening.fill_(1.0)
    judged = [_prepared(net, base, windows, unseen) for windows, unseen in batches]
    pairs = sum(int(batch.counted.sum()) for batch in judged)
    if pairs < FEW or not len(base.widening):
        return pairs
    low, high = torch.full_like(base.widening, LOW), torch.full_like(base.widening, HIGH)
    finite = torch.ones_like(low, dtype=torch.bool)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        slope = sum((_slope(net, batch, middle) for batch in judged), torch.zeros_like(low))
        slope = pooled(slope, net.spec.observation.table)
        finite &= torch.isfinite(slope)
        high, low = torch.where(slope > 0, middle, high), torch.where(slope > 0, low, middle)
    base.widening.copy_(torch.where(finite, ((low + high) / 2).exp(), 1.0))
    return pairs


@dataclass(frozen=True)
class _Batch:
    """Held-out windows, and all that does not depend on the factors."""

    transition: Transition
    outcome: Outcome
    features: Features
    base: BaseOut
    counted: Tensor  # bool [K, B, W]


@torch.no_grad()
def _prepared(net: WorldNet, base: Base, windows: Windows, unseen: bool) -> _Batch:
    transition, outcome = unroll(windows)
    out, features = apply_base(base, windows), net.context(transition)
    return _Batch(transition, outcome, features, out, net.held_out(windows, unseen=unseen))


def _slope(net: WorldNet, batch: _Batch, logs: Tensor) -> Tensor:
    """The derivative of a batch's held-out nats by the factors' logarithms."""
    with torch.enable_grad():
        free = logs.clone().requires_grad_()
        out = batch.base.widened(free.exp())
        dynamics, duration = net.log_prob(batch.features, batch.transition, batch.outcome, out)
        joint = dynamics if duration is None else dynamics + duration
        nats = -torch.where(batch.counted, joint, 0.0).sum()
        return torch.autograd.grad(nats, free)[0]
