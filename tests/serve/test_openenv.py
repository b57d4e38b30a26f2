"""OpenEnv's protocol at the HTTP ingress, on a real Ray Serve."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
from factories import wait_until
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from mesocosm.envs import remote
from mesocosm.envs.config import RealityConfig
from mesocosm.envs.make import make_env
from mesocosm.errors import UsageError
from mesocosm.serve import http_connection, openenv
from mesocosm.serve.deployment import LISTENERS
from mesocosm.serve.http_sessions import HttpSessions, to_json
from mesocosm.serve.tasks import COUNT, MAX_LISTED

from .openenv_client import Socket, own_client
from .worlds import local

pytestmark = pytest.mark.usefixtures("ray_local")
ACTIONS = [
    json.dumps({"push": [k / 20, -k / 20], "turn": k % 3 - 1, "hands": [k % 2, k % 3], "say": "a"})
    for k in range(14)
]


def sessions() -> HttpSessions:
    served = LISTENERS["web"].sessions
    assert served is not None
    return served


@pytest.fixture(autouse=True)
def no_session_is_left(client: Any) -> None:
    """Every test frees its places."""
    yield
    wait_until(lambda: not sessions().sessions._slots)


@pytest.fixture
def socket(client: Any) -> Any:
    with Socket(client) as opened:
        yield opened


def episode(socket: Socket, **reset: Any) -> list[Any]:
    """The replies to a reset and to ACTIONS, until the episode's end."""
    replies = [socket.reset(**reset)]
    for action in ACTIONS:
        if replies[-1]["done"]:
            break
        replies.append(socket.step(action))
    return replies


def test_episode(socket: Socket, rich: str) -> None:
    """An episode has the bits of `WorldVectorEnv`; its step says how sure the world is."""
    env = local("rich", rich, 1)
    for seed in range(4, 7):
        expected = [env.reset(seed=seed)[0]]
        replies = episode(socket, seed=seed, episode_id="e", prompt="ignored")
        for action, reply in zip(ACTIONS, replies[1:], strict=False):
            batch = sessions()._actions.decode(
                *sessions()._actions.encode_list([json.loads(action)])
            )
            observation, reward, terminated, _, infos = env.step(batch)
            expected.append(observation)
            assert (reply["reward"], reply["done"]) == (float(reward[0]), bool(terminated[0]))
            disagreement = reply["observation"]["metadata"]["disagreement"]
            assert disagreement == json.loads(to_json(infos["disagreement"][0]))
        texts = [to_json(sessions()._observations.unbatch(each)[0]).decode() for each in expected]
        assert [reply["observation"]["text"] for reply in replies] == texts
        state = {"episode_id": "e", "step_count": len(replies) - 1, "seed": seed}
        assert socket.state() == state | {"split": None, "index": None}
        assert replies[0]["reward"] is None and replies[0]["observation"]["task"] == {}


def test_equal_sessions(client: Any) -> None:
    """Equal resets and actions give equal worlds; without a seed each session has another one,
    which its state names.
    """
    with Socket(client) as one, Socket(client) as two:
        assert episode(one, seed=8) == episode(two, seed=8)
        task = {"split": "generated", "index": 8}
        assert episode(two, **task) == episode(one, seed=8)
        first, second = episode(one), episode(two)
        seeds = [each.state()["seed"] for each in (one, two)]
        assert first != second and len(set(seeds)) == 2
        assert episode(two, seed=seeds[0]) == first


def test_descriptions(client: Any) -> None:
    assert requests.get(client.url + "/health", timeout=300).json() == {"status": "healthy"}
    schema = client("GET", "/schema").json()
    action = schema["action"]
    assert (action["title"], action["required"]) == ("TextAction", ["text"])
    assert action["properties"]["text"]["type"] == "string"
    assert '"turn"' in action["properties"]["text"]["description"]
    assert set(schema) == {"action", "observation", "state"}
    parts = {"text", "task", "commands", "metadata", "reward", "done"}
    assert set(schema["observation"]["properties"]) == parts
    metadata = client("GET", "/metadata").json()
    assert metadata["name"] == "rich" and "Test-v0" in metadata["description"]


def test_task_routes(client: Any) -> None:
    def post(route: str, **body: Any) -> Any:
        return client.post(f"/world/{route}", body).json()

    assert client("GET", "/list_environments").json() == ["world"]
    assert client("GET", "/world/splits").json() == [{"name": "generated", "type": "train"}]
    assert post("num_tasks", split="generated") == {"num_tasks": COUNT}
    tasks = post("tasks", split="generated")
    assert tasks["env_name"] == "world" and len(tasks["tasks"]) == MAX_LISTED
    assert post("task", split="generated", index=5) == {"task": tasks["tasks"][5]}
    assert post("task_range", split="generated", start=5, stop=7) == {"tasks": tasks["tasks"][5:7]}
    message = "split must be one of generated, got 'logged', whose data"
    assert post("num_tasks", split="logged")["detail"].startswith(message)
    detail = post("task", split="generated", index=-1)["detail"]
    assert detail == f"index must be from 0 to {COUNT - 1} in 'generated', got -1"


WRONG: list[tuple[str, str, Any]] = [
    ("INVALID_JSON", "the message is not JSON", "{"),
    ("INVALID_JSON", "the message is not JSON", '{"seed": ' + "9" * 5000 + "}"),
    ("INVALID_JSON", "the message is not JSON", "[" * 200_000),
    ("VALIDATION_ERROR", "the message must be an object, got []", []),
    ("UNKNOWN_TYPE", "type must be one of reset, step, state, close, got 'stop'", {"type": "stop"}),
    ("UNKNOWN_TYPE", "type must be one of", {}),
    ("VALIDATION_ERROR", "data must be an object, got [1]", {"type": "reset", "data": [1]}),
    (
        "VALIDATION_ERROR",
        "seed must be an integer from 0",
        {"type": "reset", "data": {"seed": "1"}},
    ),
    ("VALIDATION_ERROR", "seed must be", {"type": "reset", "data": {"seed": True}}),
    ("VALIDATION_ERROR", "seed must be", {"type": "reset", "data": {"seed": 1 << 63}}),
    ("VALIDATION_ERROR", "episode_id must be", {"type": "reset", "data": {"episode_id": "\ud800"}}),
    (
        "VALIDATION_ERROR",
        "split and index must come together, got split='logged' and index=nothing",
        {"type": "reset", "data": {"split": "logged"}},
    ),
    (
        "VALIDATION_ERROR",
        "split must be one of generated, got 'generate'; did you mean 'generated'?",
        {"type": "reset", "data": {"split": "generate", "index": 1}},
    ),
    (
        "VALIDATION_ERROR",
        "seed must be the index of a generated task, got 2",
        {"type": "reset", "data": {"split": "generated", "index": 1, "seed": 2}},
    ),
    ("VALIDATION_ERROR", "data must have the one field 'text', got []", {"type": "step"}),
    (
        "VALIDATION_ERROR",
        "data must have the one field 'text', got ['text', 'txt']",
        {"type": "step", "data": {"text": "", "txt": 1}},
    ),
    (
        "VALIDATION_ERROR",
        "text must be the action as JSON, got 'go north'",
        {"type": "step", "data": {"text": "go north"}},
    ),
    (
        "VALIDATION_ERROR",
        "text.turn=2: input should be less than or equal to 1; see GET /schema",
        {"type": "step", "data": {"text": json.loads(ACTIONS[0]) | {"turn": 2}}},
    ),
]


def test_wrong_messages(socket: Socket, caplog: pytest.LogCaptureFixture) -> None:
    """Each gets an error with its code, and the episode continues as if it had not been sent."""
    expected = episode(socket, seed=4)
    message = ("EXECUTION_ERROR", "the episode is over, or none began; send reset before step")
    if expected[-1]["done"]:
        assert socket.error({"type": "step", "data": {"text": ACTIONS[0]}}) == message
    replies = [socket.reset(seed=4)]
    for code, start, wrong in WRONG:
        got = socket.error(wrong)
        assert got[0] == code and got[1].startswith(start), got
    while len(replies) < len(expected):
        replies.append(socket.step(ACTIONS[len(replies) - 1]))
    assert replies == expected and "bug" not in caplog.text


def test_a_step_before_a_reset(socket: Socket) -> None:
    assert socket.state()["episode_id"] is None
    code, message = socket.error({"type": "step", "data": {"text": ACTIONS[0]}})
    assert code == "EXECUTION_ERROR" and "send reset before step" in message


def test_token(client: Any) -> None:
    """`/ws` requires the token, as a bearer token or as the password in the address."""
    host = client.url.removeprefix("http://")
    for user, headers in (
        ("", {}),
        ("", {"Authorization": "Bearer wrong"}),
        ("mesocosm:wrong@", {}),
        ("", {"Authorization": f"Basic {client.token}"}),
    ):
        with pytest.raises(InvalidStatus) as refused:
            connect(f"ws://{user}{host}/ws", additional_headers=headers)
        assert refused.value.response.status_code == 401
        assert b"Authorization: Bearer TOKEN" in (refused.value.response.body or b"")
    with connect(f"ws://mesocosm:{client.token}@{host}/ws") as opened:
        opened.send('{"type": "state"}')
        assert json.loads(opened.recv(timeout=300))["type"] == "state"
    reply = requests.get(f"http://mesocosm:{client.token}@{host}/schema", timeout=300)
    assert reply.status_code == 200
    with pytest.raises(InvalidStatus) as refused:
        connect(f"ws://mesocosm:{client.token}@{host}/elsewhere")
    assert refused.value.response.status_code in (403, 404)


def test_a_thinking_client(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limits of requests do not end a connection that is silent between two messages."""
    monkeypatch.setattr(http_connection, "HEAD_S", 0.2)
    with Socket(client) as socket:
        time.sleep(1.0)
        assert socket.state()["step_count"] == 0


def test_a_large_message(client: Any) -> None:
    """The connection is closed, and its place is free."""
    with Socket(client) as socket:
        socket.reset(seed=1)
        with pytest.raises(ConnectionClosed):
            socket.send("x" * (1 << 20 | 1))


def test_places(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place is free after `close`, after a lost connection, and where it is unused for long: its
    client gets an error then.
    """
    pool = sessions().sessions
    monkeypatch.setattr(pool, "count", 1)
    with Socket(client) as first:
        first.reset(seed=1)
        with Socket(client) as refused:
            data = refused.receive()["data"]
            assert data["code"] == "CAPACITY_REACHED" and "1 of 1 sessions" in data["message"]
        first.connection.send('{"type": "close"}')
        wait_until(lambda: not pool._slots)
    second = Socket(client)
    second.reset(seed=1)
    second.connection.socket.close()
    wait_until(lambda: not pool._slots)
    monkeypatch.setattr(pool, "idle_s", 0.0)
    monkeypatch.setattr(openenv, "EVICTED_S", 0.5)
    with Socket(client) as third, Socket(client) as silent, Socket(client) as fourth:
        assert third.error({"type": "reset", "data": {}})[0] == "SESSION_ERROR"
        with pytest.raises(ConnectionClosed):
            third.connection.recv(timeout=300)
        assert silent.receive()["data"]["message"].startswith("this session was unused for long")
        fourth.reset(seed=1)


@pytest.mark.slow
def test_a_killed_replica(client: Any) -> None:
    """64 sessions at once survive the death of a replica, bit for bit."""
    players = 64
    with Socket(client) as socket:
        expected = {seed: episode(socket, seed=seed) for seed in range(4)}
    wait_until(lambda: not sessions().sessions._slots)
    begun = threading.Barrier(players + 1)

    def play(number: int) -> bool:
        with Socket(client) as socket:
            socket.reset(seed=number % 4)
            begun.wait(240)
            return episode(socket, seed=number % 4) == expected[number % 4]

    with ThreadPoolExecutor(players) as pool:
        results = [pool.submit(play, number) for number in range(players)]
        begun.wait(240)
        slot = next(iter(sessions().sessions._slots.values()))
        assert slot.value is not None
        connection: Any = slot.value._connection
        os.kill(connection.replica["pid"], signal.SIGKILL)
        assert all(result.result(240) for result in results)


def test_a_served_world_as_reality(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`reality.env=openenv:URL` plays in a served world as any client does."""
    reality = RealityConfig(env=f"openenv:{client.url}")
    monkeypatch.delenv(remote.TOKEN, raising=False)
    with pytest.raises(
        UsageError, match=rf"HTTP 401\); set the environment variable {remote.TOKEN}"
    ):
        make_env(reality)
    monkeypatch.setenv(remote.TOKEN, client.token)
    env = make_env(reality)
    with Socket(client) as socket:
        expected = episode(socket, seed=4)
    texts, rewards, over = [env.reset(seed=4)[0]], [None], False
    for action in ACTIONS[: len(expected) - 1]:
        assert not over
        text, reward, terminated, truncated, _ = env.step(action)
        over = terminated or truncated
        texts.append(text)
        rewards.append(reward)
    assert texts == [reply["observation"]["text"] for reply in expected]
    assert rewards == [reply["reward"] for reply in expected] and over == expected[-1]["done"]
    with pytest.raises(
        RuntimeError, match=r"the server refused step \(VALIDATION_ERROR\): text must"
    ):
        env.reset()
        env.step("go")
    env.close()


# -- clients of others


def test_own_client(client: Any) -> None:
    """openenv's client, unchanged."""
    generic = own_client().GenericEnvClient
    headers = {"Authorization": f"Bearer {client.token}"}
    with generic(base_url=client.url, headers=headers).sync() as env:
        result = env.reset(seed=3, episode_id="mine")
        while not result.done and env.state()["step_count"] < 3:
            result = env.step({"text": ACTIONS[0]})
        assert isinstance(result.reward, float) and env.state()["episode_id"] == "mine"
        with pytest.raises(RuntimeError, match=r"Server error: text must be .*VALIDATION_ERROR"):
            env.step({"text": "not json"})
    wait_until(lambda: not sessions().sessions._slots)
    with pytest.raises(ConnectionError, match="401"):
        generic(base_url=client.url).sync().connect()


def test_like_trl(client: Any) -> None:
    """The environment of TRL's `environment_factory`: `reset(**row)` gives a text, its other public
    methods are tools, and `get_reward` scores the rollout. TRL makes one for each rollout.
    """
    generic = own_client().GenericEnvClient
    headers = {"Authorization": f"Bearer {client.token}"}

    class World:
        def __init__(self) -> None:
            self._env = generic(base_url=client.url, headers=headers).sync()
            self._env.connect()
            self._total = 0.0

        def reset(self, **row: Any) -> str:
            self._total = 0.0
            return str(self._env.reset(**row).observation["text"])

        def act(self, action: str) -> str:
            """Act in the world.

            Args:
                action: The action.
            """
            result = self._env.step({"text": action})
            self._total += result.reward or 0.0
            return str(result.observation["text"])

        def get_reward(self) -> float:
            return self._total

    rows = [{"prompt": [{"role": "user", "content": "act"}], "split": "generated", "index": 3}] * 4
    worlds = [World() for _ in rows]
    starts = [world.reset(**row) for world, row in zip(worlds, rows, strict=True)]
    texts = [world.act(ACTIONS[1]) for world in worlds]
    assert len(set(starts)) == len(set(texts)) == 1
    assert len({world.get_reward() for world in worlds}) == 1
    for world in worlds:
        world._env.close()


def test_like_verifiers(client: Any) -> None:
    """The calls of `verifiers.v1.tasksets.openenv`: it takes no headers, so that the token is in
    the address, and wraps a reply of the model into the one required field.
    """
    generic = own_client().GenericEnvClient
    address = client.url.replace("http://", f"http://mesocosm:{client.token}@")
    with generic(base_url=address).sync() as env:
        schema = requests.get(f"{env.async_client._base_url}/schema", timeout=300).json()["action"]
        assert schema["title"] not in {"Action", "CallToolAction", "ListToolsAction"}
        result = env.reset(split="generated", index=1)
        json.dumps({"observation": result.observation, "action_schema": schema})
        (field,) = schema["required"]
        result = env.step({field: json.loads(ACTIONS[1])})
        assert (result.reward or 0.0) == float(result.reward)
