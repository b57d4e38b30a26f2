"""The checker of chores: real episodes pass, and every kind of wrong step is caught."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import pytest

from mesocosm.envs.text.checks import EpisodeCheck, ImaginedStep, error_by_changes
from mesocosm.envs.text.chores_checker import check_episode
from mesocosm.envs.text.chores_policies import ChoresExpert

START = (
    "You are in the middle of a kitchen. Around you are a table, a fridge, a stove, a sink. You"
    " carry nothing. Your task is to put the clean red mug in the fridge."
)
EPISODE = [
    ("go to table", "You walk to the table. You are at the table. On the table you see a red mug,"
     " an old egg. You carry nothing.", 0.0, False),
    ("take red mug from table", "You take the red mug from the table. You are at the table. On the"
     " table you see an old egg. You carry a red mug.", 0.2, False),
    ("open fridge", "Nothing happens. You are at the table. On the table you see an old egg. You"
     " carry a red mug.", 0.0, False),
    ("go to sink", "You walk to the sink. You are at the sink. On the sink you see nothing. You"
     " carry a red mug.", 0.0, False),
    ("clean red mug with sink", "You clean the red mug with the sink. You are at the sink. On the"
     " sink you see nothing. You carry a red mug (clean).", 0.2, False),
    ("go to fridge", "You walk to the fridge. You are at the fridge. The fridge is closed. You"
     " carry a red mug (clean).", 0.0, False),
    ("open fridge", "You open the fridge. You are at the fridge. The fridge is open. In the fridge"
     " you see a green pen. You carry a red mug (clean).", 0.0, False),
    ("put red mug in fridge", "You put the red mug in the fridge. You have done your task. You are"
     " at the fridge. The fridge is open. In the fridge you see a green pen, a red mug. You carry"
     " nothing.", 0.6, True),
]  # fmt: skip


def checked(*changes: tuple[int, str, Any], start: str = START, **options: Any) -> EpisodeCheck:
    """The check of EPISODE, with the field of some steps (counted from 1) changed."""
    steps = [ImaginedStep(*step) for step in EPISODE]
    for t, name, value in changes:
        steps[t - 1] = replace(steps[t - 1], **{name: value})
    return check_episode(start, steps, **options)


def text(t: int, old: str, new: str) -> tuple[int, str, str]:
    """A change of a step's observation."""
    assert old in EPISODE[t - 1][1]
    return t, "observation", EPISODE[t - 1][1].replace(old, new)


@pytest.mark.parametrize("easy", [False, True])
@pytest.mark.parametrize("noise", [0.0, 0.3, 0.9])
def test_real_episodes_are_unbroken(easy: bool, noise: float) -> None:
    env: Any = gymnasium.make("mesocosm.envs.text:Chores-v0", easy=easy)
    expert = ChoresExpert()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        expert.start(seed, rng)
        first, _ = env.reset(seed=seed)
        observation, steps, revealed, ended = first, [], [], False
        while not ended:
            act = expert.random_action if rng.random() < noise else expert
            action = act(observation, rng)
            observation, reward, terminated, truncated, info = env.step(action)
            steps.append(ImaginedStep(action, observation, float(reward), terminated))
            revealed.append(info["revealed"])
            ended = terminated or truncated
        result = check_episode(first, steps, easy=easy)
        assert env.unwrapped.check_episode(first, steps) == result
        assert result.valid_start and result.first_break is None and result.unbroken(20)
        assert all(s.agrees and s.reward_agrees and s.termination_agrees for s in result.steps)
        assert [step.expected for step in result.steps] == [step.observation for step in steps]
        assert [step.revealed for step in result.steps] == revealed


def test_a_right_episode() -> None:
    result = checked()
    assert result.first_break is None and result.start_problems == ()
    assert [step.revealed for step in result.steps] == [True, False, False, True, *[False] * 2,
                                                        True, False]  # fmt: skip
    assert all(s.reward_agrees and s.termination_agrees for s in result.steps)
    assert result.steps[2].changed == ("event",)
    assert result.steps[4].changed == ("event", "state")
    assert result.steps[1].changed == ("event", "contents", "carried")


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        (text(2, "You take the red mug", "You take the red pen"), ("event",)),
        (text(2, "an old egg. You", "nothing. You"), ("contents",)),
        (text(2, "You carry a red mug.", "You carry nothing."), ("carried",)),
        (text(3, "Nothing happens.", "You open the fridge."), ("event",)),
        (
            text(3, "You are at the table. On the table", "You are at the sink. On the sink"),
            ("place",),
        ),
        (text(5, " (clean)", ""), ("state",)),
        (text(6, "The fridge is closed.", "The fridge is open."), ("lid",)),
        (text(4, "On the sink", "In the sink"), ("form",)),
        (text(8, " You have done your task.", ""), ("done",)),
        (text(8, "a green pen, a red mug", "a red mug, a green pen"), ("contents",)),
        ((2, "observation", "You"), ("carried", "contents", "event", "place")),
        # Contents that are shown for the first time:
        (text(4, "nothing. You", "an old egg. You"), ("contents",)),  # it is on the table
        (text(4, "nothing. You", "a red mug. You"), ("contents",)),  # it is carried
        (text(4, "nothing. You", "a blue egg. You"), ("contents",)),  # there is one egg
        (text(4, "nothing. You", "a red dragon. You"), ("contents",)),
        (text(4, "nothing. You", "a red pen, a red pen. You"), ("contents",)),
        (
            text(4, "nothing. You", "a red pen, a red cup, a red book, a red soap. You"),
            ("contents",),
        ),
        (text(7, "a green pen. You", "nothing. You"), ("contents",)),  # 3 objects at least
    ],
)
def test_a_wrong_text_is_caught(change: tuple[int, str, str], fields: tuple[str, ...]) -> None:
    result = checked(change)
    t = change[0]
    assert result.first_break == t and result.unbroken(t - 1) and not result.unbroken(t)
    assert result.steps[t - 1].differing == fields
    others = [step.agrees for k, step in enumerate(result.steps, 1) if k < t]
    assert all(others)


def test_other_first_contents_are_as_good() -> None:
    result = checked(
        text(4, "nothing. You", "a red pen, a black cup. You"), text(7, "a green pen", "nothing"),
        text(8, "a green pen, a", "a"),
    )  # fmt: skip
    assert [step.agrees for step in result.steps] == [
        True,
        True,
        True,
        True,
        False,
        True,
        True,
        True,
    ]
    assert result.steps[4].differing == ("contents",)  # it forgot what the sink holds


@pytest.mark.parametrize("other", ["a red dragon", "a blue mug", "a blue egg", "an old egg"])
def test_the_possible_objects_beside_an_impossible_one_stay(other: str) -> None:
    """The object of the task among them: the steps that use it are right."""
    result = checked(text(1, "a red mug, an old egg", f"a red mug, an old egg, {other}"))
    assert [step.agrees for step in result.steps] == [False, *[True] * 7]
    assert result.steps[0].differing == ("contents",)
    assert result.steps[0].expected == EPISODE[0][1]
    assert all(step.reward_agrees for step in result.steps)


def test_objects_that_lack_others_stay() -> None:
    """Two objects are too few, but the next step still holds them."""
    only = [text(t, "an old egg", "nothing") for t in (2, 3)]
    result = checked(text(1, "a red mug, an old egg", "a red mug"), *only)
    assert [step.agrees for step in result.steps] == [*[True] * 6, False, True]
    assert result.steps[6].expected == EPISODE[6][1]


def test_the_object_of_the_task_must_be_somewhere() -> None:
    start = START.replace("a stove, a sink", "a sink, a stove")
    steps = [ImaginedStep("go to sink", "You walk to the sink. You are at the sink. On the sink you"
                          " see nothing. You carry nothing.", 0.0, False),
             ImaginedStep("go to table", "You walk to the table. You are at the table. On the table"
                          " you see a blue pen. You carry nothing.", 0.0, False)]  # fmt: skip
    first, second = check_episode(start, steps).steps
    assert first.agrees and second.differing == ("contents",)
    walk = "You walk to the fridge. You are at the fridge. The fridge is closed. You carry nothing."
    solved = (
        "You open the fridge. You are at the fridge. The fridge is open. In the fridge you see a"
        " red mug. You carry nothing."
    )
    steps = [ImaginedStep("go to fridge", walk, 0.0, False)]
    steps.append(ImaginedStep("open fridge", solved, 0.0, False))
    assert [step.agrees for step in check_episode(start, steps).steps] == [True, False]


def test_a_heater_is_empty_and_reveals_nothing() -> None:
    at = "You walk to the stove. You are at the stove. On the stove you see {}. You carry nothing."
    for contents, agrees in (("nothing", True), ("a red cup", False)):
        steps = [ImaginedStep("go to stove", at.format(contents), 0.0, False)]
        (step,) = check_episode(START, steps).steps
        assert not step.revealed and step.agrees == agrees


WRONG = [(2, 0.0), (2, 0.6), (3, 0.2), (8, 0.8), (3, math.nan), (3, math.inf), (3, -math.inf)]
RIGHT = [(2, 0.23), (3, 0.04), (8, 0.6)]
REWARDED = [*((*r, False) for r in WRONG), *((*r, True) for r in RIGHT)]


@pytest.mark.parametrize(("t", "reward", "agrees"), REWARDED)
def test_rewards(t: int, reward: float, agrees: bool) -> None:
    result = checked((t, "reward", reward))
    assert [step.reward_agrees for step in result.steps].count(False) == (not agrees)
    assert result.steps[t - 1].reward_agrees == agrees and result.first_break is None


def test_terminations() -> None:
    early, missed = checked((5, "terminated", True)), checked((8, "terminated", False))
    assert [t for t, s in enumerate(early.steps, 1) if not s.termination_agrees] == [5]
    assert [t for t, s in enumerate(missed.steps, 1) if not s.termination_agrees] == [8]
    assert missed.steps[7].terminated
    beyond = [ImaginedStep(*step) for step in EPISODE]
    beyond[7] = replace(beyond[7], terminated=False)
    take = EPISODE[7][1].replace(" You have done your task.", "").replace(
        "You put the red mug in", "You take the red mug from").replace(", a red mug", "").replace(
        "You carry nothing", "You carry a red mug (clean)")  # fmt: skip
    beyond.append(ImaginedStep("take red mug from fridge", take, 0.2, False))
    last = check_episode(START, beyond).steps[8]
    assert last.agrees and not last.reward_agrees and last.terminated


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("a kitchen", "a garage", "the room is unknown"),
        ("a table", "a tree", "a place is unknown"),
        ("a table", "a sink", "a place is listed twice"),
        (", a stove, a sink", "", "there must be 4 to 6 places"),
        ("red mug", "red dragon", "the object of the task is unknown"),
        ("red mug", "mug", "the object of the task is unknown"),
        ("in the fridge", "in the safe", "the destination is not among the places"),
        ("in the fridge", "on the fridge", "the wording is not that of a first text"),
        ("in the fridge", "on the sink", "no place can treat the object"),
        ("a sink", "a desk", "no place can treat the object"),
        ("clean red", "cool red", "no place can treat the object"),
        ("You carry nothing. ", "", "a place is listed twice"),
    ],
)
def test_an_invalid_start(old: str, new: str, problem: str) -> None:
    assert old in START
    result = check_episode(START.replace(old, new), [])
    if problem == "a place is listed twice" and old.startswith("You"):
        assert not result.valid_start
    else:
        assert problem in result.start_problems
    assert result.first_break == 0 and not result.unbroken(0)


@pytest.mark.parametrize("start", ["", "nonsense", "Around you are . You carry", START[:60]])
def test_a_start_that_cannot_be_read(start: str) -> None:
    result = checked(start=start)
    assert not result.valid_start and len(result.steps) == len(EPISODE)


def test_the_easy_family_has_fewer_words() -> None:
    result = check_episode(START, [], easy=True)
    assert {"a place is unknown", "the object of the task is unknown"} <= set(result.start_problems)


def test_error_by_number_of_changed_fields() -> None:
    right, wrong = checked(), checked(text(3, "Nothing happens.", "You open the fridge."))
    table = error_by_changes([right, wrong])
    assert table[1] == (1, 2) and sum(total for _, total in table.values()) == 10
