"""Worlds on a real Ray Serve: the same bits as in process, also after replicas are killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from mesocosm.config import StorageConfig
from mesocosm.errors import UsageError
from mesocosm.serve import connection, deployment
from mesocosm.serve import line as lines
from mesocosm.serve.config import ServeConfig
from mesocosm.serve.connection import Served
from mesocosm.serve.deployment import deploy, undeploy
from mesocosm.serve.line import FRAME, receive_frame, send_frame
from mesocosm.serve.protocol import pack
from mesocosm.serve.world_env import WorldVectorEnv
from mesocosm.store.artifacts import Storage

from .worlds import DICT, bits, local, played, untrained

pytestmark = pytest.mark.usefixtures("ray_local")


def client(world: str = "sequence", num_envs: int = 3, **arguments: Any) -> WorldVectorEnv:
    return WorldVectorEnv(num_envs, world, **{"app": "two", "horizon": 9} | arguments)


def served_by(env: WorldVectorEnv) -> Served:
    assert isinstance(env._connection, Served)
    return env._connection


def replica(env: WorldVectorEnv) -> int:
    """The pid of a client's replica."""
    address = served_by(env).replica
    assert address is not None
    return int(address["pid"])


@pytest.mark.parametrize("family", ["ensemble", "sequence"])
def test_served_is_in_process(served: str, family: str) -> None:
    for mode in ("NextStep", "SameStep"):
        arguments: dict[str, Any] = {"horizon": 11, "autoreset_mode": mode}
        env = client(family, 5, **arguments)
        assert replica(env) != os.getpid()
        assert played(env, 30) == played(local(family, served, 5, **arguments), 30)
        env.close()


def test_default_and_make_vec(served: str) -> None:
    """The application's default world, through gymnasium.make_vec."""
    env = gymnasium.make_vec("mesocosm/World-v0", num_envs=3, app="two", horizon=5)
    assert env.unwrapped.world == "ensemble"
    assert played(env, 6) == played(local("ensemble", served, horizon=5), 6)
    env.close()


@pytest.mark.parametrize(("family", "kills"), [("sequence", (4, 14)), ("ensemble", (9,))])
def test_kill(served: str, family: str, kills: tuple[int, ...]) -> None:
    """SIGKILL of the session's replica; for `sequence` before its context is rebuilt, and after."""
    assert_survives(family, 25, kills, lambda pid: os.kill(pid, signal.SIGKILL))


@pytest.mark.slow
def test_kill_while_it_answers(served: str) -> None:
    """SIGKILL of a replica that is answering changes no bit, before and after a rebuild."""

    def kill_later(pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()

    assert_survives("sequence", 16, (3, 11), kill_later)


def assert_survives(
    family: str, steps: int, kills: tuple[int, ...], kill: Callable[[int], None]
) -> None:
    """A rollout has the same bits where its replica is killed before the steps `kills`."""
    env, killed = client(family, 4, horizon=30), []

    def before(step: int) -> None:
        if step in kills:
            killed.append(replica(env))
            kill(killed[-1])

    undisturbed = played(client(family, 4, horizon=30), steps)
    assert played(env, steps, before=before) == undisturbed
    assert len(set(killed)) == len(kills) and replica(env) not in killed


def interrupt(env: WorldVectorEnv, call: Callable[[], Any]) -> None:
    """Ctrl-C during a call of the client, whose replica does not answer until then."""
    pid = replica(env)
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        call()
    os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("other", [False, True], ids=["the same action again", "another action"])
def test_ctrl_c(served: str, other: bool) -> None:
    """After Ctrl-C during a call the next call gets its own reply, also for another action."""
    env, undisturbed = client(), client()
    for each in (env, undisturbed):
        each.action_space.seed(0)
        each.reset(seed=1)
    for step in range(10):
        action = env.action_space.sample()
        if step == 4:
            interrupted = 1 - action if other else action
            interrupt(env, lambda: env.step(interrupted))  # noqa: B023
            time.sleep(0.3)
        assert bits(env.step(action)) == bits(undisturbed.step(action)), step


def test_ctrl_c_in_a_reset(served: str) -> None:
    """After Ctrl-C in `reset` the client must be reset, and then works as before."""
    env = client()
    expected = played(env, 5)
    env.reset(seed=7)
    interrupt(env, env.reset)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(env.action_space.sample())
    assert played(env, 5) == expected


def test_broken_line(served: str) -> None:
    """If the socket breaks or is out of step, a client never takes another request's reply."""
    env = client()

    def break_line(step: int) -> None:
        line = served_by(env)._line
        assert line is not None
        if step % 5 == 2:
            line.shutdown(socket.SHUT_RDWR)
        if step % 5 == 4:
            send_frame(line, pack({"op": "describe", "world": "", "number": 0}))

    assert played(env, 16, before=break_line) == played(client(), 16)


@pytest.fixture
def full_port() -> Iterator[int]:
    """A port that drops every packet, as a firewall does: a listener with a full queue."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        waiting = [socket.socket() for _ in range(4)]
        for line in waiting:
            line.setblocking(False)
            line.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]
        for line in waiting:
            line.close()


@pytest.mark.slow
def test_no_line(
    served: str, full_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a firewall, or with a replica on another node's loopback, calls go through Serve.

    Only the first step waits for the line, and nobody else receives the token.
    """
    from ray import serve

    class Elsewhere(deployment.Replica):
        def connect(self) -> dict[str, Any]:
            return super().connect() | json.loads((tmp_path / "address.json").read_text())

    deployed = serve.deployment(Elsewhere)
    application = deployed.options(name="world", ray_actor_options={"num_cpus": 0.5})  # type: ignore[attr-defined]
    arguments = (served, "sequence", 1, 8, 1, "cpu", False, None)
    (tmp_path / "address.json").write_text(json.dumps({"port": full_port}))
    serve.run(application.bind(*arguments), name="elsewhere", route_prefix=None)
    monkeypatch.setattr(connection, "DIAL_S", 1.5)
    expected = played(client(), 16)
    dials: list[tuple[Any, ...]] = []
    open_line = connection.open_line

    def dial(*arguments: Any) -> socket.socket | None:
        dials.append(arguments)
        return open_line(*arguments)

    monkeypatch.setattr(connection, "open_line", dial)
    began = time.monotonic()
    env = client(app="elsewhere")
    assert time.monotonic() - began > 1.5, "the port must not answer"
    assert played(env, 16) == expected
    assert len(dials) == 1
    assert served_by(env)._line is None

    with socket.create_server(("127.0.0.1", 0)) as stranger:
        stranger.settimeout(0.2)
        address = {"port": stranger.getsockname()[1], "node": "f" * 56}
        (tmp_path / "address.json").write_text(json.dumps(address))
        assert played(client(app="elsewhere"), 16) == expected
        with pytest.raises(TimeoutError):
            stranger.accept()
    undeploy("elsewhere")


def test_line_wants_the_token(served: str) -> None:
    """Without the token a client gets no answer and allocates no memory."""
    env = client()
    address = served_by(env).replica
    assert address is not None and address["host"] == "127.0.0.1"
    endpoint = address["host"], address["port"]
    with socket.create_connection(endpoint, timeout=60) as line:
        send_frame(line, b"x" * 32)
        try:
            send_frame(line, pack({"op": "describe", "world": "", "number": 1}))
            assert receive_frame(line) is None
        except ConnectionError:
            pass
    with socket.create_connection(endpoint, timeout=60) as line:
        line.sendall(FRAME.pack(1 << 28))
        assert line.recv(1) == b"", "it must hang up at the size alone"


def test_a_message_too_large(served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    env = client("", 64)
    env.reset(seed=0)
    monkeypatch.setattr(lines, "LARGEST", 1 << 10)
    with pytest.raises(UsageError, match=r"must be at most 0 MiB, got .*; lower num_envs"):
        env.step(env.action_space.sample())
    monkeypatch.undo()
    assert played(env, 4) == played(client("", 64), 4)


@pytest.mark.slow
def test_eviction(served: str) -> None:
    """Two clients of a replica with one session evict each other's, and step with the same bits.

    A closed client's session is gone.
    """
    limits: dict[str, Any] = {"cpus": 0.5, "max_sessions": 1, "storage": StorageConfig(served)}
    deploy(ServeConfig(world="sequence", name="small", **limits))
    envs = [client("", app="small", first_env=3 * i) for i in range(2)]
    alone = [local("sequence", served, horizon=9, first_env=3 * i) for i in range(2)]
    for env, reference in zip(envs, alone, strict=True):
        assert bits(env.reset(seed=3)) == bits(reference.reset(seed=3))
    action = np.array([0, 1, 1])
    last = {"op": "step", "session": envs[0]._session, "clock": 9}
    assert envs[1]._call(last) == {"missing": True}, "the other client's session was evicted"
    for _ in range(9):
        for env, reference in zip(envs, alone, strict=True):
            assert bits(env.step(action)) == bits(reference.step(action))
    envs[1].step(action)
    envs[1].close()
    ended = {"op": "step", "session": envs[1]._session, "clock": 10}
    assert envs[0]._call(ended) == {"missing": True}
    undeploy("small")


def test_new_version_while_serving(served: str) -> None:
    """A reset can pin a world made after the deployment."""
    env = client("ensemble", 2, horizon=5)
    env.reset()
    Storage(served).make("worlds", "newer", {}, untrained(DICT, seed=9).save)
    env.reset(options={"world": "newer"})
    assert played(env, 8) == played(local("newer", served, 2, horizon=5), 8)


def test_missing(served: str) -> None:
    fix = "`mesocosm serve world=ID name=nobody` and give the ray.address"
    with pytest.raises(UsageError, match=f"'nobody' is served on this Ray; run {fix}"):
        client(app="nobody")
    with pytest.raises(UsageError, match=r"no artifact worlds/ensembel .*did you mean 'ensemble'"):
        client("ensembel")


def test_from_a_worker(served: str) -> None:
    """As RLlib's env runners use it: made in a Ray worker from plain arguments, through the
    registry.
    """
    import ray

    @ray.remote(num_cpus=0.5)
    def imagine(arguments: dict[str, Any]) -> bytes:
        env = WorldVectorEnv(**arguments)
        env.reset(seed=4)
        places = [env.step(np.arange(3) % 2)[0]["place"] for _ in range(9)]
        env.close()
        return np.stack(places).tobytes()

    arguments: dict[str, Any] = {"num_envs": 3, "world": "sequence", "horizon": 6}
    reference = local("sequence", served, horizon=6)
    reference.reset(seed=4)
    expected = [reference.step(np.arange(3) % 2)[0]["place"] for _ in range(9)]
    assert ray.get(imagine.remote(arguments | {"app": "two"})) == np.stack(expected).tobytes()


def test_forked_client(served: str) -> None:
    """In a fork of a connected process, a new client and an inherited one give one sentence.

    The parent's client continues.
    """
    env = client()
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    uses: list[Callable[[], Any]] = [
        client,
        lambda: client(address="127.0.0.1:1"),
        lambda: env.reset(seed=1),
    ]

    def child() -> None:
        for use in uses:
            try:
                use()
                answers.put("no error")
            except UsageError as error:
                answers.put(str(error))
        env.close()

    def fork(step: int) -> None:
        if step == 4:
            process = context.Process(target=child)
            process.start()
            process.join(120)
            assert process.exitcode == 0

    assert played(env, 8, before=fork) == played(client(), 8)
    messages = [answers.get() for _ in uses]
    message = "was forked from a process that is connected to Ray"
    assert all(message in text and "spawn" in text for text in messages), messages
