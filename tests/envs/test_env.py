"""Environments from config alone, and one episode as a function of (config, seed, k)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mesocosm.config import load
from mesocosm.envs.config import (
    BudgetConfig,
    DrawnOption,
    PriceConfig,
    RealityConfig,
    check,
    parse_success,
)
from mesocosm.envs.episode import EpisodeError, episode_seed, run_episode
from mesocosm.envs.guard import GuardedEnv
from mesocosm.envs.make import draw_options, environment_version, facts_of, make_env, task_keys
from mesocosm.errors import MesocosmError, UsageError


def still(observation: Any, rng: np.random.Generator) -> Any:
    return np.zeros(1, np.float32)


def drift(observation: Any, rng: np.random.Generator) -> Any:
    return rng.uniform(-1, 1, 1).astype(np.float32)


def episode(
    config: RealityConfig, k: int = 0, act: Any = drift, max_steps: int | None = 25, seed: int = 5
):
    env = make_env(config)
    try:
        return run_episode(
            env, act, k=k, seed=seed, behaviour="test", max_steps=max_steps, config=config
        )
    finally:
        env.close()


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
def test_an_environment_that_does_not_exist(own: Path, id: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_env(RealityConfig(env=id))


def test_wrong_kwargs_are_named() -> None:
    with pytest.raises(UsageError, match=r"reality.kwargs=\{'gravityy': 1\}.*gravityy"):
        make_env(RealityConfig(env="Pendulum-v1", kwargs={"gravityy": 1}))


@pytest.mark.parametrize(
    ("id", "limit"), [("ownenvs:OwnLine-v0", 30), ("ownenvs:Line", None), ("ownenvs:make_line", 7)]
)
def test_an_environment_of_a_user_module(own: Path, id: str, limit: int | None) -> None:
    got = episode(RealityConfig(env=id, kwargs={"stretch": 0.0}), act=still, max_steps=40)
    assert len(got) == (limit or 40)
    assert got.outcome == ("unfinished" if limit is None else "truncated")
    assert episode(RealityConfig(env=id, horizon=5), act=still, max_steps=40).outcome == "truncated"
    assert environment_version(make_env(RealityConfig(env=id))).startswith("ownenvs ")


def test_an_episode_is_a_function_of_config_seed_and_k(own: Path) -> None:
    config = RealityConfig(env="ownenvs:Line")
    env = make_env(config)
    for k in (3, 0, 7):  # an environment that has run others before
        got = run_episode(env, drift, k=k, seed=5, behaviour="test", max_steps=25, config=config)
        alone = episode(config, k)
        assert np.array_equal(got.observations, alone.observations) and np.array_equal(
            got.actions, alone.actions
        )
        assert got.seed == episode_seed(5, k) and np.array_equal(got.rewards, alone.rewards)
    seeds = {episode_seed(s, k) for s in (-1, 0, 1, 2**40) for k in range(1000)}
    assert len(seeds) > 3990 and all(0 <= s < 2**31 for s in seeds)


def test_outcomes_are_distinguished_and_buffers_copied(own: Path) -> None:
    config = RealityConfig(env="ownenvs:OwnLine-v0")
    right = episode(config, act=lambda o, rng: np.ones(1, np.float32), max_steps=None)
    assert (
        right.outcome == "terminated" and right.terminated[-1] and not right.terminated[:-1].any()
    )
    assert len(right.observations) == len(right) + 1 == len(right.actions) + 1
    assert [float(o[1]) for o in right.observations] == list(range(len(right) + 1))
    assert right.rewards.dtype == np.float64 and right.durations is None and right.success is None
    assert episode(config, act=still, max_steps=None).outcome == "truncated"
    cut = episode(config, act=still, max_steps=4)
    assert cut.outcome == "unfinished" and len(cut) == 4 and not cut.terminated.any()


def test_dict_observations_durations_and_success(own: Path) -> None:
    config = RealityConfig(env="ownenvs:Reach", task=["goal"], success="info.reached", horizon=60)
    observation_space, _ = facts_of(config).spaces
    assert task_keys(config, observation_space) == ["goal"]
    got = [episode(config, k, max_steps=None) for k in range(8)]
    assert {e.outcome for e in got} >= {"terminated"} and {e.success for e in got} == {True, False}
    for e in got:
        assert (
            set(e.observations[0]) == {"state", "goal"}
            and len({float(o["goal"][0]) for o in e.observations}) == 1
        )
        assert e.durations is not None and np.array_equal(
            e.durations, 0.25 * np.arange(1, len(e) + 1)
        )
    with pytest.raises(UsageError, match=r"reality.task names 'gaol'.*did you mean 'goal'"):
        make_env(RealityConfig(env="ownenvs:Reach", task=["gaol"]))


def test_reset_options_are_drawn_by_seed_and_episode(own: Path) -> None:
    options = {
        "wind": DrawnOption(low=-0.1, high=0.1),
        "side": DrawnOption(choices=["east", "west"]),
    }
    config = RealityConfig(env="ownenvs:Windy", task=["wind", "side"], task_options=options)
    got = [episode(config, k) for k in range(12)]
    assert [e.task for e in got] == [episode(config, k).task for k in range(12)]
    assert len({e.task["wind"] for e in got}) == 12 and {e.task["side"] for e in got} == {
        "east",
        "west",
    }
    assert all(-0.1 <= e.task["wind"] < 0.1 for e in got)
    assert [e.task for e in got] != [episode(config, k, seed=6).task for k in range(12)]
    step = np.diff([o[0] for o in episode(config, 0, act=still, max_steps=3).observations])
    assert np.allclose(
        step, got[0].task["wind"] * (1 if got[0].task["side"] == "east" else -1), atol=1e-6
    )
    sampler = GuardedEnv(config)
    winds = []
    for seed in (1, None, None, 1):
        sampler.reset(seed=seed)
        winds.append(sampler.env.unwrapped.options["wind"])
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
def test_a_failing_environment_is_named(own: Path, trouble: str, message: str) -> None:
    config = RealityConfig(
        env="ownenvs:Line", kwargs={"trouble": {str(episode_seed(5, 2)): trouble}}
    )
    with pytest.raises(EpisodeError, match=f"episode 2: .*{message}"):
        episode(config, 2)
    assert len(episode(config, 1)) > 3


def test_a_failing_behaviour_is_not_an_episode_error(own: Path) -> None:
    def broken(observation: Any, rng: np.random.Generator) -> Any:
        raise KeyError("no such joint")

    with pytest.raises(
        MesocosmError, match="behaviour 'test' raised KeyError in episode 0"
    ) as caught:
        episode(RealityConfig(env="ownenvs:Line"), act=broken)
    assert not isinstance(caught.value, EpisodeError)


def test_actions_and_observations_are_stored_as_chosen_and_seen(own: Path) -> None:
    def meddle(observation: Any, rng: np.random.Generator) -> Any:
        action = np.full(1, 0.5 + observation[1] / 100, np.float32)
        observation[:] = 99  # a behaviour's own copy
        return action

    got = episode(RealityConfig(env="ownenvs:Clips", horizon=6), act=meddle)
    assert [float(a[0]) for a in got.actions] == pytest.approx([0.5 + t / 100 for t in range(6)]), (
        "as chosen, not as the environment clipped it"
    )
    assert [float(o[1]) for o in got.observations] == list(range(7))


def test_the_kind_of_an_option_does_not_depend_on_the_draw(own: Path) -> None:
    config = RealityConfig(
        env="ownenvs:Windy",
        task=["a", "b"],
        task_options={"a": DrawnOption(choices=[1, 2.5]), "b": DrawnOption(choices=[1, 2])},
    )
    drawn = [draw_options(config, np.random.default_rng(k)) for k in range(30)]
    assert {repr(d["a"]) for d in drawn} == {"1.0", "2.5"} and {repr(d["b"]) for d in drawn} == {
        "1",
        "2",
    }


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
    ("change", "message"),
    [
        ({"price": PriceConfig(per_step=-1)}, "reality.price.per_step must .* got -1"),
        ({"price": PriceConfig(per_reset=float("nan"))}, "reality.price.per_reset must .* got nan"),
        ({"price": PriceConfig(currency="")}, "reality.price.currency"),
        ({"budget": BudgetConfig(steps=-5)}, "reality.budget.steps must .* got -5"),
        ({"horizon": 0}, "reality.horizon must .* got 0"),
        ({"step_timeout_s": 0.0}, "reality.step_timeout_s must .* got 0"),
        ({"task": ["a", "a"]}, "reality.task must .* got \\['a', 'a'\\]"),
        ({"task_options": {"a": DrawnOption(low=0, high=1)}}, "add 'a' to reality.task"),
        (
            {"task": ["a"], "task_options": {"a": DrawnOption()}},
            "either choices or both low and high",
        ),
        (
            {"task": ["a"], "task_options": {"a": DrawnOption(choices=[1], low=0)}},
            "either choices or both low and high",
        ),
        (
            {"task": ["a"], "task_options": {"a": DrawnOption(choices=[])}},
            r"a\.choices must .* got \[\]",
        ),
        (
            {"task": ["a"], "task_options": {"a": DrawnOption(low=2, high=1)}},
            r"a\.low and high must .* got \(2, 1\)",
        ),
        (
            {"task": ["a"], "task_options": {"a": DrawnOption(choices=[1, "two"])}},
            r"a\.choices must be .* got \[(1, .two.|True, 2.5)\]",
        ),
        (
            {"task": ["a"], "task_options": {"a": DrawnOption(choices=[True, 2.5])}},
            r"a\.choices must be .* got \[(1, .two.|True, 2.5)\]",
        ),
    ],
)
def test_invalid_values_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check(RealityConfig(**{"env": "CartPole-v1", **change}))


def test_the_config_composes(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "env: ownenvs:Windy\ntask: [wind]\ntask_options: {wind: {low: 0, high: 1}}\nkwargs:"
        " {trouble: {}}\n"
    )
    config = load(RealityConfig, [path], ["price.per_step=0.5", "task_options.wind.high=2"])
    assert (
        config.task_options["wind"] == DrawnOption(low=0.0, high=2.0)
        and config.price.per_step == 0.5
    )
    with pytest.raises(UsageError, match="task_optoins"):
        load(RealityConfig, [path], ["task_optoins.wind.low=1"])
