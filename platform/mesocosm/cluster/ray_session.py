"""The only module that connects to Ray. A local Ray is private to this process: on loopback, in its
own temporary folder, without a dashboard or usage report.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from mesocosm import compat, signals
from mesocosm.cluster.session_folder import SessionFolder
from mesocosm.cluster.spec import make_token
from mesocosm.config import RayConfig
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.store.files import CACHE_VARIABLE
from mesocosm.user_code import IMPORTS

STARTS = 3
"""Attempts to start a local Ray: on a busy machine one of its daemons may miss Ray's 30 s."""
FULL = "MESOCOSM_FULL_SIZE"
"""A submitted job's environment variable with its growing cluster's full CPUs and GPUs, as JSON."""
GROWING_S = 3600
"""Seconds that ranks wait for nodes where the cluster grows: a cloud's machine takes minutes."""

_folder: SessionFolder | None = None
_forked = False
"""True if this process was forked from one that was connected to Ray. Its threads are gone."""


def _after_fork() -> None:
    global _forked, _folder
    # A module that is still being imported has no `is_initialized` yet.
    connected = getattr(sys.modules.get("ray"), "is_initialized", None)
    _forked = _forked or (connected is not None and connected())
    _folder = None  # it is the parent's


os.register_at_fork(after_in_child=_after_fork)


def forked() -> bool:
    return _forked


def refuse_fork() -> None:
    """Raise UsageError in a fork of a process connected to Ray, where a call to Ray hangs."""
    if _forked:
        raise UsageError(
            f"process {os.getpid()} was forked from a process that is connected to Ray, and cannot"
            " use that connection; start it with the spawn method (in gymnasium.make_vec:"
            " vector_kwargs={'context': 'spawn'}), or leave vectorization_mode out"
        )


def worker_env() -> dict[str, str]:
    """The environment of every worker: one thread, the venv's tools (ninja), one cache of ops."""
    scripts, path = str(Path(sys.executable).parent), os.environ.get("PATH", "")
    if scripts not in path.split(os.pathsep):
        path = scripts + os.pathsep + path
    extensions = str(Path.home() / ".cache" / "mesocosm" / "torch_extensions")
    env = {
        "OMP_NUM_THREADS": "1",
        "PATH": path,
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", extensions),
        "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return env | _inherited(CACHE_VARIABLE)


def _inherited(name: str) -> dict[str, str]:
    return {name: os.environ[name]} if name in os.environ else {}


def ensure(config: RayConfig, *, temp_dir: str | None = None) -> None:
    """Connect to `config.address`, or start a private local Ray; a second call does nothing.

    Raises:
        UsageError: The address does not answer or wants another token, or this process is a fork.
        MesocosmError: Ray cannot start on this machine.
        KeyboardInterrupt: A signal that ends the job came while Ray started, and waited for it.
    """
    import ray

    refuse_fork()
    if ray.is_initialized():
        return
    start_s = str(GROWING_S if FULL in os.environ else 120)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", start_s)
    os.environ.update(worker_env())
    with signals.held_back() as held:
        if config.address is not None:
            _connect(config.address)
        else:
            _start(config, temp_dir)
    if held:
        raise KeyboardInterrupt


def _connect(address: str) -> None:
    import ray
    from ray.exceptions import RayError

    if address.startswith(("127.0.0.1:", "localhost:")):
        # A private Ray of this machine (see `_start`): else Ray asks at the machine's own address.
        compat.loopback_only()
        compat.send_token_of_home()
    job_config: Any = compat.job_config_of_command_line() if IMPORTS in os.environ else None
    env = worker_env() | _inherited(IMPORTS)
    for local in ("PATH", "TORCH_EXTENSIONS_DIR"):
        del env[local]
    try:
        ray.init(
            address=address,
            runtime_env={"env_vars": env},
            job_config=job_config,
            log_to_driver=True,
            logging_level=logging.WARNING,
        )
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, RayError) as error:
        ray.shutdown()
        if _is_about_token(error):
            raise UsageError(f"ray.address {address!r} {_token_problem()}") from error
        fix = "start the cluster or leave ray.address unset"
        raise UsageError(f"ray.address {address!r} does not answer ({error}); {fix}") from error


def _token_problem() -> str:
    default = Path.home() / ".ray" / "auth_token"
    names = [name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(name)]
    if not names and not default.exists():
        fix = "copy that Ray's token to ~/.ray/auth_token (chmod 600)"
        return f"wants a token, and this machine has none; {fix}"
    source = f"${names[0]}" if names else default
    return f"does not accept the token in {source}; copy that Ray's token there"


def _is_about_token(error: BaseException | None) -> bool:
    """True if a wrong or missing token is among the causes. Ray gives the cause as text only."""
    while error is not None:
        if "AuthenticationError" in f"{type(error).__name__} {error}":
            return True
        error = error.__cause__ or error.__context__
    return False


def _start(config: RayConfig, temp_dir: str | None) -> None:
    """Start a private Ray on loopback."""
    global _folder
    import ray

    compat.loopback_only()
    _protect_token()
    if temp_dir is None:
        _folder = SessionFolder()
        temp_dir = _folder.path
    job_config: Any = compat.job_config_of_command_line() if IMPORTS in os.environ else None
    for attempt in range(1, STARTS + 1):
        try:
            with compat.private_start():
                ray.init(
                    address="local",
                    num_cpus=local_cpus(config),
                    include_dashboard=False,
                    job_config=job_config,
                    _temp_dir=temp_dir,
                    _node_ip_address="127.0.0.1",
                    object_store_memory=512 * 1024**2,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
            break
        except Exception as error:  # Ray raises a bare Exception when one of its daemons is late
            ray.shutdown()
            if attempt < STARTS:
                continue
            if _folder is not None:
                _folder.release()  # the logs stay; `storage gc` lists them
                _folder = None
            reason = f"in {STARTS} attempts ({' '.join(str(error).split())})"
            fix = f"free some CPU or memory, or see {temp_dir}"
            raise MesocosmError(f"Ray did not start on this machine {reason}; {fix}") from error
    atexit.register(shutdown)


def _protect_token() -> None:
    """Make the token of private Rays. Ray itself makes one that everybody may read."""
    token = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if token or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    path = Path.home() / ".ray" / "auth_token"
    try:
        if path.exists() and path.stat().st_uid == os.getuid() and path.stat().st_mode & 0o077:
            path.chmod(0o600)
    except OSError as error:
        reason = f"cannot be protected ({error.strerror})"
        raise UsageError(f"{str(path)!r} {reason}; run: chmod 600 {path}") from error
    make_token(path, "set RAY_AUTH_TOKEN_PATH to a token file of your own")


def describe(resources: Mapping[str, float]) -> str:
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    return f"{cpus:g} CPUs, {gpus:g} GPUs, {resources.get('memory', 0) / 2**30:.0f} GiB"


def most() -> dict[str, float]:
    """The cluster's resources, at full size if it grows, which its file states and Ray does not."""
    import ray

    have = {name: float(amount) for name, amount in ray.cluster_resources().items()}
    full: dict[str, float] = json.loads(os.environ.get(FULL, "{}"))
    return have | {name: max(have.get(name, 0.0), amount) for name, amount in full.items()}


def local_cpus(config: RayConfig) -> int:
    """Logical CPUs of a local Ray."""
    return config.cpus or max(4, os.cpu_count() or 1)


def preflight(
    *, key: str, cpus: float = 0, gpus: float = 0, config: RayConfig | None = None
) -> None:
    """Raise UsageError where the cluster can never grant the resources that `key` asks for. With
    `config`, check the Ray that it would start or connect to, instead of the running one.
    """
    import ray

    if config is not None and config.address is not None:
        ensure(config)
    if config is None or ray.is_initialized():
        have = most()
    else:
        import torch

        have = {"CPU": float(local_cpus(config)), "GPU": float(torch.cuda.device_count())}
    for name, need in (("CPU", cpus), ("GPU", gpus)):
        if need > have.get(name, 0):
            problem = f"{key} asks for {need:g} {name}s and the cluster has {have.get(name, 0):g}"
            raise UsageError(f"{problem}; lower it, or use a larger cluster")


def stuck(problem: str) -> NoReturn:
    """Raise MesocosmError for a job that waits for resources, with those of the cluster."""
    import ray

    have, free = ray.cluster_resources(), ray.available_resources()
    names = [name for name in ("CPU", "GPU") if name in have]
    report = ", ".join(f"{free.get(n, 0):g} of {have[n]:g} {n}s free" for n in names)
    raise MesocosmError(
        f"{problem}: the cluster has {report or 'no CPU at all'}; bring its nodes back or free"
        " some, and run the same command again to go on"
    )


def shutdown() -> None:
    """End what `ensure` started, whatever signals come meanwhile. It may be called twice."""
    global _folder
    with signals.held_back():
        if "ray" in sys.modules:
            import ray

            if ray.is_initialized():
                ray.shutdown()
        if _folder is not None:
            _folder.remove()
            _folder = None
