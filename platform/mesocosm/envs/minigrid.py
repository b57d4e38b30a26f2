"""Tasks of MiniGrid (https://minigrid.farama.org), seen as pictures. They need the extra
`minigrid`.
"""

from __future__ import annotations

import importlib
from collections import deque
from functools import cache
from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import DependencyNotInstalled
from gymnasium.spaces import Box, Discrete
from numpy.typing import NDArray

from mesocosm.envs.api import package_versions
from mesocosm.errors import UsageError, nearest

Frame = NDArray[np.uint8]
Cell = tuple[int, int]
"""Column and row."""
TILE = 8
"""Pixels of a cell's side."""
PREFIX, SUFFIX = "MiniGrid-", "-v0"
ACTIONS = 7
TURN_LEFT, TURN_RIGHT, FORWARD, PICK_UP, TOGGLE = 0, 1, 2, 3, 5
"""Five of MiniGrid's seven actions; 4 drops the carried object, 6 does nothing."""
HEADINGS = ((1, 0), (0, 1), (-1, 0), (0, -1))
"""The next cell's column and row, by the direction that the agent faces."""


class MiniGrid(gymnasium.Env[Frame, np.int64]):
    """A task of MiniGrid, seen as a picture of the whole grid: [8 height, 8 width, 3].

    In DoorKey and Empty the picture shows the whole state, except the number of the step. What the
    agent carries is not drawn, which matters where a task has several objects. MiniGrid's own
    reward falls with the number of the step, and so no world could predict it: here the reward is 1
    at the goal, which ends the episode. MiniGrid cuts episodes (after 250 steps in DoorKey-5x5).

    Args:
        task: A task with one mission, by MiniGrid's name: "DoorKey-5x5", "Empty-5x5".

    Raises:
        UsageError: There is no such task, its mission, which a picture does not show, differs by
            episode, or it has other actions and rewards (Dynamic-Obstacles).
        DependencyNotInstalled: MiniGrid is missing.
    """

    metadata = {"render_modes": []}

    @classmethod
    def program_versions(cls) -> list[str]:
        """The versions of programs that are a part of the environment's version."""
        return package_versions("minigrid")

    def __init__(self, task: str = "DoorKey-5x5"):
        _module("minigrid")
        ids = [id for id in gymnasium.registry if id.startswith(PREFIX) and id.endswith(SUFFIX)]
        names = [id.removeprefix(PREFIX).removesuffix(SUFFIX) for id in ids]
        if task not in names:
            raise UsageError(
                f"reality.kwargs.task must be a task of MiniGrid, got {task!r}"
                f"{nearest(task, names)}"
            )
        self._env = _made(f"{PREFIX}{task}{SUFFIX}")
        if self._env.observation_space["mission"].ordered_placeholders:
            raise UsageError(
                f"reality.kwargs.task must have one mission, got {task!r}, whose mission differs by"
                " episode and is in no picture; try DoorKey-5x5"
            )
        if self._env.action_space.n != ACTIONS:
            raise UsageError(
                f"reality.kwargs.task must have MiniGrid's {ACTIONS} actions, got {task!r}, which"
                f" has {self._env.action_space.n} and rewards of its own; try DoorKey-5x5"
            )
        shape = (TILE * self._env.height, TILE * self._env.width, 3)
        self.observation_space = Box(0, 255, shape, np.uint8)
        self.action_space = Discrete(ACTIONS)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Frame, dict[str, Any]]:
        self._env.reset(seed=seed)
        return self._frame(), {}

    def step(self, action: np.int64) -> tuple[Frame, float, bool, bool, dict[str, Any]]:
        _, reward, terminated, truncated, _ = self._env.step(int(action))
        return self._frame(), float(reward > 0), bool(terminated), bool(truncated), {}

    def _frame(self) -> Frame:
        frame: Frame = self._env.get_frame(highlight=False, tile_size=TILE)
        return frame


def _made(id: str) -> Any:
    """A task without Gymnasium's wrappers, with attributes of MiniGrid's own."""
    return gymnasium.make(id).unwrapped


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        fix = "pip install 'mesocosm[minigrid]'"
        raise DependencyNotInstalled(f"MiniGrid is missing; {fix}") from error


@cache
def _tiles() -> dict[bytes, tuple[str, int | None]]:
    """The object and the direction of the agent that a tile shows, by its pixels."""
    render = _module("minigrid.core.grid").Grid.render_tile
    objects = _module("minigrid.core.world_object")
    shown = [("floor", None), ("goal", objects.Goal()), ("wall", objects.Wall())]
    for colour in _module("minigrid.core.constants").COLOR_NAMES:
        shown += [("key", objects.Key(colour)), ("open", objects.Door(colour, is_open=True))]
        shown += [("closed", objects.Door(colour))]
        shown += [("locked", objects.Door(colour, is_locked=True))]
    tiles = {}
    for name, one in shown:
        for facing in (None, 0, 1, 2, 3):
            pixels = render(one, agent_dir=facing, tile_size=TILE).astype(np.uint8)
            tiles[pixels.tobytes()] = name, facing
    return tiles


def read_rooms(frame: Frame) -> tuple[dict[Cell, str], Cell | None, int]:
    """The objects of a frame of `MiniGrid`.

    Args:
        frame: uint8 [8 height, 8 width, 3].

    Returns:
        What each cell holds: floor, wall, goal, key, or a door that is open, closed or locked
        (`wall` where a picture shows anything else); the agent's cell, or None; the direction that
        it faces (`HEADINGS`).
    """
    cells, agent, heading = dict[Cell, str](), None, 0
    for row in range(frame.shape[0] // TILE):
        for column in range(frame.shape[1] // TILE):
            rows, columns = (slice(TILE * i, TILE * (i + 1)) for i in (row, column))
            name, facing = _tiles().get(frame[rows, columns].tobytes(), ("wall", None))
            cells[column, row] = name
            if facing is not None:
                agent, heading = (column, row), facing
    return cells, agent, heading


def unlock(observation: Frame, rng: np.random.Generator) -> np.int64:
    """Fetches the key, opens the door and walks to the goal; at random where there is no way."""
    cells, agent, heading = read_rooms(observation)
    places = {name: cell for cell, name in cells.items()}
    door = places.get("locked", places.get("closed"))
    target, act = places.get("goal"), FORWARD
    if door is not None:
        target, act = door, TOGGLE
        if "locked" in places and "key" in places:
            target, act = places["key"], PICK_UP
    following = None if agent is None or target is None else _next_cell(cells, agent, target)
    if agent is None or following is None:
        return np.int64(rng.integers(ACTIONS))
    direction = HEADINGS.index((following[0] - agent[0], following[1] - agent[1]))
    if direction != heading:
        return np.int64(TURN_LEFT if (direction - heading) % 4 == 3 else TURN_RIGHT)
    return np.int64(act if following == target else FORWARD)


def _next_cell(cells: dict[Cell, str], start: Cell, target: Cell) -> Cell | None:
    """The first cell of a shortest way between two cells; None where there is none."""
    first: dict[Cell, Cell] = {start: start}
    queue = deque([start])
    while queue:
        cell = queue.popleft()
        for right, down in HEADINGS:
            beside = (cell[0] + right, cell[1] + down)
            free = beside == target or cells.get(beside) in ("floor", "open", "goal")
            if free and beside not in first:
                first[beside] = beside if cell == start else first[cell]
                queue.append(beside)
    return first.get(target)
