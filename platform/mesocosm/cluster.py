"""The only module that connects to Ray: one connection a process, a preflight of resources, a clean end.

A local Ray is private to this process: loopback only, its own temporary folder, no dashboard, no usage report. What
it started ends with `shutdown`, which also runs at exit.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from mesocosm import cache
from mesocosm.config import RayConfig
from mesocosm.errors import MesocosmError, UsageError

STARTS = 3
"""Attempts at a local Ray: on a loaded machine one of its daemons may miss the 30 s that Ray gives it."""

FULL = "MESOCOSM_FULL_SIZE"
"""The environment variable of a submitted job, where its cluster grows: JSON of the CPUs and GPUs that it has at full size."""

GROWING_S = 3600
"""Seconds that ranks wait for their places where the cluster grows: a cloud's machine takes minutes to come, and a rare one longer."""

_temp_dir: str | None = None

_forked = False
"""Whether this process was forked from one that was connected to Ray. Ray's threads do not survive a fork."""


def _after_fork() -> None:
    global _forked, _temp_dir
    connected = getattr(sys.modules.get("ray"), "is_initialized", None)  # None while Ray is being imported
    _forked = _forked or (connected is not None and connected())
    _temp_dir = None  # the parent's


os.register_at_fork(after_in_child=_after_fork)


def forked() -> bool:
    """Whether this process was forked from one that was connected to Ray."""
    return _forked


def refuse_fork() -> None:
    """Raise UsageError in a process that was forked from one connected to Ray, where a call to Ray hangs."""
    if _forked:
        raise UsageError(
            f"process {os.getpid()} was forked from a process that is connected to Ray, and cannot use that connection; start it with the spawn method "
            "(in gymnasium.make_vec: vector_kwargs={'context': 'spawn'}), or step all environments in one process (leave vectorization_mode out)"
        )


def worker_env() -> dict[str, str]:
    """Environment of every worker: one thread a process, the venv's tools (ninja) on PATH, one cache of compiled ops."""
    scripts = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", "")
    return {
        "OMP_NUM_THREADS": "1",
        "PATH": path if scripts in path.split(os.pathsep) else scripts + os.pathsep + path,
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache" / "mesocosm" / "torch_extensions")),
        "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
        "TOKENIZERS_PARALLELISM": "false",
        **({cache.VARIABLE: os.environ[cache.VARIABLE]} if cache.VARIABLE in os.environ else {}),
    }


def ensure(config: RayConfig, *, temp_dir: str | None = None) -> None:
    """Connect to `config.address`, or start a private local Ray; a second call is a no-op.

    Raises UsageError when an address does not answer, or in a process that was forked from one connected to Ray.
    """
    import ray

    refuse_fork()
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(GROWING_S if FULL in os.environ else 120))
    os.environ.update(worker_env())
    from ray._private import ray_constants
    from ray._private.authentication import authentication_token_setup

    if config.address is not None:
        if config.address.startswith(("127.0.0.1:", "localhost:")):
            ray_constants.ENABLE_RAY_CLUSTER = False  # a private Ray of this machine, see below: else Ray asks at the machine's own address
            # Such a Ray wants the token in ~/.ray, which Ray itself shows to no address that was named.
            authentication_token_setup.logger.setLevel(logging.ERROR)
            authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        try:
            ray.init(address=config.address, runtime_env={"env_vars": _remote_env()}, log_to_driver=True, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            raise UsageError(f"ray.address {config.address!r} does not answer ({error}); start the cluster or leave ray.address unset") from error
        return
    global _temp_dir
    if temp_dir is None:
        temp_dir = _temp_dir = tempfile.mkdtemp(prefix="mesocosm-ray-")
    # Ray on Linux turns 127.0.0.1 into the machine's own address and listens on every interface; on macOS and Windows it
    # stays on loopback. A laptop's private Ray is given that behaviour here: nobody else may reach it.
    ray_constants.ENABLE_RAY_CLUSTER = False
    for attempt in range(1, STARTS + 1):
        try:
            ray.init(
                address="local",
                num_cpus=local_cpus(config),
                include_dashboard=False,
                _temp_dir=temp_dir,
                _node_ip_address="127.0.0.1",
                object_store_memory=512 * 1024**2,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            break
        except Exception as error:  # Ray raises a bare Exception when one of its daemons is late
            ray.shutdown()
            if attempt == STARTS:
                raise MesocosmError(f"Ray did not start on this machine in {STARTS} attempts ({error}); free some CPU, or see {temp_dir}") from error
    atexit.register(shutdown)


def _remote_env() -> dict[str, str]:
    """What of `worker_env` means the same on another machine."""
    return {name: value for name, value in worker_env().items() if name not in ("PATH", "TORCH_EXTENSIONS_DIR")}


def most() -> dict[str, float]:
    """Of each resource what the cluster has, or will have when it has grown. Nobody tells Ray how far its autoscaler may go: the cluster's own file does."""
    import ray

    have = {name: float(amount) for name, amount in ray.cluster_resources().items()}
    full: dict[str, float] = json.loads(os.environ.get(FULL, "{}"))
    return have | {name: max(have.get(name, 0.0), amount) for name, amount in full.items()}


def expected(config: RayConfig) -> dict[str, float]:
    """The resources that a job will have. Starts no Ray; connects to `ray.address`."""
    import ray

    if config.address is not None:
        ensure(config)
    if ray.is_initialized():
        return most()
    import torch

    return {"CPU": float(local_cpus(config)), "GPU": float(torch.cuda.device_count())}


def local_cpus(config: RayConfig) -> int:
    """Logical CPUs of a local Ray."""
    return config.cpus or max(4, os.cpu_count() or 1)


def preflight(
    *,
    what: str,
    cpus: float = 0,
    gpus: float = 0,
    config: RayConfig | None = None,
) -> None:
    """Raise UsageError, naming `what`, when the cluster can never grant it.

    `what` is the config key and value that asks. With `config` Ray need not run: the check is against what it would have.
    """
    have = most() if config is None else expected(config)
    for name, need in (("CPU", cpus), ("GPU", gpus)):
        if need > have.get(name, 0):
            raise UsageError(f"{what} asks for {need:g} {name}s and the cluster has {have.get(name, 0):g}; lower it, or use a larger cluster")


def stuck(what: str) -> NoReturn:
    """Raise MesocosmError: `what` waits for resources, of which the error says what the cluster has."""
    import ray

    have, free = ray.cluster_resources(), ray.available_resources()
    told = ", ".join(f"{free.get(name, 0):g} of {have[name]:g} {name}s free" for name in ("CPU", "GPU") if name in have) or "no CPU at all"
    raise MesocosmError(f"{what}: the cluster has {told}; bring its nodes back or free some, and run the same command again to go on")


def shutdown() -> None:
    """End what `ensure` started. Safe to call twice."""
    global _temp_dir
    if "ray" in sys.modules:
        import ray

        if ray.is_initialized():
            ray.shutdown()
    if _temp_dir is not None:
        shutil.rmtree(_temp_dir, ignore_errors=True)
        _temp_dir = None
