"""Sessions of text worlds: each steps one client's environments, through `text_batching`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from mesocosm.data.loading.texts import TextCodec
from mesocosm.errors import MesocosmError
from mesocosm.model import rng
from mesocosm.model.language.session import TextCarry, TextContext, Texts
from mesocosm.model.language.world import TextWorld
from mesocosm.serve.episodes import EpisodeSession
from mesocosm.serve.protocol import START, Message, get, put
from mesocosm.serve.text_batching import TextEngine

DRAWS = 8
"""Draws of an episode's start at most, until it can be read."""


class TextSession(EpisodeSession):
    """One client's B environments in a text world."""

    carry: TextCarry
    world: TextWorld

    def __init__(
        self, engine: TextEngine, world: TextWorld, id: str, seed: int, first_env: int, batch: int
    ):
        super().__init__(world, world.net.members, seed, first_env, batch)
        self.engine, self.id = engine, id
        self._codec = TextCodec.from_json(self.world.codec) if self.world.codec else None

    def starts(
        self, request: Message, episode: NDArray[np.int64], mask: NDArray[np.bool_]
    ) -> tuple[Texts, Texts]:
        """As `EpisodeSession.starts`. A drawn start that cannot be read is drawn again, by another
        key of its own.

        Raises:
            MesocosmError: None of `DRAWS` draws of a start can be read.
        """
        if "start.texts" in request:
            return get(request, "start_task"), get(request, "start")
        task, observation = [""] * len(self.env), [""] * len(self.env)
        rows, problem = np.flatnonzero(mask), ""
        for draw in range(DRAWS):
            wrong = []
            for row, *drawn in self._drawn(rows, episode, START - draw):
                task[row], observation[row] = drawn
                if (reason := self._problem(*drawn)) is not None:
                    wrong.append(row)
                    problem = reason
            if not wrong:
                return Texts(task), Texts(observation)
            rows = np.array(wrong)
        raise MesocosmError(
            f"world {self.id}: none of {DRAWS} generated starts of environment"
            f" {self.env[rows[0]]}, episode {episode[rows[0]]}, can be read ({problem}); pretrain"
            " the world longer, or begin with logged starts"
        )

    def _drawn(
        self, rows: NDArray[np.int64], episode: NDArray[np.int64], step: int
    ) -> Iterator[tuple[int, str, str]]:
        """(row, task, observation) of a generated start for each of `rows`, by the keys of `step`,
        which is negative.
        """
        keys = torch.from_numpy(rng.keys(self.seed, self.env[rows], episode[rows], step))
        keys = keys.to(self.world.device)
        starts = self.engine.alone(lambda: self.world.sample_start(keys))
        return zip(rows.tolist(), *starts, strict=True)

    def _problem(self, task: str, observation: str) -> str | None:
        """Why a start is none of the space; None if it can be read."""
        if self._codec is None:
            return None
        try:
            self._codec.read_task(task)
            self._codec.read_with_task(observation, task)
        except ValueError as error:
            return str(error)
        return None

    @property
    def memory(self) -> int:
        """The bytes of its key cache."""
        cache = self.carry.cache
        return int(cache.batch * cache.columns * self.world.net.model.token_bytes)

    def begin(self, request: Message) -> Message:
        """Begin all episodes, and return the reply."""
        episode = request["episode"]
        task, observation = self.starts(request, episode, np.ones(len(episode), np.bool_))
        self.carry = self.world.begin(task, observation, self.member(episode))
        reply: Message = {}
        put(reply, "task", task)
        put(reply, "observation", observation)
        return reply

    def restore(self, request: Message) -> None:
        """Continue from the context of a request."""
        steps = [[(a, o) for a, o in row] for row in request["context.steps"]]
        member = torch.from_numpy(np.array(request["context.member"]))
        texts = request["context.task.texts"], request["context.start.texts"]
        context = TextContext(*texts, steps, member, whole=True)
        self.carry = self.engine.alone(lambda: self.world.restore(context))
        self.clock = int(request["context.clock"])

    def check_step(self, request: Message) -> None:
        """Raise UsageError where an action is too long for the window; nothing changes."""
        self.world.require_room(self.carry, request["action.texts"])

    def step(self, request: Message) -> Message:
        """Step all environments, then begin new episodes: for those that end here (SAME_STEP) or
        ended before (NEXT_STEP).
        """
        world, episode = self.world, request["episode"]
        keys = rng.keys(self.seed, self.env, episode, request["step"])
        before, requested = Texts(self.carry.observations), request["disagreement"]
        self.carry, out = self.engine.step(
            self.carry,
            request["action.texts"],
            torch.from_numpy(keys).to(world.device),
            disagreement=requested,
        )
        readable = torch.tensor([self._readable(text) for text in out.observation])
        observation = Texts(out.observation).where(readable, before)
        diverged = ~readable.numpy()
        reply: Message = {
            "reward": out.reward.numpy(force=True),
            "terminated": out.terminated.numpy(force=True) & ~diverged,
            "p_terminated": out.p_terminated.numpy(force=True),
            "duration": np.zeros(len(diverged), np.float32),
            "diverged": diverged,
            "tokens": out.tokens.numpy(force=True),
        }
        if requested:
            assert out.disagreement is not None
            reply["disagreement"] = out.disagreement.numpy(force=True)
        return self.stepped(request, reply, observation)

    def _readable(self, text: str) -> bool:
        """True if a generated text is an observation of the space."""
        if self._codec is None:
            return True
        try:
            self._codec.observation_form.read(text)
        except ValueError:
            return False
        return True
