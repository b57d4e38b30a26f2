"""The Ray Serve deployment: replicas that hold worlds and sessions, and the line by which clients
reach them.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from mesocosm.cluster import ray_session
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.serve.config import ServeConfig, check
from mesocosm.serve.connection import LOOPBACK, packed
from mesocosm.serve.line import LineServer
from mesocosm.serve.protocol import pack, unpack
from mesocosm.serve.session import Sessions, Worlds, find_world
from mesocosm.store.artifacts import Storage

if TYPE_CHECKING:
    from mesocosm.serve.ingress import Listener

logger = logging.getLogger(__name__)
ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
TAKEN = ("DEPLOYING", "RUNNING", "UNHEALTHY")
"""Serve's states of an application in which its name is somebody's."""
POLL_S = 0.1
"""Seconds between looks at an application that starts"""
LISTENERS: dict[str, Listener] = {}
"""The HTTP ingresses of this process, by application."""


class Replica:
    """One replica: `call` answers a packed request, `connect` gives a client the line that does the
    same faster.
    """

    def __init__(
        self, root: str, world: str, threads: int, max_sessions: int, max_worlds: int, device: str
    ):
        torch.set_num_threads(threads)
        worlds = Worlds(root, world, max_worlds, device)
        if world:
            worlds.get(world)
        self.sessions = Sessions(worlds.get, max_sessions)
        self._line = LineServer(_host(), self.call)

    def call(self, data: bytes | bytearray) -> bytes:
        number = None
        try:
            request = unpack(data)
            number = request.pop("number")
            return packed(self.sessions.handle(request) | {"number": number})
        except MesocosmError as error:
            return pack({"error": str(error), "kind": "usage", "number": number})
        except Exception as error:  # a bug of ours, or bytes that are no message: the client must hear of it and not try again
            logger.exception("a request failed")
            return pack(
                {
                    "error": f"the replica failed: {type(error).__name__}: {error}",
                    "kind": "bug",
                    "number": number,
                }
            )

    def connect(self) -> dict[str, Any]:
        """Host, port and token of this replica's line, its node and its pid. Who can call this may
        call the world anyway.
        """
        import ray

        host, port = self._line.address
        node = ray.get_runtime_context().get_node_id()
        replica = {"host": host, "port": port, "token": self._line.token}
        return replica | {"node": node, "pid": os.getpid()}


def _host() -> str:
    """Where the line listens: loopback while the cluster is this machine alone, this node's address
    otherwise.
    """
    import ray

    return LOOPBACK if len(ray.nodes()) == 1 else ray.util.get_node_ip_address()


def deploy(config: ServeConfig, report: Callable[[str], None] = lambda step: None) -> str:
    """Deploy `config.world` on Ray Serve, and wait until it answers; gives the application's name.
    Serve's own HTTP and gRPC ingress stay off: that of `config.http` is a thread of this process
    (`ingress`), which ends with `undeploy`.

    An empty `config.world` deploys without a default: every client names its own. Raises UsageError
    before anything starts, also where an application of that name runs on this Ray: its clients, or
    its owner's `undeploy`, are somebody else's. Raises MesocosmError where its replicas cannot
    start.

    Args:
        config: What to deploy.
        report: Called with one line at each step of the start.
    """
    check(config)
    if config.world:
        find_world(Storage(config.storage.root), config.world)
    if config.http is not None and not config.world:
        raise UsageError(
            f"serve.http={config.http} with serve.world='': the HTTP ingress is to one world; set"
            " serve.world"
        )
    listener = None
    if config.http is not None:
        from mesocosm.serve.ingress import Listener  # FastAPI, which no worker needs

        listener = Listener(config.http)
    try:
        _run(config, report)
    except BaseException:
        if listener is not None:
            listener.close()
        raise
    if listener is not None:
        report(f"opening the HTTP ingress at {listener.url}")
        LISTENERS[config.name] = listener
        try:
            listener.serve(config.name, config.world)
        except BaseException:
            undeploy(config.name)
            raise
    return config.name


def _run(config: ServeConfig, report: Callable[[str], None]) -> None:
    import ray

    if not ray.is_initialized():
        address = config.ray.address
        report(f"connecting to Ray at {address}" if address else "starting Ray on this machine")
    ray_session.ensure(config.ray)
    gpus = 1 if config.device == "cuda" else 0
    ray_session.preflight(
        what=f"serve.replicas={config.replicas} with serve.cpus={config.cpus:g}",
        cpus=config.replicas * config.cpus,
    )
    ray_session.preflight(
        what=f"serve.replicas={config.replicas} with serve.device={config.device}",
        gpus=config.replicas * gpus,
    )

    from ray import serve

    report("starting Ray Serve")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(
        proxy_location="Disabled",
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    running = serve.status().applications.get(config.name)
    if running is not None and running.status in TAKEN:
        raise UsageError(
            f"an application {config.name!r} runs on this Ray already; set serve.name to another"
            " name, or end that one where it was started"
        )
    world = f"world {config.world}" if config.world else "a world when a client names it"
    report(f"starting {config.replicas} replica(s), each of which loads {world}")
    try:
        target = serve.RunTarget(application(config), name=config.name, route_prefix=None)
        serve.run_many([target], wait_for_applications_running=False)
        _await_running(config, report)
    except (
        BaseException
    ):  # Ctrl-C while replicas start, or one that cannot: on a shared Ray the name would stay taken
        undeploy(config.name)
        raise


def _await_running(config: ServeConfig, report: Callable[[str], None]) -> None:
    """Wait until all replicas answer. Report how many do, and what Serve says of the others.

    Raises MesocosmError where they cannot start.
    """
    from ray import serve

    application = f"application {config.name!r}"
    began, reported = time.monotonic(), ""
    while True:
        status = serve.status().applications.get(config.name)
        if status is None:
            raise MesocosmError(f"{application} was deleted while it started; serve it again")
        reason, running = "", 0
        deployment = status.deployments.get("world")
        if deployment is not None:
            reason = _cause(deployment.message)
            states = deployment.replica_states.items()
            running = sum(count for state, count in states if state == "RUNNING")
        if status.status == "DEPLOY_FAILED":
            raise MesocosmError(f"{application} did not start: {reason or _cause(status.message)}")
        line = f"{running} of {config.replicas} replica(s) ready"
        if reason:
            line += f": {reason}"
        if line != reported and (running or reason):
            report(f"{line} [{time.monotonic() - began:.1f} s]")
            reported = line
        if status.status == "RUNNING":
            return
        time.sleep(POLL_S)


def _cause(message: str) -> str:
    """One line of a message of Serve: the last one, which in a traceback is the error."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return re.sub(r"^mesocosm\.errors\.\w+: ", "", lines[-1]) if lines else ""


def application(config: ServeConfig) -> Any:
    """The Serve application: `config.replicas` of `Replica`. Nothing runs yet."""
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    deployment = serve.deployment(Replica).options(  # type: ignore[attr-defined]
        name="world",
        num_replicas=config.replicas,
        max_ongoing_requests=256,
        ray_actor_options={
            "num_cpus": config.cpus,
            "num_gpus": 1 if config.device == "cuda" else 0,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(config.threads)}},
        },
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),  # type: ignore[arg-type]
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )
    root = Storage(config.storage.root).root
    return deployment.bind(
        root, config.world, config.threads, config.max_sessions, config.max_worlds, config.device
    )


def undeploy(name: str) -> None:
    """End the application `name`, its replicas and the HTTP ingress that this process gave it;
    nothing happens where it is gone already.
    """
    import ray
    from ray import serve

    listener = LISTENERS.pop(name, None)
    if listener is not None:
        listener.close()
    if ray.is_initialized() and name in serve.status().applications:
        serve.delete(name)
