"""A world's side of the protocol: sessions, each one client's vector of environments, pinned to one
world version.

`Sessions.handle` takes a request and gives a reply (see `protocol`); a replica and the in-process
backend both are one. A session's carry is a cache: whatever it holds follows from the context that
the client holds too, so that any replica goes on where another died, and a session evicted for room
is only slower.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mesocosm.errors import MesocosmError, UsageError
from mesocosm.model import rng
from mesocosm.model.spec import Parts
from mesocosm.model.world import Carry, Context, World
from mesocosm.serve.check import check_begin, check_fields, check_restore, check_step
from mesocosm.serve.protocol import CONTEXT, Message, get, put
from mesocosm.store.artifacts import Storage

START = -1
"""The step of the key from which an episode's start is drawn; transitions count from 0."""
TOLD = ("reward", "terminated", "p_terminated", "duration", "disagreement", "diverged")
"""What a reply holds of a step's `StepOut`, beside the observation."""


def find_world(storage: Storage, ref: str) -> tuple[str, Path]:
    """(id, folder) of the world that `ref` names: an artifact id, a unique prefix of one, or a
    folder. Raises UsageError if there is none.
    """
    if not ref:
        raise UsageError(
            "world='' names no world; give an artifact id, or a folder that holds a world.json"
        )
    folder = Path(ref)
    if (folder / "world.json").is_file():
        return str(folder.absolute()), folder
    if folder.is_absolute():
        raise UsageError(
            f"world {ref!r} is a folder without a world.json; give a world's folder, or an"
            " artifact id"
        )
    artifact = storage.artifact("worlds", ref)
    return artifact.id, artifact.path


class Worlds:
    """Loaded world versions by id, the `keep` most recently used.

    Safe to call from several threads. Worlds load one at a time. A loaded world never waits for
    one that loads.
    """

    def __init__(self, root: str, default: str = "", keep: int = 3, device: str = "cpu"):
        self.storage = Storage(root)
        self.default = default
        self.keep = keep
        self.device = device
        self._loaded: OrderedDict[str, World] = OrderedDict()
        self._ids: dict[str, str] = {}
        self._lock = threading.Lock()
        self._loading = threading.Lock()

    def get(self, ref: str) -> tuple[str, World]:
        """(id, world); an empty `ref` is the default. A full id that is loaded costs no look at the
        storage.
        """
        ref = ref or self.default
        loaded = self._lookup(ref)
        if loaded is not None:
            return loaded
        with self._loading:
            return self._lookup(ref) or self._load(ref)

    def _lookup(self, ref: str) -> tuple[str, World] | None:
        with self._lock:
            id = self._ids.get(ref, ref)
            if id not in self._loaded:
                return None
            self._loaded.move_to_end(id)
            return id, self._loaded[id]

    def _load(self, ref: str) -> tuple[str, World]:
        id, folder = find_world(self.storage, ref)
        loaded = self._lookup(id)
        world = World.load(folder, self.device) if loaded is None else loaded[1]
        with self._lock:
            self._ids[ref] = id
            self._loaded[id] = world
            while len(self._loaded) > self.keep:
                self._loaded.popitem(last=False)
        return id, world


class Starts:
    """The starts that a world draws for B environments, in blocks of consecutive episodes of all of
    them.

    At 256 environments some episode ends at nearly every step, and a draw for that one alone costs
    as much as half a step (2 ms). A block is a function of (world, seed, environments, its number),
    so that a restored session finds the same bits in it.
    """

    KEEP = 32
    """Blocks; environments of longer episodes lag behind the others."""

    def __init__(self, world: World, seed: int, env: NDArray[np.int64]):
        self.world, self.seed, self.env = world, seed, env
        self.episodes = max(4, 256 // len(env))
        self._blocks: OrderedDict[int, tuple[Parts, Parts]] = OrderedDict()

    def of(self, episode: NDArray[np.int64], mask: NDArray[np.bool_]) -> tuple[Parts, Parts]:
        """(task, observation) [B] that begin `episode` [B]; rows outside `mask` [B] are zeros."""
        batch, spec = len(self.env), self.world.spec
        task, observation = (
            Parts.empty(part, batch, device=self.world.device)
            for part in (spec.task, spec.observation)
        )
        numbers = episode // self.episodes
        for number in np.unique(numbers[mask]):
            rows = np.flatnonzero(mask & (numbers == number))
            into = torch.from_numpy(rows).to(self.world.device)
            where = torch.from_numpy((episode[rows] % self.episodes) * batch + rows).to(
                self.world.device
            )
            for out, drawn in zip((task, observation), self._block(int(number)), strict=True):
                out.numbers[into], out.categories[into] = (
                    drawn.numbers[where],
                    drawn.categories[where],
                )
        return task, observation

    def _block(self, number: int) -> tuple[Parts, Parts]:
        if number not in self._blocks:
            episode = number * self.episodes + np.arange(self.episodes)
            keys = rng.keys(self.seed, self.env[None, :], episode[:, None], START)
            self._blocks[number] = self.world.sample_start(
                torch.from_numpy(keys.reshape(-1)).to(self.world.device)
            )
        self._blocks.move_to_end(number)
        while len(self._blocks) > self.KEEP:
            self._blocks.popitem(last=False)
        return self._blocks[number]


@dataclass
class Session:
    world: World
    seed: int
    env: NDArray[np.int64]
    """[B] numbers of the environments"""
    starts: Starts
    carry: Carry
    clock: int
    """Steps taken since `begin`"""
    reply: Message | None
    """To the step before `clock`; None right after `begin` and `restore`"""
    asked: bytes = b""
    """Digest of the request that `reply` answers"""


class Sessions:
    """All sessions of one process. Safe to call from several threads.

    Sessions advance one at a time. A request for a world that is not loaded yet loads it before
    it takes the lock, so that the other sessions do not wait for the storage.
    """

    def __init__(self, world: Callable[[str], tuple[str, World]], max_sessions: int = 64):
        """`world`: a reference to (id, world), as `Worlds.get`."""
        self.world = world
        self.max_sessions = max_sessions
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def handle(self, request: Message) -> Message:
        """Answer one request. What a user got wrong comes back as {"error", "kind"}; a bug raises."""
        operations = {
            "describe": self._describe,
            "begin": self._begin,
            "step": self._step,
            "restore": self._restore,
            "end": self._end,
        }
        op = request.get("op")
        operation = operations.get(op) if isinstance(op, str) else None
        if operation is None:
            return {
                "error": f"op={op!a:.60} is unknown, use one of {', '.join(operations)}",
                "kind": "usage",
            }
        try:
            check_fields(request)
            with torch.inference_mode():
                return operation(request)
        except MesocosmError as error:
            return {
                "error": str(error),
                "kind": "usage" if isinstance(error, UsageError) else "failed",
            }

    def _describe(self, request: Message) -> Message:
        id, world = self.world(request["world"])
        return {
            "world": id,
            "codec": world.codec,
            "memory": world.net.memory,
            "members": world.config.members,
        }

    def _begin(self, request: Message) -> Message:
        id, world = self.world(request["world"])
        check_begin(request, world.spec)
        seed, episode = request["seed"], request["episode"]
        env = request["first_env"] + np.arange(len(episode))
        starts = Starts(world, seed, env)
        with self._lock:
            self._sessions.pop(request["replaces"], None)
            everywhere = np.ones(len(episode), np.bool_)
            task, observation = _logged(world, request) or starts.of(episode, everywhere)
            carry = world.begin(task, observation, _member(world, seed, env, episode))
            self._keep(request["session"], Session(world, seed, env, starts, carry, 0, None))
        reply: Message = {"world": id}
        put(reply, "task", task)
        put(reply, "observation", observation)
        return reply

    def _restore(self, request: Message) -> Message:
        _, world = self.world(request["world"])
        check_restore(request, world.spec, world.config.members)
        context = Context.from_numpy(
            {
                name.removeprefix(CONTEXT): value
                for name, value in request.items()
                if name.startswith(CONTEXT)
            }
        )
        seed, env = request["seed"], request["first_env"] + np.arange(len(context.member))
        with self._lock:
            try:
                carry = world.restore(context)
            except ValueError as error:
                fix = "send the steps since the session began"
                raise UsageError(f"request 'restore': {error}; {fix}") from error
            starts = Starts(world, seed, env)
            session = Session(world, seed, env, starts, carry, context.clock, None)
            self._keep(request["session"], session)
        return {"clock": context.clock}

    def _step(self, request: Message) -> Message:
        with self._lock:
            name, clock = request["session"], request["clock"]
            session = self._sessions.get(name)
            if session is None:
                return {"missing": True}
            self._sessions.move_to_end(name)
            asked = _digest(request)
            if session.clock == clock + 1 and session.reply is not None and session.asked == asked:
                return session.reply
            if session.clock != clock:
                return {"missing": True}
            check_step(request, session.world.spec, len(session.env))
            # An exception may leave the carry half changed: only a whole step brings it back.
            del self._sessions[name]
            reply = self._advance(session, request)
            session.clock, session.reply, session.asked = clock + 1, reply, asked
            self._sessions[name] = session
            return reply

    def _advance(self, session: Session, request: Message) -> Message:
        """One step of all environments, then new episodes for those that end here (SAME_STEP) or
        ended before (NEXT_STEP).
        """
        world, episode = session.world, request["episode"]
        keys = torch.from_numpy(rng.keys(session.seed, session.env, episode, request["step"])).to(
            world.device
        )
        session.carry, out = world.step(
            session.carry, get(request, "action").to(world.device), keys
        )
        observation = out.observation
        reply: Message = {name: getattr(out, name).numpy(force=True) for name in TOLD}
        mask = request["cut"]
        if request["mode"] == "SameStep":
            mask = (
                mask
                | reply["terminated"]
                | reply["diverged"]
                | (reply["disagreement"] > request["max_disagreement"])
            )
        if mask.any():
            if request["mode"] == "SameStep":
                put(reply, "final", observation)
            else:
                for name in TOLD:
                    reply[name] = np.where(mask, np.zeros(1, reply[name].dtype), reply[name])
            task, start = _logged(world, request) or session.starts.of(episode + 1, mask)
            chosen = torch.from_numpy(mask).to(world.device)
            session.carry = world.reset(
                session.carry,
                chosen,
                task,
                start,
                _member(world, session.seed, session.env, episode + 1),
            )
            observation = start.where(chosen, observation)
            put(reply, "task", task)
        put(reply, "observation", observation)
        return reply

    def _end(self, request: Message) -> Message:
        with self._lock:
            self._sessions.pop(request["session"], None)
        return {}

    def _keep(self, name: str, session: Session) -> None:
        self._sessions[name] = session
        self._sessions.move_to_end(name)
        while len(self._sessions) > self.max_sessions:
            self._sessions.popitem(last=False)


def _digest(request: Message) -> bytes:
    """Of everything that a step depends on: a client may give up on one request and send another at
    the same clock.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(request):
        value = request[name]
        digest.update(name.encode())
        digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return digest.digest()


def _logged(world: World, request: Message) -> tuple[Parts, Parts] | None:
    """The starts that a client chose itself, (task, observation) [B]; None: the world draws them."""
    if "start.numbers" not in request:
        return None
    return get(request, "start_task").to(world.device), get(request, "start").to(world.device)


def _member(world: World, seed: int, env: NDArray[np.int64], episode: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(rng.member_of(seed, env, episode, world.config.members)).to(
        world.device
    )
