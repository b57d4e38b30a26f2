"""Patches of Ray and DeepSpeed, each with its reason, its version check and its reference upstream.

A patch depends on internals, so it is written for one minor version of its library (`TESTED`). On
another version a patch that saves time is left out, and one on which results, secrets or the place
of files depend raises UsageError. `tests/test_compat.py` shows what each library does with and
without its patch.

Importing this module imports no library, so the objects of libraries are Any here.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from mesocosm.errors import UsageError

TESTED = {"ray": "2.60", "deepspeed": "0.19"}
"""The minor version that the patches of a library are written for, as in constraints.txt."""


def is_tested(library: str) -> bool:
    """True if the installed version of `library` is one of its `TESTED` minor version."""
    return _installed(library).startswith(f"{TESTED[library]}.")


def untested(library: str, feature: str) -> UsageError:
    """The error of a `feature` that needs internals of the `TESTED` version of `library`."""
    tested = TESTED[library]
    return UsageError(
        f"{library} must be version {tested}, got {_installed(library)}: {feature} uses its"
        f" internals; run: pip install '{library}=={tested}.*'"
    )


def require_tested(library: str, feature: str) -> None:
    """Raise UsageError where the installed version of `library` is not the `TESTED` one."""
    if not is_tested(library):
        raise untested(library, feature)


def _installed(library: str) -> str:
    from importlib.metadata import version  # takes 0.1 s, which commands without Ray do not need

    return version(library)


@contextmanager
def private_start() -> Iterator[None]:
    """Around the `ray.init` that starts a private Ray.

    Ray's daemons get process groups of their own: `timeout`, Slurm and terminals signal the whole
    group of a job, and a job cannot end its Ray well once the daemons are gone. They still die with
    this process (PR_SET_PDEATHSIG). Ray's Python handler of SIGTERM is not installed: it calls
    `sys.exit` in the middle of `ray.init`, which leaves daemons behind.

    Half of the CPU seconds of a start are spared: no cluster autoscaler, no process for a dashboard
    that is off, no forwarding of logs that nobody reads, an agent without metrics, and workers
    start when something runs on them.

    With another version of Ray nothing is changed here, and `loopback_only` refuses the start.

    Upstream (ray 2.60.0, modules of `ray._private`):
        - `services.start_ray_process` passes no process group to `ConsolePopen`. No issue found.
        - `worker.init` installs a handler of SIGTERM: ray-project/ray#17308 (closed).
        - `node.Node.start_head_processes` always starts the autoscaler's monitor, intentionally:
          ray-project/ray#12629. `ray start` has --no-monitor (#13505), and `ray.init` has not.
        - `node.Node.start_api_server` starts a process without a dashboard, too, intentionally (see
          its docstring).
        - `node.Node.start_ray_processes` starts the log monitor whatever `log_to_driver` is. The
          option of ray-project/ray#48891 is of `ray start` alone.
        - `services.start_raylet` gives the agent metrics if they are installed. No issue found.
        - Ray starts workers ahead: ray-project/ray#40131 (open). Its own setting turns this off.
    """
    if not is_tested("ray") or sys.platform == "win32":
        yield
        return

    from unittest.mock import patch  # takes 60 ms, which commands without Ray do not need

    from ray._private import node, services, utils

    def left_out(self: Any, **options: Any) -> None:
        self._webui_url = None

    with ExitStack() as stack:
        for module, name, value in (
            (services, "ConsolePopen", partial(services.ConsolePopen, process_group=0)),
            (utils, "set_sigterm_handler", lambda handler: None),
            (utils, "get_dashboard_dependency_error", lambda: ImportError("left out")),
            (node.Node, "start_api_server", left_out),
            (node.Node, "start_monitor", left_out),
            (node.Node, "start_log_monitor", left_out),
        ):
            stack.enter_context(patch.object(module, name, value))
        stack.enter_context(patch.dict(os.environ, {"RAY_prestart_worker_first_driver": "0"}))
        yield


def loopback_only() -> None:
    """Let Ray keep the address 127.0.0.1, in this process from now on.

    On Linux Ray replaces 127.0.0.1 with the machine's own address, so that a private Ray would
    listen on the network. It keeps 127.0.0.1 where it cannot form a cluster, as on macOS.

    Raises:
        UsageError: The version of Ray is another one, which may listen on the network.

    Upstream (ray 2.60.0):
        `ray._private.services.get_node_ip_address`, intentionally: ray-project/ray#26293 (closed),
        ray-project/ray#59110 (open). RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 does the same, but only
        before Ray is imported.
    """
    require_tested("ray", "a Ray on loopback")
    from ray._private import ray_constants

    ray_constants.ENABLE_RAY_CLUSTER = False


def send_token_of_home() -> None:
    """Let `ray.init` send the token in ~/.ray to an explicit address, without its warning.

    A private Ray wants that token. `ray.init` looks for it only where it is given no address.

    Raises:
        UsageError: The version of Ray is another one.

    Upstream (ray 2.60.0):
        `ray._private.worker.init` intentionally does not call
        `maybe_enable_token_auth_if_token_available` for an explicit address: ray-project/ray#64755.
    """
    require_tested("ray", "a connection to a private Ray")
    from ray._private.authentication import authentication_token_setup as setup

    setup.logger.setLevel(logging.ERROR)
    setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def job_config_of_command_line() -> Any:
    """A JobConfig with which Ray's workers do not put the driver's folder first in `sys.path`.

    With Ray's default a file `http.py` beside the user replaces Python's own module in every
    worker. `mesocosm.user_code.import_module` appends the folder instead.

    Raises:
        UsageError: The version of Ray is another one, which may not call the method.

    Upstream (ray 2.60.0):
        `ray._private.worker.connect` adds the folder unless
        `JobConfig._runtime_env_has_working_dir`: ray-project/ray#43182 (open).
    """
    require_tested("ray", "the import path of workers")
    from ray.job_config import JobConfig

    class CommandLineJobConfig(JobConfig):
        def _runtime_env_has_working_dir(self) -> bool:
            return True

    return CommandLineJobConfig()


def keep_aws_keys_from_trials() -> None:
    """Leave the driver's AWS keys out of the runtime environment of Ray Tune's trials.

    Tune copies them there, and Ray logs runtime environments. Nodes have their own credentials.

    Raises:
        UsageError: The version of Ray is another one, which may log the keys.

    Upstream (ray 2.60.0):
        `ray.tune.execution.class_cache._ActorClassCache.get` copies them. No issue found.
        Ray logs runtime environments: ray-project/ray#28276 (open).
    """
    require_tested("ray", "a sweep on Ray Tune")
    from ray.tune.execution import class_cache

    names = class_cache.ENV_VARS_TO_PROPAGATE
    names.difference_update([name for name in names if name.startswith("AWS_")])


def algorithm_in_folder(base: type[Any], name: str, folder: Path) -> type[Any]:
    """A subclass `name` of the RLlib algorithm `base`, whose files are in the existing `folder`.

    RLlib otherwise makes a folder in ~/ray_results for an algorithm that is not a trial of Tune.

    Raises:
        UsageError: The version of Ray is another one.

    Upstream (ray 2.60.0):
        `ray.tune.Trainable._setup_logdir`: ray-project/ray#46592 (open). The argument for this,
        `logger_creator`, was removed in ray-project/ray#61181.
    """
    require_tested("ray", "an agent's folder")

    def _setup_logdir(self: Any) -> None:
        self._logdir = str(folder)

    return type(name, (base,), {"_setup_logdir": _setup_logdir})


def wait_for_weights(group: Any) -> None:
    """Let an EnvRunnerGroup's `sync_weights` wait until the runners have the previous weights.

    RLlib otherwise drops weights while it has not noticed the end of the previous transfer, which
    happens on a busy machine: the runners then act by an earlier policy.

    Raises:
        UsageError: The version of Ray is another one, which may drop weights.

    Upstream (ray 2.60.0):
        `EnvRunnerGroup.sync_weights` does not wait by default (ray-project/ray#30509), and
        `FaultTolerantActorManager.foreach_actor_async` drops a call to a runner with one in flight,
        as of ray-project/ray#56953 also for weights. No issue found.
    """
    require_tested("ray", "the transfer of an agent's weights")
    group.sync_weights = partial(group.sync_weights, timeout_seconds=None)


def sample_infos(buffer: Any) -> None:
    """Let a replay buffer of RLlib sample episodes with their infos, which hold the durations.

    Raises:
        UsageError: The version of Ray is another one, which may leave the infos out.

    Upstream (ray 2.60.0):
        `DQN._training_step_new_api_stack`, which SAC shares, does not pass `include_infos` to the
        buffer's `sample`. Batches without infos are intentional: ray-project/ray#50249.
    """
    require_tested("ray", "a replay buffer with durations")
    buffer.sample = partial(buffer.sample, include_infos=True)


@contextmanager
def mlflow_hidden() -> Iterator[None]:
    """Around `import deepspeed`, which then does not import mlflow: half of its 13 s of CPU time.

    With another version of DeepSpeed nothing is changed.

    Upstream (deepspeed 0.19.8):
        `deepspeed.autotuning.autotuner` imports mlflow if it is installed, since
        deepspeedai/DeepSpeed#2495. No issue found.
    """
    if "mlflow" in sys.modules or not is_tested("deepspeed"):
        yield
        return
    sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["mlflow"]


def list_no_ops(deepspeed: Any) -> None:
    """Make `deepspeed`, the imported module, list no op as compatible with this machine.

    On CPU its backend otherwise probes compilers and builds an op for inference alone (40 s, needs
    ninja). The optimiser here is torch's own, so no op is needed.

    With another version of DeepSpeed nothing is changed.

    Upstream (deepspeed 0.19.8):
        `deepspeed.comm.torch.build_shm_op`, which every `TorchBackend` calls.
        deepspeedai/DeepSpeed#7108 (open) is a build that fails.
    """
    if is_tested("deepspeed"):
        deepspeed.ops.__compatible_ops__ = {}
