"""The company's shell: its tasks, its verifier, its texts, and the expert."""

from __future__ import annotations

import itertools
import random
from typing import Any

import gymnasium
import numpy as np
import pytest

from mesocosm.envs.config import RealityConfig
from mesocosm.envs.make import facts_of, make_env
from mesocosm.envs.text.company import draw_company
from mesocosm.envs.text.company_policies import CompanyExpert
from mesocosm.envs.text.company_shell import PRICES
from mesocosm.envs.text.company_tasks import (
    KINDS,
    Task,
    answer_fact,
    changes,
    draw_task,
    facts,
    parse_assignment,
)
from mesocosm.envs.text.company_text import LONGEST_COMMAND, candidates, parse_view
from mesocosm.errors import UsageError
from mesocosm.policies.behaviours import BehaviourConfig, build
from mesocosm.store.artifacts import Storage

ID = "mesocosm.envs.text:Company-v0"
EXPERT = "mesocosm.envs.text.company_policies:CompanyExpert"


def make(*kinds: str) -> Any:
    return gymnasium.make(ID, **({"kinds": kinds} if kinds else {}))


def play(env: Any, act: Any, seed: int) -> list[tuple[Any, ...]]:
    """(command, observation, reward, terminated, truncated, info) of the reset and each step."""
    rng = np.random.default_rng(seed)
    act.start(seed, rng)
    observation, info = env.reset(seed=seed)
    steps: list[tuple[Any, ...]] = [("", observation, 0.0, False, False, info)]
    while not (steps[-1][3] or steps[-1][4]):
        command = act(steps[-1][1], rng)
        steps.append((command, *env.step(command)))
    return steps


def task_of(kind: str, seed: int = 0) -> Task:
    rng = random.Random(seed)
    return draw_task(draw_company(rng), rng, kind)


def run(env: Any, *commands: str) -> list[tuple[Any, ...]]:
    return [env.step(command) for command in commands]


@pytest.mark.integration
@pytest.mark.parametrize("kind", KINDS)
def test_the_expert_solves_every_task(kind: str) -> None:
    env, expert = make(kind), CompanyExpert()
    for seed in range(60):
        steps = play(env, expert, seed)
        info = steps[-1][5]
        assert steps[-1][3] and info["success"], steps[0][1]
        total = sum(step[2] for step in steps)
        assert total == pytest.approx(1 - sum(step[5]["price"] for step in steps[1:]))
        assert total > 0.6 and len(steps) <= 21
        for before, step in itertools.pairwise(steps):
            assert step[0] in before[5]["admissible_commands"] and step[5]["valid"]


def test_an_episode_is_a_function_of_its_seed_and_commands() -> None:
    first, again = (play(make(), CompanyExpert(), seed=3) for _ in range(2))
    assert first == again and first != play(make(), CompanyExpert(), seed=4)
    firsts = [make().reset(seed=seed)[0] for seed in range(80)]
    assert len(set(firsts)) > 70
    kinds = {parse_assignment(text).kind for text in firsts}  # type: ignore[union-attr]
    assert kinds == set(KINDS)


def test_texts_and_commands_are_in_the_spaces() -> None:
    """Also with long, odd and foreign commands. Texts have 60 to 300 words, signs and digits."""
    env, expert, rng = make(), CompanyExpert(), np.random.default_rng(0)
    odd = ("", "\n\t", "sql", "sql SELECT '\U0001f600'", "echo é > /é.txt", "cat /é.txt", "ls",
           "x" * 5000, f"mkdir /{'q' * 90}", f"sql CREATE TABLE t{'b' * 29} ({'c' * 200} TEXT)",
           f"echo {'z' * 250} > /z.txt", "cat /z.txt", "cd " + "../" * 90)  # fmt: skip
    for seed in range(10):
        expert.start(seed, rng)
        text, info = env.reset(seed=seed)
        for k in range(25):
            assert text in env.observation_space
            assert all(command in env.action_space for command in info["admissible_commands"])
            command = odd[k // 2] if k % 2 else expert.random_action(text, rng)
            text, *_, info = env.step("ls" if command.startswith("submit") else command)
    assert env.action_space.max_length == LONGEST_COMMAND


def test_candidates_come_from_texts_alone_and_rarely_fail() -> None:
    env, expert, rng = make(), CompanyExpert(), np.random.default_rng(1)
    failed, total = 0, 0
    for seed in range(40):
        expert.start(seed, rng)
        first, info = env.reset(seed=seed)
        text = first
        for _ in range(8):
            commands = candidates(first, text)
            assert commands == info["admissible_commands"] and commands[-1] == "submit done"
            assert len(set(commands)) == len(commands)
            command = str(rng.choice(commands[:-1]))
            text, _, terminated, _, info = env.step(command)
            failed, total = failed + (not info["valid"]), total + 1
            if terminated:
                break
    assert total > 200 and failed / total < 0.05
    assert candidates("", "") == candidates("nonsense", "$ ls") == ["cd /", "submit done"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_verifier_accepts_one_end(kind: str) -> None:
    for seed in range(25):
        task = task_of(kind, seed)
        done = facts(task.expected, task.answer)
        assert task.score(done) == 1
        assert task.score(facts(task.company)) == 0
        assert changes(facts(task.company), done).total() >= 1
        damaged = done.copy()
        damaged["file", "/else.txt", ""] += 1
        assert task.score(damaged) == 0
        first = next(iter(task.expected.files))
        damaged = done.copy()
        damaged.subtract([("file", first, task.expected.files[first])])
        assert task.score(+damaged) == 0
        if task.answer:
            assert task.score(facts(task.expected, "1")) == 0
        assert parse_assignment(f"a\nTask: {task.assignment.statement}\nb") == task.assignment


def test_an_unfinished_task_has_a_part_of_the_score() -> None:
    env = make("migrate")
    steps = play(env, CompanyExpert(), 0)
    table, path = (parse_assignment(steps[0][1]).gaps[gap] for gap in ("table", "path"))
    insert, rows = steps[2][0], steps[2][1].count("), (") + 1
    assert insert.startswith(f"sql INSERT INTO {table}")
    env.reset(seed=0)
    *_, (_, reward, terminated, _, info) = run(env, f"cat {path}", insert, "submit done")
    assert terminated and reward == pytest.approx(rows / (rows + 1), abs=1e-4)
    assert not info["success"]
    env.reset(seed=0)
    assert run(env, f"rm {path}", "submit done")[-1][1] == pytest.approx(1 / (rows + 1), abs=1e-4)


@pytest.mark.parametrize(
    "damage",
    ["rm /reports/march.txt", "sql DELETE FROM orders WHERE id = 100", "mkdir /new", "echo a > /b",
     "sql DROP TABLE products", "sql CREATE TABLE q (x TEXT)", "sql UPDATE products SET stock = -1",
     "mv /reports/march.txt /inbox", "cp /reports/march.txt /inbox"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["find", "fix"])
def test_damage_cannot_be_undone(kind: str, damage: str) -> None:
    env, expert, rng = make(kind), CompanyExpert(), np.random.default_rng(0)
    expert.start(0, rng)
    env.reset(seed=1)
    info = env.step(damage)[4]
    assert info["valid"] and info["kind"] == "write"
    for command in ("sql ROLLBACK", "undo"):
        assert not env.step(command)[4]["valid"]
    text = env.reset(seed=1)[0]
    env.step(damage)
    while True:
        text, reward, terminated, _, info = env.step(expert(text, rng))
        if terminated:
            break
    assert reward == 0 and not info["success"]


def test_prices() -> None:
    env = make("report")
    env.reset(seed=0)
    commands = {
        "ls": "look", "cd /staff": "look", "find /": "look", "grep a /reports/march.txt": "read",
        "wc /reports/march.txt": "read", "sql SELECT * FROM orders": "query", "help": "error",
        "cat /missing": "error", "sql SELECT": "error", "echo a > /a.txt": "write",
        'sql "DELETE FROM orders"': "write", "sql UPDATE orders SET id = 1 RETURNING id": "write",
        "submit": "submit",
    }  # fmt: skip
    commands["sql UPDATE products SET stock = 0 RETURNING id"] = "write"
    submit = commands.pop("submit")
    spent = 0.0
    for command, kind in commands.items():
        if kind == "write" and "UPDATE orders" in command:
            kind = "query"  # no row is left: nothing was written
        text, reward, terminated, _, info = env.step(command)
        spent += PRICES[kind]
        assert (info["kind"], info["price"], reward) == (kind, PRICES[kind], -PRICES[kind]), command
        assert text.endswith(f"Spent: {spent:.2f}") and not terminated
        assert info["valid"] == (kind != "error")
    _, reward, terminated, _, info = env.step("submit")
    assert (reward, terminated, info["kind"], info["price"]) == (0, True, submit, 0)


def test_a_text_has_the_command_the_output_and_the_state() -> None:
    env = make("find")
    first, _ = env.reset(seed=0)
    (text, *_), (again, *_) = run(env, "cd   /logs", "sql SELECT COUNT(*) FROM orders")
    view = parse_view(text)
    assert (view.command, view.output, view.folder) == ("cd /logs", "", "/logs")
    assert all(name.endswith(".log") for name in view.names) and len(view.names) >= 4
    assert view.tables == ("customers", "products", "orders")
    assert view.files == tuple(f"/logs/{name}" for name in view.names)
    view = parse_view(again)
    assert view.output.startswith("COUNT(*)\n") and view.folder == "/logs"
    assert parse_view(first).names == ("config/", "inbox/", "logs/", "reports/", "staff/")
    long = run(env, "sql SELECT * FROM orders, customers")[0][0]
    assert "more lines" in long and len(long) < 900


def test_answers() -> None:
    env = make("find")
    answer = next(step[0] for step in play(env, CompanyExpert(), 0) if step[0].startswith("submit"))
    for command, score in ((f"  {answer}  ", 1), ("submit", 0), ("submit 1", 0), (f"{answer}0", 0)):
        env.reset(seed=0)
        assert env.step(command)[1] == score
    assert answer_fact("") == {}


def test_noise_gives_failing_commands_and_damage() -> None:
    spaces = facts_of(RealityConfig(env=ID)).spaces
    noisy = build(BehaviourConfig("noisy", noise=0.4, function=EXPERT), *spaces, Storage("unused"))
    env = make()
    episodes = [play(env, noisy, seed) for seed in range(40)]
    assert 0.4 < np.mean([steps[-1][5]["success"] for steps in episodes]) < 0.9
    failed = np.mean([not step[5]["valid"] for steps in episodes for step in steps[1:]])
    assert 0.02 < failed < 0.2
    assert episodes[:9] == [play(env, noisy, seed) for seed in range(9)]


def test_kinds() -> None:
    env = make("fix", "clean")
    kinds = {parse_assignment(env.reset(seed=seed)[0]).kind for seed in range(20)}  # type: ignore[union-attr]
    assert kinds == {"fix", "clean"}
    for kinds_given in (["fix", "fly"], []):
        with pytest.raises(UsageError, match="kinds must be some of"):
            make_env(RealityConfig(env=ID, kwargs={"kinds": kinds_given}))
    spec = make_env(RealityConfig(env=ID)).spec
    assert spec is not None and spec.max_episode_steps == 30


@pytest.mark.parametrize("text", ["", "$", "$ \n", "Folder", "Folder /: \nTables: ((", "Task: ."])
def test_texts_that_break_the_format_are_read(text: str) -> None:
    expert, rng = CompanyExpert(), np.random.default_rng(0)
    parse_view(text), parse_assignment(text), candidates(text, text)
    assert expert(text, rng) == "submit done" and isinstance(expert.random_action(text, rng), str)
