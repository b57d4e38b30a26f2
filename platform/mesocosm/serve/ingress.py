"""A served world over HTTP: JSON for interactive clients, the binary protocol for programs, and
OpenEnv's protocol for trainers of language models.

Every route but /health requires the bearer token, before a byte of the body is read. An error is
{"detail": message}.

The server is a thread of the process that deployed the world, rather than Ray Serve's proxy. That
proxy (of 2.60) answers /-/routes without a token, fails with 500 on a header byte that is not
UTF-8, shares a taken port silently (SO_REUSEPORT), and is one for all applications of a Ray.
FastAPI's security dependencies cannot replace `http_guard.Guard`, which checks the token: they run
after the body has been read.
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from typing import Annotated, Any

from fastapi import FastAPI, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import Field, create_model
from starlette.concurrency import run_in_threadpool

from mesocosm import __version__
from mesocosm.datasets.space_json import space_to_json
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.serve.bearer import read_token
from mesocosm.serve.check import shown
from mesocosm.serve.connection import NotServed, ReplicaFailed
from mesocosm.serve.http_guard import BINARY, Guard, problem_reply
from mesocosm.serve.http_server import LoopbackServer
from mesocosm.serve.http_sessions import MAX_ENVS, HttpSessions, UnknownSession, to_json
from mesocosm.serve.openenv import add_openenv
from mesocosm.serve.plan_route import add_route
from mesocosm.serve.schema import Model, integer, json_type
from mesocosm.serve.tasks import UnknownTask
from mesocosm.store.artifacts import Storage

logger = logging.getLogger(__name__)
HEALTH_S = 1.0
"""Seconds for which a health answer is reused: anybody may ask"""


# -- the bodies

Token = Annotated[str, Field(pattern="^[0-9a-f]{32}$", description="as POST /v1/reset returns it")]
Seed: Any = integer(0, (1 << 63) - 1)
NumEnvs: Any = integer(1, MAX_ENVS)
TaskOptions = list[dict[str, bool | int | float | str]]
Numbers = list[float | None]
Flags = list[bool]


class Problem(Model):
    detail: str


class WorldInfo(Model):
    """Spaces as in the world's codec.json; infinite bounds are strings ("inf")."""

    world: str
    observation_space: dict[str, Any]
    action_space: dict[str, Any]
    members: int
    memory: int
    """Steps of history that the world reads; 0 for none"""
    durations: bool
    task: list[str]
    """Constants of an episode: keys of the observation, and reset options"""


class ResetRequest(Model):
    """Without a session a new one begins. With a session its episodes begin again. Without a seed,
    a new session has seed 0, and an existing session has new episodes.
    """

    session: Token | None = None
    seed: Seed | None = None
    num_envs: NumEnvs | None = None


class ResetReply(Model):
    session: str
    world: str
    task: TaskOptions
    """Reset options of each environment's task"""


class StepRequest(Model):
    session: Token
    disagreement: bool = True
    """False saves time: the reply's disagreement is null, and nothing else changes"""


class StepReply(Model):
    """An environment that terminated or was truncated is reset by its next step, which ignores the
    action and has no reward or disagreement.
    """

    task: TaskOptions
    reward: Numbers
    terminated: Flags
    truncated: Flags
    diverged: Flags
    """Truncated because the imagined observation was not finite"""
    disagreement: Numbers | None
    """How far the world's members differ; 1 is what a tenth of held-out transitions exceed; null
    where the request did not ask for it
    """
    duration: Numbers | None
    """Seconds; null where the world has no durations"""


# -- the routes


def routes(sessions: HttpSessions) -> FastAPI:
    """The application without its guard. Its OpenAPI schema has the world's own spaces."""
    off: dict[str, Any] = {"docs_url": None, "redoc_url": None, "redirect_slashes": False}
    app = FastAPI(title="A Mesocosm world", version=__version__, **off)
    codec = sessions.codec
    action: Any = json_type(codec.action_space, "Action")
    observation: Any = json_type(codec.observation_space, "Observation", reply=True)
    one_each = Field(min_length=1, max_length=MAX_ENVS, description="one for each environment")
    actions: Any = Annotated[list[action], one_each], ...
    observations: Any = list[observation], ...
    step_request = create_model("Step", __base__=StepRequest, action=actions)
    reset_reply = create_model("ResetReply", __base__=ResetReply, observation=observations)
    step_reply = create_model("StepReply", __base__=StepReply, observation=observations)
    problem = {"model": Problem}
    problems: dict[int | str, Any] = dict.fromkeys((400, 401, 408, 413, 503), problem)
    with_session = problems | {404: problem}
    status = dict[str, str]
    probe: asyncio.Task[bool] | None = None
    probed = 0.0

    @app.get("/health", response_model=status, responses={503: {"model": status}})
    async def health() -> Response:
        """True if a replica answers. Requires no token."""
        nonlocal probe, probed
        if probe is None or (probe.done() and time.monotonic() - probed > HEALTH_S):
            # A thread outside the pool, whose threads may all wait for a replica.
            probe = asyncio.create_task(asyncio.to_thread(sessions.alive))
            probed = time.monotonic()
        if await asyncio.shield(probe):
            return JSONResponse({"status": "healthy"})
        detail = "no replica answers; see `serve status`"
        return JSONResponse({"status": "unhealthy", "detail": detail}, 503)

    @app.get("/v1/world", response_model=WorldInfo, responses=problems)
    def world() -> WorldInfo:
        """The served world and its spaces."""
        keys = codec.environment["task"]
        return WorldInfo(
            world=sessions.id,
            observation_space=space_to_json(codec.observation_space),
            action_space=space_to_json(codec.action_space),
            members=sessions.members,
            memory=sessions.memory,
            durations=codec.spec.durations,
            task=[*keys, *(o.name for o in codec.options if o.name not in keys)],
        )

    def reset(request: ResetRequest) -> Response:
        """Begin episodes in a new session or in an existing one."""
        reply = sessions.reset(request.session, request.seed, request.num_envs)
        return Response(to_json(reply), media_type="application/json")

    def step(request: Any) -> Response:
        """Step every environment of a session."""
        reply = sessions.step(request.session, request.action, request.disagreement)
        return Response(to_json(reply), media_type="application/json")

    step.__annotations__["request"] = step_request
    app.post("/v1/reset", response_model=reset_reply, responses=with_session)(reset)
    app.post("/v1/step", response_model=step_reply, responses=with_session)(step)

    @app.delete("/v1/sessions/{session}", status_code=204, responses=with_session)
    def end(session: Annotated[Token, Path()]) -> None:
        """End a session."""
        sessions.end(session)

    if sessions.plans:
        add_route(app, sessions, problems)
    add_openenv(app, sessions, with_session)

    content = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    replies = problems | {200: {"content": content}}
    body = {"requestBody": {"content": content, "required": True}}

    @app.post(BINARY, response_class=Response, responses=replies, openapi_extra=body)
    async def call(request: Request) -> Response:
        """One message of the binary protocol (platform/mesocosm/serve/protocol.py), and its
        reply.
        """
        reply = await run_in_threadpool(sessions.call, await request.body())
        return Response(reply, media_type="application/octet-stream")

    handle_errors(app)
    schema = app.openapi()
    schema["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # FastAPI's validation error is a 400 here
            if path != "/health":
                operation["security"] = [{"token": []}]
    for unused in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(unused, None)
    return app


def handle_errors(app: FastAPI) -> None:
    """Answer every error with one sentence. A bug's traceback goes to the server's log."""

    def refuse(status: int, request: Request, error: Exception) -> Response:
        return problem_reply(status, str(error))

    def invalid(request: Request, error: Any) -> Response:
        return problem_reply(400, validation_message(error))

    def bug(request: Request, error: Exception) -> Response:
        logger.error("%s %s failed", request.method, request.scope["path"], exc_info=error)
        return problem_reply(500, "the server failed on this request, which is a bug; see its log")

    statuses: dict[type[MesocosmError], int] = {MesocosmError: 503, UsageError: 400}
    statuses |= {NotServed: 503, UnknownSession: 404, UnknownTask: 404}
    for kind, status in statuses.items():
        app.add_exception_handler(kind, partial(refuse, status))
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(ReplicaFailed, bug)
    app.add_exception_handler(Exception, bug)


def validation_message(error: RequestValidationError) -> str:
    """The first error of a request: its key, the value and what is expected."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "it cannot be read")
        return f"the body is not JSON ({reason}); send application/json"
    keys = [str(part) for part in first["loc"] if part not in ("body", "path")]
    key = ".".join(keys) or "the body"
    value = "" if first["type"] == "missing" else f"={shown(first['input'])}"
    expected = f"{first['msg'][:1].lower()}{first['msg'][1:]}"
    return f"{key[:200]}{value}: {expected}; see GET /openapi.json"


# -- the server


class Listener(LoopbackServer):
    """The ingress of a world. It answers no requests until `serve`.

    Raises:
        UsageError: The port is not available, or the token is not secret.
    """

    sessions: HttpSessions | None = None

    def __init__(self, port: int):
        self._token, self.token_source = read_token()
        super().__init__(port, "serve.http")

    def serve(self, app: str, world: str, storage: Storage | None = None) -> None:
        """Answer for `world` of the application `app`, from a thread of this process.

        Args:
            app: Name of the application.
            world: The world, as the application's replicas look it up.
            storage: The storage of the world's data, whose starts clients may request, or None.
        """
        self.sessions = HttpSessions(app, world, storage)
        self.start(Guard(routes(self.sessions), self._token))

    def close(self) -> None:
        """Stop. Requests that are being answered have a few seconds to finish."""
        super().close()
        if self.sessions is not None:
            self.sessions.close()
