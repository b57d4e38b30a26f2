"""Calls of an environment that may have gym's old API, or raise when it is closed."""

from __future__ import annotations

import importlib.metadata
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


def package_versions(*names: str) -> list[str]:
    """The names of packages with their installed versions, for an environment's `program_versions`.

    Raises:
        DependencyNotInstalled: One is missing.
    """
    try:
        return [f"{name} {importlib.metadata.version(name)}" for name in names]
    except importlib.metadata.PackageNotFoundError as error:
        problem = f"the package {error.name} is missing; pip install {error.name}"
        raise gymnasium.error.DependencyNotInstalled(problem) from error


def close(env: Env) -> None:
    """Close an environment. If `close()` raises, warn on stderr, once for each class."""
    try:
        env.close()
    except Exception as error:
        name = _name(env)
        if name not in _warned:
            _warned.add(name)
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            problem = f"close() of the environment {name} raised {reason}"
            warning = f"mesocosm: warning: {problem}; nothing is lost, correct it"
            print(warning, file=sys.stderr, flush=True)


def _name(env: Env) -> str:
    return f"{type(env.unwrapped).__module__}:{type(env.unwrapped).__qualname__}"


def take_step(env: Env, action: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
    """`env.step(action)`. Raises MesocosmError where the environment has gym's old API."""
    names = "observation, reward, terminated, truncated, info"
    return _call(env, partial(env.step, action), "step", names)


def take_reset(
    env: Env, *, seed: int | None, options: dict[str, Any] | None
) -> tuple[Any, dict[str, Any]]:
    """`env.reset(...)`. Raises MesocosmError where the environment has gym's old API."""
    reset = partial(env.reset, seed=seed, options=options)
    try:
        return _call(env, reset, "reset", "observation, info")
    except TypeError as error:
        if re.search(r"reset\(\) got an unexpected keyword argument '(seed|options)'", str(error)):
            problem = "reset() must take the keyword arguments seed and options"
            raise _old_api(env, problem) from error
        raise


def _call(env: Env, call: Callable[[], Any], method: str, names: str) -> Any:
    """The result of a call that must return a tuple of `names`, the last of them a dict."""
    count = len(names.split(", "))
    problem = f"{method}() must give {count} values ({names}), got"
    try:
        result = call()
    except ValueError as error:  # Gymnasium's own wrappers unpack the environment's tuple
        words = rf"(?:not enough|too many) values to unpack \(expected {count}(?:, got (\d+))?\)"
        unpacked = re.fullmatch(words, str(error))
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if unpacked and raised_in.is_relative_to(Path(gymnasium.__file__).parent):
            raise _old_api(env, f"{problem} {unpacked[1] or 'more'}") from error
        raise
    if not isinstance(result, tuple) or len(result) != count:
        got = len(result) if isinstance(result, tuple) else type(result).__name__
        raise _old_api(env, f"{problem} {got}")
    if not isinstance(result[-1], Mapping):
        kind = type(result[-1]).__name__
        raise _old_api(env, f"the info of {method}() must be a dict, got {kind}")
    return result


def _old_api(env: Env, problem: str) -> MesocosmError:
    return MesocosmError(
        f"the environment {_name(env)} does not have Gymnasium's API: {problem}; update it, or wrap"
        " it with shimmy.GymV21CompatibilityV0 or GymV26CompatibilityV0"
    )
