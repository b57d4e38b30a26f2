"""One policy of bounds for collect and import, values that no world can hold, and what is exported
imports again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
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
from mesocosm.jobs.collect import JOB as COLLECT
from mesocosm.jobs.import_logs import JOB as IMPORT
from mesocosm.jobs.import_logs import ImportConfig
from mesocosm.runs import tracking
from mesocosm.store.artifacts import Artifact, Storage


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
def import_logs(root: str, a_run: tracking.Run) -> Callable[..., Artifact]:
    def make(*paths: Path | str, **keys: Any) -> Artifact:
        config = configured(*paths, **keys)
        config.storage.root = root
        a_run.storage = Storage(root)
        return IMPORT.run(config, a_run)

    return make


@pytest.fixture
def gather(root: str, a_run: tracking.Run) -> Callable[..., Artifact]:
    """`gather(env, bounds, **kwargs of the environment)` collects 60 steps in this process."""

    def make(env: str, bounds: str = "drop", **kwargs: Any) -> Artifact:
        config = CollectConfig(
            steps=60,
            lanes=1,
            workers=0,
            reality=RealityConfig(env=env, bounds=bounds, kwargs=kwargs),
        )
        config.storage.root = root
        a_run.storage = Storage(root)
        return COLLECT.run(config, a_run)

    return make


def configured(
    *paths: Path | str, env: str = "", bounds: str = "drop", **keys: Any
) -> ImportConfig:
    config = ImportConfig(paths=[str(path) for path in paths], **{"workers": 0, **keys})
    config.reality.env, config.reality.bounds = env, bounds
    return config


def parquet(path: Path, *changes: tuple[int, int, str, Any]) -> Path:
    """Write three episodes of four rows, with changes (episode, step, column, value).

    Episode -1 stands for all.
    """
    rows = [
        {
            "episode": k,
            "step": t,
            "observation": [t / 2, k / 8],
            "action": t % 2,
            "reward": 1.0,
            "terminated": t == 3,
            "truncated": False,
            "next_observation": [(t + 1) / 2, k / 8],
        }
        for k in range(3)
        for t in range(4)
    ]
    for episode, step, name, value in changes:
        for row in rows:
            if row["step"] == step and episode in (-1, row["episode"]):
                row[name] = value
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("bad", ["refuse", "drop"])
def test_bounds_of_what_is_imported(
    bad: str, tmp_path: Path, import_logs: Callable[..., Artifact]
) -> None:
    path = parquet(
        tmp_path / "a.parquet",
        (1, 0, "next_observation", [-7.0, 0.125]),
        (1, 1, "observation", [-7.0, 0.125]),
    )
    dropped = IMPORT.plan(configured(path, env="OddSquare-v0", bad=bad))
    assert [(row["reason"], row["episodes"]) for row in dropped["left out"]] == [
        ("outside the space", 1)
    ] and dropped["episodes"] == 2
    for bounds, value in (("clip", -5.0), ("ignore", -7.0)):
        result = Dataset([import_logs(path, env="OddSquare-v0", bounds=bounds, bad=bad).path])
        assert [float(o[0]) for o in result.episode(1).observations] == [0.0, value, 1.0, 1.5, 2.0]
    wrong = parquet(tmp_path / "b.parquet", (1, 1, "action", 2))
    for bounds in ("drop", "clip", "ignore"):
        config = configured(wrong, env="OddSquare-v0", bounds=bounds, bad=bad)
        left_out = IMPORT.plan(config)["left out"]
        assert [(row["reason"], row["episodes"]) for row in left_out] == [
            ("outside the space", 1)
        ], "no column can hold it"
    with pytest.raises(
        UsageError,
        match=r"can be imported: .*row 1: observation .* got \[7.0, 7.0\] .*reality.bounds=clip",
    ):
        IMPORT.plan(
            configured(
                parquet(tmp_path / "c.parquet", (-1, 0, "observation", [7.0, 7.0])),
                env="OddSquare-v0",
            )
        )
    with pytest.raises(
        UsageError, match=r"reality.bounds must be one of drop, clip, ignore; got 'keep'"
    ):
        IMPORT.plan(configured(path, bounds="keep"))


def test_bounds_of_what_is_collected(
    gather: Callable[..., Artifact], import_logs: Callable[..., Artifact]
) -> None:
    """The same values as `import` drops, clips and ignores; and what is exported is imported by the
    same policy.
    """
    result = {
        bounds: gather("OddSquare-v0", bounds, trouble="outside", every=3)
        for bounds in ("drop", "clip", "ignore")
    }
    reasons = [dropped["reason"] for dropped in result["drop"].meta["dropped"]]
    assert reasons and all(
        "after step 3, observation=[1.5, -7.0] is outside Box" in reason for reason in reasons
    )
    assert all(dropped["steps"] == 3 for dropped in result["drop"].meta["dropped"]), (
        "no step is paid after it"
    )
    assert result["clip"].meta["dropped"] == result["ignore"].meta["dropped"] == []
    lowest = {
        bounds: min(
            o[1] for episode in Dataset([a.path]).iter_episodes() for o in episode.observations
        )
        for bounds, a in result.items()
    }
    assert lowest == {"drop": 0.0, "clip": -5.0, "ignore": -7.0}
    for bounds, artifact in result.items():
        back = import_logs(artifact.path / "episodes", env="OddSquare-v0", bounds=bounds)
        assert exports(back) == exports(artifact) and back.meta["counts"]["episodes_left_out"] == 0
    with pytest.raises(
        MesocosmError,
        match=r"5 episodes in a row failed .*set reality.bounds=clip or reality.bounds=ignore",
    ):
        gather("OddSquare-v0", trouble="outside")


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("huge", r"observation\[1\] holds 1e\+300, and a world computes in float32; rescale it"),
        ("reward", r"reward -1e\+39, and a world computes in float32; rescale it"),
        ("negative", r"info\['duration'\] -1, which is negative; give seconds"),
    ],
)
def test_values_that_no_world_can_hold_are_not_collected(
    trouble: str, message: str, gather: Callable[..., Artifact]
) -> None:
    for bounds in ("drop", "ignore"):
        with pytest.raises(MesocosmError, match=f"5 episodes in a row failed .*{message}"):
            gather("OddEndless-v0", bounds, trouble=trouble)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"observations": [np.array([0.0, -1e300])] * 4},
            r"observation\[1\] holds -1e\+300, .*float32; rescale it",
        ),
        ({"actions": [np.array([1e300])] * 3}, r"action\[0\] holds 1e\+300, .*float32; rescale it"),
        ({"rewards": np.array([0.0, 1e300, 0.0])}, r"reward holds 1e\+300, .*float32; rescale it"),
        (
            {"durations": np.array([0.5, 1e300, 0.5])},
            r"duration holds 1e\+300, .*float32; rescale it",
        ),
        ({"durations": np.array([0.5, -2.0, 0.5])}, r"duration holds -2, which is negative"),
    ],
)
def test_a_codec_is_not_fitted_to_what_no_world_can_hold(
    change: dict[str, Any],
    message: str,
    write: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A dataset that an earlier version wrote holds such values."""
    monkeypatch.setattr("mesocosm.datasets.spaces.first_beyond_float32", lambda values: None)
    whole: dict[str, Any] = {
        "observations": [np.zeros(2)] * 4,
        "actions": [np.zeros(1)] * 3,
        "rewards": np.zeros(3),
        "durations": np.full(3, 0.5),
    }
    episode = Episode(
        index=0, seed=0, behaviour="random", outcome="terminated", **{**whole, **change}
    )
    box = (
        spaces.Box(-np.inf, np.inf, (2,), np.float64),
        spaces.Box(-np.inf, np.inf, (1,), np.float64),
    )
    dataset = Dataset([write([episode], observation_space=box[0], action_space=box[1])])
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
    assert first_outside(space, right, "observation") is None, (
        "bounds are compared in the precision of the space"
    )
    wrong = {"a": np.array([0.0, 1.5]), "b": (np.int64(-3), 7)}
    assert (
        first_outside(space, wrong, "observation")
        == f"observation.a=[0.0, 1.5] is outside {space['a']}"
    )
    assert (
        first_outside(space, {"b": (np.int64(-3), 7)}, "observation")
        == f"observation.b.0=-3 is outside {space['b'][0]}"
    )
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
        return (
            self.observation_space.sample(),
            0.1 * self.t,
            self.t > 6,
            self.t > 4 and self.timed,
            info,
        )


gymnasium.register("Everything-v0", entry_point=Everything)


def exports(artifact: Artifact, *folders: str) -> list[bytes]:
    return [
        path.read_bytes()
        for folder in folders or ("episodes",)
        for path in sorted((artifact.path / folder).rglob("*.*"))
    ]


def test_what_is_exported_imports_again_byte_for_byte(
    gather: Callable[..., Artifact], import_logs: Callable[..., Artifact]
) -> None:
    result = gather("Everything-v0")
    assert all(result.meta["counts"]["outcomes"].values())
    back, inferred = (
        import_logs(result.path / "episodes", env=env) for env in ("Everything-v0", "")
    )
    assert exports(result) == exports(back) == exports(inferred) != []
    assert exports(result, "shards") == exports(back, "shards") != []
