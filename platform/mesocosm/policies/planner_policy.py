"""A planner as a policy: it keeps the planner's state between the steps of its environments."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from mesocosm.errors import UsageError
from mesocosm.model.carry import Context, grouped, prefixed
from mesocosm.model.history import History
from mesocosm.model.tensors import Parts
from mesocosm.policies.heads import batch_size, map_batch, stack
from mesocosm.policies.plan_state import PlanState
from mesocosm.policies.planner import PlannerCodec

SEEDS = 1 << 62


class Plans(Protocol):
    """A `Planner` in this process, or a served one."""

    @property
    def codec(self) -> PlannerCodec:
        """The world's codec."""

    @property
    def memory(self) -> int:
        """Steps of history that the world reads; 0 for none."""

    def begin(self, batch: int, seed: int) -> PlanState:
        """The state of `batch` environments before their first step."""

    def plan(self, context: Context, state: PlanState) -> tuple[Parts, PlanState]:
        """The next actions [B, ...], and the state after them."""


class PlannerPolicy:
    """Plans the actions of B environments that step together.

    Call `reset` before the first step, and `restart` where environments began new episodes since
    the last action. `act` takes the planned action as taken.
    """

    def __init__(self, planner: Plans):
        self.planner, self.codec = planner, planner.codec
        self.observation_space = self.codec.observation_space
        self.action_space = self.codec.action_space
        self.seconds, self.actions = 0.0, 0
        """CPU seconds of this process in `act`, and the actions that it planned"""
        self._state: PlanState | None = None

    @property
    def ms_per_action(self) -> float:
        """Milliseconds of CPU time per action in this process."""
        return 1e3 * self.seconds / max(self.actions, 1)

    def reset(self, num_envs: int = 1, seed: int = 0) -> None:
        """Begin new episodes everywhere. All that follows is a function of `seed` and the
        observations.

        Args:
            num_envs: Number of environments B.
            seed: In [0, 2^62).

        Raises:
            UsageError: An argument is out of range.
        """
        if num_envs < 1:
            raise UsageError(f"num_envs must be >= 1, got {num_envs}")
        if not 0 <= seed < SEEDS:
            raise UsageError(f"seed must be in [0, 2^62), got {seed}")
        self._state = self.planner.begin(num_envs, seed)
        self._history = History(self.planner.memory)
        self._action: Parts | None = None
        self._restarted = np.zeros(num_envs, np.bool_)

    def start(self, k: int, rng: np.random.Generator) -> None:
        """Begin episode k of one environment, seeded by `rng` (`envs.episode.EpisodeAct`)."""
        self.reset(1, int(rng.integers(SEEDS)))

    def restart(self, mask: Sequence[bool] | NDArray[np.bool_]) -> None:
        """Mark the environments whose episodes began since the last action, `mask` [B]."""
        assert self._state is not None, "call reset before restart"
        self._restarted = self._restarted | np.asarray(mask, np.bool_)
        self._state = self._state.restarted(torch.from_numpy(self._restarted))

    def act(
        self,
        observations: Any,
        explore: bool = False,
        rng: np.random.Generator | None = None,
        options: Sequence[Mapping[str, Any]] | None = None,
    ) -> Any:
        """Plan an action for each of B environments.

        Args:
            observations: The observations, in vector layout.
            explore: Not used: planning draws by its own seed.
            rng: Seeds the first call without `reset`.
            options: The reset options of each environment's task, where the world has any.

        Returns:
            Actions in vector layout, within the bounds of the action space.

        Raises:
            UsageError: The number of environments changed, or an option is missing.
        """
        began = time.process_time()
        batch = batch_size(observations)
        if self._state is None:
            self.reset(batch, 0 if rng is None else int(rng.integers(SEEDS)))
        assert self._state is not None
        if batch != len(self._state.planned):
            raise UsageError(
                f"observations must be those of {len(self._state.planned)} environments, got"
                f" {batch}; call reset(num_envs={batch})"
            )
        observation, task = (
            self.codec.observation(observations),
            self.codec.task(observations, options),
        )
        if self._action is None:
            self._history.begin(task, observation, self.codec.spec.action)
        else:
            self._history.step(self._action, observation, task, self._restarted)
        self._restarted = np.zeros(batch, np.bool_)
        context = self._history.context(np.zeros(batch, np.int64))
        self._action, self._state = self.planner.plan(context, self._state)
        actions = self.codec.decode_action(self._action)
        self.seconds += time.process_time() - began
        self.actions += batch
        return within_bounds(self.action_space, actions)

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything that the next action depends on, as flat arrays without pickle."""
        assert self._state is not None, "call reset before state"
        arrays = prefixed("plan.", self._state.to_numpy())
        if self._action is None:
            return arrays
        context = self._history.context(np.zeros(len(self._restarted), np.int64))
        arrays |= prefixed("context.", context.to_numpy())
        arrays |= {
            "action.numbers": self._action.numbers.numpy(),
            "action.categories": self._action.categories.numpy(),
            "restarted": self._restarted,
        }
        return arrays

    def restored(self, state: Mapping[str, NDArray[Any]]) -> PlannerPolicy:
        """Continue from a `state` of this planner, and return self."""
        plan, context = (grouped(state, prefix) for prefix in ("plan.", "context."))
        self._state = PlanState.from_numpy(plan)
        self._history, self._action = History(self.planner.memory), None
        self._restarted = np.zeros(len(self._state.planned), np.bool_)
        if context:
            self._history.restore(Context.from_numpy(context), self.codec.spec.action)
            names = ("action.numbers", "action.categories")
            self._action = Parts(*(torch.from_numpy(np.array(state[name])) for name in names))
            self._restarted = np.array(state["restarted"])
        return self

    def act_one(
        self, observation: Any, explore: bool = False, rng: np.random.Generator | None = None
    ) -> Any:
        """Plan the action of one environment."""
        batch = stack(self.observation_space, [observation])
        return map_batch(lambda leaf: leaf[0], self.act(batch, explore, rng))

    def __call__(self, observation: Any, rng: np.random.Generator) -> Any:
        """Plan the action of one environment (`envs.episode.Act`)."""
        return self.act_one(observation, False, rng)


def within_bounds(space: spaces.Space[Any], batch: Any) -> Any:
    """Clip a batch of actions to the bounds of Boxes: a float32 may be one digit outside."""
    if isinstance(space, spaces.Dict):
        return {key: within_bounds(part, batch[key]) for key, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(within_bounds(part, x) for part, x in zip(space.spaces, batch, strict=True))
    if isinstance(space, spaces.Box) and space.dtype != np.bool_:
        return np.clip(batch, space.low, space.high)
    return batch
