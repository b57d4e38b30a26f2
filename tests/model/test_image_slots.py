"""Codes of an image as category slots, one after another or in groups."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mesocosm.model import counts, rng
from mesocosm.model.base import Base
from mesocosm.model.config import ModelConfig
from mesocosm.model.decoder import Decoder, Scale, slot_groups, slot_order
from mesocosm.model.families import build
from mesocosm.model.spec import ImageSpan, PartSpec, Spec
from mesocosm.model.tensors import Parts
from mesocosm.model.world import World

from .nets import random_nets

IMAGE = ImageSpan(1, 2, 2, 1)
PART = PartSpec(1, (0.05,), (3, 2, 2, 2, 2), images=(IMAGE,))
SPEC = Spec(PART, PartSpec(0, (), (2,)), reward_values=(0.0,))
CONFIG = ModelConfig(size="10k", members=2, context=4)


def decoder(part: PartSpec, group: int, order: Any = None) -> Decoder:
    config = replace(CONFIG, group=group)
    made = Decoder(part, order or slot_order(part), config, members=2, inputs=5)
    generator = torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    return made.eval().requires_grad_(False)


def scale(rows: int, numbers: int = 1) -> Scale:
    ones = torch.ones(numbers)
    return Scale(torch.zeros(2, rows, numbers), ones, ones)


def test_the_groups_of_slots() -> None:
    """A number, a category, and an image of 3 x 3 positions of 2 digits; then a duration."""
    image = ImageSpan(1, 3, 3, 2)
    part = PartSpec(1, (1.0,), (4, *(2,) * 18), images=(image,))
    order = (*slot_order(part), ("number", 1))
    sizes = [group.stop - group.start for group in slot_groups(part, order, 4)]
    assert sizes == [1, 1, 8, 8, 2, 1]
    assert [g.stop - g.start for g in slot_groups(part, order, 1)] == [1, 1, *(2,) * 9, 1]
    plain = replace(part, images=())
    assert len(slot_groups(plain, order, 4)) == len(order)


def test_spans_survive_json() -> None:
    assert Spec.from_json(SPEC.to_json()) == SPEC
    without = replace(SPEC, observation=replace(PART, images=()))
    assert "images" not in without.to_json()["observation"], "worlds are older than the field"


def test_one_code_after_another_is_the_decoder_without_images() -> None:
    """To the bit: the likelihood, the draws and the parameters."""
    generator = torch.Generator().manual_seed(0)
    context, numbers = (torch.randn(7, n, generator=generator) for n in (5, 1))
    categories = torch.randint(2, (7, 5), generator=generator)
    keys = rng.keys(1, torch.arange(14), 0, 0).view(2, 7)
    results = []
    for part in (PART, replace(PART, images=())):
        made = decoder(part, 1)
        drawn = made.draw(context.expand(2, -1, -1), scale(7), keys)
        results.append((made.log_prob(context, numbers, categories, scale(7)), *drawn))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("group", [2, 3, 4])
def test_a_slot_does_not_see_its_group(group: int) -> None:
    made = decoder(PART, group)
    assert made.grouped
    generator = torch.Generator().manual_seed(0)
    context, r = torch.randn(6, 5, generator=generator), torch.randn(2, 6, 1, generator=generator)
    numbers, categories = r[0], torch.randint(2, (6, 5), generator=generator)
    _, before = made(context, r, numbers, categories)
    for j in range(5):
        changed = categories.clone()
        changed[:, j] = 1 - changed[:, j]
        _, after = made(context, r, numbers, changed)
        (here,) = (g for g in made.groups if g.start <= j + 1 < g.stop)
        for other in range(5):
            same = torch.equal(before[:, :, other], after[:, :, other])
            assert same == (other + 1 < here.stop), (j, other)


@pytest.mark.parametrize("group", [2, 3, 4])
@pytest.mark.parametrize("last", [False, True])
def test_drawn_groups_have_their_likelihood(group: int, last: bool) -> None:
    """With a number before the image, or after it, as a duration is."""
    part = replace(PART, numbers=0, bins=())
    order = slot_order(part)
    if last:
        part, order = PART, (*order, ("number", 0))
    made, count = decoder(part, group, order), 20_000
    context = torch.randn(1, 5, generator=torch.Generator().manual_seed(1)).expand(count, -1)
    keys = rng.keys(1, torch.arange(2 * count), 0, 0).view(2, count)
    numbers = part.numbers
    drawn, codes = made.draw(context.expand(2, -1, -1), scale(count, numbers), keys)
    every = torch.cartesian_prod(*(torch.arange(n) for n in part.categories))
    x = torch.zeros(len(every), numbers)
    log_prob = made.log_prob(context[: len(every)], x, every, scale(len(every), numbers))
    p = log_prob[..., : len(part.categories)].sum(-1).exp()
    torch.testing.assert_close(p.sum(1), torch.ones(2), atol=1e-4, rtol=0)
    for member in range(2):
        same = (codes[member].unsqueeze(1) == every).all(-1).float().mean(0)
        error = (same - p[member]).abs() / (p[member] * (1 - p[member]) / count).sqrt()
        assert error.max() < 5, error.max()
    assert torch.isfinite(drawn).all() and drawn.shape[-1] == numbers


@pytest.mark.parametrize("group", [1, 2])
def test_counts_of_worlds_of_images_are_exact(group: int) -> None:
    config = replace(CONFIG, group=group)
    net, base = build(SPEC, config), Base(SPEC, config)
    assert counts.params(SPEC, config) == counts.count(net, base)
    measured = counts.measured_flops(net, base, counts.blank_windows(SPEC, 3, 4))
    assert counts.flops_per_batch(SPEC, config, 3, 4) == measured
    assert counts.params(SPEC, config).total == counts.params(SPEC, CONFIG).total


@pytest.mark.parametrize("group", [1, 4])
def test_a_world_of_groups_steps_and_is_restored(group: int) -> None:
    world = World(*random_nets(SPEC, replace(CONFIG, group=group)))
    env = torch.arange(6)
    carry = world.begin(*world.sample_start(rng.keys(5, env, 0, 0)), env % 2)
    action = Parts(torch.zeros(6, 0), (env % 2).unsqueeze(-1))
    for step in range(6):
        carry, out = world.step(carry, action, rng.keys(5, env, 0, step + 1))
        assert (out.observation.categories < torch.tensor(PART.categories)).all()
    assert torch.isfinite(world.losses(counts.blank_windows(SPEC, 3, 4)).objective)
