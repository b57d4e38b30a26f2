"""Environments from config alone, and one episode as a function of (config, seed, k)."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from mesocosm.config import load
from mesocosm.datasets.episode import Episode
from mesocosm.envs.api import package_versions
from mesocosm.envs.config import DrawnOption, RealityConfig, check, parse_success
from mesocosm.envs.episode import EpisodeError, episode_seed, run_episode
from mesocosm.envs.guard import GuardedEnv
from mesocosm.envs.items import Items
from mesocosm.envs.make import draw_options, environment_version, facts_of, make_env, task_keys
from mesocosm.envs.training import TrainingRun
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.user_code import source_hash


def still(observation: Any, rng: np.random.Generator) -> Any:
    return np.zeros(1, np.float32)


def drift(observation: Any, rng: np.random.Generator) -> Any:
    return rng.uniform(-1, 1, 1).astype(np.float32)


def reality(env: str, **changes: Any) -> RealityConfig:
    return RealityConfig(env=f"ownenvs:{env}", **changes)


def episode(
    config: RealityConfig,
    k: int = 0,
    act: Any = drift,
    max_steps: int | None = 25,
    seed: int = 5,
    env: Any = None,
) -> Episode:
    env = env or make_env(config)
    settings = {"behaviour": "test", "max_steps": max_steps, "config": config}
    return run_episode(env, act, k=k, seed=seed, **settings)


@pytest.mark.parametrize(
    ("id", "horizon", "steps"),
    [
        ("CartPole-v1", None, 500),
        ("Pendulum-v1", None, 200),
        ("InvertedPendulum-v5", None, 1000),
        ("Pendulum-v1", 33, 33),
    ],
)
def test_gymnasium_ids_and_horizon(id: str, horizon: int | None, steps: int) -> None:
    env = make_env(RealityConfig(env=id, horizon=horizon))
    assert env.spec is not None and env.spec.max_episode_steps == steps
    assert environment_version(env).startswith("gymnasium 1.2")
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    env.close()


@pytest.mark.parametrize(
    ("id", "message"),
    [
        ("", "reality.env must be a Gymnasium id"),
        ("CartPol-v1", "did you mean 'CartPole-v1'"),
        ("CartPole-v9", "did you mean 'CartPole-v1'"),
        ("InvertedPendulm-v5", "did you mean 'InvertedPendulum-v5'"),
        ("nosuchmodule:Env-v0", "no module 'nosuchmodule'"),
        ("ownenvs:Lin", "neither registers nor defines 'Lin'; did you mean 'Line'"),
        ("ownenvs:not_an_env", "gave a int, not a gymnasium.Env"),
    ],
)
def test_an_environment_that_does_not_exist(user_module: None, id: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_env(RealityConfig(env=id))


def test_wrong_kwargs_are_named() -> None:
    with pytest.raises(UsageError, match=r"reality.kwargs=\{'gravityy': 1\}.*gravityy"):
        make_env(RealityConfig(env="Pendulum-v1", kwargs={"gravityy": 1}))


@pytest.mark.parametrize(("name", "limit"), [("OwnLine-v0", 30), ("Line", None), ("make_line", 7)])
def test_an_environment_of_a_user_module(user_module: None, name: str, limit: int | None) -> None:
    line = episode(reality(name, kwargs={"stretch": 0.0}), act=still, max_steps=40)
    assert len(line) == (limit or 40)
    assert line.outcome == ("unfinished" if limit is None else "truncated")
    assert episode(reality(name, horizon=5), act=still, max_steps=40).outcome == "truncated"
    assert environment_version(make_env(reality(name))).startswith("ownenvs ")


def test_the_version_of_our_environment_names_its_source_and_programs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, source = RealityConfig(env="mesocosm.envs.items:Items"), source_hash(Items)
    assert environment_version(make_env(config)).endswith(f", mesocosm.envs.items {source}")
    assert "scikit-learn" in TrainingRun.program_versions()[1]
    monkeypatch.setattr(Items, "program_versions", lambda: package_versions("torch"), raising=False)
    torch = f"torch {version('torch')}"
    assert environment_version(make_env(config)).endswith(f"{source}, {torch}")
    with pytest.raises(gymnasium.error.DependencyNotInstalled, match="no-such-package is missing"):
        package_versions("no-such-package")


def test_an_episode_is_a_function_of_config_seed_and_k(user_module: None) -> None:
    config = reality("Line")
    env = make_env(config)
    for k in (3, 0, 7):  # an environment that has run others before
        shared, alone = episode(config, k, env=env), episode(config, k)
        assert shared.seed == episode_seed(5, k)
        for name in ("observations", "actions", "rewards"):
            assert np.array_equal(getattr(shared, name), getattr(alone, name))
    seeds = {episode_seed(s, k) for s in (-1, 0, 1, 2**40) for k in range(1000)}
    assert len(seeds) > 3990 and all(0 <= s < 2**31 for s in seeds)


def test_outcomes_are_distinguished_and_buffers_copied(user_module: None) -> None:
    config = reality("OwnLine-v0")
    right = episode(config, act=lambda o, rng: np.ones(1, np.float32), max_steps=None)
    assert right.outcome == "terminated"
    assert right.terminated[-1] and not right.terminated[:-1].any()
    assert len(right.observations) == len(right) + 1 == len(right.actions) + 1
    assert [float(o[1]) for o in right.observations] == list(range(len(right) + 1))
    assert right.rewards.dtype == np.float64 and right.durations is None and right.success is None
    assert episode(config, act=still, max_steps=None).outcome == "truncated"
    cut = episode(config, act=still, max_steps=4)
    assert cut.outcome == "unfinished" and len(cut) == 4 and not cut.terminated.any()


def test_dict_observations_durations_and_success(user_module: None) -> None:
    config = reality("Reach", task=["goal"], success="info.reached", horizon=60)
    assert task_keys(config, facts_of(config).observation_space) == ["goal"]
    episodes = [episode(config, k, max_steps=None) for k in range(8)]
    assert "terminated" in {e.outcome for e in episodes}
    assert {e.success for e in episodes} == {True, False}
    for e in episodes:
        assert set(e.observations[0]) == {"state", "goal"}
        assert len({float(o["goal"][0]) for o in e.observations}) == 1
        assert np.array_equal(e.durations, 0.25 * np.arange(1, len(e) + 1))
    with pytest.raises(UsageError, match=r"reality.task names 'gaol'.*did you mean 'goal'"):
        make_env(reality("Reach", task=["gaol"]))


def test_an_option_may_have_the_name_of_a_key_with_its_value(user_module: None) -> None:
    goal = {"task": ["goal"], "task_options": {"goal": DrawnOption(low=-0.5, high=0.5)}}
    done = episode(reality("Aimed", **goal), max_steps=None)
    np.testing.assert_allclose(done.observations[-1]["goal"], done.task["goal"], rtol=1e-6)
    env = make_env(reality("Aimed", kwargs={"off": 0.1}, **goal))
    with pytest.raises(MesocosmError, match=r"task_options\.goal is 0\.2.* must have the same"):
        env.reset(seed=0, options={"goal": 0.2})


def test_reset_options_are_drawn_by_seed_and_episode(user_module: None) -> None:
    wind, side = DrawnOption(low=-0.1, high=0.1), DrawnOption(choices=["east", "west"])
    task = {"task": ["wind", "side"], "task_options": {"wind": wind, "side": side}}
    config = reality("Windy", **task)
    drawn = [episode(config, k).task for k in range(12)]
    assert drawn == [episode(config, k).task for k in range(12)]
    assert drawn != [episode(config, k, seed=6).task for k in range(12)]
    assert len({options["wind"] for options in drawn}) == 12
    assert all(-0.1 <= options["wind"] < 0.1 for options in drawn)
    assert {options["side"] for options in drawn} == {"east", "west"}
    step = np.diff([o[0] for o in episode(config, 0, act=still, max_steps=3).observations])
    sign = 1 if drawn[0]["side"] == "east" else -1
    assert np.allclose(step, sign * drawn[0]["wind"], atol=1e-6)
    env, winds = GuardedEnv(config), []
    for seed in (1, None, None, 1):
        env.reset(seed=seed)
        winds.append(env.env.unwrapped.options["wind"])
    assert winds[0] == winds[3] and len(set(winds)) == 3


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("crash", "step 3 raised RuntimeError: the arm fell off"),
        ("reset", "reset raised RuntimeError: the arm is jammed"),
        ("nan", "the observation after step 3 holds NaN"),
        ("reward", "step 3 gave reward inf"),
    ],
)
def test_a_failing_environment_is_named(user_module: None, trouble: str, message: str) -> None:
    config = reality("Line", kwargs={"trouble": {str(episode_seed(5, 2)): trouble}})
    with pytest.raises(EpisodeError, match=f"episode 2: .*{message}"):
        episode(config, 2)
    assert len(episode(config, 1)) > 3


def test_a_failing_behaviour_is_not_an_episode_error(user_module: None) -> None:
    def broken(observation: Any, rng: np.random.Generator) -> Any:
        raise KeyError("no such joint")

    with pytest.raises(MesocosmError, match="'test' raised KeyError") as caught:
        episode(reality("Line"), act=broken)
    assert not isinstance(caught.value, EpisodeError)


def test_actions_and_observations_are_stored_as_chosen_and_seen(user_module: None) -> None:
    def meddle(observation: Any, rng: np.random.Generator) -> Any:
        action = np.full(1, 0.5 + observation[1] / 100, np.float32)
        observation[:] = 99  # a behaviour's own copy
        return action

    clips = episode(reality("Clips", horizon=6), act=meddle)  # the environment clips its argument
    assert np.ravel(clips.actions) == pytest.approx([0.5 + t / 100 for t in range(6)])
    assert [float(o[1]) for o in clips.observations] == list(range(7))


def test_the_kind_of_an_option_does_not_depend_on_the_draw() -> None:
    options = {"a": DrawnOption(choices=[1, 2.5]), "b": DrawnOption(choices=[1, 2])}
    config = reality("Windy", task=["a", "b"], task_options=options)
    drawn = [draw_options(config, np.random.default_rng(k)) for k in range(30)]
    assert {repr(d["a"]) for d in drawn} == {"1.0", "2.5"}
    assert {repr(d["b"]) for d in drawn} == {"1", "2"}


@pytest.mark.parametrize(
    ("text", "total", "info", "expected"),
    [
        ("return >= 475", 475, {}, True),
        ("return>475", 475, {}, False),
        ("return <= -1e2", -100, {}, True),
        (" return < 0.5 ", 0.5, {}, False),
        ("info.is_success", 0, {"is_success": np.True_}, True),
        ("info.is_success", 0, {"is_success": 0.0}, False),
        ("info.is_success", 0, {}, False),
    ],
)
def test_success(text: str, total: float, info: dict[str, Any], expected: bool) -> None:
    assert parse_success(text)(total, info) is expected


@pytest.mark.parametrize(
    "text",
    ["return == 3", "return >= lots", "return >= nan", "reward > 3", "info.a.b", "", "info['x']"],
)
def test_bad_success_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"reality\.success must be .* got "):
        check(RealityConfig(env="CartPole-v1", success=text))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("price.per_step=-1", "reality.price.per_step must .* got -1"),
        ("price.per_step=.inf", "reality.price.per_step must .* got inf"),
        ("price.per_reset=.nan", "reality.price.per_reset must .* got nan"),
        ("price.currency=''", "reality.price.currency"),
        ("budget.steps=-5", "reality.budget.steps must .* got -5"),
        ("horizon=0", "reality.horizon must .* got 0"),
        ("step_timeout_s=0", "reality.step_timeout_s must .* got 0"),
        ("task=[a,a]", r"reality.task must .* got \['a', 'a'\]"),
        ("task_options.a.low=0 task_options.a.high=1", "add 'a' to reality.task"),
        ("task=[a] task_options.a={}", "either choices or both low and high"),
        (
            "task=[a] task_options.a.choices=[1] task_options.a.low=0",
            "either choices or both low and high",
        ),
        ("task=[a] task_options.a.choices=[]", r"a\.choices must .* got \[\]"),
        (
            "task=[a] task_options.a.low=2 task_options.a.high=1",
            r"a\.low and high must .* got \(2.0, 1.0\)",
        ),
        ("task=[a] task_options.a.choices=[1,two]", r"a\.choices must be .* got \[1, .two.\]"),
        ("task=[a] task_options.a.choices=[true,2.5]", r"a\.choices must be .* got \[True, 2.5\]"),
    ],
)
def test_invalid_values_are_refused(overrides: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check(load(RealityConfig, [], ["env=CartPole-v1", *overrides.split()]))


def test_the_config_composes(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("task: [wind]\ntask_options: {wind: {low: 0, high: 1}}\nkwargs: {trouble: {}}")
    config = load(RealityConfig, [path], ["price.per_step=0.5", "task_options.wind.high=2"])
    assert config.task_options["wind"] == DrawnOption(low=0.0, high=2.0)
    assert config.price.per_step == 0.5
    with pytest.raises(UsageError, match="task_optoins"):
        load(RealityConfig, [path], ["task_optoins.wind.low=1"])
