"""SVG: the actor's gradient through a world, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import fit_world
from gymnasium import spaces

from mesocosm.agents import settings, svg
from mesocosm.agents.config import AgentConfig
from mesocosm.agents.replay import Replay
from mesocosm.agents.svg import Lookahead
from mesocosm.data.loading.codec import Codec
from mesocosm.datasets.dataset import Dataset, Environment, write_dataset
from mesocosm.datasets.episode import Episode
from mesocosm.errors import UsageError
from mesocosm.model.config import ModelConfig
from mesocosm.model.spec import Parts
from mesocosm.model.world import World
from mesocosm.policies.heads import ActionMap, flatten_batch

pytestmark = pytest.mark.unit
OBSERVATIONS = spaces.Dict(
    {
        "arm": spaces.Box(-np.inf, np.inf, (2,), np.float64),
        "goal": spaces.Box(-9, 9, (1,), np.float64),
        "more": spaces.Box(-np.inf, np.inf, (1,), np.float64),
    }
)
ACTIONS = spaces.Box(np.array([-2.0, 1.0], np.float32), np.array([2.0, 5.0], np.float32))
LENGTH = 10


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, Codec]:
    """An untrained world whose task, `goal`, lies between the numbers that it predicts."""
    rng, episodes = np.random.default_rng(0), []
    ACTIONS.seed(0)
    for k in range(8):
        goal = rng.normal(3.0, 2.0, 1)
        rows = [
            {"arm": rng.normal(5, 3, 2), "goal": goal, "more": rng.normal(0, 0.1, 1)}
            for _ in range(LENGTH + 1)
        ]
        actions = [ACTIONS.sample() for _ in range(LENGTH)]
        episodes.append(
            Episode(
                *(k, k, "random", rows, actions, rng.normal(size=LENGTH), "terminated"),
                durations=rng.uniform(0.5, 2.0, LENGTH),
            )
        )
    folder: Path = tmp_path_factory.mktemp("data") / "d"
    write_dataset(
        folder,
        episodes,
        id="d",
        seed=0,
        valid_fraction=0.1,
        environment=Environment(id="Arm-v0", task=["goal"]),
        observation_space=OBSERVATIONS,
        action_space=ACTIONS,
    )
    data = Dataset([folder])
    model = ModelConfig(family="ensemble", size="10k", members=3, base_steps=20)
    world = fit_world(data, model, steps=5)
    return world, Codec.from_json(world.codec)


def observations(count: int) -> tuple[Any, torch.Tensor]:
    """In vector layout, and as an agent sees them."""
    rng = np.random.default_rng(1)
    rows = {"arm": rng.normal(5, 3, (count, 2)), "goal": rng.normal(3, 2, (count, 1))}
    rows["more"] = rng.normal(0, 0.1, (count, 1))
    return rows, torch.from_numpy(flatten_batch(OBSERVATIONS, rows))


def lookahead(made: tuple[World, Codec], **options: Any) -> Lookahead:
    config = AgentConfig(algo="SAC", backend="local", gamma=0.9, **options)
    return Lookahead(*made, config, Replay(1))


def test_flat_numbers_are_encoded_as_the_codec_does(made: tuple[World, Codec]) -> None:
    codec, ahead = made[1], lookahead(made, svg=1)
    raw, flat = observations(6)
    state, task = ahead._encode(flat)
    assert torch.allclose(state.numbers, codec.observation(raw).numbers, atol=1e-5)
    assert torch.allclose(task.numbers, codec.task(raw).numbers, atol=1e-5)
    assert torch.allclose(ahead._decode(state, task), flat, atol=1e-4)
    head = torch.rand(6, 2) * 2 - 1
    encoded = codec.action(ActionMap(ACTIONS).to_raw(head.numpy())).numbers
    assert torch.allclose(ahead._encode_action(head), encoded, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"penalty": 0.0}, {"penalty": 0.7}, {"objective": "disagreement"}]
)
def test_a_return_is_that_of_single_expected_steps(
    made: tuple[World, Codec], options: dict[str, Any]
) -> None:
    """With one member in turn for each row, durations in the discount, and survival."""
    world, codec = made
    ahead, count, alpha = lookahead(made, svg=3, **options), 7, torch.tensor([0.3])
    raw, flat = observations(count)

    def act(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tanh(x[:, :2] - 5.0), x.sum(1) * 0.01

    def value(x: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return x[:, 0] + action[:, 1]

    with torch.no_grad():
        returns, first = ahead.soft_return(flat, act, value, alpha)
        groups = ahead._groups_of(count)
        assert groups.join(torch.arange(3).unsqueeze(1).expand(groups.shape)).tolist() == [
            0, 1, 2, 0, 1, 2, 0
        ]  # fmt: skip
        total, weight = torch.zeros(count), torch.ones(count)
        task, state = codec.task(raw), codec.observation(raw)
        for step in range(3):
            x = flatten_batch(OBSERVATIONS, codec.decode_observation(state, task))
            action, log_p = act(torch.from_numpy(x))
            assert step or torch.allclose(first, log_p, atol=1e-4)
            encoded = codec.action(ActionMap(ACTIONS).to_raw(action.numpy()))
            out = world.predict(state, encoded, task, groups, disagreement=True)
            reward, apart = out.reward, out.disagreement
            assert apart is not None and (out.duration > 0).all()
            if options.get("objective"):
                reward = torch.log1p(apart)
            else:
                cost = (options["penalty"] * apart).clamp(max=1)
                reward = reward - codec.spec.reward_size * cost
            total += weight * (reward - 0.3 * log_p)
            weight *= (1 - out.p_terminated) * 0.9**out.duration
            state = Parts(out.numbers, state.categories)
        x = torch.from_numpy(flatten_batch(OBSERVATIONS, codec.decode_observation(state, task)))
        action, log_p = act(x)
        total += weight * (value(x, action) - 0.3 * log_p)
    assert torch.allclose(returns, total, atol=1e-3)


def test_the_gradient_reaches_every_action(made: tuple[World, Codec]) -> None:
    ahead, taken = lookahead(made, svg=2), []

    def act(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        taken.append(torch.zeros(len(x), 2, requires_grad=True))
        return taken[-1], torch.zeros(len(x))

    returns, _ = ahead.soft_return(
        observations(5)[1], act, lambda x, action: x.sum(1) + action.sum(1), torch.tensor(0.1)
    )
    gradients = torch.autograd.grad(returns.sum(), taken)
    assert len(gradients) == 3 and all(bool((g != 0).any(1).all()) for g in gradients)
    assert not any(p.requires_grad for p in made[0].net.parameters())


NUMBERS = spaces.Box(-1, 1, (2,), np.float32)


@pytest.mark.parametrize(
    ("options", "family", "pair", "message"),
    [
        ({"algo": "PPO"}, "", None, "svg=4 needs algo=SAC, got algo=PPO"),
        ({"backend": "serve"}, "", None, "svg=4 needs backend=local, got backend=serve"),
        ({}, "sequence", (NUMBERS, NUMBERS), "svg=4 needs a world of model.family=ensemble"),
        ({}, "ensemble", (NUMBERS, spaces.Discrete(2)), "numbers in the action space .* Discrete"),
        ({}, "ensemble", (spaces.MultiBinary(2), NUMBERS), "numbers in the observation space"),
        (
            {},
            "ensemble",
            (NUMBERS, spaces.Box(0, 3, (2,), np.int64)),
            "svg=4 needs continuous actions",
        ),
    ],
)
def test_what_cannot_be_differentiated_is_refused(
    options: dict[str, Any], family: str, pair: Any, message: str
) -> None:
    def check(steps: int) -> None:
        config = AgentConfig(**{"algo": "SAC", "backend": "local", "svg": steps} | options)
        svg.check(config)
        if pair is not None:
            svg.check_spaces(config, pair, family)

    check(0)
    with pytest.raises(UsageError, match=message):
        check(4)


def test_derived_settings() -> None:
    """The temperature begins at a tenth of the rewards; the entropy of discrete actions is held at
    a share of the uniform policy's.
    """
    sac = AgentConfig(algo="SAC")
    assert settings.imagined(sac, 0.3).params["initial_alpha"] == pytest.approx(0.03)
    adversary = AgentConfig(algo="SAC", objective="disagreement")
    params = settings.imagined(adversary, 1e-3).params
    assert params["initial_alpha"] == pytest.approx(0.1 * math.log(2))
    params = settings.imagined(sac, 1.0, spaces.Discrete(4)).params
    assert 0 < params["target_entropy"] < math.log(4)
    assert "target_entropy" not in settings.imagined(sac, 1.0, NUMBERS).params
    chosen = AgentConfig(algo="SAC", params={"target_entropy": 0.5, "initial_alpha": 2.0})
    params = settings.imagined(chosen, 1.0, spaces.Discrete(4)).params
    assert params["target_entropy"] == 0.5 and params["initial_alpha"] == 2.0
