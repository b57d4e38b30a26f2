"""Small environments that are seen as images: `reality.env=mesocosm.envs.pixels:PixCart`.

Both draw with numpy alone, are a function of the reset seed and the actions, and cut their episodes
themselves. Their scripts are behaviours: `{kind: noisy, function:
"mesocosm.envs.pixels:Balancer"}` for PixCart, `mesocosm.envs.pixels:catch` for CoinGrid.
"""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from gymnasium.spaces import Box, Discrete
from numpy.typing import NDArray

from mesocosm.errors import UsageError

Frame = NDArray[np.uint8]
Array = NDArray[Any]
FULL = 64
"""Pixels of a side in which PixCart is drawn; smaller frames are averages of them."""
REPEAT = 2
"""Steps of CartPole-v1 in one of PixCart's."""
STEP_S = 0.02 * REPEAT
"""Seconds of a step of PixCart."""
METRE, PIVOT, POLE = 10.5, 50.0, 36.0
"""Pixels of a metre, the height of the pole's pivot, and its length, in a frame of FULL pixels."""
ROWS, COLUMNS = (np.mgrid[0:FULL, 0:FULL] + 0.5).astype(np.float32)
CART, ROD, GROUND = (30, 60, 160), (200, 120, 40), 120
"""Colours; the sky is white."""


class PixCart(gymnasium.Env[Frame, np.int64]):
    """CartPole-v1 seen as a picture [size, size, 3], with a reward of 1 a step.

    A frame shows where cart and pole are, and not how fast they move. Every action is repeated
    REPEAT times. The pole is drawn with smooth edges, so that hardly two frames are alike.

    Args:
        size: 32 or 64 pixels of a side.
        steps: Steps after which an episode is cut.
    """

    metadata = {"render_modes": []}

    def __init__(self, size: int = 32, steps: int = 250):
        if size not in (32, 64):
            raise UsageError(f"reality.kwargs.size must be 32 or 64, got {size}")
        self.size, self.steps = size, steps
        self.observation_space = Box(0, 255, (size, size, 3), np.uint8)
        self.action_space = Discrete(2)
        self._cart = CartPoleEnv()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Frame, dict[str, Any]]:
        super().reset(seed=seed)
        self._state, _ = self._cart.reset(seed=int(self.np_random.integers(2**31)))
        self._step = 0
        return self._frame(), {}

    def step(self, action: np.int64) -> tuple[Frame, float, bool, bool, dict[str, Any]]:
        self._step += 1
        terminated = False
        for _ in range(REPEAT):
            if not terminated:
                self._state, _, terminated, _, _ = self._cart.step(int(action))
        return self._frame(), 1.0, terminated, self._step >= self.steps, {}

    def _frame(self) -> Frame:
        x, angle = float(self._state[0]), float(self._state[2])
        right, down = COLUMNS - (FULL / 2 + METRE * x), ROWS - PIVOT
        picture = np.full((FULL, FULL, 3), 255, np.float32)
        picture[56:57] = GROUND
        cart = np.clip(7 - np.abs(right), 0, 1) * np.clip(5 - np.abs(down), 0, 1)
        along = np.clip(right * math.sin(angle) - down * math.cos(angle), 0, POLE)
        aside = np.hypot(right - along * math.sin(angle), down + along * math.cos(angle))
        for cover, colour in ((cart, CART), (np.clip(2.5 - aside, 0, 1), ROD)):
            picture += cover[..., None] * (np.array(colour, np.float32) - picture)
        merged = FULL // self.size
        blocks = picture.reshape(self.size, merged, self.size, merged, 3).mean((1, 3))
        return blocks.round().astype(np.uint8)


def read_cart(frames: Array) -> Array:
    """The places of cart and pole in frames of PixCart: the inverse of its drawing, by colours.

    Args:
        frames: uint8 [B, size, size, 3].

    Returns:
        [B, 2] float64: the cart's place in metres and the pole's angle in rad; NaN where one of
        them is not in the frame.
    """
    pixels = frames.astype(np.float64)
    unit = FULL / pixels.shape[1]
    rows, columns = (np.mgrid[0 : pixels.shape[1], 0 : pixels.shape[1]] + 0.5) * unit
    warm = pixels[..., 0] - pixels[..., 2]
    rod = np.clip(warm / 160 - 0.15, 0, 1) * (rows < 44)
    cart = np.clip(-warm / 130 - 0.15, 0, 1) * (rows > 40)
    total, mass = rod.sum((1, 2)), cart.sum((1, 2))
    seen = (total * unit**2 > 20) & (mass * unit**2 > 30)
    total, mass = np.maximum(total, 1e-3), np.maximum(mass, 1e-3)
    middle = (cart * columns).sum((1, 2)) / mass
    right = (rod * columns).sum((1, 2)) / total - middle
    up = PIVOT - (rod * rows).sum((1, 2)) / total
    places = np.stack([(middle - FULL / 2) / METRE, np.arctan2(right, up)], 1)
    return np.where(seen[:, None], places, np.nan)


class Balancer:
    """Balances PixCart by the places in the last two frames."""

    def start(self, k: int, rng: np.random.Generator) -> None:
        """Forget the last episode."""
        self._last: Array | None = None

    def __call__(self, observation: Frame, rng: np.random.Generator) -> np.int64:
        now = read_cart(observation[None])[0]
        last = now if self._last is None else self._last
        self._last = now
        (x, angle), (speed, turn) = now, (now - last) / STEP_S
        return np.int64(0.06 * x + 0.15 * speed + 1.3 * angle + 0.4 * turn > 0)


CELLS, PIXELS = 5, 8
"""CoinGrid's cells of a side, and pixels of a cell's side."""
SPRITES = {
    "monster": ((160, 60, 220), (0, 3), (1, 7)),
    "coin": ((250, 220, 40), (3, 5), (0, 4)),
    "bomb": ((230, 40, 40), (5, 8), (4, 8)),
    "paddle": ((60, 200, 240), (5, 8), (0, 8)),
}
"""The colour, and the rows and columns within its cell, of each sprite. None hides another."""
ENTROPY = math.log(2) + 2 * math.log(CELLS) / (CELLS - 1)
"""Nats of a step of CoinGrid, in the mean: the monster's move, and a new column for coin and bomb
every fourth step.
"""


class CoinGrid(gymnasium.Env[Frame, np.int64]):
    """A game of 5 x 5 cells in a picture [40, 40, 3], of which the entropy is known (ENTROPY).

    Coin and bomb fall by a cell a step, and begin again in a random column of the top row instead
    of reaching the bottom one, where the paddle moves: left, stay, right. The reward is 1 if the
    coin would have come down on the paddle, -1 if the bomb would, which ends the episode. A monster
    in the second row goes left or right at random.

    Args:
        steps: Steps after which an episode is cut.
    """

    metadata = {"render_modes": []}

    def __init__(self, steps: int = 100):
        self.steps = steps
        side = CELLS * PIXELS
        self.observation_space = Box(0, 255, (side, side, 3), np.uint8)
        self.action_space = Discrete(3)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Frame, dict[str, Any]]:
        super().reset(seed=seed)
        draw = self.np_random.integers
        self._step, self._paddle, self._monster = 0, int(draw(CELLS)), int(draw(CELLS))
        self._falling = {
            name: (int(draw(CELLS)), int(draw(CELLS - 2))) for name in ("coin", "bomb")
        }
        return self._frame(), {}

    def step(self, action: np.int64) -> tuple[Frame, float, bool, bool, dict[str, Any]]:
        draw = self.np_random.integers
        self._step += 1
        self._paddle = min(max(self._paddle + int(action) - 1, 0), CELLS - 1)
        caught = set()
        for name, (column, row) in self._falling.items():
            self._falling[name] = (column, row + 1)
            if row + 1 == CELLS - 1:
                if column == self._paddle:
                    caught.add(name)
                self._falling[name] = (int(draw(CELLS)), 0)
        self._monster = min(max(self._monster + 2 * int(draw(2)) - 1, 0), CELLS - 1)
        reward = float("coin" in caught) - float("bomb" in caught)
        return self._frame(), reward, "bomb" in caught, self._step >= self.steps, {}

    def _frame(self) -> Frame:
        frame = np.full(self.observation_space.shape or (), 25, np.uint8)
        places = {
            **self._falling,
            "monster": (self._monster, 1),
            "paddle": (self._paddle, CELLS - 1),
        }
        for name, (colour, rows, columns) in SPRITES.items():
            column, row = places[name]
            cell = frame[PIXELS * row : PIXELS * (row + 1), PIXELS * column : PIXELS * (column + 1)]
            cell[slice(*rows), slice(*columns)] = colour
        return frame


def read_grid(frames: Array) -> dict[str, Array]:
    """Which cells of frames of CoinGrid hold each sprite, by a pixel that no other sprite covers.

    Args:
        frames: uint8 [B, 40, 40, 3].

    Returns:
        By sprite, [B, 5, 5] bool.
    """
    cells = frames.reshape(-1, CELLS, PIXELS, CELLS, PIXELS, 3).astype(np.int64)
    shown = {}
    for name, (colour, rows, columns) in SPRITES.items():
        pixel = cells[:, :, rows[1] - 1, :, columns[0] + (name == "paddle")]
        shown[name] = np.abs(pixel - np.array(colour)).sum(-1) < 90
    return shown


def catch(observation: Frame, rng: np.random.Generator) -> np.int64:
    """Follows the coin of CoinGrid."""
    shown = read_grid(observation[None])
    coin, paddle = (int(shown[name][0].any(0).argmax()) for name in ("coin", "paddle"))
    return np.int64(1 + np.sign(coin - paddle))
