"""Stepping: the cache agrees with the full forward, a restored session goes on with the same bits,
and a world survives its files.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from mesocosm.data.loading.codec import Codec
from mesocosm.datasets.dataset import Dataset, Environment, write_dataset
from mesocosm.datasets.episode import Episode
from mesocosm.errors import ArtifactError
from mesocosm.model import rng
from mesocosm.model.carry import Carry, Context, StepOut
from mesocosm.model.config import ModelConfig
from mesocosm.model.groups import MemberGroups
from mesocosm.model.net import BaseOut
from mesocosm.model.sequence import Sequence
from mesocosm.model.spec import PartSpec, Spec, TextSpan
from mesocosm.model.tensors import Outcome, Parts, Transition
from mesocosm.model.world import World

from .nets import draw, random_nets

B, W = 5, 8
SPEC = Spec(
    PartSpec(3, (1e-3,) * 3, (4, 5, 5), (TextSpan(1, 2, 0),)),
    PartSpec(1, (1e-3,), (3,)),
    PartSpec(1, (1e-3,), (2,)),
    durations=True,
    terminal_rate=0.1,
)


def make_world(family: str = "sequence", spec: Spec = SPEC, context: int = W) -> World:
    config = ModelConfig(family=family, size="30k", members=3, context=context, base_hidden=16)
    return World(*random_nets(spec, config))


def actions(step: int, spec: Spec = SPEC) -> Parts:
    key = rng.keys(9, torch.arange(B), 0, step).unsqueeze(1)
    numbers = rng.uniform(key, torch.arange(spec.action.numbers))
    cards = torch.tensor(spec.action.categories)
    return Parts(numbers, (rng.uniform(key, 50 + torch.arange(len(cards))) * cards).long())


def begin(world: World, seed: int = 3) -> Carry:
    env = torch.arange(B)
    task, observation = world.sample_start(rng.keys(seed, env, 0, 0))
    return world.begin(task, observation, rng.member_of(seed, env, 0, world.config.members))


def advance(world: World, carry: Carry, step: int) -> tuple[Carry, StepOut]:
    return world.step(carry, actions(step, world.spec), rng.keys(3, torch.arange(B), 0, step))


def reset(world: World, carry: Carry, which: list[int], seed: int) -> Carry:
    mask = torch.zeros(B, dtype=torch.bool)
    mask[which] = True
    start = world.sample_start(rng.keys(seed, torch.arange(B), 1, 0))
    return world.reset(carry, mask, *start, torch.full((B,), seed % world.config.members))


def flat(out: StepOut) -> list[Tensor]:
    names = ("reward", "terminated", "p_terminated", "duration", "disagreement")
    values = [getattr(out, name) for name in names]
    return [out.observation.numbers, out.observation.categories, *values]


def assert_same(a: StepOut, b: StepOut, where: object = None) -> None:
    """Both steps have the same bits."""
    assert all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True)), where


def base_out(world: World, token: Transition) -> BaseOut:
    change = world.base(token.observation, token.action, token.task)
    return BaseOut(change, world.base.residual_scale, world.base.widening)


@pytest.mark.parametrize("steps", [3, W - 1, W, W + 1, 2 * W + 3])
@torch.inference_mode()
def test_cached_stepping_equals_the_full_forward(steps: int) -> None:
    """The distribution of what follows, given the same history: by the cache (also one that was
    rebuilt), and by a forward over the columns that it keeps.
    """
    world = make_world()
    net = world.net
    assert isinstance(net, Sequence)
    carry = begin(world)
    for step in range(steps):
        carry, out = advance(world, carry, step)
    past, acted = (p[:, : carry.position] for p in (carry.past_observation, carry.past_action))
    full = net.context(Transition(past, acted, carry.task.repeat(carry.position)))[:, -1]
    last = Transition(past[:, -1], acted[:, -1], carry.task)
    # A repeat of the last step on a copy of the cache gives its features again.
    cached = net.advance(carry.cache, carry.position - 1, carry.start_column, last)
    assert torch.allclose(full, cached, atol=1e-4)
    base = base_out(world, last)
    outcome = Outcome(out.observation, (out.duration - SPEC.duration_mean) / SPEC.duration_scale)
    pairs = (net.log_prob(features, last, outcome, base) for features in (full, cached))
    for a, b in zip(*pairs, strict=True):
        assert torch.allclose(a, b, atol=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["sequence", "ensemble"])
@torch.inference_mode()
def test_a_drawn_step_is_possible(family: str) -> None:
    world = make_world(family)
    carry = begin(world)
    token = Transition(carry.observation, actions(0), carry.task)
    features = world.net.advance(world.net.new_cache(B), 0, carry.start_column, token)
    base, keys = base_out(world, token), rng.keys(3, torch.arange(B), 0, 0)
    outcome = draw(world.net, features, token, base, carry.member, keys)
    log_prob, duration = world.net.log_prob(features, token, outcome, base)
    mine = log_prob[carry.member, torch.arange(B)]
    assert torch.isfinite(mine).all() and (log_prob <= 0).all()
    assert duration is not None and (duration <= 0).all()


@pytest.mark.parametrize("family", ["sequence", "ensemble"])
def test_a_row_is_imagined_by_its_own_member(family: str) -> None:
    """The same trajectories as where every row has that member, and whether or not the others are
    asked for their disagreement.
    """
    world = make_world(family)
    first = begin(world)
    assert len(first.member.unique()) > 1
    carry, quiet = first, begin(world)
    alone = [replace_member(world, begin(world), k) for k in range(world.config.members)]
    for step in range(W + 2):
        carry, out = advance(world, carry, step)
        keys = rng.keys(3, torch.arange(B), 0, step)
        quiet, silent = world.step(quiet, actions(step, world.spec), keys, disagreement=False)
        assert out.disagreement is not None and (out.disagreement > 0).all()
        assert silent.disagreement is None
        assert torch.equal(silent.observation.numbers, out.observation.numbers)
        assert torch.equal(silent.reward, out.reward)
        for k, each in enumerate(alone):
            alone[k], expected = advance(world, each, step)
            rows = first.member == k
            assert torch.equal(
                out.observation.categories[rows], expected.observation.categories[rows]
            )
            for name in ("reward", "p_terminated", "duration"):
                actual, other = getattr(out, name)[rows], getattr(expected, name)[rows]
                assert torch.allclose(actual, other, atol=1e-4), name
            numbers = out.observation.numbers[rows], expected.observation.numbers[rows]
            assert torch.allclose(*numbers, atol=1e-4)


def replace_member(world: World, carry: Carry, k: int) -> Carry:
    """The carry with member k in every row."""
    return world.begin(carry.task, carry.observation, torch.full((B,), k))


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("rows", [1, 4, 17])
def test_groups_join_what_they_split(members: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    member = torch.randint(members, (rows,), generator=generator)
    groups, x = MemberGroups(member, members), torch.randn(rows, 2, generator=generator)
    split = groups.split(x)
    assert torch.equal(groups.join(split), x)
    number = torch.arange(members).unsqueeze(1).expand(split.shape[:2])
    assert torch.equal(groups.join(number), member)


def test_a_predicted_step_is_the_mean_of_drawn_ones_and_differentiable() -> None:
    spec = Spec(
        PartSpec(3, (1e-3,) * 3), PartSpec(2, (1e-3,) * 2), PartSpec(1, (1e-3,)), terminal_rate=0.1
    )
    world = make_world("ensemble", spec)
    rows = 4000
    one = begin(world)
    index = torch.zeros(rows, dtype=torch.int64)
    carry = world.begin(one.task[index], one.observation[index], one.member[index])
    action = actions(0, spec)[index]
    _, out = world.step(carry, action, rng.keys(5, torch.arange(rows), 0, 0))
    groups = MemberGroups(one.member[:1], world.config.members)
    observation = Parts(one.observation.numbers[:1].clone(), one.observation.categories[:1].clone())
    chosen = Parts(action.numbers[:1].clone().requires_grad_(), action.categories[:1])
    task = Parts(one.task.numbers[:1].clone(), one.task.categories[:1].clone())
    predicted = world.predict(observation, chosen, task, groups, disagreement=True)
    numbers, reward, p = predicted.numbers, predicted.reward, predicted.p_terminated
    drawn = out.observation.numbers
    error = drawn.std(0) / rows**0.5
    assert ((drawn.mean(0) - numbers[0].detach()).abs() < 5 * error + 1e-4).all()
    assert reward.shape == p.shape == (1,)
    assert predicted.disagreement is not None
    value_here = numbers.sum() + reward.sum() + predicted.disagreement.sum()
    gradient = torch.autograd.grad(value_here, chosen.numbers)[0]
    nudge = torch.tensor([[1e-2, 0.0]])

    def value(shift: torch.Tensor) -> float:
        with torch.no_grad():
            moved = Parts(chosen.numbers + shift, chosen.categories)
            some = world.predict(observation, moved, task, groups, disagreement=True)
        assert some.disagreement is not None
        return float(some.numbers.sum() + some.reward.sum() + some.disagreement.sum())

    slope = (value(nudge) - value(-nudge)) / 2e-2
    assert slope == pytest.approx(float(gradient[0, 0]), rel=0.05, abs=1e-3)


def test_a_world_with_history_or_categories_predicts_nothing() -> None:
    for family in ("sequence", "ensemble"):
        world = make_world(family)
        carry = begin(world)
        with pytest.raises(ValueError, match="family"):
            world.predict(carry.observation, actions(0), carry.task, carry.groups)


@pytest.mark.integration
@pytest.mark.parametrize("family", ["sequence", "ensemble"])
def test_a_restored_session_goes_on_with_the_same_bits(family: str) -> None:
    """Cut at every step of several windows, before, at and after rebuilds, with resets in between;
    the context goes over the wire.
    """
    world, other = make_world(family), make_world(family)
    resets = {2: [1], W - 1: [0, 3], W: [2], W + 3: [1, 4], 2 * W: [0]}
    contexts, outs, carry = [], [], begin(world)
    total = 3 * W - 1
    for step in range(total):
        contexts.append(carry.context)
        carry, out = advance(world, carry, step)
        outs.append(out)
        if step in resets:
            carry = reset(world, carry, resets[step], step)
    for cut in (0, 3, W - 1, W, W + 1, W + 4, 2 * W - 3, 2 * W + 1):
        arrays = contexts[cut].to_numpy()
        assert all(array.dtype in (np.float32, np.int64) for array in arrays.values())
        assert contexts[cut].past_observation.numbers.shape[1] <= W
        restored = other.restore(Context.from_numpy(arrays))
        for step in range(cut, min(total, cut + W // 2 + 2)):
            restored, out = advance(other, restored, step)
            assert_same(out, outs[step], (cut, step))
            if step in resets:
                restored = reset(other, restored, resets[step], step)


def test_an_episode_does_not_see_what_was_before_it() -> None:
    """After a reset an environment's future is that of a session which never had another past (up
    to the column's rotation).
    """
    world = make_world()
    carry, other = begin(world, 3), begin(world, 4)
    for step in range(3):
        carry, _ = advance(world, carry, step)
        other, _ = advance(world, other, step + 100)
    everyone = list(range(B))
    carry, other = reset(world, carry, everyone, 6), reset(world, other, everyone, 6)
    for step in range(3, 2 * W):
        carry, a = advance(world, carry, step)
        other, b = advance(world, other, step)
        assert_same(a, b, step)


def test_one_broken_episode_does_not_spoil_the_next() -> None:
    world = make_world()
    carry, clean = begin(world), begin(world)
    broken = replace(carry.observation, numbers=carry.observation.numbers.clone())
    broken.numbers[1] = torch.inf
    carry = replace(carry, observation=broken)
    for step in range(2):
        carry, _ = advance(world, carry, step)
        clean, _ = advance(world, clean, step)
    carry, clean = reset(world, carry, [1], 6), reset(world, clean, [1], 6)
    for step in range(2, W + 3):
        carry, a = advance(world, carry, step)
        clean, b = advance(world, clean, step)
        assert_same(a, b, step)


def test_draws_depend_on_the_key_alone() -> None:
    """The same keys give the same steps; another seed and each environment others."""
    world = make_world()

    def run(seed: int) -> Tensor:
        carry = begin(world, 3)
        for step in range(3):
            carry, out = world.step(carry, actions(step), rng.keys(seed, torch.arange(B), 0, step))
        return out.observation.numbers

    assert torch.equal(run(3), run(3)) and not torch.equal(run(3), run(4))
    assert len(run(3).unique(dim=0)) == B


def test_a_context_that_does_not_fit_is_refused() -> None:
    world = make_world()
    carry, _ = advance(world, begin(world), 0)
    with pytest.raises(ValueError, match="clock 3"):
        world.restore(replace(carry.context, clock=3))
    arrays = carry.context.to_numpy()
    with pytest.raises(ValueError, match="member"):
        Context.from_numpy({name: array for name, array in arrays.items() if name != "member"})


def test_integers_are_whole_inside_the_world_too(tmp_path: Path) -> None:
    """An observation as an agent sees it, encoded again, is that from which the world continues."""
    generator = np.random.default_rng(0)
    boxes = {
        "task": spaces.Box(0, 9, (1,), np.int64),
        "count": spaces.Box(-99, 999, (2,), np.int64),
        "x": spaces.Box(-1, 1, (1,), np.float32),
    }
    episodes = []
    for k in range(8):
        row = {"task": np.array([k]), "x": np.array([0.5], np.float32)}
        rows = [row | {"count": np.array([10 * k + t, -t])} for t in range(12)]
        actions_taken = list(generator.integers(0, 2, 11))
        episodes.append(Episode(k, k, "random", rows, actions_taken, np.ones(11), "truncated"))
    facts = {"environment": Environment(id="Counts-v0", task=["task"])}
    facts |= {"observation_space": spaces.Dict(boxes), "action_space": spaces.Discrete(2)}
    write_dataset(tmp_path, episodes, id="counts", seed=0, **facts)
    codec = Codec.fit(Dataset([tmp_path]))
    world = make_world(spec=Spec.from_json(codec.spec.to_json()))
    carry, seen = begin(world), []
    for step in range(3):
        seen.append(codec.decode_observation(carry.observation, carry.task))
        encoded = codec.observation(seen[-1]), codec.task(seen[-1])
        for actual, expected in zip(encoded, (carry.observation, carry.task), strict=True):
            torch.testing.assert_close(actual.numbers, expected.numbers, atol=1e-4, rtol=1e-4)
        carry, _ = advance(world, carry, step)
    assert len({tuple(row) for now in seen for row in now["count"].tolist()}) > 5


@pytest.mark.parametrize("family", ["sequence", "ensemble"])
def test_a_world_survives_its_files(family: str, tmp_path: Path) -> None:
    world = make_world(family)
    world.codec = {"some": ["codec"]}
    world.save(tmp_path / "w")
    loaded = World.load(tmp_path / "w")
    for name in ("spec", "config", "codec"):
        assert getattr(loaded, name) == getattr(world, name)
    a, b = begin(world), begin(loaded)
    for step in range(W + 2):
        a, x = advance(world, a, step)
        b, y = advance(loaded, b, step)
        assert_same(x, y, step)
    (tmp_path / "w" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match="cannot be read"):
        World.load(tmp_path / "w")


def test_regressed_rewards_and_durations_come_in_raw_units() -> None:
    spec = replace(SPEC, reward_mean=50.0, reward_scale=2.0, duration_mean=7.0, duration_scale=0.1)
    world, plain = make_world(spec=spec), make_world()
    (_, a), (_, b) = advance(world, begin(world), 0), advance(plain, begin(plain), 0)
    assert torch.allclose(a.reward, b.reward * 2 + 50, atol=1e-4)
    assert torch.allclose(a.duration, b.duration * 0.1 + 7, atol=1e-4)
