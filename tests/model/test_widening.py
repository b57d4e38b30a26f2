"""The factors of a trained network's scales, against the best ones."""

from __future__ import annotations

import pytest
import torch

from mesocosm.model import widening
from mesocosm.model.base import Base
from mesocosm.model.config import ModelConfig
from mesocosm.model.families import build
from mesocosm.model.mup import init_
from mesocosm.model.net import WorldNet, apply_base
from mesocosm.model.rng import member_mask
from mesocosm.model.spec import PartSpec, Spec
from mesocosm.model.tensors import Windows
from model.nets import nothing, numbers

W, SPEC = 4, Spec(PartSpec(2, (0.01, 0.01)), PartSpec(), reward_values=(0.0,))


def windows(rows: int) -> Windows:
    """Numbers that change by noise of deviation 3 and .2, in windows of one episode each."""
    g = torch.Generator().manual_seed(0)
    change = torch.randn(rows, W + 1, 2, generator=g) * torch.tensor([3.0, 0.2])
    return Windows(
        observation=numbers(change.cumsum(1)),
        action=nothing(rows, W),
        task=nothing(rows),
        reward=torch.zeros(rows, W),
        terminated=torch.zeros(rows, W),
        duration=torch.zeros(rows, W),
        mask=torch.ones(rows, W, dtype=torch.bool),
        start=torch.zeros(rows, dtype=torch.bool),
        episode=torch.arange(rows),
    )


def world(family: str, members: int) -> tuple[WorldNet, Base]:
    config = ModelConfig(family=family, size="10k", members=members, context=W, base_steps=0)
    net = build(SPEC, config)
    init_(net, 0)
    return net, Base(SPEC, config)


@torch.no_grad()
def nats(net: WorldNet, base: Base, data: Windows, factors: torch.Tensor) -> float:
    counted = net.held_out(data)
    losses = net(data, apply_base(base, data).widened(factors), counted)
    return float(losses.objective * counted.numel() / counted.sum())


@pytest.mark.parametrize("family", ["ensemble", "sequence"])
def test_each_slot_gets_the_factor_with_the_least_held_out_nats(family: str) -> None:
    (net, base), data = world(family, members=3), windows(200)
    before = nats(net, base, data, torch.ones(2))
    pairs = widening.fit(net, base, [(data, False)])
    assert pairs == W * int((~member_mask(data.episode, 3)).sum()) > widening.FEW
    best = nats(net, base, data, base.widening)
    assert base.widening[0] > 1 > base.widening[1] and best < before - 0.5
    for slot in range(2):
        for other in (0.9, 1.1):
            factors = base.widening.clone()
            factors[slot] *= other
            assert nats(net, base, data, factors) > best


def test_unseen_windows_judge_a_single_member_and_few_pairs_nothing() -> None:
    (net, base), data = world("ensemble", members=1), windows(50)
    assert widening.fit(net, base, [(data, False)]) == 0, "it is trained on every episode"
    assert base.widening.tolist() == [1.0, 1.0]
    assert widening.fit(net, base, [(data, True)]) == 50 * W
    assert base.widening[0] > 1 > base.widening[1]
    assert widening.fit(net, base, [(windows(widening.FEW // W - 1), True)]) < widening.FEW
    assert base.widening.tolist() == [1.0, 1.0], "too few pairs to choose by"
