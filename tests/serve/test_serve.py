"""Worlds on a real Ray Serve: the same bits as in process, also after replicas are killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import signal
import socket
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

from mesocosm.agents.config import AgentConfig
from mesocosm.config import RayConfig, StorageConfig
from mesocosm.config import load as config_of
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.jobs import serve as serve_job
from mesocosm.runs import tracking
from mesocosm.serve import connection, deployment
from mesocosm.serve import line as lines
from mesocosm.serve.client import WorldVectorEnv
from mesocosm.serve.config import ServeConfig
from mesocosm.serve.connection import Served
from mesocosm.serve.deployment import deploy, undeploy
from mesocosm.serve.line import FRAME, receive_frame, send_frame
from mesocosm.serve.protocol import pack
from mesocosm.store.artifacts import Storage

pytestmark = pytest.mark.usefixtures("ray_local")
DICT = spaces.Dict(
    {"place": spaces.Box(-np.inf, np.inf, (2,), np.float64), "room": spaces.Discrete(4)}
)


@pytest.fixture(scope="module")
def served(
    make_world: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, ray_local: None
) -> Iterator[str]:
    """Two replicas over a storage root with a world of each family."""
    root = str(tmp_path_factory.mktemp("served"))
    for family in ("ensemble", "sequence"):
        Storage(root).make("worlds", family, {}, make_world(DICT, family=family, terminal=0.1).save)
    deploy(
        ServeConfig(
            world="ensemble", name="two", replicas=2, storage=StorageConfig(root), ray=RayConfig()
        )
    )
    yield root
    undeploy("two")


def flat(step: tuple[Any, ...]) -> list[bytes]:
    observation, *rest = step
    infos = rest.pop()
    return [
        np.asarray(value).tobytes()
        for value in [*observation.values(), *rest, infos.get("disagreement", np.zeros(0))]
    ]


def rollout(
    env: WorldVectorEnv, steps: int, seed: int = 1, at: Callable[[int], None] = lambda step: None
) -> list[list[bytes]]:
    """The bytes of each step; `at` is called before each."""
    env.action_space.seed(0)
    results = [flat(env.reset(seed=seed))]
    for step in range(steps):
        at(step)
        results.append(flat(env.step(env.action_space.sample())))
    return results


def replica(env: WorldVectorEnv) -> int:
    assert isinstance(env._connection, Served) and env._connection.replica is not None
    return int(env._connection.replica["pid"])


@pytest.mark.parametrize("family", ["ensemble", "sequence"])
def test_served_is_in_process(served: str, family: str) -> None:
    for mode in ("NextStep", "SameStep"):
        env = WorldVectorEnv(5, family, app="two", horizon=11, autoreset_mode=mode)
        assert replica(env) != os.getpid()
        assert rollout(env, 30) == rollout(
            WorldVectorEnv(
                5, family, root=served, backend="local", horizon=11, autoreset_mode=mode
            ),
            30,
        )
        env.close()


def test_default_and_make_vec(served: str) -> None:
    """The application's default world, through gymnasium.make_vec."""
    env = gymnasium.make_vec("mesocosm/World-v0", num_envs=3, app="two", horizon=5)
    assert env.unwrapped.world == "ensemble"
    assert rollout(env, 6) == rollout(
        WorldVectorEnv(3, "ensemble", root=served, backend="local", horizon=5), 6
    )
    env.close()


@pytest.mark.parametrize(("family", "kills"), [("sequence", (4, 14)), ("ensemble", (9,))])
def test_kill(served: str, family: str, kills: tuple[int, ...]) -> None:
    """SIGKILL of the session's replica; for `sequence` before its context is rebuilt, and after."""
    undisturbed = rollout(WorldVectorEnv(4, family, app="two", horizon=30), 25)
    env = WorldVectorEnv(4, family, app="two", horizon=30)
    killed: list[int] = []

    def kill(step: int) -> None:
        if step in kills:
            killed.append(replica(env))
            os.kill(killed[-1], signal.SIGKILL)

    assert rollout(env, 25, at=kill) == undisturbed
    assert len(set(killed)) == len(kills) and replica(env) not in killed


@pytest.mark.slow
def test_kill_while_it_answers(served: str) -> None:
    """SIGKILL of a replica that is answering changes no bit, before and after a rebuild."""
    undisturbed = rollout(WorldVectorEnv(4, "sequence", app="two", horizon=30), 16)
    env = WorldVectorEnv(4, "sequence", app="two", horizon=30)
    killed: list[int] = []

    def kill(step: int) -> None:
        if step in (3, 11):
            killed.append(replica(env))
            os.kill(killed[-1], signal.SIGSTOP)
            threading.Timer(0.3, os.kill, (killed[-1], signal.SIGKILL)).start()

    assert rollout(env, 16, at=kill) == undisturbed
    assert len(set(killed)) == 2 and replica(env) not in killed


@pytest.mark.parametrize("other", [False, True], ids=["the same action again", "another action"])
def test_ctrl_c(served: str, other: bool) -> None:
    """After Ctrl-C during a call the next call gets its own reply, also for another action."""
    env, undisturbed = (WorldVectorEnv(3, "sequence", app="two", horizon=9) for _ in range(2))
    for each in (env, undisturbed):
        each.action_space.seed(0)
        each.reset(seed=1)
    for step in range(10):
        action = env.action_space.sample()
        if step == 4:
            pid = replica(env)
            os.kill(pid, signal.SIGSTOP)
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            with pytest.raises(KeyboardInterrupt):
                env.step(1 - action if other else action)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.3)
        assert flat(env.step(action)) == flat(undisturbed.step(action)), step


def test_ctrl_c_in_a_reset(served: str) -> None:
    """After Ctrl-C in `reset` the client must be reset, and then works as before."""
    env = WorldVectorEnv(3, "sequence", app="two", horizon=9)
    expected = rollout(env, 5)
    env.reset(seed=7)
    pid = replica(env)
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        env.reset()
    os.kill(pid, signal.SIGCONT)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(env.action_space.sample())
    assert rollout(env, 5) == expected


def test_broken_line(served: str) -> None:
    """If the socket breaks or is out of step, a client never takes another request's reply."""
    expected = rollout(WorldVectorEnv(3, "sequence", app="two", horizon=9), 16)
    env = WorldVectorEnv(3, "sequence", app="two", horizon=9)
    line = env._connection
    assert isinstance(line, Served)

    def break_line(step: int) -> None:
        assert line._line is not None
        if step % 5 == 2:
            line._line.shutdown(2)
        if step % 5 == 4:
            send_frame(line._line, pack({"op": "describe", "world": "", "number": 0}))

    assert rollout(env, 16, at=break_line) == expected


@pytest.fixture
def full_port() -> Iterator[int]:
    """A port that drops every packet, as a firewall does: a listener with a full queue."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]
        for one in waiting:
            one.close()


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
            return super().connect() | json.loads((tmp_path / "results.json").read_text())

    application = serve.deployment(Elsewhere).options(
        name="world", ray_actor_options={"num_cpus": 0.5}
    )  # type: ignore[attr-defined]
    (tmp_path / "results.json").write_text(json.dumps({"port": full_port}))
    serve.run(
        application.bind(served, "sequence", 1, 8, 1, "cpu"), name="elsewhere", route_prefix=None
    )
    monkeypatch.setattr(connection, "DIAL_S", 1.5)
    expected = rollout(WorldVectorEnv(3, "sequence", app="two", horizon=9), 16)
    began = time.monotonic()
    env = WorldVectorEnv(3, "sequence", app="elsewhere", horizon=9)
    assert time.monotonic() - began > 1.5, "the port must not answer"
    began = time.monotonic()
    assert rollout(env, 16) == expected
    assert time.monotonic() - began < 1.5
    assert isinstance(env._connection, Served) and env._connection._line is None

    with socket.create_server(("127.0.0.1", 0)) as mine:
        mine.settimeout(0.2)
        (tmp_path / "results.json").write_text(
            json.dumps({"port": mine.getsockname()[1], "node": "f" * 56})
        )
        assert rollout(WorldVectorEnv(3, "sequence", app="elsewhere", horizon=9), 16) == expected
        with pytest.raises(TimeoutError):
            mine.accept()
    undeploy("elsewhere")


def test_line_wants_the_token(served: str) -> None:
    """Without the token a client gets no answer and allocates no memory."""
    env = WorldVectorEnv(1, app="two")
    assert isinstance(env._connection, Served) and env._connection.replica is not None
    host, port = env._connection.replica["host"], env._connection.replica["port"]
    assert host == "127.0.0.1"
    with socket.create_connection((host, port), timeout=10) as line:
        send_frame(line, b"x" * 32)
        try:
            send_frame(line, pack({"op": "describe", "world": "", "number": 1}))
            answer = receive_frame(line)
        except ConnectionError:
            answer = None
    assert answer is None
    with socket.create_connection((host, port), timeout=3) as line:
        line.sendall(FRAME.pack(1 << 28))
        assert line.recv(1) == b"", "it must hang up at the size alone"


def test_a_message_too_large(served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    env = WorldVectorEnv(64, app="two")
    env.reset(seed=0)
    monkeypatch.setattr(lines, "LARGEST", 1 << 10)
    with pytest.raises(UsageError, match=r"must be at most 0 MiB, got .*; lower num_envs"):
        env.step(env.action_space.sample())
    monkeypatch.undo()
    assert rollout(env, 4) == rollout(WorldVectorEnv(64, app="two"), 4)


@pytest.mark.slow
def test_eviction(served: str) -> None:
    """Three clients of a replica with two sessions: the least recently used is evicted, and its
    client continues with the same bits.
    """
    deploy(
        ServeConfig(
            world="sequence", name="small", cpus=0.5, max_sessions=2, storage=StorageConfig(served)
        )
    )
    envs = [WorldVectorEnv(3, app="small", horizon=9, first_env=3 * i) for i in range(3)]
    alone = [
        WorldVectorEnv(3, "sequence", root=served, backend="local", horizon=9, first_env=3 * i)
        for i in range(3)
    ]
    operations: list[list[str]] = [[], [], []]
    for env, local, ops in zip(envs, alone, operations, strict=True):
        send = env._connection.call  # type: ignore[union-attr]
        env._connection.call = lambda request, send=send, ops=ops: (
            ops.append(request["op"]),
            send(request),
        )[1]  # type: ignore[method-assign, union-attr]
        assert flat(env.reset(seed=3)) == flat(local.reset(seed=3))
    action = np.array([0, 1, 1])
    for turn in range(9):
        for i in (
            0,
            1 + turn % 2,
        ):  # the first is used at every turn, the others at every second one
            assert flat(envs[i].step(action)) == flat(alone[i].step(action)), (turn, i)
    last = {"op": "step", "session": envs[0]._session, "clock": 9}
    envs[0].close()
    assert envs[1]._call(last) == {"missing": True}, "a closed client's session must be gone"
    undeploy("small")
    assert [ops.count("restore") for ops in operations] == [1, 5, 4], (
        "each reset evicted one, and then the first client stays"
    )


def test_new_version_while_serving(served: str, make_world: Callable[..., Any]) -> None:
    """A reset can pin a world made after the deployment."""
    env = WorldVectorEnv(2, "ensemble", app="two", horizon=5)
    env.reset()
    Storage(served).make("worlds", "newer", {}, make_world(DICT, seed=9).save)
    env.reset(options={"world": "newer"})
    local = WorldVectorEnv(2, "newer", root=served, backend="local", horizon=5)
    assert rollout(env, 8) == rollout(local, 8)


def test_missing(served: str) -> None:
    with pytest.raises(
        UsageError,
        match=(
            r"'nobody' is served on this Ray; run `mesocosm serve world=ID name=nobody` and give"
            r" the ray.address .* or set backend=local"
        ),
    ):
        WorldVectorEnv(2, app="nobody")
    with pytest.raises(
        UsageError, match=r"no artifact worlds/ensembel in storage.root .*did you mean 'ensemble'"
    ):
        WorldVectorEnv(2, "ensembel", app="two")
    with pytest.raises(UsageError, match="no artifact worlds/none"):
        deploy(ServeConfig(world="none", storage=StorageConfig(served)))
    with pytest.raises(UsageError, match=r"serve.replicas=99 with serve.cpus=1 asks for 99 CPUs"):
        deploy(ServeConfig(world="ensemble", replicas=99, storage=StorageConfig(served)))
    with pytest.raises(
        UsageError,
        match=r"serve.replicas=2 with serve.device=cuda asks for 2 GPUs and the cluster has 0",
    ):
        deploy(
            ServeConfig(world="ensemble", replicas=2, device="cuda", storage=StorageConfig(served))
        )


def test_a_name_that_is_taken(served: str, make_world: Callable[..., Any], tmp_path: Path) -> None:
    """A running application is not replaced by a world of another root, and continues."""
    env = WorldVectorEnv(2, app="two", horizon=5)
    before = rollout(env, 4)
    Storage(str(tmp_path)).make("worlds", "other", {}, make_world(DICT).save)
    with pytest.raises(
        UsageError,
        match=r"an application 'two' runs on this Ray already; set serve.name to another name",
    ):
        deploy(ServeConfig(world="other", name="two", storage=StorageConfig(str(tmp_path))))
    assert rollout(env, 4) == before


@pytest.mark.slow
def test_ctrl_c_while_it_deploys(served: str) -> None:
    """The name is free again."""
    from ray import serve

    def interrupt() -> None:
        while "early" not in serve.status().applications:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    other = threading.Thread(target=interrupt)
    other.start()
    with pytest.raises(KeyboardInterrupt):
        deploy(ServeConfig(world="ensemble", name="early", cpus=0.5, storage=StorageConfig(served)))
    other.join()
    assert "early" not in serve.status().applications


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("replicas=0", "serve.replicas must be >= 1, got 0"),
        ("threads=0", "serve.threads must be >= 1, got 0"),
        ("max_sessions=-1", "serve.max_sessions must be >= 1, got -1"),
        ("max_worlds=0", "serve.max_worlds must be >= 1, got 0"),
        ("cpus=-1", "serve.cpus must be >= 0, got -1.0"),
        ("device=cdua", "serve.device must be .*, got 'cdua'; did you mean 'cuda'"),
    ],
)
def test_wrong_values(served: str, override: str, message: str) -> None:
    """A dry run and `deploy` refuse them before anything starts."""
    key, value = override.split("=")
    config = ServeConfig(world="ensemble", storage=StorageConfig(served))
    setattr(config, key, type(getattr(config, key))(value))
    for refuse in (serve_job.JOB.plan, deploy):
        with pytest.raises(UsageError, match=message):
            refuse(config)


@pytest.mark.slow
def test_nobody_answers(served: str, tmp_path: Path) -> None:
    """An application that ended while a client was at it: one sentence after the deadline, no
    endless wait.
    """
    deploy(ServeConfig(world="ensemble", name="brief", cpus=0.5, storage=StorageConfig(served)))
    env = WorldVectorEnv(2, app="brief", deadline_s=2.0)
    env.reset()
    undeploy("brief")
    undeploy("brief")
    with pytest.raises(
        MesocosmError, match="world application 'brief': no replica answered for 2 s"
    ):
        env.step(env.action_space.sample())


def test_from_a_worker(served: str) -> None:
    """As RLlib's env runners use it: made in a Ray worker from plain arguments, through the
    registry.
    """
    import ray

    @ray.remote(num_cpus=0.5)
    def imagine(arguments: dict[str, Any]) -> Any:
        env = WorldVectorEnv(**arguments)
        env.reset(seed=4)
        results = [env.step(np.arange(3) % 2)[0]["place"] for _ in range(9)]
        env.close()
        return np.stack(results)

    there = ray.get(
        imagine.remote({"num_envs": 3, "world": "sequence", "app": "two", "horizon": 6})
    )
    here = WorldVectorEnv(3, "sequence", root=served, backend="local", horizon=6)
    here.reset(seed=4)
    np.testing.assert_array_equal(
        there, np.stack([here.step(np.arange(3) % 2)[0]["place"] for _ in range(9)])
    )


def test_forked_client(served: str) -> None:
    """In a fork of a connected process, a new client and an inherited one give one sentence.

    The parent's client continues.
    """
    env = WorldVectorEnv(3, "sequence", app="two", horizon=9)
    expected = rollout(env, 8)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def child() -> None:
        uses: list[Callable[[], Any]] = [
            lambda: WorldVectorEnv(3, app="two"),
            lambda: WorldVectorEnv(3, app="two", address="127.0.0.1:1"),
            lambda: env.reset(seed=1),
        ]
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

    assert rollout(env, 8, at=fork) == expected
    messages = [answers.get() for _ in range(3)]
    sentence = "was forked from a process that is connected to Ray"
    assert all(sentence in each and "spawn" in each for each in messages), messages


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_replicas_that_cannot_start(served: str, make_world: Any, tmp_path: Path) -> None:
    """A damaged world: the first failure is reported, and the error has one line.

    The name is free again. Serve retries before it gives up.
    """
    from ray import serve

    make_world(DICT).save(tmp_path / "damaged")
    (tmp_path / "damaged/model.safetensors").write_bytes(b"torn")
    reported: list[str] = []
    storage = StorageConfig(served)
    config = ServeConfig(world=str(tmp_path / "damaged"), name="damaged", cpus=0.5, storage=storage)
    sentence = r"^application 'damaged' did not start: world '.*damaged' cannot be read: [^\n]*$"
    with pytest.raises(MesocosmError, match=sentence):
        deploy(config, reported.append)
    assert any("0 of 1 replica(s) ready: world" in line for line in reported)
    assert "damaged" not in serve.status().applications


def test_job(served: str) -> None:
    """`serve` prints how to connect, and another process steps in the world that way.

    Its train-agent command names the world and the application. Ctrl-C ends it and leaves nothing.
    """
    from ray import serve

    config = ServeConfig(world="ens", name="job", cpus=0.5, storage=StorageConfig(served))
    answers: list[str] = []
    commands: list[str] = []

    def use_the_world() -> None:
        log = None
        while log is None or "make_vec" not in log:
            time.sleep(0.2)
            logs = list(Path(served).glob("runs/serve/visited/log.txt"))
            log = logs[0].read_text() if logs else None
        commands.extend(
            line[line.index("mesocosm train-agent") :]
            for line in log.splitlines()
            if "mesocosm train-agent" in line
        )
        lines = [
            line.split("Z ")[-1].strip()
            for line in log.splitlines()
            if "import gymnasium" in line or "make_vec" in line
        ]
        lines[0] = lines[0][lines[0].index("import") :]
        code = "\n".join(
            [*lines, "envs.reset(seed=0)", "print(envs.step(envs.action_space.sample())[1].shape)"]
        )
        terminal = {
            name: value for name, value in os.environ.items() if not name.startswith("RAY_")
        }  # another one inherits nothing of this process's Ray
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=terminal
        )
        answers.append(done.stdout + done.stderr)
        os.kill(os.getpid(), signal.SIGINT)

    user = threading.Thread(target=use_the_world)
    user.start()
    with tracking.start("serve", config, id="visited", quiet=True) as job:
        serve_job.JOB.run(config, job)
    user.join()
    trained = config_of(AgentConfig, overrides=shlex.split(commands[0])[2:])
    assert (trained.world, trained.app, trained.storage.root) == ("ensemble", "job", served)
    assert trained.ray.address == job.facts["address"]
    assert answers[0].startswith("(64,)"), answers
    log = (Path(served) / "runs/serve/visited/log.txt").read_text()
    steps = (
        "starting Ray Serve",
        "starting 1 replica(s), each of which loads world ens",
        "1 of 1 replica(s) ready",
        "is served as 'job'",
    )
    assert sorted(steps, key=log.index) == list(steps)
    assert "job" not in serve.status().applications
    assert json.loads((job.folder / "status.json").read_text())["state"] == "stopped"
    assert "two" in serve.status().applications, "what others serve stays"
    assert serve_job.JOB.plan(config)["world"] == "ensemble"
    with pytest.raises(UsageError, match=r"serve.world must name a world, got ''"):
        serve_job.JOB.plan(ServeConfig())
