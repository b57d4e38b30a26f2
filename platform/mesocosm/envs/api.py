"""Calls of an environment, which may be of gym's old API, or raise when it is closed."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium

from mesocosm.errors import MesocosmError

Env = gymnasium.Env[Any, Any]

_warned: set[str] = set()
"""Environments whose failing `close()` was reported."""


def close(env: Env) -> None:
    """Close an environment. A `close()` that raises loses nothing: it is a warning on stderr, once
    for each class."""
    try:
        env.close()
    except Exception as error:
        name = _name(env)
        if name not in _warned:
            _warned.add(name)
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            warning = (
                f"close() of the environment {name} raised {reason}; nothing is lost, correct it"
            )
            print(f"mesocosm: warning: {warning}", file=sys.stderr, flush=True)


def _name(env: Env) -> str:
    return f"{type(env.unwrapped).__module__}:{type(env.unwrapped).__qualname__}"


def take_step(env: Env, action: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
    """`env.step(action)`, in Gymnasium's form.

    Raises:
        MesocosmError: The environment is of gym's old API, which gives other values.
    """
    names = "observation, reward, terminated, truncated, info"
    given = _call(env, partial(env.step, action), "step", names, 5)
    if not isinstance(given[4], Mapping):
        raise _old_api(env, f"the info of step() must be a dict, got {type(given[4]).__name__}")
    return given


def take_reset(
    env: Env, *, seed: int | None, options: dict[str, Any] | None
) -> tuple[Any, dict[str, Any]]:
    """`env.reset(...)`, in Gymnasium's form.

    Raises:
        MesocosmError: The environment is of gym's old API, which takes or gives other values.
    """
    try:
        given = _call(
            env, partial(env.reset, seed=seed, options=options), "reset", "observation, info", 2
        )
    except TypeError as error:
        if re.search(r"reset\(\) got an unexpected keyword argument '(seed|options)'", str(error)):
            raise _old_api(
                env, "reset() must take the keyword arguments seed and options"
            ) from error
        raise
    if not isinstance(given[1], Mapping):
        raise _old_api(env, f"the info of reset() must be a dict, got {type(given[1]).__name__}")
    return given


def _call(env: Env, call: Callable[[], Any], method: str, names: str, count: int) -> Any:
    try:
        given = call()
    except ValueError as error:  # Gymnasium's own wrappers unpack what the environment gives
        words = rf"(?:not enough|too many) values to unpack \(expected {count}(?:, got (\d+))?\)"
        unpacked = re.fullmatch(words, str(error))
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if unpacked and raised_in.is_relative_to(Path(gymnasium.__file__).parent):
            raise _old_api(
                env, f"{method}() must give {count} values ({names}), got {unpacked[1] or 'more'}"
            ) from error
        raise
    if not isinstance(given, tuple) or len(given) != count:
        got = len(given) if isinstance(given, tuple) else type(given).__name__
        raise _old_api(env, f"{method}() must give {count} values ({names}), got {got}")
    return given


def _old_api(env: Env, problem: str) -> MesocosmError:
    return MesocosmError(
        f"the environment {_name(env)} is not of Gymnasium's API: {problem}; update it, or wrap it"
        " with shimmy.GymV21CompatibilityV0 or GymV26CompatibilityV0"
    )
