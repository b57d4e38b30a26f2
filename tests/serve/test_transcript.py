"""The golden digits of a session: what a world answers to the same actions, in both families."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from mesocosm.model.world import World
from mesocosm.serve.client import WorldVectorEnv

SPACE = spaces.Dict(
    {"place": spaces.Box(-np.inf, np.inf, (2,), np.float64), "room": spaces.Discrete(4)}
)


@pytest.mark.parametrize("family", ["ensemble", "sequence"])
def test_a_session_answers_as_ever(
    make_world: Callable[..., World], golden: Any, family: str
) -> None:
    env = WorldVectorEnv(3, make_world(family=family, observation=SPACE), horizon=9)
    env.action_space.seed(0)
    replies: list[Any] = [env.reset(seed=3)]
    replies += [env.step(env.action_space.sample()) for _ in range(12)]
    golden.check("pretrain", {f"{family} session": golden.of_numbers(_plain(replies))})


def _plain(value: Any) -> Any:
    """Replies as plain JSON; what is not a number is left out."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray) and value.dtype != object:
        return np.nan_to_num(value.astype(np.float64)).reshape(-1).tolist()
    return []
