"""Wrong requests to the HTTP ingress, in JSON, in binary and from a fuzzer: a message each, never a
5xx.
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import positive_data_acceptance

from mesocosm.serve.deployment import LISTENERS
from mesocosm.serve.protocol import pack

from .worlds import local

pytestmark = pytest.mark.usefixtures("ray_local")
Fields = dict[str, Any]


@pytest.fixture(autouse=True)
def sessions_go_at_once(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests leave more sessions than the server has room for."""
    sessions = LISTENERS["web"].sessions
    assert sessions is not None
    monkeypatch.setattr(sessions.sessions, "idle_s", 0.0)


def action(**other: Any) -> list[Fields]:
    return [{"push": [0.5, 0.7], "turn": -1, "hands": [1, 2], "say": "a-"} | other]


NO_TURN = {name: value for name, value in action()[0].items() if name != "turn"}
WRONG_ACTIONS: list[tuple[str, Any]] = [
    ("action.0.push.0=nan: input should be a finite number", action(push=[float("nan"), 0])),
    ("action.0.push.1=inf: input should be a finite number", action(push=[0, float("inf")])),
    ("action.0.push.1=0.71: input should be less than or equal to 0.7", action(push=[0, 0.71])),
    ("action.0.push=[0, 0, 0]: ", action(push=[0, 0, 0])),
    ("action.0.push.1: field required", action(push=[0])),
    ("action.0.push=0: ", action(push=0)),
    ("action.0.push.0=True: ", action(push=[True, 0])),
    ("action.0.turn=2: input should be less than or equal to 1", action(turn=2)),
    ("action.0.turn='1': input should be a valid integer", action(turn="1")),
    ("action.0.turn=0.5: input should be a valid integer", action(turn=0.5)),
    ("action.0.hands.1=3: ", action(hands=[0, 3])),
    ("action.0.say='ac': ", action(say="ac")),
    ("action.0.say='abab': ", action(say="abab")),
    ("action.0.jump=1: extra inputs are not permitted", action(jump=1)),
    ("action.0.turn: field required", [NO_TURN]),
    ("action=[]: ", []),
    ("action=nothing: ", None),
    ("2 actions for num_envs=1", action() * 2),
]


@pytest.mark.parametrize(("message", "given"), WRONG_ACTIONS, ids=[m for m, _ in WRONG_ACTIONS])
def test_wrong_actions(client: Any, message: str, given: Any) -> None:
    """400 with the key, the value and what is expected; the session is unchanged."""
    session = client.begin()
    reply = client.post("/v1/step", json.dumps({"session": session, "action": given}).encode())
    assert reply.status_code == 400 and list(reply.json()) == ["detail"]
    assert reply.json()["detail"].startswith(message) and "Traceback" not in reply.text
    assert client.post("/v1/step", {"session": session, "action": action()}).status_code == 200


UNREADABLE = "there was an error parsing the body"
WRONG_BODIES: list[tuple[str, bytes]] = [
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
    (UNREADABLE, b"\xff"),
    (UNREADABLE, b'{"seed": ' + b"9" * 5000 + b"}"),
    (UNREADABLE, b"[" * 200_000),
    ("the body", b""),
    ("the body=[]: ", b"[]"),
]


@pytest.mark.parametrize(("message", "body"), WRONG_BODIES, ids=range(len(WRONG_BODIES)))
def test_wrong_bodies(client: Any, message: str, body: bytes) -> None:
    reply = client.post("/v1/reset", body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["detail"].lower().startswith(message.lower()), reply.text


def test_wrong_num_envs(client: Any) -> None:
    reply = client.post("/v1/reset", {"session": client.begin(2), "num_envs": 3})
    assert reply.status_code == 400
    assert reply.json()["detail"].startswith("num_envs must be 2, the session's, got 3; ")


def test_unknown_session(client: Any) -> None:
    reply = client.post("/v1/step", {"session": "0" * 32, "action": action()})
    assert reply.status_code == 404 and "begin one with POST /v1/reset" in reply.json()["detail"]
    assert client.post("/v1/reset", {"session": "0" * 32}).status_code == 404


# -- the binary protocol


@pytest.fixture(scope="module")
def valid_requests(rich: str) -> dict[str, Fields]:
    """A valid request of every operation of one session, in order."""
    env = local("rich", rich, 2)
    connection: Any = env._connection
    by_operation: dict[str, Fields] = {"describe": {"op": "describe", "world": ""}}
    call = connection.call

    def record(request: Fields) -> Fields:
        copies = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in request.items()}
        by_operation.setdefault(request["op"], copies)
        return dict(call(request))

    connection.call = record
    env.action_space.seed(0)
    env.reset(seed=0)
    for step in range(4):
        if step == 3:
            connection._sessions.clear()  # so that it is restored
        env.step(env.action_space.sample())
    by_operation["end"] = {"op": "end", "session": env._session}
    assert list(by_operation) == ["describe", "begin", "step", "restore", "end"]
    return by_operation


def send(client: Any, message: Fields | bytes) -> Any:
    data = message if isinstance(message, bytes) else pack(message | {"number": 1})
    return client.post("/v1/call", data, "octet-stream")


def damaged(name: str, value: Any) -> list[Any]:
    """Wrong values of the field `name`, which holds `value`."""
    if not isinstance(value, np.ndarray):
        wrong: list[Any] = [None, [], {}, 7 if isinstance(value, str) else "x"]
        wrong += [] if isinstance(value, bool) else [True]
        return wrong + ([1 << 70, -(1 << 70), 0.5] if isinstance(value, int) else [])
    dtypes = [dtype for dtype in (np.float32, np.int64, np.bool_) if dtype != value.dtype]
    wrong = ["x", None, 3, value[None], np.zeros((0, *value.shape), value.dtype)]
    wrong += [value.astype(dtype) for dtype in dtypes]
    if value.ndim:
        wrong += [value[:-1], np.concatenate([value, value])]
    if value.dtype == np.float32 and value.size:
        wrong += [np.full_like(value, np.nan), np.full_like(value, -np.inf)]
    if name.endswith(".categories") and value.size:
        wrong += [value + 1000, value - 1000]
    return wrong


@pytest.mark.slow
def test_damaged_messages(client: Any, valid_requests: dict[str, Fields]) -> None:
    """Every field missing, of another type, shape or range: 400 with its name, and the session
    continues.
    """
    for op, message in valid_requests.items():
        if op == "step":
            assert send(client, valid_requests["begin"]).status_code == 200, "it begins again"
        for name, value in message.items():
            without = {other: field for other, field in message.items() if other != name}
            for bad in [without, *(without | {name: wrong} for wrong in damaged(name, value))]:
                reply = send(client, bad)
                case = op, name, bad.get(name), reply.content[:200]
                episodes = bad.get(name) if (op, name) == ("begin", "episode") else None
                if np.shape(episodes) in ((1,), (4,)) and episodes.dtype == np.int64:  # type: ignore[union-attr]
                    assert reply.status_code == 200, "another number of environments"
                    continue
                assert reply.status_code == 400, case
                if name != "op":
                    assert name.split(".")[0] in reply.json()["detail"], case
                    assert "replica failed" not in reply.text
        assert send(client, message).status_code == 200, "whole again"


def test_requests_that_only_the_ingress_refuses(
    client: Any, valid_requests: dict[str, Fields]
) -> None:
    describe = valid_requests["describe"]
    many = valid_requests["begin"] | {"episode": np.zeros(4097, np.int64)}
    for message, request in (
        ("world must be an artifact id, not a path", describe | {"world": "/etc"}),
        ("world must be an artifact id, not a path", describe | {"world": "../secret"}),
        ("number must be an integer, got number=None", pack(describe)),
        ("must have at most 4096 environments", many),
    ):
        assert message in send(client, request).json()["detail"]


@pytest.mark.slow
def test_damaged_bytes(client: Any, valid_requests: dict[str, Fields]) -> None:
    """Cut anywhere, and with bytes changed anywhere: never a 5xx."""
    random = np.random.default_rng(0)
    for message in valid_requests.values():
        whole = pack(message | {"number": 1})
        for cut in {0, 3, 7, 8, 20, *random.integers(0, len(whole), 20).tolist()}:
            padding = cut > len(whole) - 8
            assert send(client, whole[:cut]).status_code == 400 or padding
        for _ in range(30):
            data = bytearray(whole)
            for at in random.integers(0, len(data), int(random.integers(1, 4))):
                data[at] = random.integers(256)
            reply = send(client, bytes(data))
            assert reply.status_code in (200, 400), (bytes(data), reply.content)


# -- the fuzzer

PHASES: Any = {"phases": [Phase.generate], "suppress_health_check": list(HealthCheck)}
FUZZED = settings(max_examples=40, deadline=None, database=None, **PHASES)


def fuzz(client: Any, operation: Any) -> set[int]:
    """Call one operation of the schema and return the statuses. Half of the steps name an existing
    session with as many environments.
    """
    statuses: set[int] = set()
    authorized = {"Authorization": client.session.headers["Authorization"]}
    cases = [operation.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode]
    # OpenAPI cannot say which bytes are a message, so that these bytes are mostly refused.
    excluded: Any = [positive_data_acceptance] if operation.path == "/v1/call" else []

    @seed(0)
    @FUZZED
    @given(case=st.one_of(cases), known=st.booleans())
    def ask(case: Any, known: bool) -> None:
        body = case.body if known and isinstance(case.body, dict) else {}
        valid_id = re.fullmatch("[0-9a-f]{32}", str(body.get("session")))
        if operation.path == "/v1/step" and valid_id and isinstance(body.get("action"), list):
            body["session"] = client.begin(max(len(body["action"]), 1))
        reply = case.call(headers=authorized, timeout=60)
        statuses.add(reply.status_code)
        assert reply.status_code < 500, reply.text
        case.validate_response(reply, headers=authorized, excluded_checks=excluded)

    ask()
    return statuses


def test_fuzz(client: Any) -> None:
    """schemathesis against the running server, with valid and invalid requests.

    No reply is a 5xx, and every reply matches the schema.
    """
    schema = schemathesis.openapi.from_dict(client("GET", "/openapi.json").json())
    schema.config.update(base_url=client.url)
    operations = [result.ok() for result in schema.get_all_operations()]
    statuses = {operation.path: fuzz(client, operation) for operation in operations}
    assert len(statuses) == 14
    assert all({200, 400} <= statuses[path] for path in ("/v1/reset", "/v1/step")), statuses
