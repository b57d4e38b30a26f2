"""A world's side of the protocol: sessions, each one client's environments in one world version.

A replica and the in-process backend both answer requests with `Sessions.call` (see `protocol`). A
session's carry is a cache: it follows from the context that the client has too. Another replica can
therefore continue where one died, and eviction costs only time.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from mesocosm.errors import MesocosmError, UsageError
from mesocosm.model import rng
from mesocosm.model.any_world import AnyWorld
from mesocosm.model.carry import Carry, Context, grouped
from mesocosm.model.language.world import TextWorld
from mesocosm.model.tensors import Parts
from mesocosm.model.world import World
from mesocosm.serve.check import SCALARS, check_begin, check_fields, check_restore, check_step
from mesocosm.serve.episodes import EpisodeSession
from mesocosm.serve.plans import PlanServer
from mesocosm.serve.protocol import CONTEXT, START, Message, get, put
from mesocosm.serve.text_batching import TextEngine
from mesocosm.serve.text_check import check_text_begin, check_text_restore, check_text_step
from mesocosm.serve.text_memory import cache_limit, check_memory
from mesocosm.serve.text_session import TextSession

STEP_FIELDS = ("reward", "terminated", "p_terminated", "duration", "diverged")
"""Fields of `StepOut` in a reply, in addition to the observation and, on request, the disagreement
"""
BLOCKS = 32
"""Blocks of starts that a session keeps; environments with long episodes still use older ones."""


class Session(EpisodeSession):
    """One client's B environments in a world of parts.

    The world draws starts in blocks of consecutive episodes: at 256 environments some episode ends
    at nearly every step, and a draw for it alone costs as much as half a step (2 ms). A block is a
    function of (world, seed, environments, its number), so that a restored session draws the same
    bits.
    """

    carry: Carry
    world: World

    def __init__(self, world: World, seed: int, first_env: int, batch: int):
        super().__init__(world, world.config.members, seed, first_env, batch)
        self.block_size = max(4, 256 // batch)
        self._blocks: OrderedDict[int, tuple[Parts, Parts]] = OrderedDict()

    def starts(
        self, request: Message, episode: NDArray[np.int64], mask: NDArray[np.bool_]
    ) -> tuple[Parts, Parts]:
        batch, spec, device = len(self.env), self.world.spec, self.world.device
        if "start.numbers" in request:
            return get(request, "start_task").to(device), get(request, "start").to(device)
        task = Parts.empty(spec.task, batch, device=device)
        observation = Parts.empty(spec.observation, batch, device=device)
        numbers = episode // self.block_size
        for number in np.unique(numbers[mask]):
            rows = np.flatnonzero(mask & (numbers == number))
            target = torch.from_numpy(rows).to(device)
            source = torch.from_numpy((episode[rows] % self.block_size) * batch + rows).to(device)
            for out, drawn in zip((task, observation), self._block(int(number)), strict=True):
                out.numbers[target] = drawn.numbers[source]
                out.categories[target] = drawn.categories[source]
        return task, observation

    def _block(self, number: int) -> tuple[Parts, Parts]:
        if number not in self._blocks:
            episode = number * self.block_size + np.arange(self.block_size)
            keys = rng.keys(self.seed, self.env[None, :], episode[:, None], START).reshape(-1)
            on_device = torch.from_numpy(keys).to(self.world.device)
            self._blocks[number] = self.world.sample_start(on_device)
        self._blocks.move_to_end(number)
        while len(self._blocks) > BLOCKS:
            self._blocks.popitem(last=False)
        return self._blocks[number]

    def step(self, request: Message) -> Message:
        """Step all environments, then begin new episodes: for those that end here (SAME_STEP) or
        ended before (NEXT_STEP).
        """
        world, episode = self.world, request["episode"]
        keys = rng.keys(self.seed, self.env, episode, request["step"])
        action = get(request, "action").to(world.device)
        keys_on_device = torch.from_numpy(keys).to(world.device)
        requested = request["disagreement"]
        self.carry, out = world.step(self.carry, action, keys_on_device, disagreement=requested)
        names = (*STEP_FIELDS, "disagreement") if requested else STEP_FIELDS
        reply: Message = {name: getattr(out, name).numpy(force=True) for name in names}
        return self.stepped(request, reply, out.observation)


class Sessions:
    """All sessions of one process. Safe to call from several threads.

    It is also the connection of a client in this process. Sessions advance one at a time, those of
    text worlds together (`text_batching`). A world is loaded before taking the lock, so that other
    sessions do not wait for the storage.
    """

    def __init__(
        self,
        world: Callable[[str], tuple[str, AnyWorld]],
        max_sessions: int = 64,
        planner: PlanServer | None = None,
    ):
        """`world` maps a reference to (id, world), as `Worlds.get`; `planner` is of one of them."""
        self.world, self._planner = world, planner
        self.max_sessions = max_sessions
        self._sessions: OrderedDict[str, Session | TextSession] = OrderedDict()
        self._engines: WeakKeyDictionary[TextWorld, TextEngine] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def close(self, last: Message | None = None) -> None:
        if last is not None:
            self.call(last)

    def call(self, request: Message) -> Message:
        """Answer one request. A MesocosmError becomes {"error", "kind"}; a bug raises."""
        try:
            op = request.get("op")
            if not isinstance(op, str) or op not in SCALARS:
                raise UsageError(f"op must be one of {', '.join(SCALARS)}, got {op!a:.60}")
            check_fields(request)
            with torch.inference_mode():
                reply: Message = getattr(self, f"_{op}")(request)
                return reply
        except MesocosmError as error:
            kind = "usage" if isinstance(error, UsageError) else "failed"
            return {"error": str(error), "kind": kind}

    def batches(self) -> dict[str, int]:
        """The environments of text worlds that were stepped, and the batches of them."""
        engines = list(self._engines.values())
        return {name: sum(getattr(e, name) for e in engines) for name in ("steps", "batches")}

    def _describe(self, request: Message) -> Message:
        id, world = self.world(request["world"])
        memory = 0 if isinstance(world, TextWorld) else world.net.memory
        sizes = {"memory": memory, "members": world.net.members}
        planner = self._planner
        plans = None if planner is None or planner.id != id else planner.describe()
        return {"world": id, "codec": world.codec, **sizes, "planner": plans}

    def _plan(self, request: Message) -> Message:
        planner = self._planner
        if planner is None or request["world"] not in ("", planner.id):
            raise UsageError(
                f"request 'plan': world {request['world']!a:.60} is served without a planner; serve"
                " it with planner=icem"
            )
        with self._lock:
            return planner.answer(request)

    def _begin(self, request: Message) -> Message:
        id, world = self.world(request["world"])
        if isinstance(world, TextWorld):
            check_text_begin(request)
            text = self._text_session(id, world, request, len(request["episode"]))
            reply: Message = {"world": id} | text.begin(request)
            with self._lock:
                self._sessions.pop(request["replaces"], None)
                self._keep(request["session"], text)
            return reply
        check_begin(request, world.spec)
        episode = request["episode"]
        session = Session(world, request["seed"], request["first_env"], len(episode))
        with self._lock:
            self._sessions.pop(request["replaces"], None)
            task, observation = session.starts(request, episode, np.ones(len(episode), np.bool_))
            session.carry = world.begin(task, observation, session.member(episode))
            self._keep(request["session"], session)
        reply = {"world": id}
        put(reply, "task", task)
        put(reply, "observation", observation)
        return reply

    def _restore(self, request: Message) -> Message:
        id, world = self.world(request["world"])
        if isinstance(world, TextWorld):
            check_text_restore(request, world.net.members)
            text = self._text_session(id, world, request, len(request["context.member"]))
            text.restore(request)
            with self._lock:
                self._keep(request["session"], text)
            return {"clock": text.clock}
        check_restore(request, world.spec, world.config.members)
        context = Context.from_numpy(grouped(request, CONTEXT))
        session = Session(world, request["seed"], request["first_env"], len(context.member))
        with self._lock:
            try:
                session.carry = world.restore(context)
            except ValueError as error:
                fix = "send the steps since the session began"
                raise UsageError(f"request 'restore': {error}; {fix}") from error
            session.clock = context.clock
            self._keep(request["session"], session)
        return {"clock": context.clock}

    def _step(self, request: Message) -> Message:
        with self._lock:
            name, clock = request["session"], request["clock"]
            session = self._sessions.get(name)
            if session is None or session.stepping:
                return {"missing": True}
            self._sessions.move_to_end(name)
            digest = _digest(request)
            if session.clock == clock + 1 and session.request_digest == digest:
                return session.reply
            if session.clock != clock:
                return {"missing": True}
            if isinstance(session, TextSession):
                check_text_step(request, len(session.env))
                session.check_step(request)
            else:
                check_step(request, session.world.spec, len(session.env))
            if isinstance(session, Session):
                # An exception may leave the carry half changed: only a whole step keeps it.
                del self._sessions[name]
                session.reply = session.step(request)
                session.clock, session.request_digest = clock + 1, digest
                self._sessions[name] = session
                return session.reply
            session.stepping = True
        try:
            reply = session.step(request)  # together with the others that wait
        except BaseException:
            self._drop(name, session)
            raise
        with self._lock:  # a session that ended meanwhile is no longer among them
            session.reply, session.stepping = reply, False
            session.clock, session.request_digest = clock + 1, digest
            self._evict()
        return reply

    def _drop(self, name: str, session: TextSession) -> None:
        """Remove a session, but no other one that has taken its name."""
        with self._lock:
            if self._sessions.get(name) is session:
                del self._sessions[name]

    def _text_session(self, id: str, world: TextWorld, request: Message, batch: int) -> TextSession:
        check_memory(id, world, batch)
        with self._lock:
            engine = self._engines.setdefault(world, TextEngine(world))
        return TextSession(engine, world, id, request["seed"], request["first_env"], batch)

    def _end(self, request: Message) -> Message:
        with self._lock:
            self._sessions.pop(request["session"], None)
        return {}

    def _keep(self, name: str, session: Session | TextSession) -> None:
        self._sessions[name] = session
        self._sessions.move_to_end(name)
        self._evict()

    def _evict(self) -> None:
        """Remove the least recently used sessions beyond `max_sessions`, or whose key caches fill
        the memory; their clients replay them.
        """
        texts = [s for s in self._sessions.values() if isinstance(s, TextSession)]
        held = sum(session.memory for session in texts)
        most = cache_limit(texts[0].world.device) if texts else 0
        while len(self._sessions) > self.max_sessions or (held > most and len(texts) > 1):
            _, session = self._sessions.popitem(last=False)
            if isinstance(session, TextSession):
                texts.remove(session)
                held -= session.memory


def _digest(request: Message) -> bytes:
    """Digest of a whole request: a client may give up on one and send another at the same clock."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(request):
        value = request[name]
        digest.update(name.encode())
        digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return digest.digest()
