"""Entry point of a Serve config file, as of a RayService: `mesocosm.serve.app:build`."""

from __future__ import annotations

from typing import Any

from mesocosm import config
from mesocosm.serve.config import ServeConfig, check
from mesocosm.serve.deployment import application, check_world


def build(args: dict[str, Any]) -> Any:
    """Build the application of `mesocosm serve key=value ...` from these keys and values.

    Raises:
        UsageError: A key, a value or the world is wrong. Serve shows it as the application's state.
    """
    loaded = config.load(ServeConfig, overrides=[f"{key}={value}" for key, value in args.items()])
    check(loaded)
    check_world(loaded)
    return application(loaded)
