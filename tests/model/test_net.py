"""The forward pass, for every family: which members train on an episode, and the effect of noise on
the history.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mesocosm.model import rng
from mesocosm.model.base import Base
from mesocosm.model.config import ModelConfig
from mesocosm.model.counts import blank_windows
from mesocosm.model.net import WorldNet, apply_base
from mesocosm.model.spec import PartSpec, Spec
from mesocosm.model.tensors import Parts, Windows

from .nets import noise_like, random_nets

K = 3
SPEC = Spec(PartSpec(4, (1e-3,) * 4), PartSpec(1, (1e-3,)), terminal_rate=0.1)
EPISODE = next(i for i in range(1000) if rng.member_mask(torch.tensor([i]), K).sum() == 1)
"""A hash that leaves out all members but one."""
families = pytest.mark.parametrize("family", ["sequence", "ensemble"])


def make(family: str) -> tuple[WorldNet, Base]:
    config = ModelConfig(family=family, size="10k", members=K, context=5, base_hidden=8)
    return random_nets(SPEC, config)


def windows(steps: int = 5) -> Windows:
    """Six windows of noise, all of EPISODE."""
    blank, generator = blank_windows(SPEC, 6, steps), torch.Generator().manual_seed(2)
    parts = {
        name: noise_like(getattr(blank, name), generator) for name in ("observation", "action")
    }
    return replace(blank, episode=torch.full((6,), EPISODE), **parts)


def members_that_learn(net: WorldNet, base: Base) -> dict[str, list[bool]]:
    """By parameter of the members: which of them have a gradient."""
    net.zero_grad()
    net(windows(), apply_base(base, windows())).objective.backward()
    return {
        name: parameter.grad.flatten(1).any(1).tolist()
        for name, parameter in net.named_parameters()
        if parameter.dim() >= 3 and len(parameter) == K and parameter.grad is not None
    }


@families
def test_a_member_without_an_episode_trains_on_all(family: str) -> None:
    net, base = make(family)
    alone = members_that_learn(net, base)
    heads = {"reward", "termination"} & {name.split(".")[0] for name in alone}
    assert heads == ({"reward", "termination"} if family == "sequence" else set())
    assert all(sum(learn) == 1 for learn in alone.values())
    net.trains_on(torch.tensor([EPISODE, EPISODE]))
    assert all(all(learn) for learn in members_that_learn(net, base).values())
    many = torch.arange(100)
    net.trains_on(many)
    # Masks stay where every member has some.
    assert torch.equal(net.trained_by(many), rng.member_mask(many, K))


@families
def test_noise_on_the_history_is_a_step_from_the_noisy_state_to_the_true_next_one(
    family: str,
) -> None:
    """In windows of one transition, a noisy o_t gives every loss that this o_t would give had it
    been the true one.
    """
    net, base = make(family)
    clean = replace(windows(1), start=torch.zeros(6, dtype=torch.bool))
    true = clean.observation
    noisy = Parts(true.numbers[:, :1] + 0.3, true.categories[:, :1])
    moved = Parts(torch.cat((noisy.numbers, true.numbers[:, 1:]), 1), true.categories)

    def losses(of: Windows) -> dict[str, Tensor]:
        with torch.no_grad():
            result = net(of, apply_base(base, of))
        return {**result.nats, "objective": result.objective}

    changed = replace(clean, seen=noisy), replace(clean, observation=moved), clean
    corrupted, other, plain = map(losses, changed)
    for name in corrupted:
        assert torch.equal(corrupted[name], other[name]), name
    for name in ("dynamics", "reward", "termination"):
        assert not torch.isclose(corrupted[name], plain[name]), name
