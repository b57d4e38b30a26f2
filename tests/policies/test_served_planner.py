"""The op `plan`: the same bits on every replica, over the wire and over HTTP, and its refusals."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from gymnasium import spaces
from serve.worlds import BOX, TWO, bits, untrained

from mesocosm.errors import UsageError
from mesocosm.policies import planner
from mesocosm.policies.plan_state import PlanSize
from mesocosm.policies.planner_policy import PlannerPolicy
from mesocosm.serve import plan_route
from mesocosm.serve.ingress import handle_errors
from mesocosm.serve.plan_route import add_route
from mesocosm.serve.plans import PlanServer, ServedPlans
from mesocosm.serve.protocol import pack, unpack
from mesocosm.serve.session import Sessions
from mesocosm.store.artifacts import Storage

from .stored import AGENT, OLD, WORLD, store


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few plans: the bits are the same question."""
    monkeypatch.setattr(planner, "ALONE", PlanSize(2, 4, 2))


class Replicas:
    """Replicas of one served planner, which answer in turn, through bytes."""

    def __init__(self, storage: Storage, world: Any, agent: str | None, count: int = 2):
        plans = [PlanServer(storage, "w", world, agent) for _ in range(count)]
        self.replicas = [Sessions(lambda _: ("w", world), 4, server) for server in plans]
        self.calls = 0

    def call(self, request: Any) -> Any:
        self.calls += 1
        sessions = self.replicas[self.calls % len(self.replicas)]
        return unpack(pack(sessions.call(unpack(pack(request)))))

    def close(self, last: Any = None) -> None: ...


def observed(world: Any, batch: int, count: int) -> list[Any]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=(batch, 3)).astype(np.float32) for _ in range(count)]


@pytest.mark.parametrize("family", ["ensemble", "sequence"])
def test_any_replica_gives_the_bits_of_a_planner_in_process(tmp_path: Path, family: str) -> None:
    world = untrained(BOX, spaces.Box(-1, 1, (2,), np.float32), family)
    storage = Storage(str(tmp_path))
    replicas = Replicas(storage, world, None)
    local = PlannerPolicy(PlanServer(storage, "w", world, None).planner)
    remote = PlannerPolicy(ServedPlans(replicas))
    for policy in (local, remote):
        policy.reset(2, seed=5)
    for step, batch in enumerate(observed(world, 2, 7)):
        if step == 3:
            for policy in (local, remote):
                policy.restart(np.array([True, False]))
        assert bits(local.act(batch)) == bits(remote.act(batch))
    assert replicas.calls == 8


def test_invalid_requests_are_refused(tmp_path: Path) -> None:
    world = untrained(BOX, TWO)
    storage = Storage(str(tmp_path))
    replicas = Replicas(storage, world, None, 1)
    sent: list[Any] = []
    replicas_call = replicas.call
    replicas.call = lambda request: sent.append(request) or replicas_call(request)  # type: ignore[method-assign, func-returns-value]
    policy = PlannerPolicy(ServedPlans(replicas))
    policy.act(np.zeros((2, 3), np.float32))
    good = sent[-1]
    wrong: dict[str, Any] = {
        "plan.planned": np.zeros(3, np.bool_),
        "plan.elites.categories": good["plan.elites.categories"] + 2,
        "plan.seed": np.asarray(-1, np.int64),
        "context.observation.numbers": np.full((2, 3), np.nan, np.float32),
        "context.past_action.categories": np.zeros((2, 1, 1), np.int64),
        "world": "other",
    }
    for name, value in wrong.items():
        reply = replicas_call(good | {name: value})
        assert reply["kind"] == "usage" and name.split(".")[0] in reply["error"], reply
    missing = {name: value for name, value in good.items() if name != "plan.step"}
    assert "plan.step must be a int64 array" in replicas_call(missing)["error"]
    plain = Sessions(lambda _: ("w", world))
    assert "serve it with planner=icem" in plain.call(good)["error"]
    with pytest.raises(UsageError, match="serve it with planner=icem"):
        ServedPlans(plain)


def test_a_planner_that_cannot_be_served_is_refused(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    store(storage)
    other = untrained(BOX, TWO)
    with pytest.raises(UsageError, match="agent must have the world's observation space"):
        PlanServer(storage, "w", other, AGENT)
    with pytest.raises(Exception, match="holds no value function"):
        PlanServer(storage, "w", other, OLD)
    with pytest.raises(UsageError, match="no artifact agents/none"):
        PlanServer(storage, "w", other, "none")
    assert WORLD


def post(app: FastAPI, path: str, body: Any) -> tuple[int, Any]:
    """POST a JSON body to an ASGI application; return the status and the reply's JSON."""
    sent: list[Any] = []
    data = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(data))]
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": headers,
        "query_string": b"",
    }
    scope |= {"http_version": "1.1", "scheme": "http", "root_path": ""}

    async def receive() -> Any:
        return {"type": "http.request", "body": data, "more_body": False}

    async def send(event: Any) -> None:
        sent.append(event)

    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    return sent[0]["status"], json.loads(b"".join(event.get("body", b"") for event in sent[1:]))


def test_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The route gives the actions of the planner in process, and refuses strange states."""
    world = untrained(BOX, TWO)
    storage = Storage(str(tmp_path))
    replicas = Replicas(storage, world, None)
    monkeypatch.setattr(plan_route, "Served", lambda *_: replicas)
    local = PlannerPolicy(PlanServer(storage, "w", world, None).planner)
    app = FastAPI()
    sessions: Any = SimpleNamespace(codec=local.codec, app="a", id="w")
    add_route(app, sessions, {})
    handle_errors(app)
    local.reset(2, seed=3)
    body: dict[str, Any] = {"seed": 3}
    for step, batch in enumerate(observed(world, 2, 3)):
        if step == 2:
            local.restart(np.array([False, True]))
            body["restart"] = [False, True]
        status, reply = post(app, "/v1/plan", body | {"observation": batch.tolist()})
        assert status == 200, reply
        assert reply["action"] == local.act(batch).tolist()
        body = {"state": reply["state"]}
    good = {"observation": [[0, 0, 0], [0, 0, 0]]}
    for wrong, message in (
        ({"state": "abc"}, "state must be that of the last reply"),
        ({"state": "AAAA"}, "state must be that of the last reply"),
        ({"restart": [True]}, "restart must have 2 items, got 1"),
        ({"observation": [[0, 0, 0]]} | body, "2 environments, got 1"),
        ({"observation": [[0, 0]]}, "observation"),
        ({"seed": -1}, "seed"),
    ):
        status, reply = post(app, "/v1/plan", good | wrong)
        assert status == 400 and message in reply["detail"], reply
