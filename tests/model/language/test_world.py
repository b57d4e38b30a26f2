"""A text world: stepping, restoring, members, files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("tokenizers")

from mesocosm.errors import ArtifactError, UsageError
from mesocosm.model import rng
from mesocosm.model.language.llama import Llama
from mesocosm.model.language.net import TextNet
from mesocosm.model.language.session import TextCarry, TextStep
from mesocosm.model.language.shape import rung_shape
from mesocosm.model.language.tokenizer import TextTokenizer
from mesocosm.model.language.world import TextWorld
from mesocosm.model.spec import PartSpec, Spec
from model.language.nets import randomised

SPEC = Spec(PartSpec(), PartSpec(), reward_values=(0.0, 0.5, 1.0), terminal_rate=0.1)
ACTIONS = ["go to the table", "look", "take the red mug", "öffne 水"]


def world(members: int = 1, rank: int = 0, window: int = 128, tasks: bool = False) -> TextWorld:
    """Random weights: observations are random bytes, most of them broken."""
    tokenizer = TextTokenizer.train(["You are at the table. go to the table", "a red mug"], 300)
    backbone = Llama(rung_shape("30k", tokenizer.size), members=members, rank=rank)
    net = randomised(TextNet(backbone, SPEC))  # type: ignore[arg-type]
    return TextWorld(net, tokenizer, window=window, longest=16, longest_start=24, tasks=tasks)  # type: ignore[arg-type]


def start(model: TextWorld, rows: int = 4) -> TextCarry:
    member = torch.arange(rows) % model.net.members
    starts = [f"You are at the table {row}." for row in range(rows)]
    return model.begin([""] * rows, starts, member)


def keys(rows: int, step: int) -> torch.Tensor:
    key: torch.Tensor = rng.keys(5, torch.arange(rows), 0, step)
    return key


def play(model: TextWorld, carry: TextCarry, first: int, last: int) -> list[TextStep]:
    rows, steps = len(carry.windows), []
    for step in range(first, last):
        actions = [ACTIONS[(row + step) % len(ACTIONS)] for row in range(rows)]
        carry, out = model.step(carry, actions, keys(rows, step))
        steps.append(out)
    return steps


def same(a: TextStep, b: TextStep, rows: slice = slice(None)) -> bool:
    tensors = ("reward", "terminated", "p_terminated", "surprise", "disagreement", "tokens")
    return a.observation[rows] == b.observation and all(
        torch.equal(getattr(a, name)[rows], getattr(b, name)) for name in tensors
    )


@pytest.mark.integration
@pytest.mark.parametrize(("members", "rank"), [(1, 0), (3, 2)])
def test_a_restored_session_continues_with_the_same_bits(members: int, rank: int) -> None:
    """Also across a full window, where old steps are dropped."""
    model = world(members, rank)
    carry = start(model)
    play(model, carry, 0, 3)
    for first in (3, 9):
        restored = model.restore(carry.context)
        expected = play(model, carry, first, first + 3)
        actual = play(model, restored, first, first + 3)
        assert all(same(a, b) for a, b in zip(expected, actual, strict=True))
        assert [w.tokens for w in carry.windows] == [w.tokens for w in restored.windows]
        play(model, carry, first + 3, first + 6)
    assert any(len(window.steps) < 12 for window in carry.windows)


@pytest.mark.integration
@pytest.mark.parametrize(("members", "rank"), [(1, 0), (3, 2)])
def test_sessions_do_not_depend_on_their_batch(members: int, rank: int) -> None:
    model = world(members, rank)
    together = play(model, start(model), 0, 6)
    for row in (1, 3):
        carry = start(model)
        context = carry.context
        only = replace(
            context,
            task=context.task[row : row + 1],
            start=context.start[row : row + 1],
            steps=context.steps[row : row + 1],
            member=context.member[row : row + 1],
        )
        carry = model.restore(only)
        for step, expected in enumerate(together):
            action = [ACTIONS[(row + step) % len(ACTIONS)]]
            carry, out = model.step(carry, action, keys(4, step)[row : row + 1])
            assert same(expected, out, slice(row, row + 1))


def test_an_opinion_that_is_not_asked_for_changes_nothing() -> None:
    model = world(3, 2)
    first, second = start(model), start(model)
    for step in range(5):
        actions = [ACTIONS[(row + step) % 4] for row in range(4)]
        first, a = model.step(first, actions, keys(4, step), disagreement=step == 4)
        second, b = model.step(second, actions, keys(4, step))
        assert a.observation == b.observation and torch.equal(a.reward, b.reward)
    assert a.disagreement is not None and b.disagreement is not None
    assert torch.equal(a.disagreement, b.disagreement) and bool((a.disagreement > 0).all())


def test_equal_keys_give_equal_worlds_and_others_do_not() -> None:
    model = world()
    rows = [start(model), start(model)]
    one, two = (play(model, carry, 0, 2) for carry in rows)
    assert all(same(a, b) for a, b in zip(one, two, strict=True))
    _, out = model.step(start(model), ["look"] * 4, keys(4, 9))
    assert out.observation != one[0].observation


def test_temperature_zero_needs_no_key() -> None:
    model = world()
    model.temperature = 0.0
    outs = [model.step(start(model), ["look"] * 4, keys(4, step))[1] for step in (0, 7)]
    assert same(*outs)
    assert set(outs[0].reward.tolist()) <= {0.0, 0.5, 1.0}


def test_texts_end_at_the_longest_of_the_data() -> None:
    model = world()
    carry = start(model, 64)
    _, out = model.step(carry, ["look"] * 64, keys(64, 0))
    assert int(out.tokens.max()) <= model.longest
    assert bool(out.cut.any()) and not bool(out.cut.all())


@pytest.mark.parametrize("longest", [1, 10])
def test_a_text_of_exactly_the_longest_is_whole(longest: int) -> None:
    """Where its mark is drawn, the text, its nats and its outcome are those of a longer limit."""
    model, tight = world(3, 2), world(3, 2)
    _, expected = model.step(start(model, 64), ["look"] * 64, keys(64, 0))
    tight.longest = longest
    _, out = tight.step(start(tight, 64), ["look"] * 64, keys(64, 0))
    rows = ((expected.tokens == longest) & ~expected.cut).nonzero().squeeze(1).tolist()
    assert rows and not bool(out.cut[rows].any())
    assert [out.observation[row] for row in rows] == [expected.observation[row] for row in rows]
    for name in ("surprise", "disagreement", "reward", "terminated"):
        assert torch.equal(getattr(out, name)[rows], getattr(expected, name)[rows])
    assert bool(out.cut[expected.tokens > longest].all())


@pytest.mark.parametrize("longest", [1, 2])
def test_equal_members_agree_on_cut_texts(longest: int) -> None:
    model = world(3, 2)
    for name, parameter in model.net.named_parameters():
        if name.endswith("expand"):
            parameter.zero_()
    model.longest = longest
    _, out = model.step(start(model, 32), ["look"] * 32, keys(32, 0))
    assert bool(out.cut.any()) and out.disagreement is not None
    assert out.disagreement.tolist() == pytest.approx([0.0] * 32, abs=1e-5)


def test_reset_and_copies() -> None:
    model = world()
    carry = start(model)
    play(model, carry, 0, 2)
    copy = model.copy_rows(carry, torch.tensor([3, 0, 3]), torch.zeros(3, dtype=torch.int64))
    action, key = ["look"] * 4, keys(4, 2)
    _, expected = model.step(carry, action, key)
    _, copied = model.step(copy, action[:3], key[torch.tensor([3, 0, 3])])
    assert copied.observation == [expected.observation[row] for row in (3, 0, 3)]
    mask = torch.tensor([True, False] * 2)
    starts = [f"You are at the table {row}." for row in range(4)]
    carry = model.reset(carry, mask, [""] * 4, starts, torch.zeros(4, dtype=torch.int64))
    assert carry.observations[0] == starts[0] and carry.observations[1] == expected.observation[1]
    fresh = play(model, start(model), 0, 1)[0]
    assert play(model, carry, 0, 1)[0].observation[::2] == fresh.observation[::2]


@pytest.mark.parametrize("tasks", [False, True])
def test_starts_are_drawn_by_their_keys(tasks: bool) -> None:
    model = world(3, 2, tasks=tasks)
    key = keys(8, 0)
    task, observation = model.sample_start(key)
    assert model.sample_start(key[3:5]) == (task[3:5], observation[3:5])
    assert all(task) == any(task) == tasks and len(set(zip(task, observation, strict=True))) > 1
    model.begin(task, observation, torch.zeros(8, dtype=torch.int64))


@pytest.mark.parametrize("tasks", [False, True])
def test_generated_starts_fit_in_the_smallest_window(tasks: bool) -> None:
    """Random weights: a start's broken bytes become characters of three tokens each."""
    model = world(window=16 + 24, tasks=tasks)
    task, observation = model.sample_start(keys(64, 0))
    carry = model.begin(task, observation, torch.zeros(64, dtype=torch.int64))
    assert max(len(window.tokens) for window in carry.windows) == model.longest_start


@pytest.mark.parametrize("change", ["missing", "more"])
def test_a_heads_file_of_another_world_is_refused(tmp_path: Path, change: str) -> None:
    world(3, 2).save(tmp_path)
    file = tmp_path / "heads.safetensors"
    heads = load_file(file)
    name = next(name for name in sorted(heads) if "reward" in name)
    if change == "missing":
        del heads[name]
    else:
        name = "critic.weight"
        heads[name] = torch.zeros(1)
    save_file(heads, file)
    with pytest.raises(ArtifactError, match=f"the heads must have.*'{name}' is in only one"):
        TextWorld.load(tmp_path)


def test_files(tmp_path: Path) -> None:
    model = world(3, 2)
    model.disagreement_scale = 2.0
    model.save(tmp_path)
    loaded = TextWorld.load(tmp_path)
    a, b = (play(net, start(net), 0, 3) for net in (model, loaded))
    assert all(same(x, y) for x, y in zip(a, b, strict=True))
    about = json.loads((tmp_path / "world.json").read_text())
    (tmp_path / "world.json").write_text(json.dumps({**about, "schema": 0}))
    with pytest.raises(ArtifactError, match="schema 1, got 0"):
        TextWorld.load(tmp_path)
    (tmp_path / "world.json").write_text(json.dumps(about))
    (tmp_path / "heads.safetensors").unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        TextWorld.load(tmp_path)


def test_texts_that_do_not_fit_are_refused() -> None:
    model = world()
    with pytest.raises(UsageError, match=r"a start must have at most 112 tokens.*got \d+"):
        model.begin([""], ["?" * 200], torch.zeros(1, dtype=torch.int64))
    carry = start(model, 1)
    with pytest.raises(UsageError, match=r"an action must have at most \d+ tokens here"):
        model.step(carry, ["?" * 200], keys(1, 0))
    # The session goes on.
    first = play(model, carry, 0, 1)[0].observation
    assert first == play(model, start(model, 1), 0, 1)[0].observation
    with pytest.raises(UsageError, match=r"model\.context must be >= 40"):
        world(window=39)


@pytest.mark.parametrize("action", [["look", "?" * 200], ["?" * 200, "look"]])
def test_a_refused_action_leaves_full_windows_as_they_are(action: list[str]) -> None:
    model = world()
    carry, step = start(model, 2), 0
    while min(len(window.tokens) for window in carry.windows) + model.longest + 5 <= model.window:
        play(model, carry, step, step + 1)
        step += 1
    context, tokens = carry.context, [list(window.tokens) for window in carry.windows]
    lengths = carry.cache.length.tolist()
    with pytest.raises(UsageError, match=r"an action must have at most \d+ tokens here"):
        model.step(carry, action, keys(2, step))
    assert [window.tokens for window in carry.windows] == tokens
    assert carry.cache.length.tolist() == lengths
    restored = model.restore(context)
    assert same(*(play(model, c, step, step + 1)[0] for c in (carry, restored)))
