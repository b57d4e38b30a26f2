"""The only module that connects to Ray: one connection a process, a preflight of resources, a clean
end.

A local Ray is private to this process: loopback only, its own temporary folder, no dashboard, no
usage report. What it started ends with `shutdown`, which also runs at exit.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from mesocosm import compat, signals
from mesocosm.cluster import spec as cluster_spec
from mesocosm.config import RayConfig
from mesocosm.errors import MesocosmError, UsageError
from mesocosm.store.files import CACHE_VARIABLE

STARTS = 3
"""Attempts at a local Ray: on a loaded machine one of its daemons may miss the 30 s that Ray gives
it.
"""

FULL = "MESOCOSM_FULL_SIZE"
"""The environment variable of a submitted job, where its cluster grows: JSON of the CPUs and GPUs
that it has at full size.
"""

GROWING_S = 3600
"""Seconds that ranks wait for their places where the cluster grows: a cloud's machine takes minutes
to come, and a rare one longer.
"""

IMPORTS = "MESOCOSM_IMPORTS"
"""The environment variable with the folder where the command line was started: a user's modules are
imported from it."""

SESSION = "mesocosm-ray-"
"""A private Ray's temporary folder begins with this name."""

OWNER = "owner.lock"
"""The file in a private Ray's folder that its process locks: a free lock means that it has ended.
"""

SHORT = "/tmp"
"""Where a private Ray's folder lies when TMPDIR is too long for its sockets; TMPDIR then holds a
link to it.
"""

SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1"
"""The longest path of a socket in Ray's temporary folder."""

_temp_dir: str | None = None
_owner: int | None = None
_link: str | None = None

_forked = False
"""Whether this process was forked from one that was connected to Ray.

Ray's threads do not survive a fork.
"""


def _after_fork() -> None:
    global _forked, _temp_dir, _link
    # A module that is still being imported has no `is_initialized` yet.
    connected = getattr(sys.modules.get("ray"), "is_initialized", None)
    _forked = _forked or (connected is not None and connected())
    _temp_dir = _link = None  # the parent's


os.register_at_fork(after_in_child=_after_fork)


def forked() -> bool:
    """Whether this process was forked from one that was connected to Ray."""
    return _forked


def refuse_fork() -> None:
    """Raise UsageError in a fork of a process connected to Ray, where a call to Ray hangs."""
    if _forked:
        raise UsageError(
            f"process {os.getpid()} was forked from a process that is connected to Ray, "
            "and cannot use that connection; start it with the spawn method "
            "(in gymnasium.make_vec: vector_kwargs={'context': 'spawn'}), "
            "or step all environments in one process (leave vectorization_mode out)"
        )


def worker_env() -> dict[str, str]:
    """Environment of every worker: one thread a process, the venv's tools (ninja) on PATH, one
    cache of compiled ops.
    """
    scripts = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", "")
    return {
        "OMP_NUM_THREADS": "1",
        "PATH": path if scripts in path.split(os.pathsep) else scripts + os.pathsep + path,
        "TORCH_EXTENSIONS_DIR": os.environ.get(
            "TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache" / "mesocosm" / "torch_extensions")
        ),
        "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
        "TOKENIZERS_PARALLELISM": "false",
        **({CACHE_VARIABLE: os.environ[CACHE_VARIABLE]} if CACHE_VARIABLE in os.environ else {}),
    }


def ensure(config: RayConfig, *, temp_dir: str | None = None) -> None:
    """Connect to `config.address`, or start a private local Ray; a second call is a no-op.

    Signals that end a job wait until Ray has started; their handlers, which Ray replaces, are
    restored.

    Raises:
        UsageError: The address does not answer, or wants another token; or this process was forked
            from one that is connected to Ray.
        MesocosmError: Ray cannot start on this machine.
        KeyboardInterrupt: A signal that ends the job came while Ray started.
    """
    import ray

    refuse_fork()
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault(
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(GROWING_S if FULL in os.environ else 120)
    )
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
    from ray._private import ray_constants
    from ray._private.authentication import authentication_token_setup
    from ray.exceptions import RayError

    if address.startswith(("127.0.0.1:", "localhost:")):
        # A private Ray of this machine (see `_start`): else Ray asks at the machine's own address.
        ray_constants.ENABLE_RAY_CLUSTER = False
        # Such a Ray wants the token in ~/.ray, which Ray itself shows to no address that was named.
        authentication_token_setup.logger.setLevel(logging.ERROR)
        authentication_token_setup.maybe_enable_token_auth_if_token_available(
            warn_if_disabled=False
        )
    try:
        ray.init(
            address=address,
            runtime_env={"env_vars": _remote_env()},
            job_config=_job_config(),
            log_to_driver=True,
            logging_level=logging.WARNING,
        )
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, RayError) as error:
        ray.shutdown()
        if _is_about_token(error):
            raise UsageError(f"ray.address {address!r} {_token_problem()}") from error
        raise UsageError(
            f"ray.address {address!r} does not answer ({error}); start the cluster or leave"
            " ray.address unset"
        ) from error


def _token_problem() -> str:
    token = _token_source()
    if token is None:
        return (
            "wants a token, and this machine has none; copy that Ray's token to ~/.ray/auth_token"
            " (chmod 600)"
        )
    return f"does not accept the token in {token}; copy that Ray's token there"


def _is_about_token(error: BaseException | None) -> bool:
    """Whether a wrong or missing token is among the causes. Ray gives the cause as text only."""
    while error is not None:
        if "AuthenticationError" in f"{type(error).__name__} {error}":
            return True
        error = error.__cause__ or error.__context__
    return False


def _token_source() -> str | None:
    """Where Ray reads its token from on this machine; None where there is none."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        if os.environ.get(name):
            return f"${name}"
    return str(path) if (path := Path.home() / ".ray" / "auth_token").exists() else None


def _job_config() -> Any:
    return compat.job_config_of_command_line() if IMPORTS in os.environ else None


def _start(config: RayConfig, temp_dir: str | None) -> None:
    """Start a private Ray. On Linux Ray turns 127.0.0.1 into the machine's own address and listens
    on every interface; on macOS and Windows it stays on loopback, as here: nobody else may reach
    it.
    """
    global _temp_dir, _link
    import ray
    from ray._private import ray_constants

    _protect_token()
    if temp_dir is None:
        temp_dir = _temp_dir = _session_folder()
    ray_constants.ENABLE_RAY_CLUSTER = False
    for attempt in range(1, STARTS + 1):
        try:
            with compat.private_start():
                ray.init(
                    address="local",
                    num_cpus=local_cpus(config),
                    include_dashboard=False,
                    job_config=_job_config(),
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
                _temp_dir = _link = None  # the logs stay; `storage gc` lists them
                _release_owner()
                reason = " ".join(str(error).split())
                raise MesocosmError(
                    f"Ray did not start on this machine in {STARTS} attempts ({reason}); free some"
                    f" CPU or memory, or see {temp_dir}"
                ) from error
    atexit.register(shutdown)


def _protect_token() -> None:
    """Make the token of this machine's private Rays, for its owner alone: Ray itself makes one that
    everybody may read."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    path = Path.home() / ".ray" / "auth_token"
    try:
        if path.exists() and path.stat().st_uid == os.getuid() and path.stat().st_mode & 0o077:
            path.chmod(0o600)
    except OSError as error:
        reason = f"cannot be protected ({error.strerror})"
        raise UsageError(f"{str(path)!r} {reason}; run: chmod 600 {path}") from error
    cluster_spec.make_token(path, "set RAY_AUTH_TOKEN_PATH to a token file of your own")


def _session_folder() -> str:
    """A fresh folder for a private Ray, short enough for its sockets and locked by this process.

    Raises:
        MesocosmError: The folder cannot be made.
    """
    global _owner, _link
    base, temporary = tempfile.gettempdir(), tempfile.gettempdir()
    limit = (103 if sys.platform == "darwin" else 107) - len(SOCKET)
    if len(os.fsencode(os.path.join(base, f"{SESSION}12345678"))) > limit:
        base = SHORT
    try:
        folder = tempfile.mkdtemp(prefix=SESSION, dir=base)
        _owner = os.open(os.path.join(folder, OWNER), os.O_WRONLY | os.O_CREAT, 0o600)
        fcntl.flock(_owner, fcntl.LOCK_EX)
        if base != temporary:
            _link = os.path.join(temporary, os.path.basename(folder))  # for `storage gc`
            os.symlink(folder, _link)
    except OSError as error:
        longest = limit - len(SESSION) - 9
        raise MesocosmError(
            f"a folder for Ray cannot be made in {base!r} ({error.strerror}); set TMPDIR to a"
            f" folder of at most {longest} characters that can be written"
        ) from error
    return folder


def session_ended(folder: Path) -> bool:
    """Whether the process of a private Ray's folder has ended, which frees its lock."""
    try:
        handle = os.open(folder / OWNER, os.O_WRONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


def _release_owner() -> None:
    global _owner
    if _owner is not None:
        os.close(_owner)
        _owner = None


def _remote_env() -> dict[str, str]:
    """What of `worker_env` means the same on another machine, and where a user's modules are here."""
    imports = {IMPORTS: os.environ[IMPORTS]} if IMPORTS in os.environ else {}
    local = ("PATH", "TORCH_EXTENSIONS_DIR")
    return {name: value for name, value in worker_env().items() if name not in local} | imports


def describe(resources: Mapping[str, float]) -> str:
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    return f"{cpus:g} CPUs, {gpus:g} GPUs, {resources.get('memory', 0) / 2**30:.0f} GiB"


def most() -> dict[str, float]:
    """Of each resource what the cluster has, or will have when it has grown. Nobody tells Ray how
    far its autoscaler may go: the cluster's own file does.
    """
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
    *, what: str, cpus: float = 0, gpus: float = 0, config: RayConfig | None = None
) -> None:
    """Raise UsageError, naming `what`, when the cluster can never grant it.

    `what` is the config key and value that asks. With `config` Ray need not run: the check is
    against what it would have.
    """
    have = most() if config is None else expected(config)
    for name, need in (("CPU", cpus), ("GPU", gpus)):
        if need > have.get(name, 0):
            raise UsageError(
                f"{what} asks for {need:g} {name}s and the cluster has {have.get(name, 0):g}; lower"
                " it, or use a larger cluster"
            )


def stuck(what: str) -> NoReturn:
    """Raise MesocosmError: `what` waits for resources, of which the error says what the cluster
    has.
    """
    import ray

    have, free = ray.cluster_resources(), ray.available_resources()
    told = (
        ", ".join(
            f"{free.get(name, 0):g} of {have[name]:g} {name}s free"
            for name in ("CPU", "GPU")
            if name in have
        )
        or "no CPU at all"
    )
    raise MesocosmError(
        f"{what}: the cluster has {told}; bring its nodes back or free some, and run the same"
        " command again to go on"
    )


def shutdown() -> None:
    """End what `ensure` started, whatever signals come meanwhile. Safe to call twice."""
    global _temp_dir, _link
    with signals.held_back():
        if "ray" in sys.modules:
            import ray

            if ray.is_initialized():
                ray.shutdown()
        if _temp_dir is not None:
            shutil.rmtree(_temp_dir, ignore_errors=True)
            _temp_dir = None
            if _link is not None:
                with suppress(OSError):
                    os.unlink(_link)
                _link = None
        _release_owner()
