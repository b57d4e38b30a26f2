"""Rare large rewards have a density of their own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from mesocosm.data.loading.normalize import rare_rewards
from mesocosm.evaluate.metrics.fidelity import _rare
from mesocosm.model import rng
from mesocosm.model.heads import RewardHead, reward_outputs
from mesocosm.model.spec import PartSpec, Spec

LOST = (0.01, -10_000.0, 20.0)
SPEC = Spec(PartSpec(1, (1e-3,)), PartSpec(), reward_mean=0.1, reward_scale=0.1, reward_rare=LOST)
"""Rewards near .1, and 1% near -1,000."""


def head(spec: Spec = SPEC) -> tuple[RewardHead, torch.Tensor]:
    """A head, and the outputs of an untrained network."""
    return RewardHead(spec, 1, 0), torch.zeros(1, 2000, reward_outputs(spec))


def test_rewards_far_from_the_others_are_rare_and_large() -> None:
    rewards = np.random.default_rng(0).normal(0.1, 0.05, 1000)
    assert not rare_rewards(rewards)[0].any()
    rewards[[3, 500]] = -1000.0, -999.0
    rare, middle, distance = rare_rewards(rewards)
    assert np.flatnonzero(rare).tolist() == [3, 500]
    assert abs(middle - 0.1) < 0.01 and 2 < distance < 5, "50 of their spreads"
    rewards[:60] = -1000.0  # 6%
    assert not rare_rewards(rewards)[0].any()
    assert not rare_rewards(np.where(np.arange(100) < 2, 9.0, 0.0))[0].any(), "nothing varies"


def test_the_ends_of_heavy_tails_are_rare_and_large() -> None:
    rewards = np.random.default_rng(0).standard_cauchy(1000)
    rare, _, distance = rare_rewards(rewards)
    assert 0 < rare.mean() < 0.03 and np.abs(rewards[rare]).min() > distance - 1 > 50
    assert not rare_rewards(np.random.default_rng(0).laplace(size=1000))[0].any()


def test_the_size_of_rewards_includes_the_rare_ones() -> None:
    assert abs(SPEC.reward_size - 100.0) < 0.1, "1% of -1,000"
    without = replace(SPEC, reward_rare=None)
    assert abs(without.reward_size - 0.02**0.5) < 1e-9, "as before"


def test_a_new_head_draws_them_at_their_rate() -> None:
    reward, outputs = head()
    u = rng.uniform(torch.arange(2000).view(1, -1, 1), torch.arange(2))
    drawn = reward.draw(outputs, None, u)[0]
    rare = drawn < -500
    assert 0.002 < float(rare.float().mean()) < 0.03
    assert (drawn[rare] + 1000).abs().max() < 30 and drawn[~rare].abs().max() < 3
    expected = float(reward.expected(outputs, None)[0, 0])
    assert abs(expected - (0.99 * 0.1 - 0.01 * 999.9)) < 0.1


def test_both_kinds_have_finite_nats_and_gradients() -> None:
    reward, outputs = head()
    outputs = outputs[:, :3].requires_grad_()
    normal = torch.tensor([0.0, LOST[1], LOST[1] + 30.0])
    log_prob = reward.log_prob(outputs, None, normal)[0]
    assert torch.isfinite(log_prob).all() and float(log_prob[0].detach()) > -12
    assert float(log_prob[1].detach()) > -20  # a mixture of two around 0 gives -10,000
    log_prob.sum().backward()
    assert outputs.grad is not None and torch.isfinite(outputs.grad).all()
    assert float(outputs.grad[0, 2, 5]) != 0, "the mean of the rare ones is learned"


def test_specs_without_rare_rewards_are_written_as_before() -> None:
    plain = Spec(PartSpec(1, (1e-3,)), PartSpec())
    assert not {"reward_rare", "reward_far"} & set(plain.to_json()) and reward_outputs(plain) == 6
    far = replace(SPEC, reward_far=(0.1, 3.0))
    assert Spec.from_json(far.to_json()) == far
    assert Spec.from_json(plain.to_json()) == plain
    assert Spec.from_json(SPEC.to_json()) == SPEC and reward_outputs(SPEC) == 9
    assert head(plain)[0].gain is None


def test_the_page_says_how_well_they_are_drawn() -> None:
    true = np.array([0.1, 0.2, -1000.0, -990.0])
    drawn = np.array([[0.1], [0.3], [-1005.0], [0.1]])
    text = _rare((0.1, 3.0), true, drawn)
    assert "more than 3 from 0.1" in text and "2 of 4 here" in text
    assert "due: 50%, elsewhere: 0.00%" in text and "other rewards: 0.05" in text


def test_rare_rewards_of_both_signs_differ_from_the_others() -> None:
    rewards = np.random.default_rng(0).normal(0.1, 0.05, 1000)
    rewards[:10], rewards[10:20] = 1000.0, -1000.0
    rare, *far = rare_rewards(rewards)
    text = _rare((far[0], far[1]), rewards, rewards[:, None])
    assert rare.sum() == 20 and "20 of 1000 here" in text and "due: 100%" in text
