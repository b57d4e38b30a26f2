"""Played worlds, with a client of their page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serve.worlds import untrained
from starlette.testclient import TestClient

from mesocosm.envs.config import BudgetConfig, PriceConfig, RealityConfig
from mesocosm.envs.ledger import Ledger
from mesocosm.envs.make import facts_of
from mesocosm.model.tokenizer.dictionary import PatchDictionary
from mesocosm.play.game import Game
from mesocosm.play.real_side import RealSide
from mesocosm.play.routes import application
from mesocosm.store.artifacts import Storage

SAMPLES = Path(__file__).parents[1] / "sample_envs"
Real = Callable[..., RealSide]


@pytest.fixture
def real(root: str, monkeypatch: pytest.MonkeyPatch) -> Real:
    """Makes a real side of an environment, with a budget of steps."""
    monkeypatch.syspath_prepend(SAMPLES)

    def make(env: str, steps: int = 100, **kwargs: Any) -> RealSide:
        budget, price = BudgetConfig(steps), PriceConfig(per_step=0.5, per_reset=2.0)
        config = RealityConfig(env=env, kwargs=kwargs, budget=budget, price=price)
        return RealSide(config, Ledger(Storage(root), "played", budget, price))

    return make


@pytest.fixture
def play(root: str) -> Iterator[Callable[..., Game]]:
    """Makes a game of an untrained world, and begins it. `spaces` are of `untrained`."""
    games: list[Game] = []

    def make(*spaces: Any, real: RealSide | None = None, **world: Any) -> Game:
        game = Game(untrained(*spaces, **world), "w", Storage(root), real, horizon=20)
        games.append(game)
        game.begin("generated", 0, 0)
        return game

    yield make
    for game in games:
        game.close()


@pytest.fixture
def coin_grid(play: Callable[..., Game], real: Real, dictionary: PatchDictionary) -> Game:
    """A game of an untrained world of CoinGrid, whose frames are exact in codes, beside reality."""
    return image_game(play, real("mesocosm.envs.pixels:CoinGrid"), dictionary)


@pytest.fixture
def seeing(play: Callable[..., Game], real: Real) -> Game:
    """A game of an untrained world that sees a picture and a number, beside reality."""
    table = np.zeros((2, 4 * 4 * 3), np.uint8)
    table[1] = 200
    return image_game(play, real("seen:Seen"), PatchDictionary((8, 8, 3), 4, table))


def image_game(play: Callable[..., Game], side: RealSide, tokenizer: PatchDictionary) -> Game:
    """A game of an untrained world of an environment with one image, beside reality."""
    world = {"family": "sequence", "terminal": 0.0, "tokenizers": (tokenizer,)}
    return play(*facts_of(side.config).spaces, real=side, **world)


def client_of(game: Game) -> TestClient:
    """A client with the token, whose requests run in this thread."""
    app = application(game, lambda function: function(), "a-token")
    client = TestClient(app, raise_server_exceptions=False)
    client.headers["Authorization"] = "Bearer a-token"
    return client
