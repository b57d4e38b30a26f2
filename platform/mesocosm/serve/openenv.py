"""OpenEnv's wire protocol (of openenv 0.10) at the HTTP ingress: trainers of language models, such
as TRL, verifiers and SkyRL, use a served world as they use any OpenEnv server.

`GET /health`, `/metadata` and `/schema`, the task routes, and the WebSocket `/ws`: each connection
is one session (`openenv_session`). OpenEnv's own POST /reset and /step keep no session and are left
out. All but /health require the token.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from fastapi import FastAPI, WebSocket
from starlette.websockets import WebSocketDisconnect, WebSocketState

from mesocosm import __version__
from mesocosm.errors import MesocosmError
from mesocosm.serve.http_sessions import MAX_SESSIONS, HttpSessions, PoolFull
from mesocosm.serve.openenv_session import (
    EpisodeState,
    OpenEnvSession,
    SessionOver,
    TextObservation,
    action_schema,
    error_reply,
)
from mesocosm.serve.schema import Model
from mesocosm.serve.tasks import Tasks

ENVIRONMENT = "world"
"""The name of the environment in the task routes"""
EVICTED_S = 30.0
"""Seconds between two checks whether a silent client's session was evicted"""


class Metadata(Model):
    name: str
    description: str
    version: str


class Schemas(Model):
    """JSON schemas of the messages' contents."""

    action: dict[str, Any]
    observation: dict[str, Any]
    state: dict[str, Any]


class Split(Model):
    name: str
    type: str


class SplitRequest(Model):
    split: str


class TaskRequest(SplitRequest):
    index: int


class RangeRequest(SplitRequest):
    start: int | None = None
    stop: int | None = None


class TaskCount(Model):
    num_tasks: int


class OneTask(Model):
    task: dict[str, Any]
    """Arguments of a reset"""


class TaskRange(Model):
    tasks: list[dict[str, Any]]
    """Arguments of a reset for each of at most 1000 tasks"""


class TaskList(TaskRange):
    env_name: str


def add_openenv(app: FastAPI, sessions: HttpSessions, responses: dict[int | str, Any]) -> None:
    """Add the routes to the ingress of `sessions`; `responses` are their errors, for OpenAPI."""
    codec = sessions.codec
    tasks = Tasks(sessions.storage, sessions.id, codec)
    action, state = action_schema(codec.action_space), EpisodeState.model_json_schema()
    # As many threads as sessions: the replicas batch what arrives together.
    workers = ThreadPoolExecutor(MAX_SESSIONS, thread_name_prefix="openenv")

    @app.get("/metadata", response_model=Metadata, responses=responses)
    def metadata() -> Metadata:
        """The name of the world."""
        environment = codec.environment["id"]
        description = f"a learned world of {environment}, served by Mesocosm"
        return Metadata(name=sessions.id, description=description, version=__version__)

    @app.get("/schema", response_model=Schemas, responses=responses)
    def schema() -> Schemas:
        """The schemas of actions, observations and states."""
        observation = TextObservation.model_json_schema()
        return Schemas(action=action, observation=observation, state=state)

    @app.get("/list_environments", responses=responses)
    def environments() -> list[str]:
        """The names of the environments in the task routes: this one alone."""
        return [ENVIRONMENT]

    @app.get(f"/{ENVIRONMENT}/splits", response_model=list[Split], responses=responses)
    def splits() -> list[Split]:
        """The splits: tasks that the world draws, and the starts of its data."""
        return [Split(name=name, type="train") for name in tasks.splits()]

    @app.post(f"/{ENVIRONMENT}/num_tasks", response_model=TaskCount, responses=responses)
    def count(request: SplitRequest) -> TaskCount:
        """The number of tasks of a split."""
        return TaskCount(num_tasks=tasks.count(request.split))

    @app.post(f"/{ENVIRONMENT}/tasks", response_model=TaskList, responses=responses)
    def listed(request: SplitRequest) -> TaskList:
        """The first 1000 tasks of a split."""
        return TaskList(tasks=tasks.listed(request.split, None, None), env_name=ENVIRONMENT)

    @app.post(f"/{ENVIRONMENT}/task", response_model=OneTask, responses=responses)
    def one(request: TaskRequest) -> OneTask:
        """One task."""
        tasks.start(request.split, request.index)
        return OneTask(task={"split": request.split, "index": request.index})

    @app.post(f"/{ENVIRONMENT}/task_range", response_model=TaskRange, responses=responses)
    def some(request: RangeRequest) -> TaskRange:
        """The tasks from `start` to `stop` as a slice has them, at most 1000."""
        return TaskRange(tasks=tasks.listed(request.split, request.start, request.stop))

    @app.websocket("/ws")
    async def connect(socket: WebSocket) -> None:
        await converse(socket, sessions, tasks, workers)


async def converse(
    socket: WebSocket, sessions: HttpSessions, tasks: Tasks, workers: ThreadPoolExecutor
) -> None:
    """Answer one client until it closes, disappears or is evicted; then its place is free.

    Args:
        socket: The connection.
        sessions: The sessions of the ingress.
        tasks: The world's tasks.
        workers: Threads in which the session waits for its replica.
    """
    loop = asyncio.get_running_loop()
    session: OpenEnvSession | None = None
    await socket.accept()
    try:
        session = await loop.run_in_executor(workers, OpenEnvSession, sessions, tasks)
        while True:
            text = await next_message(socket, session)
            reply = await loop.run_in_executor(workers, session.answer, text)
            if reply is None:
                return
            await socket.send_text(reply)
    except WebSocketDisconnect:
        return
    except SessionOver as over:
        await socket.send_text(str(over))
    except PoolFull as error:
        await socket.send_text(error_reply("CAPACITY_REACHED", str(error)))
    except MesocosmError as error:
        await socket.send_text(error_reply("FACTORY_ERROR", str(error)))
    finally:
        if session is not None:
            await asyncio.shield(loop.run_in_executor(workers, session.close))
        if socket.application_state is WebSocketState.CONNECTED:
            with suppress(RuntimeError, WebSocketDisconnect):
                await socket.close()


async def next_message(socket: WebSocket, session: OpenEnvSession) -> str:
    """The next message, as text.

    Raises:
        WebSocketDisconnect: The client is gone.
        SessionOver: The session was evicted while the client was silent.
    """
    while True:
        try:
            async with asyncio.timeout(EVICTED_S):
                event = await socket.receive()
        except TimeoutError:
            session.check()
            continue
        if event["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(event.get("code", 1000))
        data = event.get("text") or event.get("bytes") or b""
        return data if isinstance(data, str) else data.decode("utf-8", "replace")
