"""Validation of requests on a replica: fields, types, shapes and ranges.

It checks everything that could raise or read beyond a table, so that a wrong request does not cost
its session. Any float32 is valid: a world reports "diverged" where a number is not finite. Every
function raises UsageError.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mesocosm.errors import UsageError
from mesocosm.model.spec import PartSpec, Spec
from mesocosm.policies.plan_state import PlanSize

Message = Mapping[str, Any]
MODES = ("NextStep", "SameStep")
SCALARS = {
    "describe": ("world",),
    "begin": ("session", "replaces", "world", "seed", "first_env"),
    "step": ("session", "clock"),
    "restore": ("session", "world", "seed", "first_env"),
    "end": ("session",),
    "plan": ("world",),
}
LIMITS = {"seed": 1 << 64, "first_env": 1 << 62, "clock": 1 << 62}
"""Exclusive bound of the absolute value of integer fields. Other scalar fields are strings."""
LONGEST = 4096
"""Characters of a session's name or a world's folder"""


def check_fields(request: Message) -> None:
    """Check the scalars of a request whose `op` is known."""
    for name in SCALARS[request["op"]]:
        value, limit = request.get(name), LIMITS.get(name)
        if limit is None:
            if not isinstance(value, str) or len(value) > LONGEST:
                raise invalid(request, name, f"a string of at most {LONGEST} characters")
        elif not isinstance(value, int | np.integer) or isinstance(value, bool):
            raise invalid(request, name, "an integer")
        elif not -limit < int(value) < limit:
            raise invalid(request, name, f"between -{limit:.3g} and {limit:.3g}")


def check_begin(request: Message, spec: Spec) -> None:
    _check_starts(request, spec, batch_of(request, "episode"))


def check_step(request: Message, spec: Spec, batch: int) -> None:
    """Check the arrays of a `step` of a session with `batch` environments."""
    check_controls(request, batch)
    _parts(request, "action", spec.action, (batch,))
    _check_starts(request, spec, batch)


def check_controls(request: Message, batch: int) -> None:
    """Check the fields of a `step` that worlds of all kinds read."""
    for name, dtype in (("episode", np.int64), ("step", np.int64), ("cut", np.bool_)):
        check_array(request, name, dtype, (batch,))
    if request.get("mode") not in MODES:
        raise invalid(request, "mode", f"one of {', '.join(MODES)}")
    requested = request.get("disagreement")
    if not isinstance(requested, bool):
        raise invalid(request, "disagreement", "true or false")
    limit = request.get("max_disagreement")
    if isinstance(limit, bool) or not isinstance(limit, int | float) or limit != limit:
        raise invalid(request, "max_disagreement", "a number (Infinity for no limit)")
    if limit < float("inf") and not requested:
        raise invalid(request, "disagreement", "true with a max_disagreement")


def check_restore(request: Message, spec: Spec, members: int) -> None:
    """Check a context's arrays; `World.restore` checks that its columns fit its clock."""
    _check_context(request, spec, members, batch_of(request, "context.member"))


def check_plan(request: Message, spec: Spec, memory: int, size: PlanSize) -> None:
    """Check a context's and a planner's arrays, whose numbers must be finite."""
    batch = batch_of(request, "context.member")
    _check_context(request, spec, 1, batch)
    past = request["context.past_observation.numbers"]
    if not memory and past.shape[1]:
        raise invalid(request, "context.past_observation.numbers", "without columns")
    for name in ("plan.seed", "plan.step"):
        check_array(request, name, np.int64, (), 1 << 62)
    check_array(request, "plan.planned", np.bool_, (batch,))
    _parts(request, "plan.elites", spec.action, (batch, size.elites, size.horizon))
    for name, value in request.items():
        numeric = isinstance(value, np.ndarray) and value.dtype == np.float32
        if numeric and not np.isfinite(value).all():
            raise invalid(request, name, "finite", "NaN or infinity")


def _check_context(request: Message, spec: Spec, members: int, batch: int) -> None:
    past = request.get("context.past_observation.numbers")
    columns = past.shape[1] if isinstance(past, np.ndarray) and past.ndim == 3 else 0
    _parts(request, "context.past_observation", spec.observation, (batch, columns))
    _parts(request, "context.past_action", spec.action, (batch, columns))
    _parts(request, "context.observation", spec.observation, (batch,))
    _parts(request, "context.task", spec.task, (batch,))
    check_array(request, "context.clock", np.int64, (), LIMITS["clock"])
    check_array(request, "context.start_column", np.int64, (batch,), columns + 1)
    check_array(request, "context.member", np.int64, (batch,), members)


def _check_starts(request: Message, spec: Spec, batch: int) -> None:
    if any(name.startswith("start") for name in request):
        _parts(request, "start_task", spec.task, (batch,))
        _parts(request, "start", spec.observation, (batch,))


def _parts(request: Message, name: str, spec: PartSpec, lead: tuple[int, ...]) -> None:
    cards = np.array(spec.categories, np.int64)
    check_array(request, f"{name}.numbers", np.float32, (*lead, spec.numbers))
    check_array(request, f"{name}.categories", np.int64, (*lead, len(cards)), cards)


def batch_of(request: Message, name: str) -> int:
    """The number of environments B of an int64 array [B]."""
    value = request.get(name)
    batch = len(value) if isinstance(value, np.ndarray) and value.ndim else 1
    check_array(request, name, np.int64, (max(batch, 1),))
    return batch


def check_array(
    request: Message, name: str, dtype: type, shape: tuple[int, ...], limit: Any = None
) -> None:
    """Check an array; with a `limit`, its values must be in [0, limit)."""
    value = request.get(name)
    if not isinstance(value, np.ndarray) or value.dtype != dtype or value.shape != shape:
        raise invalid(request, name, f"a {np.dtype(dtype)} array of shape {list(shape)}")
    if limit is not None and (bad := (value < 0) | (value >= limit)).any():
        most = np.broadcast_to(limit, shape)[bad][0] - 1
        raise invalid(request, name, f"in 0 to {most}", value[bad][0])


def invalid(request: Message, name: str, expected: str, value: Any = None) -> UsageError:
    """The error of an invalid field."""
    value = request.get(name) if value is None else value
    return UsageError(f"request {request['op']!r}: {name} must be {expected}, got {shown(value)}")


def shown(value: Any) -> str:
    """A short ASCII form of any value, for messages."""
    if value is None:
        return "nothing"
    if isinstance(value, np.ndarray):
        return f"a {value.dtype} array of shape {list(value.shape)}"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
