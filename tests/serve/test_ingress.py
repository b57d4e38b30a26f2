"""The HTTP ingress on a real Ray Serve: its token, the same bits as in process, where it listens,
and how it ends.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests
from gymnasium.vector.utils import iterate

from mesocosm.config import StorageConfig
from mesocosm.datasets.space_json import space_from_json
from mesocosm.errors import UsageError
from mesocosm.jobs import serve as serve_job
from mesocosm.runs import tracking
from mesocosm.serve import http_sessions, ingress
from mesocosm.serve.client import WorldVectorEnv
from mesocosm.serve.config import ServeConfig
from mesocosm.serve.connection import Served
from mesocosm.serve.deployment import LISTENERS, deploy, undeploy
from mesocosm.serve.http_connection import CONNECTIONS
from mesocosm.serve.protocol import pack, unpack

pytestmark = pytest.mark.usefixtures("ray_local")


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


def local(rich: str, count: int) -> WorldVectorEnv:
    env = WorldVectorEnv(count, "rich", root=rich, backend="local")
    env.action_space.seed(0)
    return env


# -- the token


def routes(client: Any) -> list[tuple[str, str]]:
    schema = client("GET", "/openapi.json").json()
    paths = [
        (method.upper(), path.replace("{session}", "0" * 32))
        for path, operations in schema["paths"].items()
        for method in operations
    ]
    assert len(paths) == 6
    return [
        *paths,
        ("GET", "/openapi.json"),
        ("GET", "/docs"),
        ("GET", "/nowhere"),
        ("PUT", "/v1/step"),
        ("POST", "/health"),
        ("GET", "/-/routes"),
    ]


def test_every_route_wants_the_token(client: Any) -> None:
    wrong = [
        None,
        "",
        "Bearer",
        f"Bearer {client.token}x",
        f"Bearer {client.token[:-1]}",
        f"Basic {client.token}",
        client.token,
        "Bearer é".encode("latin-1"),
    ]
    for method, path in routes(client):
        for header in wrong:
            reply = requests.request(
                method,
                client.url + path,
                headers={} if header is None else {"Authorization": header},
                timeout=30,
            )
            if (method, path) == ("GET", "/health"):
                assert reply.status_code == 200
                continue
            assert reply.status_code == 401, (method, path, header)
            assert reply.headers["WWW-Authenticate"] == "Bearer"
            assert "Authorization: Bearer <token>" in reply.json()["detail"]
        assert client(method, path).status_code not in (401, 500), (method, path)


def test_compared_in_constant_time(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    compare = ingress.hmac.compare_digest
    monkeypatch.setattr(
        ingress.hmac, "compare_digest", lambda a, b: (compared.append((a, b)), compare(a, b))[1]
    )
    assert type(client)(client.url, "wrong").__call__("GET", "/v1/world").status_code == 401
    assert client("GET", "/v1/world").status_code == 200
    assert compared == [
        (b"wrong", client.token.encode()),
        (client.token.encode(), client.token.encode()),
    ]


def raw(client: Any, head: str, body: bytes = b"") -> bytes:
    """The answer to a request whose body may be shorter than its Content-Length."""
    host, port = client.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as line:
        line.sendall(head.replace("\n", "\r\n").encode("latin-1") + b"\r\n" + body)
        return line.recv(4096)


def test_strangers_send_no_body(client: Any) -> None:
    """The 401 comes before the body."""
    for path in ("/v1/call", "/v1/step", "/nowhere"):
        assert raw(client, f"POST {path} HTTP/1.1\nHost: x\nContent-Length: 1000\n").startswith(
            b"HTTP/1.1 401"
        )


def test_strange_heads(client: Any) -> None:
    """Header bytes that are not UTF-8, an endless head, and bytes that are not HTTP."""
    for name in (
        "x-request-id",
        "x-request-timeout-seconds",
        "x-session-id",
        "authorization",
        "content-type",
    ):
        assert raw(client, f"GET /v1/world HTTP/1.1\nHost: x\n{name}: ÿ\n").startswith(
            b"HTTP/1.1 401"
        ), name
    host, port = client.url.removeprefix("http://").split(":")
    with (
        socket.create_connection((host, int(port)), timeout=20) as line,
        pytest.raises(ConnectionError),
    ):
        line.sendall(b"GET /v1/world HTTP/1.1\r\n")
        for _ in range(10_000):
            line.sendall(b"x: " + b"y" * (1 << 12) + b"\r\n")
    refused = raw(client, "\x16\x03\x01\n")
    assert refused.startswith(b"HTTP/1.1 400")
    assert b'{"detail": "the request is not valid HTTP/1.1' in refused


def test_unfinished_heads(client: Any) -> None:
    """With more of them than connections, health and requests with the token are answered."""
    host, port = client.url.removeprefix("http://").split(":")
    held = [socket.create_connection((host, int(port)), timeout=60) for _ in range(CONNECTIONS + 4)]
    for line in held:
        line.sendall(b"GET /v1/world HTTP/1.1\r\nX-a: ")
    assert requests.get(f"{client.url}/health", timeout=60).status_code == 200
    assert client("GET", "/v1/world").status_code == 200
    for line in held:
        line.close()


@pytest.mark.parametrize(("path", "limit"), [("/v1/call", 1 << 24), ("/v1/step", 1 << 20)])
def test_too_large(client: Any, path: str, limit: int) -> None:
    known = f"POST {path} HTTP/1.1\nHost: x\nAuthorization: Bearer {client.token}\n"
    assert raw(client, f"{known}Content-Length: {limit + 1}\n").startswith(b"HTTP/1.1 413"), (
        "by what it says"
    )
    chunked = client(
        "POST",
        path,
        data=iter([b"[" * (1 << 18)] * (limit >> 18) + [b"x"]),
        headers={"Content-Type": "application/json"},
    )
    assert (
        chunked.status_code == 413
        and chunked.json()["detail"]
        == f"the body is larger than {limit >> 20} MiB; send fewer environments at once"
    )
    assert (
        client(
            "POST", path, data=b"[" * (limit >> 2), headers={"Content-Type": "application/json"}
        ).status_code
        == 400
    ), "within the limit"


# -- answers


def test_world(client: Any, rich: str) -> None:
    replies = client("GET", "/v1/world").json()
    assert (
        replies["world"],
        replies["members"],
        replies["memory"],
        replies["durations"],
        replies["task"],
    ) == ("rich", 3, 6, False, ["room"])
    env = local(rich, 1)
    assert space_from_json(replies["action_space"]) == env.single_action_space
    assert space_from_json(replies["observation_space"]) == env.single_observation_space


def test_episode(client: Any, rich: str) -> None:
    """JSON gives the bits of the same world in process, across episodes, a rebuilt context and a
    second reset.
    """
    env = local(rich, 3)
    session, ended = None, 0
    for number in (5, None):
        reply = client(
            "POST",
            "/v1/reset",
            json={"num_envs": 3, "seed": number} if session is None else {"session": session},
        ).json()
        session = reply["session"]
        assert (reply["world"], reply["task"]) == ("rich", [{}, {}, {}])
        assert reply["observation"] == observations(env, env.reset(seed=number)[0])
        for step in range(20):
            batch = env.action_space.sample()
            reply = client(
                "POST", "/v1/step", json={"session": session, "action": actions(env, batch)}
            ).json()
            observation, reward, terminated, truncated, infos = env.step(batch)
            assert reply["observation"] == observations(env, observation), step
            expected = {
                "reward": reward,
                "terminated": terminated,
                "truncated": truncated,
                "disagreement": infos["disagreement"],
                "diverged": infos["diverged"],
            }
            assert {name: reply[name] for name in expected} == {
                name: value.tolist() for name, value in expected.items()
            }
            assert reply["duration"] is None
            ended += int(terminated.sum())
    assert ended > 3
    assert client("DELETE", f"/v1/sessions/{session}").status_code == 204
    assert client("DELETE", f"/v1/sessions/{session}").status_code == 404


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
        reply = self.client(
            "POST",
            "/v1/call",
            data=pack(request | {"number": self.number}),
            headers={"Content-Type": "application/octet-stream"},
        )
        if reply.status_code != 200:
            return {
                "error": reply.json()["detail"],
                "kind": "usage" if reply.status_code == 400 else "failed",
            }
        replies = unpack(reply.content)
        assert replies.pop("number") == self.number
        return replies

    def close(self, last: dict[str, Any] | None = None) -> None:
        if last is not None:
            self.call(last)


def test_binary(client: Any, rich: str) -> None:
    """A client over POST /v1/call gets the same bits, also after its replica is killed."""
    env, here = WorldVectorEnv(4, "rich", app="web"), local(rich, 4)
    env.close()
    env.closed = False
    env._connection = OverHttp(client)
    for step, batch in enumerate([None] + [here.action_space.sample() for _ in range(16)]):
        if step == 9:
            kill(LISTENERS["web"].sessions.connections.get(env._routed).value)  # type: ignore[union-attr]
        actual, expected = (
            each.reset(seed=2) if step == 0 else each.step(batch) for each in (env, here)
        )
        assert observations(here, actual[0]) == observations(here, expected[0])
        for one, other in zip(actual[1:4], expected[1:4], strict=True):
            assert step == 0 or one.tobytes() == other.tobytes()
    env.close()


def test_killed_replica(client: Any, rich: str) -> None:
    """A session survives its replica, bit for bit."""
    env = local(rich, 2)
    env.reset(seed=3)
    session = client.begin(2, seed=3)
    for step in range(12):
        if step == 8:
            kill(LISTENERS["web"].sessions.sessions.get(session).value._connection)  # type: ignore[union-attr]
        batch = env.action_space.sample()
        reply = client("POST", "/v1/step", json={"session": session, "action": actions(env, batch)})
        assert reply.status_code == 200, reply.text
        assert reply.json()["observation"] == observations(env, env.step(batch)[0]), step


def test_room_for_sessions(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions in use stay, and a new one is refused, by number and by environments.

    The one that is unused for the longest is evicted.
    """

    def begin_again(*sessions: str) -> list[int]:
        replies = [client("POST", "/v1/reset", json={"session": each}) for each in sessions]
        return [reply.status_code for reply in replies]

    pool = LISTENERS["web"].sessions.sessions  # type: ignore[union-attr]
    pool.clear()
    monkeypatch.setattr(pool, "count", 2)
    first, second = client.begin(), client.begin()
    refused = client("POST", "/v1/reset", json={})
    assert refused.status_code == 503
    sentence = "2 of 2 sessions with 2 of 16384 environments are in use; end one with DELETE /v1/"
    assert refused.json()["detail"].startswith(sentence)
    assert begin_again(second, first) == [200, 200]
    monkeypatch.setattr(pool, "idle_s", 0.0)
    third = client.begin()
    assert begin_again(first, second, third) == [200, 404, 200]
    gone = client("POST", "/v1/reset", json={"session": second}).json()["detail"]
    assert gone == f"session {second!r} is unknown; begin one with POST /v1/reset"
    monkeypatch.setattr(pool, "count", 64)
    monkeypatch.setattr(pool, "weight", 10)
    monkeypatch.setattr(pool, "idle_s", 300.0)
    assert client("POST", "/v1/reset", json={"num_envs": 9}).status_code == 503
    assert client("DELETE", f"/v1/sessions/{first}").status_code == 204
    client.begin(9)
    pool.clear()


def test_a_failed_reset_keeps_no_place(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = LISTENERS["web"].sessions.sessions  # type: ignore[union-attr]
    pool.clear()
    failed = {"error": "the device went away", "kind": "failed"}
    monkeypatch.setattr(Served, "call", lambda *_: failed)
    assert client("POST", "/v1/reset", json={}).status_code == 503
    assert not pool._slots


def test_a_hundred_sessions_at_once(client: Any) -> None:
    """As many as there is room for begin; the others get 503 at their reset.

    No session is lost during an episode.
    """
    action = {"push": [0, 0], "turn": 0, "hands": [0, 0], "say": "a"}
    pool = LISTENERS["web"].sessions.sessions  # type: ignore[union-attr]
    pool.clear()
    statuses: list[list[int]] = []
    begun = threading.Barrier(100)

    def play() -> None:
        mine = type(client)(client.url)
        reply = mine("POST", "/v1/reset", json={})
        replies = [reply.status_code]
        begun.wait(240)
        if reply.status_code == 200:
            body = {"session": reply.json()["session"], "action": [action]}
            replies += [mine("POST", "/v1/step", json=body).status_code for _ in range(3)]
        statuses.append(replies)

    players = [threading.Thread(target=play) for _ in range(100)]
    for each in players:
        each.start()
    for each in players:
        each.join()
    pool.clear()
    assert sorted(statuses) == [[200] * 4] * 64 + [[503]] * 36


def test_a_bug_shows_nothing(
    client: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A bug here, or on a replica: 500, one sentence, and the traceback in the log."""

    def fail(*_: Any) -> None:
        raise RuntimeError("inner workings")

    monkeypatch.setattr(http_sessions.HttpSessions, "reset", fail)
    reply = client("POST", "/v1/reset", json={})
    assert (reply.status_code, reply.json()) == (
        500,
        {"detail": "the server failed on this request, which is a bug; see its log"},
    )
    assert "inner workings" in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr(
        Served, "call", lambda *_: {"error": "the replica failed: KeyError: 'inner'", "kind": "bug"}
    )
    for method, path, body in (
        ("POST", "/v1/reset", b"{}"),
        ("POST", "/v1/call", pack({"op": "end", "session": "", "number": 1})),
    ):
        reply = client(method, path, data=body, headers={"Content-Type": "application/json"})
        assert reply.status_code == 500 and "inner" not in reply.text


# -- listening and ending


def listening() -> set[int]:
    """Ports on which this process listens."""
    return {
        connection.laddr.port
        for connection in psutil.Process().net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }


def test_loopback_alone_and_no_grpc(client: Any, rich: str) -> None:
    """The only port is on loopback, and Serve's proxy, its HTTP and gRPC ingress, never starts."""
    from ray import serve

    port = int(client.url.rsplit(":", 1)[1])
    addresses = {
        connection.laddr.ip
        for connection in psutil.Process().net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }
    assert addresses == {"127.0.0.1"}
    assert serve.status().proxies == {}
    before = listening()
    deploy(ServeConfig(world="rich", name="plain", cpus=0.5, storage=StorageConfig(rich)))
    try:
        assert listening() == before and "plain" not in LISTENERS
        assert serve.status().proxies == {}
    finally:
        undeploy("plain")


def test_a_port_that_is_taken(client: Any, rich: str) -> None:
    from ray import serve

    port = int(client.url.rsplit(":", 1)[1])
    with pytest.raises(
        UsageError,
        match=rf"serve.http={port}: the port is taken on 127.0.0.1; set serve.http to another one",
    ):
        deploy(ServeConfig(world="rich", name="second", http=port, storage=StorageConfig(rich)))
    assert "second" not in serve.status().applications
    with pytest.raises(UsageError, match=r"serve.http must be a port .* got 70000"):
        deploy(ServeConfig(world="rich", name="second", http=70000, storage=StorageConfig(rich)))
    with pytest.raises(
        UsageError, match=r"serve.world must be set with serve.http, got serve.world=''"
    ):
        deploy(ServeConfig(name="second", http=0, storage=StorageConfig(rich)))


def test_job(client: Any, rich: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`serve http=0` makes a token file and prints a curl command that works.

    No file of the run or of Ray has the token. The port closes with the job.
    """
    import ray

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MESOCOSM_WORLD_TOKEN", raising=False)
    config = ServeConfig(world="rich", name="job", cpus=0.5, http=0, storage=StorageConfig(rich))
    answers: list[Any] = []

    def visit() -> None:
        log = Path(rich) / "runs/serve/visited/log.txt"
        try:
            while not log.exists() or "curl" not in log.read_text():
                time.sleep(0.1)
            command = next(line for line in log.read_text().splitlines() if "curl" in line).strip()
            answers.append(
                json.loads(
                    subprocess.run(command, shell=True, capture_output=True, timeout=60).stdout
                )["world"]
            )
            answers.append(LISTENERS["job"].url)
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    observer = threading.Thread(target=visit)
    observer.start()
    with tracking.start("serve", config, id="visited", quiet=True) as job:
        serve_job.JOB.run(config, job)
    observer.join()
    assert answers[0] == "rich" and "job" not in LISTENERS
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{answers[1]}/health", timeout=5)
    file = tmp_path / ".mesocosm/world_token"
    token = file.read_bytes().strip()
    assert len(token) > 30 and file.stat().st_mode & 0o777 == 0o600
    assert str(file) in (Path(rich) / "runs/serve/visited/log.txt").read_text()
    read = 0
    for folder in (
        Path(rich) / "runs",
        Path(ray._private.worker._global_node.get_session_dir_path()) / "logs",
    ):
        for path in folder.rglob("*"):
            if path.is_file():
                read += 1
                text = path.read_bytes()
                assert token not in text and client.token.encode() not in text, path
    assert read > 10


@pytest.mark.slow
def test_nobody_answers(client: Any, rich: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the application ends under the ingress: 503 with a message, in bounded time."""
    from ray import serve

    monkeypatch.setenv("MESOCOSM_WORLD_TOKEN", client.token)
    monkeypatch.setattr(http_sessions, "DEADLINE_S", 2.0)
    action = {"push": [0, 0], "turn": 0, "hands": [0, 0], "say": "a"}
    deploy(ServeConfig(world="rich", name="brief", cpus=0.5, http=0, storage=StorageConfig(rich)))
    try:
        client = type(client)(LISTENERS["brief"].url)
        session = client.begin()
        assert client("GET", "/health").status_code == 200
        serve.delete("brief")
        time.sleep(ingress.HEALTH_S)
        assert client("GET", "/health").status_code == 503
        for method, path, body in (
            ("POST", "/v1/step", {"session": session, "action": [action]}),
            ("POST", "/v1/reset", {"session": session}),
            ("POST", "/v1/reset", {}),
        ):
            reply = client(method, path, json=body)
            assert reply.status_code == 503 and re.search(
                "no replica answered for 2 s|no world application 'brief'", reply.json()["detail"]
            ), reply.text
        reply = client("POST", "/v1/step", json={"session": session, "action": [action]})
        assert (reply.status_code, reply.json()["detail"]) == (
            400,
            "the session's last reset failed; POST /v1/reset with it again",
        )
    finally:
        undeploy("brief")
