"""HTTP sessions, kept on the server, and the connections of programs that send binary messages."""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import methodcaller
from typing import Any, Generic, TypeVar

import numpy as np
import pydantic_core
from gymnasium.error import ResetNeeded

from mesocosm.data.loading.text_batch import AnyBatchCodec, TextBatchCodec, batch_codec
from mesocosm.datasets.spaces import SpaceCodec
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.serve.connection import Served, reply_of
from mesocosm.serve.json_pictures import to_strings
from mesocosm.serve.protocol import AnyStarts, Message, pack, unpack
from mesocosm.serve.world_env import WorldVectorEnv
from mesocosm.store.artifacts import Storage

MAX_ENVS = 4096
"""Environments of one session"""
MAX_SESSIONS, MAX_TOTAL_ENVS = 64, 16384
"""Sessions, and environments in all of them"""
IDLE_S = 300.0
"""Seconds after which an unused session may be evicted for a new one"""
DEADLINE_S, HEALTH_DEADLINE_S = 60.0, 2.0
"""Seconds that a replica may take, including its replacement"""
STEP_INFOS = ("disagreement", "diverged", "duration")
Reply = dict[str, Any]
"""Values and arrays, for `to_json`"""
T = TypeVar("T", WorldVectorEnv, Served)


@dataclass
class Slot(Generic[T]):
    """One client's place in a `Pool`, used by one request at a time."""

    weight: int
    value: T | None = None
    """None until the first request has made it"""
    lock: threading.Lock = field(default_factory=threading.Lock)
    closed: bool = False
    used: float = field(default_factory=time.monotonic)
    """Time of the last request"""

    def close(self) -> None:
        """Close the value, after the request that uses it."""
        with self.lock:
            self.closed = True
            if self.value is not None:
                self.value.close()


class PoolFull(MesocosmError):
    """Every slot is in use."""


class Pool(Generic[T]):
    """At most `count` slots of at most `weight` in total.

    The least recently used are evicted once they are unused for `idle_s` seconds.
    """

    def __init__(self, count: int, weight: int, idle_s: float = 0.0):
        self.count, self.weight, self.idle_s = count, weight, idle_s
        self._slots: OrderedDict[str, Slot[T]] = OrderedDict()
        self._lock = threading.RLock()

    def get(self, key: str) -> Slot[T] | None:
        with self._lock:
            slot = self._slots.get(key)
            if slot is not None:
                slot.used = time.monotonic()
                self._slots.move_to_end(key)
            return slot

    def __contains__(self, key: str) -> bool:
        return key in self._slots

    def put(self, key: str, weight: int = 1) -> Slot[T]:
        """Return the slot of `key`, or a new one.

        Raises:
            PoolFull: Too few of the others are unused for `idle_s` seconds; nothing changes.
        """
        with self._lock:
            slot = self.get(key)
            if slot is not None:
                return slot
            evicted = [self._slots.pop(each) for each in self._evictable(weight)]
            slot = self._slots[key] = Slot(weight)
        for each in evicted:
            each.close()
        return slot

    def _evictable(self, weight: int) -> list[str]:
        """The keys to evict before a slot of `weight` fits. Raises PoolFull."""
        count, total = len(self._slots), sum(slot.weight for slot in self._slots.values())
        limits = f"{count} of {self.count} sessions with {total} of {self.weight} environments"
        keys: list[str] = []
        for key, slot in self._slots.items():  # the least recently used first
            if count < self.count and total + weight <= self.weight:
                break
            wait_s = slot.used + self.idle_s - time.monotonic()
            if wait_s > 0:
                fix = "end one with DELETE /v1/sessions/SESSION"
                raise PoolFull(f"{limits} are in use; {fix}, or try again in {math.ceil(wait_s)} s")
            keys.append(key)
            count, total = count - 1, total - slot.weight
        return keys

    def pop(self, key: str) -> bool:
        """Close a slot. Returns whether it existed."""
        with self._lock:
            slot = self._slots.pop(key, None)
        if slot is not None:
            slot.close()
        return slot is not None

    def clear(self) -> None:
        for key in list(self._slots):
            self.pop(key)


class UnknownSession(MesocosmError):
    """The session never existed, ended, or was evicted."""

    def __init__(self, session: str):
        super().__init__(f"session {session!r} is unknown; begin one with POST /v1/reset")


def to_json(value: Any) -> bytes:
    """Encode values and arrays as JSON; a number that is not finite is null."""
    return pydantic_core.to_json(value, inf_nan_mode="null", fallback=methodcaller("tolist"))


class HttpSessions:
    """The operations of the routes, for world `world` of the application `app` on this process's
    Ray. Safe to call from several threads.

    They raise UsageError, UnknownSession, and MesocosmError where no replica answers.
    """

    def __init__(self, app: str, world: str, storage: Storage | None = None):
        self.app, self.storage = app, storage
        self._probe = Served(app, None, DEADLINE_S)
        reply = reply_of(self._probe.call({"op": "describe", "world": world}))
        self._probe.deadline_s = HEALTH_DEADLINE_S
        self.id: str = reply["world"]
        self.codec: AnyBatchCodec = batch_codec(reply["codec"])
        self.members: int = reply["members"]
        self.memory: int = reply["memory"]
        self.plans: bool = reply["planner"] is not None
        """True if a planner is served"""
        self._observations = SpaceCodec(self.codec.observation_space)
        self._actions = SpaceCodec(self.codec.action_space, "action")
        self.sessions: Pool[WorldVectorEnv] = Pool(MAX_SESSIONS, MAX_TOTAL_ENVS, IDLE_S)
        self.connections: Pool[Served] = Pool(MAX_SESSIONS, MAX_SESSIONS)

    def close(self) -> None:
        self.sessions.clear()
        self.connections.clear()
        self._probe.close()

    def alive(self) -> bool:
        """True if a replica answers. For one thread at a time."""
        try:
            return "error" not in self._probe.call({"op": "end", "session": ""})
        except MesocosmError:
            return False

    def reset(self, session: str | None, seed: int | None, num_envs: int | None) -> Reply:
        """Begin episodes in a session, or in a new one."""
        if session is not None:
            weight = self._slot(session).weight
            if num_envs not in (None, weight):
                fix = "leave num_envs out, or leave session out for a new one"
                raise UsageError(f"num_envs must be {weight}, the session's, got {num_envs}; {fix}")
            return self.begin(session, seed)
        session = self.open(num_envs or 1)
        try:
            return self.begin(session, seed)
        except BaseException:
            self.sessions.pop(session)
            raise

    def open(self, num_envs: int = 1, horizon: int | None = None) -> str:
        """Make a session. `begin` begins its episodes.

        Args:
            num_envs: Its environments.
            horizon: Steps after which an episode is truncated; None for never.

        Returns:
            Its name.

        Raises:
            PoolFull: All sessions are in use.
        """
        session = uuid.uuid4().hex
        slot = self.sessions.put(session, num_envs)
        try:
            with slot.lock:
                options: Any = {"app": self.app, "deadline_s": DEADLINE_S, "horizon": horizon}
                slot.value = WorldVectorEnv(slot.weight, self.id, **options)
        except BaseException:
            self.sessions.pop(session)
            raise
        return session

    def begin(self, session: str, seed: int | None, start: AnyStarts | None = None) -> Reply:
        """Begin a session's episodes.

        Args:
            session: Its name.
            seed: As of `WorldVectorEnv.reset`.
            start: (task, observation), parts [1, ...], of every episode that begins; None for the
                world's own.

        Returns:
            The session, the world, and each environment's observation and task. Images are base64
            of PNG.
        """
        with self._env(session) as env:
            env.starts = start
            observation = self._unbatch(env.reset(seed=seed)[0])
            reply = {"observation": observation, "task": env.task_options}
        return {"session": session, "world": self.id, **reply}

    def step(self, session: str, action: list[Any], disagreement: bool) -> Reply:
        """Step a session's environments."""
        try:
            if isinstance(self.codec, TextBatchCodec):
                batch = self.codec.batch(action)
            else:
                batch = self._actions.decode(*self._actions.encode_list(action))
        except MesocosmError as error:
            raise UsageError(str(error)) from error
        with self._env(session) as env:
            env.disagreement_every = int(disagreement)
            try:
                observation, reward, terminated, truncated, infos = env.step(batch)
            except ResetNeeded as error:
                fix = "POST /v1/reset with it again"
                raise UsageError(f"the session's last reset failed; {fix}") from error
            reply = {name: infos.get(name) for name in STEP_INFOS}
            reply |= {"reward": reward, "terminated": terminated, "truncated": truncated}
            reply |= {"observation": self._unbatch(observation)}
            return reply | {"task": env.task_options}

    def _unbatch(self, observations: Any) -> list[Any]:
        """The observation of each environment, with images as base64 of PNG."""
        space = self.codec.observation_space
        return [to_strings(space, value) for value in self._observations.unbatch(observations)]

    def end(self, session: str) -> None:
        if not self.sessions.pop(session):
            raise UnknownSession(session)

    def call(self, data: bytes) -> bytes:
        """Return the reply to a binary message.

        The requests of one client (a session's name up to its last "-") go to one replica.
        """
        try:
            request = unpack(data)
        except ValueError as error:
            raise UsageError(str(error)) from error
        number = request.pop("number", None)
        if isinstance(number, bool) or not isinstance(number, int):
            raise UsageError(f"number must be an integer, got number={number!a:.60}")
        self._check(request)
        session = request.get("session")
        key = session.rpartition("-")[0] if isinstance(session, str) else ""
        while True:
            slot = self.connections.put(key)
            with slot.lock:
                if slot.closed:  # evicted while another request had the lock
                    continue
                if slot.value is None:
                    slot.value = Served(self.app, None, DEADLINE_S)
                return pack(reply_of(slot.value.call(request)) | {"number": number})

    def _check(self, request: Message) -> None:
        """Checks for clients over HTTP, beyond those of the replicas."""
        world = request.get("world")
        if isinstance(world, str) and world != self.id and ("/" in world or "\\" in world):
            raise UsageError(f"world must be an artifact id, not a path, got {world!a:.200}")
        for name, value in request.items():
            if isinstance(value, np.ndarray):
                if value.ndim and len(value) > MAX_ENVS:
                    limit = f"at most {MAX_ENVS} environments, got {len(value)}"
                    raise UsageError(f"{name!a:.60} must have {limit}; use more sessions")
                if value.dtype.kind == "f" and not np.isfinite(value).all():
                    raise UsageError(f"{name!a:.60} must hold finite numbers")

    def has(self, session: str) -> bool:
        """True if the session exists: it has neither ended nor been evicted."""
        return session in self.sessions

    def _slot(self, session: str) -> Slot[WorldVectorEnv]:
        slot = self.sessions.get(session)
        if slot is None:
            raise UnknownSession(session)
        return slot

    @contextmanager
    def _env(self, session: str) -> Iterator[WorldVectorEnv]:
        """The session's environment, for one request at a time."""
        slot = self._slot(session)
        with slot.lock:
            if slot.closed or slot.value is None:  # ended while another request had the lock
                raise UnknownSession(session)
            yield slot.value
