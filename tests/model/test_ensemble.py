"""The ensemble family learns the noise of the data, draws from its density, and its members
disagree far from the data.
"""

from __future__ import annotations

import math
from pathlib import Path

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
from mesocosm.model.spec import Outcome, Parts, PartSpec, Spec, TextSpan, Transition, Windows
from mesocosm.model.world import World

from .nets import numbers

torch.set_num_threads(1)
TEXT = TextSpan(1, 3, 1)
MIXED = Spec(
    PartSpec(2, (1e-3, 1e-2), (3, 5, 5, 5), (TEXT,)),
    PartSpec(1, (1e-3,), (2,)),
    PartSpec(1, (1e-3,)),
    reward_values=(0.0, 1.0),
    durations=True,
)


def fit(
    spec: Spec, before: Parts, action: Parts, after: Parts, steps: int, **config: object
) -> World:
    """Trained on N episodes of one transition each, all [N, ...]."""
    rows = len(before.numbers)
    cfg = ModelConfig(
        **({"family": "ensemble", "size": "10k", "base_steps": 100, "base_hidden": 32} | config)
    )  # type: ignore[arg-type]
    net = build(spec, cfg)
    init_(net, 0)
    episode, task = rng.mix(torch.arange(rows)), Parts.empty(spec.task, rows)
    base = Base.fit(spec, cfg, (before, action, task, after, episode), seed=0)
    optimizer = torch.optim.AdamW(param_groups(net, 3e-3, 0.01), fused=True)
    first = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        for group, lr in zip(optimizer.param_groups, first, strict=True):
            group["lr"] = lr * (1 - step / steps)
        i = torch.randint(rows, (256,), generator=generator)
        pair = Parts(
            torch.stack((before.numbers[i], after.numbers[i]), 1),
            torch.stack((before.categories[i], after.categories[i]), 1),
        )
        valid, zeros = torch.ones(len(i), 1, dtype=torch.bool), torch.zeros(len(i), 1)
        windows = Windows(
            pair, action[i][:, None], task[i], zeros, zeros, zeros, valid, valid[:, 0], episode[i]
        )
        optimizer.zero_grad()
        net(windows, apply_base(base, windows)).objective.backward()
        optimizer.step()
    return World(net, base)


def imagine(world: World, observation: Parts, action: Parts, seed: int = 0) -> tuple[Parts, Tensor]:
    """One step: (o', disagreement)."""
    env = torch.arange(len(observation.numbers))
    carry = world.begin(
        Parts.empty(world.spec.task, len(env)),
        observation,
        rng.member_of(seed, env, 0, world.config.members),
    )
    _, out = world.step(carry, action, rng.keys(seed, env, 0, 0))
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


def test_noise_and_categories_are_learned(noisy: World) -> None:
    still = numbers(torch.full((2000, 1), 0.3))
    for at, spread in ((-0.5, 0.02), (0.5, 0.2)):
        drawn, _ = imagine(
            noisy, Parts(torch.full((2000, 1), at), torch.zeros(2000, 1, dtype=torch.int64)), still
        )
        error = drawn.numbers - (at + 0.3)
        assert abs(float(error.median())) < 0.3 * spread
        assert 0.7 < float(torch.quantile(error.abs(), 0.683)) / spread < 1.4
        assert 0.85 < float(drawn.categories.float().mean()) < 0.95


def test_members_disagree_far_from_the_data(noisy: World) -> None:
    def mean_at(at: float) -> float:
        o = Parts(torch.full((2000, 1), at), torch.zeros(2000, 1, dtype=torch.int64))
        _, disagreement = imagine(noisy, o, numbers(torch.zeros(2000, 1)))
        return float(disagreement.mean())

    assert 0 < mean_at(0.3) < 0.5, "in units of the residual's scale"
    assert mean_at(6.0) > 3 * mean_at(0.3)


def random_parts(spec: PartSpec, rows: int, seed: int) -> Parts:
    g = torch.Generator().manual_seed(seed)
    categories = [torch.randint(c, (rows, 1), generator=g) for c in spec.categories]
    return Parts(
        torch.randn(rows, spec.numbers, generator=g),
        torch.cat([torch.zeros(rows, 0, dtype=torch.int64), *categories], 1),
    )


def mixed_net(seed: int = 0) -> Ensemble:
    net = build(MIXED, ModelConfig(family="ensemble", size="10k", members=3))
    init_(net, seed)
    assert isinstance(net, Ensemble)
    with torch.no_grad():
        net.last.weight.mul_(20)  # far from uniform
    return net


def transition(rows: int, seed: int = 1) -> tuple[Transition, BaseOut]:
    token = Transition(
        *(
            random_parts(part, rows, seed + i)
            for i, part in enumerate((MIXED.observation, MIXED.action, MIXED.task))
        )
    )
    return token, BaseOut(
        torch.randn(3, rows, 2, generator=torch.Generator().manual_seed(seed)),
        torch.tensor([0.1, 2.0]),
    )


@torch.no_grad()
def test_draws_follow_the_density() -> None:
    """Chi-square of categories (a text among them) and of a number's bins against `log_prob`, for
    one member and one (o, a).
    """
    net, rows = mixed_net(), 20000
    (one, base_one), member = transition(1), torch.full((rows,), 1)

    def repeat(parts: Parts) -> Parts:
        return Parts(parts.numbers.expand(rows, -1), parts.categories.expand(rows, -1))

    token = Transition(repeat(one.observation), repeat(one.action), repeat(one.task))
    draw = net.draw(
        None,
        token,
        BaseOut(base_one.change.expand(-1, rows, -1), base_one.scale),
        member,
        rng.keys(3, torch.arange(rows), 0, 0),
    )

    texts = draw.observation.categories[:, 1:4]
    first_end = torch.where((texts == 0).any(1), (texts == 0).int().argmax(1), 3)
    assert torch.all(first_end >= 1), "shorter than the text's minimum"
    assert torch.all((texts == 0) == (torch.arange(3) >= first_end.unsqueeze(1))), (
        "characters after the end"
    )

    grid = torch.cartesian_prod(*(torch.arange(c) for c in MIXED.observation.categories))
    outcome = Outcome(
        Parts(one.observation.numbers.expand(len(grid), -1), grid), torch.zeros(len(grid))
    )
    same = Transition(
        *(
            Parts(p.numbers.expand(len(grid), -1), p.categories.expand(len(grid), -1))
            for p in (one.observation, one.action, one.task)
        )
    )
    log_prob, _ = net.log_prob(
        None, same, outcome, BaseOut(base_one.change.expand(-1, len(grid), -1), base_one.scale)
    )
    p = (
        (log_prob[1] - torch.logsumexp(log_prob[1], 0)).exp().double().numpy()
    )  # the numbers' factor is common
    drawn = np.array([int((draw.observation.categories == row).all(1).sum()) for row in grid])
    assert drawn[p == 0].sum() == 0
    likely = p * rows > 5
    rest = [max(1 - p[likely].sum(), 1e-12) * rows]
    expected, counted = (
        np.append(p[likely] * rows, rest),
        np.append(drawn[likely], rows - drawn[likely].sum()),
    )
    assert (
        stats.chisquare(
            counted[expected > 5],
            expected[expected > 5] * counted[expected > 5].sum() / expected[expected > 5].sum(),
        ).pvalue
        > 1e-3
    )

    change = (draw.observation.numbers - token.observation.numbers)[:, 0]
    centre = float(change.median())
    at = one.observation.numbers + torch.tensor([[centre, 0.0]])
    density = net.log_prob(
        None, one, Outcome(Parts(at, draw.observation.categories[:1]), draw.duration[:1]), base_one
    )[0][1]
    reference = net.log_prob(
        None,
        one,
        Outcome(
            Parts(at + torch.tensor([[0.05, 0.0]]), draw.observation.categories[:1]),
            draw.duration[:1],
        ),
        base_one,
    )[0][1]
    near = [int(((change - centre - shift).abs() < 0.01).sum()) for shift in (0.0, 0.05)]
    assert float(density - reference) == pytest.approx(math.log(near[0] / near[1]), abs=0.2)


@torch.no_grad()
def test_a_draw_is_a_function_of_its_own_row_and_key() -> None:
    net = mixed_net()
    token, base = transition(64)
    member, keys = torch.arange(64) % 3, rng.keys(0, torch.arange(64), 0, 0)
    draw = net.draw(None, token, base, member, keys)
    again = net.draw(None, token, base, member, keys)
    assert torch.equal(draw.observation.numbers, again.observation.numbers) and torch.equal(
        draw.disagreement, again.disagreement
    )
    part = slice(10, 30)
    some = Transition(token.observation[part], token.action[part], token.task[part])
    fewer = net.draw(
        None, some, BaseOut(base.change[:, part], base.scale), member[part], keys[part]
    )
    assert torch.equal(fewer.observation.categories, draw.observation.categories[part])
    assert torch.allclose(fewer.observation.numbers, draw.observation.numbers[part], atol=1e-5)
    joint, duration = net.log_prob(None, token, Outcome(draw.observation, draw.duration), base)
    assert duration is not None and torch.all(joint <= 0) and torch.all(duration <= 0)
    logged = net.disagreement(None, token, Outcome(draw.observation, draw.duration), base)
    assert torch.equal(draw.disagreement, logged) and (logged > 0).all()
    alone = build(MIXED, ModelConfig(family="ensemble", size="10k", members=1))
    assert not alone.draw(
        None, token, BaseOut(base.change[:1], base.scale), torch.zeros(64, dtype=torch.int64), keys
    ).disagreement.any()


def test_it_is_saved_and_stays_finite_far_away(noisy: World, tmp_path: Path) -> None:
    noisy.save(tmp_path)
    loaded = World.load(tmp_path)
    o = Parts(torch.tensor([[0.1], [1e4], [-1e6]]), torch.zeros(3, 1, dtype=torch.int64))
    one, other = (
        imagine(noisy, o, numbers(torch.zeros(3, 1))),
        imagine(loaded, o, numbers(torch.zeros(3, 1))),
    )
    assert torch.equal(one[0].numbers, other[0].numbers) and torch.equal(one[1], other[1])
    assert torch.isfinite(one[0].numbers).all() and torch.isfinite(one[1]).all()
    assert loaded.config == noisy.config and loaded.net.memory == 0
