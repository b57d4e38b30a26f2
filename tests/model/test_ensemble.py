"""The ensemble family learns the noise of the data, draws from its density, and its members
disagree far from the data.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from mesocosm.model import rng
from mesocosm.model.base import Base
from mesocosm.model.config import ModelConfig
from mesocosm.model.ensemble import Ensemble
from mesocosm.model.families import build
from mesocosm.model.mup import init_, param_groups
from mesocosm.model.net import BaseOut, apply_base
from mesocosm.model.spec import PartSpec, Spec, TextSpan
from mesocosm.model.tensors import Outcome, Parts, Transition, Windows
from mesocosm.model.world import World

from .nets import draw, numbers, repeated

MIXED = Spec(
    PartSpec(2, (1e-3, 1e-2), (3, 5, 5, 5), (TextSpan(1, 3, 1),)),
    PartSpec(1, (1e-3,), (2,)),
    PartSpec(1, (1e-3,)),
    reward_values=(0.0, 1.0),
    durations=True,
)
CONFIG: Any = {"family": "ensemble", "size": "10k"}


def fit(spec: Spec, before: Parts, action: Parts, after: Parts, steps: int) -> World:
    """Trained on N episodes of one transition each, all [N, ...]."""
    rows = len(before.numbers)
    config = ModelConfig(**CONFIG, base_steps=100, base_hidden=32)
    net = build(spec, config)
    init_(net, 0)
    episode, task = rng.mix(torch.arange(rows)), Parts.empty(spec.task, rows)
    base = Base.fit(spec, config, (before, action, task, after, episode), seed=0)
    optimizer = torch.optim.AdamW(param_groups(net, 3e-3, 0.01), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(0)
    pairs = Parts(
        torch.stack((before.numbers, after.numbers), 1),
        torch.stack((before.categories, after.categories), 1),
    )
    valid, zeros = torch.ones(256, 1, dtype=torch.bool), torch.zeros(256, 1)
    for _ in range(steps):
        i = torch.randint(rows, (256,), generator=generator)
        inputs = pairs[i], action[i][:, None], task[i]
        windows = Windows(*inputs, zeros, zeros, zeros, valid, valid[:, 0], episode[i])
        optimizer.zero_grad()
        net(windows, apply_base(base, windows)).objective.backward()
        optimizer.step()
        schedule.step()
    return World(net, base)


def imagine(world: World, observation: Tensor, action: float) -> tuple[Parts, Tensor]:
    """One step of each observation [B, 1]: (o', disagreement)."""
    env = torch.arange(len(observation))
    before = Parts(observation, torch.zeros(len(env), 1, dtype=torch.int64))
    task = Parts.empty(world.spec.task, len(env))
    carry = world.begin(task, before, rng.member_of(0, env, 0, world.config.members))
    _, out = world.step(carry, numbers(torch.full((len(env), 1), action)), rng.keys(0, env, 0, 0))
    return out.observation, out.disagreement


@pytest.fixture(scope="module")
def noisy() -> World:
    """o' = o + a + noise, of spread 0.02 where o < 0 and 0.2 elsewhere; o in [-1, 1]; a category
    that follows sign(a) 9 times in 10.
    """
    g = torch.Generator().manual_seed(0)
    o, a = torch.rand(2000, 1, generator=g) * 2 - 1, torch.randn(2000, 1, generator=g) * 0.3
    after = o + a + torch.where(o < 0, 0.02, 0.2) * torch.randn(2000, 1, generator=g)
    category = ((a > 0) ^ (torch.rand(2000, 1, generator=g) < 0.1)).long()
    spec = Spec(PartSpec(1, (1e-3,), (2,)), PartSpec(1, (1e-3,)))
    return fit(spec, Parts(o, torch.zeros_like(category)), numbers(a), Parts(after, category), 400)


@pytest.mark.integration
def test_noise_and_categories_are_learned(noisy: World) -> None:
    for at, spread in ((-0.5, 0.02), (0.5, 0.2)):
        drawn, _ = imagine(noisy, torch.full((2000, 1), at), 0.3)
        error = drawn.numbers - (at + 0.3)
        assert abs(float(error.median())) < 0.3 * spread
        assert 0.7 < float(torch.quantile(error.abs(), 0.683)) / spread < 1.4
        assert 0.85 < float(drawn.categories.float().mean()) < 0.95


def test_members_disagree_far_from_the_data(noisy: World) -> None:
    near, far = (
        float(imagine(noisy, torch.full((2000, 1), at), 0.0)[1].mean()) for at in (0.3, 6.0)
    )
    assert 0 < near < 0.5, "in units of the residual's scale"
    assert far > 3 * near


def random_parts(spec: PartSpec, rows: int, seed: int) -> Parts:
    g = torch.Generator().manual_seed(seed)
    categories = [torch.randint(c, (rows, 1), generator=g) for c in spec.categories]
    values = torch.randn(rows, spec.numbers, generator=g)
    return Parts(values, torch.cat([torch.zeros(rows, 0, dtype=torch.int64), *categories], 1))


def mixed_net() -> Ensemble:
    net = build(MIXED, ModelConfig(**CONFIG, members=3))
    init_(net, 0)
    assert isinstance(net, Ensemble)
    with torch.no_grad():
        net.last.weight.mul_(20)  # far from uniform
    return net


def transition(rows: int) -> tuple[Transition, BaseOut]:
    specs = (MIXED.observation, MIXED.action, MIXED.task)
    token = Transition(*(random_parts(part, rows, 1 + i) for i, part in enumerate(specs)))
    change = torch.randn(3, rows, 2, generator=torch.Generator().manual_seed(1))
    return token, BaseOut(change, torch.tensor([0.1, 2.0]), torch.ones(3))


@torch.no_grad()
def test_draws_follow_the_density() -> None:
    """Chi-square of categories (a text among them) and of a number's bins against `log_prob`, for
    one member and one (o, a).
    """
    net, rows = mixed_net(), 20000
    one, base_one = transition(1)

    def likelihood(observation: Parts) -> Tensor:
        """Member 1's log-likelihood of each next observation."""
        n = len(observation.numbers)
        base = BaseOut(base_one.change.expand(-1, n, -1), base_one.scale, base_one.widening)
        outcome = Outcome(observation, torch.zeros(n))
        log_prob, _ = net.log_prob(None, repeated(one, n), outcome, base)
        return log_prob[1]

    base = BaseOut(base_one.change.expand(-1, rows, -1), base_one.scale, base_one.widening)
    member, keys = torch.full((rows,), 1), rng.keys(3, torch.arange(rows), 0, 0)
    drawn_step = draw(net, None, repeated(one, rows), base, member, keys)
    categories = drawn_step.observation.categories

    texts = categories[:, 1:4]
    first_end = torch.where((texts == 0).any(1), (texts == 0).int().argmax(1), 3)
    assert torch.all(first_end >= 1), "shorter than the text's minimum"
    padding = torch.arange(3) >= first_end.unsqueeze(1)
    assert torch.all((texts == 0) == padding), "characters after the end"

    grid = torch.cartesian_prod(*(torch.arange(c) for c in MIXED.observation.categories))
    observed = one.observation.numbers
    log_prob = likelihood(Parts(observed.expand(len(grid), -1), grid))
    # The numbers' factor is common.
    p = (log_prob - torch.logsumexp(log_prob, 0)).exp().double().numpy()
    drawn = np.array([int((categories == row).all(1).sum()) for row in grid])
    assert drawn[p == 0].sum() == 0
    likely = p * rows > 5
    rest = [max(1 - p[likely].sum(), 1e-12) * rows]
    expected = np.append(p[likely] * rows, rest)
    counted = np.append(drawn[likely], rows - drawn[likely].sum())[expected > 5]
    expected = expected[expected > 5]
    assert stats.chisquare(counted, expected * counted.sum() / expected.sum()).pvalue > 1e-3

    change = drawn_step.observation.numbers[:, 0] - observed[:, 0]
    centre = float(change.median())
    at = observed + torch.tensor([[centre, 0.0], [centre + 0.02, 0.0]])
    density = likelihood(Parts(at, categories[:1].expand(2, -1)))
    near = [int(((change - centre - shift).abs() < 0.004).sum()) for shift in (0.0, 0.02)]
    assert float(density[0] - density[1]) == pytest.approx(math.log(near[0] / near[1]), abs=0.2)


@torch.no_grad()
def test_a_draw_is_a_function_of_its_row_and_key() -> None:
    net = mixed_net()
    token, base = transition(64)
    member, keys = torch.arange(64) % 3, rng.keys(0, torch.arange(64), 0, 0)
    one, again = (draw(net, None, token, base, member, keys) for _ in range(2))
    assert torch.equal(one.observation.numbers, again.observation.numbers)
    part = slice(10, 30)
    some = Transition(token.observation[part], token.action[part], token.task[part])
    base_part = BaseOut(base.change[:, part], base.scale, base.widening)
    fewer = draw(net, None, some, base_part, member[part], keys[part])
    assert torch.equal(fewer.observation.categories, one.observation.categories[part])
    assert torch.allclose(fewer.observation.numbers, one.observation.numbers[part], atol=1e-5)
    outcome = Outcome(one.observation, one.duration)
    joint, duration = net.log_prob(None, token, outcome, base)
    assert duration is not None and torch.all(joint <= 0) and torch.all(duration <= 0)
    assert (net.disagreement(None, token, outcome, base) > 0).all()
    alone = build(MIXED, ModelConfig(**CONFIG, members=1))
    base_alone = BaseOut(base.change[:1], base.scale, base.widening)
    assert not alone.disagreement(None, token, outcome, base_alone).any()


def test_it_stays_finite_far_away(noisy: World) -> None:
    drawn, disagreement = imagine(noisy, torch.tensor([[0.1], [1e4], [-1e6]]), 0.0)
    assert torch.isfinite(drawn.numbers).all() and torch.isfinite(disagreement).all()
