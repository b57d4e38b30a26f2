"""The base predicts Gymnasium dynamics reproducibly and stays bounded far outside its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mesocosm.model.base import MAX_TRANSITIONS, Base, Transitions
from mesocosm.model.config import ModelConfig
from mesocosm.model.fitting import ALONE
from mesocosm.model.spec import PartSpec, Spec

from .nets import categories, nothing, numbers

CONFIG = ModelConfig(base_steps=300)
Rollouts = list[tuple[np.ndarray, np.ndarray]]


def act(discrete: bool, controlled: bool, o: Any, rng: np.random.Generator) -> Any:
    """A random action, or that of a controller that stays up longer."""
    if discrete:
        if controlled and rng.random() >= 0.5:
            return int(o[2] + 0.5 * o[3] > 0)
        return int(rng.integers(2))
    mean = 6 * o[1] + o[3] + 0.3 * o[0] + 0.4 * o[2] if controlled else 0.0
    return np.clip(rng.normal(mean, 1.0, 1), -3, 3).astype(np.float32)


def rollouts(env_id: str, steps: int, seed: int) -> Rollouts:
    """Random episodes, and every second one half under a controller."""
    env, rng = gymnasium.make(env_id), np.random.default_rng(seed)
    episodes: Rollouts = []
    while sum(len(a) for _, a in episodes) < steps:
        observations, done = [env.reset(seed=int(rng.integers(2**31)))[0]], False
        actions: list[Any] = []
        while not done and len(actions) < 100:
            controlled = len(episodes) % 2 == 1
            actions.append(act(env_id == "CartPole-v1", controlled, observations[-1], rng))
            after, _, done, _, _ = env.step(actions[-1])
            observations.append(after)
        rows = np.array(actions, np.float64).reshape(len(actions), -1)
        episodes.append((np.array(observations, np.float64), rows))
    return episodes


class Data:
    def __init__(self, env_id: str, steps: int = 3000) -> None:
        self.train, self.test = rollouts(env_id, steps, 0), rollouts(env_id, 1000, 1)
        states = np.concatenate([o for o, _ in self.train])
        self.mean, self.std = states.mean(0), states.std(0)
        self.discrete = env_id == "CartPole-v1"
        action = PartSpec(categories=(2,)) if self.discrete else PartSpec(1, (1e-3,))
        self.spec = Spec(PartSpec(4, (1e-4,) * 4), action)

    def transitions(self, episodes: Rollouts) -> Transitions:
        before, after = (
            np.concatenate([(o[cut] - self.mean) / self.std for o, _ in episodes])
            for cut in (slice(None, -1), slice(1, None))
        )
        actions = torch.from_numpy(np.concatenate([a for _, a in episodes]))
        lengths = torch.tensor([len(a) for _, a in episodes])
        hashes = (torch.arange(len(episodes)) * 7919 + 13).repeat_interleave(lengths)
        action = categories(actions) if self.discrete else numbers(actions)
        observations = (numbers(torch.from_numpy(o)) for o in (before, after))
        return next(observations), action, nothing(len(hashes)), next(observations), hashes


def one_step_error(base: Base, transitions: Transitions) -> tuple[float, float]:
    """Member 0's RMSE and median absolute error, over persistence's RMSE."""
    o, a, task, after, _ = transitions
    change = after.numbers - o.numbers
    error, size = base(o, a, task)[0] - change, change.pow(2).mean().sqrt()
    return float(error.pow(2).mean().sqrt() / size), float(error.abs().median() / size)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("env_id", "bound", "measure"), [("CartPole-v1", 0.002, 0), ("InvertedPendulum-v5", 0.2, 1)]
)
def test_real_dynamics(env_id: str, bound: float, measure: int) -> None:
    """The MLP is worth having: by RMSE on the smooth CartPole, by the median where impacts with the
    rail's end own the RMSE.
    """
    data = Data(env_id)
    train, held_out = data.transitions(data.train), data.transitions(data.test)
    base = Base.fit(data.spec, CONFIG, train, seed=0)
    ridge = Base.fit(data.spec, ModelConfig(base_steps=0), train, seed=0)
    errors = one_step_error(base, held_out)
    assert errors[0] < bound
    assert errors[measure] < 0.7 * one_step_error(ridge, held_out)[measure]


def linear(rows: int = 800, noise: float = 0.0) -> tuple[Spec, Transitions]:
    """Transitions of linear dynamics."""
    g = torch.Generator().manual_seed(0)
    o = torch.randn(rows, 3, generator=g)
    a, t = torch.randint(3, (rows, 1), generator=g), torch.randn(rows, 1, generator=g)
    change = 0.1 * o @ torch.randn(3, 3, generator=g)
    change = change + torch.randn(3, 3, generator=g)[a[:, 0]] + t
    change = change + noise * torch.randn(rows, 3, generator=g)
    spec = Spec(PartSpec(3, (1e-4,) * 3), PartSpec(categories=(3,)), PartSpec(1, (1e-4,)))
    parts = numbers(o), categories(a), numbers(t), numbers(o + change)
    return spec, (*parts, torch.arange(rows) // 20)


@pytest.mark.integration
def test_linear_dynamics_are_exact_and_the_scale_is_the_noise() -> None:
    spec, exact = linear()
    assert one_step_error(Base.fit(spec, CONFIG, exact, 0), exact)[0] < 1e-3
    spec, noisy = linear(2000, noise=0.05)
    scale = Base.fit(spec, CONFIG, noisy, 0).residual_scale
    assert torch.all((scale > 0.045) & (scale < 0.07)), scale


@pytest.mark.integration
def test_episodes_that_a_member_leaves_out_stop_its_fit() -> None:
    """More steps fit the noise of 200 rows."""
    spec, data = linear(2200, noise=0.3)
    few, test = (
        (*(part[rows] for part in data[:4]), data[4][rows])
        for rows in (torch.arange(200), torch.arange(200, 2200))
    )
    stopped, ridge = (Base.fit(spec, ModelConfig(base_steps=most), few, 0) for most in (5000, 0))
    assert one_step_error(stopped, test)[0] < 1.1 * one_step_error(ridge, test)[0]
    steps, held_out = stopped.fits[0].tolist()
    assert 0 < steps < 1500 and 0 < held_out < 1.5
    assert stopped.metrics == {"base_steps": steps, "base_held_out": held_out}
    single: Transitions = (*few[:4], torch.zeros(200, dtype=torch.int64))
    assert Base.fit(spec, ModelConfig(), single, 0).metrics == {"base_steps": ALONE}


def test_same_input_same_bits_and_members_differ(tmp_path: Path) -> None:
    spec, data = linear(noise=0.1)
    config = ModelConfig(base_steps=20, members=3, base_hidden=32)
    a, b, other = (Base.fit(spec, config, data, seed) for seed in (0, 0, 1))
    out = a(*data[:3])
    assert out.shape == (3, 800, 3) and torch.equal(out, b(*data[:3]))
    assert not torch.equal(out, other(*data[:3]))
    assert not torch.allclose(out[0], out[1], atol=1e-4)
    save_file(a.state_dict(), tmp_path / "base.safetensors")
    loaded = Base(spec, config)
    loaded.load_state_dict(load_file(tmp_path / "base.safetensors"))
    assert torch.equal(loaded(*data[:3]), out)
    assert torch.equal(loaded.residual_scale, a.residual_scale)
    assert not any(p.requires_grad for p in a.parameters())  # frozen


def test_any_leading_shape() -> None:
    spec, data = linear(64, noise=0.1)
    base = Base.fit(spec, ModelConfig(base_steps=5), data, 0)
    flat = base(*data[:3])
    folded = base(*(part[torch.arange(64).reshape(4, 16)] for part in data[:3]))
    assert torch.allclose(folded, flat.reshape(4, 4, 16, 3), atol=1e-6)
    assert torch.allclose(base(*(part[0] for part in data[:3])), flat[:, 0], atol=1e-6)


def test_the_mlp_is_bounded_far_outside_the_data() -> None:
    data = Data("InvertedPendulum-v5", 300)
    base = Base.fit(data.spec, ModelConfig(base_steps=100), data.transitions(data.train), 0)
    far = numbers(torch.randn(256, 4, generator=torch.Generator().manual_seed(0)) * 1e4)
    inputs = far, numbers(torch.zeros(256, 1)), nothing(256)
    linear_part = torch.matmul(base.features(*inputs), base.ridge)
    weight, bias = (base.get_buffer(name) for name in ("weight2", "bias2"))
    bound: Tensor = (weight.abs().sum(1, keepdim=True) + bias.abs()) * base.scale
    assert torch.all((base(*inputs) - linear_part).abs() <= bound + 1e-3 * linear_part.abs())


def test_without_a_base_the_scale_is_that_of_the_change() -> None:
    spec, data = linear(noise=0.3)
    base = Base.fit(spec, ModelConfig(base=False), data, 0)
    assert torch.equal(base(*data[:3]), torch.zeros(4, 800, 3))
    spread = (data[3].numbers - data[0].numbers).std(0, correction=0)
    assert torch.allclose(base.residual_scale, spread)


def test_no_numbers_one_episode_and_many_rows() -> None:
    spec = Spec(PartSpec(categories=(5,)), PartSpec(categories=(2,)))
    o, a = (categories(torch.randint(high, (10, 1))) for high in (5, 2))
    episode = torch.zeros(10, dtype=torch.int64)
    empty = Base.fit(spec, ModelConfig(), (o, a, nothing(10), o, episode), 0)
    assert empty(o, a, nothing(10)).shape == (4, 10, 0) and empty.residual_scale.shape == (0,)

    spec, data = linear(MAX_TRANSITIONS + 1000, noise=0.1)
    single: Transitions = (*data[:4], torch.zeros(len(data[4]), dtype=torch.int64))
    base = Base.fit(spec, ModelConfig(base_steps=10, base_hidden=8), single, 0)
    assert torch.isfinite(base(*data[:3])).all() and torch.all(base.residual_scale < 0.2)
