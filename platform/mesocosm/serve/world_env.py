"""A world as a Gymnasium vector environment.

Importing this module registers `mesocosm/World-v0`:

    import gymnasium, mesocosm.serve.world_env
    envs = gymnasium.make_vec("mesocosm/World-v0", num_envs=64, world="ID", horizon=200)
"""

from __future__ import annotations

import copy
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.text_batch import batch_codec
from mesocosm.errors import MesocosmError, UsageError, nearest
from mesocosm.model import rng
from mesocosm.model.any_world import AnyWorld
from mesocosm.model.carry import prefixed
from mesocosm.model.history import History
from mesocosm.model.language.history import TextHistory
from mesocosm.model.language.session import Texts
from mesocosm.model.tensors import Parts
from mesocosm.serve.connection import Connection, Served, reply_of
from mesocosm.serve.infos import final_infos
from mesocosm.serve.protocol import CONTEXT, START, Message, batch_rows, get, put
from mesocosm.serve.session import Sessions
from mesocosm.serve.worlds import Worlds

ID = "mesocosm/World-v0"
BACKENDS = ("serve", "local")
STATE = ("seed", "first_env", "env", "episode", "steps", "ended", "task", "history")
"""Attributes of a WorldVectorEnv, besides the world, on which its next steps depend"""


class WorldVectorEnv(gymnasium.vector.VectorEnv[Any, Any, Any]):
    """B imagined environments of one world, stepped in one call.

    A trajectory is a function of (world, seed, first_env, B, actions), on both backends and on any
    replica.

    infos: "disagreement" [B] float32 (1 is what a tenth of held-out transitions exceed), at the
    steps that `disagreement_every` asks for; "diverged" [B] bool (truncated because the next
    observation was not finite); "duration" [B] where the world has durations; each with its `_`
    mask.

    Args:
        num_envs: Number of environments B.
        world: An artifact id, a unique prefix of one, a folder, or a `World` in memory (implies
            "local"). "" is the application's default. It is pinned at `reset`;
            `reset(options={"world": id})` pins another one.
        root: Storage root in which "local" looks up the world.
        backend: "serve" (on Ray Serve) or "local" (in this process).
        app: Name of the Serve application.
        address: Address of Ray. Defaults to this process's Ray.
        horizon: Steps after which an episode is truncated; None for never.
        starts: Logged starts (task, observation), parts [N, ...] or texts. Each episode begins with
            one, by hash. None for the world's own starts.
        seed: Seed of the first `reset` without one.
        first_env: Environment i has number `first_env` + i. Clients that share a seed and differ
            in `first_env` imagine different episodes.
        autoreset_mode: NEXT_STEP (the step after an episode's end resets) or SAME_STEP (an ended
            environment resets at once; infos["final_obs"] has the last observation).
        penalty: The reward becomes reward - size * min(penalty * disagreement, 1); size is the root
            mean square of the data's rewards. infos["raw_reward"] has the world's reward. An
            unbounded penalty taught agents to end episodes at once.
        max_disagreement: Truncate an episode after a step with more, which infos["uncertain"]
            (bool, B) marks. None for never.
        adversary: The reward becomes log(1 + disagreement); infos["raw_reward"] has the world's.
        disagreement_every: N: one step of every N has infos["disagreement"], which a hash of
            (seed, clock) picks; 1 for every step, 0 for none. It takes several times as long as
            the rest of a step and changes nothing else. With `penalty`, `max_disagreement` or
            `adversary` every step has it.
        deadline_s: Seconds that a replica may take, including its replacement.
    """

    world: str
    """The world version that this client is pinned to"""
    _connection: Connection | None = None
    _begun = False
    """False before the first `reset` and after an interrupted one: the replica may be ahead."""

    def __init__(
        self,
        num_envs: int,
        world: str | Path | AnyWorld = "",
        *,
        root: str = ".mesocosm",
        backend: str = "serve",
        app: str = "mesocosm",
        address: str | None = None,
        horizon: int | None = None,
        starts: tuple[Parts, Parts] | tuple[Texts, Texts] | None = None,
        seed: int = 0,
        first_env: int = 0,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        penalty: float = 0.0,
        max_disagreement: float | None = None,
        adversary: bool = False,
        disagreement_every: int = 1,
        deadline_s: float = 120.0,
    ):
        for key, value in (("num_envs", num_envs), ("horizon", horizon)):
            if value is not None and value < 1:
                raise UsageError(f"{key} must be >= 1, got {value}")
        if disagreement_every < 0:
            raise UsageError(f"disagreement_every must be >= 0, got {disagreement_every}")
        if backend not in BACKENDS:
            hint = f"got {backend!r}{nearest(backend, BACKENDS)}"
            raise UsageError(f"backend must be one of {', '.join(BACKENDS)}, {hint}")
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        if self.autoreset_mode is AutoresetMode.DISABLED:
            raise UsageError("autoreset_mode must be 'NextStep' or 'SameStep', got 'Disabled'")
        self._same_step = self.autoreset_mode is AutoresetMode.SAME_STEP
        self.metadata = {"autoreset_mode": self.autoreset_mode, "render_modes": []}
        self.num_envs, self.horizon, self.deadline_s = num_envs, horizon, deadline_s
        self.penalty, self.adversary = penalty, adversary
        self.disagreement_every = disagreement_every
        self._needs_disagreement = bool(penalty) or adversary or max_disagreement is not None
        limit = np.inf if max_disagreement is None else max_disagreement
        self.max_disagreement = float(np.float32(limit))
        self._seed, self._first_env, self.starts = seed, first_env, starts
        self._env = first_env + np.arange(num_envs)
        self._routed, self._generation, self._seconds, self._tokens = uuid.uuid4().hex, 0, 0.0, 0
        self._episode: NDArray[np.int64] | None = None
        if isinstance(world, AnyWorld):
            self._connection = Sessions(lambda _: ("in-memory", world))
        elif backend == "local":
            self._connection = Sessions(Worlds(root).get)
        else:
            self._connection = Served(app, address, deadline_s)
        self._describe("" if isinstance(world, AnyWorld) else str(world))

    def _describe(self, world: str) -> None:
        """Pin a world version. Raises UsageError where its spaces or codec do not fit."""
        reply = self._call({"op": "describe", "world": world})
        codec, fix = batch_codec(reply["codec"]), "make a new client for it"
        spaces = (codec.observation_space, codec.action_space)
        if not self._generation:
            self.single_observation_space, self.single_action_space = spaces
            self.observation_space = batch_space(codec.observation_space, self.num_envs)
            self.action_space = batch_space(codec.action_space, self.num_envs)
        elif spaces != (expected := (self.single_observation_space, self.single_action_space)):
            message = f"world {reply['world']!r} must have this client's spaces {expected}"
            raise UsageError(f"{message}, got {spaces}; {fix}")
        elif self.starts is not None and codec.id != self._codec.id:
            worlds = f"world {self.world!r}, and {reply['world']!r}"
            raise UsageError(f"starts: they are encoded for {worlds} has another codec; {fix}")
        self._begun = False
        self._codec: Any = codec  # an `AnyBatchCodec`, whose batches are `Parts` or `Texts`
        self.world, self._members = reply["world"], reply["members"]
        self._history: Any = TextHistory()
        if isinstance(codec, Codec):
            self._history = History(reply["memory"])

    @property
    def task_options(self) -> list[dict[str, Any]]:
        """The reset options of each environment's current task; empty without any."""
        return self._codec.task_options(self._task)

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin new episodes everywhere.

        Args:
            seed: All that follows is a function of it. Without one, episode numbers continue.
            options: {"world": id} pins another version of the world.

        Raises:
            UsageError: The other version has other spaces, or an option is unknown.
        """
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int | np.integer)):
            raise UsageError(f"seed must be one integer for all environments, got seed={seed!r}")
        options = dict(options or {})
        for key in options.keys() - {"world"}:
            hint = nearest(key, ["world"])
            raise UsageError(f"reset option {key!r} is unknown{hint}; a world takes 'world'")
        super().reset(seed=None if seed is None else int(seed))
        if options.get("world", self.world) != self.world:
            self._describe(str(options["world"]))
        if seed is not None or self._episode is None:
            self._seed = self._seed if seed is None else int(seed)
            self._episode = np.zeros(self.num_envs, np.int64)
        else:
            self._episode = self._episode + 1
        self._begun = False
        began = time.monotonic()
        replaces, self._generation = self._session, self._generation + 1
        request = self._in_world("begin") | {"replaces": replaces, "episode": self._episode}
        self._put_starts(request, self._episode)
        reply = self._call(request)
        self._task, observation = get(reply, "task"), get(reply, "observation")
        self._steps = np.zeros(self.num_envs, np.int64)
        self._ended = np.zeros(self.num_envs, np.bool_)
        self._history.begin(self._task, observation, self._codec.spec.action)
        self._begun = True
        self._seconds += time.monotonic() - began
        return self._codec.decode_observation(observation, self._task), {}

    def step(
        self, actions: Any
    ) -> tuple[Any, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Step every environment; see the class for `infos`.

        Raises:
            MesocosmError: An action is not in the action space.
        """
        if not self._begun or self._episode is None:
            raise ResetNeeded("call reset() before step()")
        same_step, cut, began = self._same_step, self._ended, time.monotonic()
        action = self._encode_action(actions)
        after = self._steps + 1
        late = after >= (np.inf if self.horizon is None else self.horizon)
        if same_step:
            cut = late
        request: Message = {"op": "step", "session": self._session, "clock": self._history.clock}
        request |= {"mode": self.autoreset_mode.value, "max_disagreement": self.max_disagreement}
        request["disagreement"] = self._asks(self._history.clock)
        request |= {"episode": self._episode, "step": self._steps, "cut": cut}
        put(request, "action", action)
        if same_step or cut.any():
            self._put_starts(request, self._episode + 1)
        reply = self._step(request)

        terminated, diverged = reply["terminated"], reply["diverged"]
        uncertain = np.zeros(self.num_envs, np.bool_)
        if np.isfinite(self.max_disagreement):
            uncertain = reply["disagreement"] > self.max_disagreement
        truncated = (late | diverged | uncertain) & ~terminated
        if same_step:
            restarted = cut | terminated | diverged | uncertain
        else:
            restarted, truncated = cut, truncated & ~cut
        observation = get(reply, "observation")
        reward, infos = self._reward(reply)
        if np.isfinite(self.max_disagreement):
            infos["uncertain"] = uncertain
        mask = np.ones(self.num_envs, np.bool_) if same_step else ~cut
        infos |= {f"_{name}": mask for name in infos}
        self._steps = after
        if restarted.any():
            if same_step:
                last = self._codec.decode_observation(get(reply, "final"), self._task)
                infos = final_infos(self.observation_space, last, restarted, infos)
            self._steps = np.where(restarted, 0, after)
            self._episode = self._episode + restarted
            self._task = get(reply, "task").where(torch.from_numpy(restarted), self._task)
        self._ended = terminated | truncated
        self._history.step(action, observation, self._task, restarted)
        decoded = self._codec.decode_observation(observation, self._task)
        self._seconds += time.monotonic() - began
        self._tokens += int(reply["tokens"].sum()) if "tokens" in reply else 0
        return decoded, reward, terminated, truncated, infos

    def keep_codes(self) -> None:
        """Give images as codes [B, n] int64 of the world's tokenizer from here on, not as frames.
        Policies of images read both (`policies.images`).
        """
        if isinstance(self._codec, Codec):
            self._codec.codes = True

    def take_usage(self) -> tuple[float, int]:
        """(seconds in reset and step, tokens that a text world generated) since the last call."""
        usage, self._seconds, self._tokens = (self._seconds, self._tokens), 0.0, 0
        return usage

    def _asks(self, clock: int) -> bool:
        """True if the step at this clock asks for disagreement: one of each `disagreement_every`.
        A hash picks it: every N-th would always be the same step of short episodes.
        """
        every = 1 if self._needs_disagreement else self.disagreement_every
        if every < 2:
            return every == 1
        bits = rng.bits(rng.keys(self._seed, self._env[:1], clock // every, START), rng.SAMPLED)
        return bool((bits[0] >> 32) % every == clock % every)

    def _encode_action(self, actions: Any) -> Parts | Texts:
        """Encode actions. Raises UsageError where one is missing or not finite."""
        action: Parts | Texts = self._codec.action(actions)
        count = batch_rows(action)
        if count != self.num_envs:
            fix = "give one per environment"
            raise UsageError(f"{count} actions for num_envs={self.num_envs}; {fix}")
        if isinstance(action, Texts):
            return action
        wrong = ~np.isfinite(action.numbers.numpy())
        if not self._same_step:
            wrong &= ~self._ended[:, None]  # an environment that resets ignores its action
        if wrong.any():
            env, column = np.argwhere(wrong)[0].tolist()
            label, value = self._codec.action_labels()[column], action.numbers[env, column]
            raise UsageError(f"{label} of environment {env} must be finite, got {value}")
        return action

    def _reward(self, reply: Message) -> tuple[NDArray[np.float64], dict[str, Any]]:
        """The reward [B] after penalty or adversary, and the infos of a step."""
        reward, infos = reply["reward"].astype(np.float64), {"diverged": reply["diverged"]}
        if "disagreement" in reply:
            infos["disagreement"] = disagreement = reply["disagreement"]
        if self._codec.spec.durations:
            infos["duration"] = reply["duration"]
        if self.penalty or self.adversary:
            infos["raw_reward"] = reward
        if self.adversary:
            reward = np.log1p(disagreement.astype(np.float64))
        elif self.penalty:
            size = self._codec.spec.reward_size
            reward = reward - size * np.minimum(self.penalty * disagreement, 1.0)
        return reward, infos

    def state(self) -> dict[str, Any]:
        """A picklable state from which `restore` continues in another process."""
        if not self._begun:
            raise ResetNeeded("call reset() before state()")
        state = {name: copy.deepcopy(getattr(self, f"_{name}")) for name in STATE}
        return {"world": self.world, **state}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state`, with the same bits. The next step sends the history.

        Raises:
            UsageError: The state belongs to another world.
        """
        if state["world"] != self.world:
            message = f"the state must be of world {self.world!r}, got {state['world']!r}"
            raise UsageError(f"{message}; make a client of that world")
        for name in STATE:
            setattr(self, f"_{name}", copy.deepcopy(state[name]))
        self._generation = max(self._generation, 1)
        self._begun = True

    def close_extras(self, **_: Any) -> None:
        """End the session. A replica that cannot be reached evicts it later."""
        if self._connection is not None:
            self._connection.close({"op": "end", "session": self._session})

    @property
    def _session(self) -> str:
        return f"{self._routed}-{self._generation}"

    def _in_world(self, op: str) -> Message:
        """A request that begins or restores this client's session."""
        request: Message = {"op": op, "session": self._session, "world": self.world}
        return request | {"seed": self._seed, "first_env": self._first_env}

    def _put_starts(self, request: Message, episode: NDArray[np.int64]) -> None:
        if self.starts is None:
            return
        bits = rng.bits(rng.keys(self._seed, self._env, episode, START), rng.TASK)
        chosen = ((bits >> 32) & 0x7FFFFFFF) % batch_rows(self.starts[1])
        put(request, "start_task", self.starts[0][chosen])
        put(request, "start", self.starts[1][chosen])

    def _step(self, request: Message) -> Message:
        """Send a step, restoring the session on replicas that lack it."""
        deadline = time.monotonic() + self.deadline_s
        while True:
            reply = self._call(request)
            if not reply.get("missing"):
                return reply
            if time.monotonic() > deadline:
                problem = f"no replica kept the session for {self.deadline_s:g} s"
                raise MesocosmError(f"world {self.world!r}: {problem}; raise serve.max_sessions")
            member = rng.member_of(self._seed, self._env, self._episode, self._members)
            context = self._history.context(member).to_numpy()
            arrays = prefixed(CONTEXT, context)
            self._call(self._in_world("restore") | arrays)

    def _call(self, request: Message) -> Message:
        assert self._connection is not None
        return reply_of(self._connection.call(request))


if ID not in gymnasium.registry:
    gymnasium.register(
        ID,
        entry_point="mesocosm.serve.single_env:WorldEnv",
        vector_entry_point="mesocosm.serve.world_env:WorldVectorEnv",
    )
