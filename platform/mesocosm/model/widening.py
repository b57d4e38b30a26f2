"""One factor a slot on the scales of a trained network's densities, chosen on held-out data.

A network is trained on residuals of a base that was fitted to the same transitions. They are
smaller than those of new data, so its densities are too narrow. One number for each slot repairs
most of it, as temperature scaling does for classifiers (Guo et al. 2017, arXiv 1706.04599). A world
of Reacher-v5 from 1,000 transitions had 130 nats a transition on new data before and 70 after.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from mesocosm.model.base import Base
from mesocosm.model.net import WorldNet, apply_base, unroll
from mesocosm.model.spec import Windows

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
    windows = [(w, net.held_out(w, unseen=unseen)) for w, unseen in batches]
    pairs = int(sum(int(keep.sum()) for _, keep in windows))
    base.widening.fill_(1.0)
    if pairs < FEW or not len(base.widening):
        return pairs
    low, high = torch.full_like(base.widening, LOW), torch.full_like(base.widening, HIGH)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        rising = _slope(net, base, windows, middle) > 0
        high, low = torch.where(rising, middle, high), torch.where(rising, low, middle)
    base.widening.copy_(((low + high) / 2).exp())
    return pairs


def _slope(
    net: WorldNet, base: Base, windows: list[tuple[Windows, Tensor]], logs: Tensor
) -> Tensor:
    """The derivative of the held-out nats by the factors' logarithms."""
    total = torch.zeros_like(logs)
    for some, keep in windows:
        if not keep.any():
            continue
        transition, outcome = unroll(some)
        with torch.no_grad():
            features = net.context(transition)
        with torch.enable_grad():
            free = logs.clone().requires_grad_()
            out = apply_base(base, some).widened(free.exp())
            dynamics, duration = net.log_prob(features, transition, outcome, out)
            joint = dynamics if duration is None else dynamics + duration
            nats = -torch.where(keep, joint, 0.0).sum()
            total += torch.autograd.grad(nats, free)[0]
    return total
