"""Validation of requests to a text world on a replica: types and lengths, see `check`.

Every function raises UsageError.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mesocosm.datasets.texts import utf8_problem
from mesocosm.errors import UsageError
from mesocosm.serve.check import batch_of, check_array, check_controls, invalid

Message = Mapping[str, Any]


def check_text_begin(request: Message) -> None:
    """Check the starts of a `begin`."""
    _check_starts(request, batch_of(request, "episode"))


def check_text_step(request: Message, batch: int) -> None:
    """Check the fields of a `step` of a session with `batch` environments."""
    check_controls(request, batch)
    _texts(request, "action", batch)
    _check_starts(request, batch)


def check_text_restore(request: Message, members: int) -> None:
    """Check a context."""
    batch = batch_of(request, "context.member")
    check_array(request, "context.member", np.int64, (batch,), members)
    check_array(request, "context.clock", np.int64, (), 1 << 62)
    for name in ("context.task", "context.start"):
        _texts(request, name, batch)
    rows = request.get("context.steps")
    if not isinstance(rows, list) or len(rows) != batch:
        raise invalid(request, "context.steps", f"{batch} lists of steps")
    for row in rows:
        if not isinstance(row, list) or not all(_is_step(step) for step in row):
            raise invalid(request, "context.steps", "lists of [action, observation]", row)


def _check_starts(request: Message, batch: int) -> None:
    if any(name.startswith("start") for name in request):
        _texts(request, "start_task", batch)
        _texts(request, "start", batch)


def _is_step(step: Any) -> bool:
    strings = isinstance(step, list) and len(step) == 2 and all(isinstance(t, str) for t in step)
    return strings and all(utf8_problem(text) is None for text in step)


def _texts(request: Message, name: str, batch: int) -> None:
    """Check `batch` texts that UTF-8 can hold."""
    key = f"{name}.texts"
    value = request.get(key)
    strings = isinstance(value, list) and all(isinstance(text, str) for text in value)
    if not strings or len(value) != batch:  # type: ignore[arg-type]
        raise invalid(request, key, f"a list of {batch} texts")
    for text in value or ():
        if (problem := utf8_problem(text)) is not None:
            raise UsageError(f"request {request['op']!r}: {key}: {problem}")
