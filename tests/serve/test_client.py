"""The client meets VectorEnv's contract: it equals SyncVectorEnv over the same environments."""

from __future__ import annotations

import itertools
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from mesocosm.errors import MesocosmError, UsageError
from mesocosm.model.spec import Parts
from mesocosm.serve.client import WorldVectorEnv
from mesocosm.serve.single_env import WorldEnv

BOX = spaces.Box(-np.inf, np.inf, (3,), np.float32)
DICT = spaces.Dict(
    {
        "place": spaces.Box(-np.inf, np.inf, (2,), np.float64),
        "room": spaces.Discrete(4, start=1),
        "flags": spaces.MultiBinary(2),
    }
)
TEXT = spaces.Dict({"say": spaces.Text(5, charset="abc"), "x": BOX})
SPACES = {
    "box, discrete": (BOX, spaces.Discrete(2)),
    "box, continuous": (BOX, spaces.Box(-1, 1, (2,), np.float32)),
    "dict, multidiscrete": (DICT, spaces.MultiDiscrete([2, 3])),
    "text, dict": (
        TEXT,
        spaces.Dict({"a": spaces.Discrete(2), "b": spaces.Box(-1, 1, (1,), np.float64)}),
    ),
}


def rollout(env: Any, steps: int, seed: int | None, actions: int = 0) -> list[Any]:
    """The results of a rollout under a fixed sequence of actions."""
    env.action_space.seed(actions)
    env_steps = [env.reset(seed=seed)]
    for _ in range(steps):
        env_steps.append(env.step(env.action_space.sample()))
    return env_steps


def same(a: Any, b: Any, tolerance: float = 0.0) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key], tolerance) for key in a)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, np.ndarray) and a.dtype == object:
        return len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, np.ndarray | np.generic):
        assert a.dtype == b.dtype and a.shape == b.shape, (a, b)
        return (
            bool(np.allclose(a, b, tolerance, tolerance))
            if a.dtype.kind == "f"
            else bool((a == b).all())
        )
    return bool(a == b)


def unmasked(infos: dict[str, Any]) -> dict[str, Any]:
    """Infos without the keys that are masked out everywhere. Gymnasium omits these."""
    names = [name for name in infos if not name.startswith("_") and infos[f"_{name}"].any()]
    return {
        name: unmasked(infos[name]) if isinstance(infos[name], dict) else infos[name]
        for name in names
    } | {f"_{name}": infos[f"_{name}"] for name in names}


@pytest.mark.parametrize("family", ["ensemble", "sequence"])
@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
@pytest.mark.parametrize("count", [1, 4])
def test_as_sync_vector_env(make_world: Any, family: str, mode: str, count: int) -> None:
    """Equals Gymnasium's vector of single environments in resets, observations, infos and masks.

    Batch shapes differ, and with them the last bits of numbers; this world imagines categories,
    which they do not reach. No context is rebuilt: a vector does that at other steps than a single
    environment.
    """
    tolerance = 1e-3
    observation = spaces.Dict({"room": spaces.Discrete(4, start=1), "flags": spaces.MultiBinary(3)})
    world = make_world(
        observation, spaces.Discrete(2), family, context=64, terminal=0.1, rewards=(0.0, 1.0)
    )
    limit = None
    if count > 1:  # a limit that some steps exceed, by more than the last bits
        values = np.sort(
            np.concatenate(
                [
                    step[4]["disagreement"]
                    for step in rollout(WorldVectorEnv(count, world), 30, 5)[1:]
                ]
            )
        )
        gaps = np.diff(values)[len(values) // 4 : -len(values) // 4]
        limit = float(values[len(values) // 4 + gaps.argmax()] + gaps.max() / 2)
    vector = WorldVectorEnv(
        count, world, horizon=7, autoreset_mode=mode, penalty=0.5, max_disagreement=limit
    )
    singles = [
        lambda i=i: WorldEnv(world, first_env=i, horizon=7, penalty=0.5, max_disagreement=limit)
        for i in range(count)
    ]
    reference = SyncVectorEnv(singles, autoreset_mode=AutoresetMode(mode))
    vector.action_space.seed(1)
    assert same(vector.reset(seed=5), reference.reset(seed=[5] * count), tolerance)
    ends = {"terminated": 0, "truncated": 0}
    uncertain, sure = 0, 0
    for _ in range(60 // count):
        action = vector.action_space.sample()
        actual, expected = vector.step(action), reference.step(action)
        assert same(actual[:4], expected[:4], tolerance) and same(
            unmasked(actual[4]), unmasked(expected[4]), tolerance
        ), (actual, expected)
        ends["terminated"] += int(actual[2].sum())
        ends["truncated"] += int(actual[3].sum())
        if limit is not None:
            values = actual[4]["disagreement"]
            if mode == "SameStep" and "final_info" in actual[4]:
                values = np.where(
                    actual[4]["_final_info"], actual[4]["final_info"]["disagreement"], values
                )
            assert (actual[2] | actual[3])[values > limit].all(), (
                "an episode continues after an uncertain step"
            )
            uncertain, sure = (
                uncertain + int((values > limit).sum()),
                sure + int((values <= limit).sum()),
            )
        assert ("final_obs" in actual[4]) == (
            mode == "SameStep" and bool((actual[2] | actual[3]).any())
        )
    assert min(ends.values()) > 0 and sum(ends.values()) > 5, ends
    assert limit is None or min(uncertain, sure) > 3, (uncertain, sure)
    assert vector.metadata["autoreset_mode"] is AutoresetMode(mode)


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_an_action_that_is_not_finite_is_rejected(make_world: Any, mode: str) -> None:
    action = spaces.Dict(
        {"a": spaces.Discrete(2), "push": spaces.Box(-np.inf, np.inf, (2,), np.float64)}
    )
    env = WorldVectorEnv(3, make_world(BOX, action, terminal=1e-9), horizon=2, autoreset_mode=mode)
    env.reset(seed=0)
    good = {"a": np.zeros(3, np.int64), "push": np.zeros((3, 2))}
    for value, message in (
        (np.nan, "must be finite, got nan"),
        (-np.inf, "must be finite, got -inf"),
        (1e300, "holds 1e.300"),
    ):
        bad = {"a": good["a"], "push": np.array([[0, 0], [0, value], [0, 0]])}
        with pytest.raises(MesocosmError, match=rf"action.push\[1\].*{message}") as error:
            env.step(bad)
        assert "\n" not in str(error.value)
    env.step(good)
    assert env.step(good)[3].all(), "what is rejected is no step"
    nan = {"a": good["a"], "push": np.full((3, 2), np.nan)}
    if mode == "NextStep":  # the environments reset, and ignore their actions
        env.step(nan)
    with pytest.raises(UsageError, match=r"action.push\[0\] of environment 0 must be finite"):
        env.step(nan)


@pytest.mark.parametrize("name", SPACES)
def test_spaces(make_world: Any, name: str) -> None:
    """Observations are in their spaces; rewards and flags have Gymnasium's dtypes."""
    observation, action = SPACES[name]
    env = WorldVectorEnv(
        4,
        make_world(observation, action, "sequence", terminal=0.2),
        horizon=5,
        autoreset_mode="SameStep",
    )
    assert env.single_observation_space == observation and env.single_action_space == action
    env.action_space.seed(0)
    first, infos = env.reset(seed=0)
    assert first in env.observation_space and infos == {}
    ended = 0
    for _ in range(12):
        now, reward, terminated, truncated, infos = env.step(env.action_space.sample())
        assert now in env.observation_space
        assert (reward.dtype, terminated.dtype, truncated.dtype) == (np.float64, np.bool_, np.bool_)
        assert (
            reward.shape
            == terminated.shape
            == truncated.shape
            == infos["disagreement"].shape
            == (4,)
        )
        for i in np.flatnonzero(terminated | truncated):
            assert infos["final_obs"][i] in observation
            ended += 1
    assert ended > 4


@pytest.mark.parametrize("name", SPACES)
def test_check_env(make_world: Any, name: str, recwarn: pytest.WarningsRecorder) -> None:
    check_env(WorldEnv(make_world(*SPACES[name], "ensemble")), skip_render_check=True)
    assert not [
        w
        for w in recwarn
        if "WARN" in str(w.message)
        and "infinity" not in str(w.message)
        and "Box" not in str(w.message)
    ]


@pytest.mark.parametrize("family", ["ensemble", "sequence"])
def test_seeding(make_world: Any, family: str) -> None:
    """A seed fixes the trajectory in every client. Without it, or with another `first_env`, it
    differs.
    """
    world = make_world(family=family)
    env = WorldVectorEnv(4, world, horizon=6, seed=11)
    once, again = rollout(env, 20, 3), rollout(env, 20, 3)
    assert same(once, again)
    assert same(once, rollout(WorldVectorEnv(4, world, horizon=6), 20, 3))
    assert not same(once, rollout(env, 20, 4))
    assert not same(once[0], env.reset())
    assert not same(once[0], rollout(WorldVectorEnv(4, world, horizon=6, first_env=4), 0, 3)[0])
    assert same(rollout(WorldVectorEnv(4, world, seed=3), 0, None)[0], once[0])
    observations = once[0][0]
    assert len(np.unique(observations[:, 0])) == 4, "environments of one vector must differ"


def test_penalty_and_horizon(make_world: Any) -> None:
    world = make_world(terminal=0.0)
    plain, penalized = (
        WorldVectorEnv(3, world, horizon=4),
        WorldVectorEnv(3, world, horizon=4, penalty=2.0),
    )
    for (_, reward, _, _, infos), (_, penalised, _, _, penalized_infos) in zip(
        rollout(plain, 9, 0)[1:], rollout(penalized, 9, 0)[1:], strict=True
    ):
        size = penalized._codec.spec.reward_size
        np.testing.assert_allclose(
            penalised, reward - size * np.minimum(2.0 * infos["disagreement"], 1.0), atol=1e-6
        )
        np.testing.assert_array_equal(penalized_infos["raw_reward"], reward)
    env = WorldVectorEnv(2, make_world(terminal=0.0), horizon=4)
    steps = rollout(env, 12, 0)[1:]
    assert not any(step[2].any() for step in steps), "a world whose episodes never end"
    assert (
        [bool(step[3].all()) for step in steps]
        == [bool(step[3].any()) for step in steps]
        == [False, False, False, True, False] * 2 + [False, False]
    )


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_logged_starts(make_world: Any, mode: str) -> None:
    """Every episode begins at one of the starts, with its task, and all of them are used."""
    world = make_world(DICT, spaces.Discrete(2), task=("room",))
    rooms = torch.tensor([[0], [3], [1]])
    starts = (
        Parts(torch.zeros(3, 0), rooms),
        Parts(
            torch.arange(3.0).reshape(3, 1).repeat(1, 2) * 10, torch.zeros(3, 2, dtype=torch.int64)
        ),
    )
    env = WorldVectorEnv(8, world, horizon=3, starts=starts, autoreset_mode=mode)
    results = rollout(env, 12, 0)
    values: set[tuple[float, int]] = set()
    rooms_now = results[0][0]["room"]
    before = np.ones(8, bool)
    for step, after in itertools.pairwise(results):
        values |= {
            (float(p[0]), int(r))
            for p, r in zip(step[0]["place"][before], step[0]["room"][before], strict=True)
        }
        ended = after[2] | after[3]
        if mode == "SameStep":
            assert (after[0]["room"] == rooms_now)[~ended].all()
            for i in np.flatnonzero(ended):
                assert after[4]["final_obs"][i]["room"] == rooms_now[i]
            before = ended
        else:
            previous = (step[2] | step[3]) if len(step) == 5 else np.zeros(8, bool)
            assert (after[0]["room"] == rooms_now)[~previous].all()
            before = previous
        rooms_now = after[0]["room"]
    assert values == {(0.0, 1), (10.0, 4), (20.0, 2)}


def test_make(make_world: Any, store: Any, root: str) -> None:
    """gymnasium.make_vec and make build it from an id, a prefix and a folder."""
    world = make_world(terminal=0.0)
    artifact = store("abc123", world)
    expected = rollout(WorldVectorEnv(3, world, horizon=5), 8, 2)
    for ref in ("abc123", "abc", "worlds/abc123", str(artifact.path)):
        env = gymnasium.make_vec(
            "mesocosm/World-v0", num_envs=3, world=ref, root=root, backend="local", horizon=5
        )
        assert same(rollout(env, 8, 2), expected)
        env.close()
    single = gymnasium.make("mesocosm/World-v0", world="abc", root=root, backend="local", horizon=2)
    single.reset(seed=0)
    assert [single.step(0)[3] for _ in range(2)] == [False, True]
    single.close()


def test_another_version(make_world: Any, store: Any, root: str) -> None:
    """A reset pins a new version; one with other spaces is refused."""
    store("one", make_world(seed=1))
    store("two", make_world(seed=2))
    store("other", make_world(DICT))
    env = WorldVectorEnv(2, "one", root=root, backend="local", horizon=5)
    one = rollout(env, 6, 0)
    env.reset(seed=0, options={"world": "two"})
    assert env.world == "two"
    two = rollout(env, 6, 0)
    assert not same(one, two)
    assert same(two, rollout(WorldVectorEnv(2, "two", root=root, backend="local", horizon=5), 6, 0))
    with pytest.raises(
        UsageError, match=r"world 'other' must have this client's spaces .* make a new client"
    ):
        env.reset(options={"world": "other"})
    assert env.world == "two", "a refused version leaves the client as it was"
    assert same(two, rollout(env, 6, 0))


def test_starts_of_another_codec(make_world: Any, store: Any, root: str) -> None:
    """Logged starts belong to one codec: a version with another codec is refused."""
    store("one", make_world(seed=1))
    store("two", make_world(seed=2))
    store("rewards", make_world(rewards=(0.0, 1.0)))
    none = torch.zeros(1, 0, dtype=torch.int64)
    starts = (Parts(torch.zeros(1, 0), none), Parts(torch.ones(1, 3), none))
    env = WorldVectorEnv(2, "one", root=root, backend="local", starts=starts)
    env.reset()
    assert (env.reset(options={"world": "two"})[0] == 1).all()
    with pytest.raises(
        UsageError,
        match=r"starts: they are encoded for world 'two', and 'rewards' has another codec",
    ):
        env.reset(options={"world": "rewards"})


def test_wrong_use(make_world: Any, root: str) -> None:
    world = make_world()
    with pytest.raises(UsageError, match=r"no artifact worlds/missing in storage.root"):
        WorldVectorEnv(2, "missing", root=root, backend="local")
    with pytest.raises(UsageError, match=r"world must be an artifact id .* got ''"):
        WorldVectorEnv(2, root=root, backend="local")
    with pytest.raises(UsageError, match=r"'/nowhere' is a folder without a world.json"):
        WorldVectorEnv(2, "/nowhere", root=root, backend="local")
    with pytest.raises(UsageError, match=r"backend must be .*got 'sreve'; did you mean 'serve'"):
        WorldVectorEnv(2, "x", backend="sreve")
    with pytest.raises(UsageError, match="num_envs must be >= 1, got 0"):
        WorldVectorEnv(0, world)
    with pytest.raises(UsageError, match="horizon must be >= 1 or None, got 0"):
        WorldVectorEnv(1, world, horizon=0)
    with pytest.raises(UsageError, match=r"autoreset_mode must be .* got 'Disabled'"):
        WorldVectorEnv(1, world, autoreset_mode=AutoresetMode.DISABLED)
    with pytest.raises(
        UsageError, match=r"starts: the observation parts .* = \(2, 3, 0\), got \(2, 1, 0\)"
    ):
        WorldVectorEnv(
            1,
            world,
            starts=(
                Parts(torch.zeros(2, 0), torch.zeros(2, 0)),
                Parts(torch.zeros(2, 1), torch.zeros(2, 0)),
            ),
        )
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


def test_observations_stay(make_world: Any) -> None:
    """Later steps do not change the arrays that a step returned."""
    env = WorldVectorEnv(3, make_world(family="sequence"), horizon=4)
    results = rollout(env, 10, 0)
    copies = rollout(env, 0, 0)
    assert data_equivalence(results[0][0], copies[0][0])
    frozen = [step[0].copy() for step in results]
    for _ in range(10):
        env.step(env.action_space.sample())
    assert all((a == step[0]).all() for a, step in zip(frozen, results, strict=True))


@pytest.mark.parametrize("family", ["ensemble", "sequence"])
@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_divergence_is_cut(make_world: Any, family: str, mode: str) -> None:
    """Divergence truncates an episode and marks it in the infos; every number stays finite."""
    world = make_world(family=family, terminal=0.0)
    world.base.residual_scale.fill_(1e38)
    env = WorldVectorEnv(3, world, autoreset_mode=mode)
    steps = rollout(env, 30, 0)[1:]
    assert all(
        np.isfinite(step[0]).all()
        and np.isfinite(step[1]).all()
        and np.isfinite(step[4]["disagreement"]).all()
        for step in steps
    )
    diverged = [
        step[4]["diverged"] | step[4].get("final_info", {}).get("diverged", False) for step in steps
    ]
    cut = [step[3] for step in steps]
    assert sum(c.sum() for c in cut) > 3 and not any((step[2] & step[3]).any() for step in steps)
    np.testing.assert_array_equal(diverged, cut)
    if mode == "SameStep":
        assert all(
            np.isfinite(step[4]["final_obs"][i]).all()
            for step in steps
            for i in np.flatnonzero(step[3])
        )
