"""One episode of a world, played by a person: begin, step, undo. Reality is stepped with it if its
start is a real one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.text_batch import AnyBatchCodec, TextBatchCodec, batch_codec
from mesocosm.datasets import masks
from mesocosm.datasets.spaces import SpaceCodec
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.model.any_world import AnyWorld
from mesocosm.model.tokenizer.frames import as_bytes
from mesocosm.play.real_side import Bill, RealMoment, RealSide
from mesocosm.policies.heads import stack
from mesocosm.serve.openenv_session import commands_of
from mesocosm.serve.protocol import AnyStarts
from mesocosm.serve.tasks import GENERATED, LOGGED, Tasks
from mesocosm.serve.world_env import WorldVectorEnv
from mesocosm.store.artifacts import Storage

REAL = "reality"
"""The split of starts that the real environment draws."""
UNDO = 200
"""Steps that can be undone."""


@dataclass(frozen=True)
class Difference:
    """How far an imagined observation is from the real one."""

    numbers: float | None
    """Root mean square over the numbers, each in standard deviations of the world's data; None
    without numbers or statistics.
    """
    others: int
    """Categories and texts that differ."""
    pixels: float | None
    """Root mean square over the values of all images, in levels of 0 to 255; None without any."""


@dataclass(frozen=True)
class Moment:
    """One moment of the imagined episode: the world's outputs, and reality's where it is stepped
    too.
    """

    step: int
    action: Any
    """The action before it; None at the start."""
    observation: Any
    reward: float | None
    total: float
    """The return so far."""
    terminated: bool = False
    truncated: bool = False
    diverged: bool = False
    disagreement: float | None = None
    duration: float | None = None
    commands: list[str] | None = None
    """Commands that make sense now, where a text environment of Mesocosm lists them."""
    real: RealMoment | None = None
    difference: Difference | None = None

    @property
    def over(self) -> bool:
        """True if the imagined episode has ended."""
        return self.terminated or self.truncated


@dataclass(frozen=True)
class GameStart:
    """How an episode began: the same values begin the same one."""

    split: str
    index: int
    """The logged start; 0 for other splits."""
    seed: int
    """Seed of what the world draws, and of the real environment's own start."""
    task: Mapping[str, Any] = field(default_factory=dict)
    """The reset options of the episode's task."""


@dataclass(frozen=True)
class GameState:
    """The state after a request, with the moments that are new to the client."""

    start: GameStart
    revision: int
    """The number of changes so far, by any window."""
    steps: int
    moments: list[Moment]
    over: bool
    undoable: bool
    beside: bool
    """True while reality is stepped too."""
    note: str | None
    """The reason why reality is not stepped. None while it is, and if the game has no real
    environment.
    """
    picture_note: str | None
    bill: Bill | None


class Game:
    """A world's episode, for one thread at a time.

    Args:
        world: The world, in this process.
        id: Its id.
        storage: The storage of its data.
        real: The real environment, or None.
        horizon: Steps after which an episode is truncated; None for never.
    """

    def __init__(
        self,
        world: AnyWorld,
        id: str,
        storage: Storage,
        real: RealSide | None = None,
        horizon: int | None = None,
    ):
        self.id, self.real, self.horizon = id, real, horizon
        self.codec: AnyBatchCodec = batch_codec(world.codec)
        self.members: int = world.net.members
        every = int(self.members > 1)
        self._env = WorldVectorEnv(1, world, horizon=horizon, disagreement_every=every)
        self._tasks = Tasks(storage, id, self.codec)
        self._columns = SpaceCodec(self.codec.observation_space)
        self._actions = SpaceCodec(self.codec.action_space, "action")
        self._commands = commands_of(self.codec.environment["id"])
        self._moments: list[Moment] = []
        self._before: deque[dict[str, Any]] = deque(maxlen=UNDO)
        self._start, self._revision = GameStart(GENERATED, 0, 0), 0

    def splits(self) -> dict[str, int]:
        """The kinds of starts, and the number of starts of each."""
        counts = {name: self._tasks.count(name) for name in self._tasks.splits()}
        return counts if self.real is None else counts | {REAL: counts[GENERATED]}

    def begin(self, split: str, index: int, seed: int) -> GameState:
        """Begin an episode.

        Args:
            split: `generated` (the world draws the start), `logged` (a start of its data) or
                `reality` (the real environment's own reset with this seed).
            index: The logged start.
            seed: Of what the world draws, and of the real reset.

        Raises:
            UsageError: The start does not exist, or the real environment has none. The episode goes
            on.
        """
        moment: RealMoment | None = None
        start: AnyStarts | None
        if split == REAL and self.real is not None:
            options = self.real.options(seed)
            moment = self.real.begin(seed, options)
            if moment is None:
                raise UsageError(f"reality has no start: {self.real.note}")
            start = self._start_of(moment, options, self.real)
        else:
            start = self._tasks.start(split, index if split == LOGGED else 0)
            moment = self._logged_moment(split, index)
        self._env.starts = start
        observation = self._env.reset(seed=seed)[0]
        task = next(iter(self._env.task_options), {})
        self._start = GameStart(split, index if split == LOGGED else 0, seed, task)
        self._before.clear()
        self._moments = []
        self._add(self._columns.unbatch(observation)[0], None, moment)
        return self.state()

    def _start_of(
        self, moment: RealMoment, options: Mapping[str, Any], real: RealSide
    ) -> AnyStarts:
        """The world's start at a real first observation. Raises UsageError if there is none."""
        try:
            self._columns.stored_list([moment.observation])  # raises outside its space
            first = stack(self.codec.observation_space, [moment.observation])
            start: Any = self.codec.task(first, [options]), self.codec.observation(first)
        except MesocosmError as error:
            real.stop("the world has no such start")
            raise UsageError(str(error)) from error
        return start

    def _logged_moment(self, split: str, index: int) -> RealMoment | None:
        """The real environment at the same start: at a logged one, where its reset with the logged
        seed gives the logged observation.
        """
        if self.real is None:
            return None
        if split != LOGGED:
            self.real.stop("the world imagined this start, which reality does not have")
            return None
        episode = self._tasks.episode(index)
        moment = self.real.begin(episode.seed, episode.task)
        if moment is None:
            return None
        try:
            pair = [episode.observations[0], moment.observation]
            numbers, *others = self._columns.stored_list(pair)
        except MesocosmError as error:
            self.real.stop(str(error))
            return None
        same = np.allclose(numbers[0], numbers[1], rtol=1e-5, atol=1e-6)  # a log may be float32
        if same and all((part[0] == part[1]).all() for part in others):
            return moment
        self.real.stop("reality's reset with the logged seed gave another first observation")
        return None

    def step(self, action: Any) -> GameState:
        """Step the world, and reality where it is stepped too.

        Args:
            action: One action of the world's space, as JSON holds it.

        Raises:
            UsageError: The episode is over, or the action is not possible. Nothing changes.
        """
        if not self._moments:
            raise UsageError("no episode has begun; begin one")
        last = self._moments[-1]
        if last.over:
            end = "terminated" if last.terminated else "was truncated"
            raise UsageError(f"the episode {end} at step {last.step}; begin again, or undo a step")
        batch = self._batch(action)
        chosen = self._actions.unbatch(batch)[0]
        self._check_mask(last.observation, chosen)
        state = self._env.state()
        try:
            result = self._env.step(batch)
        except MesocosmError as error:
            raise UsageError(str(error)) from error
        self._before.append(state)
        real = None if self.real is None else self.real.step(chosen)
        self._add(self._columns.unbatch(result[0])[0], action, real, result)
        return self.state(len(self._moments) - 1)

    def undo(self) -> GameState:
        """Return to the moment before the last step. Reality cannot return, so it is no longer
        stepped.

        Raises:
            UsageError: There is no step to undo.
        """
        if not self._before:
            raise UsageError("there is no step to undo; begin an episode, or step")
        self._env.restore(self._before.pop())
        self._revision += 1
        if self._moments.pop().real is not None and self.real is not None:
            self.real.stop("reality cannot be undone; restart to step it again")
        return self.state(len(self._moments))

    def state(self, since: int = 0) -> GameState:
        """The state, with the moments from number `since` on."""
        real = self.real
        return GameState(
            start=self._start,
            revision=self._revision,
            steps=max(0, len(self._moments) - 1),
            moments=self._moments[since:],
            over=bool(self._moments) and self._moments[-1].over,
            undoable=bool(self._before),
            beside=real is not None and real.note is None,
            note=None if real is None else real.note,
            picture_note=None if real is None else real.picture_note,
            bill=None if real is None else real.bill(),
        )

    def close(self) -> None:
        """End the episode, and close the real environment."""
        self._env.close()
        if self.real is not None:
            self.real.close()

    def _batch(self, action: Any) -> Any:
        try:
            if isinstance(self.codec, TextBatchCodec):
                return self.codec.batch([action])
            return self._actions.decode(*self._actions.encode_list([action]))
        except MesocosmError as error:
            raise UsageError(str(error)) from error

    def _check_mask(self, observation: Any, action: Any) -> None:
        """Raise UsageError where the mask of the observation forbids the action."""
        mask = masks.mask_of(observation)
        space = self.codec.action_space
        if mask is not None and not mask[masks.place_of(space, action)]:
            raise UsageError(
                f"action must be one that observation.{masks.MASK} allows, got"
                f" {np.asarray(action).tolist()}; choose another one"
            )

    def _add(
        self, observation: Any, action: Any, real: RealMoment | None, result: Any = None
    ) -> None:
        """Add the moment after a reset, or after a step with the `result`."""
        values: dict[str, Any] = {"reward": None, "total": 0.0}
        if result is not None:
            reward, infos = float(result[1][0]), result[4]
            values = {"reward": reward, "total": self._moments[-1].total + reward}
            values |= {"terminated": bool(result[2][0]), "truncated": bool(result[3][0])}
            values["diverged"] = bool(infos["diverged"][0])
            for name in ("disagreement", "duration"):
                if name in infos:
                    values[name] = float(infos[name][0])
        if self._commands is not None and isinstance(observation, str):
            first = self._moments[0].observation if self._moments else observation
            values["commands"] = self._commands(first, observation)
        moment = Moment(
            step=len(self._moments),
            action=action,
            observation=observation,
            real=real,
            difference=None if real is None else self._difference(observation, real.observation),
            **values,
        )
        self._moments.append(moment)
        self._revision += 1

    def _difference(self, imagined: Any, real: Any) -> Difference | None:
        """The difference of the observations; None if the real one is not in its space."""
        try:
            numbers, categories, texts, *images = self._columns.stored_list([imagined, real])
        except MesocosmError:
            return None
        others = int((categories[0] != categories[1]).sum() + (texts[0] != texts[1]).sum())
        levels = [as_bytes(frames).astype(np.float64) for frames in images]
        pixels = _root_mean_square([one - two for one, two in levels])
        if not isinstance(self.codec, Codec):
            return Difference(None, others, pixels)
        deviations = (numbers[0] - numbers[1]) / self.codec.number_columns.observation.scale
        return Difference(_root_mean_square([deviations]), others, pixels)


def _root_mean_square(arrays: list[Any]) -> float | None:
    """The root mean square over the values of all arrays; None without values."""
    values = np.concatenate([np.ravel(array) for array in arrays]) if arrays else np.empty(0)
    return float(np.sqrt(np.mean(values**2))) if values.size else None
