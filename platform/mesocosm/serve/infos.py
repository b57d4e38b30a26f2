"""The infos of a vector environment's steps."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector.utils import iterate
from numpy.typing import NDArray


def final_infos(
    space: gymnasium.Space[Any], last: Any, restarted: NDArray[np.bool_], infos: dict[str, Any]
) -> dict[str, Any]:
    """SAME_STEP's infos: an ended episode's last step is under "final_info" and "final_obs".

    Args:
        space: The vector environment's observation space.
        last: The observations [B] after the step, of the episodes that ended too.
        restarted: [B] the episode ended.
        infos: By name, an array [B] of the step.
    """
    final = np.full(len(restarted), None, dtype=object)
    for i, value in enumerate(iterate(space, last)):
        if restarted[i]:
            final[i] = value
    current: dict[str, Any] = {"final_obs": final, "_final_obs": restarted}
    ended: dict[str, Any] = {}
    for name in [name for name in infos if not name.startswith("_")]:
        zero = np.zeros(1, infos[name].dtype)
        current |= {name: np.where(restarted, zero, infos[name]), f"_{name}": ~restarted}
        ended |= {name: np.where(restarted, infos[name], zero), f"_{name}": restarted}
    return current | {"final_info": ended, "_final_info": restarted}
