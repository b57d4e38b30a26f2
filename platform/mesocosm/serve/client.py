"""A served world as a Gymnasium vector environment, and as a single one.

Importing this module registers `mesocosm/World-v0`:

    import gymnasium, mesocosm.serve.client
    envs = gymnasium.make_vec("mesocosm/World-v0", num_envs=64, world="<id>", horizon=200)
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
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate
from numpy.typing import NDArray

from mesocosm.data.loading.codec import Codec
from mesocosm.errors import MesocosmError, UsageError, nearest
from mesocosm.model import rng
from mesocosm.model.spec import Parts
from mesocosm.model.world import World
from mesocosm.serve.connection import Connection, InProcess, Served, reply_of
from mesocosm.serve.context import Mirror
from mesocosm.serve.protocol import CONTEXT, Message, get, put
from mesocosm.serve.session import START, Sessions, Worlds

ID = "mesocosm/World-v0"
BACKENDS = ("serve", "local")
IN_MEMORY = "in-memory"
STATE = ("seed", "first_env", "env", "episode", "steps", "ended", "task")
"""Attributes of a WorldVectorEnv that its next steps depend on, beside the world and the history.
"""


class WorldVectorEnv(gymnasium.vector.VectorEnv[Any, Any, Any]):
    """B imagined environments of one world, stepped in one call.

    world: an artifact id, a unique prefix of one, a folder, or a `World` in memory (which implies
    "local"); "" is the
        application's default. It is pinned at `reset`; `reset(options={"world": id})` pins another
        one.
    root: the storage root in which "local" finds the world; a served world is found by its
    replicas. backend: "serve" (Ray Serve application `app`, on this process's Ray or on the one at
    `address`) or "local" (in this process). horizon: steps after which an episode is truncated;
    None: never. starts: logged starts (task, observation), [N, ...] parts each, of which every
    episode begins with one by hash; None: the world's own. seed: of the first `reset` where that is
    given none. Environment i is number `first_env` + i: clients that share a seed and
        differ in `first_env` imagine different episodes.
    autoreset_mode: NEXT_STEP (an ended environment's next step is its reset) or SAME_STEP (it is
    reset at once, and
        infos["final_obs"] has the last observation).
    penalty: reward becomes reward - size * min(penalty * disagreement, 1), where size is the root
    mean square of the data's rewards; infos["raw_reward"] keeps the world's own. Where living is
    paid, an unbounded penalty taught agents to die at once. adversary: reward becomes log(1 +
    disagreement), and infos["raw_reward"] keeps the world's own. max_disagreement: an episode is
    truncated after a step with more, and infos["uncertain"] [B] bool is true there; None: never.
    deadline_s: how long a replica may take, its replacement included.

    infos: "disagreement" [B] float32, 1 being what a tenth of held-out transitions exceed;
    "diverged" [B] bool, where an episode was truncated because the world's next observation was not
    finite; "duration" [B] where the world has durations; each with its `_` mask. A trajectory is a
    function of (world, seed, first_env, B, actions): it is the same on both backends, and on
    whichever replica.
    """

    _connection: Connection | None = None
    _codec: Codec
    _begun = False
    """False before the first `reset`, and after one that was broken off: the replica may be ahead
    of this client.
    """

    def __init__(
        self,
        num_envs: int,
        world: str | Path | World = "",
        *,
        root: str = ".mesocosm",
        backend: str = "serve",
        app: str = "mesocosm",
        address: str | None = None,
        horizon: int | None = None,
        starts: tuple[Parts, Parts] | None = None,
        seed: int = 0,
        first_env: int = 0,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        penalty: float = 0.0,
        max_disagreement: float | None = None,
        adversary: bool = False,
        deadline_s: float = 120.0,
    ):
        if num_envs < 1:
            raise UsageError(f"num_envs={num_envs} must be at least 1")
        if horizon is not None and horizon < 1:
            raise UsageError(f"horizon={horizon} must be at least 1, or None for no truncation")
        if backend not in BACKENDS:
            raise UsageError(
                f"backend={backend!r} is unknown, use one of"
                f" {', '.join(BACKENDS)}{nearest(backend, BACKENDS)}"
            )
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        if self.autoreset_mode is AutoresetMode.DISABLED:
            raise UsageError(
                "autoreset_mode='Disabled' is not supported, use 'NextStep' or 'SameStep'"
            )
        self.num_envs = num_envs
        self.horizon = horizon
        self.penalty = penalty
        self.adversary = adversary
        self.max_disagreement = (
            float("inf") if max_disagreement is None else float(np.float32(max_disagreement))
        )
        self.deadline_s = deadline_s
        self._seed = seed
        self._first_env = first_env
        self._env = first_env + np.arange(num_envs)
        if isinstance(world, World):
            self._world, self._connection = "", InProcess(Sessions(lambda _: (IN_MEMORY, world)))
        else:
            self._world = str(world)
            self._connection = (
                InProcess(Sessions(Worlds(root).get))
                if backend == "local"
                else Served(app, address, deadline_s)
            )
        self._routed = uuid.uuid4().hex
        self._generation = 0
        self._starts = starts
        self._describe(self._world)
        self.metadata = {"autoreset_mode": self.autoreset_mode, "render_modes": []}
        if starts is not None:
            self._check_starts(starts)
        self._episode: NDArray[np.int64] | None = None

    def _describe(self, world: str) -> None:
        reply = self._call({"op": "describe", "world": world})
        codec = Codec.from_json(reply["codec"])
        if self._generation and (
            codec.observation_space != self.single_observation_space
            or codec.action_space != self.single_action_space
        ):
            raise UsageError(
                f"world {reply['world']!r} has other spaces ({codec.observation_space},"
                f" {codec.action_space}) than this client's ({self.single_observation_space},"
                f" {self.single_action_space}); make a new client for it"
            )
        if self._generation and self._starts is not None and codec.id != self._codec.id:
            raise UsageError(
                f"starts: they are encoded as world {self._world!r} reads them, and"
                f" {reply['world']!r} reads otherwise; make a new client for it"
            )
        self._begun = False
        self._codec: Codec = codec
        self._world = reply["world"]
        self._mirror = Mirror(reply["memory"])
        self._members = reply["members"]
        if not self._generation:
            self.single_observation_space, self.single_action_space = (
                codec.observation_space,
                codec.action_space,
            )
            self.observation_space = batch_space(self.single_observation_space, self.num_envs)
            self.action_space = batch_space(self.single_action_space, self.num_envs)

    def _check_starts(self, starts: tuple[Parts, Parts]) -> None:
        for name, parts, spec in (
            ("task", starts[0], self._codec.spec.task),
            ("observation", starts[1], self._codec.spec.observation),
        ):
            got = (len(parts.numbers), parts.numbers.shape[1], parts.categories.shape[1])
            want = (len(starts[1].numbers), spec.numbers, len(spec.categories))
            if got != want or not got[0]:
                raise UsageError(
                    f"starts: the {name} parts have (rows, numbers, categories) = {got} where the"
                    f" world has {want}; encode them with its own codec"
                )

    # -- the environment
    # -----------------------------------------------------------------------------------------------

    @property
    def world(self) -> str:
        """The world version that this client is pinned to."""
        return self._world

    @property
    def task_options(self) -> list[dict[str, Any]]:
        """The reset options that the task of each environment's present episode holds; empty dicts
        where tasks have none.
        """
        return self._codec.task_options(self._task)

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin new episodes everywhere. `seed` makes what follows a function of it; without,
        episodes go on being numbered.

        options: {"world": id} pins another version of the world. Raises UsageError for one of other
        spaces.
        """
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int | np.integer)):
            raise UsageError(
                f"seed={seed!r} must be one integer: the environments of a world are told apart by"
                " their numbers"
            )
        options = dict(options or {})
        if unknown := sorted(options.keys() - {"world"}):
            raise UsageError(
                f"reset option {unknown[0]!r} is unknown{nearest(unknown[0], ['world'])}; a world"
                " takes 'world'"
            )
        super().reset(seed=None if seed is None else int(seed))
        if "world" in options and options["world"] != self._world:
            self._describe(str(options["world"]))
        if seed is not None or self._episode is None:
            self._seed = self._seed if seed is None else int(seed)
            self._episode = np.zeros(self.num_envs, np.int64)
        else:
            self._episode = self._episode + 1
        self._begun = False
        replaces, self._generation = self._session, self._generation + 1
        request: Message = {
            "op": "begin",
            "session": self._session,
            "replaces": replaces,
            "world": self._world,
        }
        request |= {"seed": self._seed, "first_env": self._first_env, "episode": self._episode}
        self._put_starts(request, self._episode)
        reply = self._call(request)
        self._task, observation = get(reply, "task"), get(reply, "observation")
        self._steps = np.zeros(self.num_envs, np.int64)
        self._ended = np.zeros(self.num_envs, np.bool_)
        self._mirror.begin(self._task, observation, self._codec.spec.action)
        self._begun = True
        return self._codec.decode_observation(observation, self._task), {}

    def step(
        self, actions: Any
    ) -> tuple[Any, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """One step of every environment; see the class for `infos`. Raises MesocosmError for
        actions that the space does not hold.
        """
        if not self._begun or self._episode is None:
            raise ResetNeeded("call reset() before step()")
        same_step = self.autoreset_mode is AutoresetMode.SAME_STEP
        action = self._codec.action(actions)
        if len(action.numbers) != self.num_envs:
            raise UsageError(
                f"{len(action.numbers)} actions for num_envs={self.num_envs}; give one to each"
                " environment"
            )
        self._check_finite(
            action, resetting=np.zeros(self.num_envs, np.bool_) if same_step else self._ended
        )
        after = self._steps + 1
        late = (
            after >= self.horizon if self.horizon is not None else np.zeros(self.num_envs, np.bool_)
        )
        cut = late if same_step else self._ended
        request: Message = {
            "op": "step",
            "session": self._session,
            "clock": self._mirror.clock,
            "mode": self.autoreset_mode.value,
        }
        request |= {
            "episode": self._episode,
            "step": self._steps,
            "cut": cut,
            "max_disagreement": self.max_disagreement,
        }
        put(request, "action", action)
        if same_step or cut.any():
            self._put_starts(request, self._episode + 1)
        reply = self._step(request)

        terminated, diverged = reply["terminated"], reply["diverged"]
        uncertain = reply["disagreement"] > self.max_disagreement
        restarted = cut | terminated | diverged | uncertain if same_step else cut
        truncated = (late | diverged | uncertain) & ~terminated & (True if same_step else ~cut)
        observation, disagreement = get(reply, "observation"), reply["disagreement"]
        reward = reply["reward"].astype(np.float64)
        told = ~cut if not same_step else np.ones(self.num_envs, np.bool_)
        infos: dict[str, Any] = {
            "disagreement": disagreement,
            "_disagreement": told,
            "diverged": diverged,
            "_diverged": told,
        }
        if np.isfinite(self.max_disagreement):
            infos |= {"uncertain": uncertain, "_uncertain": told}
        if self.penalty or self.adversary:
            infos |= {"raw_reward": reward, "_raw_reward": told}
            reward = (
                np.log1p(disagreement.astype(np.float64))
                if self.adversary
                else reward
                - self._codec.spec.reward_size * np.minimum(self.penalty * disagreement, 1.0)
            )
        if self._codec.spec.durations:
            infos |= {"duration": reply["duration"], "_duration": told}
        if restarted.any():
            if same_step:
                infos = self._final(reply, restarted, infos)
            self._steps = np.where(restarted, 0, after)
            self._episode = self._episode + restarted
            self._task = _rows(restarted, get(reply, "task"), self._task)
        else:
            self._steps = after
        self._ended = terminated | truncated
        self._mirror.step(action, observation, self._task, restarted)
        return (
            self._codec.decode_observation(observation, self._task),
            reward,
            terminated,
            truncated,
            infos,
        )

    def _check_finite(self, action: Parts, resetting: NDArray[np.bool_]) -> None:
        """Raise UsageError, naming the number and the environment, for an action that is NaN or
        infinite. An environment that resets ignores its action.
        """
        wrong = ~np.isfinite(action.numbers.numpy()) & ~resetting[:, None]
        if wrong.any():
            env, column = (int(i) for i in np.argwhere(wrong)[0])
            raise UsageError(
                f"{self._codec.action_labels()[column]} of environment {env} must be finite, got"
                f" {action.numbers[env, column]}"
            )

    def _final(
        self, reply: Message, restarted: NDArray[np.bool_], infos: dict[str, Any]
    ) -> dict[str, Any]:
        """SAME_STEP's infos: what the last step of an ended episode said goes under "final_info",
        its observation under "final_obs".
        """
        last = self._codec.decode_observation(get(reply, "final"), self._task)
        final = np.full(self.num_envs, None, dtype=object)
        for i, value in enumerate(iterate(self.observation_space, last)):
            if restarted[i]:
                final[i] = value
        now: dict[str, Any] = {}
        then: dict[str, Any] = {}
        for name in [name for name in infos if not name.startswith("_")]:
            nothing = np.zeros(1, infos[name].dtype)
            now |= {name: np.where(restarted, nothing, infos[name]), f"_{name}": ~restarted}
            then |= {name: np.where(restarted, infos[name], nothing), f"_{name}": restarted}
        return now | {
            "final_obs": final,
            "_final_obs": restarted,
            "final_info": then,
            "_final_info": restarted,
        }

    def state(self) -> dict[str, Any]:
        """What the next steps depend on, for `restore` in another process. Pickle it."""
        if not self._begun:
            raise ResetNeeded("call reset() before state()")
        return {"world": self._world, "mirror": copy.deepcopy(self._mirror)} | {
            name: copy.deepcopy(getattr(self, f"_{name}")) for name in STATE
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken, with the same bits.

        The next step sends the history to a replica. Raises UsageError for the state of another
        world.
        """
        if state["world"] != self._world:
            raise UsageError(
                f"the state is of world {state['world']!r}, and this client is pinned to"
                f" {self._world!r}; make a client of the same world"
            )
        self._mirror = copy.deepcopy(state["mirror"])
        for name in STATE:
            setattr(self, f"_{name}", copy.deepcopy(state[name]))
        self._generation = max(self._generation, 1)
        self._begun = True

    def close_extras(self, **_: Any) -> None:
        """End the session (a replica that is away forgets it by itself)."""
        if self._connection is not None:
            self._connection.close({"op": "end", "session": self._session})

    # -- the protocol
    # --------------------------------------------------------------------------------------------------

    @property
    def _session(self) -> str:
        return f"{self._routed}-{self._generation}"

    def _put_starts(self, request: Message, episode: NDArray[np.int64]) -> None:
        if self._starts is None:
            return
        chosen = (
            (rng.bits(rng.keys(self._seed, self._env, episode, START), rng.TASK) >> 32) & 0x7FFFFFFF
        ) % len(self._starts[1].numbers)
        put(request, "start_task", self._starts[0][chosen])
        put(request, "start", self._starts[1][chosen])

    def _step(self, request: Message) -> Message:
        deadline = time.monotonic() + self.deadline_s
        while True:
            reply = self._call(request)
            if not reply.get("missing"):
                return reply
            if time.monotonic() > deadline:
                raise MesocosmError(
                    f"world {self._world!r}: no replica kept the session for {self.deadline_s:g} s;"
                    " raise serve.max_sessions"
                )
            member = rng.member_of(self._seed, self._env, self._episode, self._members)
            restore: Message = {
                "op": "restore",
                "session": self._session,
                "world": self._world,
                "seed": self._seed,
                "first_env": self._first_env,
            }
            self._call(
                restore
                | {
                    f"{CONTEXT}{name}": value
                    for name, value in self._mirror.context(member).to_numpy().items()
                }
            )

    def _call(self, request: Message) -> Message:
        assert self._connection is not None
        return reply_of(self._connection.call(request))


def _rows(mask: NDArray[np.bool_], new: Parts, old: Parts) -> Parts:
    """`new` where `mask` [B] is true, `old` elsewhere."""
    return new.where(torch.from_numpy(mask), old)


class WorldEnv(gymnasium.Env[Any, Any]):
    """One imagined environment; arguments as `WorldVectorEnv` has them, but for the number and the
    autoreset.
    """

    def __init__(self, world: str | Path | World = "", **arguments: Any):
        for name in ("num_envs", "autoreset_mode"):
            if name in arguments:
                raise UsageError(
                    f"{name}={arguments[name]!r} is no argument of a single environment, which"
                    " never resets itself; use gymnasium.make_vec"
                )
        self._vector = WorldVectorEnv(1, world, **arguments)
        self.observation_space = self._vector.single_observation_space
        self.action_space = self._vector.single_action_space
        self.metadata = {"render_modes": []}
        self._over = False

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        observation, infos = self._vector.reset(seed=seed, options=options)
        self._over = False
        return self._first(observation), infos

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self._over:
            raise ResetNeeded("the episode is over: call reset() before step()")
        batch = concatenate(self.action_space, [action], create_empty_array(self.action_space, 1))
        observation, reward, terminated, truncated, infos = self._vector.step(batch)
        self._over = bool(terminated[0] or truncated[0])
        info = {name: value[0] for name, value in infos.items() if not name.startswith("_")}
        # Of NumPy's own bool Gymnasium's vectors make an array of objects.
        info = {
            name: bool(value) if isinstance(value, np.bool_) else value
            for name, value in info.items()
        }
        return (
            self._first(observation),
            float(reward[0]),
            bool(terminated[0]),
            bool(truncated[0]),
            info,
        )

    def _first(self, batch: Any) -> Any:
        return next(iter(iterate(self._vector.observation_space, batch)))

    def close(self) -> None:
        self._vector.close()


if ID not in gymnasium.registry:
    gymnasium.register(
        ID,
        entry_point="mesocosm.serve.client:WorldEnv",
        vector_entry_point="mesocosm.serve.client:WorldVectorEnv",
    )
