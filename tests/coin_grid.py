"""Episodes of CoinGrid and the dictionary of their cells, for tests of images (conftest.py has
fixtures of both).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from mesocosm.data.tokens.counting import PatchCounts
from mesocosm.datasets.dataset import Dataset, Environment, write_dataset
from mesocosm.datasets.episode import Episode
from mesocosm.envs.pixels import CoinGrid, catch
from mesocosm.model.tokenizer.dictionary import PatchDictionary


def played(index: int, steps: int = 20) -> Episode:
    """An episode of CoinGrid by a noisy script."""
    env, rng = CoinGrid(steps), np.random.default_rng(index)
    frame, _ = env.reset(seed=index)
    frames, actions, rewards, ended, terminated = [frame], [], [], False, False
    while not ended:
        random = rng.random() < 0.5
        actions.append(np.int64(rng.integers(3)) if random else catch(frames[-1], rng))
        frame, reward, terminated, truncated, _ = env.step(actions[-1])
        frames.append(frame)
        rewards.append(reward)
        ended = terminated or truncated
    outcome: Any = "terminated" if terminated else "truncated"
    return Episode(index, index, "catch", frames, actions, np.array(rewards), outcome)


def write(folder: Path, episodes: list[Episode], space: Any, id: str = "d0", **facts: Any) -> Path:
    write_dataset(
        folder / id,
        episodes,
        id=id,
        environment=Environment(id="mesocosm.envs.pixels:CoinGrid", task=facts.pop("task", [])),
        observation_space=space,
        action_space=spaces.Discrete(3),
        seed=0,
        **facts,
    )
    return folder / id


def coin_games(folder: Path) -> Dataset:
    """40 episodes of CoinGrid."""
    space = CoinGrid().observation_space
    return Dataset([write(folder, [played(k) for k in range(40)], space, shard_rows=300)])


def cells(games: Dataset) -> PatchDictionary:
    """The dictionary of their cells."""
    counts = PatchCounts("observation", 8)
    for shard in range(len(games.shards)):
        counts.add(games.images(shard, "obs_image0")[:])
    return counts.dictionary((40, 40, 3), 64)
