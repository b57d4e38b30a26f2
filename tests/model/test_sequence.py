"""Toys with a known answer, each trained in-process for a few seconds: what the sequence family
must be able to learn.
"""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from mesocosm.model import rng
from mesocosm.model.base import Base
from mesocosm.model.config import ModelConfig
from mesocosm.model.families import build
from mesocosm.model.head_fit import BATCH, fit_heads
from mesocosm.model.mup import init_, param_groups
from mesocosm.model.net import apply_base
from mesocosm.model.spec import PartSpec, Spec, TextSpan
from mesocosm.model.tensors import Events, Parts, Windows
from mesocosm.model.world import StepOut, World

from .nets import categories, nothing, numbers

pytestmark = pytest.mark.integration
W = 8
NUMBER = Spec(PartSpec(1, (0.05,)), PartSpec(), reward_values=(0.0,))


def windows(observation: Parts, **values: Tensor) -> Windows:
    """Whole episodes of W transitions without actions: observation [B, W+1, .]."""
    batch = len(observation.numbers)
    zeros, valid = torch.zeros(batch, W), torch.ones(batch, W, dtype=torch.bool)
    parts = observation, nothing(batch, W), Parts.empty(PartSpec(), batch)
    episode = torch.arange(batch) * 7919
    return replace(Windows(*parts, zeros, zeros, zeros, valid, valid[:, 0], episode), **values)


def take(data: Windows, rows: Tensor | slice) -> Windows:
    """Some of the windows."""
    values = {f.name: getattr(data, f.name) for f in fields(Windows)}
    return Windows(**{k: None if v is None else v[rows] for k, v in values.items()})


def single(data: Windows, spec: Spec, rows: Tensor) -> Windows:
    """Some of the windows' transitions, each in a window of its own and as an event."""
    pairs = (
        torch.stack((x[:, :-1], x[:, 1:]), 2).flatten(0, 1)[rows]
        for x in (data.observation.numbers, data.observation.categories)
    )
    observation = Parts(*pairs)
    before, after = observation[:, 0], observation[:, 1]
    action, task = data.action.flatten()[rows], Parts.empty(spec.task, len(rows))
    episode = data.episode.repeat_interleave(W)[rows]
    reward, terminated = (x.flatten()[rows].unsqueeze(1) for x in (data.reward, data.terminated))
    valid = torch.ones(len(rows), 1, dtype=torch.bool)
    return Windows(
        observation=observation,
        action=action.repeat(1),
        task=task,
        reward=reward,
        terminated=terminated,
        duration=torch.zeros(len(rows), 1),
        mask=valid,
        start=~valid[:, 0],
        episode=episode,
        events=Events(before, action, after, task, terminated[:, 0], valid[:, 0].float(), episode),
    )


def train(spec: Spec, data: Windows, steps: int, *, lr: float = 5e-3, **config: Any) -> World:
    defaults = {"size": "10k", "members": 2, "context": W, "base_steps": 50, "head_steps": 50}
    cfg = ModelConfig(**(defaults | config))
    net = build(spec, cfg)
    init_(net, 0)
    before, after = data.observation[:, :-1].flatten(), data.observation[:, 1:].flatten()
    task, episode = Parts.empty(spec.task, data.mask.numel()), data.episode.repeat_interleave(W)
    base = Base.fit(spec, cfg, (before, data.action.flatten(), task, after, episode), seed=0)
    rows = torch.arange(data.mask.numel())

    def some_transitions(step: int) -> Windows:
        generator = torch.Generator().manual_seed(step)
        return single(data, spec, rows[torch.randint(len(rows), (BATCH,), generator=generator)])

    fit_heads(base, some_transitions, single(data, spec, rows), cfg.head_steps, seed=0)
    first = data.observation[data.start, 0]
    base.start.fit(Parts.empty(spec.task, len(first.numbers)), first)
    optimizer = torch.optim.AdamW(param_groups(net, lr, 0.01), betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, 2.0 * (1 - step / max(steps, 1)))
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        some = take(data, torch.randint(len(data.episode), (32,), generator=generator))
        loss = net(some, apply_base(base, some)).objective
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 100.0)
        optimizer.step()
        schedule.step()
    return World(net, base)


def rollout(
    world: World, batch: int, steps: int, start: Parts | None = None
) -> tuple[Parts, list[StepOut]]:
    """[B, steps + 1, ...] imagined observations, and each step's output."""
    env = torch.arange(batch)
    task, observation = world.sample_start(rng.keys(5, env, 0, 0))
    observation = observation if start is None else start
    carry = world.begin(task, observation, rng.member_of(5, env, 0, world.config.members))
    outs: list[StepOut] = []
    for step in range(steps):
        carry, out = world.step(carry, nothing(batch), rng.keys(5, env, 0, step + 1))
        outs.append(out)
    seen = [observation, *(out.observation for out in outs)]
    values = torch.stack([o.numbers for o in seen], 1)
    return Parts(values, torch.stack([o.categories for o in seen], 1)), outs


def test_dimensions_that_flip_together_are_drawn_together() -> None:
    """Both numbers jump to the same fair sign at every step, and a category shows it: the margins
    are even, the joint is not.
    """
    sign = torch.from_numpy(np.random.default_rng(0).choice([-1.0, 1.0], size=(256, W + 1)))
    observation = Parts(torch.stack((sign, sign), -1).float(), (sign > 0).long().unsqueeze(-1))
    spec = Spec(PartSpec(2, (0.05, 0.05), (2,)), PartSpec(), reward_values=(0.0,))
    seen, _ = rollout(train(spec, windows(observation), 200), 256, 4)
    x, category = seen.numbers[:, 1:], seen.categories[:, 1:, 0]
    positive = x > 0
    together = (positive[..., 0] == positive[..., 1]) & (positive[..., 0].long() == category)
    right = ((x.abs() - 1).abs() < 0.1).all(-1) & together
    assert right.float().mean() > 0.97, right.float().mean()
    assert 0.4 < float(positive[..., 0].float().mean()) < 0.6


def test_kinds_of_start_come_in_their_frequencies() -> None:
    """Three kinds of start, told apart by a category and by numbers that go with it."""
    share = np.array([0.6, 0.3, 0.1])
    kinds = np.repeat(np.arange(3), (share * 500).astype(int))
    kind = torch.from_numpy(np.random.default_rng(1).permutation(kinds))
    centres = torch.tensor([[-2.0, 1.0], [0.5, 0.5], [2.0, -1.0]])
    noise = 0.05 * torch.randn(500, W + 1, 2, generator=torch.Generator().manual_seed(2))
    place = centres[kind].unsqueeze(1).repeat(1, W + 1, 1) + noise
    observation = Parts(place, kind.view(-1, 1, 1).repeat(1, W + 1, 1))
    spec = Spec(PartSpec(2, (0.05, 0.05), (3,)), PartSpec(), reward_values=(0.0,))
    world = train(spec, windows(observation), 200)
    _, start = world.sample_start(rng.keys(3, torch.arange(600), 0, 0))
    nearest = torch.cdist(start.numbers, centres)
    assert (nearest.argmin(1) == start.categories[:, 0]).float().mean() > 0.98
    assert nearest.min(1).values.median() < 0.2
    counts = np.bincount(start.categories[:, 0].numpy(), minlength=3)
    assert stats.chisquare(counts, share * 600).pvalue > 1e-3, counts


def hidden_mode(episodes: int, seed: int) -> Windows:
    """A hidden mode, +0.5 or -0.5 an episode: every other step goes there and back, and from 0 only
    history tells where. With noise, because a world of exact values is not trained for the values
    that it imagines.
    """
    random = np.random.default_rng(seed)
    x = np.tile(random.choice([-0.5, 0.5], size=(episodes, 1, 1)), (1, W + 1, 1))
    x[:, ::2] = 0.0
    return windows(numbers(torch.from_numpy(x + random.normal(scale=0.05, size=x.shape))))


@pytest.mark.integration
def test_history_is_used_where_the_state_is_hidden() -> None:
    data, held_out = hidden_mode(1000, 0), hidden_mode(100, 1)

    def nats(world: World) -> float:
        return float(world.losses(held_out).nats["dynamics"]) / 100

    world = train(NUMBER, data, 600, lr=2e-3, base_steps=0, size="30k")
    without = train(NUMBER, data, 100, lr=2e-3, base_steps=0, size="30k", family="ensemble")
    # The mode costs log 2 once an episode with history, and at each of four departures without.
    assert nats(without) - nats(world) > 3 * np.log(2)
    seen, _ = rollout(world, 200, W, start=numbers(torch.zeros(200, 1)))
    modes = seen.numbers[:, 1::2, 0]
    assert 60 < int((modes[:, 0] > 0).sum()) < 140, "both modes are imagined"
    assert (modes.sign() == modes[:, :1].sign()).float().mean() > 0.95, "modes last"


def test_text_is_valid_and_follows_its_grammar() -> None:
    """Texts of 1 to 3 characters out of 4: sampled ones end once, never early, and are those of the
    data.
    """
    words = [[1, 0, 0], [2, 3, 0], [2, 3, 4]]
    generator = np.random.default_rng(0)
    text = torch.tensor(words)[torch.from_numpy(generator.integers(0, 3, size=(256, W + 1)))]
    spec = Spec(PartSpec(0, (), (5, 5, 5), (TextSpan(0, 3, 1),)), PartSpec(), reward_values=(0.0,))
    for steps in (0, 120):
        seen, _ = rollout(train(spec, windows(categories(text)), steps), 200, 4)
        drawn = seen.categories.flatten(0, 1)
        assert (drawn[:, 0] > 0).all(), "an end before min_length"
        assert (drawn[:, 2][drawn[:, 1] == 0] == 0).all(), "characters after the end"
    counts = np.array([drawn.tolist().count(word) for word in words])
    assert counts.sum() > 0.97 * len(drawn), counts
    assert counts.min() > 0.2 * counts.sum()


@pytest.mark.slow
def test_rare_terminations_and_rewards_are_learned_and_drawn() -> None:
    """A counter that ends at 3 and pays 1 for an even step, 0 for an odd one, but 10 at the end."""
    first = torch.randint(0, 3, (128, 1), generator=torch.Generator().manual_seed(0))
    x = torch.arange(W + 1).remainder(5).float().repeat(128, 1) + first
    after = x[:, 1:]
    even = (after.remainder(2) < 0.5).float()
    ended = {"reward": torch.where(after > 4.5, 2.0, even), "terminated": (after > 4.5).float()}
    spec = replace(NUMBER, reward_values=(0.0, 1.0, 10.0), terminal_rate=0.1)
    # At the other tests' rate it comes out otherwise on another processor.
    data = windows(numbers(x.unsqueeze(-1)), **ended)
    world = train(spec, data, 600, lr=3e-3, base_steps=0, head_steps=2000)
    seen, outs = rollout(world, 128, W, start=numbers(x[:, :1]))
    after = seen.numbers[:, 1:, 0].round()
    expected = torch.where(after > 4.5, 10.0, (after.remainder(2) < 0.5).float())
    rewards = torch.stack([out.reward for out in outs], 1)
    terminated = torch.stack([out.terminated for out in outs], 1)
    assert (rewards == expected).float().mean() > 0.95
    assert (terminated == (after > 4.5)).float().mean() > 0.98


def test_members_disagree_far_from_the_data() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 1, 1, generator=generator).repeat(1, W + 1, 1)
    x[:, 1:] = torch.sin(2 * x[:, :1]) + 0.05 * torch.randn(256, W, 1, generator=generator)
    world = train(NUMBER, windows(numbers(x)), 120, members=4, base_steps=400)
    starts = [torch.randn(256, 1, generator=generator) + offset for offset in (0.0, 4.0)]
    near, far = (
        float(rollout(world, 256, 1, start=numbers(start))[1][0].disagreement.mean())
        for start in starts
    )
    assert far > 2 * max(near, 0.02), (near, far)


def test_a_loss_is_the_sum_of_its_slices() -> None:
    """Equal slices of a batch average to the batch's objective, so that the number of ranks
    changes nothing.
    """
    spec = Spec(PartSpec(1, (0.05,), (3,)), PartSpec(), reward_values=(0.0, 1.0), terminal_rate=0.1)
    values = hidden_mode(16, 0).observation.numbers
    lengths = torch.randint(1, W + 1, (16, 1), generator=torch.Generator().manual_seed(0))
    mask, start = torch.arange(W) < lengths, torch.arange(16) % 2 == 0
    whole = windows(Parts(values, values.round().long().abs()), mask=mask, start=start)
    world = train(spec, whole, 1)
    halves = [world.losses(take(whole, part)) for part in (slice(0, 8), slice(8, 16))]
    total, mean = world.losses(whole), (halves[0].objective + halves[1].objective) / 2
    assert torch.isclose(total.objective, mean, rtol=1e-5)
    assert total.transitions == halves[0].transitions + halves[1].transitions == mask.sum()
    for name, value in total.nats.items():
        parts = halves[0].nats[name] + halves[1].nats[name]
        assert value >= 0 and torch.isclose(value, parts, rtol=1e-4), name


@pytest.mark.parametrize("family", ["sequence", "ensemble"])
def test_bfloat16_weights_leave_the_densities_in_float32(family: str) -> None:
    spec = Spec(PartSpec(1, (1e-3,), (3,)), PartSpec(), durations=True, terminal_rate=0.1)
    values = hidden_mode(32, 0).observation.numbers
    data = windows(Parts(values, values.sign().long() + 1))
    world = train(spec, data, 20, family=family)
    wide = world.losses(data).nats
    world.net.bfloat16()
    narrow = world.losses(data).nats
    for name, value in wide.items():
        actual = narrow[name]
        assert actual.dtype == torch.float32 and torch.isfinite(actual)
        bound = 0.1 * float(data.mask.sum())
        assert torch.isclose(actual, value, rtol=0.1, atol=bound), (name, actual, value)
