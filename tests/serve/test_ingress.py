"""The HTTP ingress on a real Ray Serve: where it listens, its token, the bits of a local world."""

from __future__ import annotations

import os
import signal
import socket
import threading
from typing import Any

import numpy as np
import psutil
import pytest
import requests
from gymnasium.vector.utils import iterate

from mesocosm.datasets.space_json import space_from_json
from mesocosm.errors import UsageError
from mesocosm.serve import http_guard, http_sessions
from mesocosm.serve.connection import Served
from mesocosm.serve.deployment import LISTENERS, deploy, undeploy
from mesocosm.serve.protocol import pack, unpack
from mesocosm.serve.world_env import WorldVectorEnv

from .worlds import local, web_config

pytestmark = pytest.mark.usefixtures("ray_local")
ACTION = {"push": [0, 0], "turn": 0, "hands": [0, 0], "say": "a"}


def plain(value: Any) -> Any:
    """A value of a space as JSON has it."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def actions(env: WorldVectorEnv, batch: Any) -> list[Any]:
    return [plain(action) for action in iterate(env.action_space, batch)]


def observations(env: WorldVectorEnv, batch: Any) -> list[Any]:
    return [plain(observation) for observation in iterate(env.observation_space, batch)]


def in_process(rich: str, count: int) -> WorldVectorEnv:
    env = local("rich", rich, count)
    env.action_space.seed(0)
    return env


def sessions() -> http_sessions.HttpSessions:
    """The sessions of the server under test."""
    served = LISTENERS["web"].sessions
    assert served is not None
    return served


# -- where it listens


def listening() -> set[tuple[str, int]]:
    """Addresses on which this process listens."""
    connections = psutil.Process().net_connections("tcp")
    return {(c.laddr.ip, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN}


def test_loopback_alone_and_no_grpc(client: Any, rich: str) -> None:
    """The only port is on loopback, and Serve's proxy, its HTTP and gRPC ingress, never starts."""
    from ray import serve

    port = int(client.url.rsplit(":", 1)[1])
    before = listening()
    assert [address for address, open_port in before if open_port == port] == ["127.0.0.1"]
    assert serve.status().proxies == {}
    deploy(web_config(rich, "plain"))
    try:
        assert listening() == before and "plain" not in LISTENERS
        assert serve.status().proxies == {}
    finally:
        undeploy("plain")


def test_a_port_that_is_taken(client: Any, rich: str) -> None:
    from ray import serve

    port = int(client.url.rsplit(":", 1)[1])
    for values, message in (
        ({"http": port}, f"serve.http={port}: the port is taken on 127.0.0.1"),
        ({"http": 70000}, "serve.http must be a port .* got 70000"),
        ({"http": 0, "world": ""}, "serve.world must be set with serve.http, got serve.world=''"),
    ):
        with pytest.raises(UsageError, match=message):
            deploy(web_config(rich, "second", **values))
    assert "second" not in serve.status().applications


# -- the token


def test_every_route_wants_the_token(client: Any) -> None:
    paths = client("GET", "/openapi.json").json()["paths"]
    assert sum(map(len, paths.values())) == 14
    routes = [
        (m.upper(), p.replace("{session}", "0" * 32)) for p, ops in paths.items() for m in ops
    ]
    routes += [("GET", path) for path in ("/openapi.json", "/docs", "/nowhere", "/-/routes")]
    routes += [("PUT", "/v1/step"), ("POST", "/health")]
    token = client.token
    wrong = [
        None,
        "",
        "Bearer",
        f"Bearer {token}x",
        f"Bearer {token[:-1]}",
        f"Basic {token}",
        token,
    ]
    for method, path in routes:
        for header in (*wrong, "Bearer é".encode("latin-1")):
            headers = {} if header is None else {"Authorization": header}
            reply = requests.request(method, client.url + path, headers=headers, timeout=300)
            if (method, path) == ("GET", "/health"):
                assert reply.status_code == 200
                continue
            assert reply.status_code == 401, (method, path, header)
            assert reply.headers["WWW-Authenticate"] == "Bearer"
            assert "Authorization: Bearer TOKEN" in reply.json()["detail"]
        assert client(method, path).status_code not in (401, 500), (method, path)


def test_compared_in_constant_time(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    compare = http_guard.hmac.compare_digest

    def record(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return compare(a, b)

    monkeypatch.setattr(http_guard.hmac, "compare_digest", record)
    assert type(client)(client.url, "wrong")("GET", "/v1/world").status_code == 401
    assert client("GET", "/v1/world").status_code == 200
    token = client.token.encode()
    assert compared == [(b"wrong", token), (token, token)]


def connect(client: Any, data: bytes = b"") -> socket.socket:
    host, port = client.url.removeprefix("http://").split(":")
    line = socket.create_connection((host, int(port)), timeout=60)
    line.sendall(data)
    return line


def raw(client: Any, head: str) -> bytes:
    """The answer to a request whose body does not follow."""
    with connect(client, head.replace("\n", "\r\n").encode("latin-1") + b"\r\n") as line:
        return line.recv(4096)


def test_strangers_send_no_body(client: Any) -> None:
    """The 401 comes before the body."""
    for path in ("/v1/call", "/v1/step", "/nowhere"):
        reply = raw(client, f"POST {path} HTTP/1.1\nHost: x\nContent-Length: 1000\n")
        assert reply.startswith(b"HTTP/1.1 401")


def test_strange_heads(client: Any) -> None:
    """Header bytes that are not UTF-8, an endless head, and bytes that are not HTTP."""
    x_headers = ("x-request-id", "x-request-timeout-seconds", "x-session-id")
    for name in (*x_headers, "authorization", "content-type"):
        reply = raw(client, f"GET /v1/world HTTP/1.1\nHost: x\n{name}: ÿ\n")
        assert reply.startswith(b"HTTP/1.1 401"), name
    start = b"GET /v1/world HTTP/1.1\r\n"
    with connect(client, start) as line, pytest.raises(ConnectionError):
        for _ in range(10_000):
            line.sendall(b"x: " + b"y" * (1 << 12) + b"\r\n")
    refused = raw(client, "\x16\x03\x01\n")
    assert refused.startswith(b"HTTP/1.1 400")
    assert b'{"detail": "the request is not valid HTTP/1.1' in refused


@pytest.mark.parametrize(("path", "limit"), [("/v1/call", 1 << 24), ("/v1/step", 1 << 20)])
def test_too_large(client: Any, path: str, limit: int) -> None:
    known = f"POST {path} HTTP/1.1\nHost: x\nAuthorization: Bearer {client.token}\n"
    declared = raw(client, f"{known}Content-Length: {limit + 1}\n")
    assert declared.startswith(b"HTTP/1.1 413")
    chunks = iter([b"[" * (1 << 18)] * (limit >> 18) + [b"x"])
    chunked = client("POST", path, data=chunks, headers={"Content-Type": "application/json"})
    assert chunked.status_code == 413
    assert chunked.json()["detail"].startswith(f"the body is larger than {limit >> 20} MiB; ")
    assert client.post(path, b"[" * (limit >> 2)).status_code == 400, "within the limit"


# -- answers


def test_world(client: Any, rich: str) -> None:
    reply = client("GET", "/v1/world").json()
    env = in_process(rich, 1)
    assert space_from_json(reply.pop("action_space")) == env.single_action_space
    assert space_from_json(reply.pop("observation_space")) == env.single_observation_space
    sizes = {"members": 3, "memory": 6, "durations": False}
    assert reply == {"world": "rich", "task": ["room"], **sizes}


def test_episode(client: Any, rich: str) -> None:
    """JSON gives the bits of the same world in process, across episodes, a rebuilt context and a
    second reset.
    """
    env = in_process(rich, 3)
    body: dict[str, Any] = {"num_envs": 3, "seed": 5}
    ended = 0
    for seed in (5, None):
        reply = client.post("/v1/reset", body).json()
        body = {"session": reply["session"]}
        assert (reply["world"], reply["task"]) == ("rich", [{}, {}, {}])
        assert reply["observation"] == observations(env, env.reset(seed=seed)[0])
        for step in range(20):
            batch = env.action_space.sample()
            request = body | {"action": actions(env, batch)}
            if step % 3 == 2:  # without its disagreement; the default is with
                request["disagreement"] = False
            reply = client.post("/v1/step", request).json()
            observation, reward, terminated, truncated, infos = env.step(batch)
            expected = {"reward": reward, "terminated": terminated, "truncated": truncated}
            expected |= {name: infos[name] for name in ("disagreement", "diverged")}
            texts = {name: value.tolist() for name, value in expected.items()}
            texts |= {"observation": observations(env, observation), "duration": None}
            texts |= {"disagreement": None} if step % 3 == 2 else {}
            assert reply == texts | {"task": [{}, {}, {}]}
            ended += int(terminated.sum())
    assert ended > 3
    path = f"/v1/sessions/{body['session']}"
    assert [client("DELETE", path).status_code for _ in range(2)] == [204, 404]


def kill(connection: Any) -> None:
    """Kill the replica of a connection."""
    assert isinstance(connection, Served) and connection.replica is not None
    os.kill(connection.replica["pid"], signal.SIGKILL)


class OverHttp:
    """A client's connection that posts its messages to /v1/call."""

    def __init__(self, client: Any):
        self.client = client
        self.number = 0

    def call(self, request: dict[str, Any]) -> dict[str, Any]:
        self.number += 1
        data = pack(request | {"number": self.number})
        reply = self.client.post("/v1/call", data, "octet-stream")
        if reply.status_code != 200:
            kind = "usage" if reply.status_code == 400 else "failed"
            return {"error": reply.json()["detail"], "kind": kind}
        message = unpack(reply.content)
        assert message.pop("number") == self.number
        return message

    def close(self, last: dict[str, Any] | None = None) -> None:
        if last is not None:
            self.call(last)


def test_binary(client: Any, rich: str) -> None:
    """A client over POST /v1/call gets the same bits, also after its replica is killed."""
    env, reference = WorldVectorEnv(4, "rich", app="web"), in_process(rich, 4)
    env.close()
    env.closed = False
    env._connection = OverHttp(client)
    first = [each.reset(seed=2)[0] for each in (env, reference)]
    assert observations(reference, first[0]) == observations(reference, first[1])
    for step in range(16):
        if step == 8:
            slot = sessions().connections.get(env._routed)
            assert slot is not None
            kill(slot.value)
        batch = reference.action_space.sample()
        actual, expected = env.step(batch), reference.step(batch)
        assert observations(reference, actual[0]) == observations(reference, expected[0])
        assert [v.tobytes() for v in actual[1:4]] == [v.tobytes() for v in expected[1:4]]
    env.close()


@pytest.mark.slow
def test_killed_replica(client: Any, rich: str) -> None:
    """A session survives its replica, bit for bit."""
    env = in_process(rich, 2)
    env.reset(seed=3)
    session = client.begin(2, seed=3)
    for step in range(12):
        if step == 8:
            slot = sessions().sessions.get(session)
            assert slot is not None and slot.value is not None
            kill(slot.value._connection)
        batch = env.action_space.sample()
        reply = client.post("/v1/step", {"session": session, "action": actions(env, batch)})
        assert reply.status_code == 200, reply.text
        assert reply.json()["observation"] == observations(env, env.step(batch)[0]), step


def test_room_for_sessions(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions in use stay, and a new one is refused, by number and by environments.

    The one that is unused for the longest is evicted.
    """

    def begin_again(*names: str) -> list[int]:
        return [client.post("/v1/reset", {"session": name}).status_code for name in names]

    pool = sessions().sessions
    pool.clear()
    monkeypatch.setattr(pool, "count", 2)
    first, second = client.begin(), client.begin()
    refused = client.post("/v1/reset", {})
    assert refused.status_code == 503
    limits = "2 of 2 sessions with 2 of 16384 environments are in use; end one with DELETE /v1/"
    assert refused.json()["detail"].startswith(limits)
    assert begin_again(second, first) == [200, 200]
    monkeypatch.setattr(pool, "idle_s", 0.0)
    third = client.begin()
    assert begin_again(first, second, third) == [200, 404, 200]
    gone = client.post("/v1/reset", {"session": second}).json()["detail"]
    assert gone == f"session {second!r} is unknown; begin one with POST /v1/reset"
    for name, value in (("count", 64), ("weight", 10), ("idle_s", 300.0)):
        monkeypatch.setattr(pool, name, value)
    assert client.post("/v1/reset", {"num_envs": 9}).status_code == 503
    assert client("DELETE", f"/v1/sessions/{first}").status_code == 204
    client.begin(9)
    pool.clear()


def test_a_failed_reset_keeps_no_place(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = sessions().sessions
    pool.clear()
    failed = {"error": "the device went away", "kind": "failed"}
    monkeypatch.setattr(Served, "call", lambda *_: failed)
    assert client.post("/v1/reset", {}).status_code == 503
    assert not pool._slots


@pytest.mark.slow
def test_a_hundred_sessions_at_once(client: Any) -> None:
    """As many as there is room for begin; the others get 503 at their reset.

    No session is lost during an episode.
    """
    pool = sessions().sessions
    pool.clear()
    statuses: list[list[int]] = []
    begun = threading.Barrier(100)

    def play() -> None:
        player = type(client)(client.url)
        reply = player.post("/v1/reset", {})
        replies = [reply.status_code]
        begun.wait(240)
        if reply.status_code == 200:
            body = {"session": reply.json()["session"], "action": [ACTION]}
            replies += [player.post("/v1/step", body).status_code for _ in range(3)]
        statuses.append(replies)

    players = [threading.Thread(target=play) for _ in range(100)]
    for thread in players:
        thread.start()
    for thread in players:
        thread.join()
    pool.clear()
    assert sorted(statuses) == [[200] * 4] * 64 + [[503]] * 36


def test_a_bug_shows_nothing(
    client: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A bug here, or on a replica: 500, one sentence, and the traceback in the log."""

    def fail(*_: Any) -> None:
        raise RuntimeError("inner workings")

    monkeypatch.setattr(http_sessions.HttpSessions, "reset", fail)
    reply = client.post("/v1/reset", {})
    message = "the server failed on this request, which is a bug; see its log"
    assert (reply.status_code, reply.json()) == (500, {"detail": message})
    assert "inner workings" in caplog.text
    monkeypatch.undo()
    failed = {"error": "the replica failed: KeyError: 'inner'", "kind": "bug"}
    monkeypatch.setattr(Served, "call", lambda *_: failed)
    end = pack({"op": "end", "session": "", "number": 1})
    for path, body in (("/v1/reset", b"{}"), ("/v1/call", end)):
        reply = client.post(path, body)
        assert reply.status_code == 500 and "inner" not in reply.text
