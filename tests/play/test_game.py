"""A played episode: undo, starts, and reality beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coin_grid import played
from factories import cart_root, fit_world
from gymnasium import spaces

from mesocosm.datasets import masks
from mesocosm.datasets.dataset import Dataset
from mesocosm.envs.config import BudgetConfig, RealityConfig
from mesocosm.envs.ledger import Ledger
from mesocosm.envs.make import facts_of
from mesocosm.envs.pixels import CoinGrid
from mesocosm.errors import UsageError
from mesocosm.model.config import ModelConfig
from mesocosm.pictures import png
from mesocosm.play.game import Difference, Game
from mesocosm.play.real_side import RealSide
from mesocosm.store.artifacts import Storage

LINE = spaces.Box(-np.inf, np.inf, (2,), np.float32), spaces.Box(-1.0, 1.0, (1,), np.float32)


def moments(game: Game) -> list[tuple[Any, ...]]:
    """The numbers of the episode."""
    return [
        (np.asarray(m.observation).tolist(), m.reward, m.disagreement) for m in game.state().moments
    ]


@pytest.mark.parametrize("family", ["ensemble", "sequence"])
def test_undo_returns_to_the_same_bits(play: Any, family: str) -> None:
    game = play(family=family, terminal=0.0)
    for action in (0, 1, 1, 0):
        game.step(action)
    before = moments(game)
    for _ in range(3):
        game.undo()
    assert moments(game) == before[:2] and game.state().undoable
    for action in (1, 1, 0):
        game.step(action)
    assert moments(game) == before
    game.undo()
    game.step(1)
    assert moments(game)[-1] != before[-1]
    while game.state().undoable:
        game.undo()
    with pytest.raises(UsageError, match="there is no step to undo"):
        game.undo()


def test_the_same_start_begins_the_same_episode(play: Any) -> None:
    game = play(terminal=0.0)
    game.step(1)
    first = moments(game)
    game.begin("generated", 0, 7)
    assert moments(game) != first[:1]
    game.begin("generated", 0, 0)
    game.step(1)
    assert moments(game) == first


def test_an_ended_episode_takes_no_step(play: Any) -> None:
    game = play(terminal=1.0)
    while not game.state().over:
        game.step(0)
    steps = game.state().steps
    with pytest.raises(UsageError, match=rf"terminated at step {steps}; begin again, or undo"):
        game.step(0)
    assert game.undo().steps == steps - 1 and not game.state().over
    short = play(terminal=0.0)
    for _ in range(20):
        short.step(0)
    assert short.state().moments[-1].truncated


def test_a_world_of_one_member_has_no_disagreement(play: Any) -> None:
    game = play(members=1)
    assert game.step(0).moments[0].disagreement is None and game.members == 1


@pytest.fixture
def cart(tmp_path: Path) -> tuple[Storage, Any]:
    """A storage with a world of CartPole-v1 and its data."""
    storage = Storage(cart_root(tmp_path, 200))
    data = Dataset([storage.artifact("datasets", "cart").path])
    world = fit_world(data, ModelConfig("ensemble", "10k", members=2, context=4, base=False))
    storage.make("worlds", "w", {"inputs": {"datasets": ["cart"]}}, world.save)
    return storage, world


def beside(storage: Storage, steps: int) -> RealSide:
    budget = BudgetConfig(steps)
    config = RealityConfig(env="CartPole-v1", budget=budget)
    return RealSide(config, Ledger(storage, "cart-played", budget))


def test_reality_beside_a_logged_start(cart: tuple[Storage, Any]) -> None:
    """Reality begins at the logged state, and every reset and step is on the bill. What the budget
    does not pay for is not taken, and the world goes on.
    """
    storage, world = cart
    game = Game(world, "w", storage, beside(storage, 2), horizon=500)
    assert list(game.splits()) == ["generated", "logged", "reality"]
    state = game.begin("generated", 0, 0)
    assert not state.beside and "imagined this start" in str(state.note)
    assert state.bill is not None and (state.bill.steps, state.bill.resets) == (0, 0)

    state = game.begin("logged", 1, 5)
    (first,) = state.moments
    assert state.beside and first.real is not None and first.difference is not None
    np.testing.assert_allclose(first.observation, first.real.observation, atol=1e-5)
    assert first.difference.numbers == pytest.approx(0.0, abs=1e-3)
    assert first.real.picture is not None or "rendering failed" in str(state.picture_note)
    (moment,) = game.step(1).moments
    assert moment.real is not None and moment.real.reward == moment.real.total == 1.0
    assert moment.difference is not None and moment.difference.numbers
    state = game.step(0)
    assert state.bill is not None and (state.bill.steps, state.bill.resets) == (2, 1)
    assert state.bill.remaining == 0 and state.beside
    state = game.step(0)
    assert not state.beside and "reality.budget.steps=2 is spent" in str(state.note)
    assert state.moments[0].real is None and state.bill is not None and state.bill.steps == 2
    game.close()


@pytest.mark.integration
def test_reality_draws_a_start(cart: tuple[Storage, Any]) -> None:
    storage, world = cart
    game = Game(world, "w", storage, beside(storage, 50), horizon=500)
    (first,) = game.begin("reality", 0, 3).moments
    assert first.real is not None
    np.testing.assert_allclose(first.observation, first.real.observation, atol=1e-6)
    state = game.state()
    while state.beside:
        state = game.step(1)
    assert "real episode terminated after step" in str(state.note)
    last = state.moments[-1]
    assert last.real is not None and last.real.terminated
    assert "imagined this start" in str(game.begin("generated", 0, 3).note)
    revision = game.begin("reality", 0, 3).revision
    game.step(0)
    state = game.undo()
    assert state.revision == revision + 2
    assert not state.beside and state.note == "reality cannot be undone; restart to step it again"
    assert game.step(1).moments[0].real is None
    game.close()


@pytest.mark.parametrize(
    ("trouble", "note"), [("crash", "raised RuntimeError: the arm fell off"), ("nan", "gave NaN")]
)
def test_a_failing_environment_leaves_the_world(
    trouble: str, note: str, real: Any, play: Any
) -> None:
    game = play(*LINE, real=real("drawn:Drawn", trouble=trouble), terminal=0.0)
    game.begin("reality", 0, 1)
    for _ in range(4):
        state = game.step([0.5])
    assert not state.beside and note in str(state.note) and state.steps == 4
    assert state.bill is not None and state.bill.steps == 3, "a failed step may have happened"
    assert state.bill.price == 3 * 0.5 + 2.0
    state = game.begin("reality", 0, 1)
    assert state.beside and state.moments[0].real.picture.startswith("data:image/png;base64,")


def test_a_budget_that_pays_no_reset(play: Any, real: Any) -> None:
    """The episode goes on where a start cannot be had."""
    game = play(*LINE, real=real("drawn:Drawn", steps=0), terminal=0.0)
    game.step([0.0])
    with pytest.raises(UsageError, match=r"reality has no start: .*reality\.budget\.steps=0"):
        game.begin("reality", 0, 1)
    assert game.state().steps == 1


def test_a_mask_forbids(play: Any) -> None:
    facts = facts_of(RealityConfig(env="mesocosm.envs.items:Items"))
    game = play(facts.observation_space, facts.action_space, terminal=0.0)
    mask = np.asarray(game.state().moments[-1].observation["action_mask"], bool)
    assert mask.any() and not mask.all()
    actions = [masks.action_at(facts.action_space, place).tolist() for place in range(len(mask))]
    forbidden, allowed = int(np.flatnonzero(~mask)[0]), int(np.flatnonzero(mask)[0])
    with pytest.raises(UsageError, match=r"one that observation\.action_mask allows, got \[.*\]"):
        game.step(actions[forbidden])
    assert game.state().steps == 0 and game.step(actions[allowed]).steps == 1


def test_a_text_world() -> None:
    pytest.importorskip("tokenizers")
    from serve.test_text_world import text_world

    game = Game(text_world(members=2), "t", Storage("."), horizon=20)
    (first,) = game.begin("generated", 0, 2).moments
    assert isinstance(first.observation, str) and isinstance(first.commands, list)
    moment = game.step("take mug").moments[0]
    assert isinstance(moment.observation, str) and moment.action == "take mug"
    assert moment.disagreement is not None
    game.undo()
    assert game.step("take mug").moments[0].observation == moment.observation


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 1), (2, 7, 3), (4, 4, 4)])
def test_a_png_holds_the_picture(shape: tuple[int, ...]) -> None:
    image = pytest.importorskip("PIL.Image")
    import io

    picture = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    assert (np.asarray(image.open(io.BytesIO(png(picture)))) == picture.squeeze()).all()
    with pytest.raises(UsageError, match=r"uint8 array \[height, width, 1, 3 or 4\], got float64"):
        png(np.zeros((2, 2)))


def test_frames_are_compared_by_their_levels(coin_grid: Game) -> None:
    """A real frame is in the dictionary, so that the world begins with it; its levels then differ
    by what their root mean square says.
    """
    start = coin_grid.begin("reality", 0, 5).moments[0]
    assert start.real is not None and start.difference == Difference(None, 0, 0.0)
    assert np.array_equal(start.observation, start.real.observation)
    for _ in range(4):
        (moment,) = coin_grid.step(1).moments
        assert moment.real is not None and moment.difference is not None
        gap = moment.observation.astype(float) - moment.real.observation
        assert moment.difference.pixels == pytest.approx(np.sqrt((gap**2).mean()))
    assert moment.difference.pixels > 0, "an untrained world"


def test_a_logged_start_whose_reality_is_outside_its_space_is_not_beside(
    coin_grid: Game, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The world begins there alone, and no real step of another episode is paid."""
    episode = played(3)
    monkeypatch.setattr(coin_grid._tasks, "start", lambda split, index: None)
    monkeypatch.setattr(coin_grid._tasks, "episode", lambda index: episode)
    monkeypatch.setattr(CoinGrid, "_frame", lambda self: np.zeros((8, 8, 3), np.uint8))
    state = coin_grid.begin("logged", 3, 0)
    assert not state.beside and "observation" in str(state.note)
    assert coin_grid.step(1).moments[0].real is None
