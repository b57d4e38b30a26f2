"""Messages without pickle, the client's copy of a context, and sessions that are lost, repeated
and restored.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from mesocosm.errors import MesocosmError
from mesocosm.model import rng
from mesocosm.serve.client import WorldVectorEnv
from mesocosm.serve.connection import InProcess
from mesocosm.serve.protocol import Message, pack, unpack
from mesocosm.serve.session import Sessions, StartBlocks, Worlds

DICT = spaces.Dict(
    {"place": spaces.Box(-np.inf, np.inf, (2,), np.float64), "room": spaces.Discrete(4)}
)


class PackedConnection(InProcess):
    """A connection through bytes that records operations and runs a hook before each call."""

    def __init__(self, *sessions: Sessions):
        self.replicas = list(sessions)
        self.operations: list[str] = []
        self.before: Any = lambda request: None
        super().__init__(sessions[0])

    def call(self, request: Message) -> Message:
        self.operations.append(request["op"])
        self.before(request)
        return unpack(pack(self.sessions.handle(unpack(pack(request)))))


def client(
    world: Any, *, sessions: int = 1, max_sessions: int = 8, **arguments: Any
) -> tuple[WorldVectorEnv, PackedConnection]:
    env = WorldVectorEnv(3, world, horizon=9, **arguments)
    connection = PackedConnection(
        *(Sessions(lambda _: ("in-memory", world), max_sessions) for _ in range(sessions))
    )
    env._connection = connection
    return env, connection


def bits(results: list[Any]) -> bytes:
    """All bytes of a rollout."""
    arrays: list[bytes] = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            for name in sorted(value):
                walk(value[name])
        elif isinstance(value, tuple | list) or (
            isinstance(value, np.ndarray) and value.dtype == object
        ):
            for item in value:
                walk(item)
        else:
            arrays.append(np.asarray(value).tobytes() if value is not None else b"-")

    walk(results)
    return b"|".join(arrays)


def rollout(env: WorldVectorEnv, steps: int, seed: int = 3) -> bytes:
    env.action_space.seed(0)
    return bits(
        [env.reset(seed=seed)] + [env.step(env.action_space.sample()) for _ in range(steps)]
    )


def test_messages() -> None:
    message = {"op": "step", "clock": 3, "text": "ä", "none": None, "codec": {"a": [1.5, None]}}
    arrays = {
        "f": np.arange(6, dtype=np.float32).reshape(2, 3),
        "i": np.array([-(2**62)]),
        "b": np.array([True, False, True]),
        "empty": np.zeros((3, 0), np.float32),
    }
    arrays |= {"scalar": np.asarray(7, np.int64), "strided": np.arange(8, dtype=np.float32)[::2]}
    back = unpack(pack(message | arrays))
    assert {name: back[name] for name in message} == message
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype and back[name].flags.writeable
        np.testing.assert_array_equal(back[name], array)
    with pytest.raises(TypeError, match="'d' must be float32, int64 or bool, got dtype float64"):
        pack({"d": np.zeros(2)})
    for damaged in (
        b"",
        b"GET / HTTP/1.1",
        pack(message | arrays)[:-20],
        b"MSC1\xff\xff\xff\xff",
        pack(message)[:9],
    ):
        with pytest.raises(ValueError, match="message"):
            unpack(damaged)


@pytest.mark.parametrize("family", ["ensemble", "sequence"])
@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_history(make_world: Any, family: str, mode: str) -> None:
    """The client's context is the world's own at every clock, through resets and rebuilds."""
    env, connection = client(make_world(DICT, family=family, terminal=0.2), autoreset_mode=mode)
    env.action_space.seed(0)
    env.reset(seed=0)
    for _ in range(40):
        env.step(env.action_space.sample())
        carry = connection.sessions._sessions[env._session].carry
        actual = env._history.context(rng.member_of(0, env._env, env._episode, 3)).to_numpy()
        expected = carry.context.to_numpy()
        assert actual.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(
                actual[name], array, err_msg=f"{name} at clock {env._history.clock}"
            )


@pytest.mark.parametrize("family", ["ensemble", "sequence"])
@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_lost_session(make_world: Any, family: str, mode: str) -> None:
    """A lost session changes no bit, at any step (the window of 6 is rebuilt before 6, 9, ...)."""
    world = make_world(DICT, family=family, terminal=0.1)
    expected = rollout(WorldVectorEnv(3, world, horizon=9, autoreset_mode=mode), 20)
    env, connection = client(world, autoreset_mode=mode)
    assert rollout(env, 20) == expected, "through bytes"

    for lost in (0, 1, 5, 6, 7, 12, 19):

        def drop_session(request: Message, lost: int = lost) -> None:
            if request["op"] == "step" and request["clock"] == lost:
                connection.sessions._sessions.clear()
                connection.before = lambda request: None

        connection.before, connection.operations = drop_session, []
        assert rollout(env, 20) == expected, f"lost before step {lost}"
        assert (
            connection.operations.count("restore") == 1
            and connection.operations.count("step") == 21
        )


def test_moved_session(make_world: Any) -> None:
    """Each call goes to a random one of two replicas, which refuse and restore stale sessions."""
    world = make_world(DICT, family="sequence", terminal=0.1)
    env, connection = client(world, sessions=2)
    chance = np.random.default_rng(0)

    def move(request: Message) -> None:
        connection.sessions = connection.replicas[int(chance.integers(2))]

    connection.before = move
    expected = rollout(WorldVectorEnv(3, world, horizon=9), 30)
    # "restore" and the step after it may part ways too: the client asks again until a replica has
    # both.
    assert rollout(env, 30) == expected
    assert connection.operations.count("restore") > 5


def test_repeated_request(make_world: Any) -> None:
    """A request sent twice is stepped once: the second gets the stored reply."""
    world = make_world(DICT, family="sequence")
    env, connection = client(world)
    expected = rollout(WorldVectorEnv(3, world, horizon=9), 15)
    connection.before = lambda request: connection.sessions.handle(unpack(pack(request)))
    assert rollout(env, 15) == expected
    assert "restore" not in connection.operations


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_another_request_at_the_same_clock(make_world: Any, mode: str) -> None:
    """A client that replaces an interrupted action gets the new action's reply."""
    world = make_world(DICT, family="sequence", terminal=0.1)
    expected = rollout(WorldVectorEnv(3, world, horizon=9, autoreset_mode=mode), 20)
    env, connection = client(world, autoreset_mode=mode)
    clocks = [2, 7, 13]

    def give_up(request: Message) -> None:
        if request["op"] == "step" and request["clock"] in clocks:
            clocks.remove(request["clock"])
            connection.sessions.handle(
                unpack(pack(request | {"action.categories": 1 - request["action.categories"]}))
            )

    connection.before = give_up
    assert rollout(env, 20) == expected
    assert connection.operations.count("restore") == 3


def test_failed_step(make_world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that raises leaves no half-changed session."""
    world = make_world(DICT, family="sequence")
    env, connection = client(world)
    expected = rollout(WorldVectorEnv(3, world, horizon=9), 12)
    draw = world.net.draw

    def fail(*arguments: Any) -> Any:
        monkeypatch.setattr(world.net, "draw", draw)
        raise MesocosmError("the device went away")

    env.action_space.seed(0)
    results = [env.reset(seed=3)]
    for step in range(12):
        action = env.action_space.sample()
        if step == 8:
            monkeypatch.setattr(world.net, "draw", fail)
            with pytest.raises(MesocosmError, match="the device went away"):
                env.step(action)
        results.append(env.step(action))
    assert bits(results) == expected
    assert connection.operations.count("restore") == 1


def test_eviction(make_world: Any) -> None:
    """The least recently used session is evicted, and its client continues with the same bits."""
    world = make_world(DICT, family="sequence", terminal=0.1)
    sessions = Sessions(lambda _: ("in-memory", world), 2)
    envs = [WorldVectorEnv(3, world, horizon=9, first_env=3 * i) for i in range(3)]
    expected = [rollout(env, 12) for env in envs]
    for env in envs:
        env._connection = PackedConnection(sessions)
        env.action_space.seed(0)
    results = [[env.reset(seed=3)] for env in envs]
    for _ in range(12):
        for env, trajectory in zip(envs, results, strict=True):
            trajectory.append(env.step(env.action_space.sample()))
            assert len(sessions._sessions) <= 2
    assert [bits(trajectory) for trajectory in results] == expected
    assert all(env._connection.operations.count("restore") == 12 for env in envs)
    envs[0].close()
    assert not any(name.startswith(envs[0]._routed) for name in sessions._sessions), (
        "a closed client's session must be gone"
    )


def test_sessions_do_not_pile_up(make_world: Any) -> None:
    env, connection = client(make_world())
    for _ in range(5):
        env.reset()
    assert len(connection.sessions._sessions) == 1


def test_worlds(make_world: Any, store: Any, root: str) -> None:
    """Versions load on request, and the least recently used is evicted."""
    for i in range(3):
        store(f"world{i}", make_world(seed=i))
    worlds = Worlds(root, default="world0", keep=2)
    assert worlds.get("")[0] == "world0"
    first = worlds.get("world0")[1]
    assert worlds.get("world1")[0] == "world1" and worlds.get("worlds/world0")[1] is first
    worlds.get("world2")
    assert list(worlds._loaded) == ["world0", "world2"]
    assert worlds.get("world0")[1] is first
    reply = Sessions(worlds.get).handle({"op": "describe", "world": "world9"})
    assert reply["kind"] == "usage" and "no artifact worlds/world9" in reply["error"]
    assert "op must be one of" in Sessions(worlds.get).handle({"op": "sing"})["error"]


def test_a_cold_world(make_world: Any, store: Any, root: str, tmp_path: Path) -> None:
    """While a world loads from slow storage (one of its files is a pipe), others step."""
    store("warm", make_world())
    cold = tmp_path / "cold"
    make_world(seed=1).save(cold)
    codec = (cold / "codec.json").read_text()
    (cold / "codec.json").unlink()
    os.mkfifo(cold / "codec.json")
    sessions = Sessions(Worlds(root, default="warm").get)
    env = WorldVectorEnv(3, "warm", root=root, backend="local")
    env._connection = InProcess(sessions)
    env.reset(seed=0)
    replies: list[Message] = []

    def describe() -> None:
        replies.append(sessions.handle({"op": "describe", "world": str(cold)}))

    waiting = [threading.Thread(target=describe, daemon=True) for _ in range(2)]
    for each in waiting:
        each.start()
    pipe = os.open(cold / "codec.json", os.O_WRONLY)  # waits until the world is being loaded
    env.reset(seed=0)
    for _ in range(20):
        env.step(env.action_space.sample())
    assert not replies
    os.write(pipe, codec.encode())
    os.close(pipe)
    for each in waiting:
        each.join(60)
    assert [reply["world"] for reply in replies] == [str(cold)] * 2, "it was read once"


def test_starts_in_blocks(make_world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start has the same bits in any order of episodes, and after blocks are evicted."""
    world = make_world(DICT, task=("room",))
    env, all_of_them = np.arange(5, 8), np.ones(3, bool)
    once = StartBlocks(world, 2, env)
    count = 3 * once.episodes
    expected = [once.of(np.full(3, episode), all_of_them) for episode in range(count)]
    monkeypatch.setattr(StartBlocks, "KEEP", 1)
    again = StartBlocks(world, 2, env)
    chance = np.random.default_rng(0)
    for _ in range(60):
        episode, mask = chance.integers(count, size=3), chance.random(3) < 0.6
        for got, position in zip(again.of(episode, mask), (0, 1), strict=True):
            for i in range(3):
                want = expected[episode[i]][position]
                assert (got.numbers[i] == (want.numbers[i] if mask[i] else 0)).all() and (
                    got.categories[i] == (want.categories[i] if mask[i] else 0)
                ).all()
        assert len(again._blocks) <= 1
    places = np.concatenate([observation.numbers.numpy() for _, observation in expected])
    assert len(np.unique(places[:, 0])) > 0.99 * len(places)
