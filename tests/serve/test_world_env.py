"""The client meets VectorEnv's contract: it equals SyncVectorEnv over the same environments."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from mesocosm.errors import MesocosmError, UsageError
from mesocosm.model.tensors import Parts
from mesocosm.serve.single_env import WorldEnv
from mesocosm.serve.world_env import WorldVectorEnv

from .worlds import BOX, PLACE, TWO, local, rollout, untrained

FLAGS = spaces.MultiBinary(2)
ROOMS = spaces.Dict({"place": PLACE, "room": spaces.Discrete(4, start=1), "flags": FLAGS})
TEXT = spaces.Dict({"say": spaces.Text(5, charset="abc"), "x": BOX})
SPACES = {
    "box, discrete": (BOX, TWO),
    "box, continuous": (BOX, spaces.Box(-1, 1, (2,), np.float32)),
    "dict, multidiscrete": (ROOMS, spaces.MultiDiscrete([2, 3])),
    "text, dict": (TEXT, spaces.Dict({"a": TWO, "b": spaces.Box(-1, 1, (1,), np.float64)})),
}
families = pytest.mark.parametrize("family", ["ensemble", "sequence"])
modes = pytest.mark.parametrize("mode", ["NextStep", "SameStep"])


def same(a: Any, b: Any, tolerance: float = 0.0) -> bool:
    """True if nested results are equal, up to `tolerance` of their floats."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key], tolerance) for key in a)
    if isinstance(a, tuple | list) or (isinstance(a, np.ndarray) and a.dtype == object):
        return len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if not isinstance(a, np.ndarray | np.generic):
        return bool(a == b)
    assert a.dtype == b.dtype and a.shape == b.shape, (a, b)
    close = np.allclose(a, b, tolerance, tolerance) if a.dtype.kind == "f" else (a == b).all()
    return bool(close)


def unmasked(infos: dict[str, Any]) -> dict[str, Any]:
    """Infos without the keys that are masked out everywhere. Gymnasium omits these."""
    names = [name for name in infos if not name.startswith("_") and infos[f"_{name}"].any()]
    values = {name: infos[name] for name in names}
    values = {n: unmasked(v) if isinstance(v, dict) else v for n, v in values.items()}
    return values | {f"_{name}": infos[f"_{name}"] for name in names}


def last_value(infos: dict[str, Any], name: str) -> Any:
    """[B] of the step just taken: that of an ended SAME_STEP episode is in final_info."""
    if "final_info" not in infos:
        return infos[name]
    return np.where(infos["_final_info"], infos["final_info"][name], infos[name])


def dividing_limit(env: WorldVectorEnv) -> float:
    """A disagreement that some steps exceed, by more than the last bits."""
    values = np.sort(np.concatenate([step[4]["disagreement"] for step in rollout(env, 30, 5)[1:]]))
    quarter = len(values) // 4
    gaps = np.diff(values)[quarter:-quarter]
    return float(values[quarter + gaps.argmax()] + gaps.max() / 2)


@pytest.mark.integration
@families
@modes
@pytest.mark.parametrize("count", [1, 4])
def test_as_sync_vector_env(family: str, mode: str, count: int) -> None:
    """Equals Gymnasium's vector of single environments in resets, observations, infos and masks.

    Batch shapes differ, and with them the last bits of numbers; this world imagines categories,
    which they do not reach. No context is rebuilt: a vector does that at other steps than a single
    environment.
    """
    observation = spaces.Dict({"room": spaces.Discrete(4, start=1), "flags": spaces.MultiBinary(3)})
    options: dict[str, Any] = {"context": 64, "terminal": 0.1, "rewards": (0.0, 1.0)}
    world = untrained(observation, TWO, family, **options)
    limit = dividing_limit(WorldVectorEnv(count, world)) if count > 1 else None
    arguments: dict[str, Any] = {"horizon": 7, "penalty": 0.5, "max_disagreement": limit}
    vector = WorldVectorEnv(count, world, autoreset_mode=mode, **arguments)
    singles = [partial(WorldEnv, world, first_env=i, **arguments) for i in range(count)]
    reference = SyncVectorEnv(singles, autoreset_mode=AutoresetMode(mode))
    vector.action_space.seed(1)
    assert same(vector.reset(seed=5), reference.reset(seed=[5] * count), 1e-3)
    counts = dict.fromkeys(("terminated", "truncated", "uncertain", "sure"), 0)
    for _ in range(60 // count):
        action = vector.action_space.sample()
        actual, expected = vector.step(action), reference.step(action)
        infos, ended = actual[4], actual[2] | actual[3]
        assert same(actual[:4], expected[:4], 1e-3), (actual, expected)
        assert same(unmasked(infos), unmasked(expected[4]), 1e-3), (actual, expected)
        counts["terminated"] += int(actual[2].sum())
        counts["truncated"] += int(actual[3].sum())
        if limit is not None:
            uncertain = last_value(infos, "disagreement") > limit
            assert ended[uncertain].all(), "an episode continues after an uncertain step"
            counts["uncertain"] += int(uncertain.sum())
            counts["sure"] += int((~uncertain).sum())
        assert ("final_obs" in infos) == (mode == "SameStep" and bool(ended.any()))
    ends = counts["terminated"], counts["truncated"]
    assert min(ends) > 0 and sum(ends) > 5, counts
    assert limit is None or min(counts["uncertain"], counts["sure"]) > 3, counts
    assert vector.metadata["autoreset_mode"] is AutoresetMode(mode)


@modes
def test_an_action_that_is_not_finite_is_rejected(mode: str) -> None:
    push = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    world = untrained(BOX, spaces.Dict({"a": TWO, "push": push}), terminal=1e-9)
    env = WorldVectorEnv(3, world, horizon=2, autoreset_mode=mode)
    env.reset(seed=0)

    def act(value: float = 0.0, rows: slice = slice(1, 2), columns: slice = slice(1, 2)) -> Any:
        action = {"a": np.zeros(3, np.int64), "push": np.zeros((3, 2))}
        action["push"][rows, columns] = value
        return env.step(action)

    finite = "must be finite, got "
    for value, message in ((np.nan, f"{finite}nan"), (-np.inf, f"{finite}-inf"), (1e300, "1e.300")):
        with pytest.raises(MesocosmError, match=rf"action.push\[1\].*{message}") as error:
            act(value)
        assert "\n" not in str(error.value)
    act()
    assert act()[3].all(), "a rejected action is no step"
    everywhere = slice(None), slice(None)
    if mode == "NextStep":  # the environments reset, and ignore their actions
        act(np.nan, *everywhere)
    with pytest.raises(UsageError, match=r"action.push\[0\] of environment 0 must be finite"):
        act(np.nan, *everywhere)


@pytest.mark.parametrize("name", SPACES)
def test_spaces(name: str) -> None:
    """Observations are in their spaces; rewards and flags have Gymnasium's dtypes."""
    observation, action = SPACES[name]
    world = untrained(observation, action, "sequence", terminal=0.2)
    env = WorldVectorEnv(4, world, horizon=5, autoreset_mode="SameStep")
    assert env.single_observation_space == observation and env.single_action_space == action
    results = rollout(env, 12, 0)
    assert results[0][0] in env.observation_space and results[0][1] == {}
    ended = 0
    for after, *outcome, infos in results[1:]:
        assert after in env.observation_space
        assert [values.dtype for values in outcome] == [np.float64, np.bool_, np.bool_]
        assert {values.shape for values in (*outcome, infos["disagreement"])} == {(4,)}
        for i in np.flatnonzero(outcome[1] | outcome[2]):
            assert infos["final_obs"][i] in observation
            ended += 1
    assert ended > 4


@pytest.mark.parametrize("name", SPACES)
def test_check_env(name: str, recwarn: pytest.WarningsRecorder) -> None:
    check_env(WorldEnv(untrained(*SPACES[name])), skip_render_check=True)
    warnings = [str(warning.message) for warning in recwarn if "WARN" in str(warning.message)]
    assert not [text for text in warnings if "infinity" not in text and "Box" not in text]


@families
def test_seeding(family: str) -> None:
    """A seed fixes the trajectory in every client. Without it, or with another `first_env`, it
    differs.
    """
    world = untrained(family=family)
    env = WorldVectorEnv(4, world, horizon=6, seed=11)
    once = rollout(env, 20, 3)
    assert same(once, rollout(env, 20, 3))
    assert same(once, rollout(WorldVectorEnv(4, world, horizon=6), 20, 3))
    assert not same(once, rollout(env, 20, 4))
    assert not same(once[0], env.reset())
    assert not same(once[0], rollout(WorldVectorEnv(4, world, horizon=6, first_env=4), 0, 3)[0])
    assert same(rollout(WorldVectorEnv(4, world, seed=3), 0, None)[0], once[0])
    assert len(np.unique(once[0][0][:, 0])) == 4, "environments of one vector must differ"


def test_penalty_and_horizon() -> None:
    world = untrained(terminal=0.0)
    plain, penalized = (
        rollout(WorldVectorEnv(3, world, horizon=4, penalty=penalty), 12, 0)[1:]
        for penalty in (0.0, 2.0)
    )
    size = world.spec.reward_size
    for (_, reward, _, _, infos), step in zip(plain, penalized, strict=True):
        expected = reward - size * np.minimum(2.0 * infos["disagreement"], 1.0)
        np.testing.assert_allclose(step[1], expected, atol=1e-6)
        np.testing.assert_array_equal(step[4]["raw_reward"], reward)
    assert not any(step[2].any() for step in plain), "a world whose episodes never end"
    truncated = [[bool(flag) for flag in step[3]] for step in plain]
    assert truncated == [[step % 5 == 3] * 3 for step in range(12)]


@modes
def test_logged_starts(mode: str) -> None:
    """Every episode begins at one of the starts, with its task, and all of them are used."""
    world = untrained(ROOMS, TWO, task=("room",))
    task = Parts(torch.zeros(3, 0), torch.tensor([[0], [3], [1]]))
    places = torch.arange(3.0).reshape(3, 1).repeat(1, 2) * 10
    starts = (task, Parts(places, torch.zeros(3, 2, dtype=torch.int64)))
    results = rollout(
        WorldVectorEnv(8, world, horizon=3, starts=starts, autoreset_mode=mode), 12, 0
    )
    values: set[tuple[float, int]] = set()
    began = np.ones(8, bool)
    for step, after in itertools.pairwise(results):
        rooms = step[0]["room"]
        values |= set(zip(step[0]["place"][began, 0].tolist(), rooms[began].tolist(), strict=True))
        ended = after[2] | after[3]
        if mode == "SameStep":
            began = ended
            for i in np.flatnonzero(ended):
                assert after[4]["final_obs"][i]["room"] == rooms[i]
        else:
            began = (step[2] | step[3]) if len(step) == 5 else np.zeros(8, bool)
        assert (after[0]["room"] == rooms)[~began].all()
    assert values == {(0.0, 1), (10.0, 4), (20.0, 2)}


def test_make(store: Any, root: str) -> None:
    """gymnasium.make_vec and make build it from an id, a prefix and a folder."""
    world = untrained(terminal=0.0)
    artifact = store("abc123", world)
    expected = rollout(WorldVectorEnv(3, world, horizon=5), 8, 2)
    options: Any = {"root": root, "backend": "local"}
    for ref in ("abc123", "abc", "worlds/abc123", str(artifact.path)):
        env = gymnasium.make_vec("mesocosm/World-v0", 3, world=ref, horizon=5, **options)
        assert same(rollout(env, 8, 2), expected)
        env.close()
    single = gymnasium.make("mesocosm/World-v0", world="abc", horizon=2, **options)
    single.reset(seed=0)
    assert [single.step(0)[3] for _ in range(2)] == [False, True]
    single.close()


def test_another_version(store: Any, root: str) -> None:
    """A reset pins a new version; one with other spaces is refused."""
    for id, world in (("one", untrained(seed=1)), ("two", untrained(seed=2))):
        store(id, world)
    store("other", untrained(ROOMS))
    env = local("one", root, horizon=5)
    one = rollout(env, 6, 0)
    env.reset(seed=0, options={"world": "two"})
    assert env.world == "two"
    two = rollout(env, 6, 0)
    assert not same(one, two)
    assert same(two, rollout(local("two", root, horizon=5), 6, 0))
    with pytest.raises(UsageError, match="world 'other' must have this client's spaces"):
        env.reset(options={"world": "other"})
    assert env.world == "two", "a refused version leaves the client as it was"
    assert same(two, rollout(env, 6, 0))


def test_starts_of_another_codec(store: Any, root: str) -> None:
    """Logged starts belong to one codec: a version with another codec is refused."""
    for id, world in (("one", untrained(seed=1)), ("two", untrained(seed=2))):
        store(id, world)
    store("rewards", untrained(rewards=(0.0, 1.0)))
    none = torch.zeros(1, 0, dtype=torch.int64)
    starts = (Parts(torch.zeros(1, 0), none), Parts(torch.ones(1, 3), none))
    env = local("one", root, 2, starts=starts)
    env.reset()
    assert (env.reset(options={"world": "two"})[0] == 1).all()
    with pytest.raises(UsageError, match=r"starts: .* 'two', and 'rewards' has another codec"):
        env.reset(options={"world": "rewards"})


@pytest.mark.parametrize(
    ("num_envs", "arguments", "message"),
    [
        (2, {"world": "missing"}, "no artifact worlds/missing in storage.root"),
        (2, {"world": ""}, r"world must be an artifact id .* got ''"),
        (2, {"world": "/nowhere"}, "'/nowhere' is a folder without a world.json"),
        (2, {"backend": "sreve"}, "backend must be .*got 'sreve'; did you mean 'serve'"),
        (0, {}, "num_envs must be >= 1, got 0"),
        (1, {"horizon": 0}, "horizon must be >= 1, got 0"),
        (1, {"autoreset_mode": "Disabled"}, "autoreset_mode must be .* got 'Disabled'"),
    ],
)
def test_wrong_arguments(root: str, num_envs: int, arguments: Any, message: str) -> None:
    defaults = {"world": untrained(), "root": root, "backend": "local"}
    with pytest.raises(UsageError, match=message):
        WorldVectorEnv(num_envs, **defaults | arguments)


def test_wrong_use() -> None:
    world = untrained()
    parts = [Parts(torch.zeros(2, n), torch.zeros(2, 0, dtype=torch.int64)) for n in (0, 1)]
    with pytest.raises(UsageError, match=r"start.numbers must be .* \[1, 3\], got .* \[1, 1\]"):
        WorldVectorEnv(1, world, starts=(parts[0], parts[1])).reset()
    env = WorldVectorEnv(2, world)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(np.zeros(2, np.int64))
    with pytest.raises(UsageError, match="reset option 'wrold' is unknown; did you mean 'world'"):
        env.reset(options={"wrold": 1})
    with pytest.raises(UsageError, match=r"seed=\[1, 2\]"):
        env.reset(seed=[1, 2])  # type: ignore[arg-type]
    env.reset()
    with pytest.raises(UsageError, match="3 actions for num_envs=2"):
        env.step(np.zeros(3, np.int64))
    with pytest.raises(MesocosmError, match="the value 2 is outside the space"):
        env.step(np.array([0, 2]))
    with pytest.raises(UsageError, match=r"num_envs is not an argument .* got num_envs=2"):
        WorldEnv(world, num_envs=2)
    single = WorldEnv(world, horizon=1)
    single.reset()
    single.step(0)
    with pytest.raises(gymnasium.error.ResetNeeded):
        single.step(0)


def test_observations_stay() -> None:
    """Later steps do not change the arrays that a step returned."""
    env = WorldVectorEnv(3, untrained(family="sequence"), horizon=4)
    results = rollout(env, 10, 0)
    frozen = [step[0].copy() for step in results]
    assert data_equivalence(results[0][0], rollout(env, 10, 0)[0][0])
    assert all((a == step[0]).all() for a, step in zip(frozen, results, strict=True))


@families
@modes
def test_divergence_is_cut(family: str, mode: str) -> None:
    """Divergence truncates an episode and marks it in the infos; every number stays finite."""
    world = untrained(family=family, terminal=0.0)
    world.base.residual_scale.fill_(1e38)
    steps = rollout(WorldVectorEnv(3, world, autoreset_mode=mode), 30, 0)[1:]
    cut = np.stack([step[3] for step in steps])
    for observation, reward, terminated, truncated, infos in steps:
        for values in (observation, reward, infos["disagreement"]):
            assert np.isfinite(values).all()
        assert not (terminated & truncated).any()
        for i in np.flatnonzero(truncated) if mode == "SameStep" else ():
            assert np.isfinite(infos["final_obs"][i]).all()
    assert cut.sum() > 3
    np.testing.assert_array_equal([last_value(step[4], "diverged") for step in steps], cut)
