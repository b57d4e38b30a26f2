"""A world's side of the protocol: sessions, each one client's vector of environments, pinned to one
world version.

A replica and the in-process backend both answer requests with `Sessions.handle` (see `protocol`). A
session's carry is a cache: it follows from the context that the client has too. Another replica can
therefore continue where one died, and eviction costs only time. `client` sends its context then.
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
"""The step in the random key of an episode's start; transitions count from 0."""
STEP_FIELDS = ("reward", "terminated", "p_terminated", "duration", "disagreement", "diverged")
"""Fields of `StepOut` in a reply, beside the observation"""


def find_world(storage: Storage, ref: str) -> tuple[str, Path]:
    """Return (id, folder) of a world: an artifact id, a unique prefix of one, or a folder.

    Raises:
        UsageError: There is no such world.
    """
    if not ref:
        raise UsageError("world must be an artifact id or a folder with a world.json, got ''")
    folder = Path(ref)
    if (folder / "world.json").is_file():
        return str(folder.absolute()), folder
    if folder.is_absolute():
        raise UsageError(f"world {ref!r} is a folder without a world.json; give a world's folder")
    artifact = storage.artifact("worlds", ref)
    return artifact.id, artifact.path


class Worlds:
    """Loaded world versions by id, the `keep` most recently used.

    Safe to call from several threads. Worlds load one at a time. A request for a loaded world never
    waits for one that loads.
    """

    def __init__(self, root: str, default: str = "", keep: int = 3, device: str = "cpu"):
        self.storage, self.default = Storage(root), default
        self.keep, self.device = keep, device
        self._loaded: OrderedDict[str, World] = OrderedDict()
        self._ids: dict[str, str] = {}
        self._lock = threading.Lock()
        self._loading = threading.Lock()

    def get(self, ref: str) -> tuple[str, World]:
        """Return (id, world); an empty `ref` is the default. A loaded id needs no storage."""
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


class StartBlocks:
    """The starts that a world draws for B environments, in blocks of consecutive episodes.

    At 256 environments some episode ends at nearly every step, and a draw for it alone costs as
    much as half a step (2 ms). A block is a function of (world, seed, environments, block number),
    so that a restored session draws the same bits.
    """

    KEEP = 32
    """Blocks; environments with long episodes still use older ones."""

    def __init__(self, world: World, seed: int, env: NDArray[np.int64]):
        self.world, self.seed, self.env = world, seed, env
        self.episodes = max(4, 256 // len(env))
        self._blocks: OrderedDict[int, tuple[Parts, Parts]] = OrderedDict()

    def of(self, episode: NDArray[np.int64], mask: NDArray[np.bool_]) -> tuple[Parts, Parts]:
        """(task, observation) [B] that begin `episode` [B]; rows outside `mask` [B] are zeros."""
        batch, spec, device = len(self.env), self.world.spec, self.world.device
        task = Parts.empty(spec.task, batch, device=device)
        observation = Parts.empty(spec.observation, batch, device=device)
        numbers = episode // self.episodes
        for number in np.unique(numbers[mask]):
            rows = np.flatnonzero(mask & (numbers == number))
            target = torch.from_numpy(rows).to(device)
            source = torch.from_numpy((episode[rows] % self.episodes) * batch + rows).to(device)
            for out, drawn in zip((task, observation), self._block(int(number)), strict=True):
                out.numbers[target] = drawn.numbers[source]
                out.categories[target] = drawn.categories[source]
        return task, observation

    def _block(self, number: int) -> tuple[Parts, Parts]:
        if number not in self._blocks:
            episode = number * self.episodes + np.arange(self.episodes)
            keys = rng.keys(self.seed, self.env[None, :], episode[:, None], START).reshape(-1)
            keys_on_device = torch.from_numpy(keys).to(self.world.device)
            self._blocks[number] = self.world.sample_start(keys_on_device)
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
    starts: StartBlocks
    carry: Carry
    clock: int
    """Steps taken since `begin`"""
    reply: Message | None = None
    """Reply to the step before `clock`; None right after `begin` and `restore`"""
    request_digest: bytes = b""
    """Digest of the request that `reply` answers"""


class Sessions:
    """All sessions of one process. Safe to call from several threads.

    Sessions advance one at a time. A request for a world that is not loaded loads it before taking
    the lock, so that other sessions do not wait for the storage.
    """

    def __init__(self, world: Callable[[str], tuple[str, World]], max_sessions: int = 64):
        """`world` maps a reference to (id, world), as `Worlds.get`."""
        self.world = world
        self.max_sessions = max_sessions
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()
        self._operations = {
            "describe": self._describe,
            "begin": self._begin,
            "step": self._step,
            "restore": self._restore,
            "end": self._end,
        }

    def handle(self, request: Message) -> Message:
        """Answer one request. A MesocosmError becomes {"error", "kind"}; a bug raises."""
        try:
            op = request.get("op")
            if not isinstance(op, str) or op not in self._operations:
                names = ", ".join(self._operations)
                raise UsageError(f"op must be one of {names}, got {op!a:.60}")
            check_fields(request)
            with torch.inference_mode():
                return self._operations[op](request)
        except MesocosmError as error:
            kind = "usage" if isinstance(error, UsageError) else "failed"
            return {"error": str(error), "kind": kind}

    def _describe(self, request: Message) -> Message:
        id, world = self.world(request["world"])
        sizes = {"memory": world.net.memory, "members": world.config.members}
        return {"world": id, "codec": world.codec, **sizes}

    def _begin(self, request: Message) -> Message:
        id, world = self.world(request["world"])
        check_begin(request, world.spec)
        seed, episode = request["seed"], request["episode"]
        env = request["first_env"] + np.arange(len(episode))
        starts = StartBlocks(world, seed, env)
        with self._lock:
            self._sessions.pop(request["replaces"], None)
            everywhere = np.ones(len(episode), np.bool_)
            task, observation = _logged(world, request) or starts.of(episode, everywhere)
            carry = world.begin(task, observation, _member(world, seed, env, episode))
            self._keep(request["session"], Session(world, seed, env, starts, carry, 0))
        reply: Message = {"world": id}
        put(reply, "task", task)
        put(reply, "observation", observation)
        return reply

    def _restore(self, request: Message) -> Message:
        _, world = self.world(request["world"])
        check_restore(request, world.spec, world.config.members)
        names = [name for name in request if name.startswith(CONTEXT)]
        context = Context.from_numpy({name.removeprefix(CONTEXT): request[name] for name in names})
        seed, env = request["seed"], request["first_env"] + np.arange(len(context.member))
        with self._lock:
            try:
                carry = world.restore(context)
            except ValueError as error:
                raise UsageError(
                    f"request 'restore': {error}; send the steps since the session began"
                ) from error
            starts = StartBlocks(world, seed, env)
            session = Session(world, seed, env, starts, carry, context.clock)
            self._keep(request["session"], session)
        return {"clock": context.clock}

    def _step(self, request: Message) -> Message:
        with self._lock:
            name, clock = request["session"], request["clock"]
            session = self._sessions.get(name)
            if session is None:
                return {"missing": True}
            self._sessions.move_to_end(name)
            digest = _digest(request)
            repeated = session.clock == clock + 1 and session.request_digest == digest
            if repeated and session.reply is not None:
                return session.reply
            if session.clock != clock:
                return {"missing": True}
            check_step(request, session.world.spec, len(session.env))
            # An exception may leave the carry half changed: only a whole step restores the session.
            del self._sessions[name]
            reply = self._advance(session, request)
            session.clock, session.reply, session.request_digest = clock + 1, reply, digest
            self._sessions[name] = session
            return reply

    def _advance(self, session: Session, request: Message) -> Message:
        """Step all environments, then begin new episodes: for those that end here (SAME_STEP) or
        ended before (NEXT_STEP).
        """
        world, episode = session.world, request["episode"]
        keys = rng.keys(session.seed, session.env, episode, request["step"])
        action = get(request, "action").to(world.device)
        out_keys = torch.from_numpy(keys).to(world.device)
        session.carry, out = world.step(session.carry, action, out_keys)
        observation = out.observation
        reply: Message = {name: getattr(out, name).numpy(force=True) for name in STEP_FIELDS}
        same_step = request["mode"] == "SameStep"
        mask = request["cut"]
        if same_step:
            uncertain = reply["disagreement"] > request["max_disagreement"]
            mask = mask | reply["terminated"] | reply["diverged"] | uncertain
        if mask.any():
            if same_step:
                put(reply, "final", observation)
            else:
                for name in STEP_FIELDS:
                    reply[name] = np.where(mask, np.zeros(1, reply[name].dtype), reply[name])
            task, start = _logged(world, request) or session.starts.of(episode + 1, mask)
            chosen = torch.from_numpy(mask).to(world.device)
            member = _member(world, session.seed, session.env, episode + 1)
            session.carry = world.reset(session.carry, chosen, task, start, member)
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
    """Digest of a whole request: a client may give up on one and send another at the same clock."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(request):
        value = request[name]
        digest.update(name.encode())
        digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return digest.digest()


def _logged(world: World, request: Message) -> tuple[Parts, Parts] | None:
    """The starts (task, observation) [B] that the client chose, or None."""
    if "start.numbers" not in request:
        return None
    return get(request, "start_task").to(world.device), get(request, "start").to(world.device)


def _member(world: World, seed: int, env: NDArray[np.int64], episode: NDArray[np.int64]) -> Tensor:
    member = rng.member_of(seed, env, episode, world.config.members)
    return torch.from_numpy(member).to(world.device)
