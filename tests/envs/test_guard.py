"""Learners on reality meet environments that crash, hang and give NaN: an episode is lost, never
the training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mesocosm.envs.config import RealityConfig
from mesocosm.envs.meter import MeteredVectorEnv, make_metered_vector
from mesocosm.errors import MesocosmError


def vector(root: str, **kwargs: Any) -> MeteredVectorEnv:
    return make_metered_vector(
        RealityConfig(env="ownenvs:Line", step_timeout_s=0.5, **kwargs), root, "test", "baseline", 2
    )


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
    own: Path, root: str, mishap: str, message: str
) -> None:
    env = vector(root, kwargs={"trouble": {"3": mishap}})
    env.reset(seed=3)
    steps = [env.step(np.zeros((2, 1), np.float32)) for _ in range(6)]
    assert [step[3].tolist() for step in steps] == [[False, False]] * 2 + [[True, False]] + [
        [False, False]
    ] * 3
    assert all(np.isfinite(step[0]).all() and np.isfinite(step[1]).all() for step in steps)
    np.testing.assert_array_equal(steps[2][0][0], steps[1][0][0])
    assert steps[2][1][0] == 0.0 and not any(step[2].any() for step in steps)
    assert len(env.dropped) == 1 and message in env.dropped[0]
    assert env.meter.steps == 2 * 6 - 1, (
        "the step that failed was taken, and the reset after it is none"
    )
    env.close()


def test_one_that_always_fails_ends_the_training(own: Path, root: str) -> None:
    env = vector(root, kwargs={"trouble": {"None": "crash"}})
    env.reset()
    with pytest.raises(
        MesocosmError,
        match=(
            r"reality.env='ownenvs:Line' failed 5 times in a row .*the arm fell off.*; correct it"
        ),
    ):
        for _ in range(40):
            env.step(np.zeros((2, 1), np.float32))
    env.close()


def test_a_reset_that_fails_is_tried_anew(own: Path, root: str) -> None:
    env = vector(root, kwargs={"trouble": {"3": "reset"}})
    observation, _ = env.reset(seed=3)
    assert np.isfinite(observation).all() and env.dropped == [
        "the reset raised RuntimeError: the arm is jammed"
    ]
    env.close()
    with pytest.raises(MesocosmError, match=r"failed 5 times in a row .*the arm is jammed"):
        vector(root, kwargs={"trouble": {"3": "reset", "None": "reset"}}).reset(seed=3)
