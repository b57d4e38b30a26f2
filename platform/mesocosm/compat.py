"""Changes to Ray's internals, each with its reason and the tested versions of Ray."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

TESTED_RAY = "2.60."


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
    """
    from unittest.mock import patch  # takes 60 ms, which commands without Ray do not need

    import ray
    from ray._private import node, services, utils

    if not ray.__version__.startswith(TESTED_RAY) or sys.platform == "win32":
        yield
        return

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


def job_config_of_command_line() -> Any:
    """A JobConfig with which Ray's workers do not put the driver's folder first in `sys.path`.

    With Ray's default a file `http.py` beside the user replaces Python's own module in every
    worker. `mesocosm.user_code.import_module` appends the folder instead.
    """
    from ray.job_config import JobConfig

    class CommandLineJobConfig(JobConfig):
        def _runtime_env_has_working_dir(self) -> bool:
            return True

    return CommandLineJobConfig()
