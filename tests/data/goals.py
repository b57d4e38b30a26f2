"""Episodes with a goal, and the codec fitted to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from mesocosm.data.loading.codec import Codec
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.episode import Episode

Write = Callable[..., Path]
GOAL = spaces.Dict(
    goal=spaces.Dict(at=spaces.Box(-9, 9, (1,), np.float64), name=spaces.Text(3, charset="ab")),
    body=spaces.Box(-np.inf, np.inf, (3,), np.float64),
    word=spaces.Text(4, min_length=2, charset="xyz"),
    lamp=spaces.Discrete(2),
)


def goal_episodes(count: int = 12, seed: int = 0, **rest: Any) -> list[Episode]:
    """body = (large offset, constant, unit normal); the goal is constant in an episode."""
    rng = np.random.default_rng(seed)
    episodes = []
    for k in range(count):
        length = 20
        goal = {"at": np.array([k / 4]), "name": "ab"[: 1 + k % 2]}
        body = np.stack(
            [
                1e6 + 50 * rng.normal(size=length + 1),
                np.full(length + 1, 7.0),
                rng.normal(size=length + 1),
            ],
            1,
        )
        observations = [
            {"goal": goal, "body": row, "word": "xyz"[: 2 + t % 2], "lamp": np.int64(t % 2)}
            for t, row in enumerate(body)
        ]
        actions = [rng.normal(size=2).astype(np.float32) for _ in range(length)]
        arguments: dict[str, Any] = {
            "rewards": rng.normal(3, 2, length),
            "outcome": "terminated" if k % 2 else "truncated",
        } | rest
        episodes.append(
            Episode(
                index=k,
                seed=k,
                behaviour="random",
                observations=observations,
                actions=actions,
                **arguments,
            )
        )
    return episodes


def fitted(write: Write, episodes: list[Episode], **facts: Any) -> tuple[Codec, Dataset]:
    dataset = Dataset(
        [write(episodes, observation_space=GOAL, action_space=spaces.Box(-1, 1, (2,)), **facts)]
    )
    return Codec.fit(dataset), dataset
