"""The codec of tasks: keys of the observation, and reset options."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from mesocosm.data.loading.codec import Codec
from mesocosm.data.loading.windows import start_parts
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.episode import Episode
from mesocosm.errors import UsageError

from .goals import Write, fitted, goal_episodes


def test_a_task_of_observation_keys_round_trips(write: Write) -> None:
    codec, dataset = fitted(write, goal_episodes(), task=["goal"])
    spec = codec.spec
    assert (spec.observation.numbers, spec.observation.categories) == (3, (4, 4, 4, 4, 2))
    assert (spec.task.numbers, spec.task.categories) == (1, (3, 3, 3))
    (text,) = spec.observation.texts
    assert (text.start, text.length, text.min_length) == (0, 4, 2)
    assert [(t.start, t.length) for t in spec.task.texts] == [(0, 3)]
    assert len(spec.task.bins) == 1
    task, observation = start_parts(dataset, codec, "train")
    back = codec.decode_observation(observation, task)
    starts = [e.observations[0] for e in dataset.iter_episodes("train")]
    np.testing.assert_allclose(
        back["goal"]["at"], [s["goal"]["at"] for s in starts], rtol=1e-6, atol=1e-6
    )
    assert back["goal"]["name"] == tuple(s["goal"]["name"] for s in starts)
    np.testing.assert_allclose(back["body"], [s["body"] for s in starts], rtol=1e-6)
    again = codec.task(back)
    np.testing.assert_allclose(again.numbers, task.numbers, rtol=1e-5, atol=1e-6)
    assert torch.equal(again.categories, task.categories)
    assert codec.task_options(task) == [{}] * len(starts)
    nested, _ = fitted(write, goal_episodes(), id="nested", task=["goal.name"])
    assert (nested.spec.task.numbers, nested.spec.observation.numbers) == (0, 4)


def test_a_task_key_that_changes_is_refused(write: Write) -> None:
    for key in ("body", "lamp"):
        with pytest.raises(UsageError, match=f"{key}.*changes within an episode"):
            fitted(write, goal_episodes(), id=key, task=[key])
    with pytest.raises(UsageError, match="leave at least one"):
        fitted(
            write,
            [e for e in goal_episodes() if _freeze(e)],
            id="all",
            task=["goal", "body", "word", "lamp"],
        )


def _freeze(episode: Episode) -> bool:
    episode.observations = [episode.observations[0]] * len(episode.observations)
    return True


def test_a_task_of_reset_options(write: Write) -> None:
    episodes = goal_episodes()
    for k, episode in enumerate(episodes):
        episode.task = {"map": ["hill", "lake", "road"][k % 3], "mass": k / 2, "level": k % 4}
    codec, dataset = fitted(write, episodes, task=["map", "mass", "level"])
    assert (codec.spec.task.numbers, codec.spec.task.categories) == (1, (3, 4))
    assert codec.spec.observation.numbers == 4
    task, _ = start_parts(dataset, codec, "train")
    options_of_tasks = codec.task_options(task)
    for options, episode in zip(options_of_tasks, dataset.iter_episodes("train"), strict=True):
        assert (options["map"], options["level"]) == (episode.task["map"], episode.task["level"])
        assert options["mass"] == pytest.approx(episode.task["mass"], abs=1e-6)
    batch = codec.decode_observation(start_parts(dataset, codec, "train")[1], task)
    again = codec.task(batch, options_of_tasks)
    assert torch.equal(again.categories, task.categories)
    np.testing.assert_allclose(again.numbers, task.numbers, rtol=1e-5, atol=1e-6)
    with pytest.raises(UsageError, match=r"map must be in .*hill.*got 'moon'"):
        codec.task(batch, [{**options, "map": "moon"} for options in options_of_tasks])
    with pytest.raises(UsageError, match=r"reset options .* got None"):
        codec.task(batch)


def test_a_world_refuses_data_with_an_unknown_choice(
    write: Write, counted: Callable[..., Episode]
) -> None:
    old = Dataset(
        [
            write(
                [counted(k, 5, task={"map": "ab"[k % 2]}) for k in range(6)], id="old", task=["map"]
            )
        ]
    )
    new = Dataset(
        [
            write(
                [counted(k, 5, task={"map": "ac"[k % 2]}) for k in range(6)], id="new", task=["map"]
            )
        ]
    )
    codec = Codec.fit(old)
    with pytest.raises(UsageError, match=r"map must be in .*got 'c'"):
        start_parts(new, codec, "train")
