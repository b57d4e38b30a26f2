"""The golden digits of a session: what a world answers to the same actions, in both families."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mesocosm.serve.world_env import WorldVectorEnv

from .worlds import DICT, rollout, untrained


@pytest.mark.parametrize("family", ["ensemble", "sequence"])
def test_a_session_answers_as_ever(golden: Any, family: str) -> None:
    replies = rollout(WorldVectorEnv(3, untrained(DICT, family=family), horizon=9), 12)
    golden.check("pretrain", {f"{family} session": golden.of_numbers(_plain(replies))})


def _plain(value: Any) -> Any:
    """Replies as plain JSON; what is not a number is left out."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray) and value.dtype != object:
        return np.nan_to_num(value.astype(np.float64)).reshape(-1).tolist()
    return []
