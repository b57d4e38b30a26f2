"""Wrong requests to the HTTP ingress, in JSON, in binary and from a fuzzer: a message each, never a
5xx.
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import positive_data_acceptance

from mesocosm.serve.client import WorldVectorEnv
from mesocosm.serve.deployment import LISTENERS
from mesocosm.serve.protocol import pack

pytestmark = pytest.mark.usefixtures("ray_local")


@pytest.fixture(autouse=True)
def sessions_go_at_once(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests leave more sessions than the server has room for."""
    sessions = LISTENERS["web"].sessions
    assert sessions is not None
    monkeypatch.setattr(sessions.sessions, "idle_s", 0.0)


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
    (
        "action.0.turn: field required",
        [{name: value for name, value in action().items() if name != "turn"}],
    ),
    ("action=[]: ", []),
    ("action=nothing: ", None),
    ("action must have 1 items, one per environment, got 2", [action()] * 2),
]


@pytest.mark.parametrize(
    ("message", "given"), WRONG, ids=[message.split(":")[0] for message, _ in WRONG]
)
def test_wrong_actions(client: Any, message: str, given: Any) -> None:
    """400 with the key, the value and what is expected; the session is unchanged."""
    session = client.begin()
    reply = client(
        "POST",
        "/v1/step",
        data=json.dumps({"session": session, "action": given}),
        headers={"Content-Type": "application/json"},
    )
    assert reply.status_code == 400 and list(reply.json()) == ["detail"]
    assert reply.json()["detail"].startswith(message) and "Traceback" not in reply.text
    assert (
        client("POST", "/v1/step", json={"session": session, "action": [action()]}).status_code
        == 200
    )


@pytest.mark.parametrize(
    ("message", "body"),
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
def test_wrong_bodies(client: Any, message: str, body: bytes) -> None:
    reply = client("POST", "/v1/reset", data=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400 and reply.json()["detail"].lower().startswith(
        message.lower()
    ), reply.text


def test_wrong_num_envs(client: Any) -> None:
    reply = client("POST", "/v1/reset", json={"session": client.begin(2), "num_envs": 3})
    assert (reply.status_code, reply.json()["detail"]) == (
        400,
        (
            "num_envs must be 2, the session's, got 3; leave num_envs out, or leave session out"
            " for a new one"
        ),
    )


def test_unknown_session(client: Any) -> None:
    reply = client("POST", "/v1/step", json={"session": "0" * 32, "action": [action()]})
    assert reply.status_code == 404 and "begin one with POST /v1/reset" in reply.json()["detail"]
    assert client("POST", "/v1/reset", json={"session": "0" * 32}).status_code == 404


# -- the binary protocol


@pytest.fixture(scope="module")
def valid_requests(rich: str) -> list[dict[str, Any]]:
    """A valid request of every operation of one session, in order."""
    env = WorldVectorEnv(2, "rich", root=rich, backend="local")
    env.action_space.seed(0)
    requests_sent: list[dict[str, Any]] = []
    send = env._connection.call  # type: ignore[union-attr]
    env._connection.call = lambda request: (requests_sent.append(request), send(request))[1]  # type: ignore[method-assign, union-attr]
    env.reset(seed=0, options={"world": "rich"})
    for _ in range(3):
        env.step(env.action_space.sample())
    sessions = env._connection.sessions  # type: ignore[union-attr]
    sessions._sessions.clear()
    env.step(env.action_space.sample())
    requests_sent.append({"op": "end", "session": env._session})
    by_operation = {"describe": {"op": "describe", "world": ""}} | {
        message["op"]: message for message in reversed(requests_sent)
    }
    order = ["describe", "begin", "step", "restore", "end"]
    assert sorted(by_operation) == sorted(order)
    return [
        {
            name: value.copy() if isinstance(value, np.ndarray) else value
            for name, value in by_operation[op].items()
        }
        for op in order
    ]


def send(client: Any, data: bytes) -> requests.Response:
    return client(
        "POST", "/v1/call", data=data, headers={"Content-Type": "application/octet-stream"}
    )


def damaged(value: Any) -> list[Any]:
    """Wrong values of a field that holds `value`."""
    if not isinstance(value, np.ndarray):
        return [
            None,
            [],
            {},
            True,
            *(["x"] if not isinstance(value, str) else [7]),
            *([1 << 70, -(1 << 70), 0.5] if isinstance(value, int) else []),
        ]
    wrong: list[Any] = ["x", None, 3, value[None], np.zeros((0, *value.shape), value.dtype)]
    wrong += [
        value.astype(other) for other in (np.float32, np.int64, np.bool_) if other != value.dtype
    ]
    if value.ndim:
        wrong += [value[:-1], np.concatenate([value, value])]
    if value.dtype == np.float32 and value.size:
        wrong += [np.full_like(value, np.nan), np.full_like(value, -np.inf)]
    return wrong


def test_damaged_messages(client: Any, valid_requests: list[dict[str, Any]]) -> None:
    """Every field missing, of another type, shape or range: 400 with its name, and the session
    continues.
    """
    for message in valid_requests:
        if message["op"] == "step":
            assert send(client, pack(valid_requests[1] | {"number": 1})).status_code == 200, (
                "it begins again"
            )
        for name, value in message.items():
            without = {other: field for other, field in message.items() if other != name}
            wrong = [without] + [message | {name: bad} for bad in damaged(value)]
            if name.endswith(".categories") and value.size:
                wrong += [message | {name: value + 1000}, message | {name: value - 1000}]
            for bad in wrong:
                reply = send(client, pack(bad | {"number": 1}))
                smaller = (
                    (message["op"], name) == ("begin", "episode")
                    and np.shape(bad.get(name)) in ((1,), (4,))
                    and bad[name].dtype == np.int64
                )
                assert reply.status_code == (200 if smaller else 400), (
                    message["op"],
                    name,
                    bad.get(name),
                    reply.content[:200],
                )
                if not smaller and name != "op":
                    assert re.search(re.escape(name.split(".")[0]), reply.json()["detail"]), (
                        name,
                        reply.text,
                    )
                    assert "replica failed" not in reply.text
        assert send(client, pack(message | {"number": 1})).status_code == 200, "whole again"
    for bad in (valid_requests[0] | {"world": "/etc"}, valid_requests[0] | {"world": "../secret"}):
        assert (
            "world must be an artifact id, not a path"
            in send(client, pack(bad | {"number": 1})).json()["detail"]
        )
    assert (
        "number must be an integer, got number=None"
        in send(client, pack(valid_requests[0])).json()["detail"]
    )
    many = valid_requests[1] | {"episode": np.zeros(4097, np.int64), "number": 1}
    assert "must have at most 4096 environments" in send(client, pack(many)).json()["detail"]


def test_damaged_bytes(client: Any, valid_requests: list[dict[str, Any]]) -> None:
    """Cut anywhere, and with bytes changed anywhere: never a 5xx."""
    random = np.random.default_rng(0)
    for message in valid_requests:
        whole = pack(message | {"number": 1})
        for cut in {0, 3, 7, 8, 20, *random.integers(0, len(whole), 20).tolist()}:
            assert send(client, whole[:cut]).status_code == 400 or cut > len(whole) - 8, (
                "but for the last padding"
            )
        for _ in range(30):
            data = bytearray(whole)
            for at in random.integers(0, len(data), int(random.integers(1, 4))):
                data[at] = random.integers(256)
            reply = send(client, bytes(data))
            assert reply.status_code in (200, 400), (bytes(data), reply.content)


# -- the fuzzer


FUZZED = settings(
    max_examples=40,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def fuzz(client: Any, operation: Any) -> set[int]:
    """Call one operation of the schema and return the statuses. Half of the steps name an existing
    session with as many environments.
    """
    seen: set[int] = set()
    authorized = {"Authorization": client.session.headers["Authorization"]}

    @seed(0)
    @FUZZED
    @given(
        case=st.one_of(
            [operation.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode]
        ),
        known=st.booleans(),
    )
    def ask(case: Any, known: bool) -> None:
        body = case.body if isinstance(case.body, dict) else {}
        if (
            known
            and operation.path == "/v1/step"
            and re.fullmatch("[0-9a-f]{32}", str(body.get("session")))
            and isinstance(body.get("action"), list)
        ):
            body["session"] = client.begin(max(len(body["action"]), 1))
        reply = case.call(headers=authorized, timeout=60)
        seen.add(reply.status_code)
        assert reply.status_code < 500, reply.text
        # OpenAPI cannot say which bytes are a message, so that these bytes are mostly refused.
        case.validate_response(
            reply,
            headers=authorized,
            excluded_checks=[positive_data_acceptance] if operation.path == "/v1/call" else [],
        )

    ask()
    return seen


def test_fuzz(client: Any) -> None:
    """schemathesis against the running server, with valid and invalid requests.

    No reply is a 5xx, and every reply matches the schema.
    """
    schema = schemathesis.openapi.from_dict(client("GET", "/openapi.json").json())
    schema.config.update(base_url=client.url)
    seen = {result.ok().path: fuzz(client, result.ok()) for result in schema.get_all_operations()}
    assert len(seen) == 6 and all({200, 400} <= seen[path] for path in ("/v1/reset", "/v1/step")), (
        seen
    )
