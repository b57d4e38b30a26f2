"""Worlds on a real Ray Serve: the same bits as in process, through kills of replicas; sentences for what is not there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from mesocosm import tracking
from mesocosm.config import RayConfig, StorageConfig
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.serving import run as serve_job
from mesocosm.serving.client import WorldVectorEnv
from mesocosm.serving.config import ServeConfig
from mesocosm.serving.connection import Served
from mesocosm.serving.deployment import deploy, undeploy
from mesocosm.storage import Storage

pytestmark = pytest.mark.usefixtures("ray_local")
DICT = spaces.Dict({"place": spaces.Box(-np.inf, np.inf, (2,), np.float64), "room": spaces.Discrete(4)})


@pytest.fixture(scope="module")
def served(make_world: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> Iterator[str]:
    """Two replicas over a storage root with a world of each family."""
    root = str(tmp_path_factory.mktemp("served"))
    for family in ("ensemble", "sequence"):
        Storage(root).make("worlds", family, {}, make_world(DICT, family=family, terminal=0.1).save)
    deploy(ServeConfig(world="ensemble", name="two", replicas=2, storage=StorageConfig(root), ray=RayConfig()))
    yield root
    undeploy("two")


def flat(step: tuple[Any, ...]) -> list[bytes]:
    observation, *rest = step
    infos = rest.pop()
    return [np.asarray(value).tobytes() for value in [*observation.values(), *rest, infos.get("disagreement", np.zeros(0))]]


def rollout(env: WorldVectorEnv, steps: int, seed: int = 1, at: Callable[[int], None] = lambda step: None) -> list[list[bytes]]:
    """The bytes of each step; `at` is called before each."""
    env.action_space.seed(0)
    told = [flat(env.reset(seed=seed))]
    for step in range(steps):
        at(step)
        told.append(flat(env.step(env.action_space.sample())))
    return told


def replica(env: WorldVectorEnv) -> int:
    assert isinstance(env._connection, Served) and env._connection.replica is not None
    return int(env._connection.replica["pid"])


@pytest.mark.parametrize("family", ["ensemble", "sequence"])
def test_served_is_in_process(served: str, family: str) -> None:
    for mode in ("NextStep", "SameStep"):
        env = WorldVectorEnv(5, family, app="two", horizon=11, autoreset_mode=mode)
        assert replica(env) != os.getpid()
        assert rollout(env, 30) == rollout(WorldVectorEnv(5, family, root=served, backend="local", horizon=11, autoreset_mode=mode), 30)
        env.close()


def test_default_and_make_vec(served: str) -> None:
    """The application's default world, through gymnasium.make_vec."""
    env = gymnasium.make_vec("mesocosm/World-v0", num_envs=3, app="two", horizon=5)
    assert env.unwrapped.world == "ensemble"
    assert rollout(env, 6) == rollout(WorldVectorEnv(3, "ensemble", root=served, backend="local", horizon=5), 6)
    env.close()


@pytest.mark.parametrize(("family", "kills"), [("sequence", (4, 14)), ("ensemble", (9,))])
def test_kill(served: str, family: str, kills: tuple[int, ...]) -> None:
    """SIGKILL of the session's replica, for the family with a context before it is first rebuilt (step 6 of a window of 6) and again after."""
    undisturbed = rollout(WorldVectorEnv(4, family, app="two", horizon=30), 25)
    env = WorldVectorEnv(4, family, app="two", horizon=30)
    killed: list[int] = []

    def kill(step: int) -> None:
        if step in kills:
            killed.append(replica(env))
            os.kill(killed[-1], signal.SIGKILL)

    assert rollout(env, 25, at=kill) == undisturbed
    assert len(set(killed)) == len(kills) and replica(env) not in killed


def test_broken_line(served: str) -> None:
    """The socket breaks while the replica lives; and where no socket can be had at all, calls go through Serve."""
    expected = rollout(WorldVectorEnv(3, "sequence", app="two", horizon=9), 16)
    env = WorldVectorEnv(3, "sequence", app="two", horizon=9)
    connection = env._connection
    assert isinstance(connection, Served)

    def cut(step: int) -> None:
        if step % 5 == 2:
            assert connection._line is not None
            connection._line.shutdown(2)

    assert rollout(env, 16, at=cut) == expected
    connection._hang_up()
    connection._dial = lambda timeout: False  # type: ignore[method-assign]
    assert rollout(env, 16) == expected
    assert connection._line is None


def test_line_wants_the_token(served: str) -> None:
    """Who knows the port but not the token gets no answer."""
    import socket

    from mesocosm.serving.connection import receive_frame, send_frame
    from mesocosm.serving.protocol import pack

    env = WorldVectorEnv(1, app="two")
    assert isinstance(env._connection, Served) and env._connection.replica is not None
    host, port = env._connection.replica["host"], env._connection.replica["port"]
    assert host == "127.0.0.1"
    with socket.create_connection((host, port), timeout=10) as line:
        send_frame(line, b"x" * 32)
        try:
            send_frame(line, pack({"op": "describe", "world": ""}))
            answer = receive_frame(line)
        except ConnectionError:
            answer = None
    assert answer is None


def test_new_version_while_serving(served: str, make_world: Callable[..., Any]) -> None:
    """A world made after the deployment is served at the next reset that asks for it."""
    env = WorldVectorEnv(2, "ensemble", app="two", horizon=5)
    env.reset()
    Storage(served).make("worlds", "newer", {}, make_world(DICT, seed=9).save)
    env.reset(options={"world": "newer"})
    local = WorldVectorEnv(2, "newer", root=served, backend="local", horizon=5)
    assert rollout(env, 8) == rollout(local, 8)


def test_missing(served: str) -> None:
    with pytest.raises(UsageError, match="no world application 'nobody' is served on this Ray; start it with `mesocosm serve name=nobody`"):
        WorldVectorEnv(2, app="nobody")
    with pytest.raises(UsageError, match=r"no artifact worlds/ensembel in storage.root .*did you mean 'ensemble'"):
        WorldVectorEnv(2, "ensembel", app="two")
    with pytest.raises(UsageError, match="no artifact worlds/none"):
        deploy(ServeConfig(world="none", storage=StorageConfig(served)))
    with pytest.raises(UsageError, match=r"serve.replicas=99 with serve.cpus=1 asks for 99 CPUs"):
        deploy(ServeConfig(world="ensemble", replicas=99, storage=StorageConfig(served)))


def test_nobody_answers(served: str, tmp_path: Path) -> None:
    """An application that ended while a client was at it: one sentence after the deadline, no endless wait."""
    deploy(ServeConfig(world="ensemble", name="brief", cpus=0.5, storage=StorageConfig(served)))
    env = WorldVectorEnv(2, app="brief", deadline_s=2.0)
    env.reset()
    undeploy("brief")
    undeploy("brief")
    with pytest.raises(MesocosmError, match="world application 'brief': no replica answered for 2 s"):
        env.step(env.action_space.sample())


def test_from_a_worker(served: str) -> None:
    """As RLlib's env runners use it: made in a Ray worker from plain arguments, through the registry."""
    import ray

    @ray.remote(num_cpus=0.5)
    def imagine(arguments: dict[str, Any]) -> Any:
        env = WorldVectorEnv(**arguments)
        env.reset(seed=4)
        told = [env.step(np.arange(3) % 2)[0]["place"] for _ in range(9)]
        env.close()
        return np.stack(told)

    there = ray.get(imagine.remote({"num_envs": 3, "world": "sequence", "app": "two", "horizon": 6}))
    here = WorldVectorEnv(3, "sequence", root=served, backend="local", horizon=6)
    here.reset(seed=4)
    np.testing.assert_array_equal(there, np.stack([here.step(np.arange(3) % 2)[0]["place"] for _ in range(9)]))


def test_job(served: str) -> None:
    """`serve` says how to connect; another process that does just that steps in the world; Ctrl-C ends it without a trace."""
    from ray import serve

    config = ServeConfig(world="ens", name="job", cpus=0.5, storage=StorageConfig(served))
    answers: list[str] = []

    def visit() -> None:
        log = None
        while log is None or "make_vec" not in log:
            time.sleep(0.2)
            logs = list(Path(served).glob("runs/serve/visited/log.txt"))
            log = logs[0].read_text() if logs else None
        lines = [line.split("Z ")[-1].strip() for line in log.splitlines() if "import gymnasium" in line or "make_vec" in line]
        lines[0] = lines[0][lines[0].index("import") :]
        code = "\n".join([*lines, "envs.reset(seed=0)", "print(envs.step(envs.action_space.sample())[1].shape)"])
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        answers.append(done.stdout + done.stderr)
        os.kill(os.getpid(), signal.SIGINT)

    visitor = threading.Thread(target=visit)
    visitor.start()
    with tracking.start("serve", config, id="visited", quiet=True) as job:
        serve_job.run(config, job)
    visitor.join()
    assert answers[0].startswith("(64,)"), answers
    assert "job" not in serve.status().applications
    assert "two" in serve.status().applications, "what others serve stays"
    assert serve_job.plan(config)["world"] == "ensemble"
    with pytest.raises(UsageError, match=r"serve.world='' names no world"):
        serve_job.plan(ServeConfig())
