"""The Ray Serve deployment: replicas that hold worlds and sessions, and their lines."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from mesocosm.cluster import ray_session
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.model.any_world import is_text
from mesocosm.model.world import World
from mesocosm.serve.autoscaling import METRIC, OngoingRequests, desired_replicas
from mesocosm.serve.config import ServeConfig, check, first_replicas
from mesocosm.serve.connection import LOOPBACK
from mesocosm.serve.line import LineServer, packed
from mesocosm.serve.plans import PlanServer
from mesocosm.serve.protocol import pack, unpack
from mesocosm.serve.session import Sessions
from mesocosm.serve.worlds import Worlds, find_world
from mesocosm.store.artifacts import Storage

if TYPE_CHECKING:
    from mesocosm.serve.ingress import Listener

logger = logging.getLogger(__name__)
ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
LOGGING = {"enable_access_log": False, "log_level": "WARNING"}
TAKEN = ("DEPLOYING", "RUNNING", "UNHEALTHY")
"""Serve's states of an application that uses its name"""
POLL_S = 0.1
"""Seconds between checks of an application that starts"""
LISTENERS: dict[str, Listener] = {}
"""The HTTP ingresses of this process, by application"""


class Replica:
    """One replica: `call` answers a packed request, `connect` returns the line that does the same
    faster.
    """

    def __init__(
        self,
        root: str,
        world: str,
        threads: int,
        max_sessions: int,
        max_worlds: int,
        device: str,
        planner: bool,
        agent: str | None,
    ):
        import ray

        torch.set_num_threads(threads)
        worlds = Worlds(root, world, max_worlds, device)
        loaded = worlds.get(world) if world else None
        plans = None
        if planner and loaded is not None and isinstance(loaded[1], World):
            plans = PlanServer(worlds.storage, loaded[0], loaded[1], agent)
        self.sessions = Sessions(worlds.get, max_sessions, plans)
        one_machine = len(ray.nodes()) == 1
        host = LOOPBACK if one_machine else ray.util.get_node_ip_address()
        self._ongoing = OngoingRequests()
        self._line = LineServer(host, self._call_on_line)

    def call(self, data: bytes | bytearray) -> bytes:
        """Answer a packed request. Never raises: the client must get the error and not retry."""
        number = None
        try:
            request = unpack(data)
            number = request.pop("number")
            return packed(self.sessions.call(request) | {"number": number})
        except MesocosmError as error:
            return pack({"error": str(error), "kind": "usage", "number": number})
        except Exception as error:
            logger.exception("a request failed")
            message = f"the replica failed: {type(error).__name__}: {error}"
            return pack({"error": message, "kind": "bug", "number": number})

    def _call_on_line(self, data: bytearray) -> bytes:
        with self._ongoing:
            return self.call(data)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Ray Serve asks for it where the application autoscales (`autoscaling`)."""
        return {METRIC: self._ongoing.mean()}

    def batches(self) -> dict[str, int]:
        """The environments of text worlds that this replica has stepped, and their batches."""
        return self.sessions.batches()

    def connect(self) -> dict[str, Any]:
        """The address and token of this replica's line (who calls this may call the world too)."""
        import ray

        host, port = self._line.address
        replica = {"host": host, "port": port, "token": self._line.token, "pid": os.getpid()}
        return replica | {"node": ray.get_runtime_context().get_node_id()}


def deploy(config: ServeConfig, report: Callable[[str], None] = lambda step: None) -> str:
    """Deploy `config.world` on Ray Serve and wait until it answers.

    Serve's own HTTP and gRPC ingress stay off. The HTTP ingress of `config.http` is a thread of
    this process. An empty `config.world` deploys no default: every client names its own.

    Args:
        config: The deployment.
        report: Called with a line at each step of the start.

    Returns:
        The application's name.

    Raises:
        UsageError: A value is wrong, or an application of that name already runs.
        MesocosmError: The replicas cannot start.
    """
    check(config)
    check_world(config)
    with contextlib.ExitStack() as undo:
        listener = None
        if config.http is not None:
            if not config.world:
                raise UsageError("serve.world must be set with serve.http, got serve.world=''")
            from mesocosm.serve.ingress import Listener  # FastAPI, which no worker needs

            listener = Listener(config.http)
            undo.callback(listener.close)
        _start_serve(config, report)
        undo.callback(undeploy, config.name)  # also after Ctrl-C: on a shared Ray the name is free
        _run(config, report)
        if listener is not None:
            report(f"opening the HTTP ingress at {listener.url}")
            LISTENERS[config.name] = listener
            listener.serve(config.name, config.world, Storage(config.storage.root))
        undo.pop_all()
    return config.name


def check_world(config: ServeConfig) -> None:
    """Raise UsageError or ArtifactError where the default world, or its planner, cannot be served.

    Starts nothing.
    """
    if not config.world:
        return
    storage = Storage(config.storage.root)
    id, folder = find_world(storage, config.world)
    if config.planner is not None and is_text(folder):
        raise UsageError(
            f"planner must be left out for world {id}, whose actions are texts, got"
            f" {config.planner!r}"
        )
    if config.planner is not None:
        PlanServer(storage, id, World.load(folder), config.agent)


def _start_serve(config: ServeConfig, report: Callable[[str], None]) -> None:
    """Connect to Ray and start Serve. Raises UsageError where the application does not fit."""
    import ray

    if not ray.is_initialized():
        address = config.ray.address
        report(f"connecting to Ray at {address}" if address else "starting Ray on this machine")
    ray_session.ensure(config.ray)
    first = first_replicas(config)
    replicas = f"serve.replicas={first} with serve"
    cpus, gpus = first * config.cpus, first * (config.device == "cuda")
    ray_session.preflight(key=f"{replicas}.cpus={config.cpus:g}", cpus=cpus)
    ray_session.preflight(key=f"{replicas}.device={config.device}", gpus=gpus)

    from ray import serve

    report("starting Ray Serve")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(proxy_location="Disabled", logging_config=LOGGING)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    running = serve.status().applications.get(config.name)
    if running is not None and running.status in TAKEN:
        raise UsageError(
            f"an application {config.name!r} runs on this Ray already; set serve.name to another"
            " name, or end that one where it was started"
        )


def _run(config: ServeConfig, report: Callable[[str], None]) -> None:
    """Start the replicas and wait for them, reporting their number and Serve's messages.

    Raises:
        MesocosmError: They cannot start.
    """
    from ray import serve

    world = f"world {config.world}" if config.world else "the worlds that clients name"
    replicas = first_replicas(config)
    report(f"starting {replicas} replica(s), each of which loads {world}")
    target = serve.RunTarget(application(config), name=config.name, route_prefix=None)
    serve.run_many([target], wait_for_applications_running=False)
    name, began, reported = f"application {config.name!r}", time.monotonic(), ""
    while True:
        status = serve.status().applications.get(config.name)
        if status is None:
            raise MesocosmError(f"{name} was deleted while it started; serve it again")
        reason, running = "", 0
        deployment = status.deployments.get("world")
        if deployment is not None:
            reason = _cause(deployment.message)
            running = deployment.replica_states.get("RUNNING", 0)  # type: ignore[call-overload]
        if status.status == "DEPLOY_FAILED":
            raise MesocosmError(f"{name} did not start: {reason or _cause(status.message)}")
        line = f"{running} of {replicas} replica(s) ready" + (f": {reason}" if reason else "")
        if line != reported and (running or reason):
            report(f"{line} [{time.monotonic() - began:.1f} s]")
            reported = line
        if status.status == "RUNNING":
            return
        time.sleep(POLL_S)


def _cause(message: str) -> str:
    """The last line of a Serve message, which in a traceback is the error."""
    lines = message.strip().splitlines()
    return re.sub(r"^mesocosm\.errors\.\w+: ", "", lines[-1].strip()) if lines else ""


def application(config: ServeConfig) -> Any:
    """Build the Serve application of `config`. Starts nothing."""
    from ray import serve
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

    gpus, threads = int(config.device == "cuda"), {"OMP_NUM_THREADS": str(config.threads)}
    actor = {"num_cpus": config.cpus, "num_gpus": gpus, "runtime_env": {"env_vars": threads}}
    count: dict[str, Any] = {"num_replicas": config.replicas}
    if config.autoscaling:
        policy = AutoscalingPolicy(policy_function=desired_replicas)
        count = {"autoscaling_config": AutoscalingConfig(**config.autoscaling, policy=policy)}
    deployment = serve.deployment(Replica).options(  # type: ignore[attr-defined]
        name="world",
        **count,
        max_ongoing_requests=256,
        ray_actor_options=actor,
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),  # type: ignore[arg-type]
        logging_config=LOGGING,
    )
    root, limits = Storage(config.storage.root).root, (config.max_sessions, config.max_worlds)
    plans = config.planner is not None, config.agent
    return deployment.bind(root, config.world, config.threads, *limits, config.device, *plans)


def undeploy(name: str) -> None:
    """End an application, its replicas and this process's HTTP ingress to it, if they exist."""
    import ray
    from ray import serve

    listener = LISTENERS.pop(name, None)
    if listener is not None:
        listener.close()
    if ray.is_initialized() and name in serve.status().applications:
        serve.delete(name)
