"""A client of a served world, to be run on a node: `python client.py WORLD APP ADDRESS STEPS HEAD`,
a line of JSON a step.

It pins itself to a replica that is not on the node HEAD, and steps until it has made STEPS steps.
With APP empty the world is in its own process, found under the storage root ADDRESS.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from typing import Any

import numpy as np
import torch

from mesocosm.serve.client import WorldVectorEnv

torch.set_num_threads(1)
world, app, address, steps, head = (
    sys.argv[1],
    sys.argv[2],
    sys.argv[3],
    int(sys.argv[4]),
    sys.argv[5],
)


def made() -> WorldVectorEnv:
    if not app:
        return WorldVectorEnv(4, world, root=address, backend="local", horizon=50)
    while True:
        env = WorldVectorEnv(4, world, app=app, address=address, horizon=50)
        if host(env) != head:
            return env
        env.close()


def host(env: WorldVectorEnv) -> str:
    replica: Any = getattr(env._connection, "replica", None)
    return replica["host"] if replica else ""


def digest(told: tuple[Any, ...]) -> str:
    *arrays, infos = told
    return hashlib.sha256(
        b"".join(
            np.asarray(value).tobytes()
            for value in [*arrays, infos.get("disagreement", np.zeros(0))]
        )
    ).hexdigest()


env = made()
env.action_space.seed(0)
told: tuple[Any, ...] = env.reset(seed=1)
for step in range(steps + 1):
    print(
        json.dumps(
            {"step": step, "digest": digest(told), "host": host(env), "at": time.monotonic()}
        ),
        flush=True,
    )
    if app:
        time.sleep(0.1)
    told = env.step(env.action_space.sample())
