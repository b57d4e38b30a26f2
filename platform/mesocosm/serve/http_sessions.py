"""Who comes to a served world over HTTP: sessions of people, which are kept here, and programs,
whose messages are passed on.
"""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from gymnasium.error import ResetNeeded

from mesocosm.data.format.spaces import SpaceCodec
from mesocosm.data.loading.codec import Codec
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.serve.client import WorldVectorEnv
from mesocosm.serve.connection import Served, reply_of
from mesocosm.serve.protocol import Message, pack, unpack
from mesocosm.serve.schema import to_batch, to_json

MAX_ENVS = 4096
"""Environments of one session"""
MAX_SESSIONS, MAX_TOTAL_ENVS = 64, 16384
"""Sessions of people kept, and environments in all of them"""
IDLE_S = 300.0
"""Seconds after which a session that is unused makes room for a new one"""
DEADLINE_S, HEALTH_DEADLINE_S = 60.0, 2.0
"""How long a replica may take, its replacement included"""

T = TypeVar("T")


@dataclass
class Held(Generic[T]):
    """Something of one client, which one request at a time uses."""

    weight: int
    value: T | None = None
    """None until the first request has made it"""
    lock: threading.Lock = field(default_factory=threading.Lock)
    closed: bool = False
    used: float = field(default_factory=time.monotonic)
    """When a request last asked for it, by `time.monotonic`"""


class NoRoom(MesocosmError):
    """The limits are reached, and what is held is in use."""


class Kept(Generic[T]):
    """What clients hold on the server: at most `count` of them and `weight` in all.

    The least recently used go for room, once they are unused for `idle_s` seconds. What goes is
    closed after the request that it is in.
    """

    def __init__(self, count: int, weight: int, close: Callable[[T], None], idle_s: float = 0.0):
        self.count, self.weight, self.close, self.idle_s = count, weight, close, idle_s
        self._held: OrderedDict[str, Held[T]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> Held[T] | None:
        with self._lock:
            return self._get(key)

    def _get(self, key: str) -> Held[T] | None:
        held = self._held.get(key)
        if held is not None:
            held.used = time.monotonic()
            self._held.move_to_end(key)
        return held

    def put(self, key: str, weight: int = 1) -> Held[T]:
        """What is held under `key`, or a new place for it.

        Raises:
            NoRoom: Too few of the others are unused for `idle_s` seconds; nothing changes.
        """
        with self._lock:
            held = self._get(key)
            if held is not None:
                return held
            gone = self._for_room(weight)
            closing = [self._held.pop(each) for each in gone]
            held = self._held[key] = Held(weight)
        for each in closing:
            self._close(each)
        return held

    def _for_room(self, weight: int) -> list[str]:
        """The keys that must go before one of `weight` fits. Raises NoRoom."""
        count, total = len(self._held), sum(held.weight for held in self._held.values())
        limits = f"{count} of {self.count} sessions with {total} of {self.weight} environments"
        gone: list[str] = []
        for key, held in self._held.items():  # the least recently used first
            if count < self.count and total + weight <= self.weight:
                break
            wait_s = held.used + self.idle_s - time.monotonic()
            if wait_s > 0:
                fix = "end one with DELETE /v1/sessions/<session>"
                raise NoRoom(f"{limits} are in use; {fix}, or try again in {math.ceil(wait_s)} s")
            gone.append(key)
            count, total = count - 1, total - held.weight
        return gone

    def pop(self, key: str) -> bool:
        """Whether it was there."""
        with self._lock:
            held = self._held.pop(key, None)
        if held is not None:
            self._close(held)
        return held is not None

    def clear(self) -> None:
        with self._lock:
            gone = list(self._held.values())
            self._held.clear()
        for each in gone:
            self._close(each)

    def _close(self, held: Held[T]) -> None:
        with held.lock:
            held.closed = True
            if held.value is not None:
                self.close(held.value)


class UnknownSession(MesocosmError):
    """It never was, it ended, or it went for room."""

    def __init__(self, session: str):
        super().__init__(f"session {session!r} is not kept here; begin one with POST /v1/reset")


class Visitors:
    """What the routes do. Every method may be called from several threads.

    They raise UsageError for what is wrong with a request, UnknownSession, and MesocosmError where
    no replica answers in DEADLINE_S.
    """

    def __init__(self, app: str, world: str):
        """`app`: a world application of the Ray that this process is connected to; `world` of it is
        the one that people step in.
        """
        self.app = app
        self._probe = Served(app, None, DEADLINE_S)
        self._probing = threading.Lock()
        reply = reply_of(self._probe.call({"op": "describe", "world": world}))
        self._probe.deadline_s = HEALTH_DEADLINE_S
        self.id: str = reply["world"]
        self.codec = Codec.from_json(reply["codec"])
        self.members: int = reply["members"]
        self.memory: int = reply["memory"]
        self._observation_codec = SpaceCodec(self.codec.observation_space)
        self.sessions: Kept[WorldVectorEnv] = Kept(
            MAX_SESSIONS, MAX_TOTAL_ENVS, lambda env: env.close(), IDLE_S
        )
        self.connections: Kept[Served] = Kept(
            MAX_SESSIONS, MAX_SESSIONS, lambda connection: connection.close()
        )

    def close(self) -> None:
        self.sessions.clear()
        self.connections.clear()
        self._probe.close()

    def alive(self) -> bool:
        """Whether a replica answers."""
        with self._probing:
            try:
                return "error" not in self._probe.call({"op": "end", "session": ""})
            except MesocosmError:
                return False

    def reset(self, session: str | None, seed: int | None, num_envs: int | None) -> dict[str, Any]:
        if session is None:
            session = uuid.uuid4().hex
            held = self.sessions.put(session, num_envs or 1)
            try:
                with held.lock:
                    held.value = self._new(held.weight)
                    reply = self._begin(held.value, seed)
            except BaseException:
                self.sessions.pop(session)
                raise
        else:
            held = self._session(session)
            if num_envs not in (None, held.weight):
                raise UsageError(
                    f"num_envs={num_envs} where the session has {held.weight}; leave num_envs out,"
                    " or leave session out for a new one"
                )
            with held.lock:
                reply = self._begin(self._open(session, held), seed)
        return {"session": session, "world": self.id} | reply

    def _new(self, num_envs: int) -> WorldVectorEnv:
        return WorldVectorEnv(num_envs, self.id, app=self.app, deadline_s=DEADLINE_S)

    def _begin(self, env: WorldVectorEnv, seed: int | None) -> dict[str, Any]:
        observation, _ = env.reset(seed=seed)
        return {"observation": self._values(observation), "task": env.task_options}

    def step(self, session: str, action: list[Any]) -> dict[str, Any]:
        held = self._session(session)
        if len(action) != held.weight:
            raise UsageError(
                f"action has {len(action)} items where the session has {held.weight} environments;"
                " give one to each"
            )
        batch = to_batch(self.codec.action_space, action)
        try:
            numbers = self.codec.action(batch).numbers
        except MesocosmError as error:
            raise UsageError(str(error)) from error
        if not np.isfinite(numbers.numpy()).all():
            raise UsageError(
                "action: a number is too large for this world, which computes in float32; lower it"
            )
        with held.lock:
            env = self._open(session, held)
            try:
                observation, reward, terminated, truncated, infos = env.step(batch)
            except ResetNeeded as error:
                raise UsageError(
                    "the session's last reset failed; POST /v1/reset with it again"
                ) from error
            reply = {
                "observation": self._values(observation),
                "task": env.task_options,
                "reward": reward,
                "terminated": terminated,
                "truncated": truncated,
            }
        reply |= {name: infos[name] for name in ("disagreement", "diverged")}
        reply["duration"] = infos.get("duration")
        return {name: to_json(value) for name, value in reply.items()}

    def end(self, session: str) -> None:
        if not self.sessions.pop(session):
            raise UnknownSession(session)

    def call(self, data: bytes) -> bytes:
        """The reply to a message of `protocol`. Requests of one client (a session's name up to its
        last "-") go to one replica.
        """
        try:
            request = unpack(data)
        except ValueError as error:
            raise UsageError(str(error)) from error
        number = request.pop("number", None)
        if isinstance(number, bool) or not isinstance(number, int):
            raise UsageError(f"number={number!a:.60} must be an integer, which the reply repeats")
        self._check(request)
        session = request.get("session")
        key = session.rpartition("-")[0] if isinstance(session, str) else ""
        while True:
            held = self.connections.put(key)
            with held.lock:
                if held.closed:  # for room, while the lock was another request's
                    continue
                if held.value is None:
                    held.value = Served(self.app, None, DEADLINE_S)
                return pack(reply_of(held.value.call(request)) | {"number": number})

    def _check(self, request: Message) -> None:
        """What is checked of strangers beyond what replicas check of everyone."""
        world = request.get("world")
        if isinstance(world, str) and world != self.id and ("/" in world or "\\" in world):
            raise UsageError(f"world={world!a:.200} is a path; name a world by its artifact id")
        for name, value in request.items():
            if isinstance(value, np.ndarray):
                if value.ndim and len(value) > MAX_ENVS:
                    raise UsageError(
                        f"{name!a:.60} is of {len(value)} environments, beyond the limit of"
                        f" {MAX_ENVS}; use more sessions"
                    )
                if value.dtype.kind == "f" and not np.isfinite(value).all():
                    raise UsageError(
                        f"{name!a:.60} holds a number that is not finite; send finite numbers"
                    )

    def _session(self, session: str) -> Held[WorldVectorEnv]:
        held = self.sessions.get(session)
        if held is None:
            raise UnknownSession(session)
        return held

    def _open(self, session: str, held: Held[WorldVectorEnv]) -> WorldVectorEnv:
        """The session's environment, under its lock: it may have gone while the lock was another
        request's.
        """
        if held.closed or held.value is None:
            raise UnknownSession(session)
        return held.value

    def _values(self, observation: Any) -> list[Any]:
        return [to_json(value) for value in self._observation_codec.unbatch(observation)]
