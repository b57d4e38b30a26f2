"""A client of a served world, for a node: `python client.py WORLD APP ADDRESS STEPS HEAD` prints a
line of JSON a step.

It steps a replica that is not on the node HEAD. With APP empty the world runs in this process, from
the storage root ADDRESS.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from typing import Any

import numpy as np
import torch

from mesocosm.serve.world_env import WorldVectorEnv

torch.set_num_threads(1)
world, app, address, steps, head = sys.argv[1:]


def make() -> WorldVectorEnv:
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


def digest(reply: tuple[Any, ...]) -> str:
    *arrays, infos = reply
    values = [*arrays, infos.get("disagreement", np.zeros(0))]
    return hashlib.sha256(b"".join(np.asarray(value).tobytes() for value in values)).hexdigest()


env = make()
env.action_space.seed(0)
reply: tuple[Any, ...] = env.reset(seed=1)
for step in range(int(steps) + 1):
    line = {"step": step, "digest": digest(reply), "host": host(env), "at": time.monotonic()}
    print(json.dumps(line), flush=True)
    if app:
        time.sleep(0.1)
    reply = env.step(env.action_space.sample())
