"""What a replica asks of a request before it computes: fields, types, shapes and ranges, so that a
wrong one costs a sentence and not a session.

It checks what could raise, or read beyond a table. Numbers may be anything that float32 holds: a
world says "diverged" of what is not finite.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mesocosm.errors import UsageError
from mesocosm.model.spec import PartSpec, Spec

Message = Mapping[str, Any]
MODES = ("NextStep", "SameStep")
_TEXTS = {
    "describe": ("world",),
    "begin": ("session", "replaces", "world"),
    "step": ("session",),
    "restore": ("session", "world"),
    "end": ("session",),
}
_NUMBERS = {"begin": ("seed", "first_env"), "step": ("clock",), "restore": ("seed", "first_env")}
_LIMITS = {"seed": 1 << 64, "first_env": 1 << 62, "clock": 1 << 62}
LONGEST = 4096
"""Characters of a text: a session's name, or the folder of a world"""


def check_fields(request: Message) -> None:
    """The scalars of a request whose `op` is known. Raises UsageError."""
    op = request["op"]
    for name in _TEXTS[op]:
        value = request.get(name)
        if not isinstance(value, str) or len(value) > LONGEST:
            raise UsageError(
                f"request {op!r}: {name} must be a text of at most {LONGEST} characters, got"
                f" {shown(value)}"
            )
    for name in _NUMBERS.get(op, ()):
        value = request.get(name)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | np.integer)
            or not -_LIMITS[name] < int(value) < _LIMITS[name]
        ):
            raise UsageError(
                f"request {op!r}: {name} must be an integer between -{_LIMITS[name]:.3g} and"
                f" {_LIMITS[name]:.3g}, got {shown(value)}"
            )


def check_begin(request: Message, spec: Spec) -> None:
    """Raises UsageError."""
    batch = _batch(request, "episode")
    _check_starts(request, spec, batch)


def check_step(request: Message, spec: Spec, batch: int) -> None:
    """`batch`: the session's environments. Raises UsageError."""
    for name, dtype in (("episode", np.int64), ("step", np.int64), ("cut", np.bool_)):
        _array(request, name, dtype, (batch,))
    if request.get("mode") not in MODES:
        raise UsageError(
            f"request 'step': mode must be one of {', '.join(MODES)}, got"
            f" {shown(request.get('mode'))}"
        )
    limit = request.get("max_disagreement")
    if isinstance(limit, bool) or not isinstance(limit, int | float) or limit != limit:
        raise UsageError(
            "request 'step': max_disagreement must be a number, or Infinity for no limit, got"
            f" {shown(limit)}"
        )
    _check_parts(request, "action", spec.action, (batch,))
    _check_starts(request, spec, batch)


def check_restore(request: Message, spec: Spec, members: int) -> None:
    """That the context's columns fit its clock is for `World.restore` to say. Raises UsageError."""
    batch = _batch(request, "context.member")
    past = request.get("context.past_observation.numbers")
    columns = past.shape[1] if isinstance(past, np.ndarray) and past.ndim == 3 else 0
    _check_parts(request, "context.past_observation", spec.observation, (batch, columns))
    _check_parts(request, "context.past_action", spec.action, (batch, columns))
    _check_parts(request, "context.observation", spec.observation, (batch,))
    _check_parts(request, "context.task", spec.task, (batch,))
    _in_range(
        request, "context.clock", _array(request, "context.clock", np.int64, ()), _LIMITS["clock"]
    )
    _in_range(
        request,
        "context.start_column",
        _array(request, "context.start_column", np.int64, (batch,)),
        columns + 1,
    )
    _in_range(request, "context.member", request["context.member"], members)


def _check_starts(request: Message, spec: Spec, batch: int) -> None:
    if any(name.startswith("start") for name in request):
        _check_parts(request, "start_task", spec.task, (batch,))
        _check_parts(request, "start", spec.observation, (batch,))


def _batch(request: Message, name: str) -> int:
    value = request.get(name)
    if (
        not isinstance(value, np.ndarray)
        or value.dtype != np.int64
        or value.ndim != 1
        or not len(value)
    ):
        raise UsageError(
            f"request {request['op']!r}: {name} must be an int64 array [B], one for each of at"
            f" least one environment, got {shown(value)}"
        )
    return len(value)


def _array(request: Message, name: str, dtype: type, shape: tuple[int, ...]) -> Any:
    value = request.get(name)
    if not isinstance(value, np.ndarray) or value.dtype != dtype or value.shape != shape:
        raise UsageError(
            f"request {request['op']!r}: {name} must be a {np.dtype(dtype)} array of shape"
            f" {list(shape)}, got {shown(value)}"
        )
    return value


def _check_parts(request: Message, name: str, spec: PartSpec, lead: tuple[int, ...]) -> None:
    _array(request, f"{name}.numbers", np.float32, (*lead, spec.numbers))
    categories = _array(request, f"{name}.categories", np.int64, (*lead, len(spec.categories)))
    if spec.categories:
        _in_range(request, f"{name}.categories", categories, np.array(spec.categories))


def _in_range(request: Message, name: str, value: Any, limit: Any) -> None:
    bad = (value < 0) | (value >= limit)
    if bad.any():
        most = np.broadcast_to(limit, value.shape)[bad][0] - 1
        raise UsageError(
            f"request {request['op']!r}: {name} has the value {value[bad][0]} where 0 to {most} are"
            " meant"
        )


def shown(value: Any) -> str:
    """A value for a message: short, and ASCII whatever a stranger sent."""
    if value is None:
        return "nothing"
    if isinstance(value, np.ndarray):
        return f"a {value.dtype} array of shape {list(value.shape)}"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
