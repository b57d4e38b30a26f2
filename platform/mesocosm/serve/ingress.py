"""A served world over HTTP: JSON for people, the binary protocol for programs. The routes, what
guards them, and the server that listens.

Every route but /health wants the bearer token, before a byte of the body is read. An error is
{"detail": one sentence}: 400 what is wrong with the request, 401, 404 a session that is not kept,
408 a request that is late, 413, 503 no replica answers, or the server is full.

The server is a thread of the process that deployed the world. It is not Ray Serve's own proxy: of
2.60 that one answers /-/routes without a token, fails with 500 on a header byte that is not UTF-8,
shares a taken port silently (SO_REUSEPORT), and is one for all applications of a Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hmac
import logging
import socket
import threading
import time
from functools import partial
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, create_model
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as Event

from mesocosm import __version__
from mesocosm.data.format.space_json import space_to_json
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.serve.bearer import read_token
from mesocosm.serve.check import shown
from mesocosm.serve.connection import LOOPBACK, NotServed, ReplicaFailed
from mesocosm.serve.http_connection import CONNECTIONS, Connection, admit, serve
from mesocosm.serve.http_sessions import MAX_ENVS, UnknownSession, Visitors
from mesocosm.serve.schema import integer, json_type

logger = logging.getLogger(__name__)
BINARY = "/v1/call"
LARGEST_JSON, LARGEST_BINARY = 1 << 20, 1 << 24
"""Bytes of a body"""
HEALTH_S = 1.0
"""For so long an answer about health is given again: strangers may ask for it."""
BODY_S = 60.0
"""Seconds in which a request's whole body must arrive"""


class Guard:
    """ASGI: who may ask, and how much at once.

    401 without the token, 413 for too large a body, 408 for too slow a one, 503 for too many
    requests.
    A body without a length is counted while it is read, and never kept beyond its limit.
    """

    def __init__(self, app: ASGIApp, token: bytes):
        self.app = app
        self._token = token
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if scope["path"] == "/health" and scope["method"] == "GET":
            await self.app(scope, receive, send)
            return
        if not self._known(scope):
            said = (
                "this route wants the world's token; send the header 'Authorization: Bearer"
                " <token>'"
            )
            await JSONResponse({"detail": said}, 401, {"WWW-Authenticate": "Bearer"})(
                scope, receive, send
            )
            return
        if self._running >= CONNECTIONS:
            busy = f"{CONNECTIONS} requests are in work; send this one again later"
            await JSONResponse({"detail": busy}, 503)(scope, receive, send)
            return
        admit(scope)
        self._running += 1
        try:
            await self._limited(scope, receive, send)
        finally:
            self._running -= 1

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request with the token, within the limits of its body."""
        limit = LARGEST_BINARY if scope["path"] == BINARY else LARGEST_JSON
        told = [value for name, value in scope["headers"] if name == b"content-length"]
        if any(int(value) > limit for value in told):  # the server has refused what is no number
            await JSONResponse({"detail": _too_large(limit)}, 413)(scope, receive, send)
            return
        got = 0
        deadline = asyncio.get_running_loop().time() + BODY_S

        async def counted() -> Event:
            nonlocal got
            try:
                async with asyncio.timeout_at(deadline):
                    event = await receive()
            except TimeoutError as error:
                late = f"the body did not arrive within {BODY_S:g} s; send it at once"
                raise HTTPException(408, late) from error
            got += len(event.get("body", b""))
            if got > limit:
                raise HTTPException(413, _too_large(limit))
            return event

        await self.app(scope, counted, send)

    def _known(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        return hmac.compare_digest(token.strip(), self._token) and scheme.lower() == b"bearer"


def _too_large(limit: int) -> str:
    return f"the body is larger than {limit >> 20} MiB; send fewer environments at once"


# -- the bodies
# ----------------------------------------------------------------------------------------------------------

Token = Annotated[str, Field(pattern="^[0-9a-f]{32}$", description="as POST /v1/reset gave it")]
Seed: Any = integer(0, (1 << 63) - 1)
NumEnvs: Any = integer(1, MAX_ENVS)
Numbers = list[float | None]
Flags = list[bool]


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Problem(Model):
    detail: str


class Health(Model):
    status: str


class WorldInfo(Model):
    """Spaces as the world's codec.json has them; bounds that JSON has not are texts ("inf")."""

    world: str
    observation_space: dict[str, Any]
    action_space: dict[str, Any]
    members: int
    memory: int
    """Steps of history that the world reads; 0: none"""
    durations: bool
    task: list[str]
    """What is constant in an episode: keys of the observation, and reset options"""


class ResetRequest(Model):
    """Without a session a new one begins; with one, its episodes begin anew. Without a seed a new
    session has 0, and one that goes on has new episodes.
    """

    session: Token | None = None
    seed: Seed | None = None
    num_envs: NumEnvs | None = None


class ResetReply(Model):
    session: str
    world: str
    task: list[dict[str, bool | int | float | str]]
    """Reset options of each environment's task"""


class StepRequest(Model):
    session: Token


class StepReply(Model):
    """An environment that terminated or was truncated is reset by its next step, whose action,
    reward and disagreement mean nothing.
    """

    task: list[dict[str, bool | int | float | str]]
    reward: Numbers
    terminated: Flags
    truncated: Flags
    diverged: Flags
    """Truncated because what the world imagined was not finite"""
    disagreement: Numbers
    """How far the world's members differ; 1: what a tenth of held-out transitions exceed"""
    duration: Numbers | None
    """Seconds; null where the world has no durations"""


# -- the routes
# ----------------------------------------------------------------------------------------------------------


def routes(visitors: Visitors) -> FastAPI:
    """The application without its guard. Its OpenAPI schema has the world's own spaces."""
    app = FastAPI(
        title="A Mesocosm world",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    codec = visitors.codec
    action, observation = (
        json_type(codec.action_space, "Action"),
        json_type(codec.observation_space, "Observation", reply=True),
    )
    one_each = Field(min_length=1, max_length=MAX_ENVS, description="one for each environment")
    actions: Any = Annotated[list[action], one_each], ...  # type: ignore[valid-type]
    observations: Any = list[observation], ...  # type: ignore[valid-type]
    step_request = create_model("Step", __base__=StepRequest, action=actions)
    reset_reply = create_model("ResetReply", __base__=ResetReply, observation=observations)
    step_reply = create_model("StepReply", __base__=StepReply, observation=observations)
    statuses = (400, 401, 408, 413, 503)
    problems: dict[int | str, dict[str, Any]] = {status: {"model": Problem} for status in statuses}
    no_session: dict[int | str, dict[str, Any]] = {404: {"model": Problem}}
    probe: asyncio.Task[bool] | None = None
    probed = 0.0

    @app.get("/health", response_model=Health, responses={503: {"model": Health}})
    async def health() -> Response:
        """Whether a replica answers. Wants no token."""
        nonlocal probe, probed
        if probe is None or (probe.done() and time.monotonic() - probed > HEALTH_S):
            probe, probed = (
                asyncio.create_task(asyncio.to_thread(visitors.alive)),
                time.monotonic(),
            )  # its own threads: the others may all wait for a replica
        alive = await asyncio.shield(probe)
        return JSONResponse(
            {"status": "a replica answers" if alive else "no replica answers; see `serve status`"},
            200 if alive else 503,
        )

    @app.get("/v1/world", response_model=WorldInfo, responses=problems)
    def world() -> dict[str, Any]:
        """Which world is served, and its spaces."""
        spaces = {
            "observation_space": space_to_json(codec.observation_space),
            "action_space": space_to_json(codec.action_space),
        }
        task = [
            *codec.environment["task"],
            *(
                option.name
                for option in codec.options
                if option.name not in codec.environment["task"]
            ),
        ]
        facts = {
            "world": visitors.id,
            "members": visitors.members,
            "memory": visitors.memory,
            "durations": codec.spec.durations,
            "task": task,
        }
        return facts | spaces

    def reset(request: ResetRequest) -> Response:
        """Begin episodes in a new session or in one's own."""
        return JSONResponse(visitors.reset(request.session, request.seed, request.num_envs))

    def step(request: StepRequest) -> Response:
        """One step of every environment of a session."""
        return JSONResponse(visitors.step(request.session, request.action))  # type: ignore[attr-defined]

    step.__annotations__["request"] = step_request
    app.post("/v1/reset", response_model=reset_reply, responses=problems | no_session)(reset)
    app.post("/v1/step", response_model=step_reply, responses=problems | no_session)(step)

    @app.delete("/v1/sessions/{session}", status_code=204, responses=problems | no_session)
    def end(session: Annotated[Token, Path()]) -> None:
        """End a session."""
        visitors.end(session)

    binary = {
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    }

    @app.post(
        BINARY,
        response_class=Response,
        responses=problems | {200: binary},
        openapi_extra={"requestBody": binary | {"required": True}},
    )
    async def call(request: Request) -> Response:
        """One message of the binary protocol (platform/mesocosm/serve/protocol.py), and its
        reply.
        """
        return Response(
            await run_in_threadpool(visitors.call, await request.body()),
            media_type="application/octet-stream",
        )

    say_errors(app)
    schema = app.openapi()
    schema["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # FastAPI's own, which is a 400 here
            if path != "/health":
                operation["security"] = [{"token": []}]
    for unused in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(unused, None)
    return app


def say_errors(app: FastAPI) -> None:
    """Every error as one sentence; a bug's is in the log of the process that serves."""

    def handle(kind: type[Exception], status: int) -> None:
        def handler(request: Request, error: Exception) -> Response:
            return _problem(status, str(error))

        app.add_exception_handler(kind, handler)

    def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _problem(error.status_code, str(error.detail), error.headers)

    def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _problem(400, sentence(error))

    def bug(request: Request, error: Exception) -> Response:
        logger.error("%s %s failed", request.method, request.scope["path"], exc_info=error)
        return _problem(
            500, "the server failed on this request, which is a bug; its log says where"
        )

    handle(MesocosmError, 503)
    app.add_exception_handler(ReplicaFailed, bug)
    handle(UsageError, 400)
    handle(NotServed, 503)
    handle(UnknownSession, 404)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, bug)


def sentence(error: RequestValidationError) -> str:
    """The first thing that is wrong with a request: where, what was given, what is wanted."""
    first = error.errors()[0]
    where = (
        ".".join(str(part) for part in first["loc"] if part not in ("body", "path")) or "the body"
    )
    if first["type"] == "json_invalid":
        return (
            f"the body is not JSON ({first.get('ctx', {}).get('error', 'it cannot be read')}); send"
            " application/json"
        )
    given = "" if first["type"] == "missing" else f"={shown(first['input'])}"
    return (
        f"{where[:200]}{given}: {first['msg'][:1].lower()}{first['msg'][1:]}; GET /openapi.json"
        " says what each route takes"
    )


def _problem(status: int, detail: str, headers: Any = None) -> Response:
    return JSONResponse(
        {"detail": detail.encode("utf-8", "backslashreplace").decode()}, status, headers
    )


# -- the server
# ----------------------------------------------------------------------------------------------------------


class Listener:
    """A bound port of loopback, on which nobody answers until `serve`. Raises UsageError where the
    port is not to be had, or the token is no secret.
    """

    def __init__(self, port: int):
        self._token, self.token_source = read_token()
        try:
            self._socket = socket.create_server((LOOPBACK, port), backlog=128)
        except OSError as error:
            why = (
                "is taken"
                if error.errno == errno.EADDRINUSE
                else f"cannot be opened ({error.strerror})"
            )
            raise UsageError(
                f"serve.http={port}: the port {why} on {LOOPBACK}; set serve.http to another one,"
                " or to 0 for any free one"
            ) from error
        self.url = f"http://{LOOPBACK}:{self._socket.getsockname()[1]}"
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._visitors: Visitors | None = None

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def serve(self, app: str, world: str) -> None:
        """Answer for `world` of the application `app`, from a thread of this process."""
        self._visitors = Visitors(app, world)
        config = uvicorn.Config(
            Guard(routes(self._visitors), self._token),
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",  # it logs bugs again that we have logged, and a stranger's broken requests
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=5,
        )
        self._server = uvicorn.Server(config)
        run = partial(asyncio.run, serve(self._server, self._socket))
        self._thread = threading.Thread(target=run, name="http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop, after at most some seconds for requests that are being answered."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(10.0)
        with contextlib.suppress(OSError):
            self._socket.close()
        if self._visitors is not None:
            self._visitors.close()
