"""A served text world: texts travel as strings, sessions step together, any replica continues."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

pytest.importorskip("tokenizers")


from mesocosm.errors import UsageError
from mesocosm.model.language.session import Texts
from mesocosm.model.language.world import TextWorld
from mesocosm.serve import session as session_module
from mesocosm.serve import text_memory
from mesocosm.serve.protocol import pack, unpack
from mesocosm.serve.session import Sessions
from mesocosm.serve.text_batching import MOST, TextEngine
from mesocosm.serve.text_memory import cache_bytes
from mesocosm.serve.world_env import WorldVectorEnv

from .text_worlds import TEXT, WORDS, text_world


class Wire:
    """Sessions behind packed messages, which can be lost like those of a replica that dies."""

    def __init__(self, world: TextWorld):
        self.world = world
        self.lose()

    def lose(self) -> None:
        self.sessions = Sessions(lambda _: ("w", self.world))

    def call(self, request: Any) -> Any:
        return unpack(pack(self.sessions.call(unpack(pack(request)))))

    def close(self, last: Any = None) -> None:
        self.sessions.close(last)


def play(env: WorldVectorEnv, steps: int, seed: int = 3, first: int = 0) -> list[Any]:
    """The transcript of a fixed sequence of actions, from step `first` on."""
    lines: list[Any] = []
    if first == 0:
        lines.append(env.reset(seed=seed)[0])
    for step in range(first, first + steps):
        actions = tuple(WORDS[(step + row) % 5] for row in range(env.num_envs))
        observation, reward, terminated, truncated, infos = env.step(actions)
        figures = reward.tolist(), terminated.tolist(), truncated.tolist()
        lines.append((observation, *figures, infos["disagreement"].tolist()))
    return lines


@pytest.mark.integration
@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
@pytest.mark.parametrize("members", [1, 2])
def test_a_lost_session_continues_with_the_same_bits(mode: str, members: int) -> None:
    """Beyond the window of 128 tokens, with episodes that end after six steps."""
    wire = Wire(text_world(members=members))
    env = WorldVectorEnv(3, wire.world, horizon=6, autoreset_mode=mode)
    env._connection = wire
    whole = play(env, 20)
    lines = play(env, 9)
    wire.lose()
    lines += play(env, 11, first=9)
    assert lines == whole
    assert len({str(line) for line in whole}) > 15
    texts = [text for line in whole[1:] for text in line[0]]
    assert all(isinstance(text, str) for text in texts)


@pytest.mark.integration
def test_many_sessions_step_together_and_each_alone_gives_the_same() -> None:
    world = text_world()
    sessions = Sessions(lambda _: ("w", world))
    alone = [play(WorldVectorEnv(1, world, first_env=k), 5) for k in range(8)]
    together: list[Any] = [None] * 8
    (engine,) = [sessions._engines.setdefault(world, TextEngine(world))]
    running = threading.Barrier(8)

    def client(k: int) -> None:
        env = WorldVectorEnv(1, world, first_env=k)
        env._connection = sessions
        running.wait()
        together[k] = play(env, 5)

    threads = [threading.Thread(target=client, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    assert engine.steps == 40 and engine.batches < 40


def test_all_that_wait_step_in_one_batch() -> None:
    """Of `MOST` environments at most: of 72 sessions of 4, 64 step first and 8 after them."""
    world = text_world()
    engine, sessions = TextEngine(world), 72
    start, rows = Texts(["look"] * 4), torch.zeros(4, dtype=torch.int64)
    carries = [world.begin(start, start, rows) for _ in range(sessions)]
    steps: list[Any] = []

    def step(carry: Any) -> None:
        steps.append(engine.step(carry, ["look"] * 4, rows, disagreement=False))

    threads = [threading.Thread(target=step, args=(carry,)) for carry in carries]

    def begin() -> None:
        for thread in threads:
            thread.start()
        while len(engine._waiting) < sessions:
            time.sleep(0.01)

    engine.alone(begin)
    for thread in threads:
        thread.join()
    assert len(steps) == sessions and engine.steps == 4 * sessions
    assert engine.batches == -(-4 * sessions // MOST) == 2


@pytest.mark.integration
def test_a_world_that_no_session_uses_is_freed() -> None:
    worlds = [text_world()]
    sessions, freed = Sessions(lambda _: ("w", worlds[0])), weakref.ref(worlds[0])
    env = WorldVectorEnv(1, worlds[0])
    env._connection = sessions
    env.reset(seed=0)
    sessions.close({"op": "end", "session": env._session})
    worlds[0], env = text_world(), WorldVectorEnv(1, text_world())
    gc.collect()
    assert freed() is None and not sessions._engines


def test_an_action_too_long_costs_no_session() -> None:
    env = WorldVectorEnv(2, text_world())
    env.reset(seed=0)
    before = env.state()
    with pytest.raises(UsageError, match="an action must have at most"):
        env.step(("look", "go to table " * 100))
    first = env.step(("look", "look"))
    env.restore(before)
    again = env.step(("look", "look"))
    assert first[0] == again[0] and first[1].tolist() == again[1].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action.texts": ["look"]}, "action.texts must be a list of 2 texts"),
        ({"action.texts": ["look", 3]}, "action.texts must be a list of 2 texts"),
        ({"action.texts": ["look", "\ud800"]}, "lone surrogate"),
        ({"start.texts": ["a", "b"]}, "start_task.texts must be a list of 2 texts"),
        ({"mode": "x"}, "mode must be one of NextStep, SameStep"),
    ],
)
def test_wrong_requests_change_nothing(change: dict[str, Any], message: str) -> None:
    sessions = Sessions(lambda _: ("w", world))
    world = text_world()
    begin = {"op": "begin", "session": "s", "replaces": "", "world": "", "seed": 0, "first_env": 0}
    assert "error" not in sessions.call(begin | {"episode": np.zeros(2, np.int64)})
    step: dict[str, Any] = {"op": "step", "session": "s", "clock": 0, "mode": "NextStep"}
    step |= {"episode": np.zeros(2, np.int64), "step": np.zeros(2, np.int64)}
    step |= {"cut": np.zeros(2, np.bool_), "disagreement": True, "max_disagreement": np.inf}
    step["action.texts"] = ["look", "take mug"]
    reply = sessions.call(step | change)
    assert message in reply["error"] and reply["kind"] == "usage"
    assert "observation.texts" in sessions.call(step)


def test_a_wrong_context_is_refused() -> None:
    world = text_world()
    sessions = Sessions(lambda _: ("w", world))
    request: dict[str, Any] = {"op": "restore", "session": "s", "world": "", "seed": 0}
    request |= {"first_env": 0, "context.member": np.zeros(1, np.int64)}
    request |= {"context.clock": np.asarray(0), "context.task.texts": [""]}
    request |= {"context.start.texts": ["you see"], "context.steps": [[["look"]]]}
    assert "lists of [action, observation]" in sessions.call(request)["error"]
    request["context.steps"] = [[["look", "you see a pen."]]]
    assert sessions.call(request) == {"clock": 0}


def test_logged_starts_and_a_single_environment() -> None:
    starts = Texts([""]), Texts(["you see a mug."])
    env = gymnasium.make("mesocosm/World-v0", world=text_world(), starts=starts, horizon=3)
    observation, _ = env.reset(seed=1)
    assert observation == "you see a mug."
    text, reward, _, _, info = env.step("take mug")
    assert isinstance(text, str) and np.isfinite(reward) and info["disagreement"] >= 0


def test_a_text_that_is_no_observation_ends_the_episode() -> None:
    space = spaces.Dict({"say": TEXT, "count": spaces.Discrete(3)})
    starts = Texts([""]), Texts(['you see a mug.\n{"count": 1}'])
    env = WorldVectorEnv(2, text_world(space), starts=starts)
    observation, _ = env.reset(seed=0)
    assert observation["count"].tolist() == [1, 1] and observation["say"][0] == "you see a mug."
    after, _, terminated, truncated, infos = env.step(("look", "look"))
    assert truncated.all() and not terminated.any() and infos["diverged"].all()
    assert after["say"] == observation["say"], "the last observation that could be read"


@pytest.mark.integration
@pytest.mark.parametrize("how", ["end", "replaced", "evicted", "restored"])
def test_a_session_that_ends_during_its_own_step_stays_ended(how: str) -> None:
    world = text_world()
    sessions = Sessions(lambda _: ("w", world), max_sessions=1)
    env = WorldVectorEnv(1, world)
    env._connection = sessions
    env.reset(seed=0)
    name, engine = env._session, sessions._engines[world]
    freed = weakref.ref(sessions._sessions[name])
    computed, ended, replies = threading.Event(), threading.Event(), list[Any]()
    step = engine.step

    def slow(*arguments: Any, **options: Any) -> Any:
        result = step(*arguments, **options)
        computed.set()
        assert ended.wait(60)
        return result

    engine.step = slow  # type: ignore[method-assign]
    thread = threading.Thread(target=lambda: replies.append(env.step(("look",))))
    thread.start()
    assert computed.wait(60)
    request: dict[str, Any] = {"op": "end", "session": name, "world": "", "seed": 0, "first_env": 0}
    if how == "replaced":
        request |= {"op": "begin", "session": "new", "replaces": name}
        request |= {"start_task.texts": [""], "start.texts": ["you see"]}
        request["episode"] = np.zeros(1, np.int64)
    elif how != "end":
        request |= {"op": "restore", "session": name if how == "restored" else "another"}
        request |= {"context.clock": np.asarray(5), "context.task.texts": [""]}
        request |= {"context.start.texts": ["you see"], "context.steps": [[]]}
        request["context.member"] = np.zeros(1, np.int64)
    assert "error" not in sessions.call(request)
    ended.set()
    thread.join()
    assert len(replies) == 1, "its step is answered"
    left = {"end": [], "replaced": ["new"], "evicted": ["another"], "restored": [name]}[how]
    assert list(sessions._sessions) == left
    gc.collect()
    assert freed() is None, "its memory is free"
    assert how != "restored" or sessions._sessions[name].clock == 5


def test_a_session_whose_step_fails_is_dropped_and_restored() -> None:
    world = text_world()
    sessions = Sessions(lambda _: ("w", world))
    env = WorldVectorEnv(1, world)
    env._connection = sessions
    env.reset(seed=0)
    engine, step = sessions._engines[world], sessions._engines[world].step

    def fails(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("out of memory")

    engine.step = fails  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        env.step(("look",))
    assert not sessions._sessions
    engine.step = step  # type: ignore[method-assign]
    assert len(env.step(("look",))[0]) == 1


def test_key_caches_that_do_not_fit_in_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before they are allocated; sessions that fit alone and not together take turns."""
    world, members = text_world(), text_world(members=2)
    assert 2 * cache_bytes(world) == cache_bytes(members)
    shape = world.net.model.shape
    size = 2 * 4 * shape.layers * shape.key_heads * shape.head * 128
    assert cache_bytes(world) == size
    env = WorldVectorEnv(1, world)
    env.reset(seed=0)
    (session,) = env._connection._sessions.values()  # type: ignore[union-attr]
    assert session.memory == size
    for module in (text_memory, session_module):
        monkeypatch.setattr(module, "cache_limit", lambda device: 4 * size + 1)
    for refused, most in ((world, 4), (members, 2)):
        sessions = Sessions(lambda _, world=refused: ("w", world))  # type: ignore[misc]
        env = WorldVectorEnv(most + 1, refused)
        env._connection = sessions
        with pytest.raises(UsageError, match=rf"num_envs must be <= {most} in world w, got"):
            env.reset(seed=0)
        assert not sessions._sessions
        clients = [WorldVectorEnv(most - 1, refused) for _ in range(2)]
        for client in clients:
            client._connection = sessions
            client.reset(seed=0)
        alone = WorldVectorEnv(most - 1, refused)
        alone.reset(seed=0)
        for _ in range(2):
            expected = alone.step(("look",) * (most - 1))[0]
            for client in clients:
                assert client.step(("look",) * (most - 1))[0] == expected
                assert len(sessions._sessions) == 1 or most == 2


def test_temperature_zero_repeats_and_inference_leaves_no_gradient() -> None:
    world = text_world()
    world.temperature = 0.0
    one, two = (play(WorldVectorEnv(2, world), 4, seed=seed)[1:] for seed in (1, 1))
    assert one == two and not any(p.requires_grad for p in world.net.parameters())
    assert torch.is_grad_enabled()
