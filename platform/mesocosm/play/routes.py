"""The HTTP routes of a played world: its page, and the requests of the page.

Files of the page are public and hold nothing of the world. Every other route requires the bearer
token, which is in the page's address after the #. Browsers do not send that part. An error is
{"detail": message}.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import gymnasium
from fastapi import FastAPI, Request, Response
from pydantic import create_model

from mesocosm import __version__
from mesocosm.datasets.images import image_spaces
from mesocosm.datasets.space_json import space_to_json
from mesocosm.play.game import Game, GameState, Moment
from mesocosm.serve.http_guard import Guard
from mesocosm.serve.http_sessions import to_json
from mesocosm.serve.ingress import handle_errors
from mesocosm.serve.json_pictures import to_strings
from mesocosm.serve.schema import Model, integer, json_type
from mesocosm.serve.tasks import GENERATED
from mesocosm.shipped import PAGE_STYLE

T = TypeVar("T")
PAGE = Path(__file__).parent / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
Seed: Any = integer(0, (1 << 31) - 1)


class Runner(Protocol):
    """Runs a function in the thread of the game."""

    def __call__(self, function: Callable[[], T], /) -> T: ...


class BeginRequest(Model):
    split: str = GENERATED
    """The kind of start: `generated`, `logged` or `reality`"""
    index: Seed = 0
    """The logged start"""
    seed: Seed = 0


class ActRequest(Model):
    """The base of a step's request, which has an `action` of the world's space."""


@dataclass(frozen=True)
class PlayedWorld:
    """The played world."""

    world: str
    environment: str
    members: int
    observation_space: dict[str, Any]
    action_space: dict[str, Any]
    splits: dict[str, int]
    horizon: int | None
    reality: str | None
    """The real environment that is stepped with the world."""


def page_files() -> dict[str, Path]:
    """The page's files by their path in the address."""
    files = {f"/{path.name}": path for path in PAGE.iterdir() if path.suffix in TYPES}
    return files | {"/": PAGE / "index.html", "/page.css": PAGE_STYLE}


def application(game: Game, run: Runner, token: str) -> Guard:
    """The application of a game.

    Args:
        game: The game, used in the thread of `run` alone.
        run: Runs its functions.
        token: The bearer token.
    """
    files = page_files()
    return Guard(routes(game, run, files), token.encode(), public=files)


def routes(game: Game, run: Runner, files: dict[str, Path]) -> FastAPI:
    """The application without its guard."""
    off: dict[str, Any] = {"docs_url": None, "redoc_url": None, "redirect_slashes": False}
    app = FastAPI(title="A played world", version=__version__, **off)
    action: Any = json_type(game.codec.action_space, "Action")
    act_request = create_model("Act", __base__=ActRequest, action=(action, ...))

    def reply(function: Callable[[], GameState]) -> Response:
        body = to_json(with_pictures(run(function), game.codec.observation_space))
        return Response(body, media_type="application/json", headers=HEADERS)

    @app.get("/v1/play")
    def play() -> Response:
        """The world, and the whole episode."""

        def describe() -> dict[str, Any]:
            state = with_pictures(game.state(), game.codec.observation_space)
            return {"about": about(game), "state": state}

        return Response(to_json(run(describe)), media_type="application/json", headers=HEADERS)

    @app.post("/v1/begin")
    def begin(request: BeginRequest) -> Response:
        """Begin an episode."""
        return reply(lambda: game.begin(request.split, request.index, request.seed))

    def act(request: Any) -> Response:
        """Take an action."""
        return reply(lambda: game.step(request.action))

    act.__annotations__["request"] = act_request
    app.post("/v1/step")(act)

    @app.post("/v1/undo")
    def undo() -> Response:
        """Undo the last step."""
        return reply(game.undo)

    def file(request: Request) -> Response:
        path = files[request.url.path]
        return Response(path.read_bytes(), media_type=TYPES[path.suffix], headers=HEADERS)

    for path in files:
        app.get(path, include_in_schema=False)(file)
    handle_errors(app)
    return app


def with_pictures(state: GameState, space: gymnasium.Space[Any]) -> GameState:
    """The state with each image of its observations as base64 of a PNG."""
    if not image_spaces(space):
        return state

    def shown(moment: Moment) -> Moment:
        real = moment.real
        if real is not None:  # one outside its space has no difference, and is not shown
            seen = None if moment.difference is None else to_strings(space, real.observation)
            real = replace(real, observation=seen)
        return replace(moment, observation=to_strings(space, moment.observation), real=real)

    return replace(state, moments=[shown(moment) for moment in state.moments])


def about(game: Game) -> PlayedWorld:
    """The facts of a game's world."""
    codec = game.codec
    return PlayedWorld(
        world=game.id,
        environment=codec.environment["id"],
        members=game.members,
        observation_space=space_to_json(codec.observation_space),
        action_space=space_to_json(codec.action_space),
        splits=game.splits(),
        horizon=game.horizon,
        reality=None if game.real is None else game.real.config.env,
    )
