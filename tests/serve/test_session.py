"""Messages without pickle, the client's copy of a context, and sessions that are lost, repeated
and restored.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mesocosm.errors import MesocosmError
from mesocosm.model import rng
from mesocosm.serve import session as session_module
from mesocosm.serve.protocol import Message, pack, unpack
from mesocosm.serve.session import Session, Sessions
from mesocosm.serve.world_env import WorldVectorEnv
from mesocosm.serve.worlds import Worlds

from .worlds import DICT, bits, local, played, untrained

families = pytest.mark.parametrize("family", ["ensemble", "sequence"])
modes = pytest.mark.parametrize("mode", ["NextStep", "SameStep"])


class PackedConnection:
    """A connection through bytes that records operations and runs a hook before each call."""

    def __init__(self, *replicas: Sessions):
        self.replicas, self.sessions = replicas, replicas[0]
        self.operations: list[str] = []
        self.before: Callable[[Message], Any] = lambda request: None

    def call(self, request: Message) -> Message:
        self.operations.append(request["op"])
        self.before(request)
        return self.send(request)

    def send(self, request: Message) -> Message:
        return unpack(pack(self.sessions.call(unpack(pack(request)))))

    def close(self, last: Message | None = None) -> None:
        self.sessions.close(last)


def client(
    world: Any, replicas: int = 1, **arguments: Any
) -> tuple[WorldVectorEnv, PackedConnection, Callable[[int], bytes]]:
    """A client, its connection, and a function for the bits of an undisturbed rollout."""
    env, plain = (WorldVectorEnv(3, world, horizon=9, **arguments) for _ in range(2))
    sessions = [Sessions(lambda _: ("in-memory", world), 8) for _ in range(replicas)]
    env._connection = connection = PackedConnection(*sessions)
    return env, connection, lambda steps: played(plain, steps)


def test_messages() -> None:
    message = {"op": "step", "clock": 3, "text": "ä", "none": None, "codec": {"a": [1.5, None]}}
    floats = np.arange(8, dtype=np.float32)
    arrays = {"f": floats[:6].reshape(2, 3), "i": np.array([-(2**62)]), "strided": floats[::2]}
    arrays |= {"b": np.array([True, False, True]), "empty": np.zeros((3, 0), np.float32)}
    arrays["scalar"] = np.asarray(7, np.int64)
    back = unpack(pack(message | arrays))
    assert {name: back[name] for name in message} == message
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype and back[name].flags.writeable
        np.testing.assert_array_equal(back[name], array)
    with pytest.raises(TypeError, match="'d' must be float32, int64 or bool, got float64"):
        pack({"d": np.zeros(2)})
    cut = pack(message | arrays)[:-20], pack(message)[:9]
    for damaged in (b"", b"GET / HTTP/1.1", *cut, b"MSC2\xff\xff\xff\xff"):
        with pytest.raises(ValueError, match="message"):
            unpack(damaged)


@families
@modes
def test_history(family: str, mode: str) -> None:
    """The client's context is the world's own at every clock, through resets and rebuilds."""
    env, connection, _ = client(untrained(DICT, family=family, terminal=0.2), autoreset_mode=mode)
    env.action_space.seed(0)
    env.reset(seed=0)
    for step in range(40):
        env.step(env.action_space.sample())
        assert env._episode is not None
        expected = connection.sessions._sessions[env._session].carry.context.to_numpy()
        member = rng.member_of(0, env._env, env._episode, 3)
        actual = env._history.context(member).to_numpy()
        assert actual.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(actual[name], array, err_msg=f"{name} at clock {step}")


@pytest.mark.integration
@families
@modes
def test_lost_session(family: str, mode: str) -> None:
    """A lost session changes no bit, at any step (the window of 6 is rebuilt before 6, 9, ...)."""
    world = untrained(DICT, family=family, terminal=0.1)
    env, connection, undisturbed = client(world, autoreset_mode=mode)
    expected = undisturbed(20)
    assert played(env, 20) == expected, "through bytes"
    for lost in (0, 1, 5, 6, 7, 12, 19):

        def drop_session(request: Message, lost: int = lost) -> None:
            if request["op"] == "step" and request["clock"] == lost:
                connection.sessions._sessions.clear()
                connection.before = lambda request: None

        connection.before, connection.operations = drop_session, []
        assert played(env, 20) == expected, f"lost before step {lost}"
        counts = [connection.operations.count(op) for op in ("restore", "step")]
        assert counts == [1, 21]


def move(connection: PackedConnection, request: Message) -> None:
    """Send the call to one of two replicas, which refuse and restore stale sessions.

    "restore" and the step after it may part ways too: the client asks until a replica has both.
    """
    calls = len(connection.operations)
    connection.sessions = connection.replicas[int(rng.keys(0, calls, 0, 0)) & 1]


def repeat(connection: PackedConnection, request: Message) -> None:
    """Send the request twice: it is stepped once, and the second gets the stored reply."""
    connection.send(request)


def act_otherwise(connection: PackedConnection, request: Message) -> None:
    """Send another action first, as a client that was interrupted: the new one gets its reply."""
    again = connection.operations[-2:-1] == ["restore"]
    if request["op"] == "step" and request["clock"] in (2, 7, 13) and not again:
        connection.send(request | {"action.categories": 1 - request["action.categories"]})


@modes
@pytest.mark.parametrize(
    ("disturb", "restores"), [(move, range(6, 99)), (repeat, [0]), (act_otherwise, [3])]
)
def test_disturbed_requests(disturb: Any, restores: Any, mode: str) -> None:
    """No bit changes."""
    world = untrained(DICT, family="sequence", terminal=0.1)
    env, connection, undisturbed = client(world, 2, autoreset_mode=mode)
    connection.before = partial(disturb, connection)
    assert played(env, 30) == undisturbed(30)
    assert connection.operations.count("restore") in restores


def test_failed_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that raises leaves no half-changed session."""
    world = untrained(DICT, family="sequence")
    env, connection, undisturbed = client(world)
    expected, draw = undisturbed(12), world.net.draw

    def fail(*arguments: Any) -> Any:
        monkeypatch.setattr(world.net, "draw", draw)
        raise MesocosmError("the device went away")

    def fail_first(step: int) -> None:
        if step == 8:
            monkeypatch.setattr(world.net, "draw", fail)
            with pytest.raises(MesocosmError, match="the device went away"):
                env.step(np.zeros(3, np.int64))

    assert played(env, 12, before=fail_first) == expected
    assert connection.operations.count("restore") == 1


def test_eviction() -> None:
    """The least recently used session is evicted, and its client continues with the same bits."""
    world = untrained(DICT, family="sequence", terminal=0.1)
    sessions = Sessions(lambda _: ("in-memory", world), 2)
    envs = [WorldVectorEnv(3, world, horizon=9, first_env=3 * i) for i in range(3)]
    expected = [played(env, 12) for env in envs]
    connections = [PackedConnection(sessions) for _ in envs]
    for env, connection in zip(envs, connections, strict=True):
        env._connection = connection
        env.action_space.seed(0)
    results = [[env.reset(seed=3)] for env in envs]
    for _ in range(12):
        for env, trajectory in zip(envs, results, strict=True):
            trajectory.append(env.step(env.action_space.sample()))
            assert len(sessions._sessions) <= 2
    assert [bits(trajectory) for trajectory in results] == expected
    assert all(connection.operations.count("restore") == 12 for connection in connections)
    envs[0].close()
    left = [name for name in sessions._sessions if name.startswith(envs[0]._routed)]
    assert not left, "a closed client's session must be gone"


def test_sessions_do_not_pile_up() -> None:
    env, connection, _ = client(untrained())
    for _ in range(5):
        env.reset()
    assert len(connection.sessions._sessions) == 1


def test_worlds(store: Any, root: str) -> None:
    """Versions load on request, and the least recently used is evicted."""
    for i in range(3):
        store(f"world{i}", untrained(seed=i))
    worlds = Worlds(root, default="world0", keep=2)
    assert worlds.get("")[0] == "world0"
    first = worlds.get("world0")[1]
    assert worlds.get("world1")[0] == "world1" and worlds.get("worlds/world0")[1] is first
    worlds.get("world2")
    assert list(worlds._loaded) == ["world0", "world2"]
    assert worlds.get("world0")[1] is first
    reply = Sessions(worlds.get).call({"op": "describe", "world": "world9"})
    assert reply["kind"] == "usage" and "no artifact worlds/world9" in reply["error"]
    assert "op must be one of" in Sessions(worlds.get).call({"op": "sing"})["error"]


def test_a_cold_world(store: Any, root: str, tmp_path: Path) -> None:
    """While a world loads from slow storage (one of its files is a pipe), others step."""
    store("warm", untrained())
    cold = tmp_path / "cold"
    untrained(seed=1).save(cold)
    codec = (cold / "codec.json").read_text()
    (cold / "codec.json").unlink()
    os.mkfifo(cold / "codec.json")
    sessions = Sessions(Worlds(root, default="warm").get)
    env = local("warm", root)
    env._connection = sessions
    env.reset(seed=0)
    replies: list[Message] = []

    def describe() -> None:
        replies.append(sessions.call({"op": "describe", "world": str(cold)}))

    waiting = [threading.Thread(target=describe, daemon=True) for _ in range(2)]
    for thread in waiting:
        thread.start()
    pipe = os.open(cold / "codec.json", os.O_WRONLY)  # waits until the world is being loaded
    env.reset(seed=0)
    for _ in range(20):
        env.step(env.action_space.sample())
    assert not replies
    os.write(pipe, codec.encode())
    os.close(pipe)
    for thread in waiting:
        thread.join(60)
    assert [reply["world"] for reply in replies] == [str(cold)] * 2, "it was read once"


def test_starts_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start has the same bits in any order of episodes, and after blocks are evicted."""
    world, everywhere = untrained(DICT, task=("room",)), np.ones(3, bool)
    once = Session(world, 2, 5, 3)
    count = 3 * once.block_size
    expected = [once.starts({}, np.full(3, episode), everywhere) for episode in range(count)]
    monkeypatch.setattr(session_module, "BLOCKS", 1)
    again, chance = Session(world, 2, 5, 3), np.random.default_rng(0)
    for _ in range(60):
        episode, mask = chance.integers(count, size=3), chance.random(3) < 0.6
        for part, starts in enumerate(again.starts({}, episode, mask)):
            for i in range(3):
                drawn = expected[episode[i]][part]
                assert (starts.numbers[i] == drawn.numbers[i] * int(mask[i])).all()
                assert (starts.categories[i] == drawn.categories[i] * int(mask[i])).all()
        assert len(again._blocks) <= 1
    places = np.concatenate([observation.numbers.numpy() for _, observation in expected])
    assert len(np.unique(places[:, 0])) > 0.99 * len(places)
