"""Tasks of a served world, from its data, and the commands of its environment."""

from __future__ import annotations

from pathlib import Path

import gymnasium
import pytest
from factories import cart_root

from mesocosm.data.loading.codec import Codec
from mesocosm.datasets.dataset import Dataset
from mesocosm.serve.openenv_session import commands_of
from mesocosm.serve.tasks import Tasks, UnknownTask
from mesocosm.store.artifacts import Storage


def test_logged_tasks(tmp_path: Path) -> None:
    """Task i of `logged` begins like the i-th training episode of the world's data."""
    storage = Storage(cart_root(tmp_path))
    data = Dataset([storage.artifact("datasets", "cart").path])
    meta = {"inputs": {"datasets": ["cart"]}}
    storage.make("worlds", "w", meta, lambda to: (to / "world.json").write_text("{}") and None)
    codec = Codec.fit(data)
    tasks = Tasks(storage, "w", codec)
    assert tasks.splits() == ["generated", "logged"]
    episodes = data.episodes("train")
    assert tasks.count("logged") == len(episodes)
    task, observation = tasks.start("logged", 2) or (None, None)
    assert task is not None and observation is not None and len(observation.numbers) == 1
    first = data.episode(int(episodes[2])).observations[0]
    decoded = codec.decode_observation(observation, task)[0]
    assert decoded.tolist() == pytest.approx(first.tolist(), abs=1e-6)
    assert tasks.episode(2).seed == data.episode(int(episodes[2])).seed
    assert tasks.listed("logged", 1, 3) == [{"split": "logged", "index": i} for i in (1, 2)]
    with pytest.raises(
        UnknownTask, match=f"index must be from 0 to {len(episodes) - 1} in 'logged'"
    ):
        tasks.start("logged", len(episodes))


def test_commands() -> None:
    """Environments that come with Mesocosm list their commands; no other program is asked."""
    commands = commands_of("mesocosm.envs.text:ChoresEasy-v0")
    assert commands is not None
    text = gymnasium.make("mesocosm.envs.text:ChoresEasy-v0").reset(seed=1)[0]
    assert "go to" in " ".join(commands(text, text)) and isinstance(
        commands(text, "nonsense"), list
    )
    assert commands_of("mesocosm.envs.text:Company-v0") is not None
    for other in ("CartPole-v1", "mesocosm.envs.text:CartPole-v1", "mymodule:Chores-v0", "x:y"):
        assert commands_of(other) is None
