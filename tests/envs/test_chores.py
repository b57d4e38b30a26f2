"""Chores: its rules, its texts, and what acts in it."""

from __future__ import annotations

import random
from typing import Any

import gymnasium
import numpy as np
import pytest

from mesocosm.envs.config import RealityConfig
from mesocosm.envs.make import facts_of, make_env
from mesocosm.envs.text import chores_policies
from mesocosm.envs.text.chores_policies import ChoresExpert
from mesocosm.envs.text.company_policies import CompanyExpert
from mesocosm.envs.text.household import EASY, FULL, HEATERS, REWARDS, Household, draw
from mesocosm.envs.text.household_text import candidates, parse_start, parse_view
from mesocosm.errors import UsageError
from mesocosm.evaluate.config import reality_of
from mesocosm.policies.behaviours import BehaviourConfig, build
from mesocosm.store.artifacts import Storage

IDS = ("Chores-v0", "ChoresEasy-v0")


def make(id: str) -> Any:
    return gymnasium.make(f"mesocosm.envs.text:{id}")


def play(env: Any, act: Any, seed: int) -> list[tuple[Any, ...]]:
    """(observation, reward, terminated, truncated, info) of each step, after the reset's texts."""
    rng = np.random.default_rng(seed)
    act.start(seed, rng)
    observation, info = env.reset(seed=seed)
    steps: list[tuple[Any, ...]] = [(observation, 0.0, False, False, info)]
    while not (steps[-1][2] or steps[-1][3]):
        steps.append(env.step(act(steps[-1][0], rng)))
    return steps


def house(**changes: Any) -> Household:
    values: dict[str, Any] = {
        "room": "kitchen",
        "places": ["table", "fridge", "sink"],
        "kind": "clean",
        "goal": "red mug",
        "destination": "fridge",
        "contents": {"table": ["red mug", "old egg"], "fridge": [], "sink": []},
    }
    return Household(**{**values, **changes})


@pytest.mark.parametrize("id", IDS)
def test_an_episode_is_a_function_of_its_seed_and_commands(id: str) -> None:
    first, again = (play(make(id), ChoresExpert(), seed=3) for _ in range(2))
    assert first == again
    assert first != play(make(id), ChoresExpert(), seed=4)
    texts = {make(id).reset(seed=seed)[0] for seed in range(200)}
    assert len(texts) > 150


@pytest.mark.parametrize("id", IDS)
def test_the_expert_solves_every_task_within_the_horizon(id: str) -> None:
    env, expert = make(id), ChoresExpert()
    for seed in range(300):
        steps = play(env, expert, seed)
        observation, _, terminated, _, info = steps[-1]
        assert terminated and info["success"], steps[0][0]
        assert sum(step[1] for step in steps) == 1.0
        assert all(step[1] in REWARDS for step in steps)
        assert all(step[4]["valid"] for step in steps[1:])
        assert observation.endswith("You carry nothing.")


@pytest.mark.parametrize("id", IDS)
def test_texts_and_commands_are_in_the_spaces(id: str) -> None:
    env = make(id)
    noisy = build(BehaviourConfig("noisy", noise=0.6, function=EXPERT), *SPACES, Storage("unused"))
    for seed in range(60):
        for observation, *_, info in play(env, noisy, seed):
            assert observation in env.observation_space and len(observation) <= 240
            assert all(command in env.action_space for command in info["admissible_commands"])


@pytest.mark.integration
@pytest.mark.parametrize("variant", [FULL, EASY])
def test_candidates_are_exactly_the_possible_commands(variant: Any) -> None:
    """Each candidate is possible, and no other command made of the variant's words is."""
    rng = random.Random(0)
    for _ in range(25):
        home = draw(rng, variant)
        names = [name for contents in home.contents.values() for name in contents]
        every = {f"{verb} {place}" for verb in ("go to", "open", "close") for place in home.places}
        every |= {
            f"{verb} {name} {word} {place}"
            for name in names
            for place in home.places
            for verb, word in (
                ("take", "from"), ("put", "in"), ("put", "on"), ("clean", "with"),
                ("heat", "with"), ("cool", "with"),
            )
        }  # fmt: skip
        first = text = home.first_text()
        for _ in range(12):
            commands = candidates(first, text)
            possible = {command for command in sorted(every) if _copy(home).apply(command).valid}
            assert set(commands) == possible and len(set(commands)) == len(commands)
            text = home.apply(rng.choice(commands)).text


def test_commands_may_have_other_case_and_spaces() -> None:
    assert house().apply("  Go  TO the ").valid is False
    assert house().apply(" GO  to Fridge ").text.startswith("You walk to the fridge.")


def test_the_rules() -> None:
    home = house()
    assert home.apply("take red mug from table").text.startswith("Nothing happens. You are in the")
    outcome = home.apply("go to table")
    assert outcome.revealed and outcome.reward == 0
    assert outcome.text == (
        "You walk to the table. You are at the table. On the table you see a red mug, an old egg."
        " You carry nothing."
    )
    assert not home.apply("go to table").valid
    assert not home.apply("open table").valid
    assert home.apply("take red mug from table").reward == 0.2
    assert not home.apply("take old egg from table").valid  # hands are full
    assert home.apply("put red mug on table").reward == 0
    assert home.apply("take red mug from table").reward == 0  # rewarded once
    closed = home.apply("go to fridge")
    assert not closed.revealed and "The fridge is closed." in closed.text
    assert not home.apply("put red mug in fridge").valid
    assert home.apply("open fridge").revealed
    early = home.apply("put red mug in fridge")  # not cleaned yet
    assert early.reward == 0 and not early.terminated
    home.apply("take red mug from fridge")
    assert home.apply("cool red mug with fridge").reward == 0
    assert not home.apply("clean red mug with fridge").valid
    home.apply("go to sink")
    cleaned = home.apply("clean red mug with sink")
    assert cleaned.reward == 0.2 and "You carry a red mug (clean)." in cleaned.text
    assert home.apply("clean red mug with sink").reward == 0
    home.apply("go to fridge")
    assert home.apply("close fridge").valid and not home.apply("close fridge").valid
    home.apply("open fridge")
    end = home.apply("put red mug in fridge")
    assert end.terminated and end.reward == 0.6
    assert end.text == (
        "You put the red mug in the fridge. You have done your task. You are at the fridge. The"
        " fridge is open. In the fridge you see a red mug. You carry nothing."
    )


def test_a_later_treatment_replaces_an_earlier_one() -> None:
    home = house(places=["table", "sink", "fridge"], contents={"table": ["red mug"], "sink": [],
                 "fridge": []}, destination="table")  # fmt: skip
    for command in ("go to table", "take red mug from table", "go to sink",
                    "clean red mug with sink", "go to fridge", "cool red mug with fridge",
                    "go to table"):  # fmt: skip
        assert home.apply(command).valid, command
    assert not home.apply("put red mug on table").terminated


@pytest.mark.parametrize("variant", [FULL, EASY])
def test_tasks_can_be_solved_and_are_not_solved_at_the_start(variant: Any) -> None:
    rng = random.Random(1)
    for _ in range(500):
        home = draw(rng, variant)
        assert home.goal not in home.contents[home.destination]
        assert not any(home.contents[place] for place in home.places if place in HEATERS)
        nouns = [name.split()[-1] for contents in home.contents.values() for name in contents]
        assert len(set(nouns)) == len(nouns)
        assert variant.n_places[0] <= len(home.places) <= variant.n_places[1]
        fields = parse_start(home.first_text())
        assert (fields.room, list(fields.places)) == (home.room, home.places)
        assert (fields.kind, fields.goal) == (home.kind, home.goal)
        assert fields.destination == home.destination


@pytest.mark.parametrize(
    "text", ["", "You", "Around you are . You carry an a.", "((a  b)) . .", "."]
)
def test_texts_that_break_the_grammar_are_read(text: str) -> None:
    parse_start(text), parse_view(text), candidates(text, text)
    expert, rng = ChoresExpert(), np.random.default_rng(0)
    assert isinstance(expert(text, rng), str) and isinstance(expert.random_action(text, rng), str)


def test_policies_have_different_returns() -> None:
    env = make("ChoresEasy-v0")
    names = ("ChoresExpert", "NoSearch", "Untreated", "AnyObject", "FirstCommand")
    returns = [
        np.mean([
            sum(step[1] for step in play(env, getattr(chores_policies, name)(), seed))
            for seed in range(60)
        ])
        for name in names
    ]  # fmt: skip
    assert returns == sorted(returns, reverse=True) and returns[0] == 1 and returns[-1] == 0
    wrong = [play(env, chores_policies.WrongPlace(), seed)[-1] for seed in range(30)]
    assert not any(info["success"] for *_, info in wrong)


EXPERT = "mesocosm.envs.text.chores_policies:ChoresExpert"
SPACES = facts_of(RealityConfig(env="mesocosm.envs.text:Chores-v0")).spaces


@pytest.mark.parametrize(
    ("id", "kind"), [("Chores-v0", ChoresExpert), ("Company-v0", CompanyExpert)]
)
def test_a_first_text_begins_an_episode(id: str, kind: Any) -> None:
    """An expert that no one starts forgets the episode before."""
    env, expert, rng = make(id), kind(), np.random.default_rng(0)
    for seed in range(40):
        text, _ = env.reset(seed=seed)
        ended = False
        while not ended:
            text, _, terminated, truncated, info = env.step(expert(text, rng))
            ended = terminated or truncated
        assert info["success"]


def test_reality_knows_it_and_its_horizon() -> None:
    env = make_env(RealityConfig(env="mesocosm.envs.text:ChoresEasy-v0"))
    assert env.spec is not None and env.spec.max_episode_steps == 20
    *_, truncated, _ = play(env, chores_policies.WrongPlace(), 0)[20]
    assert truncated


@pytest.mark.parametrize("id", [*IDS, "Company-v0"])
def test_a_vector_of_them(id: str) -> None:
    """Info is stacked, and the candidates of a text are the environment's own."""
    config = RealityConfig(env=f"mesocosm.envs.text:{id}")
    envs = gymnasium.vector.SyncVectorEnv([lambda: make_env(config)] * 2)
    texts, infos = envs.reset(seed=[1, 2])
    listed = infos["admissible_commands"]
    candidates_of = envs.envs[0].unwrapped.candidates  # type: ignore[attr-defined]
    assert [candidates_of(text, text) for text in texts] == list(listed)
    texts, rewards, *_, infos = envs.step(tuple(commands[0] for commands in listed))
    assert len(texts) == 2 and rewards.shape == (2,) and all(infos["valid"])


def test_a_world_may_name_it() -> None:
    """It needs no confirmation, as programs of others do."""
    known = {"id": "mesocosm.envs.text:Chores-v0", "kwargs": {"easy": True}, "task": [],
             "max_episode_steps": 20, "success": None}  # fmt: skip
    assert reality_of(RealityConfig(), known).kwargs == {"easy": True}
    known["id"] = "mesocosm.envs.text.adapters:TextWorldGames"
    with pytest.raises(UsageError, match="is a program"):
        reality_of(RealityConfig(), known)


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
def test_noise_draws_sensible_commands(noise: float) -> None:
    """Kind noisy draws from the candidates, and some commands fail."""
    behaviour = BehaviourConfig("noisy", noise=noise, function=EXPERT)
    noisy = build(behaviour, *SPACES, Storage("unused"))
    env = make("Chores-v0")
    steps = [step for seed in range(60) for step in play(env, noisy, seed)[1:]]
    failed = np.mean([not step[4]["valid"] for step in steps])
    assert abs(failed - 0.09 * noise) < 0.03
    solved = sum(step[4]["success"] for step in steps) / 60
    assert solved == 1 if noise == 0 else solved < 0.95
    again = [step for seed in range(60) for step in play(env, noisy, seed)[1:]]
    assert steps == again


def _copy(home: Household) -> Household:
    from copy import deepcopy

    return deepcopy(home)
