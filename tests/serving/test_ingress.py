"""The HTTP ingress on a real Ray Serve: who may ask, the same bits as in process, sentences for what is wrong, and a fuzzer that finds no 5xx."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests
import schemathesis
from gymnasium import spaces
from gymnasium.vector.utils import iterate
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import positive_data_acceptance

from mesocosm import tracking
from mesocosm.config import StorageConfig
from mesocosm.errors import UsageError
from mesocosm.serving import ingress, visitors
from mesocosm.serving import run as serve_job
from mesocosm.serving.bearer import read_token
from mesocosm.serving.client import WorldVectorEnv
from mesocosm.serving.config import ServeConfig
from mesocosm.serving.connection import Served
from mesocosm.serving.deployment import LISTENERS, deploy, undeploy
from mesocosm.serving.protocol import pack, unpack
from mesocosm.storage import Storage

pytestmark = pytest.mark.usefixtures("ray_local")
TOKEN = "planted-token-4f1c9a0b7d"
OBSERVATION = spaces.Dict(
    {
        "place": spaces.Box(-np.inf, np.inf, (2,), np.float32),
        "room": spaces.Discrete(4, start=1),
        "say": spaces.Text(4, min_length=0, charset='a"\\]'),
        "pair": spaces.Tuple([spaces.Box(-5, 5, (2, 1), np.int64), spaces.MultiBinary(2)]),
    }
)
ACTION = spaces.Dict(
    {
        "push": spaces.Box(np.array([-1, -0.7], np.float32), np.array([1, 0.7], np.float32)),
        "turn": spaces.Discrete(3, start=-1),
        "hands": spaces.MultiDiscrete([2, 3]),
        "say": spaces.Text(3, charset="ab-"),
    }
)


class Client:
    def __init__(self, url: str, token: str = TOKEN):
        self.url = url
        self.session = requests.Session()
        self.session.headers["Authorization"] = f"Bearer {token}"

    def __call__(self, method: str, path: str, **arguments: Any) -> requests.Response:
        return self.session.request(method, self.url + path, timeout=90, **arguments)

    def begin(self, num_envs: int = 1, seed: int = 0) -> str:
        reply = self("POST", "/v1/reset", json={"num_envs": num_envs, "seed": seed})
        assert reply.status_code == 200, reply.text
        return str(reply.json()["session"])


@pytest.fixture(scope="module")
def root(make_world: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A storage root with the world `rich`."""
    root = str(tmp_path_factory.mktemp("ingress"))
    Storage(root).make("worlds", "rich", {}, make_world(OBSERVATION, ACTION, "sequence", task=("room",), terminal=0.1).save)
    return root


@pytest.fixture(scope="module")
def client(root: str, ray_local: None) -> Iterator[Client]:
    """Of two replicas behind an ingress on a free port."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MESOCOSM_WORLD_TOKEN", TOKEN)
        deploy(ServeConfig(world="rich", name="web", replicas=2, cpus=0.5, http=0, storage=StorageConfig(root)))
        yield Client(LISTENERS["web"].url)
    undeploy("web")


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


def local(root: str, count: int) -> WorldVectorEnv:
    env = WorldVectorEnv(count, "rich", root=root, backend="local")
    env.action_space.seed(0)
    return env


# -- who may ask ---------------------------------------------------------------------------------------------------------


def routes(client: Client) -> list[tuple[str, str]]:
    schema = client("GET", "/openapi.json").json()
    found = [(method.upper(), path.replace("{session}", "0" * 32)) for path, operations in schema["paths"].items() for method in operations]
    assert len(found) == 6
    return [*found, ("GET", "/openapi.json"), ("GET", "/docs"), ("GET", "/nowhere"), ("PUT", "/v1/step"), ("POST", "/health"), ("GET", "/-/routes")]


def test_every_route_wants_the_token(client: Client) -> None:
    wrong = [None, "", "Bearer", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", TOKEN, "Bearer é".encode("latin-1")]
    for method, path in routes(client):
        for header in wrong:
            reply = requests.request(method, client.url + path, headers={} if header is None else {"Authorization": header}, timeout=30)
            if (method, path) == ("GET", "/health"):
                assert reply.status_code == 200
                continue
            assert reply.status_code == 401, (method, path, header)
            assert reply.headers["WWW-Authenticate"] == "Bearer"
            assert "Authorization: Bearer <token>" in reply.json()["detail"]
        assert client(method, path).status_code not in (401, 500), (method, path)


def test_compared_in_constant_time(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    compare = ingress.hmac.compare_digest
    monkeypatch.setattr(ingress.hmac, "compare_digest", lambda a, b: (compared.append((a, b)), compare(a, b))[1])
    assert Client(client.url, "wrong").__call__("GET", "/v1/world").status_code == 401
    assert client("GET", "/v1/world").status_code == 200
    assert compared == [(b"wrong", TOKEN.encode()), (TOKEN.encode(), TOKEN.encode())]


def raw(client: Client, head: str, body: bytes = b"") -> bytes:
    """What is answered to a request whose body need not be as long as it says."""
    host, port = client.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as line:
        line.sendall(head.replace("\n", "\r\n").encode("latin-1") + b"\r\n" + body)
        return line.recv(4096)


def test_strangers_send_no_body(client: Client) -> None:
    """The 401 is there while the body is not."""
    for path in ("/v1/call", "/v1/step", "/nowhere"):
        assert raw(client, f"POST {path} HTTP/1.1\nHost: x\nContent-Length: 1000\n").startswith(b"HTTP/1.1 401")


def test_strange_heads(client: Client) -> None:
    """Header bytes that are no UTF-8, a head without an end, and no HTTP at all."""
    for name in ("x-request-id", "x-request-timeout-seconds", "x-session-id", "authorization", "content-type"):
        assert raw(client, f"GET /v1/world HTTP/1.1\nHost: x\n{name}: ÿ\n").startswith(b"HTTP/1.1 401"), name
    host, port = client.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as line, pytest.raises(ConnectionError):
        line.sendall(b"GET /v1/world HTTP/1.1\r\n")
        for _ in range(10_000):
            line.sendall(b"x: " + b"y" * (1 << 12) + b"\r\n")
    assert raw(client, "\x16\x03\x01\n").startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize(("path", "limit"), [("/v1/call", 1 << 24), ("/v1/step", 1 << 20)])
def test_too_large(client: Client, path: str, limit: int) -> None:
    known = f"POST {path} HTTP/1.1\nHost: x\nAuthorization: Bearer {TOKEN}\n"
    assert raw(client, f"{known}Content-Length: {limit + 1}\n").startswith(b"HTTP/1.1 413"), "by what it says"
    chunked = client("POST", path, data=iter([b"[" * (1 << 18)] * (limit >> 18) + [b"x"]), headers={"Content-Type": "application/json"})
    assert chunked.status_code == 413 and chunked.json()["detail"] == f"the body is larger than {limit >> 20} MiB; send fewer environments at once"
    assert client("POST", path, data=b"[" * (limit >> 2), headers={"Content-Type": "application/json"}).status_code == 400, "within the limit"


# -- what is answered ----------------------------------------------------------------------------------------------------


def test_world(client: Client, root: str) -> None:
    told = client("GET", "/v1/world").json()
    assert (told["world"], told["members"], told["memory"], told["durations"], told["task"]) == ("rich", 3, 6, False, ["room"])
    from mesocosm.data.spaces import space_from_json

    assert space_from_json(told["action_space"]) == ACTION and space_from_json(told["observation_space"]) == OBSERVATION


def test_episode(client: Client, root: str) -> None:
    """JSON all the way gives the bits of the same world in process: over ends of episodes, a context's rebuilding and a second reset."""
    env = local(root, 3)
    session, ended = None, 0
    for number in (5, None):
        reply = client("POST", "/v1/reset", json={"num_envs": 3, "seed": number} if session is None else {"session": session}).json()
        session = reply["session"]
        assert (reply["world"], reply["task"]) == ("rich", [{}, {}, {}])
        assert reply["observation"] == observations(env, env.reset(seed=number)[0])
        for step in range(20):
            batch = env.action_space.sample()
            reply = client("POST", "/v1/step", json={"session": session, "action": actions(env, batch)}).json()
            observation, reward, terminated, truncated, infos = env.step(batch)
            assert reply["observation"] == observations(env, observation), step
            expected = {
                "reward": reward,
                "terminated": terminated,
                "truncated": truncated,
                "disagreement": infos["disagreement"],
                "diverged": infos["diverged"],
            }
            assert {name: reply[name] for name in expected} == {name: value.tolist() for name, value in expected.items()}
            assert reply["duration"] is None
            ended += int(terminated.sum())
    assert ended > 3
    assert client("DELETE", f"/v1/sessions/{session}").status_code == 204
    assert client("DELETE", f"/v1/sessions/{session}").status_code == 404


def kill(connection: Any) -> None:
    """The replica that it leads to."""
    assert isinstance(connection, Served) and connection.replica is not None
    os.kill(connection.replica["pid"], signal.SIGKILL)


class OverHttp:
    """A client's connection that posts its messages."""

    def __init__(self, client: Client):
        self.client = client
        self.number = 0

    def call(self, request: dict[str, Any]) -> dict[str, Any]:
        self.number += 1
        reply = self.client("POST", "/v1/call", data=pack(request | {"number": self.number}), headers={"Content-Type": "application/octet-stream"})
        if reply.status_code != 200:
            return {"error": reply.json()["detail"], "kind": "usage" if reply.status_code == 400 else "failed"}
        told = unpack(reply.content)
        assert told.pop("number") == self.number
        return told

    def close(self, last: dict[str, Any] | None = None) -> None:
        if last is not None:
            self.call(last)


def test_binary(client: Client, root: str) -> None:
    """A whole client over POST /v1/call: the same bits, also where its replica is killed on the way."""
    env, here = WorldVectorEnv(4, "rich", app="web"), local(root, 4)
    env.close()
    env.closed = False
    env._connection = OverHttp(client)
    for step, batch in enumerate([None] + [here.action_space.sample() for _ in range(16)]):
        if step == 9:
            kill(LISTENERS["web"]._visitors.connections.get(env._routed).value)  # type: ignore[union-attr]
        ours, theirs = (each.reset(seed=2) if step == 0 else each.step(batch) for each in (env, here))
        assert observations(here, ours[0]) == observations(here, theirs[0])
        for one, other in zip(ours[1:4], theirs[1:4], strict=True):
            assert step == 0 or one.tobytes() == other.tobytes()
    env.close()


def test_killed_replica(client: Client, root: str) -> None:
    """A person's session outlives its replica, bit for bit."""
    env = local(root, 2)
    env.reset(seed=3)
    session = client.begin(2, seed=3)
    for step in range(12):
        if step == 8:
            kill(LISTENERS["web"]._visitors.sessions.get(session).value._connection)  # type: ignore[union-attr]
        batch = env.action_space.sample()
        reply = client("POST", "/v1/step", json={"session": session, "action": actions(env, batch)})
        assert reply.status_code == 200, reply.text
        assert reply.json()["observation"] == observations(env, env.step(batch)[0]), step


def test_oldest_session_goes(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """By number and by environments; one that is used stays."""
    kept = LISTENERS["web"]._visitors.sessions  # type: ignore[union-attr]
    kept.clear()
    monkeypatch.setattr(kept, "count", 2)
    first, second = client.begin(), client.begin()
    assert client("POST", "/v1/reset", json={"session": first}).status_code == 200
    third = client.begin()
    assert [client("POST", "/v1/reset", json={"session": each}).status_code for each in (first, second, third)] == [200, 404, 200]
    gone = client("POST", "/v1/reset", json={"session": second}).json()["detail"]
    assert gone == f"session {second!r} is not kept here; begin one with POST /v1/reset"
    monkeypatch.setattr(kept, "count", 64)
    monkeypatch.setattr(kept, "weight", 10)
    large = client.begin(9)
    assert [client("POST", "/v1/reset", json={"session": each}).status_code for each in (first, third, large)] == [404, 200, 200]


def action(**other: Any) -> dict[str, Any]:
    return {"push": [0.5, 0.7], "turn": -1, "hands": [1, 2], "say": "a-"} | other


WRONG: list[tuple[str, Any]] = [
    ("action.0.push.0=nan: input should be a finite number", [action(push=[float("nan"), 0])]),
    ("action.0.push.1=inf: input should be a finite number", [action(push=[0, float("inf")])]),
    ("action.0.push.1=0.71: input should be less than or equal to 0.7", [action(push=[0, 0.71])]),
    ("action.0.push=[0, 0, 0]: ", [action(push=[0, 0, 0])]),
    ("action.0.push.1: field required", [action(push=[0])]),
    ("action.0.push=0: ", [action(push=0)]),
    ("action.0.push.0=True: ", [action(push=[True, 0])]),
    ("action.0.turn=2: input should be less than or equal to 1", [action(turn=2)]),
    ("action.0.turn='1': input should be a valid integer", [action(turn="1")]),
    ("action.0.turn=0.5: input should be a valid integer", [action(turn=0.5)]),
    ("action.0.hands.1=3: ", [action(hands=[0, 3])]),
    ("action.0.say='ac': ", [action(say="ac")]),
    ("action.0.say='abab': ", [action(say="abab")]),
    ("action.0.jump=1: extra inputs are not permitted", [action(jump=1)]),
    ("action.0.turn: field required", [{name: value for name, value in action().items() if name != "turn"}]),
    ("action=[]: ", []),
    ("action=nothing: ", None),
    ("action has 2 items where the session has 1 environments; give one to each", [action()] * 2),
]


@pytest.mark.parametrize(("said", "given"), WRONG, ids=[said.split(":")[0] for said, _ in WRONG])
def test_wrong_actions(client: Client, said: str, given: Any) -> None:
    """400, with where, what and why; and the session is as it was."""
    session = client.begin()
    reply = client("POST", "/v1/step", data=json.dumps({"session": session, "action": given}), headers={"Content-Type": "application/json"})
    assert reply.status_code == 400 and list(reply.json()) == ["detail"]
    assert reply.json()["detail"].startswith(said) and "Traceback" not in reply.text
    assert client("POST", "/v1/step", json={"session": session, "action": [action()]}).status_code == 200


@pytest.mark.parametrize(
    ("said", "body"),
    [
        ("num_envs=0: input should be greater than or equal to 1", b'{"num_envs": 0}'),
        ("num_envs=4097: input should be less than or equal to 4096", b'{"num_envs": 4097}'),
        ("num_envs=True: ", b'{"num_envs": true}'),
        ("seed=-1: ", b'{"seed": -1}'),
        ("seed=1.5: ", b'{"seed": 1.5}'),
        ("seed=nan: ", b'{"seed": NaN}'),
        ("session='x': ", b'{"session": "x"}'),
        ("sede=1: extra inputs are not permitted", b'{"sede": 1}'),
        ("session='\\ud800': ", b'{"session": "\\ud800"}'),
        ("the body='\\ud800': ", b'{"\\ud800": 1}'),
        ("the body is not JSON", b"{"),
        ("there was an error parsing the body", b"\xff"),
        ("there was an error parsing the body", b'{"seed": ' + b"9" * 5000 + b"}"),
        ("there was an error parsing the body", b"[" * 200_000),
        ("the body", b""),
        ("the body=[]: ", b"[]"),
    ],
)
def test_wrong_bodies(client: Client, said: str, body: bytes) -> None:
    reply = client("POST", "/v1/reset", data=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400 and reply.json()["detail"].lower().startswith(said.lower()), reply.text


def test_wrong_num_envs(client: Client) -> None:
    reply = client("POST", "/v1/reset", json={"session": client.begin(2), "num_envs": 3})
    assert (reply.status_code, reply.json()["detail"]) == (
        400,
        "num_envs=3 where the session has 2; leave num_envs out, or leave session out for a new one",
    )


def test_unknown_session(client: Client) -> None:
    reply = client("POST", "/v1/step", json={"session": "0" * 32, "action": [action()]})
    assert reply.status_code == 404 and "begin one with POST /v1/reset" in reply.json()["detail"]
    assert client("POST", "/v1/reset", json={"session": "0" * 32}).status_code == 404


def test_a_bug_shows_nothing(client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A bug here, or on a replica: 500, one sentence, and the rest in the log."""

    def fail(*_: Any) -> None:
        raise RuntimeError("inner workings")

    monkeypatch.setattr(visitors.Visitors, "reset", fail)
    reply = client("POST", "/v1/reset", json={})
    assert (reply.status_code, reply.json()) == (500, {"detail": "the server failed on this request, which is a bug; its log says where"})
    assert "inner workings" in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr(Served, "call", lambda *_: {"error": "the replica failed: KeyError: 'inner'", "kind": "bug"})
    for method, path, body in (("POST", "/v1/reset", b"{}"), ("POST", "/v1/call", pack({"op": "end", "session": "", "number": 1}))):
        reply = client(method, path, data=body, headers={"Content-Type": "application/json"})
        assert reply.status_code == 500 and "inner" not in reply.text


# -- programs that err ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def messages(root: str) -> list[dict[str, Any]]:
    """A good message of every operation, as a client sends it; one session's, in order."""
    env = local(root, 2)
    told: list[dict[str, Any]] = []
    send = env._connection.call  # type: ignore[union-attr]
    env._connection.call = lambda request: (told.append(request), send(request))[1]  # type: ignore[method-assign, union-attr]
    env.reset(seed=0, options={"world": "rich"})
    for _ in range(3):
        env.step(env.action_space.sample())
    sessions = env._connection.sessions  # type: ignore[union-attr]
    sessions._sessions.clear()
    env.step(env.action_space.sample())
    told.append({"op": "end", "session": env._session})
    kept = {"describe": {"op": "describe", "world": ""}} | {message["op"]: message for message in reversed(told)}
    order = ["describe", "begin", "step", "restore", "end"]
    assert sorted(kept) == sorted(order)
    return [{name: value.copy() if isinstance(value, np.ndarray) else value for name, value in kept[op].items()} for op in order]


def send(client: Client, data: bytes) -> requests.Response:
    return client("POST", "/v1/call", data=data, headers={"Content-Type": "application/octet-stream"})


def damaged(value: Any) -> list[Any]:
    """What no field that holds `value` may be."""
    if not isinstance(value, np.ndarray):
        return [None, [], {}, True, *(["x"] if not isinstance(value, str) else [7]), *([1 << 70, -(1 << 70), 0.5] if isinstance(value, int) else [])]
    found: list[Any] = ["x", None, 3, value[None], np.zeros((0, *value.shape), value.dtype)]
    found += [value.astype(other) for other in (np.float32, np.int64, np.bool_) if other != value.dtype]
    if value.ndim:
        found += [value[:-1], np.concatenate([value, value])]
    if value.dtype == np.float32 and value.size:
        found += [np.full_like(value, np.nan), np.full_like(value, -np.inf)]
    return found


def test_damaged_messages(client: Client, messages: list[dict[str, Any]]) -> None:
    """Every field of every message missing, of another type, shape or range: 400 with its name, and the session goes on."""
    for message in messages:
        if message["op"] == "step":
            assert send(client, pack(messages[1] | {"number": 1})).status_code == 200, "it begins again"
        for name, value in message.items():
            without = {other: kept for other, kept in message.items() if other != name}
            wrong = [without] + [message | {name: bad} for bad in damaged(value)]
            if name.endswith(".categories") and value.size:
                wrong += [message | {name: value + 1000}, message | {name: value - 1000}]
            for bad in wrong:
                reply = send(client, pack(bad | {"number": 1}))
                smaller = (message["op"], name) == ("begin", "episode") and np.shape(bad.get(name)) in ((1,), (4,)) and bad[name].dtype == np.int64
                assert reply.status_code == (200 if smaller else 400), (message["op"], name, bad.get(name), reply.content[:200])
                if not smaller and name != "op":
                    assert re.search(re.escape(name.split(".")[0]), reply.json()["detail"]), (name, reply.text)
                    assert "replica failed" not in reply.text
        assert send(client, pack(message | {"number": 1})).status_code == 200, "whole again"
    for bad in (messages[0] | {"world": "/etc"}, messages[0] | {"world": "../secret"}):
        assert "is a path; name a world by its artifact id" in send(client, pack(bad | {"number": 1})).json()["detail"]
    assert "number=None must be an integer" in send(client, pack(messages[0])).json()["detail"]
    many = messages[1] | {"episode": np.zeros(4097, np.int64), "number": 1}
    assert "beyond the limit of 4096" in send(client, pack(many)).json()["detail"]


def test_damaged_bytes(client: Client, messages: list[dict[str, Any]]) -> None:
    """Cut anywhere, and with bytes changed anywhere: never a 5xx."""
    random = np.random.default_rng(0)
    for message in messages:
        whole = pack(message | {"number": 1})
        for cut in {0, 3, 7, 8, 20, *random.integers(0, len(whole), 20).tolist()}:
            assert send(client, whole[:cut]).status_code == 400
        for _ in range(30):
            data = bytearray(whole)
            for at in random.integers(0, len(data), int(random.integers(1, 4))):
                data[at] = random.integers(256)
            reply = send(client, bytes(data))
            assert reply.status_code in (200, 400), (bytes(data), reply.content)


# -- the fuzzer ----------------------------------------------------------------------------------------------------------


FUZZED = settings(max_examples=40, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}


def fuzz(client: Client, operation: Any) -> set[int]:
    """Ask one operation of the schema; gives the statuses seen. Half of the steps name a session that exists, of as many environments."""
    seen: set[int] = set()

    @seed(0)
    @FUZZED
    @given(case=st.one_of([operation.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode]), known=st.booleans())
    def ask(case: Any, known: bool) -> None:
        if known and operation.path == "/v1/step" and isinstance(case.body, dict) and isinstance(case.body.get("action"), list):
            case.body["session"] = client.begin(max(len(case.body["action"]), 1))
        reply = case.call(headers=AUTHORIZED, timeout=60)
        seen.add(reply.status_code)
        assert reply.status_code < 500, reply.text
        # OpenAPI cannot say which bytes are a message, so that these bytes are mostly refused.
        case.validate_response(reply, headers=AUTHORIZED, excluded_checks=[positive_data_acceptance] if operation.path == "/v1/call" else [])

    ask()
    return seen


def test_fuzz(client: Client) -> None:
    """schemathesis over the running server, with what the schema allows and what it does not: no 5xx, and every reply is of the schema."""
    schema = schemathesis.openapi.from_dict(client("GET", "/openapi.json").json())
    schema.config.update(base_url=client.url)
    seen = {result.ok().path: fuzz(client, result.ok()) for result in schema.get_all_operations()}
    assert len(seen) == 6 and all({200, 400} <= seen[path] for path in ("/v1/reset", "/v1/step")), seen


# -- where it listens, and how it ends -----------------------------------------------------------------------------------


def listening() -> set[int]:
    """Ports on which this process listens."""
    return {found.laddr.port for found in psutil.Process().net_connections("tcp") if found.status == psutil.CONN_LISTEN}


def test_loopback_alone_and_no_grpc(client: Client, root: str) -> None:
    """The one port is on loopback, and Serve's own proxy, which is its HTTP and its gRPC ingress, never starts."""
    from ray import serve

    port = int(client.url.rsplit(":", 1)[1])
    addresses = {found.laddr.ip for found in psutil.Process().net_connections("tcp") if found.status == psutil.CONN_LISTEN and found.laddr.port == port}
    assert addresses == {"127.0.0.1"}
    assert serve.status().proxies == {}
    before = listening()
    deploy(ServeConfig(world="rich", name="plain", cpus=0.5, storage=StorageConfig(root)))
    try:
        assert listening() == before and "plain" not in LISTENERS
        assert serve.status().proxies == {}
    finally:
        undeploy("plain")


def test_a_port_that_is_taken(client: Client, root: str) -> None:
    from ray import serve

    port = int(client.url.rsplit(":", 1)[1])
    with pytest.raises(UsageError, match=rf"serve.http={port}: the port is taken on 127.0.0.1; set serve.http to another one"):
        deploy(ServeConfig(world="rich", name="second", http=port, storage=StorageConfig(root)))
    assert "second" not in serve.status().applications
    with pytest.raises(UsageError, match=r"serve.http=70000 is no port"):
        deploy(ServeConfig(world="rich", name="second", http=70000, storage=StorageConfig(root)))
    with pytest.raises(UsageError, match=r"serve.http=0 with serve.world=''"):
        deploy(ServeConfig(name="second", http=0, storage=StorageConfig(root)))


def test_job(root: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`serve http=0` prints a curl that works, whose file it made; no file of the run or of Ray has the token; the port closes with the job."""
    import ray

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MESOCOSM_WORLD_TOKEN", raising=False)
    config = ServeConfig(world="rich", name="job", cpus=0.5, http=0, storage=StorageConfig(root))
    answers: list[Any] = []

    def visit() -> None:
        log = Path(root) / "runs/serve/visited/log.txt"
        try:
            while not log.exists() or "curl" not in log.read_text():
                time.sleep(0.1)
            command = next(line for line in log.read_text().splitlines() if "curl" in line).strip()
            answers.append(json.loads(subprocess.run(command, shell=True, capture_output=True, timeout=60).stdout)["world"])
            answers.append(LISTENERS["job"].url)
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    visitor = threading.Thread(target=visit)
    visitor.start()
    with tracking.start("serve", config, id="visited", quiet=True) as job:
        serve_job.run(config, job)
    visitor.join()
    assert answers[0] == "rich" and "job" not in LISTENERS
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{answers[1]}/health", timeout=5)
    file = tmp_path / ".mesocosm/world_token"
    token = file.read_bytes().strip()
    assert len(token) > 30 and file.stat().st_mode & 0o777 == 0o600
    assert str(file) in (Path(root) / "runs/serve/visited/log.txt").read_text()
    read = 0
    for folder in (Path(root) / "runs", Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"):
        for found in folder.rglob("*"):
            if found.is_file():
                read += 1
                text = found.read_bytes()
                assert token not in text and TOKEN.encode() not in text, found
    assert read > 10


@pytest.mark.slow
def test_nobody_answers(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An application that ended under the ingress: 503 with a sentence, in bounded time."""
    from ray import serve

    monkeypatch.setenv("MESOCOSM_WORLD_TOKEN", TOKEN)
    monkeypatch.setattr(visitors, "DEADLINE_S", 2.0)
    deploy(ServeConfig(world="rich", name="brief", cpus=0.5, http=0, storage=StorageConfig(root)))
    try:
        client = Client(LISTENERS["brief"].url)
        session = client.begin()
        assert client("GET", "/health").status_code == 200
        serve.delete("brief")
        time.sleep(ingress.HEALTH_S)
        assert client("GET", "/health").status_code == 503
        for method, path, body in (
            ("POST", "/v1/step", {"session": session, "action": [action()]}),
            ("POST", "/v1/reset", {"session": session}),
            ("POST", "/v1/reset", {}),
        ):
            reply = client(method, path, json=body)
            assert reply.status_code == 503 and re.search("no replica answered for 2 s|no world application 'brief'", reply.json()["detail"]), reply.text
        reply = client("POST", "/v1/step", json={"session": session, "action": [action()]})
        assert (reply.status_code, reply.json()["detail"]) == (400, "the session's last reset failed; POST /v1/reset with it again")
    finally:
        undeploy("brief")


# -- the token -----------------------------------------------------------------------------------------------------------


def test_token_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MESOCOSM_WORLD_TOKEN", TOKEN)
    assert read_token() == (TOKEN.encode(), "$MESOCOSM_WORLD_TOKEN")
    assert list(tmp_path.iterdir()) == []
    for bad in ("", "short", "with a space in the middle", "nöt of ASCII characters"):
        monkeypatch.setenv("MESOCOSM_WORLD_TOKEN", bad)
        with pytest.raises(UsageError, match="MESOCOSM_WORLD_TOKEN must hold at least 16 visible ASCII characters") as refused:
            read_token()
        assert not bad or bad not in str(refused.value)


def test_token_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Made once, with mode 0600; what others can use, or somebody put there, is refused."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MESOCOSM_WORLD_TOKEN", raising=False)
    token, source = read_token()
    file = tmp_path / ".mesocosm/world_token"
    assert source == str(file) and file.stat().st_mode & 0o777 == 0o600 and file.read_bytes().strip() == token
    assert read_token()[0] == token and [each.name for each in file.parent.iterdir()] == ["world_token"]
    for mode in (0o640, 0o604, 0o620):
        file.chmod(mode)
        with pytest.raises(UsageError, match=rf"world_token has mode {mode:04o}, with which others can use it; run `chmod 600 {file}`"):
            read_token()
    file.chmod(0o600)
    file.write_text("")
    with pytest.raises(UsageError, match="world_token must hold at least 16 visible"):
        read_token()
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="world_token cannot be read"):
        read_token()
    assert not (tmp_path / "elsewhere").exists()
    file.unlink()
    os.mkfifo(file, 0o600)
    with pytest.raises(UsageError, match="is not a plain file of this user"):
        read_token()
