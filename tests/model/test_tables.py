"""Worlds with a table: slots share weights, and counts, files and restored sessions are exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from serve.worlds import untrained

from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.groups import number_groups
from mesocosm.data.loading.normalize import Moments
from mesocosm.datasets.spaces import SpaceCodec
from mesocosm.datasets.tables import table_of
from mesocosm.envs.items import Items
from mesocosm.errors import UsageError
from mesocosm.model import rng
from mesocosm.model.base import Base
from mesocosm.model.config import ModelConfig
from mesocosm.model.counts import blank_windows, count, flops_per_batch, measured_flops, params
from mesocosm.model.families import build
from mesocosm.model.heads import head_inputs
from mesocosm.model.mup import init_, param_groups
from mesocosm.model.net import BaseOut
from mesocosm.model.spec import Spec
from mesocosm.model.tables import pooled
from mesocosm.model.tensors import Outcome, Parts, Transition
from mesocosm.model.world import World
from mesocosm.policies.heads import stack
from mesocosm.policies.policy import RandomPolicy

ITEMS = Items(slots=5)
SPACES = ITEMS.observation_space, ITEMS.action_space
families = pytest.mark.parametrize("family", ["ensemble", "sequence"])
B, W = 6, 4


def world_of(family: str, **model: Any) -> tuple[World, Codec]:
    world = untrained(*SPACES, family, **{"members": 2, "context": W, **model})
    return world, Codec.from_json(world.codec)


def windows(codec: Codec, order: Any) -> tuple[Transition, Outcome]:
    """[B, W] random transitions, with the slots in another order."""
    episodes, generator = [], np.random.default_rng(0)
    for seed in range(B):
        rows, acts = [ITEMS.reset(seed=seed)[0]], []
        for _ in range(W):
            acts.append(RandomPolicy(SPACES[1]).act_one(rows[-1], rng=generator))
            rows.append(ITEMS.step(acts[-1])[0])
        episodes.append((rows, acts))

    def moved(observation: Any) -> Any:
        items = {name: values[order] for name, values in observation["items"].items()}
        mask = observation["action_mask"].reshape(2, -1)[:, order].reshape(-1)
        return observation | {"items": items, "action_mask": mask}

    place = np.argsort(order)
    observations = [moved(row) for rows, _ in episodes for row in rows]
    actions = [np.array([verb, place[slot]]) for _, acts in episodes for verb, slot in acts]
    o = codec.observation(stack(SPACES[0], observations))
    o = Parts(*(x.unflatten(0, (B, W + 1)) for x in (o.numbers, o.categories)))
    a = codec.action(stack(SPACES[1], actions))
    a = Parts(*(x.unflatten(0, (B, W)) for x in (a.numbers, a.categories)))
    task = Parts.empty(codec.spec.task, B, W)
    return Transition(o[:, :-1], a, task), Outcome(o[:, 1:], torch.zeros(B, W))


def test_the_table_and_its_mask_are_found() -> None:
    span = world_of("ensemble")[1].spec.observation.table
    assert span is not None and span.pointer == 1
    assert np.shape(span.numbers) == (5, 1) and np.shape(span.categories) == (5, 5)
    cards = world_of("ensemble")[1].spec.observation.categories
    for row in span.categories:  # of the mask 2 verbs, then kind, present and ticked
        assert [cards[j] for j in row] == [2, 2, 4, 2, 2]
    assert span.present == 3
    first = [row[:2] for row in span.categories]
    assert first == [(i, 5 + i) for i in range(5)]  # row-major: verb, then slot
    spec = world_of("ensemble")[1].spec
    assert Spec.from_json(spec.to_json()) == spec
    assert "table" not in spec.to_json()["action"]


@families
def test_a_permutation_of_the_slots_permutes_the_predictions(family: str) -> None:
    world, codec = world_of(family)
    order = np.array([3, 0, 4, 1, 2])
    results = []
    for chosen in (np.arange(5), order):
        transition, outcome = windows(codec, chosen)
        net, base = world.net, world.base
        change = base(transition.observation, transition.action, transition.task)
        out = BaseOut(change, base.residual_scale, base.widening)
        with torch.no_grad():
            features = net.context(transition)
            log_prob, _ = net.log_prob(features, transition, outcome, out)
            apart = net.disagreement(features, transition, outcome, out)
            inputs = head_inputs(transition, outcome.observation)
            heads = base.reward(inputs), base.termination(inputs)
            flat = None if features is None else features.flatten(0, 1)
            means, _, logits = net._outputs(flat, transition.flatten())  # type: ignore[operator]
        results.append((log_prob, apart, *heads, means, logits))
    for before, after in zip(results[0][:4], results[1][:4], strict=True):
        torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-4)
    span = codec.spec.observation.table
    assert span is not None
    for at, rows in ((4, span.numbers), (5, span.categories)):
        columns = torch.tensor(rows)
        before, after = results[0][at], results[1][at]
        if at == 5:
            before, after = (x.nan_to_num(neginf=0.0) for x in (before, after))
        torch.testing.assert_close(
            before[:, :, columns[torch.from_numpy(order)]],
            after[:, :, columns],
            rtol=1e-4,
            atol=1e-4,
        )
    assert results[0][4].std() > 1e-3


@families
@pytest.mark.parametrize("size", ["10k", "100k"])
def test_counts_are_exact_and_all_parameters_have_tags(family: str, size: str) -> None:
    spec = world_of(family)[1].spec
    config = ModelConfig(family=family, size=size, members=3)
    net, base = build(spec, config), Base(spec, config)
    init_(net, 0)
    init_(base.reward, 0)
    groups = param_groups(net, 1e-3, 0.01)
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))
    counts = params(spec, config)
    assert counts == count(net, base)
    assert counts.total == sum(p.numel() for p in net.parameters())
    one = params(spec, ModelConfig(family=family, size=size, members=1))
    assert (one.n, one.embeddings) == (counts.n, counts.embeddings)
    assert one.n + one.embeddings == one.dynamics
    batch = blank_windows(spec, 3, 5)
    assert flops_per_batch(spec, config, 3, 5) == measured_flops(net, base, batch) > 0


@families
def test_outputs_at_the_start_do_not_grow_with_the_width(family: str) -> None:
    sizes = {}
    for size in ("10k", "1m"):
        codec = world_of(family)[1]
        torch.manual_seed(0)
        net = build(codec.spec, ModelConfig(family=family, size=size, members=2, context=W))
        init_(net, 0)
        transition, _ = windows(codec, np.arange(5))
        with torch.no_grad():
            features = net.context(transition)
            flat = None if features is None else features.flatten(0, 1)
            sizes[size] = float(net._outputs(flat, transition.flatten())[0].std())  # type: ignore[operator]
    assert 0.1 < sizes["1m"] / sizes["10k"] < 1.5  # about width^-1/2


@families
def test_a_restored_session_goes_on_with_the_same_bits(family: str, tmp_path: Path) -> None:
    world, codec = world_of(family)
    world.save(tmp_path)
    world = World.load(tmp_path)
    transition, _ = windows(codec, np.arange(5))
    start, env = transition.observation[:, 0].clone(), torch.arange(B)
    carry = world.begin(transition.task[:, 0], start, rng.member_of(0, env, 0, 2))
    for step in range(2 * W):
        restored = world.restore(carry.context)
        keys = rng.keys(0, env, 0, step)
        action = transition.action[:, step % W].clone()
        _, other = world.step(restored, action, keys)
        carry, out = world.step(carry, action, keys)
        for name in ("reward", "p_terminated", "disagreement"):
            assert torch.equal(getattr(out, name), getattr(other, name)), (step, name)
        assert torch.equal(out.observation.categories, other.observation.categories)
        assert torch.equal(out.observation.numbers, other.observation.numbers)


def test_history_steps_as_it_was_trained() -> None:
    world, codec = world_of("sequence")
    transition, _ = windows(codec, np.arange(5))
    with torch.no_grad():
        whole = world.net.context(transition)
        assert whole is not None
        cache, start = world.net.new_cache(B), torch.zeros(B, dtype=torch.int64)
        for step in range(W):
            parts = (transition.observation, transition.action, transition.task)
            token = Transition(*(part[:, step] for part in parts))
            one = world.net.advance(cache, step, start, token)
            torch.testing.assert_close(one, whole[:, step], rtol=1e-4, atol=1e-5)


def test_statistics_are_those_of_all_slots() -> None:
    groups = number_groups(SpaceCodec(SPACES[0]), SpaceCodec(SPACES[1]))
    assert groups.tolist() == [[0, 1, 2, 3, 4]]
    values = np.random.default_rng(0).normal(size=(50, 6)) * np.arange(1, 7)
    moments, joined = Moments(6), Moments(1)
    moments.add(values)
    alone = moments.std[5]
    moments.pool(groups)
    joined.add(values[:, :5].reshape(-1, 1))
    np.testing.assert_allclose(moments.mean[:5], joined.mean[0])
    np.testing.assert_allclose(moments.std[:5], joined.std[0])
    assert moments.std[5] == alone
    span = world_of("ensemble")[1].spec.observation.table
    x = torch.arange(6.0)
    assert pooled(x, span).tolist() == [2.0, 2.0, 2.0, 2.0, 2.0, 5.0]
    assert pooled(x, None) is x


def table(**leaves: Any) -> spaces.Dict:
    return spaces.Dict({"present": spaces.MultiBinary(3), **leaves})


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        ({"a": table(), "b": table()}, "may have one table"),
        ({"a": table(x=spaces.Box(0, 1, (4,)))}, r"observation\.a\.x must have the leading"),
        ({"a": table(x=spaces.Discrete(3))}, r"observation\.a\.x must have the leading"),
        ({"a": table(x=spaces.MultiDiscrete([2, 2, 3]))}, "same number of values in every slot"),
    ],
)
def test_other_tables_are_refused(observation: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        table_of(spaces.Dict(observation), spaces.Discrete(2))


def test_a_task_cannot_be_a_part_of_the_table() -> None:
    with pytest.raises(UsageError, match="must not name the table 'items'"):
        untrained(*SPACES, task=("items",))
    with pytest.raises(UsageError, match="must not name 'action_mask'"):
        untrained(*SPACES, task=("action_mask",))


def test_spaces_without_a_table_have_none() -> None:
    flat = spaces.Dict({"present": spaces.MultiBinary(3), "x": spaces.Box(0, 1, (3,))})
    assert table_of(flat, spaces.Discrete(2)) is None
    assert table_of(spaces.Box(0, 1, (3,)), spaces.Discrete(2)) is None


@families
def test_a_direction_is_no_slot(family: str) -> None:
    """5 directions beside 5 empty slots: their predictions differ."""
    plain = spaces.Dict({name: SPACES[0][name] for name in ("goal", "items")})
    for action in (spaces.Discrete(5), spaces.MultiDiscrete([2, 5])):
        world = untrained(plain, action, family, members=2, context=W)
        codec = Codec.from_json(world.codec)
        table = codec.spec.observation.table
        assert table is not None and table.pointer is None
        empty = {name: np.zeros_like(x) for name, x in ITEMS.reset(seed=0)[0]["items"].items()}
        rows = [{"goal": np.int64(1), "items": empty}] * 5
        acts = [np.int64(i) if action.shape == () else np.array([0, i]) for i in range(5)]
        o = codec.observation(stack(plain, rows))
        a = codec.action(stack(action, acts))
        transition = Transition(o, a, Parts.empty(codec.spec.task, 5))
        with torch.no_grad():
            heads = world.base.reward(head_inputs(transition, o))
        assert (heads.diff(dim=1).abs().amax((0, 2)) > 1e-4).all()
