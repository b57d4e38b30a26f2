"""How a world's application starts, is refused and ends, on a real Ray Serve; the job `serve`."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from factories import wait_until

from mesocosm.agents.config import AgentConfig
from mesocosm.config import StorageConfig
from mesocosm.config import load as config_of
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.jobs.serve import JOB
from mesocosm.runs import tracking
from mesocosm.serve.config import ServeConfig
from mesocosm.serve.deployment import deploy, undeploy
from mesocosm.serve.world_env import WorldVectorEnv
from mesocosm.store.artifacts import Storage

from .worlds import DICT, played, untrained

pytestmark = pytest.mark.usefixtures("ray_local")


def config(root: str, name: str = "mesocosm", **values: Any) -> ServeConfig:
    values = {"world": "ensemble", "cpus": 0.5} | values
    return ServeConfig(name=name, storage=StorageConfig(root), **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"world": "none"}, "no artifact worlds/none"),
        ({"replicas": 99, "cpus": 1.0}, "serve.replicas=99 with serve.cpus=1 asks for 99 CPUs"),
        (
            {"replicas": 2, "device": "cuda"},
            "serve.replicas=2 with serve.device=cuda asks for 2 GPUs and the cluster has 0",
        ),
    ],
)
def test_refused(served: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        deploy(config(served, **values))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("replicas", 0, ">= 1, got 0"),
        ("threads", 0, ">= 1, got 0"),
        ("max_sessions", -1, ">= 1, got -1"),
        ("max_worlds", 0, ">= 1, got 0"),
        ("cpus", -1.0, ">= 0, got -1.0"),
        ("device", "cdua", "one of .*, got 'cdua'; did you mean 'cuda'"),
    ],
)
def test_wrong_values(served: str, key: str, value: Any, message: str) -> None:
    """A dry run and `deploy` refuse them before anything starts."""
    for refuse in (JOB.plan, deploy):
        with pytest.raises(UsageError, match=f"serve.{key} must be {message}"):
            refuse(config(served, **{key: value}))


def test_a_name_that_is_taken(served: str, tmp_path: Path) -> None:
    """A running application is not replaced by a world of another root, and continues."""
    env = WorldVectorEnv(2, app="two", horizon=5)
    before = played(env, 4)
    Storage(str(tmp_path)).make("worlds", "other", {}, untrained(DICT).save)
    with pytest.raises(
        UsageError, match=r"an application .two. runs on this Ray already; set serve.name"
    ):
        deploy(config(str(tmp_path), "two", world="other"))
    assert played(env, 4) == before


@pytest.mark.slow
def test_ctrl_c_while_it_deploys(served: str) -> None:
    """The name is free again."""
    from ray import serve

    def interrupt() -> None:
        while "early" not in serve.status().applications:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        deploy(config(served, "early"))
    interrupter.join()
    assert "early" not in serve.status().applications


@pytest.mark.slow
def test_nobody_answers(served: str) -> None:
    """An application that ended under a client: one sentence after the deadline."""
    deploy(config(served, "brief"))
    env = WorldVectorEnv(2, app="brief", deadline_s=2.0)
    env.reset()
    for _ in range(2):
        undeploy("brief")
    with pytest.raises(MesocosmError, match="application 'brief': no replica answered for 2 s"):
        env.step(env.action_space.sample())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_replicas_that_cannot_start(served: str, tmp_path: Path) -> None:
    """A damaged world: the first failure is reported, and the error has one line.

    The name is free again. Serve retries before it gives up.
    """
    from ray import serve

    folder = tmp_path / "damaged"
    untrained(DICT).save(folder)
    (folder / "model.safetensors").write_bytes(b"torn")
    reported: list[str] = []
    message = r"^application 'damaged' did not start: world '.*damaged' cannot be read: [^\n]*$"
    with pytest.raises(MesocosmError, match=message):
        deploy(config(served, "damaged", world=str(folder)), reported.append)
    assert any("0 of 1 replica(s) ready: world" in line for line in reported)
    assert "damaged" not in serve.status().applications


def test_job(served: str) -> None:
    """`serve` prints how to connect, and another process steps in the world that way.

    Its train-agent command names the world and the application. Ctrl-C ends it and leaves nothing.
    """
    from ray import serve

    job_config = config(served, "job", world="ens")
    log = Path(served) / "runs/serve/visited/log.txt"
    answers: list[str] = []

    def use_the_world() -> None:
        wait_until(lambda: log.exists() and "make_vec" in log.read_text(), 300)
        printed = log.read_text().splitlines()
        code = [line for line in printed if "import gymnasium" in line or "make_vec" in line]
        code = [line[line.index("import" if i == 0 else "envs") :] for i, line in enumerate(code)]
        code += ["envs.reset(seed=0)", "print(envs.step(envs.action_space.sample())[1].shape)"]
        # Another terminal inherits nothing of this process's Ray.
        terminal = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        pipes: Any = {"capture_output": True, "text": True, "timeout": 300, "env": terminal}
        done = subprocess.run([sys.executable, "-c", "\n".join(code)], **pipes)
        answers.append(done.stdout + done.stderr)

    def use_and_stop() -> None:
        try:
            use_the_world()
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    user = threading.Thread(target=use_and_stop)
    user.start()
    with tracking.start("serve", job_config, id="visited", quiet=True) as job:
        JOB.run(job_config, job)
    user.join()
    text = log.read_text()
    (command,) = [line for line in text.splitlines() if "mesocosm train-agent" in line]
    words = shlex.split(command[command.index("mesocosm train-agent") :])
    trained = config_of(AgentConfig, overrides=words[2:])
    assert (trained.world, trained.app, trained.storage.root) == ("ensemble", "job", served)
    assert trained.ray.address == job.facts["address"]
    assert answers[0].startswith("(64,)"), answers
    steps = ["starting Ray Serve", "starting 1 replica(s), each of which loads world ens"]
    steps += ["1 of 1 replica(s) ready", "is served as 'job'"]
    assert sorted(steps, key=text.index) == steps
    assert "job" not in serve.status().applications
    assert json.loads((job.folder / "status.json").read_text())["state"] == "stopped"
    assert "two" in serve.status().applications, "applications of others stay"
    assert JOB.plan(job_config)["world"] == "ensemble"
    with pytest.raises(UsageError, match=r"serve.world must name a world, got ''"):
        JOB.plan(ServeConfig())
