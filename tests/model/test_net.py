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
from mesocosm.model.spec import Parts, PartSpec, Spec, Windows

from .nets import random_nets

torch.set_num_threads(1)
K = 3
SPEC = Spec(PartSpec(4, (1e-3,) * 4), PartSpec(1, (1e-3,)), terminal_rate=0.1)
EPISODE = next(i for i in range(1000) if rng.member_mask(torch.tensor([i]), K).sum() == 1)
"""A hash that leaves out all members but one."""


def make(family: str) -> tuple[WorldNet, Base]:
    config = ModelConfig(family=family, size="10k", members=K, context=5, base_hidden=8)
    return random_nets(SPEC, config)


def windows(batch: int = 6) -> Windows:
    blank = blank_windows(SPEC, batch, 5, events=4)
    generator = torch.Generator().manual_seed(2)

    def noise(parts: Parts) -> Parts:
        return Parts(torch.randn(parts.numbers.shape, generator=generator), parts.categories)

    assert blank.events is not None
    events = replace(
        blank.events,
        observation=noise(blank.events.observation),
        weight=torch.ones(4),
        episode=torch.full((4,), EPISODE),
    )
    return replace(
        blank,
        observation=noise(blank.observation),
        action=noise(blank.action),
        episode=torch.full((batch,), EPISODE),
        events=events,
    )


def members_that_learn(net: WorldNet, base: Base) -> dict[str, list[bool]]:
    """By parameter of the members: which of them have a gradient."""
    net(windows(), apply_base(base, windows())).objective.backward()
    return {
        name: parameter.grad.flatten(1).any(1).tolist()
        for name, parameter in net.named_parameters()
        if parameter.dim() >= 3 and len(parameter) == K and parameter.grad is not None
    }


@pytest.mark.parametrize("family", ["sequence", "ensemble"])
def test_a_member_without_an_episode_of_its_own_trains_on_all(family: str) -> None:
    net, base = make(family)
    alone = members_that_learn(net, base)
    assert {"reward", "termination"} < {name.split(".")[0] for name in alone} and all(
        sum(learn) == 1 for learn in alone.values()
    )
    net.zero_grad()
    net.trains_on(torch.tensor([EPISODE, EPISODE]))
    assert all(all(learn) for learn in members_that_learn(net, base).values())
    net.trains_on(torch.arange(100))
    assert torch.equal(net.trained_by(torch.arange(100)), rng.member_mask(torch.arange(100), K)), (
        "masks stay where every member has some"
    )


@pytest.mark.parametrize("family", ["sequence", "ensemble"])
def test_noise_on_the_history_is_a_step_from_the_noisy_state_to_the_true_next_one(
    family: str,
) -> None:
    """In windows of one transition, a noisy o_t gives every loss that this o_t would give had it
    been the true one.
    """
    net, base = make(family)
    clean = replace(windows(), start=torch.zeros(6, dtype=torch.bool))

    def first(part: Parts, end: int) -> Parts:
        return part[:, :end]

    one = replace(
        clean,
        observation=first(clean.observation, 2),
        action=first(clean.action, 1),
        **{
            name: getattr(clean, name)[:, :1]
            for name in ("reward", "terminated", "duration", "mask")
        },
    )
    noisy = Parts(one.observation.numbers[:, :1] + 0.3, one.observation.categories[:, :1])
    moved = Parts(
        torch.cat((noisy.numbers, one.observation.numbers[:, 1:]), 1), one.observation.categories
    )

    def losses(of: Windows) -> dict[str, Tensor]:
        with torch.no_grad():
            result = net(of, apply_base(base, of))
        return {**result.nats, "objective": result.objective}

    corrupted, other, plain = (
        losses(replace(one, seen=noisy)),
        losses(replace(one, observation=moved)),
        losses(one),
    )
    for name in corrupted:
        assert torch.equal(corrupted[name], other[name]), name
    for name in ("dynamics", "reward", "termination"):
        assert not torch.isclose(corrupted[name], plain[name]), name
