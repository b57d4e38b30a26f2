"""Reset options that are also keys of the observation: both must have the same value."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from mesocosm.envs.api import Env, take_reset
from mesocosm.errors import MesocosmError


class SharedNames(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Raises MesocosmError where the observation after a reset has another value."""

    def __init__(self, env: Env, names: list[str]):
        """`names`: keys of the observation, dotted where nested."""
        super().__init__(env)
        self._names = names

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        result = take_reset(self.env, seed=seed, options=options)
        for name in self._names:
            if name not in (options or {}):
                continue
            assert options is not None
            value, observed = options[name], result[0]
            for key in name.split("."):
                observed = observed[key]
            if not _equal(observed, value):
                raise MesocosmError(
                    f"reality.task_options.{name} is {value!r}, and the observation's key {name!r}"
                    f" must have the same value, got {observed!r}; rename one of them"
                )
        return result


def _equal(observed: Any, value: Any) -> bool:
    if isinstance(value, str) or isinstance(observed, str):
        return bool(observed == value)
    return np.size(observed) == 1 and bool(np.isclose(np.ravel(observed)[0], value))
