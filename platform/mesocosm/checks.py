"""Checks of config values. Each raises a UsageError that names the key, the value and the fix."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mesocosm.errors import UsageError, nearest


def at_least(config: Any, least: float, *keys: str, prefix: str = "") -> None:
    """Check that numbers are not below `least`. None is a default and passes.

    `prefix` precedes the keys in the message.
    """
    for key in keys:
        value = _get(config, key)
        if value is not None and not value >= least:
            raise UsageError(f"{prefix}{key} must be >= {least:g}, got {value}")


def within(
    config: Any, low: float, high: float, *keys: str, open: str = "", prefix: str = ""
) -> None:
    """Check that numbers lie in an interval. `open` names the ends that are outside: "[", "]"."""
    left, right = "(" if "[" in open else "[", ")" if "]" in open else "]"
    for key in keys:
        value = _get(config, key)
        inside = (
            low <= value <= high and (left, value) != ("(", low) and (right, value) != (")", high)
        )
        if not inside:
            interval = f"{left}{low:g}, {high:g}{right}"
            raise UsageError(f"{prefix}{key} must be in {interval}, got {value}")


def one_of(config: Any, choices: Iterable[str], *keys: str, prefix: str = "") -> None:
    """Check that strings are among `choices`."""
    known = list(choices)
    for key in keys:
        value = _get(config, key)
        if value not in known:
            names, hint = ", ".join(known), nearest(value, known)
            raise UsageError(f"{prefix}{key} must be one of {names}; got {value!r}{hint}")


def _get(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config
