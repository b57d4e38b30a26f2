"""The HTTP route of a served planner. Its state is opaque text, which the client sends back."""

from __future__ import annotations

import base64
import binascii
import threading
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Response
from pydantic import Field, create_model

from mesocosm.datasets.spaces import SpaceCodec
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.policies.planner_policy import PlannerPolicy
from mesocosm.serve.connection import Served
from mesocosm.serve.http_sessions import DEADLINE_S, MAX_ENVS, HttpSessions, to_json
from mesocosm.serve.json_pictures import from_strings
from mesocosm.serve.plans import ServedPlans
from mesocosm.serve.protocol import pack, unpack
from mesocosm.serve.schema import Model, integer, json_type

Seed: Any = integer(0, (1 << 62) - 1)


class PlanBody(Model):
    """Without a state new episodes begin. With the state of the last reply the episodes continue,
    except where `restart` is true.
    """

    state: str | None = None
    seed: Seed = 0
    """Seed of the plans; used without a state"""
    restart: list[bool] | None = None
    """One for each environment: true where its episode began since the last request"""
    options: list[dict[str, bool | int | float | str]] | None = None
    """Reset options of each environment's task, where the world has any"""


class PlanReply(Model):
    state: str
    """The state of the next request"""


class HttpPlans:
    """Plans for HTTP clients, whose requests hold the state. Safe to call from several threads."""

    def __init__(self, sessions: HttpSessions):
        self._observations = SpaceCodec(sessions.codec.observation_space)
        self._actions = SpaceCodec(sessions.codec.action_space, "action")
        self._plans = ServedPlans(Served(sessions.app, None, DEADLINE_S), sessions.id)
        self._lock = threading.Lock()

    def plan(self, request: Any) -> bytes:
        """Plan actions. Returns the reply as JSON. Raises UsageError for an invalid request."""
        policy = PlannerPolicy(self._plans)
        codec = self._observations
        try:
            values = [from_strings(codec.space, value) for value in request.observation]
            batch = codec.decode_stored(*codec.stored_list(values))
        except MesocosmError as error:
            raise UsageError(str(error)) from error
        count = len(request.observation)
        if request.state is None:
            policy.reset(count, request.seed)
        else:
            restore(policy, request.state)
        if request.restart is not None:
            if len(request.restart) != count:
                raise UsageError(f"restart must have {count} items, got {len(request.restart)}")
            policy.restart(np.array(request.restart, np.bool_))
        with self._lock:
            action = policy.act(batch, options=request.options)
        state = base64.b64encode(pack(policy.state())).decode()
        return to_json({"action": self._actions.unbatch(action), "state": state})


def restore(policy: PlannerPolicy, state: str) -> None:
    """Continue from the text of a state. Raises UsageError if it is not a state."""
    try:
        policy.restored(unpack(base64.b64decode(state, validate=True)))
    except (ValueError, KeyError, IndexError, TypeError, RuntimeError, binascii.Error) as error:
        raise UsageError(
            "state must be that of the last reply, got another text; leave it out to begin new"
            " episodes"
        ) from error


def add_route(app: FastAPI, sessions: HttpSessions, responses: dict[int | str, Any]) -> None:
    """Add POST /v1/plan for the planner of the served world."""
    codec, plans = sessions.codec, HttpPlans(sessions)
    observation: Any = json_type(codec.observation_space, "Observation")
    action: Any = json_type(codec.action_space, "PlannedAction", reply=True)
    one_each = Field(min_length=1, max_length=MAX_ENVS, description="one for each environment")
    observations: Any = Annotated[list[observation], one_each], ...
    actions: Any = list[action], ...
    plan_request = create_model("Plan", __base__=PlanBody, observation=observations)
    plan_reply = create_model("PlanReply", __base__=PlanReply, action=actions)

    def plan(request: Any) -> Response:
        """Plan an action for every environment."""
        return Response(plans.plan(request), media_type="application/json")

    plan.__annotations__["request"] = plan_request
    app.post("/v1/plan", response_model=plan_reply, responses=responses)(plan)
