"""One policy of bounds for collect and import, values that no world can hold, and what is exported
imports again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from mesocosm.data.collecting.config import CollectConfig
from mesocosm.data.loading.codec import Codec
from mesocosm.datasets.bounds import clipped, first_outside
from mesocosm.datasets.dataset import Dataset
from mesocosm.datasets.episode import Episode
from mesocosm.envs.config import RealityConfig
from mesocosm.envs.ledger import Ledger
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.evaluate.judge import judge
from mesocosm.store.artifacts import Artifact, Storage

from .logs import Rows, parquet, planned, refused, steps
from .reality import config

Import = Callable[..., Artifact]
Collect = Callable[..., Artifact]
HUGE = r"1e\+300, .*float32; rescale it"


class Square(gymnasium.Env[Any, Any]):
    """Observes its steps. `trouble` happens at the third step of every `every`-th reset seed."""

    observation_space = spaces.Box(-5.0, 5.0, (2,), np.float64)
    action_space = spaces.Discrete(2)

    def __init__(self, trouble: str = "", every: int = 1):
        self.trouble, self.every = trouble, every

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.t, self.troubled = 0, (seed or 0) % self.every == 0
        return np.zeros(2), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        observation, reward, info = np.array([self.t / 2, 0.5]), 1.0, {"duration": 0.5}
        if self.t == 3 and self.troubled:
            observation[1] = {"outside": -7.0, "huge": 1e300}.get(self.trouble, 0.5)
            reward = -1e39 if self.trouble == "reward" else 1.0
            info["duration"] = -1.0 if self.trouble == "negative" else 0.5
        return observation, reward, self.t == 6, False, info


class Endless(Square):
    """Square with a box of the largest numbers."""

    observation_space = spaces.Box(-1.7e308, 1.7e308, (2,), np.float64)


gymnasium.register("OddSquare-v0", entry_point=Square, max_episode_steps=50)
gymnasium.register("OddEndless-v0", entry_point=Endless, max_episode_steps=50)


@pytest.fixture
def gather(root: str, collect: Callable[[CollectConfig], Artifact]) -> Collect:
    """`gather(env, bounds, **kwargs of the environment)` collects 60 steps in this process."""

    def make(env: str, bounds: str = "drop", **kwargs: Any) -> Artifact:
        reality = {"bounds": bounds, "kwargs": kwargs}
        return collect(config(root, env, steps=60, lanes=1, reality=reality))

    return make


def altered(episode: int, step: int, name: str, value: Any) -> Rows:
    """Three episodes of four rows, with a value changed; episode -1 stands for all."""
    rows = steps((4, 4, 4))
    for row in rows:
        if row["step"] == step and episode in (-1, row["episode"]):
            row[name] = value
    return rows


@pytest.mark.parametrize("bad", ["refuse", "drop"])
def test_bounds_of_what_is_imported(bad: str, tmp_path: Path, import_logs: Import) -> None:
    env = "OddSquare-v0"
    rows = altered(1, 0, "next_observation", [-7.0, 0.125])
    rows[5]["observation"] = [-7.0, 0.125]
    path = parquet(tmp_path / "a.parquet", rows)
    plan = planned(path, env=env, bad=bad)
    (left,) = plan["left out"]
    assert (left["reason"], left["episodes"], plan["episodes"]) == ("outside the space", 1, 2)
    for bounds, value in (("clip", -5.0), ("ignore", -7.0)):
        dataset = Dataset([import_logs(path, env=env, bounds=bounds, bad=bad).path])
        seen = [float(o[0]) for o in dataset.episode(1).observations]
        assert seen == [0.0, value, 1.0, 1.5, 2.0]
    wrong = parquet(tmp_path / "b.parquet", altered(1, 1, "action", 2))
    for bounds in ("drop", "clip", "ignore"):
        (left,) = planned(wrong, env=env, bounds=bounds, bad=bad)["left out"]
        assert left["reason"] == "outside the space", "no column can hold it"
        assert left["episodes"] == 1
    all_wrong = parquet(tmp_path / "c.parquet", altered(-1, 0, "observation", [7.0, 7.0]))
    fix = r"row 1: observation .* got \[7.0, 7.0\] .*reality.bounds=clip"
    refused(f"can be imported: .*{fix}", all_wrong, env=env)
    refused(r"reality.bounds must be one of drop, clip, ignore; got 'keep'", path, bounds="keep")


def test_bounds_of_what_is_collected(gather: Collect, import_logs: Import) -> None:
    """The same values as `import` drops, clips and ignores; and what is exported is imported by the
    same policy.
    """
    env, lowest = "OddSquare-v0", {"drop": 0.0, "clip": -5.0, "ignore": -7.0}
    for bounds, value in lowest.items():
        artifact = gather(env, bounds, trouble="outside", every=3)
        dropped = artifact.meta["dropped"]
        assert bool(dropped) == (bounds == "drop")
        for row in dropped:
            assert "after step 3, observation=[1.5, -7.0] is outside Box" in row["reason"]
            assert row["steps"] == 3, "no step is paid after it"
        episodes = Dataset([artifact.path]).iter_episodes()
        assert min(o[1] for episode in episodes for o in episode.observations) == value
        back = import_logs(artifact.path / "episodes", env=env, bounds=bounds)
        assert exports(back) == exports(artifact) and back.meta["counts"]["episodes_left_out"] == 0
    fix = "set reality.bounds=clip or reality.bounds=ignore"
    with pytest.raises(MesocosmError, match=f"5 episodes in a row failed .*{fix}"):
        gather(env, trouble="outside")


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("huge", r"observation\[1\] holds 1e\+300, and a world computes in float32; rescale it"),
        ("reward", r"reward -1e\+39, and a world computes in float32; rescale it"),
        ("negative", r"info\['duration'\] -1, which is negative; give seconds"),
    ],
)
def test_values_that_no_world_can_hold_are_not_collected(
    trouble: str, message: str, gather: Collect
) -> None:
    for bounds in ("drop", "ignore"):
        with pytest.raises(MesocosmError, match=f"5 episodes in a row failed .*{message}"):
            gather("OddEndless-v0", bounds, trouble=trouble)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("observations", [np.array([0.0, -1e300])] * 4, rf"observation\[1\] holds -{HUGE}"),
        ("actions", [np.array([1e300])] * 3, rf"action\[0\] holds {HUGE}"),
        ("rewards", np.array([0.0, 1e300, 0.0]), f"reward holds {HUGE}"),
        ("durations", np.array([0.5, 1e300, 0.5]), f"duration holds {HUGE}"),
        ("durations", np.array([0.5, -2.0, 0.5]), "duration holds -2, which is negative"),
    ],
)
def test_a_codec_is_not_fitted_to_what_no_world_can_hold(
    name: str,
    values: Any,
    message: str,
    write: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A dataset that an earlier version wrote holds such values."""
    monkeypatch.setattr("mesocosm.datasets.leaf.first_beyond_float32", lambda values: None)
    arrays: dict[str, Any] = {
        "observations": [np.zeros(2)] * 4,
        "actions": [np.zeros(1)] * 3,
        "rewards": np.zeros(3),
        "durations": np.full(3, 0.5),
    }
    episode = Episode(
        index=0, seed=0, behaviour="random", outcome="terminated", **{**arrays, name: values}
    )
    boxes = [spaces.Box(-np.inf, np.inf, (size,), np.float64) for size in (2, 1)]
    dataset = Dataset([write([episode], observation_space=boxes[0], action_space=boxes[1])])
    with pytest.raises(UsageError, match=message) as error:
        Codec.fit(dataset)
    assert "\n" not in str(error.value)


def test_bounds_of_one_value() -> None:
    space = spaces.Dict(
        {
            "a": spaces.Box(-1, 1, (2,)),
            "b": spaces.Tuple([spaces.Box(0, 9, (), np.int64), spaces.Discrete(2)]),
        }
    )
    right = {"a": np.array([-1.0, 1.0 + 1e-12]), "b": (np.int64(9), 1)}
    precise = "bounds are compared in the precision of the space"
    assert first_outside(space, right, "observation") is None, precise
    wrong = {"a": np.array([0.0, 1.5]), "b": (np.int64(-3), 7)}
    first = f"observation.a=[0.0, 1.5] is outside {space['a']}"
    assert first_outside(space, wrong, "observation") == first
    second = f"observation.b.0=-3 is outside {space['b'][0]}"
    assert first_outside(space, {"b": wrong["b"]}, "observation") == second
    clip = clipped(space, wrong)
    assert clip["a"].tolist() == [0.0, 1.0] and clip["b"] == (0, 7)
    for odd in ({"a": np.zeros(3), "b": "x"}, {"a": "text"}, None, [np.zeros(2), "ragged"]):
        assert first_outside(space, odd, "observation") is None, "the codec names these"
        clipped(space, odd)


@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan, 1e300])
@pytest.mark.filterwarnings("error")
def test_a_number_that_no_world_can_hold_is_not_clipped(number: float) -> None:
    """`collect` drops its episode, as `import` does, and prints no warning of NumPy's."""
    space = spaces.Box(-1, 1, (2,), np.float32)
    value = np.array([0.0, number])
    assert np.array_equal(clipped(space, value), value, equal_nan=True)
    assert first_outside(space, value, "observation") is not None
    if not np.isfinite(number):
        half = value.astype(np.float16)
        assert np.array_equal(clipped(space, half), half, equal_nan=True)


class Zero:
    """A policy."""

    def act_one(self, observation: Any, explore: bool, rng: np.random.Generator) -> Any:
        return 0


def test_a_judged_episode_is_not_dropped_for_its_bounds(root: str) -> None:
    """Its return is real, wherever its observations were."""
    for bounds in ("drop", "clip", "ignore"):
        reality = RealityConfig(env="OddSquare-v0", kwargs={"trouble": "outside"}, bounds=bounds)
        judged = judge(Zero(), reality, Ledger(Storage(root), bounds), episodes=2, seed=0)  # type: ignore[arg-type]
        assert judged.returns == (6.0, 6.0) and judged.dropped == ()


# -- what is exported

EVERY = spaces.Dict(
    {
        "pose": spaces.Dict(
            {"xy": spaces.Box(-9, 9, (2,), np.float64), "grid": spaces.Box(0, 20, (2, 2), np.int32)}
        ),
        "flags": spaces.MultiBinary([2, 2]),
        "pair": spaces.Tuple(
            (
                spaces.Discrete(3, start=5),
                spaces.MultiDiscrete([2, 4]),
                spaces.Text(4, min_length=0, charset="ab"),
            )
        ),
        "names": spaces.Dict(
            {
                "a.b": spaces.Box(-1, 1, (1,)),
                "a": spaces.Dict({"b": spaces.Box(-1, 1, (1,))}),
                "größe/ü ": spaces.Box(-1, 1, ()),
            }
        ),
        "half": spaces.Box(-9, 9, (3,), np.float16),
        "none": spaces.Box(0, 1, (0,)),
        "bytes": spaces.Box(0, 255, (2,), np.uint8),
        "unbounded": spaces.Box(-np.inf, np.inf, (2,), np.int64),
    }
)


class Everything(gymnasium.Env[Any, Any]):
    """Samples of every kind of space. Some episodes have durations, some end by themselves, and
    some by a limit.
    """

    observation_space = EVERY
    action_space = spaces.Box(np.array([-1.0, -np.inf]), np.array([1.0, np.inf]), (2,), np.float64)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.t, self.timed = 0, (seed or 0) % 2 == 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        info = {"duration": self.t / 8} if self.timed else {}
        ended, cut = self.t > 6, self.t > 4 and self.timed
        return self.observation_space.sample(), 0.1 * self.t, ended, cut, info


gymnasium.register("Everything-v0", entry_point=Everything)


def exports(artifact: Artifact, *folders: str) -> list[bytes]:
    return [
        path.read_bytes()
        for folder in folders or ("episodes",)
        for path in sorted((artifact.path / folder).rglob("*.*"))
    ]


def test_what_is_exported_imports_again_byte_for_byte(gather: Collect, import_logs: Import) -> None:
    result = gather("Everything-v0")
    assert all(result.meta["counts"]["outcomes"].values())
    export = result.path / "episodes"
    back, inferred = (import_logs(export, env=env) for env in ("Everything-v0", ""))
    assert exports(result) == exports(back) == exports(inferred) != []
    assert exports(result, "shards") == exports(back, "shards") != []
