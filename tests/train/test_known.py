"""Known functions are checked on values of the spaces and on logs before anything is spent."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from factories import cart_root, fit_world
from gymnasium import spaces
from torch import Tensor

from mesocosm.data.loading.codec import Codec
from mesocosm.datasets.dataset import Dataset, Environment, write_dataset
from mesocosm.datasets.episode import Episode
from mesocosm.envs import builtin
from mesocosm.envs import known as shipped
from mesocosm.envs.config import KnownConfig
from mesocosm.errors import ArtifactError, UsageError
from mesocosm.model import rng
from mesocosm.model.carry import Carry
from mesocosm.model.config import ModelConfig
from mesocosm.model.groups import MemberGroups
from mesocosm.model.known import KnownFunction
from mesocosm.model.tensors import Parts
from mesocosm.model.world import World
from mesocosm.store.artifacts import Storage
from mesocosm.train import known

CART = gymnasium.make("CartPole-v1")
SPACES = CART.observation_space, CART.action_space


def functions(**parts: Callable[..., Any]) -> known.Functions:
    return {part: KnownFunction(f"mine:{part}", "0", call) for part, call in parts.items()}


@pytest.fixture(scope="module")
def cart(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    storage = Storage(cart_root(tmp_path_factory.mktemp("known"), 600))
    return Dataset([storage.artifact("datasets", "cart").path])


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current directory whose modules are imported by none before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def changes(o: Tensor, a: Tensor, following: Tensor) -> Tensor:
    following[:, 0] = 1.0
    return following[:, 0]


WRONG: list[tuple[str, Callable[..., Any], str]] = [
    ("reward", lambda o, a, n: n, r"known.reward='mine:reward' must return a float tensor \[8\]"),
    ("reward", lambda o, a, n: n[:, 0] > 0, "must return a float tensor .* got bool"),
    ("terminated", lambda o, a, n: n[:, 0], "must return a bool tensor .* got float64"),
    ("reward", lambda o, a, n: n.numpy()[:, 0], "must return a torch tensor, got ndarray"),
    ("reward", lambda o, a, n: torch.from_numpy(n.numpy())[:, 0], "may require gradients"),
    ("reward", lambda o, a, n: n[:, 0].sqrt(), "must be finite for all values of the spaces, got"),
    ("reward", lambda o, a, n: n[:, 9], "fails on 8 transitions .IndexError: "),
    ("reward", lambda o, a: o[:, 0], "fails on 8 transitions .TypeError: "),
    ("reward", lambda o, a, n: torch.rand(len(n)), "must be a function of .o, a, o'. alone"),
    ("reward", changes, "must not change its arguments"),
    ("reward", lambda o, a, n: n[:, 0] - n[:, 0].mean(), "each row from the same row"),
]


@pytest.mark.parametrize(("part", "call", "message"), WRONG)
def test_a_wrong_function_is_refused_on_values_of_the_spaces(
    part: str, call: Callable[..., Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        known.check_spaces(functions(**{part: call}), *SPACES)


def test_a_function_receives_the_layout_of_the_spaces() -> None:
    seen: list[Any] = []
    observation = spaces.Dict(
        {
            "pair": spaces.Tuple((spaces.Discrete(3, start=5), spaces.Box(-1, 1, (2, 3)))),
            "count": spaces.Box(0, 9, (1,), "int64"),
        }
    )

    def reward(o: Any, a: Tensor, following: Any) -> Tensor:
        seen.append((o, a))
        return torch.zeros(len(a))

    known.check_spaces(functions(reward=reward), observation, spaces.MultiDiscrete([2, 3]))
    o, a = seen[0]
    assert (a.dtype, a.shape) == (torch.int64, (8, 2))
    kind, box = o["pair"]
    assert (kind.dtype, kind.shape, int(kind.min()) >= 5) == (torch.int64, (8,), True)
    assert (box.dtype, box.shape) == (torch.float64, (8, 2, 3))
    assert (o["count"].dtype, o["count"].shape) == (torch.int64, (8, 1))


def test_a_text_is_refused() -> None:
    space = spaces.Dict({"note": spaces.Text(3), "x": spaces.Box(-1, 1)})
    with pytest.raises(UsageError, match=r"tensors, and observation.note is a text"):
        known.check_spaces(functions(terminated=shipped.never), space, spaces.Discrete(2))


def test_the_shipped_functions_agree_with_logs(cart: Dataset) -> None:
    exact = functions(reward=shipped.cartpole_reward, terminated=shipped.cartpole_terminated)
    known.check_spaces(exact, *SPACES)
    assert known.check_data(exact, cart) == []


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"reward": lambda o, a, n: n[:, 0]},
            r"root mean square .* where that of the rewards is 1",
        ),
        ({"terminated": shipped.never}, r"(\d+) of \1 terminal transitions missed and 0 of"),
        ({"terminated": lambda o, a, n: n[:, 0] < 9}, r"and (\d+) of \1 others called terminal"),
    ],
)
def test_a_function_that_disagrees_with_logs_is_refused_with_numbers(
    cart: Dataset, parts: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=f"must agree with the data, .*{message}"):
        known.check_data(functions(**parts), cart)


def test_a_function_near_the_logs_is_reported(cart: Dataset) -> None:
    (warning,) = known.check_data(functions(reward=lambda o, a, n: 1 + 5e-3 * n[:, 1]), cart)
    assert "known.reward='mine:reward' differs from the data: " in warning


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere:reward", "known.reward='nowhere:reward': there is no module 'nowhere'"),
        ("reward", "must have the form module:function"),
        ("mine:rewards", "module 'mine' has no function 'rewards'; did you mean 'reward'"),
        ("mine:sqrt", "must be a function that .*mine.py itself defines"),
        ("math:sqrt", "module 'math' must be a Python file"),
    ],
)
def test_a_function_that_cannot_be_imported_is_refused(
    modules: Path, name: str, message: str
) -> None:
    (modules / "mine.py").write_text("from torch import sqrt\ndef reward(o, a, n): ...\n")
    with pytest.raises(UsageError, match=message):
        known.load(KnownConfig(reward=name))


def test_a_changed_file_is_another_function_and_is_not_run(modules: Path) -> None:
    """A world's record names the file's hash: another file is not even imported."""
    (modules / "other.py").write_text("def reward(o, a, n): ...\n")
    first = known.load(KnownConfig(reward="other:reward"))["reward"]
    (modules / "other.py").write_text("raise SystemExit\n")
    with pytest.raises(ArtifactError, match=f"must come from a file of hash {first.source}"):
        KnownFunction.load("other:reward", "known.reward", first.source)
    with pytest.raises(ArtifactError, match="changed while this process ran"):
        known.load(KnownConfig(reward="other:reward"))


@pytest.fixture(scope="module")
def reacher(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Random episodes with a target as their task."""
    env, folder = builtin.reacher(), tmp_path_factory.mktemp("reacher")
    env.action_space.seed(0)
    episodes = []
    for k in range(6):
        observations, actions = (
            [env.reset(seed=k)[0]],
            [env.action_space.sample() for _ in range(9)],
        )
        rewards = np.zeros(len(actions))
        for i, action in enumerate(actions):
            following, rewards[i], *_ = env.step(action)
            observations.append(following)
        episodes.append(Episode(k, k, "random", observations, actions, rewards, "truncated"))
    facts: dict[str, Any] = {"environment": Environment(id="reacher", task=["target"])}
    facts |= {"observation_space": env.observation_space, "action_space": env.action_space}
    write_dataset(folder, episodes, id="reacher", seed=0, **facts)
    return Dataset([folder])


@pytest.fixture
def world(reacher: Dataset) -> World:
    """A world of `reacher` with both parts known."""
    world = fit_world(reacher, ModelConfig("ensemble", "10k", members=2, base_steps=20))
    names = KnownConfig(f"{shipped.__name__}:reacher_reward", f"{shipped.__name__}:never")
    parts = known.load(names)
    world.known = Codec.from_json(world.codec).known(parts["reward"], parts["terminated"])
    return world


def begin(world: World) -> tuple[Carry, Any]:
    keys = rng.keys(0, torch.arange(5), 0, 0)
    action = Codec.from_json(world.codec).action(np.linspace(-1, 1, 10, dtype="f4").reshape(5, 2))
    return world.begin(*world.sample_start(keys), torch.tensor([0, 1, 1, 0, 1])), action


def test_a_world_steps_with_its_known_parts(world: World) -> None:
    """They read what the agent reads, and the rest of the step has the same bits."""
    codec, keys = Codec.from_json(world.codec), rng.keys(0, torch.arange(5), 0, 1)
    carry, action = begin(world)
    _, out = world.step(carry, action, keys)
    raw = codec.decode_observation(out.observation, carry.task)
    expected = -np.linalg.norm(raw["arm"][:, -2:], axis=1)
    expected -= np.square(codec.decode_action(action)).sum(1)
    np.testing.assert_allclose(out.reward.numpy(), expected, rtol=1e-5)
    assert out.reward.dtype == torch.float32
    assert not out.terminated.any() and out.p_terminated.tolist() == [0.0] * 5
    world.known = None
    carry, action = begin(world)
    _, learned = world.step(carry, action, keys)
    assert torch.equal(learned.observation.numbers, out.observation.numbers)
    assert not torch.equal(learned.reward, out.reward) and (learned.p_terminated > 0).all()


def test_gradients_pass_through_a_known_reward(world: World) -> None:
    carry, action = begin(world)
    numbers, observation = action.numbers.clone().requires_grad_(), carry.observation.clone()
    expected = world.predict(
        observation,
        Parts(numbers, action.categories),
        carry.task.clone(),
        MemberGroups(torch.tensor([0, 1, 1, 0, 1]), 2),
    )
    (gradient,) = torch.autograd.grad(expected.reward.sum(), numbers)
    assert gradient.abs().min() > 0 and not expected.p_terminated.any()


def test_a_world_with_known_parts_survives_its_files(world: World, tmp_path: Path) -> None:
    world.save(tmp_path / "w")
    loaded = World.load(tmp_path / "w")
    assert loaded.known is not None and world.known is not None
    assert loaded.known.to_json() == world.known.to_json()
    keys = rng.keys(0, torch.arange(5), 0, 1)
    carry, action = begin(world)
    context = carry.context
    _, out = world.step(carry, action, keys)
    _, again = loaded.step(loaded.restore(context), action, keys)
    assert torch.equal(out.reward, again.reward)
    about = json.loads((tmp_path / "w" / "world.json").read_text())
    about["known"]["reward"]["source"] = "0" * 16
    (tmp_path / "w" / "world.json").write_text(json.dumps(about))
    with pytest.raises(ArtifactError, match=r"world w: known.reward=.* must come from a file"):
        World.load(tmp_path / "w")
