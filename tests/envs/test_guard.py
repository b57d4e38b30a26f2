"""Training in reality loses an episode, never itself, where an environment crashes, hangs or gives
NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mesocosm.envs.config import RealityConfig
from mesocosm.envs.metered import MeteredVectorEnv, make_metered_vector
from mesocosm.errors import MesocosmError

STILL = np.zeros((2, 1), np.float32)


def vector(root: str, **trouble: Any) -> MeteredVectorEnv:
    """Two environments; `trouble` by reset seed, with a prefix "s"."""
    kwargs = {"trouble": {seed[1:]: mishap for seed, mishap in trouble.items()}}
    config = RealityConfig(env="ownenvs:Line", step_timeout_s=0.5, kwargs=kwargs)
    return make_metered_vector(config, root, "test", "baseline", 2)


@pytest.mark.parametrize(
    ("mishap", "message"),
    [
        ("crash", "RuntimeError: the arm fell off"),
        ("hang", "step_timeout_s=0.5"),
        ("nan", "NaN or infinity"),
        ("reward", "NaN or infinity"),
    ],
)
def test_a_failing_step_truncates_its_own_episode(
    user_module: None, root: str, mishap: str, message: str
) -> None:
    env = vector(root, s3=mishap)
    env.reset(seed=3)
    steps = [env.step(STILL) for _ in range(6)]
    observations, rewards, terminated, truncated, _ = map(list, zip(*steps, strict=True))
    assert np.argwhere(truncated).tolist() == [[2, 0]] and not np.any(terminated)
    assert np.isfinite(observations).all() and np.isfinite(rewards).all()
    np.testing.assert_array_equal(observations[2][0], observations[1][0])
    assert rewards[2][0] == 0.0
    assert len(env.dropped) == 1 and message in env.dropped[0]
    assert env.meter.steps == 2 * 6 - 1, "the failed step was taken; the reset after it is none"
    env.close()


def test_one_that_always_fails_ends_the_training(user_module: None, root: str) -> None:
    env = vector(root, sNone="crash")
    env.reset()
    message = r"reality.env='ownenvs:Line' failed 5 times in a row .*the arm fell off.*; correct it"
    with pytest.raises(MesocosmError, match=message):
        for _ in range(40):
            env.step(STILL)
    env.close()


def test_a_reset_that_fails_is_tried_anew(user_module: None, root: str) -> None:
    env = vector(root, s3="reset")
    observation, _ = env.reset(seed=3)
    assert np.isfinite(observation).all()
    assert env.dropped == ["the reset raised RuntimeError: the arm is jammed"]
    env.close()
    with pytest.raises(MesocosmError, match=r"failed 5 times in a row .*the arm is jammed"):
        vector(root, s3="reset", sNone="reset").reset(seed=3)
